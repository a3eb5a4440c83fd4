"""Files of a run: written whole or not at all, and errors that name the file and the cure."""

import contextlib
import json
import logging
import os

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from tasks.files import json_lines


class Stopped(Exception):
    """The run was told to stop, and has saved. name: the --name to go on with. code: the exit
    status of the program.
    """

    def __init__(self, what, name, code):
        super().__init__(what)
        self.what, self.name, self.code = what, name, code

    def __str__(self):
        return f"{self.what}; the same command with --name {self.name} --resume goes on"


class RunError(ValueError):
    """What ends a run that is no fault of the program. The message is one sentence, with the file
    and the cure.
    """


def reason(error) -> str:
    """Why, in a few words: without a traceback of another process, an error's number or the file
    that is named anyway.
    """
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def writing(
    path, cure="free some space on the disk; --resume then goes on from the newest checkpoint"
):
    """What can't be written inside as a RunError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        raise RunError(f"{path} can't be written ({reason(error)}): {cure}") from error
    except Exception as error:
        if type(error) is not Exception:  # which is what tokenizers raise for a full disk
            raise
        raise RunError(f"{path} can't be written ({reason(error)}): {cure}") from error


@contextlib.contextmanager
def without_log():
    """Without the tracebacks that torch logs as warnings of what it then raises (its
    state_dict_loader).
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def read_json(path, cure) -> dict:
    """The object in a file of JSON; a RunError with `cure` where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} can't be read ({reason(error)}): {cure}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object: {cure}")
    return found


def append(path, row):
    append_text(path, json.dumps(row, ensure_ascii=False) + "\n")


def append_text(path, text):
    with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write(path, text):
    """Writes aside and renames: whoever reads the file finds the old text or the new one."""
    aside = path.with_name(path.name + ".partial")
    with writing(path):
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        aside.rename(path)


def write_lines(path, rows):
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path):
    """The rows of a file of JSON lines; a last line without its end was cut by a kill, and is
    none.
    """
    return [row for _, row in json_lines(path, cut=True)]


def read_rows(path):
    """The rows of a run's own metrics.jsonl or samples.jsonl, each of a step; a RunError where one
    is not.
    """
    try:
        rows = list(json_lines(path, cut=True))
    except ValueError as error:
        raise RunError(
            f"{error}: mend that line, or take it out; the same command then goes on"
        ) from error
    for n, row in rows:
        if not isinstance(row.get("step"), int):
            raise RunError(
                f"{path}, line {n} has no step: mend that line, or take it out; the same command"
                " then goes on"
            )
    return [row for _, row in rows]


def settle(folder):
    """Has the disk hold a folder and its files, so that a rename after it can't come to stand
    before them.
    """
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
