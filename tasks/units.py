"""Units behind a number: 10 and cm of `10\\text{ cm}`."""

import re

# a text in LaTeX's fonts
TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname)\*? *\{([^{}]*)\}"
)
LONGEST = 200  # characters of a number with its unit
PREFIXES = {"milli": "m", "centi": "c", "deci": "d", "kilo": "k", "micro": "µ", "nano": "n"}
BASES = {
    "meter": "m",
    "gram": "g",
    "liter": "L",
    "second": "s",
    "joule": "J",
    "watt": "W",
    "newton": "N",
    "pascal": "Pa",
    "volt": "V",
}
METRIC = "m|s|g|mol|L|l|K|J|N|W|Pa|C|A|V|Hz|eV|cal|bar|\u03a9"  # symbols that take prefixes
OTHER = "min|h|hr|yr|in|ft|lb|atm"
SYMBOL = rf"(?:[pn\u00b5\u03bcmcdhkMG]?(?:{METRIC})|{OTHER}|mi|mph|kph|kmh|yd|oz|cc)"
# Names of units, and things that are counted: those that math-verify leaves out, too
NAME = (
    rf"(?:(?:{'|'.join(PREFIXES)})?(?:{'|'.join(BASES)}|metre|litre)"
    "|sec|minute|hour|day|week|month|year|mile|yard|foot|feet|inch|pound|ounce|gallon"
    "|acre|hectare|degree|radian|unit|dollar|cent|euro|point|mole|person|people|man|men|woman|women"
    "|child|children|student|apple|coin|tile|soldier|monkey|toy)(?:s|es)?"
)
ONE_UNIT = (  # atomic, for in `\degree C` C could be a unit of its own
    rf"(?>(?:(?:square|cubic|sq\.?|cu\.?) *)?(?:{SYMBOL}|{NAME})(?![A-Za-z])"
    r"(?: ?\^ ?\{? ?-?\d(?: ?\})?)?"
    r"|(?:\^ ?\{? ?\\circ(?: ?\})?|\\degree|\u00b0)(?: ?[CF])?(?![A-Za-z]))"
)
# Each blank has one place, or the time would double with every unit of a repetition
BETWEEN_UNITS = r"(?: {0,3}(?:/|\\cdot|[·*]|per|\\[,;:]) {0,3}| {1,6})"
UNIT = rf"{ONE_UNIT}(?:{BETWEEN_UNITS}{ONE_UNIT})*"
MEASURED = re.compile(
    rf"(?P<number>[^A-Za-z]*(?:\\[A-Za-z]+[^A-Za-z]*)*?)(?<![\s~])(?P<gap>[\s~]*)(?P<unit>{UNIT})"
)
LABELLED = re.compile(r"(?P<number>.*[\d}])\s*(?P<gap>)\\text *\{(?P<unit>[^{}\d]{2,60})\}")
QUANTITY = re.compile(rf"\d[\s$~]*({UNIT})")
PART = re.compile(r"(/?) ?(°?[^\W\d_]+|°) ?\^? ?(-?\d)?")
NO_UNIT = re.compile(
    r"(?:or|and|not|than|over|times|plus|minus|is|hundred|thousand|million|billion|trillion|dozen|percent"
    r"|pct|[ap]\.?m\.?|st|nd|rd|th)",
    re.IGNORECASE,
)
SHORT = {
    "second": "s",
    "sec": "s",
    "minute": "min",
    "hour": "h",
    "hr": "h",
    "year": "yr",
    "mile": "mi",
    "foot": "ft",
    "feet": "ft",
    "inch": "in",
    "inche": "in",
    "pound": "lb",
    "ounce": "oz",
    "yard": "yd",
    "l": "L",
    "degree": "°",
    "mole": "mol",
}


def measured(text) -> tuple[str, str]:
    r"""Returns a number and its unit: 10 and cm of `10\text{ cm}`; the text and "" of any other."""
    if len(text) > LONGEST:
        return text, ""
    plain = re.sub(r"\A\$+|\$+\Z", "", text.strip())
    plain = re.sub(r"\A[A-Za-z] *= *", "", plain).strip(" .")
    flat = re.sub(r"\\[,;: ]", " ", TEXT_COMMAND.sub(r" \1 ", plain)).strip(" .")
    found = MEASURED.fullmatch(flat) or LABELLED.fullmatch(plain)
    if not found or not re.search(r"\d|\\pi", found["number"]):
        return text, ""
    unit = found["unit"].strip()
    letter = re.fullmatch(r"[A-Za-z]", unit)
    words = unit.split() or [""]
    if letter and not found["gap"] or any(NO_UNIT.fullmatch(word) for word in words):
        return text, ""
    return found["number"], short(unit)


def short(unit) -> str:
    """Writes a unit in one form: m^1·s^-1 for meters per second and for m/s."""
    unit = re.sub(r"\^? ?\{? ?\\circ ?\}?|\\degree", "°", unit).replace("° ", "°")
    unit = re.sub(r" per ", "/", re.sub(r"\\[,;:]|\\cdot|[{}·*]", " ", unit))
    unit = re.sub(r"(?:square|sq\.?) *([^\W\d_]+)", r"\1^2", unit)
    unit = re.sub(r"(?:cubic|cu\.?) *([^\W\d_]+)", r"\1^3", unit)
    parts = []
    for slash, name, power in PART.findall(unit):
        power = int(power or 1) * (-1 if slash else 1)
        parts.append(f"{shortest(name)}^{power}")
    return "·".join(sorted(parts))


def shortest(name) -> str:
    """Writes the name of one unit as its symbol."""
    if len(name) < 3 or not name.isalpha():
        return SHORT.get(name, name)
    name = name.casefold().removesuffix("s").replace("metre", "meter").replace("litre", "liter")
    prefix = next((p for p in PREFIXES if name.startswith(p) and name != p), "")
    base = name.removeprefix(prefix)
    if base in BASES:
        return PREFIXES.get(prefix, "") + BASES[base]
    return SHORT.get(name, name)
