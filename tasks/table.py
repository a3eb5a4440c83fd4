"""Problems from a table with the usual columns: a file, or a dataset of the Hub.

    --task data.jsonl          also .json, .csv and .parquet
    --task openai/gsm8k:main   a name on the Hub, with its configuration after the colon

Columns are found by name: `question`, `problem` or `prompt` asks, `answer` or `solution` is the
key, and `messages` has a chat. `id`, `system` and `verifier` are read where they are.
"""

import csv
import json
import math
import random
import re
from pathlib import Path

from tqdm import tqdm

from tasks.files import cause, json_lines, table_rows
from tasks.maths import key_of
from tasks.problem import Problem, shown
from tasks.reading import read_problem

ASKS, ANSWERS = ("question", "problem", "prompt"), ("answer", "solution")
KINDS = (".jsonl", ".json", ".csv", ".parquet")
SYSTEM = "Think step by step, and put the final answer into \\boxed{}."  # where there is none
HELD_OUT, MOST = 0.1, 500  # share and number of problems held out to test where no split is [ours]
SEED = 42  # of that split
ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")


def is_table(name) -> bool:
    """Says whether a task's name is that of a file or a dataset, and not of a folder."""
    if Path(name).suffix in KINDS:
        return True
    is_ours = name.split("/")[0] in ("nano", "sciknoweval", "gym") or Path(name).exists()
    return bool(ON_THE_HUB.fullmatch(name)) and name[0] != "." and not is_ours


def load_table_task(name) -> tuple[list, list, str]:
    """Reads the train and test problems of a file or a dataset, and says how they were split.

    Raises ValueError, with the row, if it has no such columns or an answer that can't be judged.
    """
    splits = {"train": file_rows(name)} if Path(name).suffix in KINDS else hub_rows(name)
    problems = {}
    for split, rows in splits.items():
        problems[split] = []
        for n, row in enumerate(tqdm(rows, desc=split, leave=False, disable=None), 1):
            try:
                problems[split].append(problem_of(row, f"{split}-{n}"))
            except ValueError as error:
                raise ValueError(f"{name}, {split} row {n}: {error}") from error
        refuse_repeated(problems[split], name)
        if not problems[split]:
            raise ValueError(f"{name} has no row in {split}")
    if "test" in problems:
        train = without(problems["train"], problems["test"])
        dropped = len(problems["train"]) - len(train)
        card = f"{name}: its own test split; {dropped} training questions stand in it and went"
        return train, problems["test"], card
    train, test = held_out(problems["train"])
    if not train:
        raise ValueError(f"{name} has one question, to train on or to hold out; give more")
    card = f"{name} has no test split: {len(test)} of its questions were held out by seed {SEED}"
    return train, test, card


def file_rows(path) -> list[dict]:
    """Reads the rows of a file by its ending."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.suffix == ".jsonl":
        return [row for _, row in json_lines(path)]
    if path.suffix == ".parquet":
        return [row for _, row in table_rows(path)]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv_rows(file) if path.suffix == ".csv" else json.load(file)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no list of objects")
    if any(None in row for row in rows):
        raise ValueError(f"{path} has a row with more fields than its first line names")
    return rows


def csv_rows(file) -> list[dict]:
    """Reads the rows of a CSV file.

    Raises ValueError if its first line names a column twice: the first of the two would be lost.
    """
    table = csv.DictReader(file)
    names = [name for name in table.fieldnames or () if name.strip()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"its first line names the column {twice!r} twice; rename or remove one")
    return list(table)


def hub_rows(name) -> dict:
    """Loads the train split of a dataset of the Hub, and its test split where there is one.

    Raises ValueError if it can't be reached, or has no split to train on.
    """
    import datasets  # a second to import

    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # of the Hub, of the network, of the file system
        raise ValueError(
            f"--task {name} is no folder, no file and no reachable dataset of the Hub"
            f" ({cause(error)[:200]})"
        ) from error
    test = next((s for s in ("test", "validation") if s in splits), None)
    train = "train" if "train" in splits else next((s for s in splits if s != test), None)
    if train is None:
        raise ValueError(
            f"--task {name} has no split but {test}, and nothing to train on; take another"
            " configuration, or save its rows as a file, of which a tenth is held out"
        )
    return {"train": splits[train], **({"test": splits[test]} if test else {})}


def problem_of(row, id) -> Problem:
    """Makes a problem of a row by the names of its columns.

    Raises ValueError if the row has no question or no answer, or one that is no text or number.
    """
    row = {key: value for key, value in row.items() if value is not None}
    asked = next((row.pop(key) for key in ASKS if key in row), None)
    chat = row.pop("messages", None) if asked is None else asked
    if isinstance(chat, list):
        system, asked, replied = read_chat(chat)
        row.setdefault("system", system)
        if replied and not any(key in row for key in ANSWERS):
            row["answer"] = replied
    answer = next((row.pop(key) for key in ANSWERS if key in row), None)
    if asked is None or answer is None:
        names = f"one of {', '.join(ASKS)} and messages, and one of {' and '.join(ANSWERS)}"
        lacks = "no question" if asked is None else "no answer"
        raise ValueError(
            f"a row has {lacks}: it needs {names}, and has {', '.join(row) or 'nothing else'}"
        )
    for name, value, cure in (
        ("question", asked, "write it as text"),
        ("answer", answer, "write it as text, with a verifier that reads it"),
    ):
        endless = isinstance(value, float) and not math.isfinite(value)  # NaN is an empty cell
        if endless or isinstance(value, (bool, bytes, list, dict)):
            raise ValueError(f"the {name} {shown(value)} is no text or number; {cure}")
    verifier = row.pop("verifier", "math")
    answer = str(answer)
    if verifier == "math":
        answer = key_of(answer)
        row["system"] = row.get("system") or SYSTEM
    own = {"id": str(row.pop("id", id)), "prompt": str(asked), "answer": answer}
    extra = {key: value for key, value in row.items() if key not in ANSWERS}
    return read_problem({**extra, **own, "verifier": verifier})


def read_chat(messages) -> tuple[str, str, str]:
    """Returns the system message, the user's and the assistant's of a chat of one turn.

    Raises ValueError if it has another form.
    """
    roles = [m.get("role") if isinstance(m, dict) else m for m in messages]
    if roles not in (
        ["user"],
        ["system", "user"],
        ["user", "assistant"],
        ["system", "user", "assistant"],
    ):
        raise ValueError(f"a chat has one turn of user and assistant, not {shown(roles)}")
    texts = {m["role"]: m.get("content") or "" for m in messages}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("the content of a message has to be a text, and not parts of one")
    return texts.get("system", ""), texts["user"], texts.get("assistant", "")


def refuse_repeated(problems, name):
    """Raises ValueError if two rows have one id."""
    seen = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"{name} repeats the id {problem.id!r}")
        seen.add(problem.id)


def without(train, test) -> list:
    """Returns the training problems whose question does not stand in test."""
    asked = {p.prompt for p in test}
    return [p for p in train if p.prompt not in asked]


def held_out(problems) -> tuple[list, list]:
    """Returns train and test: a question that stands twice is on one side."""
    prompts = sorted({p.prompt for p in problems})
    size = min(MOST, max(1, round(HELD_OUT * len(prompts))))
    chosen = set(random.Random(SEED).sample(prompts, size))
    train = [p for p in problems if p.prompt not in chosen]
    return train, [p for p in problems if p.prompt in chosen]
