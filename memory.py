"""The three-tier memory of PMD: experience -> insight -> behavior (Eq. 2 to 5, B.1 to B.3).

    experience   raw attempts, per problem            at most 5 successes and 3 failures, behind a novelty gate
    insight      strategies and lessons, per problem  written by the model itself out of its experience, 10 + 10
    behavior     name and instruction, one bank       patterns that recur across the problems of a cluster, 500

Everything lives in one SQLite file, append-only. A row has the step it was `born` and, once it is replaced, evicted or
contradicted, the step it `ended`; nothing is ever overwritten, and dropped is only the embedding of an attempt or insight
that ended. The memory as it stood at the end of step t is therefore a query (`as_of`), and so is going back to it
(`truncate_after`). Counters come from the `event` table.

This file imports neither torch nor any model. It is handed plain callables:

    embed(texts)      -> (len(texts), D) numbers of any type; `unit_rows` makes float32 rows of unit length of them
    generate(prompts) -> one text per prompt; the policy itself, through the run's sampler
    abstractor        -> the same for behaviors only, where another model writes them (the paper's was GPT-5.4)

To look at the memory of a run, also of one that is still going:

    python memory.py show runs/x/memory.db [--problem ID | --tier behavior] [--step N] [--grep TEXT]
    python memory.py stats runs/x/memory.db        growth as in the paper's Figure 6: a table and a PNG

Whatever a model wrote is data: it is stored as text, parsed as JSON by a tolerant parser that runs nothing, joined by
concatenation (never as a format string), and `neutralise` breaks the tokenizer's control tokens and the template's turn
markers in it before it enters a prompt.

Ours, because the paper does not say: thresholds of the gates, the clustering (k-means on question embeddings), which
problems of a cluster its prompt shows, what is cut first under a token budget, how many existing behaviors an update
sees, the prompts for code, the patterns of `shortcuts`. `ground_insights` is an addition to the paper, off by default;
see `Memory`.
"""

import argparse
import contextlib
import functools
import itertools
import json
import random
import re
import signal
import sqlite3
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from json_repair import repair_json
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

SCHEMA_VERSION = 2
SUCCESS = 0.5  # a reward above this is a success (SDPO code: success_reward_threshold)

# ---------------------------------------------------------------------------------------------------------------------
# Prompts. The headings of the teacher's prompt are the paper's (B.2); all other sentences are ours.
# ---------------------------------------------------------------------------------------------------------------------

STRATEGIES = "Relevant strategies from correct solutions to this problem:"
LESSONS = "Lessons from past failed attempts on this problem:"
BEHAVIORS = "Reasoning skills learned across all problems (apply those that are relevant):"
SOLUTION = "Correct solution:"
EXAMPLES = "Correct solutions to similar problems:"
FEEDBACK = "The following is feedback from your unsuccessful earlier attempt:"
CLOSING = "Correctly solve the original question."

# Sentences of prompts that other methods show, ours; nano's checkpoint reads them (nano/README.md says how each is used).
CRITIQUE = "Your attempt, corrected at its first wrong step:"
BEGINNING = "The beginning of a correct solution:"
REVISE_WRONG = "That was wrong; once more:"  # these two in the assistant's own turn, after an attempt
REVISE_RIGHT = "That was right; once more:"
AGAIN = "That attempt was wrong. Answer again, minding this critique:"  # opens a second message of the user
CRITIC = "Name the first wrong step of this attempt."
ASK_CONFIDENCE = "End with your confidence that the answer is right."  # stands after the problem
CONFIDENCE = "Confidence:"


@dataclass(frozen=True)
class Forms:
    """The sentences of one domain's reflection and abstraction prompts; their order is fixed by the two builders below.

    Only `ground_insights` uses the last two: `key_term` finds what carries an insight's claim, and `literal` says that
    such a term is the claim itself rather than a word about it.
    """

    role: str
    confidence: str  # our own template with {label}, {solved} and {total}; no model text ever goes through it
    problem: str
    correct: str
    wrong: str
    feedback: str
    contrastive: str
    strategies_only: str
    lessons_only: str
    abstract_role: str
    known: str
    cold_start: str
    decide: str
    key_term: str = r"[^\W\d_]{5,}"
    literal: bool = False


# One line a sentence: nano's tokenizer holds each of these lines as a single token, so that a tiny model can afford them.
NANO = Forms(
    role="Reflect on your attempts at this problem.",
    confidence="Confidence: {label}.",
    problem="Problem:",
    correct="Correct attempt:",
    wrong="Wrong attempt:",
    feedback="Feedback:",
    contrastive="Write strategies and lessons as JSON.",
    strategies_only="Write strategies as JSON.",
    lessons_only="Write lessons as JSON.",
    abstract_role="Find rules that recur across these problems.",
    known="Known behaviors:",
    cold_start="Write behaviors as JSON.",
    decide="Decide which behaviors are new, to update or to remove, as JSON.",
    key_term=r"[a-z]+[=!][a-z]+",
    literal=True,
)

ITEM = '{"title": "at most ten words", "content": "two to four sentences"}'
BEHAVIOR = '"name": "behavior_...", "instruction": "one or two sentences"'
ECHOES = ("at most ten words", "two to four sentences", "one or two sentences")  # what a model that does not follow copies


def forms_in_words(role, exercise, solution, feedback, about, particulars) -> Forms:
    """The prompts for a model that reads plain language (B.3 in our own words)."""
    rules = f"""Rules for every item:
- State knowledge of the field or a way of working that also helps with other {exercise}s of this kind.
- Do not refer to this particular {exercise}, to {particulars}.
- Do not mention attempts, {solution}s, verdicts, a model or a student.
- Give no advice about {about}.
Reply with this JSON and nothing else:
"""
    return Forms(
        role=role,
        confidence=f"Confidence in this {exercise}: {{label}} ({{solved}} of {{total}} {solution}s were correct).",
        problem=f"The {exercise}:",
        correct=f"A correct {solution}:",
        wrong=f"An incorrect {solution}:",
        feedback=feedback,
        contrastive=f"Compare what separates the correct from the incorrect {solution}s. Write two or three strategies that "
                    f"lead to correct {solution}s and two or three lessons that prevent the mistakes.\n{rules}"
                    f'{{"strategies": [{ITEM}], "lessons": [{ITEM}]}}',
        strategies_only=f"Write two or three strategies that make {solution}s like these correct.\n{rules}"
                        f'{{"strategies": [{ITEM}], "lessons": []}}',
        lessons_only=f"Work out what went wrong and write two or three lessons that prevent it.\n{rules}"
                     f'{{"strategies": [], "lessons": [{ITEM}]}}',
        abstract_role=f"Below are {exercise}s of one kind with what was learned from each. Find the patterns of reasoning "
                      "that recur across them, helpful ones and mistakes to avoid.",
        known="Behaviors that are already known:",
        cold_start="Write three to eight behaviors, each named behavior_ and a few words joined by underscores.\n"
                   f'{rules}{{"behaviors": [{{{BEHAVIOR}}}]}}',
        decide="Decide which behaviors to add, which known ones to rewrite and which known ones to remove because they are "
               f"wrong or covered by others.\n{rules}"
               f'{{"actions": [{{"action": "new, update or remove", {BEHAVIOR}}}]}}')


QUESTION = forms_in_words(  # multiple choice, and other questions with one short answer
    "You are a science teacher who turns solved and failed questions into general knowledge.", "question", "answer",
    "What was said about it:", "taking tests, such as guessing or eliminating options by their form",
    "its numbers or names, or to the letters or order of its options")
CODE = forms_in_words(
    "You are an experienced programmer who turns solved and failed programming problems into general knowledge.",
    "programming problem", "program", "What the tests said about it:",
    "passing tests by other means, such as answering known inputs from a table",
    "its story, or to the numbers of its examples and tests")
FORMS = {"nano": NANO, "question": QUESTION, "code": CODE}


def compose(problem, strategies=(), lessons=(), behaviors=(), solution="", feedback="", examples=(), critique="",
            beginning="") -> str:
    """The teacher's user message, block by block as in B.2; blocks without content are left out (Eq. 4 and 5).

    problem: str. strategies, lessons: (title, content) pairs. behaviors: (name, instruction) pairs. examples: (problem,
    solution) pairs, which B.2 has not: no teacher reads them, see Memory.inference_contexts. critique: an attempt rewritten
    up to and with its first wrong step. beginning: the first steps of a solution; both are for other methods. With no block
    at all the problem is returned as it is, so `compose(x) == x` tells that the teacher has nothing to add.
    """
    parts, solution = [], strip_thoughts(solution)
    if strategies:
        parts += [STRATEGIES, *(f"- {title}: {content}" for title, content in strategies)]
    if lessons:
        parts += [LESSONS, *(f"- {title}: {content}" for title, content in lessons)]
    if behaviors:
        parts += [BEHAVIORS, *(f"{i}. {name}: {text}" for i, (name, text) in enumerate(behaviors, 1))]
    if examples:
        parts += [EXAMPLES, *(line for question, text in examples for line in (question, strip_thoughts(text)))]
    if beginning:
        parts += [BEGINNING, beginning]
    if critique:
        parts += [CRITIQUE, critique]
    if solution:
        parts += [SOLUTION, solution]
    if feedback:
        parts += [FEEDBACK, feedback]
    return "\n".join([problem, *parts, CLOSING]) if parts else problem


