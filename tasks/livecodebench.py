"""Loads LiveCodeBench v6 from its official files: a window of contests, under three protocols."""

import base64
import io
import json
import pickle
import re
import zlib
from datetime import date, datetime
from pathlib import Path

import numpy as np

from tasks.files import cause, refuse_unholdable, table_rows
from tasks.problem import Problem
from tasks.reading import code_tests

LIVECODEBENCH_HUB = "hf://datasets/livecodebench/code_generation_lite"
LIVECODEBENCH_FILES = ("test.jsonl", *(f"test{n}.jsonl" for n in range(2, 7)))
LIVECODEBENCH = (  # the keys of a row that are read
    "question_content",
    "question_id",
    "contest_date",
    "starter_code",
    "public_test_cases",
    "private_test_cases",
    "metadata",
)
# The paper's window and SDPO's: contests from the first day on, before the second.
WINDOW = ("2025-02-01", "2025-05-01")
SDPO_PROMPT = """\
You write programs for programming contests. Think about the problem, then give the complete \
Python code in a code block enclosed with ``` ```. The time limit is 1 second.

{content}"""
SIGNATURE = """

Your solution should have the following signature:
```python
{signature}
```"""
OFFICIAL_SYSTEM = (
    "You are an expert in Python. Write a correct program for the question, one that passes all of"
    " its tests."
)
OFFICIAL_PROMPT = """### Question:
{content}

### Format: {form}
```python
{starter}
```

### Answer: (in the format above, with backticks)

"""


class Strings(pickle.Unpickler):
    """Reads pickles of strings. It refuses a class or a function, by which pickles run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def decode_tests(text) -> list[dict]:
    """Reads the tests of a row: JSON, or JSON pickled as a string, compressed and in base64.

    Raises ValueError if it is neither.
    """
    try:
        if not text.startswith("["):
            packed = zlib.decompress(base64.b64decode(text, validate=True))
            text = Strings(io.BytesIO(packed)).load()
        tests = json.loads(text)
        tests = [{key: t[key] for key in ("input", "output")} for t in tests]
        if not all(isinstance(text, str) for t in tests for text in t.values()):
            raise TypeError("an input or output is no text")  # "None" would be an answer
        return tests
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(
            f"its tests can't be decoded: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def read_livecodebench(data):
    """Yields (where, row) of the official files.

    data: a JSON-lines or Parquet file, a folder of them, or "" for the Hub's. The Hub has them
    beside a loading script, which `datasets` refuses. So they are loaded by their names: all six,
    4.5 GB, which are release_v6. It ran on a folder like the Hub's, not on the Hub itself.
    Raises ValueError if they can't be read.
    """
    if not data:
        import datasets  # here: it takes a second, and no other task needs it

        for name in LIVECODEBENCH_FILES:
            place = f"{LIVECODEBENCH_HUB}/{name}"
            try:
                table = datasets.load_dataset("json", data_files=place, split="train")
            except Exception as error:
                raise ValueError(
                    f"livecodebench needs --data, its official files, or the Hub's {place}, which"
                    f" can't be loaded: {cause(error)}"
                ) from error
            yield from ((f"{place}, row {n}", row) for n, row in enumerate(table, 1))
        return
    files = [Path(data)]
    if Path(data).is_dir():
        files = sorted(f for f in Path(data).glob("*.*") if f.suffix in (".jsonl", ".parquet"))
    if not files or not files[0].is_file():
        raise ValueError(
            "livecodebench needs --data, a JSON-lines or Parquet file in the official schema or a"
            f" folder of such; {data} is none"
        )
    for path in files:
        yield from ((f"{path}, line {n}", row) for n, row in table_rows(path))


def code_problem(tests, id, prompt, system, **extra) -> Problem:
    """Makes a problem that is judged by tests."""
    inputs, outputs = [t["input"] for t in tests], [t["output"] for t in tests]
    extra = {"inputs": inputs, "outputs": outputs, **extra}
    return Problem(id, prompt, "its tests", "code", system, extra)


def refuse_row(row, where, seen):
    """Turns the date and the metadata of a row into text, and checks what is read of it.

    seen: {question_id: where}, which the row joins.
    Raises ValueError if a text is missing, or if the question_id is that of an earlier row.
    """
    # `datasets` reads a time, or an object, if each row of a column holds one
    if isinstance(row.get("contest_date"), datetime):
        row["contest_date"] = str(row["contest_date"])
    if isinstance(row.get("metadata"), dict):
        row["metadata"] = json.dumps(row["metadata"], default=str)
    bad = [key for key in LIVECODEBENCH if not isinstance(row.get(key), str)]
    if bad:
        raise ValueError(f"{where}: {' and '.join(bad)} must be given, as text")
    other = seen.setdefault(row["question_id"], where)
    if other != where:
        raise ValueError(f"{where} repeats the question_id {row['question_id']!r} of {other}")


def day_of(row) -> str:
    """Returns the day of a row's contest.

    Raises ValueError if it is no day.
    """
    day = row["contest_date"][:10]
    try:
        return str(date.fromisoformat(day))
    except ValueError as error:
        raise ValueError(
            f"its contest_date {row['contest_date']!r} is no day like {WINDOW[0]}"
        ) from error


def read_tests(row) -> tuple[list, list, str | None]:
    """Returns the public and the hidden tests of a row, and the name of the function they call.

    Raises ValueError if they can't be read, or can't be run.
    """
    public = decode_tests(row["public_test_cases"])
    hidden = decode_tests(row["private_test_cases"])
    metadata = json.loads(row["metadata"])
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no JSON object")
    if not hidden:
        raise ValueError("it has no hidden tests")
    name = metadata.get("func_name")
    texts = (row["question_id"], row["question_content"], row["starter_code"])
    problem = code_problem(public + hidden, *texts, fn_name=name)
    refuse_unholdable(vars(problem))
    code_tests(problem.extra)
    return public, hidden, name


def sdpo_prompt(content, starter, name) -> str:
    """Writes the prompt of SDPO, with the signature of a function if the tests call one."""
    prompt = SDPO_PROMPT.format(content=content)
    if name:
        heads = "".join(line.strip() for line in starter.split("\n") if "def " in line)
        prompt += SIGNATURE.format(signature=re.sub(r"\(self,?\s*", "(", heads))
    return prompt


def official_prompt(content, starter, name) -> str:
    """Writes the prompt of LiveCodeBench's own harness."""
    form = "Read the input from stdin and print the answer to stdout."
    if name:
        form = "Fill in this class."
    return OFFICIAL_PROMPT.format(content=content, form=form, starter=starter or "# YOUR CODE HERE")


