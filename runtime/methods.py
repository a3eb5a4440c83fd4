"""Finds a method: a file of methods/, or one of your own.

A file that exists is a method. There is no registry.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path

from runtime.provenance import HERE

FOLDER = HERE / "methods"


def method_class(name) -> type:
    """Returns the class Method of methods/NAME.py, or of the file at the path `name`.

    Raises ValueError, with the names of all methods, if there is no such file or class.
    """
    stem = name.replace("-", "_")
    if name.endswith(".py") and Path(name).is_file():
        module = module_at(str(Path(name).resolve()))
    elif re.fullmatch(r"[a-z]\w*", stem) and (FOLDER / f"{stem}.py").is_file():
        module = importlib.import_module(f"methods.{stem}")
    else:
        if name.endswith(".py"):
            raise ValueError(f"--method {name}: there is no such file")
        known = sorted(spelled(p.stem) for p in FOLDER.glob("[a-z]*.py"))
        near = difflib.get_close_matches(name.lower(), known, 1)
        meant = f"; do you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--method {name!r} is none of {', '.join(known)}, and no path of a file that ends in"
            f" .py{meant}"
        )
    method = getattr(module, "Method", None)
    bases = method.__mro__ if isinstance(method, type) else ()
    base = next((kind for kind in bases if kind.__name__ == "PMD"), None)
    if base is None:
        raise ValueError(f"--method {name}: the file has no class Method(PMD)")
    check_config(name, module, method)
    check_hooks(name, method, base)
    return method


def check_config(name, module, method):
    """Raises ValueError if flags that a method's file declares would not be taken over."""
    config = getattr(module, "Config", None)
    if not isinstance(config, type) or config.__module__ != module.__name__:
        return  # it has none of its own
    if method.Config is not config:
        raise ValueError(
            f"--method {name}: its class Config is not used; write `Config = Config` in its class"
            " Method"
        )
    if "__dataclass_fields__" not in vars(config):
        raise ValueError(f"--method {name}: its class Config is no dataclass; put @dataclass on it")
    for f in dataclasses.fields(config):
        if "within" not in f.metadata:
            raise ValueError(
                f"--method {name}: the flag {f.name} is a plain field; write it by pmd.option"
            )


def check_hooks(name, method, base):
    """Raises ValueError if a name of a method is nearly that of a hook, which it would not replace.

    base: the class PMD. Names that begin with _ are the method's own.
    """
    for own in vars(method):
        near = difflib.get_close_matches(own, vars(base), 1, 0.85)
        if near and not hasattr(base, own) and not own.startswith("_"):
            raise ValueError(
                f"--method {name}: {own} is no hook, but {near[0]} is; give it that name, or one"
                " that is less like it"
            )


def method_of(cfg) -> type:
    """Returns the class that a configuration names."""
    return method_class(cfg.method)


def declared(config, base) -> set[str]:
    """Returns the flags that a method's Config declares itself, between it and the class `base`."""
    own = config.__mro__[: config.__mro__.index(base)]
    return set().union(*(room.__annotations__ for room in own))


def method_name(argv) -> str:
    """Returns --method in the spelling of records: pmd-transient, also for pmd_transient."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default="pmd")
    return spelled(parser.parse_known_args(argv)[0].method)


def spelled(name) -> str:
    return name if name.endswith(".py") else name.replace("_", "-")


def card(path) -> dict[str, str]:
    """Reads what a method's file says of itself, at the end of its docstring.

    The keys are `Teacher reads`, `Loss` and `Claims more than`: a method, or none and why.
    """
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return dict(re.findall(r"^(Teacher reads|Loss|Claims more than): (.+)\.$", text, re.M))


@functools.cache
def cards() -> dict[str, dict]:
    """Gives the card of every file of methods/, by the name that --method takes."""
    return {spelled(p.stem): card(p) for p in sorted(FOLDER.glob("[a-z]*.py"))}


def listed() -> str:
    """Gives the table of methods that --help ends with."""
    lines = ["methods, what the teacher reads, and the loss:"]
    for name, says in cards().items():
        lines.append(f"  {name:16s} {says['Teacher reads']}; {says['Loss']}")
    return "\n".join(lines)


@functools.cache
def module_at(path):
    """Imports the file of a method outside methods/.

    Its module's name is no other module's: a file may be called memory.py, as ours is.
    """
    place = hashlib.sha256(path.encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"method_{place}.{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
