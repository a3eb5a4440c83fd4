"""Answers that are a number: the last one that was said."""

import re
import unicodedata
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction

from tasks.problem import Verdict
from tasks.units import METRIC, OTHER

# What a text has where a number may stand; of two that fit, the first. Signs, digits and separators
# are ASCII by then.
LETTERS = (  # Latin, Greek, Cyrillic
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u04ff"
)
ODD = "\u00bc-\u00be\u2150-\u215e\u03c0\u221a"  # halves and thirds in one character, pi, a root
NUMERALS = re.compile(
    # A name with digits, or raised to a power: x2, H2O, v1.2.3, x_1, m^2, and as LaTeX has them:
    # H$_2$O, \text{m}^2. A command of LaTeX is one, and ends with its letters.
    rf"(?P<name>(?:\\[A-Za-z]+|(?!\u03c0\d)[{LETTERS}][{LETTERS}\d]*)"
    rf"(?:[}}$]{{0,3}}_\{{?[{LETTERS}\d]+)*(?:(?<=\d)(?:\.\d+)+)?"
    rf"(?:[}}$)\]]{{0,3}}\^\{{?[-+]?[{LETTERS}\d]+)?)"
    # A date or a telephone number: digits with two hyphens or more between them.
    r"|\d+(?:-\d+){2,}"
    r"|(?P<based>0x[0-9a-f]+|0b[01]+|0o[0-7]+)"
    # A sign that does not stand between two numbers or names, perhaps the 1 of 1 3/4, digits, and
    # what is joined to them.
    rf"|(?:(?<![{LETTERS}\d)\]}}%])[-+])?(?:\d+ (?=\d+/))?"
    rf"(?:\d+|(?<![{LETTERS}\d.])\.\d+|[{ODD}]\d*)"
    rf"(?:[.,:/'_]\d+|_\{{\d+|e[-+]?\d+|[}}$)\]]{{0,3}}(?:\*\*|\^)\{{?[-+]?[{LETTERS}\d]+\}}?"
    # and a factor that is a root, pi or a power of Euler's number
    rf"|(?: |\\[,;: ])?[×*]? ?(?:[{ODD}]\d*|e(?=\^)))*",
    re.IGNORECASE,
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
RAISED = re.compile("[⁻⁺]?[⁰¹²³⁴-⁹]+")
NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<decimal>(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e(?P<power>[-+]?\d+))?"
    r"|(?:(?P<whole>\d+) )?(?P<above>\d+)/(?P<below>\d+))",
    re.IGNORECASE,
)
FRAC = (
    r"\\[cdt]?frac *(?:\{ *(?P<above>\d+) *\}|(?P<digit>\d)) *(?:\{ *(?P<below>\d+)"
    r" *\}|(?P<other>\d))"
)
SIGNED_FRAC = r"(?<![-+])\\[cdt]?frac *\{ *(?:-(\d+) *\} *\{ *(\d+)|(\d+) *\} *\{ *-(\d+)) *\}"
GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau"
    "|phi|varphi|chi|psi|omega|Delta|Omega|ell|hbar|infty"
)
# Units behind a number, with powers as 9.8 m s-2 and 7 cm**2 have them. A range of one unit,
# 3 m-4 m, has none
UNIT = (
    rf"(?:[fpnu\u00b5\u03bcmcdhkMGT]?(?:{METRIC}|F|H|S|T|M|Wb|Bq|Gy|Sv|rad)"
    rf"|{OTHER}|day|cd|lm|lx|sr)(?![A-Za-z])"
)
POWER = r"(?:\^?-|\*\*-?)[1-4](?![\d.A-Za-z])"
UNITS = (
    rf"(?<=\d)(?: |~|\\[,;: ])?(?:\\(?:text|math)\w{{0,9}} ?\{{ ?)?({UNIT})(?:{POWER}(?! ?\1\b))?"
    rf"(?:(?: |~|\\[,;: ]|[×*/.]){{1,2}}({UNIT})(?:{POWER}(?! ?\2\b))?)*"
)
PLAIN = [  # (how others and LaTeX write it, how we do), in this order
    ("[\u2010-\u2013\u2212\ufe63\uff0d]", "-"),
    ("\uff0b", "+"),
    ("[\uff0e\u066b]", "."),
    ("[\uff0c\u066c]", ","),
    ("[\uff0f\u2044\u2215]", "/"),
    (r"\\(?:tag|label|ref|eqref|cite|[hvm]space|phantom)\*? ?\{[^{}]{0,80}\}", ""),
    (r"\\\\ ?\[[^\[\]]{0,20}\]", " "),  # a line's end with its height
    (r"\\(?:times|cdot|ast)(?![A-Za-z])|[\u00b7\u2022\u2217\u2219\u22c5]", "×"),
    (r"\{,\}|,\\!", ","),
    ("<sup>", "^"),
    ("<sub>", "_"),
    ("</su[bp]>", ""),
    (r"\\pi(?![A-Za-z])|(?<=\d) ?pi(?![A-Za-z])", "\u03c0"),
    (r"(?<=[×*])( ?)pi(?![A-Za-z])", "\\1\u03c0"),
    (r"(?:\\|(?<![A-Za-z\\]))sqrt(?![A-Za-z])(?: ?\[[^\[\]]{0,20}\])?", "\u221a"),
    (UNITS, lambda units: re.sub(r"\*\*|(?<=\w)(?=-)", "^", units[0])),
    (rf"(\\(?!(?:{GREEK})(?![A-Za-z]))[A-Za-z]+)(?=[-+][.\d])", r"\1 "),  # its sign, not a minus
    (r"\{(\d+)\}(?=\^)", r"\1"),  # a power may stand apart from its base
    (r" ?\^ ?\{ ?([-+]?\w+) ?\}", r"^{\1}"),
    (r"(?<=\w) ?\^ ?(?=[-+]?\d)", "^"),
    (r"(?<=\d) \*\* (?=[-+]?\d)", "**"),
    (r"\\(?:text|math)\w{0,9} ?\{ ?([-+]?[\d.,]+) ?\}", r"\1"),  # a number in another font
    (r"\\(?:text)?color ?\{\w{1,20}\}", ""),
    (r"([:=]) ?\} ?(?=[-+][.\d])", r"\1 "),  # a sign behind \text{..: } or before $
    (r"(?<![\w$)\]}%])-\\?[$£¥\u20a0-\u20bf](?=[.\d])", "-"),
    (
        r"(?<=\d)(?:[\u00a0\u2007\u2009\u202f'’_~]|\\[,;:! ])(?=\d{3}(?!\d))",
        ",",
    ),  # between groups of three
    (rf"(?<=\d) ?{FRAC}", r" \g<above>\g<digit>/\g<below>\g<other>"),
    (FRAC, r"\g<above>\g<digit>/\g<below>\g<other>"),
    (SIGNED_FRAC, r"-\1\3/\2\4"),
    (r"(\\[cdt]?frac *(?:\{(?:[^{}]|\{[^{}]{0,80}\}){0,40}\}|[A-Za-z\u03c0])) *(?=\d)", r"\1/"),
    (r"(?<=\d) ?[×x*] ?10(?:\^|\*\*)\{?([-+]?\d+)\}?", r"e\1"),
    (r"(?<![\w.,^*])10(?:\^|\*\*)\{?([-+]?\d+)\}?", r"1e\1"),
    (r"(?<=\d) / (?=\d)", "/"),
    (r"([=≈]) *-(?: |\\[,;:! ]){1,3}(?=[.\d])", r"\1-"),
]


