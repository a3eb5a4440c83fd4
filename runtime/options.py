"""Makes options as fields of dataclasses, and checks their numbers.

Each room declares the options that it reads. pmd.Config inherits them all.
"""

import math
from dataclasses import field, fields


def option(default, help, *aliases, within=""):
    """Makes a field of Config.

    help: its meaning, and in brackets the source of its default. within: the interval of its values
    as mathematics writes it, which every number has.
    """
    metadata = {"help": help, "aliases": list(aliases), "within": within}
    return field(default=default, metadata=metadata)


def check_numbers(cfg):
    """Checks the numbers of a Config.

    Raises ValueError if one is outside the interval of its field.
    """
    for f in fields(cfg):
        if f.type not in (int, float):
            continue
        value = getattr(cfg, f.name)
        wrong = misfit(value, f.type, f.metadata["within"])
        if wrong:
            raise ValueError(f"--{f.name} {value} {wrong}")


def misfit(value, kind, within) -> str:
    """Describes the fault of a number outside an interval such as [0, 1) or (0, inf).

    Returns "" for a number inside.
    """
    low, high = map(float, within[1:-1].split(","))
    if kind is int and high == float("inf"):
        high, within = 2**31 - 1, within[:-1] + "]"  # numpy, SQLite and vLLM hold no larger one
    if not -math.inf < value < math.inf:  # of integers too, which may be too long for a float
        return "must be a finite number"
    if value < low or value == low and within.startswith("("):
        return f"must be {'above' if within.startswith('(') else 'at least'} {low:.9g}"
    if value > high or value == high and within.endswith(")"):
        return f"must be {'below' if within.endswith(')') else 'at most'} {high:.10g}"
    return ""
