"""Reads the files of a run for the tools: each value that they use is there, and of its type."""

import json

from runtime.errors import RunError
from runtime.files import read_json
from tasks.files import json_lines

# The keys that a comparison reads of config.json, of the two kinds of rows in metrics.jsonl, and of
# evals/.
CONFIG = "task model method seed tiers memory_from retrieve_k".split()
STEP = "step seconds keywords memory".split()
EVALUATION = "step avg_at_k".split()
ANSWER = "problem reward answer tokens".split()
MEND = "mend that line, or take it out"


def is_text(value) -> bool:
    return isinstance(value, str)


def is_whole(value) -> bool:
    return isinstance(value, int)


def is_number(value) -> bool:
    return isinstance(value, (int, float))


def are_numbers(value) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def is_interval(value) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


KINDS = {
    is_text: "a text",
    is_whole: "a whole number",
    is_number: "a number",
    are_numbers: "an object of numbers",
    is_interval: "null or a list of two numbers",
}
# What the values under a name are, in config.json, metrics.jsonl and evals/.
TYPES = {
    **dict.fromkeys("task model method tiers memory_from problem answer".split(), is_text),
    **dict.fromkeys("protocol since until split".split(), is_text),
    **dict.fromkeys("seed retrieve_k step k n_problems".split(), is_whole),
    **dict.fromkeys("avg_at_k reward tokens peak_gb alpha".split(), is_number),
    **dict.fromkeys("entropy completion_tokens sampler_gap".split(), is_number),
    **dict.fromkeys("seconds keywords memory memory_events".split(), are_numbers),
    "interval": is_interval,
}


def need(row, keys, where) -> dict:
    """Returns the row.

    Raises ValueError if it lacks one of the keys, or if a value that a tool reads is of another
    type than such values are.
    """
    for key in keys:
        if key not in row:
            raise ValueError(f"{where} has no {key}")
    for key in row.keys() & TYPES.keys():
        if not TYPES[key](row[key]):
            found = json.dumps(row[key])[:40]
            raise ValueError(f"{where} has {found} as its {key}: it has to be {KINDS[TYPES[key]]}")
    return row


def read_object(path) -> dict:
    """Reads a file of one JSON object, such as config.json. Raises ValueError if it is none."""
    try:
        return read_json(path, "name the folder of a run, with its files in UTF-8")
    except RunError as error:
        fault = error.__cause__
        if not isinstance(fault, json.JSONDecodeError):
            raise
        raise ValueError(f"{path}, line {fault.lineno} is not JSON: {fault.msg}") from fault


def read_config(path) -> dict:
    """Reads the config.json of a run that is compared. Raises ValueError as need does."""
    config = need(read_object(path), CONFIG, path)
    if config["task"] == "livecodebench":
        need(config, ["protocol", "since", "until"], path)
    return config


def numbered(path, keys, cut=False):
    """Yields (number, row) of a file of JSON lines. keys(row): those that it needs.

    cut: a last line without its end was cut by a kill, or is being written, and is left out.
    Raises RunError, with file and line, if a line is no JSON or a row has not what it needs.
    """
    try:
        for n, row in json_lines(path, cut):
            yield n, need(row, keys(row), f"{path}, line {n}")
    except ValueError as error:
        raise RunError(f"{error}; {MEND}") from error


def metrics_of(path, keys=STEP) -> list[dict]:
    """Reads a metrics.jsonl, also of a run that is going on or was killed. keys: of its steps."""
    rows = numbered(path, lambda row: EVALUATION if "split" in row else keys, cut=True)
    return [row for _, row in rows]


def summary_of(path) -> dict | None:
    """Reads a summary.json, with the scores that are shown; None where there is none.

    Its other values have names that mean something else in a row of metrics.jsonl, such as seconds.
    """
    if not path.is_file():
        return None
    summary = read_object(path)
    for name in ("base", "final", "dev_best", "test_best"):
        row = summary.get(name)
        if row is None and name != "final":
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{path} has no scores as its {name}; finish the run with --resume")
        need(row, ["step", "avg_at_k"], f"{name} of {path}")
    return summary


def answers_of(path) -> list[dict]:
    """Reads the rows of evals/STEP-SPLIT.jsonl."""
    return [row for _, row in numbered(path, lambda row: ANSWER)]


def need_whole(path, problems, k, row):
    """Compares an evaluation's file with its row of metrics.jsonl, where that has the numbers.

    Raises ValueError if the file has other numbers of problems or samples.
    """
    wanted = row.get("n_problems", problems), row.get("k", k)
    if wanted != (problems, k):
        raise ValueError(
            f"{path} has {problems} problems with {k} samples each, where metrics.jsonl says"
            f" {wanted[0]} with {wanted[1]}: it was cut or changed; leave this run out, or"
            " answer the problems anew with eval.py"
        )
