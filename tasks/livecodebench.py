"""LiveCodeBench v6 from its official files: a window of contests, in SDPO's protocol or others."""

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
LIVECODEBENCH = (
    "question_content",
    "question_id",
    "contest_date",
    "starter_code",
    "public_test_cases",
    "private_test_cases",
    "metadata",
)
WINDOW = (
    "2025-02-01",
    "2025-05-01",
)  # the paper's and SDPO's: contests from the first day on, before the second
SDPO_PROMPT = """\
You write programs for programming contests. Think about the problem, then give the complete Python \
code in a code block enclosed with ``` ```. The time limit is 1 second.

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
    """Downloaded pickles may hold a string. They may not name a class or function, which is how
    pickles run code.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def decode_tests(text) -> list[dict]:
    """The tests of a row: JSON, or JSON pickled as a string, compressed and written in base64.
    ValueError if neither.
    """
    try:
        if not text.startswith("["):
            text = Strings(
                io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))
            ).load()
        tests = json.loads(text)
        return [{"input": str(t["input"]), "output": str(t["output"])} for t in tests]
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(
            f"its tests can't be decoded: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def read_livecodebench(data):
    """Yields (where, row) of the official files: a JSON-lines file, a folder of them, or the Hub's
    where data is empty.

    The Hub has them beside a loading script, which `datasets` runs no more and refuses, so they are
    loaded by their names: all six, 4.5 GB, which are release_v6. Not run on the Hub itself, which
    was out of reach; run on a folder like it.
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
    files = (
        sorted(f for f in Path(data).glob("*.*") if f.suffix in (".jsonl", ".parquet"))
        if Path(data).is_dir()
        else [Path(data)]
    )
    if not files or not files[0].is_file():
        raise ValueError(
            "livecodebench needs --data, a JSON-lines or Parquet file in the official schema or a"
            f" folder of such; {data} is none"
        )
    for path in files:
        yield from ((f"{path}, line {n}", row) for n, row in table_rows(path))


def code_problem(tests, id, prompt, system, **extra) -> Problem:
    return Problem(
        id,
        prompt,
        "its tests",
        "code",
        system,
        {"inputs": [t["input"] for t in tests], "outputs": [t["output"] for t in tests], **extra},
    )


def load_livecodebench(data, protocol, since, until):
    """(name, train, test): the contests of since <= date < until (YYYY-MM-DD), under a protocol of
    docs/data.md.

    The name says protocol, window and number of problems, for reports. SDPO's half of the tests is
    drawn as its script does: numpy's seed 0, problem by problem in the order of the file, max(1, n
    // 2) of n tests, which keep their order.
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
    train, test, days, seen, rng = [], [], [], {}, np.random.RandomState(0)
    for where, row in read_livecodebench(data):
        if isinstance(
            row.get("contest_date"), datetime
        ):  # `datasets` knows a time when it sees one
            row["contest_date"] = str(row["contest_date"])
        if isinstance(row.get("metadata"), dict):  # and an object, where another row has one
            row["metadata"] = json.dumps(row["metadata"], default=str)
        if bad := [k for k in LIVECODEBENCH if not isinstance(row.get(k), str)]:
            raise ValueError(f"{where}: {' and '.join(bad)} must be given, as text")
        if (other := seen.setdefault(row["question_id"], where)) != where:
            raise ValueError(f"{where} repeats the question_id {row['question_id']!r} of {other}")
        try:
            day = row["contest_date"][:10]
            if not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
                raise ValueError(
                    f"its contest_date {row['contest_date']!r} is no day like {WINDOW[0]}"
                )
            days.append(day)
            if day >= until or day < since and protocol != "older":
                continue
            public, hidden = (
                decode_tests(row["public_test_cases"]),
                decode_tests(row["private_test_cases"]),
            )
            if not isinstance(metadata := json.loads(row["metadata"]), dict):
                raise ValueError("its metadata is no JSON object")
            if not hidden:
                raise ValueError("it has no hidden tests")
            name = metadata.get("func_name")
            texts = (row["question_id"], row["question_content"], row["starter_code"])
            whole = code_problem(public + hidden, *texts, fn_name=name)
            refuse_unholdable(vars(whole))
            code_tests(whole.extra)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        content, starter, system, block = (
            row["question_content"],
            row["starter_code"],
            "",
            "longest",
        )
        if protocol == "official":
            form = (
                "Fill in this class."
                if name
                else "Read the input from stdin and print the answer to stdout."
            )
            prompt = OFFICIAL_PROMPT.format(
                content=content, form=form, starter=starter or "# YOUR CODE HERE"
            )
            system, block = OFFICIAL_SYSTEM, "last"
        else:
            signature = re.sub(
                r"\(self,?\s*",
                "(",
                "".join(line.strip() for line in starter.split("\n") if "def " in line),
            )
            prompt = SDPO_PROMPT.format(content=content) + (
                SIGNATURE.format(signature=signature) if name else ""
            )

        known = {
            "id": row["question_id"],
            "prompt": prompt,
            "system": system,
            "fn_name": name,
            "block": block,
            "date": day,
        }
        if day < since:
            train.append(code_problem(hidden, feedback=True, **known))
            continue
        test.append(
            code_problem(
                public + hidden if protocol == "official" else hidden, feedback=False, **known
            )
        )
        if protocol == "sdpo":
            half = sorted(rng.choice(len(hidden), max(1, len(hidden) // 2), replace=False))
            train.append(code_problem([hidden[i] for i in half], feedback=True, **known))
        elif protocol == "official":
            train.append(code_problem(public, feedback=True, **known))
    if not test or not train:
        raise ValueError(
            f"{data or 'the Hub'} has contests of {min(days)} to {max(days)}: none to"
            f" {'train on' if test else 'evaluate'} with protocol {protocol}, since {since}, until"
            f" {until}"
        )
    expected = " of 131" if (since, until) == WINDOW and len(test) != 131 else ""
    return (
        f"livecodebench ({protocol}, {since} to {until}, {len(test)}{expected} problems)",
        train,
        test,
    )
