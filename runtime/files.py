"""Reads and writes the files of a run: whole or not at all, with errors that name file and cure."""

import contextlib
import json
import logging
import os

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from runtime.errors import RunError
from tasks.files import json_lines

ELSEWHERE = "name a place that is there, with some space, and yours to write to"
FREE_SPACE = "free some space on the disk; --resume then goes on from the newest checkpoint"


class Stopped(Exception):
    """Ends a run that was told to stop, and has saved.

    name: the --name to go on with. code: the exit status of the program.
    """

    def __init__(self, reason, name, code):
        super().__init__(reason)
        self.reason, self.name, self.code = reason, name, code

    def __str__(self):
        return f"{self.reason}; the same command with --name {self.name} --resume goes on"


def reason(error) -> str:
    """Describes an error in a few words.

    It leaves out tracebacks of other processes, the error's number, and the file.
    """
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def writing(path, cure=FREE_SPACE):
    """Turns an error in writing into a RunError that names `path`."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        # tokenizers raise Exception itself for a full disk
        expected = isinstance(error, (OSError, SafetensorError, CheckpointException))
        if not expected and type(error) is not Exception:
            raise
        raise RunError(f"{path} can't be written ({reason(error)}): {cure}") from error


@contextlib.contextmanager
def without_log():
    """Silences the tracebacks that torch logs as warnings before it raises (state_dict_loader)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def read_json(path, cure) -> dict:
    """Reads the object in a file of JSON.

    Raises RunError, with `cure`, if there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} can't be read ({reason(error)}): {cure}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object: {cure}")
    return value


def append(path, row):
    append_text(path, json.dumps(row, ensure_ascii=False) + "\n")


def append_text(path, text):
    with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write(path, text, cure=FREE_SPACE):
    """Writes a file aside and renames it: a reader finds the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    with writing(path, cure):
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.rename(path)


def write_lines(path, rows, cure=FREE_SPACE):
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), cure)


def read_lines(path):
    """Reads the rows of a file of JSON lines.

    A last line without its end was cut by a kill, and is left out.
    """
    return [row for _, row in json_lines(path, cut=True)]


def read_rows(path, **kinds):
    """Reads the rows of a run's metrics.jsonl or samples.jsonl, each of a step.

    kinds: the types of the values that other rows must have, in place of a step.
    Raises RunError if a line is no JSON or lacks such a value.
    """
    cure = "mend that line, or take it out; the same command then goes on"
    try:
        rows = list(json_lines(path, cut=True))
    except ValueError as error:
        raise RunError(f"{error}: {cure}") from error
    for n, row in rows:
        for key, kind in (kinds or {"step": int}).items():
            if not isinstance(row.get(key), kind):
                raise RunError(f"{path}, line {n} has no {key}: {cure}")
    return [row for _, row in rows]


def settle(folder):
    """Flushes a folder and its files to the disk, so that a later rename can't come before them."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
