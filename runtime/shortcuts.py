"""Counts shortcut-like phrasing in insights and behaviors (B.3)."""

import re

# What B.3 counts as contamination, in patterns of our own: the paper prints none. A measurement,
# and a coarse one.
SHORTCUTS = {
    "attempts": (
        r"(?i)\b(?:(?:in)?correct|wrong|failed|successful|previous|earlier|past|prior|these|both|all"
        r"|other|most) (?:attempt|response|rollout|submission)s?\b"
        r"|\battempt \d"
        r"|\bthe (?:model|student|assistant|grader|verifier"
        r"|(?:first|second|third|last)? ?attempt|response)\b"
    ),
    "options": (
        r"\b(?i:options?|choices?|answers?)(?: is| was|:)? \(?[A-J]\b\)?(?! [a-z]+ing\b)"
        r"|(?<!\w)\([A-J]\)"
        r"|\b[B-J] (?:is|was) (?:the )?(?:in)?correct\b"
        r"|(?i:\b(?:first|second|third|fourth|last) (?:option|choice)\b)"
    ),
    "tactics": (
        r"(?i)\bprocess of elimination\b"
        r"|\b(?:eliminat|rul)\w* (?:out )?(?:\w+ ){0,2}(?:options|choices|answers)\b"
        r"|\bguess(?:es|ing)?\b"
        r"|\b(?:longest|shortest|most \w+) (?:option|choice|answer)\b"
        r"|\bdistractors?\b"
        r"|\b(?:all|none) of the above\b"
        r"|\b(?:pick|select|choose) the (?:option|choice|answer)\b"
        r"|\bhard-?cod"
    ),
    "problem": (
        r"(?i)\b(?:this|the given|the above|the current|the provided|the present|the following)"
        r" (?:\w+ )?(?:question|problem|exercise|task|case|example|sample|molecule|compound"
        r"|reaction|sequence|protein|passage|input)\b"
    ),
}


def shortcuts(text) -> list[str]:
    """The families of shortcut-like phrasing found in an insight or behavior (B.3): talk of
    attempts, option letters, test-taking tactics, phrases tied to one problem.
    """
    return [family for family, pattern in SHORTCUTS.items() if re.search(pattern, text)]
