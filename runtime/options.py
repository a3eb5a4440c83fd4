"""Options as fields of dataclasses: each room declares those that it reads, and pmd.Config inherits them all."""

import argparse
import math
from dataclasses import field, fields

from transformers import HfArgumentParser


def option(default, help, *aliases, within=""):
    """Makes a field of Config.

    help: what it does, and in brackets where its default comes from. within: the interval of its values as mathematics
    writes it, which every number has.
    """
    return field(default=default, metadata={"help": help, "aliases": list(aliases), "within": within})


def check_numbers(cfg):
    """Raises ValueError for a number outside the interval of its field."""
    for f in fields(cfg):
        if f.type not in (int, float):
            continue
        value = getattr(cfg, f.name)
        wrong = misfit(value, f.type, f.metadata["within"])
        if wrong:
            raise ValueError(f"--{f.name} {value} {wrong}")


def misfit(value, kind, within) -> str:
    """What is wrong with a number outside an interval such as [0, 1) or (0, inf); "" for one inside."""
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


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


class Flags(HfArgumentParser):
    """The fields of a Config as flags, in groups: the class that declares a field is its group.

    `within`, which argparse does not know, is for check_numbers.
    """

    def __init__(self, config, **kwargs):
        self.titles, self.groups = titles(config), {}
        super().__init__(config, formatter_class=Help, allow_abbrev=False, **kwargs)

    def add_argument(self, *names, within="", **kwargs):
        title = self.titles.get(kwargs.get("dest") or names[0].lstrip("-"))
        if title is None:  # --help
            return super().add_argument(*names, **kwargs)
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title].add_argument(*names, **kwargs)


def titles(config) -> dict[str, str]:
    """{field: the first line of the docstring of the class that first declares it}"""
    found = {}
    for base in reversed(config.__mro__):
        for name in base.__dict__.get("__annotations__", {}):
            found.setdefault(name, (base.__doc__ or base.__name__).splitlines()[0].rstrip("."))
    return found