def strip_thoughts(text) -> str:
    """A solution without its <think> part, which SDPO strips too."""
    return re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()


CUT_FIRST = ("examples", "behaviors", "lessons", "strategies", "feedback", "critique", "beginning", "solution")


def compose_within(budget, count, problem, **context) -> str:
    """`compose` within `budget` tokens, counted by count(text). Blocks give way in the order of CUT_FIRST, lists from their
    end (the least similar behavior, the newest insight), the solution last; the problem itself is never cut."""
    text = compose(problem, **context)
    for block in CUT_FIRST:
        while context.get(block) and count(text) > budget:
            context[block] = context[block][:-1] if isinstance(context[block], list) else ""
            text = compose(problem, **context)
    return text


def reflection_prompt(forms, problem, successes, failures, solved, total) -> str:
    """Asks for the insight of one problem (B.3): contrastive, strategies only or lessons only, by what there is.

    successes: texts. failures: (text, feedback) pairs. solved of total: the problem's success fraction, given to the
    model as a confidence signal (the label's thresholds, one and two thirds, are ours).
    """
    label = "low" if 3 * solved < total else "medium" if 3 * solved < 2 * total else "high"
    parts = [forms.role, forms.confidence.format(label=label, solved=solved, total=total), forms.problem, problem]
    for text in successes:
        parts += [forms.correct, text]
    for text, feedback in failures:
        parts += [forms.wrong, text] + ([forms.feedback, feedback] if feedback else [])
    both = forms.contrastive if successes and failures else forms.strategies_only if successes else forms.lessons_only
    return "\n".join([*parts, both])


def critic_prompt(problem, attempt, solution="") -> str:
    """Asks for the first wrong step of an attempt, beside a correct solution where there is one; for other methods."""
    parts = [CRITIC, problem, NANO.wrong, attempt]
    return "\n".join(parts + ([SOLUTION, solution] if solution else []))


def abstraction_prompt(forms, cluster, known) -> str:
    """Asks for the behaviors of one cluster: from nothing (cold start), or as decisions on the `known` ones.

    cluster: (problem, lines) pairs, the lines being its insights, or its experience where it has none yet.
    known: (name, instruction) pairs.
    """
    parts = [forms.abstract_role]
    for problem, lines in cluster:
        parts += [forms.problem, problem, *lines]
    if known:
        parts += [forms.known, *(f"{name}: {instruction}" for name, instruction in known)]
    return "\n".join([*parts, forms.decide if known else forms.cold_start])


# ---------------------------------------------------------------------------------------------------------------------
# Text from a model
# ---------------------------------------------------------------------------------------------------------------------

MAX_REPLY, MAX_ITEMS, MAX_CONTENT = 20_000, 16, 2_000  # characters, items, characters; ours
TITLE_WORDS, SENTENCES = 10, 4  # of an item, at most (B.3)


def clean(text) -> str:
    """Text that SQLite and a tokenizer accept: no NUL, no lone surrogates."""
    return str(text).replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Folded(dict):
    """A table for str.translate: each character as a normalising tokenizer may see it (NFKC, lower case), one for one."""

    def __missing__(self, code):
        folded = unicodedata.normalize("NFKC", chr(code)).lower()
        self[code] = folded if len(folded) == 1 else chr(code)
        return self[code]


FOLDED = Folded()


def neutralise(text, control_tokens) -> str:
    """Breaks every control token in `text` with a space after its first character, so that it can't open a chat turn.

    control_tokens: texts; one of a single character is left alone. They are found in upper and lower case, in full-width
    and other compatible characters, and with any white space where they have some.
    """
    text, finder = clean(text), token_finder(frozenset(control_tokens))
    while found := [m.start() + first_joint(m[0]) for m in finder.finditer(text.translate(FOLDED))]:
        borders = [0, *found, len(text)]
        text = " ".join(text[a:b] for a, b in itertools.pairwise(borders))  # where two overlap, the next round
    return text


@functools.cache
def token_finder(control_tokens) -> re.Pattern:
    """Finds any of the control tokens in a text that went through FOLDED."""
    words = [t.translate(FOLDED).split() for t in sorted(control_tokens, key=len, reverse=True)]
    patterns = [r"\s+".join(map(re.escape, w)) for w in words if max(map(len, w), default=0) > 1]
    return re.compile("|".join(patterns) or r"(?!)")


def first_joint(token) -> int:
    """The first place between two characters that are no white space: a space there makes another text of any token."""
    return next(i for i in range(1, len(token)) if not (token[i - 1].isspace() or token[i].isspace()))


# Where a reply holds what it was asked for: a key and the list (or the one object, or a text, which is none) behind it
ASKED = re.compile(r"""(?i)(?<![\w\\])["'“]?(strategies|lessons|behaviors|actions)["'”]?\s*+[:=]\s*+(?=[\[{"])""")
# What opens or ends a value, with the string that follows. A quote inside a string need not be escaped: one that no
# delimiter follows does not end it
STRING = r"""(?P<quote>["'])(?:\\.?|(?!(?P=quote)\s*+(?:[,:}\]]|\Z))[^\\])*+(?P=quote)?"""
# Where a model's thoughts begin and end: <think>, <thinking>, [THINK], <|begin_of_thought|> ...
THOUGHTS = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|analysis|scratchpad)"
TAG = (rf"(?P<begins><{THOUGHTS}\s?>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>|<\|START_THINKING\|>)|"
       rf"(?P<ends></{THOUGHTS}\s?>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>|<\|END_THINKING\|>)")
PIECE = re.compile(rf"{TAG}|[\[{{,:](?:\s*+{STRING})?|[\]}}]", re.S | re.I)
TAG = re.compile(TAG, re.I)
# The end of a text that is whole. A closing quote alone does not tell: it may open a quotation that the limit cut
SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][^\w\s]*\Z")
MAX_PLACES, MAX_DEPTH = 16, 8  # keys that are looked at in one reply; brackets in brackets


@dataclass
class Place:
    """One asked-for key in a reply and the texts of the objects behind it."""

    key: str
    start: int
    end: int  # of the list, or of its last whole object where the reply ends within the list
    rows: list[str]
    whole: str = ""  # all that stands behind the key, where that has an end
    cut: bool = False  # the reply ended within the list
    rest: str = ""  # the object that was open then


def parse(reply) -> dict | None:
    """{key: its rows} for each key that the prompts ask for (strategies, lessons, behaviors, actions) and a reply holds.

    None if it holds none. A key counts wherever it stands: behind thoughts, prose, LaTeX or code fences, in one object or
    several (their lists are joined), within another object. What stands in thoughts (see TAG) does not count. A row is an
    object, its fields in lower case, or None for what is none: callers count those. Broken JSON is repaired, object by
    object; an object that was open when the reply ended is left out, unless it lacks its closing bracket only and its last
    text ends as a sentence does: see `was_cut`.
    """
    found = {}
    for place in places(reply):
        found.setdefault(place.key, []).extend(rows_at(place))
    return found or None


def rows_at(place) -> list[dict | None]:
    """The rows behind one key: of valid JSON all of them, of broken JSON the objects that were found in it."""
    try:
        value = json.loads(place.whole, strict=False)
    except (RecursionError, ValueError):
        rows = [read_object(text) for text in place.rows[:MAX_ITEMS]]
        rows += [None] * (len(place.rows) - len(rows))
        open_one = place.rest.rstrip().removesuffix(",")
        if SENTENCE_END.search(open_one) and (row := read_json(open_one + "}")):
            rows.append(row)
        return rows
    if not isinstance(value, list):
        value = [value] if value else []
    return [fields_of(row) for row in value]


def was_cut(reply) -> bool:
    """Whether a reply ended within a list that was asked for, as at its token limit: the item that was open is dropped."""
    return any(place.cut for place in places(reply)[-1:])


def places(reply) -> list[Place]:
    """Where the reply, its LaTeX made valid JSON, holds the asked-for keys; without those in thoughts."""
    text = clean(reply)[:MAX_REPLY]
    if '\\"' in text and not ASKED.search(text):  # JSON that stands, escaped, in a string of JSON
        text = re.sub(r'\\([\\"/nt])', lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), text)
    text = keep_latex(text)
    found = [place_at(text, m) for m in itertools.islice(ASKED.finditer(text), MAX_PLACES)]
    outside = text
    for place in found:  # a tag within an item is no tag
        outside = outside[:place.start] + " " * (place.end - place.start) + outside[place.end:]
    tags = [(place, TAG.search(outside, place.end)) for place in found]
    return [place for place, tag in tags if not (tag and tag["ends"])]


