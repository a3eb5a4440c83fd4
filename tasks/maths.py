r"""Answers that are mathematics, judged by math-verify: \boxed{1/2} is 0.5.

It reads LaTeX with a grammar and compares with sympy, and runs nothing of a model's text.
"""

import logging
import math
import re
import unicodedata
from dataclasses import replace
from decimal import Decimal

from tasks.last_number import RAISED, SUPERSCRIPTS
from tasks.problem import Verdict
from tasks.units import QUANTITY, TEXT_COMMAND, measured, short

# seconds of one comparison: a tower of powers would never end. By SIGALRM, in the main thread alone
SECONDS = 5
MAX_TEXT = 4000  # characters of a completion that are read, its last ones
THOUSANDS = re.compile(r"[-+]?\\?\$?\d{1,3}(,\d{3})+(\.\d+)?")
TINY, DIGITS = 0.01, 2e-3  # math-verify compares decimals to six places, whatever their size [ours]
MOST = 20  # boxes of a text that are read, its last ones
# \boxed{7}, and as some solutions write it: \boxed {7}, \fbox{7}, \boxed 7
BOX = re.compile(
    r"\\(?:boxed|f(?:rame)?box)(?: *(\{)| +([^$\n]+?)(?= *(?:\$|\\[)\]]|\n|\Z))|(?=\d)([\d.]+))"
)
# between the boxes of one answer
BETWEEN = re.compile(r"(?:[\s$,;.&()\[\]\\]|and|or|q?quad|text *\{ *(?:and|or) *\})*")
ANSWER = re.compile(r"<answer>([^<]*)", re.IGNORECASE)

# -- how others write a number or a command, and how math-verify reads it
INLINE = re.compile(r"\$([^$\n]{1,200})\$")
SPACE = r"(?:[\u00a0\u2007\u2009\u202f~]|\\[,;:! ])"
FULL_WIDTH = {0xFEE0 + code: code for code in range(0x21, 0x7F)}
# A number as programs write it: 1e-05, 6.02e23. Not 2e-1, which is twice Euler's number less one
SCIENTIFIC = re.compile(
    r"(?<![\w.])(?:(?:\d+(?:\.\d*)?|\.\d+)(?:e(?:[-+]?\d\d\d?|\d)|E[-+]?\d\d?)"
    r"|(?:1|\d*\.\d+)e[-+]\d)(?!\w|\.\d)"
)
TIMES_TEN = re.compile(
    r"(?<![\w.,^/])(\d+(?:\.\d*)?|\.\d+) *(?:\\times|\\cdot|[×·*x]) *10 *\^ *"
    r"(?:\{ *([-+\u2212]?\d\d?) *\}|([-+\u2212]?\d\d?))(?![\d!^]|\.\d)"
)
ALONE = re.compile(r"\$?([-+]?\d+e-[2-9])\$?")  # where nothing stands beside it, 2e-3 is a number
EULER = re.compile(r"(?<![A-Za-z\\])e(?![A-Za-z])")
WRITTEN = [  # in this order
    (r"\\(?:text)?color *\{\w{1,20}\}", ""),
    (r"\\(?:textrm|textsf|texttt|textup|textnormal|mbox|hbox|emph) *(?=\{)", r"\\text"),
    (r"\\(?:underline|bm|boldsymbol|pmb) *(?=\{)", ""),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![A-Za-z\\])sqrt *\(([^()]{1,80})\)", r"\\sqrt{\1}"),
    (rf"(?<=\d)(?:{SPACE}|\{{,\}}|,\\!)(?=\d{{3}}(?!\d))", ""),
    (r"(\\(?:[dtc]?frac|binom)) *(\d) +(\d)(?!\d)", r"\1{\2}{\3}"),
    (r"(?<![\d.,])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)\.(?=\s*\$?(?:\}|\Z))", ""),  # a full stop
]
GROUPED = re.compile(r"(?<![\w.,^])[1-9]\d{0,2}(?: \d{3})+(?!\d)")  # in a key and a box alone
# two numbers and nothing between them
APART = re.compile(rf"(?<![\d_^])\d+(?: |{SPACE})+\d+(?![\d/])")

