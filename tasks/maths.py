r"""Answers that are mathematics, judged by math-verify: \boxed{1/2} is 0.5.

It reads LaTeX with a grammar and compares with sympy, and runs nothing of a model's text.
"""

import logging
import math
import re
from decimal import Decimal

from tasks.problem import Verdict

# seconds of one comparison: a tower of powers would never end. By SIGALRM, in the main thread alone
SECONDS = 5
MAX_TEXT = 4000  # characters of a completion that are read, its last ones
THOUSANDS = re.compile(r"[-+]?\\?\$?\d{1,3}(,\d{3})+(\.\d+)?")
# Letters alone, with a run of two: as mathematics, cat is c*a*t and equals act
WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[ '-]+[^\W\d_]+)*", re.DOTALL)
# A number as programs write it: 1e-05, 6.02e23. Not 2e-1, which is twice Euler's number less one
SCIENTIFIC = re.compile(
    r"(?<![\w.])(?:(?:\d+(?:\.\d*)?|\.\d+)(?:e(?:[-+]?\d\d|\d)|E[-+]?\d\d?)"
    r"|(?:1|\d*\.\d+)e[-+]\d)(?!\w|\.\d)"
)
# \boxed{7}, and as some solutions write it: \boxed {7}, \fbox{7}, \boxed 7
BOX = re.compile(r"\\(?:boxed|fbox)(?: *(\{)| +([^$\n]+?)(?= *(?:\$|\\[)\]]|\n|\Z)))")
TINY, DIGITS = 0.01, 2e-3  # math-verify compares decimals to six places, whatever their size [ours]
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
    key = math_verify.parse(spelled(f"\\boxed{{{problem.answer}}}"), **limits)
    said = math_verify.parse(spelled(completion[-MAX_TEXT:])[-MAX_TEXT:], **limits)
    if not said:
        return Verdict(0.0, "")
    if math_verify.verify(key, said, timeout_seconds=SECONDS) and not is_other(key[0], said[0]):
        return Verdict(1.0, problem.answer)
    return Verdict(0.0, str(said[-1])[:200])


def spelled(text) -> str:
    r"""Writes 1e-05 as 0.00001, and `\boxed{7.}` without its full stop: math-verify would read
    neither as the number.
    """
    text = SCIENTIFIC.sub(lambda number: f"{Decimal(number[0]):f}", text)
    return re.sub(r"(?<=\d)\.(?=\s*\$?\})", "", text)


def is_other(key, said) -> bool:
    """Says whether a key is a small number, and what was said one with other leading digits."""
    try:
        if not 0 < abs(float(key)) < TINY:
            return False
        return abs(float(said)) < TINY and not math.isclose(key, said, rel_tol=DIGITS)
    except (TypeError, ValueError, ArithmeticError):  # no number
        return False


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
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    last = boxes[-1]
    if last[2]:
        return last[2]
    depth, begin = 0, last.end()
    for at in range(begin, len(text)):
        if text[at] == "}" and not depth:
            return text[begin:at].strip()
        depth += (text[at] == "{") - (text[at] == "}")
    return text[begin:].strip()