def place_at(text, match) -> Place:
    """Reads the list (or object) behind a key, bracket by bracket; a closing bracket closes those that it skips, too."""
    start, stack, begin = match.end(), [], None
    place = Place(match[1].lower(), start, start, [])
    if text[start] == '"':
        place.rows.append("")  # a row that can't be read
        return place
    outer = 1 if text[start] == "[" else 0  # brackets around an item
    for piece in PIECE.finditer(text, start):
        mark, at = piece[0][0], piece.start()
        if piece["begins"] or piece["ends"] or len(stack) > MAX_DEPTH:
            return place
        if mark in "[{":
            if mark == "{" and len(stack) == outer:
                begin = at
            stack.append(mark)
        if mark in "]}":
            opener = "[" if mark == "]" else "{"
            while stack and stack.pop() != opener:
                pass
            if begin is not None and len(stack) <= outer:
                place.end = at + (mark == "}")
                place.rows.append(text[begin: place.end])
                begin = None
            if not stack:
                place.end = at + 1
                place.whole = text[start: place.end]
                return place
    place.cut, place.rest = True, "" if begin is None else text[begin:]
    return place


def read_object(text) -> dict | None:
    """A JSON object, repaired if need be."""
    if row := read_json(text):
        return row
    try:
        return fields_of(repair_json(text, return_objects=True))
    except (RecursionError, ValueError):
        return None


def read_json(text) -> dict | None:
    """A JSON object as the standard has it, but for raw line breaks in strings."""
    try:
        return fields_of(json.loads(text, strict=False))
    except (RecursionError, ValueError):
        return None


def fields_of(row) -> dict | None:
    return {str(k).strip().lower(): v for k, v in row.items()} if isinstance(row, dict) else None


# Commands of LaTeX that begin like JSON's escapes for a line break and a tab. \ni and \tt are left out: i and t are words
N_AND_T = frozenset("""
    nabla natural ncong ne nearrow neg negmedspace negthickspace negthinspace neq newcommand newenvironment newline
    newpage newtheorem nexists ngeq ngeqq ngeqslant ngtr nicefrac nLeftarrow nleftarrow nLeftrightarrow
    nleftrightarrow nleq nleqq nleqslant nless nmid nobreak nobreakspace nocite noindent nolimits nonumber nopagebreak
    norm normalfont normalsize not notag notin nparallel nprec npreceq nRightarrow nrightarrow nshortmid
    nshortparallel nsim nsubset nsubseteq nsubseteqq nsucc nsucceq nsupset nsupseteq nsupseteqq ntriangleleft
    ntrianglelefteq ntriangleright ntrianglerighteq nu num numberwithin nVDash nVdash nvDash nvdash nwarrow tag tan
    tanh tau tbinom tensor text textasciitilde textbackslash textbar textbf textbullet textcelsius textcolor
    textdegree textellipsis textemdash textendash textgreater textit textless textmd textmicro textmu textnormal
    textohm textperthousand textpm textrm textsc textsf textsl textstyle textsubscript textsuperscript texttimes
    texttrademark texttt textunderscore textup tfrac therefore theta thetasym thickapprox thicksim thickspace
    thinspace tilde times tiny to top transpose triangle triangledown triangleleft trianglelefteq triangleq
    triangleright trianglerighteq twoheadleftarrow twoheadrightarrow
    """.split())
ESCAPE = re.compile(r"""\\(?:(["\\/']|u[0-9a-fA-F]{4})|([A-Za-z]*))""")  # JSON's (and ', for the repairer), or letters


def keep_latex(text) -> str:
    """Doubles the single backslashes of LaTeX in a JSON text, so that a reader of JSON keeps its commands.

    The rule: `\\b`, `\\f` and `\\r` before a letter, `\\n` and `\\t` where all the letters that follow make a command of
    LaTeX, and whatever JSON has no escape for, are LaTeX; the rest is JSON's. It errs where what follows a line break or a
    tab happens to make one: `\\nu` before a line that begins with a lone u, `\\tan` before a column that begins with an.
    """
    def one(match):
        json_has_it, letters = match[1], match[2]
        control = letters in ("b", "f", "r") or letters and letters[0] in "nt" and letters not in N_AND_T
        return match[0] if json_has_it or control else "\\" + match[0]

    return ESCAPE.sub(one, text)


def parse_items(found, key, first, second) -> list[tuple[str, str]]:
    """The well-formed items under `key` of a parsed reply, each as the texts of its two fields; at most MAX_ITEMS.

    Each text becomes one line, so that it can't pass for a heading of the prompt it will stand in.
    """
    rows = found.get(key) if isinstance(found, dict) else None
    items = []
    for row in rows[:MAX_ITEMS] if isinstance(rows, list) else []:
        pair = [row.get(first), row.get(second)] if isinstance(row, dict) else [None, None]
        pair = [clean(x) if isinstance(x, str) else "" for x in pair]  # again: JSON escapes can hide what `parse` cleaned
        if all(x.strip() for x in pair):
            sentences = re.split(r"(?<=[.!?])(?<!\.\w\.) (?=[A-Z])", " ".join(pair[1].split()))[:SENTENCES]  # not at e.g. X
            while len(sentences) > 1 and len(" ".join(sentences)) > MAX_CONTENT:
                sentences.pop()
            items.append((" ".join(pair[0].split()[:TITLE_WORDS])[:MAX_CONTENT], " ".join(sentences)[:MAX_CONTENT]))
    return items


# What B.3 counts as contamination, in patterns of our own: the paper prints none. A measurement, and a coarse one.
SHORTCUTS = {
    "attempts": r"(?i)\b(?:(?:in)?correct|wrong|failed|successful|previous|earlier|past|prior|these|both|all|other|most) "
                r"(?:attempt|response|rollout|submission)s?\b|\battempt \d|\bthe (?:model|student|assistant|grader|verifier|"
                r"(?:first|second|third|last)? ?attempt|response)\b",
    "options": r"\b(?i:options?|choices?|answers?)(?: is| was|:)? \(?[A-J]\b\)?(?! [a-z]+ing\b)|(?<!\w)\([A-J]\)|"
               r"\b[B-J] (?:is|was) (?:the )?(?:in)?correct\b|(?i:\b(?:first|second|third|fourth|last) (?:option|choice)\b)",
    "tactics": r"(?i)\bprocess of elimination\b|\b(?:eliminat|rul)\w* (?:out )?(?:\w+ ){0,2}(?:options|choices|answers)\b|"
               r"\bguess(?:es|ing)?\b|\b(?:longest|shortest|most \w+) (?:option|choice|answer)\b|\bdistractors?\b|"
               r"\b(?:all|none) of the above\b|\b(?:pick|select|choose) the (?:option|choice|answer)\b|\bhard-?cod",
    "problem": r"(?i)\b(?:this|the given|the above|the current|the provided|the present|the following) (?:\w+ )?(?:question|"
               r"problem|exercise|task|case|example|sample|molecule|compound|reaction|sequence|protein|passage|input)\b",
}


def shortcuts(text) -> list[str]:
    """The families of shortcut-like phrasing found in an insight or behavior (B.3): talk of attempts, option letters,
    test-taking tactics, phrases tied to one problem."""
    return [family for family, pattern in SHORTCUTS.items() if re.search(pattern, text)]


# What an abstraction may call its decisions. A new behavior of a known name updates it, so that both are one to us.
DECISION = ("decision", "operation", "op", "type", "event")  # the fields that may say it where there is no `action`
WRITES = {"new", "add", "append", "create", "insert", "introduce", "save", "store", "update", "upsert", "adjust", "amend",
          "change", "combine", "edit", "extend", "generalize", "generalise", "improve", "merge", "modify", "modified",
          "refine", "replace", "revise", "rewrite", "rewritten", "strengthen"}
REMOVES = {"remove", "delete", "deprecate", "discard", "drop", "dropped", "eliminate", "erase", "forget", "prune", "purge",
           "retire"}
UNDECIDED = {"no", "not", "or", "don", "keep", "none", "unchanged"}


def decision_of(row) -> str:
    """What a row decides: "write", "remove", or "" where that is not clear. A row that says no decision is written."""
    others = [row[name] for name in DECISION if verbs_in(row.get(name))]
    verbs = verbs_in(row["action"] if "action" in row else others[0] if others else "new")
    return verbs.pop() if len(verbs) == 1 else ""


def verbs_in(said) -> set[str]:
    """Which of "write" and "remove" some words say, in any form of the verb (`Removed`, `add_behavior`)."""
    words = set(re.findall("[a-z]+", said.casefold())) if isinstance(said, str) else set()
    if words & UNDECIDED:
        return set()
    stems = words | {word.removesuffix(end) for word in words for end in ("d", "ed", "s")}
    return {verb for verb, known in (("write", WRITES), ("remove", REMOVES)) if stems & known}


def items_under(found, key, first, second) -> tuple[list[tuple[str, str]], int]:
    """`parse_items` of all that stands under `key`, and how many of its rows are none: they are counted, not lost."""
    rows = (found or {}).get(key, [])
    items = parse_items(found, key, first, second)
    return items, len(rows) - len(items)


