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
# The paper's and SDPO's window: contests from the first day on, before the second.
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
    """Reads a string from a downloaded pickle.

    Raises UnpicklingError if the pickle names a class or function, which is how pickles run code.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def decode_tests(text) -> list[dict]:
    """Decodes tests from JSON, or from JSON pickled as a string, compressed and in base64.

    Raises ValueError if the text is neither.
    """
    try:
        if not text.startswith("["):
            pickled = zlib.decompress(base64.b64decode(text, validate=True))
            text = Strings(io.BytesIO(pickled)).load()
        tests = json.loads(text)
        return [{"input": str(t["input"]), "output": str(t["output"])} for t in tests]
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(
            f"its tests can't be decoded: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def read_livecodebench(data):
    """Yields (place, row) of the official files.

    data: a JSON-lines or Parquet file, or a folder of such files. Empty for the Hub's.

    The Hub has its files beside a loading script, which `datasets` refuses to run. So they are
    loaded by their names. All six, 4.5 GB, are release_v6. This ran on a folder like the Hub's, but
    never on the Hub itself.

    Raises ValueError if there are no such files.
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
    """Makes a problem that is verified by tests. extra: what else its verifier reads."""
    inputs = [test["input"] for test in tests]
    outputs = [test["output"] for test in tests]
    extra = {"inputs": inputs, "outputs": outputs, **extra}
    return Problem(id, prompt, "its tests", "code", system, extra)


def load_livecodebench(data, protocol, since, until):
    """Loads the contests of since <= date < until (YYYY-MM-DD), as a protocol has them.

    sdpo: trains on half of the hidden tests of a problem, and evaluates on all of its hidden tests.
        The half is drawn as SDPO's script does. It takes numpy's seed 0, problem by problem in the
        order of the file, and max(1, n // 2) of n tests, which keep their order.
    older: trains on the contests before since, and evaluates as sdpo.
    official: trains on a problem's public tests, and evaluates on public and hidden tests.

    Returns (name, train, test). The name holds protocol, window and number of problems, for
    reports.
    Raises ValueError if the protocol, the window or a row is not as described, or if a side is
    empty.
    """
    if protocol not in ("sdpo", "older", "official"):
        raise ValueError(
            f"livecodebench has no protocol {protocol!r}; it has sdpo, older and official"
        )
    since, until = read_window(since, until)
    train, test, days = [], [], []
    places = {}  # of each question_id
    generator = np.random.RandomState(0)
    for place, row in read_livecodebench(data):
        require_texts(place, row)
        earlier = places.setdefault(row["question_id"], place)
        if earlier != place:
            raise ValueError(f"{place} repeats the question_id {row['question_id']!r} of {earlier}")
        try:
            day = read_day(row)
            days.append(day)
            if day >= until or (day < since and protocol != "older"):
                continue
            public, hidden, function = read_tests(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from error
        common = prompts(row, function, protocol) | {"date": day}
        if day < since:
            train.append(code_problem(hidden, feedback=True, **common))
            continue
        evaluated = hidden
        if protocol == "official":
            evaluated = public + hidden
            train.append(code_problem(public, feedback=True, **common))
        elif protocol == "sdpo":
            drawn = generator.choice(len(hidden), max(1, len(hidden) // 2), replace=False)
            half = [hidden[i] for i in sorted(drawn)]
            train.append(code_problem(half, feedback=True, **common))
        test.append(code_problem(evaluated, feedback=False, **common))
    if not test or not train:
        purpose = "train on" if test else "evaluate"
        raise ValueError(
            f"{data or 'the Hub'} has contests of {min(days)} to {max(days)}: none to {purpose}"
            f" with protocol {protocol}, since {since}, until {until}"
        )
    count = str(len(test))
    if (since, until) == WINDOW and len(test) != 131:
        count += " of 131"
    return f"livecodebench ({protocol}, {since} to {until}, {count} problems)", train, test


def read_window(since, until) -> list[str]:
    """Checks the first day of a window and the day after its last.

    Raises ValueError if one of them is no day.
    """
    try:
        return [str(date.fromisoformat(day)) for day in (since, until)]
    except ValueError as error:
        raise ValueError(
            f"the window is given in days like {WINDOW[0]}, not as {since} to {until}: {error}"
        ) from error


def require_texts(place, row):
    """Turns what `datasets` parsed back into text. Raises ValueError if a column is no text."""
    if isinstance(row.get("contest_date"), datetime):
        row["contest_date"] = str(row["contest_date"])
    if isinstance(row.get("metadata"), dict):
        row["metadata"] = json.dumps(row["metadata"], default=str)
    missing = [column for column in LIVECODEBENCH if not isinstance(row.get(column), str)]
    if missing:
        raise ValueError(f"{place}: {' and '.join(missing)} must be given, as text")


def read_day(row) -> str:
    """Reads the day of a row's contest. Raises ValueError if it has another form."""
    day = row["contest_date"][:10]
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
        raise ValueError(f"its contest_date {row['contest_date']!r} is no day like {WINDOW[0]}")
    return day


def read_tests(row):
    """Reads a row's tests, and checks that a problem can be made of them.

    Returns (public tests, hidden tests, name of the function that they call or None).
    Raises ValueError if the tests or the metadata can't be read, or if no test is hidden.
    """
    public = decode_tests(row["public_test_cases"])
    hidden = decode_tests(row["private_test_cases"])
    metadata = json.loads(row["metadata"])
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no JSON object")
    if not hidden:
        raise ValueError("it has no hidden tests")
    function = metadata.get("func_name")
    texts = [row[column] for column in ("question_id", "question_content", "starter_code")]
    problem = code_problem(public + hidden, *texts, fn_name=function)
    refuse_unholdable(vars(problem))
    code_tests(problem.extra)
    return public, hidden, function


def prompts(row, function, protocol) -> dict:
    """Writes a problem's prompts in the words of a protocol, as arguments of `code_problem`.

    function: the name of the function that the tests call. None where they call the program.
    """
    system = ""
    block = "longest"
    if protocol == "official":
        system = OFFICIAL_SYSTEM
        block = "last"
        form = "Read the input from stdin and print the answer to stdout."
        if function:
            form = "Fill in this class."
        starter = row["starter_code"] or "# YOUR CODE HERE"
        prompt = OFFICIAL_PROMPT.format(content=row["question_content"], form=form, starter=starter)
    else:
        prompt = SDPO_PROMPT.format(content=row["question_content"])
        if function:
            lines = [line.strip() for line in row["starter_code"].split("\n") if "def " in line]
            signature = re.sub(r"\(self,?\s*", "(", "".join(lines))
            prompt += SIGNATURE.format(signature=signature)
    return {
        "id": row["question_id"],
        "prompt": prompt,
        "system": system,
        "fn_name": function,
        "block": block,
    }
