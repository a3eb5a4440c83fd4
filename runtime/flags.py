"""Options as flags of the command line, grouped by the room that declares them."""

import argparse

from transformers import HfArgumentParser


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
