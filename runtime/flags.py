"""Options as flags of the command line, grouped by the room that declares them."""

import argparse

from transformers import HfArgumentParser


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag in one spelling, its default where there is one, and the text as written."""

    def _format_action_invocation(self, action):
        """Leaves out the spellings with hyphens, which HfArgumentParser takes too."""
        spellings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if len(spellings) == len(action.option_strings):
            return super()._format_action_invocation(action)
        shown = argparse.Action(spellings, action.dest, nargs=action.nargs, metavar=action.metavar)
        shown.choices = action.choices
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action):
        if action.default in ("", None):
            return action.help
        return super()._get_help_string(action)


class Flags(HfArgumentParser):
    """The fields of a Config as flags, in groups: the class that declares a field is its group.

    `within`, which argparse does not know, is for check_numbers.
    """

    def __init__(self, config, **kwargs):
        self.titles, self.groups = titles(config), {}
        super().__init__(config, formatter_class=Help, allow_abbrev=False, **kwargs)
        order = [title_of(base) for base in config.__mro__]
        self._action_groups.sort(
            key=lambda group: group.title in order and order.index(group.title)
        )

    def add_argument(self, *names, within="", **kwargs):
        title = self.titles.get(kwargs.get("dest") or names[0].lstrip("-"))
        if title is None:  # --help
            return super().add_argument(*names, **kwargs)
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title].add_argument(*names, **kwargs)


def title_of(config) -> str:
    """The first line of a class's docstring, or the name of its file."""
    text = config.__doc__ or ""
    if not text or text.startswith(f"{config.__name__}("):  # which dataclass makes of none
        return config.__module__.split(".")[-1]
    return text.splitlines()[0].rstrip(".")


def titles(config) -> dict[str, str]:
    """{field: the title of the class that first declares it}"""
    found = {}
    for base in reversed(config.__mro__):
        for name in base.__dict__.get("__annotations__", {}):
            found.setdefault(name, title_of(base))
    return found