# -- words
ENVIRONMENT = re.compile(r"\\(?:begin|end) *\{\w+\*?\}")
COMMAND = re.compile(r"\\[A-Za-z]+")
WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[ '-]+[^\W\d_]+)*", re.DOTALL)
RUN = re.compile(r"[^\W\d_]{2,}")
MATHS = re.compile(
    r"(?<![A-Za-z])(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|max|min|sup|inf|lim|det|gcd"
    r"|lcm|mod|deg|dim|ker|arg|sgn|pi|sqrt|and|or|percent|pct)(?![A-Za-z])"
)
# letters of one case, as factors of a product: xy and AB, not Tom, 3rd or 3 pm
FACTORS = re.compile(r"[a-z]{2,3}|[A-Z]{2,3}")
NO_FACTORS = re.compile(r"[^\W\d_]\d|\d +[^\W\d_]{2}|\d(?:st|nd|rd|th|am|pm)(?![^\W\d_])|,")
# 2024-01-02, 1/2/2024, 1.2.3
DATE = re.compile(r"\d+(?:(?:-\d+){2,}|(?:/\d+){2,}|(?:\.\d+){2,})")
PRODUCT = re.compile(r"\\cdot|\\times|[*·×]")
QUOTES = {ord(c): "'" for c in "\u2018\u2019\u02bc`\u00b4"} | {ord(c): '"' for c in "\u201c\u201d"}
LEAD = re.compile(r"\A(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final )?answer(?: is)?:? *")


def verify_math(problem, completion) -> Verdict:
    """Judges what the last \\boxed{} or <answer> holds, or else the last mathematical expression.

    What equals the key as mathematics is right, whatever its form. What takes longer than SECONDS
    is wrong. A key of words is compared as text, without regard to case and white space. A unit may
    be left out, and is wrong where it is another than the key's.
    """
    key, text = spelled(grouped(problem.answer)), spelled(completion[-MAX_TEXT:])
    said = said_of(text, key)
    alone = said is not None
    said = grouped(said)[-MAX_TEXT:] if alone else text[-MAX_TEXT:]
    right = None
    if is_words(key):
        folded_key, reply = folded(key), folded(said)
        right = reply == folded_key or folded(LEAD.sub("", reply, count=1)) == folded_key
        is_product = FACTORS.fullmatch(key.strip(" $")) and PRODUCT.search(said)
        right = right or None if is_product else right
    elif alone and (APART.search(said) or DATE.fullmatch(said)):
        right = False  # math-verify would multiply two numbers side by side
    if right is not None:
        return Verdict(float(right), problem.answer if right else said.strip()[:200])
    return compared(problem, key, said, alone)


def compared(problem, key, said, alone) -> Verdict:
    """Compares a key with what was said, alone or in prose, as mathematics."""
    import math_verify  # sympy takes a second

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its timeouts are verdicts here
    key, unit = measured(key)
    key = number_of(key)
    if alone:
        said, said_unit = measured(said)
        said = f"\\boxed{{{said if EULER.search(COMMAND.sub('', key)) else number_of(said)}}}"
    else:
        units = QUANTITY.findall(said)
        said_unit = short(units[-1]) if units else ""
        said = INLINE.sub(lambda found: f"${measured(found[1])[0]}$", said)
    if unit and said_unit and unit != said_unit:
        return Verdict(0.0, said[-200:])
    # math-verify takes factors such as ab, c and t for units
    lone_number = not alone and not re.search(r"[A-Za-z]", COMMAND.sub("", key))
    limits = {"parsing_timeout": SECONDS}
    wanted = math_verify.parse(f"\\boxed{{{key}}}", targets(False), **limits)
    found = math_verify.parse(said, targets(lone_number), **limits)
    if not found or not wanted:
        return Verdict(0.0, "")
    if math_verify.verify(wanted, found, timeout_seconds=SECONDS) and not is_other(
        wanted[0], found[0]
    ):
        return Verdict(1.0, problem.answer)
    return Verdict(0.0, str(found[-1])[:200])


def targets(units) -> list:
    """Returns what math-verify looks for, with its own reading of units or without."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    latex = LatexExtractionConfig()
    normal = replace(latex.normalization_config, units=units)
    return [replace(latex, normalization_config=normal), ExprExtractionConfig()]


def spelled(text) -> str:
    r"""Writes numbers and commands so that math-verify reads them: 1e-05 as 0.00001, `1\,000` as
    1000, `\boxed{7.}` without its full stop.
    """
    text = text.translate(FULL_WIDTH)
    text = RAISED.sub(lambda found: f"^{{{found[0].translate(SUPERSCRIPTS)}}}", text)
    for theirs, ours in WRITTEN:
        text = re.sub(theirs, ours, text)
    text = TIMES_TEN.sub(
        lambda found: decimal_of(f"{found[1]}e{found[2] or found[3]}".replace("\u2212", "-")), text
    )
    return SCIENTIFIC.sub(lambda found: decimal_of(found[0]), text)


def grouped(text) -> str:
    """Joins 1 000, and takes the marks of emphasis off."""
    text = GROUPED.sub(lambda found: found[0].replace(" ", ""), text)
    return text.strip().strip("*`") or text


def decimal_of(text) -> str:
    return f"{Decimal(text):f}"


def number_of(text) -> str:
    """Writes 2e-3 as 0.002 where it is all of a text."""
    found = ALONE.fullmatch(text.strip())
    return decimal_of(found[1]) if found else text


def is_other(key, said) -> bool:
    """Says whether a key is a small number, and what was said one with other leading digits."""
    try:
        if not 0 < abs(float(key)) < TINY:
            return False
        return abs(float(said)) < TINY and not math.isclose(key, said, rel_tol=DIGITS)
    except (TypeError, ValueError, ArithmeticError):  # no number
        return False


def is_words(text) -> bool:
    r"""Says whether a key is to be compared as text: cat, `\text{no}`, 3 pm, CO2, 2024-01-02, 1 2.

    As mathematics cat would be a product, and equal act. What may be one stays mathematics where an
    operator, a digit or a command stands beside it: 2xy, xy+1.
    """
    if measured(text)[1]:
        return False
    if WORDS.fullmatch(folded(text)) or DATE.fullmatch(text.strip(" $.")) or APART.search(text):
        return True
    named = " ".join(TEXT_COMMAND.findall(text))
    if RUN.search(MATHS.sub(" ", named)):
        return True
    plain = COMMAND.sub(" ", ENVIRONMENT.sub(" ", TEXT_COMMAND.sub(r" \1 ", text)))
    plain = MATHS.sub(" ", plain)
    if re.search(r"[^\W\d_]\d", plain):
        return True
    runs = RUN.findall(plain)
    if not runs:
        return False
    return bool(NO_FACTORS.search(plain)) or not all(map(FACTORS.fullmatch, runs))


def folded(text) -> str:
    r"""Returns a text without its case, its marks of emphasis and quotation, and LaTeX's fonts."""
    for _ in range(2):  # one within another
        text = TEXT_COMMAND.sub(r"\1", text)
    text = unicodedata.normalize("NFKC", text.translate(QUOTES)).casefold()
    text = unicodedata.normalize("NFKC", re.sub(r"\*|\\[,;: ]|~", " ", text))
    text = re.sub(r" *, *", ", ", " ".join(text.split()))
    return text.strip(" .$\n_'\"")


def said_of(text, key) -> str | None:
    r"""Returns what a reply gives as its answer: in the last \boxed{}, or else <answer>.

    A key with commas may be answered by several boxes side by side. None where there is neither, or
    prose in <answer>.
    """
    found = [box for box in boxes(text) if box[2]]
    if found:
        several = [found.pop()]
        while found and BETWEEN.fullmatch(text, found[-1][1], max(found[-1][1], several[0][0])):
            several.insert(0, found.pop())
        last = several[-1][2]
        return ", ".join(box[2] for box in several) if "," in key and "," not in last else last
    tags = ANSWER.findall(text)
    if not tags or RUN.search(MATHS.sub(" ", COMMAND.sub(" ", tags[-1]))) and not is_words(key):
        return None
    return tags[-1].strip()


def key_of(text) -> str:
    r"""Returns the answer that a worked solution ends with: in \boxed{}, or after ####.

    A text with neither is its own answer. A number loses its thousands separators.
    """
    if "####" in text:
        key = text.rpartition("####")[2].strip()
        return key.replace(",", "") if THOUSANDS.fullmatch(key) else key
    found = boxes(text)
    return found[-1][2] if found else text.strip()


def boxes(text) -> list[tuple[int, int, str]]:
    r"""Returns the last \boxed{} of a text: where each begins and ends, and what stands in it."""
    found = []
    for box in list(BOX.finditer(text))[-MOST:]:
        inner, end = box[2] or box[3], box.end()
        if inner is None:
            end = closing(text, box.end())
            inner = text[box.end() : end]
            end += 1
        found.append((box.start(), end, inner.strip()))
    return found


def closing(text, begin) -> int:
    """Finds the brace that closes one before `begin`; the end of the text where there is none."""
    depth = 0
    for at in range(begin, len(text)):
        if text[at] == "}" and not depth:
            return at
        depth += (text[at] == "{") - (text[at] == "}")
    return len(text)