def question_of(row, name, protocol) -> dict:
    """Returns what a row's problem for training and its problem for evaluation have in common."""
    texts = (row["question_content"], row["starter_code"], name)
    known = {"id": row["question_id"], "fn_name": name, "date": day_of(row)}
    if protocol == "official":
        prompt = official_prompt(*texts)
        return known | {"prompt": prompt, "system": OFFICIAL_SYSTEM, "block": "last"}
    return known | {"prompt": sdpo_prompt(*texts), "system": "", "block": "longest"}


def load_livecodebench(data, protocol, since, until):
    """Returns (name, train, test): the contests of since <= date < until, under a protocol.

    since, until: days, YYYY-MM-DD. protocol: see the option. The name has the protocol, the window
    and the number of problems, for reports. SDPO's half of the tests is drawn as in its script:
    numpy's seed 0, problem by problem in the order of the file, max(1, n // 2) of n tests, which
    keep their order.
    Raises ValueError if a row can't be read, or if there is nothing to train on or to evaluate.
    """
    if protocol not in ("sdpo", "older", "official"):
        raise ValueError(
            f"livecodebench has no protocol {protocol!r}; it has sdpo, older and official"
        )
    try:
        since, until = (str(date.fromisoformat(day)) for day in (since, until))
    except ValueError as error:
        raise ValueError(
            f"the window is given in days like {WINDOW[0]}, not as {since} to {until}: {error}"
        ) from error
    train, test, days = [], [], []
    seen = {}
    rng = np.random.RandomState(0)
    for where, row in read_livecodebench(data):
        refuse_row(row, where, seen)
        try:
            day = day_of(row)
            days.append(day)
            if day >= until or day < since and protocol != "older":
                continue
            public, hidden, name = read_tests(row)
            if protocol == "official" and not public:
                raise ValueError("it has no public tests, on which protocol official trains")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        known = question_of(row, name, protocol)
        judged = public + hidden if protocol == "official" else hidden
        learned = public if protocol == "official" else hidden
        if day >= since:
            test.append(code_problem(judged, feedback=False, **known))
            if protocol == "sdpo":
                half = rng.choice(len(hidden), max(1, len(hidden) // 2), replace=False)
                learned = [hidden[i] for i in sorted(half)]
            if protocol == "older":  # it trains on the contests before the window
                continue
        train.append(code_problem(learned, feedback=True, **known))
    if not test or not train:
        raise ValueError(
            f"{data or 'the Hub'} has contests of {min(days)} to {max(days)}: none to"
            f" {'train on' if test else 'evaluate'} with protocol {protocol}, since {since}, until"
            f" {until}"
        )
    expected = " of 131" if (since, until) == WINDOW and len(test) != 131 else ""
    name = f"livecodebench ({protocol}, {since} to {until}, {len(test)}{expected} problems)"
    return name, train, test
