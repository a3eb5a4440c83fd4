r"""Answers that are mathematics, judged by math-verify: \boxed{1/2} is 0.5.

It reads LaTeX with a grammar and compares with sympy, and runs nothing of a model's text.
"""

import logging
import re

from tasks.problem import Verdict

# seconds of one comparison: a tower of powers would never end. By SIGALRM, in the main thread alone
SECONDS = 5
MAX_TEXT = 4000  # characters of a completion that are read, its last ones
THOUSANDS = re.compile(r"[-+]?\\?\$?\d{1,3}(,\d{3})+(\.\d+)?")
# Letters alone, with a run of two: as mathematics, cat is c*a*t and equals act
WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[ '-]+[^\W\d_]+)*", re.DOTALL)
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\{([^{}]*)\}")


def verify_math(problem, completion) -> Verdict:
    """Judges the last mathematical expression of a completion, or the one in \\boxed{}.

    What equals the key as mathematics is right, whatever its form. What takes longer than SECONDS
    is wrong. A key of words is compared as text, without regard to case and white space.
    """
    word = word_of(problem.answer)
    if word:
        said = boxed(completion[-MAX_TEXT:])
        said = completion.strip() if said is None else said
        right = word_of(said) == word
        return Verdict(float(right), problem.answer if right else said[:200])
    import math_verify  # sympy takes a second

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its timeouts are verdicts here
    limits = {"parsing_timeout": SECONDS}
    key = math_verify.parse(f"\\boxed{{{problem.answer}}}", **limits)
    said = math_verify.parse(completion[-MAX_TEXT:], **limits)
    if not said:
        return Verdict(0.0, "")
    if math_verify.verify(key, said, timeout_seconds=SECONDS):
        return Verdict(1.0, problem.answer)
    return Verdict(0.0, str(said[-1])[:200])


def word_of(text) -> str:
    r"""Returns the words of a text that is words alone, folded: `cat` of `\text{Cat}`, or ""."""
    text = " ".join(TEXT_COMMAND.sub(r"\1", text).strip(" .$\n").split()).casefold()
    return text if WORDS.fullmatch(text) else ""


def key_of(text) -> str:
    r"""Returns the answer that a worked solution ends with: in \boxed{}, or after ####.

    A text with neither is its own answer. A number loses its thousands separators.
    """
    if "####" in text:
        key = text.rpartition("####")[2].strip()
        return key.replace(",", "") if THOUSANDS.fullmatch(key) else key
    inner = boxed(text)
    return text.strip() if inner is None else inner


def boxed(text) -> str | None:
    r"""Returns what stands in the last \boxed{} of a text, or None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for at in range(begin, len(text)):
        if text[at] == "}" and not depth:
            return text[begin:at].strip()
        depth += (text[at] == "{") - (text[at] == "}")
    return text[begin:].strip()