# before a numeral that is no number of its own: part of a fraction, under a root, digits that
# recur, or how much a number is uncertain
INSIDE = tuple(
    "/ }{ frac{ frac √ √{ √( ]{ overline{ overline dot{ \\dot bar{ \\bar binom{ binom"
    " ± \\pm +/-".split()
)
# nor what a function is taken of: \ln 2, sin(30), \log_2 8
FUNCTION = re.compile(
    r"(?:\\|(?<![A-Za-z\\]))(?:arc)?(?:ln|log|lg|sin|cos|tan|cot|sec|csc|exp)"
    r"(?:_\{?\w{1,3}\}?|\^\{?-?\w{1,3}\}?)? ?(?:\\left)? ?[({]? ?\Z"
)


def plain_digits(text) -> str:
    """Writes the digits, signs and separators of numbers in ASCII, and LaTeX's fractions with a
    slash.
    """
    text = RAISED.sub(lambda found: "^" + found[0].translate(SUPERSCRIPTS), text)
    # full-width, Arabic, all others
    text = re.sub(r"[^\D0-9]", lambda found: str(unicodedata.decimal(found[0])), text)
    for theirs, ours in PLAIN:
        text = re.sub(theirs, ours, text)
    return text


def read_number(text) -> Fraction | None:
    """Reads a text in plain_digits as a number.

    None if it is no number, or beyond 400 digits or powers of ten.
    """
    match = NUMBER.fullmatch(text) if len(text) <= 400 else None
    if not match:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["decimal"]:
        power = int(match["power"] or 0)
        if abs(power) > 400:
            return None
        return sign * Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** power
    below = int(match["below"])
    if not below:
        return None
    return sign * (int(match["whole"] or 0) + Fraction(int(match["above"]), below))


def last_number(text) -> tuple[Fraction | None, str]:
    """Reads the last numeral of a text: as a number (None if it is none), and as a text.

    Equal numbers have equal texts.
    """
    text = plain_digits(text)
    numerals = [match for match in NUMERALS.finditer(text) if not match["name"]]
    if not numerals:
        return None, ""
    last = numerals[-1]
    before = text[max(0, last.start() - 10) : last.start()].replace(" ", "")
    inside = before.endswith(INSIDE)
    inside = inside or FUNCTION.search(text, max(0, last.start() - 24), last.start())
    if last["based"] and len(last[0]) < 400:
        value = Fraction(int(last[0], 0))
    else:
        value = read_number(last[0])
    if inside or value is None:
        return None, f"{before[-1:]}{last[0]}"[:100] + "..."
    with localcontext(prec=2000) as context:
        context.clear_flags()
        quotient = Decimal(value.numerator) / Decimal(value.denominator)
        return value, str(value) if context.flags[Inexact] else f"{quotient.normalize():f}"


def verify_last_number(problem, completion) -> Verdict:
    """Judges an answer by its last number, which has to equal the key as a rational number.

    Numbers are 7, -7 (also with a Unicode minus), +7, .5, 1,234 with groups of three, 1.5e-3, 1.5 x
    10^-3, 3/4, 1 3/4, 0x1F (0b1, 0o7), in the digits of any script and as LaTeX has them
    (`1{,}234`, `\\frac{3}{4}`). A hyphen between two numbers or names is no sign (3-4). What
    follows a number is its unit: 50% is 50, 7kg is 7. What has digits and begins with a letter is a
    name, and passed over: x2, H2O, v1.2.3, the unit in `7\\text{ cm}^2`. Other numerals are read
    whole or not at all, never a piece: where the last one is 12,34 or 1.234.567, a date, a time, a
    power (2^10), a root, part of a fraction with letters or an uncertainty (9.8 ± 0.1), the reply
    is wrong.
    """
    value, answer = last_number(completion)
    right = value is not None and value == read_number(plain_digits(problem.answer))
    return Verdict(float(right), answer)