def decisions(found) -> tuple[list[tuple[str, str]], list[str], int] | None:
    """A parsed abstraction: ((name, instruction) pairs to write, names to remove, how many rows are neither).

    Cold start and decisions may come under each other's key; a row without a decision is written. None where the reply
    has neither key.
    """
    if not found or not found.keys() & {"actions", "behaviors"}:
        return None
    rows = found.get("actions", []) + found.get("behaviors", [])
    writes, removes = [], []
    for row in rows[:MAX_ITEMS]:
        row = row or {}
        decision, name = decision_of(row), row.get("name")
        if decision == "write":
            writes += parse_items({"row": [row]}, "row", "name", "instruction")
        elif decision == "remove" and isinstance(name, str):
            removes.append(plain(name))
    return writes, removes, len(rows) - len(writes) - len(removes)


def plain(text) -> str:
    """A text without its white space's kind and amount, by which two texts are told to be the same."""
    return " ".join(clean(text).split())


def unit_rows(rows) -> np.ndarray:
    """(n, D) numbers, in an array, lists or tensors of any type, as float32 rows of unit length. Zeros stay zeros.

    Raises ValueError for what is no such table, and for numbers that are not finite.
    """
    try:
        rows = [row.detach().float().cpu().numpy() if hasattr(row, "detach") else row for row in rows]  # numpy: no bfloat16
        rows = np.array(rows, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the embedder gave no table of numbers ({error}): name another --embedder") from error
    if rows.ndim != 2:
        raise ValueError(f"the embedder gave an array of shape {rows.shape} where each text has to have a row: name another "
                         "--embedder")
    if not np.isfinite(rows).all():
        raise ValueError("the embedder gave numbers that are not finite, as float16 can: load it in float32, or name "
                         "another --embedder")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[(lengths == 0) | (np.abs(lengths - 1) < 1e-6)] = 1  # what is of unit length stays as it is, to the bit
    return (rows / lengths).astype(np.float32)


def gate(cosines, held, cap, novelty, same, names=None) -> tuple[list[int], int, int]:
    """The novelty gate of every tier: (which stay, how many newcomers were refused as duplicates, how many were updates).

    cosines (n, n): of the `held` living vectors, oldest first, and after them the newcomers, who come in one by one. A
    newcomer nearer than `novelty` to any that stay is refused, and so is one with the `same` (n, n) text. While all `cap`
    places are taken (by more, where a fork lowered it), the most redundant goes: the one with the highest cosine to any
    other, the newcomer included; the older of two. names: n keys. A newcomer takes the place of the one of its name; where
    it is refused, that one stays.
    """
    stay, refused, updates, cosines = list(range(held)), 0, 0, cosines.clip(-1, 1)
    np.fill_diagonal(cosines, -2.0)  # nothing is redundant because of itself
    for new in range(held, len(cosines)):
        others = [i for i in stay if names is None or names[i] != names[new]]
        if same[new, stay].any() or others and cosines[new, others].max() > novelty:
            refused += 1
            continue
        updates += len(stay) - len(others)
        stay = others
        while len(stay) >= cap:
            del stay[int(cosines[stay][:, [*stay, new]].max(1).argmax())]
        stay.append(new)
    return stay, refused, updates


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE problem (id TEXT PRIMARY KEY, text TEXT, cluster INTEGER, embedding BLOB);
CREATE TABLE item (
    id INTEGER PRIMARY KEY,
    tier TEXT,            -- experience, insight, behavior
    kind TEXT,            -- success, failure / strategy, lesson / behavior
    problem TEXT,         -- '' for behaviors: one bank for all
    title TEXT,           -- an insight's title, a behavior's name
    text TEXT,            -- completion / content / instruction
    reward REAL, feedback TEXT,
    evidence TEXT,        -- JSON list: an experience's rollout, an insight's experience ids, a behavior's problems
    shortcuts TEXT,       -- families of shortcut-like phrasing found in it, with spaces between
    born INTEGER, ended INTEGER,
    policy_step INTEGER,  -- steps the policy that wrote it had been trained for, NULL if another model wrote it
    embedding BLOB        -- float32; NULL of an experience or insight that ended, which no gate and no query needs
);
CREATE INDEX living ON item (tier, problem, kind) WHERE ended IS NULL;
CREATE INDEX ending ON item (ended) WHERE ended IS NOT NULL;
CREATE INDEX birth ON item (born);
CREATE TABLE event (  -- subject: a problem's id, an item's id after '#', or ''
    step INTEGER, subject TEXT, kind TEXT, n INTEGER, PRIMARY KEY (subject, kind, step)) WITHOUT ROWID;
CREATE INDEX happening ON event (step)
"""
COLUMNS = "id, tier, kind, problem, title, text, reward, feedback, evidence, shortcuts, born, ended, policy_step"
WITH_EMBEDDING = COLUMNS + ", embedding"
ENDED = "ended = ?, embedding = CASE tier WHEN 'behavior' THEN embedding END"  # a teacher reads the bank of the step before
AMONG = "IN (SELECT value FROM json_each(?))"  # membership in a JSON list, given as one argument

CURES = {"SQLITE_BUSY": "another process is writing it; wait until it is done, or stop it",
         "SQLITE_READONLY": "make the file and its folder writable, or choose another folder",
         "SQLITE_CANTOPEN": "make its folder, writable for you, or choose another",
         "SQLITE_FULL": "free some space on the disk; all that was committed before is safe",
         "SQLITE_IOERR": "look at the disk and its quota; all that was committed before is safe",
         "SQLITE_NOTADB": "name another file, or remove it",
         "SQLITE_CORRUPT": "go back to a checkpoint's copy, or remove it",
         "SQLITE_ERROR": "it was made by something else; name another file, or remove it"}


@dataclass
class Item:
    """One row of the memory; see TABLES for the fields. The embedding is None where the text alone was asked for, and where
    it was dropped as the item ended."""

    id: int
    tier: str
    kind: str
    problem: str
    title: str | None
    text: str
    reward: float | None = None
    feedback: str | None = None
    evidence: str = "[]"
    shortcuts: str = ""
    born: int = 0
    ended: int | None = None
    policy_step: int | None = 0
    embedding: np.ndarray | None = field(default=None, repr=False)

    @property
    def sources(self) -> list:
        """What it came from: an experience's rollout, an insight's experience ids, a behavior's problems."""
        return json.loads(self.evidence)  # only when asked: most readers of a row are not

    @property
    def embedded_text(self) -> str:
        """What its embedding is of."""
        return self.text if self.tier == "experience" else f"{self.title}: {self.text}"

    @classmethod
    def from_row(cls, row):
        item = cls(*row)
        if item.embedding is not None:
            item.embedding = np.frombuffer(item.embedding, np.float32)
        return item


class Memory:
    """Experience, insight and behavior in one SQLite file, and the model calls that make the upper two from the lower.

    path: the file; ":memory:" for none. embed, generate, abstractor: see the top of this file. embedder: the name of the
    embedding model. The caps are the paper's. fits(prompt): whether the model can read it; what is left out of a prompt to
    make it fit is counted. drop_shortcuts: items with shortcut-like phrasing are dropped, not only counted (B.3).

    mode: "evolving"; "transient", where behaviors come from clusters of this step's problems only, and the caller ends
    every step with `forget`; "frozen", another run's memory that is only read (the file is opened immutable). Its steps and
    rollouts are that run's: all that lives in it is read from the first step on.

    ground_insights, beyond the paper (it cures a small model that miscopies its own attempts and then locks in on the
    mistake). Reflection reads one attempt at a time, until an insight came from it. An insight is rejected unless that
    attempt, with its feedback, contains it; a behavior, unless the living strategies of two problems do. A strategy that
    a later failure contradicts ends. Contained: its key terms are. In nano a key term is a claim, such as zo=rev; all of
    them must be there, and a lesson holds either all claims of the attempt or only such as its feedback names. A failure
    ends the strategies that its feedback names, or where it has none and is made of nothing but living strategies, those;
    a success that holds all terms of a lesson ends the lesson. In plain text the key terms are the words of five letters or
    more, lower case, without a plural s, that are no stop words; half of them must be there (`HALF`), and a failure that
    holds all of a strategy's ends it. Rejections are counted. How often an item was offered to the teacher of a later
    success or failure is counted too (events support_success and support_failure, before the token budget); it changes
    nothing.

    Raises ValueError for a file that can't be a memory of this code and embedding model, OSError where the file can't be
    opened, read or written; a method that raises has changed nothing.
    """

    HALF = 0.5

    def __init__(self, path, embed, generate, abstractor=None, *, forms="nano", embedder=None, mode="evolving",
                 ground_insights=False, drop_shortcuts=False, query_feedback=False, max_successes=5, max_failures=3,
                 max_insights=10, max_behaviors=500, response_novelty=0.95, insight_novelty=0.85, clusters=16,
                 cluster_problems=8, cluster_insights=3, known_behaviors=8, retrieve_k=3, seed=0,
                 fits=lambda prompt: True):
        self.embed, self.generate, self.abstractor, self.fits = embed, generate, abstractor or generate, fits
        self.written_elsewhere = abstractor is not None
        self.forms, self.mode = FORMS[forms], mode
        self.ground_insights, self.drop_shortcuts, self.query_feedback = ground_insights, drop_shortcuts, query_feedback
        self.caps = {"success": max_successes, "failure": max_failures, "strategy": max_insights,
                     "lesson": max_insights, "behavior": max_behaviors}
        self.novelty = {"experience": response_novelty, "insight": insight_novelty, "behavior": insight_novelty}
        self.clusters, self.cluster_problems, self.cluster_insights = clusters, cluster_problems, cluster_insights
        self.known_behaviors, self.retrieve_k, self.seed = known_behaviors, retrieve_k, seed
        self.path, self._events, self._sizes = str(path), Counter(), Counter()
        self._open(embedder)

    def _open(self, embedder):
        frozen, path = self.mode == "frozen", Path(self.path)
        if frozen and not path.is_file():
            raise ValueError(f"there is no memory {path}; name the memory.db of a run")
        log = path.with_name(path.name + "-wal")  # commits of a run that is still going, or was killed
        how = "" if not frozen else "?mode=ro" if log.is_file() and log.stat().st_size else "?immutable=1"
        with self._explained():
            self.db = sqlite3.connect(self.path if self.path == ":memory:" else path.resolve().as_uri() + how, uri=True)
            if not frozen:
                self.db.execute("PRAGMA page_size = 8192")  # a row with its embedding fits on one page
                self.db.execute("PRAGMA journal_mode = WAL")
                self.db.execute("PRAGMA synchronous = NORMAL")  # with WAL a power cut may lose the last step, never corrupt
            if not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():  # new, or killed while it was made
                self.db.execute("BEGIN IMMEDIATE")
                for statement in TABLES.split(";\n"):
                    self.db.execute(statement)
                about = {"schema": SCHEMA_VERSION, "embedder": embedder or "", "dimension": self._vectors([" "]).shape[1],
                         "caps": json.dumps(self.caps)}
                self.db.executemany("INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in about.items()])
                self.db.commit()
            self.meta = dict(self.db.execute("SELECT key, value FROM meta"))
        if missing := [key for key in ("schema", "embedder", "dimension", "caps") if key not in self.meta]:
            raise ValueError(f"{path} is no memory of this code: it does not say its {missing[0]}; name another file, or "
                             "remove it")
        if self.meta["schema"] != str(SCHEMA_VERSION):
            raise ValueError(f"{path} has memory schema {self.meta['schema']}, this code reads {SCHEMA_VERSION}: use "
                             "the version that wrote it, or remove it")
        if embedder is not None and self.meta["embedder"] != embedder:
            raise ValueError(f"{path} was embedded by {self.meta['embedder']!r}, this run uses {embedder!r}: use that one")
        if self.embed and (now := self._vectors([" "]).shape[1]) != int(self.meta["dimension"]):
            raise ValueError(f"{path} holds embeddings of {self.meta['dimension']} dimensions, {embedder!r} gives {now}: "
                             "use the model that wrote it")
        self._sizes = Counter(dict(self._query("SELECT tier, COUNT(*) FROM item WHERE ended IS NULL GROUP BY tier")))

    @contextlib.contextmanager
    def _explained(self):
        """Errors of the database as one sentence that names the file and the cure."""
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            cure = next((cure for code, cure in CURES.items() if name.startswith(code)), "report this")
            kind = ValueError if name in ("SQLITE_NOTADB", "SQLITE_ERROR") else OSError
            raise kind(f"{self.path} can't be used as a memory ({error}): {cure}") from error

    @contextlib.contextmanager
    def _writing(self, step=0):
        """One transaction, which ends with the events noted so far: all of it is kept or, after an error, none."""
        before = self._sizes.copy()
        try:
            with self._explained(), self.db:
                yield
                self.db.executemany("INSERT INTO event VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
                                    [(step, *key, n) for key, n in self._events.items() if n])
        except BaseException:
            self._sizes = before
            raise
        finally:
            self._events.clear()

    def _query(self, statement, *args):
        with self._explained():
            return self.db.execute(statement, args).fetchall()

    # -- writing ------------------------------------------------------------------------------------------------------

    def add_problems(self, problems):
        """Embeds and clusters the training questions, once, before step 1. problems: objects with .id and .prompt."""
        if self._query("SELECT 1 FROM problem LIMIT 1"):
            return
        vectors = self._vectors([p.prompt for p in problems])
        labels = self._clustered(vectors, self.clusters)
        with self._writing():
            self.db.executemany("INSERT INTO problem VALUES (?, ?, ?, ?)", [
                (p.id, clean(p.prompt), int(c), v.tobytes()) for p, c, v in zip(problems, labels, vectors, strict=True)])

    def _clustered(self, vectors, k):
        return KMeans(min(k, len(np.unique(vectors, axis=0))), n_init=4, random_state=self.seed).fit_predict(vectors)

    def record(self, step, rollouts):
        """Tier 1, Eq. 2: keeps this step's attempts behind the novelty gate.

        rollouts: objects with .id (str), .problem (.id), .text, .reward, .feedback.
        """
        items = [Item(0, "experience", "success" if r.reward > SUCCESS else "failure", r.problem.id, None, clean(r.text),
                      r.reward, clean(r.feedback), json.dumps([r.id]), policy_step=step - 1) for r in rollouts]
        for item in items:
            self._events[item.problem, item.kind] += 1
        vectors = self._embedded(items)
        with self._writing(step):
            if self.ground_insights:
                self._contradict(step, items)
            self._admit(step, items, vectors)

    def reflect(self, step, problems):
        """Tier 2, Eq. 2: the model reads the accumulated experience of each problem and writes strategies and lessons.

        All prompts of the step go out as one batch. Insights accumulate behind the gate and are never overwritten.
        """
        ids = [p.id for p in problems]
        attempts, insights = self._of("experience", ids), self._of("insight", ids)
        solved = self._success_fractions(ids, step)
        jobs = []  # (problem, attempts) per prompt
        for p in problems:
            if self.ground_insights:  # one at a time
                done = {source for i in insights[p.id] for source in i.sources}
                jobs += [(p, [a]) for a in attempts[p.id] if a.id not in done]
            elif attempts[p.id]:
                jobs.append((p, attempts[p.id]))

        def prompt_of(problem, attempts):
            return reflection_prompt(self.forms, problem.prompt, [a.text for a in attempts if a.kind == "success"],
                                     [(a.text, a.feedback) for a in attempts if a.kind == "failure"], *solved[problem.id])

        for problem, read in jobs:  # too long for the model: the oldest attempt of the more frequent kind goes
            while read and not self.fits(prompt_of(problem, read)):
                kinds = [a.kind for a in read]
                del read[kinds.index(max(sorted(set(kinds)), key=kinds.count))]
                self._events[problem.id, "reflection_cut"] += 1
        jobs = [job for job in jobs if job[1]]
        written = []
        replies = self.generate([prompt_of(*job) for job in jobs]) if jobs else []
        for (problem, read), reply in zip(jobs, replies, strict=True):
            self._events[problem.id, "reflection"] += 1
            self._events.update({(problem.id, "reflection_truncated"): 1} if was_cut(reply) else {})
            found = parse(reply)
            strategies, odd = items_under(found, "strategies", "title", "content")
            lessons, odder = items_under(found, "lessons", "title", "content")
            if not strategies and not lessons:
                self._events[problem.id, "reflect_parse_failure"] += 1
            self._events[problem.id, "insight_rejected"] += odd + odder
            for kind, outcome, items in (("strategy", "success", strategies), ("lesson", "failure", lessons)):
                evidence = [a for a in read if a.kind == outcome]
                ids = json.dumps([a.id for a in evidence])
                for title, content in items:
                    item = Item(0, "insight", kind, problem.id, title, content, evidence=ids, policy_step=step - 1)
                    if self._measured(item) and evidence and content.casefold() not in ECHOES and (
                            not self.ground_insights or any(self._grounded(item, a) for a in evidence)):
                        written.append(item)
                    else:
                        self._events[problem.id, "insight_rejected"] += 1
        vectors = self._embedded(written)
        with self._writing(step):
            self._admit(step, written, vectors)

    def abstract(self, step):
        """Tier 3, Eq. 3: the insights of each cluster of similar questions become behaviors of the shared bank.

        An empty bank is filled from nothing (cold start); later the nearest existing behaviors are shown and the reply
        decides which are new, updated or removed. A behavior's name is its key: a new one of a known name updates it, and
        an update that the gate refuses leaves the old one as it was. Removals come first, whatever the order of a reply:
        a behavior that is to take the place of others must not be refused for being like them.
        """
        bank = self.living("behavior")
        jobs = self._cluster_prompts(step, bank)
        replies = self.abstractor([prompt for *_, prompt in jobs]) if jobs else []
        by_name, written, removed = {b.title: b.id for b in bank}, [], set()
        for (strategies, _, _), reply in zip(jobs, replies, strict=True):
            self._events["", "abstraction"] += 1
            self._events.update({("", "abstraction_truncated"): 1} if was_cut(reply) else {})
            taken = decisions(parse(reply))
            if taken is None:
                self._events["", "abstract_parse_failure"] += 1
                continue
            writes, removes, unread = taken
            removed.update(name for name in removes if name in by_name)
            self._events["", "behavior_rejected"] += unread + sum(name not in by_name for name in removes)
            for name, instruction in writes:
                sources = [problem for problem, texts in strategies.items() if not self.ground_insights or
                           any(self._contained(instruction, text) for text in texts)]
                item = Item(0, "behavior", "behavior", "", name, instruction, evidence=json.dumps(sources),
                            policy_step=None if self.written_elsewhere else step - 1)
                supported = (len(sources) >= 2 or not self.ground_insights) and instruction.casefold() not in ECHOES
                if self._measured(item) and name.startswith("behavior_") and supported:
                    written.append(item)
                else:
                    self._events["", "behavior_rejected"] += 1
        vectors = self._embedded(written)
        with self._writing(step):
            self._end(step, "behavior", [by_name[name] for name in removed])
            self._admit(step, written, vectors)

    def _cluster_prompts(self, step, bank):
        """({problem id: its strategies}, known behaviors, prompt) for each cluster that something is remembered of."""
        kinds = self.tally("insight")
        remembered = sorted({problem for tier in ("experience", "insight") for problem, _ in self.tally(tier)})
        random.Random(f"{self.seed} abstract {step}").shuffle(remembered)  # so that a large cluster shows others each time
        remembered.sort(key=lambda p: (not kinds[p, "strategy"], not kinds[p, "lesson"]))
        rows = self._query("SELECT id, cluster FROM problem")
        if self.mode == "transient":
            rows = self._query(f"SELECT id, embedding FROM problem WHERE id {AMONG} ORDER BY id", json.dumps(remembered))
            labels = self._clustered(np.stack([np.frombuffer(v, np.float32) for _, v in rows]),
                                     -(-len(rows) // self.cluster_problems)) if rows else []
            rows = [(pid, int(label)) for (pid, _), label in zip(rows, labels, strict=True)]
        label_of, clusters, jobs = dict(rows), defaultdict(list), []
        for pid in remembered:
            if pid in label_of and len(clusters[label_of[pid]]) < self.cluster_problems:
                clusters[label_of[pid]].append(pid)
        shown = json.dumps([pid for pids in clusters.values() for pid in pids])
        problems = {pid: (text, np.frombuffer(vector, np.float32)) for pid, text, vector in
                    self._query(f"SELECT id, text, embedding FROM problem WHERE id {AMONG}", shown)}
        insights, attempts = self._of("insight", problems), self._of("experience", problems)
        for _, pids in sorted(clusters.items()):
            known, = nearest(np.mean([problems[p][1] for p in pids], axis=0, keepdims=True), bank, self.known_behaviors)
            summary = []
            for pid in pids:
                newest = [i for kind in ("strategy", "lesson")
                          for i in [i for i in insights[pid] if i.kind == kind][-self.cluster_insights:]]
                raw = [f"{self.forms.correct if e.kind == 'success' else self.forms.wrong}\n{e.text}" for e in attempts[pid]]
                summary.append((problems[pid][0], [f"- {i.title}: {i.text}" for i in newest] or raw))
            names = [(b.title, b.text) for b in known]
            while summary and not self.fits(prompt := abstraction_prompt(self.forms, summary, names)):
                summary.pop()  # too long for the model: the last problem goes
                self._events["", "abstraction_cut"] += 1
            if summary:
                strategies = {p: [i.text for i in insights[p] if i.kind == "strategy"] for p in pids[: len(summary)]}
                jobs.append((strategies, known, prompt))
        return jobs

    def _measured(self, item) -> bool:
        """Notes an item that a model proposed, and shortcut-like phrasing in it; False if it is to be dropped for that."""
        families = shortcuts(f"{item.title}. {item.text}")
        item.shortcuts = " ".join(families)
        flags = [f"shortcut_{family}" for family in families] + ["shortcut"] * bool(families)
        self._events.update([(item.problem, kind) for kind in [f"{item.tier}_proposed", *flags]])
        return not (families and self.drop_shortcuts)

    def _vectors(self, texts):
        """(len(texts), D): what `embed` says of them, as the store and all cosines need it."""
        if not texts:
            return np.zeros((0, int(self.meta["dimension"])), np.float32)
        vectors = unit_rows(self.embed(texts))
        if len(vectors) != len(texts):
            raise ValueError(f"the embedder gave {len(vectors)} rows for {len(texts)} texts: name another --embedder")
        return vectors

    def _embedded(self, items):
        return self._vectors([i.embedded_text for i in items])

    def _admit(self, step, items, vectors):
        """Puts items of one tier, with their embeddings, through the gate of their problem and kind."""
        if not items:
            return
        tier, groups, admitted, lost = items[0].tier, defaultdict(list), [], []
        held = self._of(tier, {i.problem for i in items}, WITH_EMBEDDING)
        for item, vector in zip(items, vectors, strict=True):
            item.embedding = vector
            groups[item.problem, item.kind].append(item)
        for (problem, kind), new in groups.items():
            old = [i for i in held[problem] if i.kind == kind]
            table = np.stack([i.embedding for i in old + new])
            texts = np.array([plain(i.text) for i in old + new], object)
            names = [i.title for i in old + new] if tier == "behavior" else None
            stay, refused, updates = gate(table @ table.T, len(old), self.caps[kind], self.novelty[tier],
                                          texts[:, None] == texts, names)
            lost += [old[i].id for i in set(range(len(old))) - set(stay)]
            admitted += [new[i - len(old)] for i in stay if i >= len(old)]
            evicted = len(old) + len(new) - len(stay) - refused - updates
            for what, n in (("duplicate", refused), ("evicted", evicted), ("updated", updates)):
                self._events[problem, f"{tier}_{what}"] += n
        self._end(step, tier, lost)
        self.db.executemany(
            f"INSERT INTO item ({WITH_EMBEDDING}) VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?)",
            [(tier, i.kind, i.problem, i.title, i.text, i.reward, i.feedback, i.evidence, i.shortcuts,
              step, i.policy_step, i.embedding.tobytes()) for i in admitted])
        self._sizes[tier] += len(admitted)

    def _end(self, step, tier, ids):
        self.db.executemany(f"UPDATE item SET {ENDED} WHERE id = ?", [(step, id) for id in ids])
        self._sizes[tier] -= len(ids)

    # -- grounding (ours, `ground_insights`) --------------------------------------------------------------------------

    def _terms(self, text):
        found = re.findall(self.forms.key_term, text.lower())
        return {t.replace("!", "=") for t in found} if self.forms.literal else {
            t.removesuffix("s") for t in found if t not in ENGLISH_STOP_WORDS}

    def _contained(self, text, evidence) -> bool:
        terms = self._terms(text)
        return bool(terms) and len(terms & self._terms(evidence)) >= (1 if self.forms.literal else self.HALF) * len(terms)

    def _grounded(self, insight, attempt) -> bool:
        """Whether an attempt, with its feedback, contains an insight. In nano a lesson is about all terms of the attempt, at
        least one of which is wrong, or about terms that its feedback names: of the others nobody knows that they failed."""
        if self.forms.literal and insight.kind == "lesson":
            terms = self._terms(insight.text)
            return bool(terms) and (terms <= self._terms(attempt.feedback) or terms == self._terms(attempt.text))
        return self._contained(insight.text, f"{attempt.text}\n{attempt.feedback}")

    def _contradict(self, step, attempts):
        """Ends the insights that these attempts contradict; see the class."""
        insights = self._of("insight", {a.problem for a in attempts})
        for attempt in attempts:
            terms, kind = self._terms(attempt.text), "strategy" if attempt.kind == "failure" else "lesson"
            living = insights[attempt.problem]
            items = [i for i in living if i.kind == kind and self._terms(i.text) and self._terms(i.text) <= terms]
            blamed = self._terms(attempt.feedback or "") if self.forms.literal else set()
            if blamed and kind == "strategy":
                items = [i for i in items if self._terms(i.text) <= blamed]
            elif self.forms.literal and kind == "strategy":  # nothing else it did may be to blame
                items = items if set().union(*(self._terms(i.text) for i in items)) == terms else []
            elif kind == "lesson" and not self.forms.literal:  # a success that names a mistake need not have made it
                items = []
            if items:
                insights[attempt.problem] = [i for i in living if i not in items]
                self._end(step, "insight", [i.id for i in items])
                self._events[attempt.problem, "insight_contradicted"] += len(items)

    # -- reading ------------------------------------------------------------------------------------------------------

    def living(self, tier, problem=None) -> list[Item]:
        """The living items of a tier, oldest first; of one problem if it is given."""
        where, args = ("AND problem = ?", (problem,)) if problem is not None else ("", ())
        rows = self._query(f"SELECT {WITH_EMBEDDING} FROM item WHERE tier = ? AND ended IS NULL {where}", tier, *args)
        return sorted(map(Item.from_row, rows), key=lambda i: i.id)

    def _of(self, tier, problems, columns=COLUMNS) -> dict[str, list[Item]]:
        """{problem id: the living items of a tier, oldest first, by default without their embeddings}"""
        found = defaultdict(list)
        rows = self._query(f"SELECT {columns} FROM item WHERE tier = ? AND problem {AMONG} AND ended IS NULL",
                           tier, json.dumps(list(problems)))
        for item in sorted(map(Item.from_row, rows), key=lambda i: i.id):
            found[item.problem].append(item)
        return found

    def as_of(self, step, tier, problem=None) -> list[Item]:
        """The items of a tier that were alive at the END of `step`, oldest first; of one problem if it is given."""
        where, args = ("AND problem = ?", (problem,)) if problem is not None else ("", ())
        rows = [row for ended, by in (("ended IS NULL", ()), ("ended > ?", (step,))) for row in self._query(
            f"SELECT {WITH_EMBEDDING} FROM item WHERE {ended} AND +born <= ? AND tier = ? {where}", *by, step, tier, *args)]
        return sorted(map(Item.from_row, rows), key=lambda i: i.id)

    def contexts(self, rollouts, step, tiers=("experience", "insight", "behavior"), refreshed=False) -> list[dict]:
        """What the teacher may read for each rollout, as keyword arguments of `compose` (Eq. 4).

        A problem's own experience and insight after this step's update; behaviors from the bank as it was at the end
        of the step before (`refreshed`: after this step's refresh, as in Algorithm 1, lines 11 to 14); the most recent
        stored success that is not the rollout's own. `tiers` hides blocks for the ablations and changes no extraction;
        solution and feedback are those of experience (Table 4's modes).
        Of a frozen memory all behaviors and all successes: its steps and rollouts are another run's, even where the
        numbers and ids are alike.
        """
        frozen = self.mode == "frozen"
        problems = {r.problem.id: r.problem for r in rollouts}
        insights = self._of("insight", problems) if "insight" in tiers else defaultdict(list)
        attempts = self._of("experience", problems) if "experience" in tiers else defaultdict(list)
        bank = []
        if "behavior" in tiers:
            bank = self.living("behavior") if refreshed or frozen else self.as_of(step - 1, "behavior")
        if self.query_feedback and bank:  # B.5: optional
            queries = self._vectors([f"{r.problem.prompt}\n{clean(r.feedback)}" for r in rollouts])
            skills = nearest(queries, bank, self.retrieve_k)
        else:
            found = nearest(self._question_vectors(problems.values()), bank, self.retrieve_k)
            of = dict(zip(problems, found, strict=True))
            skills = [of[r.problem.id] for r in rollouts]
        texts = {pid: as_context(insights[pid], []) for pid in problems}
        successes = {pid: [(a.text, a.sources) for a in attempts[pid] if a.kind == "success"] for pid in problems}
        contexts = []
        for r, behaviors in zip(rollouts, skills, strict=True):
            others = [text for text, sources in successes[r.problem.id] if frozen or r.id not in sources]
            contexts.append({**texts[r.problem.id], "behaviors": [(b.title, b.text) for b in behaviors],
                             "solution": others[-1] if others else "",
                             "feedback": r.feedback if "experience" in tiers else ""})
            if self.ground_insights and not frozen:
                outcome = "support_success" if r.reward > SUCCESS else "support_failure"
                read = insights[r.problem.id] + behaviors
                self._events.update([(f"#{i.id}", outcome) for i in read if i.born < step])
        if self._events:
            with self._writing(step):
                pass  # only the events
        return contexts

    def _question_vectors(self, problems):
        """(n, D) embeddings of questions, from the file where it holds them."""
        ids = json.dumps([p.id for p in problems])
        stored = dict(self._query(f"SELECT id, embedding FROM problem WHERE id {AMONG}", ids))
        if unknown := [p for p in problems if p.id not in stored]:
            vectors = self._vectors([p.prompt for p in unknown])
            stored |= {p.id: v.tobytes() for p, v in zip(unknown, vectors, strict=True)}
        return np.stack([np.frombuffer(stored[p.id], np.float32) for p in problems])

    def inference_contexts(self, problems, tiers=("experience", "insight", "behavior"), neighbors=1) -> list[dict]:
        """What may be put into the PROMPT of held-out problems, as keyword arguments of `compose`; they have no memory of
        their own, so they read the insight and the latest success of their `neighbors` nearest training problems, by
        question embedding, and the nearest behaviors. A problem that was trained on (see `own_problems`) reads nothing of
        itself: the next nearest takes its place. Ours: the paper does not say how its frozen-policy rows feed memory at
        test time."""
        known = self._query("SELECT id, text, embedding FROM problem ORDER BY id")
        vectors, own = self._vectors([p.prompt for p in problems]), self.own_problems(problems)
        table = np.array([np.frombuffer(vector, np.float32) for *_, vector in known]).reshape(len(known), vectors.shape[1])
        order = np.argsort(-(vectors @ table.T), axis=1, kind="stable")
        near = [[i for i in row if not is_own[i]][:neighbors] for row, is_own in zip(order, own, strict=True)]
        ids = {known[i][0] for row in near for i in row}
        insights = self._of("insight", ids) if "insight" in tiers else defaultdict(list)
        attempts = self._of("experience", ids) if "experience" in tiers else {}
        solved = {pid: [a.text for a in found if a.kind == "success"][-1:] for pid, found in attempts.items()}
        skills = nearest(vectors, self.living("behavior") if "behavior" in tiers else [], self.retrieve_k)
        return [as_context([item for i in row for item in insights[known[i][0]]], behaviors)
                | {"examples": [(known[i][1], text) for i in row for text in solved.get(known[i][0], ())]}
                for row, behaviors in zip(near, skills, strict=True)]

    def own_problems(self, problems) -> np.ndarray:
        """(len(problems), training problems in the order of their ids): whether the one is the other, by its id or by its
        prompt up to white space."""
        known = self._query("SELECT id, text FROM problem ORDER BY id")
        ids, texts = np.array([id for id, _ in known], object), np.array([plain(text) for _, text in known], object)
        own = [(ids == p.id) | (texts == plain(p.prompt)) for p in problems]
        return np.array(own, bool).reshape(len(problems), len(known))

    def overlap(self, problems) -> str:
        """What a reader of `inference_contexts` has to be told of problems that were trained on; "" where there are none."""
        own = self.own_problems(problems)
        trained_on, alone = own.any(axis=1).sum(), own.all(axis=1).sum()
        if not trained_on:
            return ""
        said = (f"{trained_on} of {len(problems)} problems are ones that the memory in the prompt was written on (the same "
                "id or text): they read not their own insight and success but those of the nearest other problem")
        return said + f"; {alone} have no other and read behaviors alone" * bool(alone)

    def holds(self, step) -> bool:
        """Whether anything was remembered at the end of `step`."""
        return bool(self._query("SELECT 1 FROM item WHERE born <= ? AND (ended IS NULL OR ended > ?) LIMIT 1", step, step))

    def last_step(self) -> int:
        """The last step that left a trace; 0 for none."""
        return max(self._query("SELECT COALESCE(MAX(step), 0) FROM event")[0][0],
                   self._query("SELECT COALESCE(MAX(born), 0) FROM item")[0][0])

    def prompts(self) -> dict[str, str]:
        """{id: prompt} of the problems that `add_problems` was given."""
        return dict(self._query("SELECT id, text FROM problem"))

    def sizes(self) -> dict[str, int]:
        """Living items in each tier."""
        return {tier: self._sizes[tier] for tier in ("experience", "insight", "behavior")}

    def tally(self, tier) -> Counter:
        """{(problem id, kind): living items of a tier}"""
        return Counter({(problem, kind): n for problem, kind, n in self._query(
            "SELECT problem, kind, COUNT(*) FROM item WHERE tier = ? AND ended IS NULL GROUP BY problem, kind", tier)})

    def counts(self, step=None) -> dict[str, int]:
        """How often each kind of event happened, in all or in one step."""
        where, args = ("WHERE step = ?", (step,)) if step is not None else ("", ())
        return dict(self._query(f"SELECT kind, SUM(n) FROM event {where} GROUP BY kind ORDER BY kind", *args))

    def _success_fractions(self, problems, step) -> dict[str, tuple[int, int]]:
        """{problem id: (successes, attempts)}: the confidence signal of reflection, over the whole run so far, or over this
        step where memory ends with it."""
        first = step if self.mode == "transient" else 0
        rows = self._query("SELECT subject, kind, SUM(n) FROM event WHERE kind IN ('success', 'failure') AND step >= ? AND "
                           f"subject {AMONG} GROUP BY subject, kind", first, json.dumps(list(problems)))
        n = {(subject, kind): total for subject, kind, total in rows}
        return {p: (n.get((p, "success"), 0), n.get((p, "success"), 0) + n.get((p, "failure"), 0)) for p in problems}

    # -- time ---------------------------------------------------------------------------------------------------------

    def forget(self, step):
        """Ends everything that lives at `step`: the transient control keeps nothing from one step to the next."""
        with self._writing(step):
            self.db.execute(f"UPDATE item SET {ENDED} WHERE ended IS NULL", (step,))
            self._sizes.clear()

    def truncate_after(self, step):
        """Back to the end of `step`: what was born later is deleted, what ended later lives again.

        Embeddings that were dropped are made anew. A transient memory is empty at the end of a step, also of one that
        another run took: a fork's.
        """
        bare = [Item.from_row(row) for row in self._query(
            f"SELECT {WITH_EMBEDDING} FROM item WHERE ended > ? AND born <= ? AND embedding IS NULL", step, step)]
        vectors = self._embedded(bare) if self.embed else []
        with self._writing(step):  # sizes by what changes, as elsewhere: to count all would take longer than the rest
            dead = self.db.execute("SELECT tier FROM item WHERE born > ? AND +ended IS NULL", (step,)).fetchall()
            self.db.execute("DELETE FROM item WHERE born > ?", (step,))
            revived = self.db.execute("SELECT tier FROM item WHERE ended > ?", (step,)).fetchall()
            self.db.execute("UPDATE item SET ended = NULL WHERE ended > ?", (step,))
            self.db.execute("DELETE FROM event WHERE step > ?", (step,))
            self.db.executemany("UPDATE item SET embedding = ? WHERE id = ?",
                                [(v.tobytes(), i.id) for i, v in zip(bare, vectors, strict=bool(self.embed))])
            self._sizes.update(tier for tier, in revived)
            self._sizes.subtract(tier for tier, in dead)
        if self.mode == "transient":
            self.forget(step)

    def copy_to(self, path):
        """A copy of the file as it is now, for a checkpoint; a WAL database copied by hand may miss its last commits."""
        with self._explained(), contextlib.closing(sqlite3.connect(path)) as copy:
            self.db.backup(copy)

    def settle(self):
        """Has the disk hold all that was committed: what a checkpoint relies on. A kill alone loses nothing anyway."""
        if self.mode != "frozen":
            self._query("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self):
        self.settle()
        self.db.close()


def nearest(vectors, items, k) -> list[list[Item]]:
    """For each row of `vectors` (n, D) the k items nearest by cosine, best first; the older first among equals."""
    if not items:
        return [[] for _ in vectors]
    order = np.argsort(-(vectors @ np.stack([i.embedding for i in items]).T), axis=1, kind="stable")  # (n, items)
    return [[items[i] for i in row[:k]] for row in order]


def as_context(insights, behaviors) -> dict:
    """Items as keyword arguments of `compose`."""
    return {"strategies": [(i.title, i.text) for i in insights if i.kind == "strategy"],
            "lessons": [(i.title, i.text) for i in insights if i.kind == "lesson"],
            "behaviors": [(b.title, b.text) for b in behaviors]}


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it
# ---------------------------------------------------------------------------------------------------------------------

def describe(memory, problem, step=None) -> str:
    """One problem's memory in readable form, at the end of `step` or now: experience, insight, retrieved behaviors."""
    step = 10**9 if step is None else step
    found = memory._query("SELECT text, embedding FROM problem WHERE id = ?", problem)
    if not found:
        raise ValueError(f"{memory.path} knows no problem {problem!r}; `show` without --problem lists some")
    (text, vector), = found
    tiers = {tier: memory.as_of(step, tier, problem) for tier in ("experience", "insight")}
    tiers["behavior"], = nearest(np.frombuffer(vector, np.float32)[None], memory.as_of(step, "behavior"), memory.retrieve_k)
    solved = dict(memory._query("SELECT kind, SUM(n) FROM event WHERE subject = ? AND step <= ? AND kind IN "
                                "('success', 'failure') GROUP BY kind", problem, step))
    lines = [f"problem {problem}: {text}",
             f"  solved in {solved.get('success', 0)} of {sum(solved.values())} attempts so far"]
    for tier, items in tiers.items():
        lines += [f"  {tier}" + ("" if items else ": none yet"), *(f"    {line_of(i)}" for i in items)]
    return printable("\n".join(lines))


def line_of(item):
    head = " ".join(x for x in (item.kind if item.tier != "behavior" else "", item.title) if x)
    seen = f" (feedback: {item.feedback})" if item.feedback else ""
    flags = f" [shortcut: {item.shortcuts}]" if item.shortcuts else ""
    return f"[step {item.born}] {head}: {item.text}{seen}{flags}".replace("\n", "\n      ")


def printable(text):
    """Without the control characters with which a model's text could steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def show(memory, problem=None, tier=None, step=None, grep=None) -> str:
    """Readable tiers: one problem's, or the items of one tier or of all, at the end of `step` or now, that hold `grep`."""
    if problem is not None:
        return describe(memory, problem, step)
    at = 10**9 if step is None else step
    items = {t: memory.as_of(at, t) for t in ([tier] if tier else ["experience", "insight", "behavior"])}
    lines = []
    for name, found in items.items():
        if grep:
            found = [i for i in found if grep.lower() in f"{i.problem} {i.title} {i.text} {i.feedback}".lower()]
        lines.append(f"{name}: {len(found)} items" + (f" that hold {grep!r}" if grep else ""))
        groups = defaultdict(list)
        for item in found:
            groups[item.problem].append(item)
        whole = tier or grep or name == "behavior"
        for pid, group in groups.items() if whole else list(groups.items())[:3]:
            lines += [f"  problem {pid}"] * bool(pid) + [f"    {line_of(i)}" for i in group]
        if not whole and len(groups) > 3:
            lines.append(f"  ... and {len(groups) - 3} more problems: --tier {name} shows all, --problem ID one of them")
    return printable("\n".join(lines))


def growth(memory) -> dict[str, np.ndarray]:
    """Living items at the end of each step, 0 to the last with an event or a birth: {kind: (steps + 1,)}."""
    rows = memory._query("SELECT kind, born, ended, shortcuts != '' FROM item")
    last = max([0, *(born for _, born, *_ in rows), *memory._query("SELECT COALESCE(MAX(step), 0) FROM event")[0]])
    kinds = ("success", "failure", "strategy", "lesson", "behavior", "shortcut")
    changes = {kind: np.zeros(last + 2, int) for kind in kinds}
    for kind, born, ended, flagged in rows:
        for name in [kind] + ["shortcut"] * flagged:
            changes[name][born] += 1
            changes[name][last + 1 if ended is None else ended] -= 1
    return {kind: change.cumsum()[:-1] for kind, change in changes.items()}


def stats(memory, png) -> str:
    """The growth curves of the paper's Figure 6, as a table, and as a picture in the file `png`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves, problems = growth(memory), memory._query("SELECT COUNT(*) FROM problem")[0][0]
    last = len(curves["behavior"]) - 1
    at = sorted({round(x) for x in np.linspace(0, last, 13)})
    lines = [f"{'step':>6} " + " ".join(f"{kind:>9}" for kind in curves)]
    lines += [f"{step:>6} " + " ".join(f"{curve[step]:>9}" for curve in curves.values()) for step in at]
    cap = json.loads(memory.meta["caps"])["strategy"] * problems
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for kind in ("strategy", "lesson"):
        left.plot(curves[kind], label={"strategy": "strategies", "lesson": "lessons"}[kind])
    left.axhline(cap, linestyle=":", color="gray", label=f"cap of each, {cap}")
    left.set(title="insight", xlabel="step", ylabel="living items", yscale="symlog" if cap > 20 * max(
        curves["strategy"].max(), curves["lesson"].max(), 1) else "linear")
    left.legend()
    right.plot(curves["behavior"], color="tab:green")
    right.set(title="behavior", xlabel="step", ylabel="living items")
    figure.savefig(png, dpi=150)
    pyplot.close(figure)
    return "\n".join([*lines, f"{problems} problems; picture: {png}"])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python memory.py", description="Look at the memory of a run; nothing is changed.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("show", "print what is remembered"), ("stats", "how each tier grew: a table and a picture")):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("path", help="a run's memory.db")
        if name == "show":
            command.add_argument("--problem", metavar="ID", help="one problem: its attempts, its insight, its behaviors")
            command.add_argument("--tier", choices=("experience", "insight", "behavior"), help="all items of one tier")
            command.add_argument("--step", type=int, metavar="N", help="as it was at the end of step N (default: now)")
            command.add_argument("--grep", metavar="TEXT", help="only items that hold TEXT, in upper or lower case")
        else:
            command.add_argument("--png", help="where the picture goes (default: memory.png beside the file)")
    args = vars(parser.parse_args(argv))
    if not 0 <= (args.get("step") or 0) < 2**63:  # SQLite holds no larger one
        parser.error(f"--step {args['step']} is no step of a run")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` has seen enough
    command, path = args.pop("command"), args.pop("path")
    try:
        memory = Memory(path, None, None, mode="frozen")
        png = args.pop("png", None) or Path(path).with_name("memory.png")
        print(show(memory, **args) if command == "show" else stats(memory, png))
    except (ValueError, OSError) as error:
        sys.exit(f"memory.py: {error}")


if __name__ == "__main__":
    main()
