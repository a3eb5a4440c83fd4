"""Tasks, verdicts and estimators: what a problem is, when an answer is right, what a set of answers is worth.

    python eval.py --model DIR_OR_NAME --task T --n 16     answers a task's test problems, with a memory or without
    python eval.py compare RUN RUN ...                     the paper's Tables 2, 3, 4, 5 and 7 for these runs
    python eval.py figures RUN RUN ...                     its Figures 2 to 6, with their data

    load_task(name)               -> Task(train, dev, test), from JSON-lines files
    verify(problem, completion)   -> Verdict(reward, feedback): one function for training and evaluation alike
    judge(code, inputs, outputs)  -> Judgement(passed, status, n_passed, feedback), of a program; sandbox.py runs it
    avg_at_k, maj_at_k, best_at_k -> estimators over k samples a problem; `interval`, a bootstrap over problems and runs

A task is a folder with `train.jsonl` and `test.jsonl`, one JSON object a line, or the same rows as `.parquet`:

    id        text, unique in the task
    prompt    the user message
    answer    what the verifier compares with (for `code`: instead of it, inputs, outputs and perhaps fn_name, see judge)
    verifier  a name in VERIFIERS
    system    the system message (optional)

All other keys are kept in `Problem.extra`, out of every prompt. `nano` is the embedded task, whose verifier says which
step went wrong, `nano/plain` the same with a silent one, `nano/7` and `nano/plain/7` other worlds (`python nano/make.py
world --seed 7`), `sciknoweval/chemistry` a domain of SciKnowEval in SDPO's files or from the Hub, `livecodebench` a window
of LiveCodeBench in its official files, a path any folder of yours.
"""

import argparse
import base64
import io
import json
import pickle
import random
import re
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sandbox import CORES, allow_unsafe_exec, execute, sandbox_command

NANO = Path(__file__).resolve().parent / "nano"
SCIKNOWEVAL = {"biology": (450, 50), "chemistry": (1890, 210), "material": (841, 94), "physics": (720, 80)}  # Tab. 10
LIVECODEBENCH = ("question_content", "question_id", "contest_date", "starter_code", "public_test_cases",
                 "private_test_cases", "metadata")
WINDOW = ("2025-02-01", "2025-05-01")  # the paper's and SDPO's: contests from the first day on, before the second


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Problem:
    """One question. `prompt` is all of it that the student sees, besides the `system` message."""

    id: str
    prompt: str
    answer: str
    verifier: str
    system: str = ""
    extra: dict = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Task:
    """The splits of a task. dev is held out of the published training split (a deviation; dev=0 trains on all of it).

    name: with what a report has to say of it, such as a window. card: what is known to be wrong with the data.
    """

    name: str
    train: list[Problem]
    dev: list[Problem]
    test: list[Problem]
    card: str = ""


# SciKnowEval's items on the Hub have no system message. This one has the published form in our own words (a deviation);
# SDPO's files bring the published one.
HUB_SYSTEM = """
You see a question and its options, one of which is right. Write your reply in this form:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

The answer is the letter of the right option (A, B, C, or D) alone, without its text. If you choose "A", it is:
<answer>
A
</answer>
"""
REASON = "\nPlease reason step by step."


def from_sciknoweval(row) -> dict:
    """An item of SDPO's SciKnowEval files in our schema; its prompt ends in lines `A: text` and holds the published form."""
    if missing := [k for k in ("idx", "prompt", "answer", "system") if row.get(k) is None]:
        raise ValueError(f"{' and '.join(missing)} must be given")
    letters = re.findall(r"^([A-Z]): ", str(row["prompt"]), re.MULTILINE)
    if row["answer"] not in letters:
        raise ValueError(f"the answer key {row['answer']!r} is none of the options {', '.join(letters)}")
    return {"id": str(row["idx"]), "prompt": row["prompt"], "answer": row["answer"], "verifier": "choice",
            "system": row["system"]}


def sciknoweval_from_hub(domain) -> list[list[Problem]]:
    """Train and test of a domain, rebuilt as SDPO built its files: L3, multiple choice, 90/10 by `datasets` with seed 42.

    Not run: the Hub was out of reach. The split was checked without it (`idx` is the position before the split, and the
    published files have exactly these); that the Hub has the items in the order they had then was not.
    """
    import datasets  # here: it takes a second, and no other task needs it
    try:
        table = datasets.load_dataset("hicai-zju/SciKnowEval", domain.capitalize(), split="test")
    except Exception as error:
        raise ValueError(f"sciknoweval/{domain} needs --data, a folder with {domain}/train.json and test.json (SDPO's "
                         f"repository has it as datasets/sciknoweval), or the Hub: {str(error).splitlines()[0]}") from error
    table = table.filter(lambda row: row["details"]["level"] == "L3" and row["type"] in ("mcq-4-choices", "mcq-2-choices"))
    parts = table.add_column("idx", list(range(len(table)))).train_test_split(test_size=0.1, seed=42)

    def problem(row):
        options = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
        prompt = f"{row['question']}\n\n" + "\n".join(f"{label}: {text}" for label, text in options) + REASON
        return Problem(str(row["idx"]), prompt, row["answerKey"], "choice", HUB_SYSTEM)

    return [[problem(row) for row in parts[split]] for split in ("train", "test")]


def defects(train, test) -> list[list[str]]:
    """For train and for test: what is known to be wrong with each item of SciKnowEval, or "", found in the items alone."""
    def parts(p):
        stem, *options = re.split(r"^[A-Z]: ", p.prompt.removesuffix(REASON), flags=re.MULTILINE)
        return re.sub(r"\d+(\.\d+)?", "#", stem.strip()), [option.strip() for option in options]

    def defect(p, prompts, stems):
        stem, options = parts(p)
        noisy = re.search("(?i)val[ae]nce.(comp|elec)", p.prompt)
        return ("noisy subtask: valence electrons (many keys don't fit the numbers given)" if noisy else
                "repeated options" if len(set(options)) < len(options) else
                "leaked: the very item is in train" if p.prompt in prompts else
                "near-duplicate: a stem of train, with other numbers or options" if stem in stems else "")

    prompts, stems = {p.prompt for p in train}, {parts(p)[0] for p in train}
    return [[defect(p, (), ()) for p in train], [defect(p, prompts, stems) for p in test]]


def sciknoweval(name, data, exclude_flagged):
    """(name, train, test, card) of a domain, from SDPO's files in the folder `data` or from the Hub."""
    domain = name.partition("/")[2]
    if domain not in SCIKNOWEVAL:
        raise ValueError(f"sciknoweval has no domain {domain!r}; it has {', '.join(SCIKNOWEVAL)}")
    folder = Path(data) / domain
    if data and not folder.is_dir():
        raise ValueError(f"{name} needs --data, a folder with {domain}/train.json and test.json; {folder} is none")
    splits = sciknoweval_from_hub(domain) if not data else [
        read_problems(folder / f"{split}.json", from_sciknoweval, table_rows) for split in ("train", "test")]
    if (sizes := tuple(map(len, splits))) != SCIKNOWEVAL[domain]:
        raise ValueError(f"{name} has {sizes[0]} train and {sizes[1]} test items, but {SCIKNOWEVAL[domain][0]} and "
                         f"{SCIKNOWEVAL[domain][1]} were published; for items of your own, give --task a folder")
    found = defects(*splits)
    lines = [f"{name}: {sizes[0]} train and {sizes[1]} test items of HICAI-ZJU/SciKnowEval (L3), as split by SDPO"]
    for split, flags in zip(("train", "test"), found, strict=True):
        lines += [f"  {split}: {n} {kind}" for kind, n in sorted(Counter(filter(None, flags)).items())]
    lines += [f"  flagged items are {'excluded' if exclude_flagged else 'used; --exclude_flagged leaves them out'}"]
    if exclude_flagged:
        splits = [[p for p, flag in zip(split, flags, strict=True) if not flag]
                  for split, flags in zip(splits, found, strict=True)]
        name = f"{name} (without flagged items, {len(splits[1])} test problems)"
    return name, *splits, "\n".join(lines)


def json_lines(path, cut=False):
    """Yields (number, object) of a JSON-lines file. ValueError, with file and line, for a line that is none.

    cut: a last line without its end was cut by a kill, and is left out.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    for n, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1 if cut else None], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or too deep
            raise ValueError(f"{path}, line {n} is not JSON: {str(error).replace('line 1 ', '')}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {n} is not a JSON object")
        yield n, row


def load_table(path):
    """The rows of a file (JSON lines, or Parquet by its ending) by `datasets`, which caches it and shows progress."""
    import datasets  # here: it takes a second, and nano does without
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it can't read is said by the callers, in one sentence
    return datasets.load_dataset("parquet" if path.suffix == ".parquet" else "json", data_files=str(path), split="train")


def table_rows(path):
    """Yields (number of its line or row, object) of a published file, JSON lines or Parquet, through `datasets`.

    ValueError with the file, and the line where it is JSON, for what is no table.
    """
    path = Path(path)
    parquet = path.suffix == ".parquet"
    try:
        table = load_table(path)
        with open(path, "rb") as file:
            numbers = range(1, len(table) + 1) if parquet else [n for n, line in enumerate(file, 1) if line.strip()]
        if len(numbers) != len(table):  # an array, or an object on several lines: `datasets` takes them
            raise ValueError(f"{len(table)} objects on {len(numbers)} lines, where each has to have one")
        yield from zip(numbers, table, strict=True)
    except Exception as error:  # of pyarrow, of datasets, of the file system
        if not parquet and not sum(1 for _ in json_lines(path)):  # names the line, which they do not
            raise ValueError(f"{path} holds no problem") from error
        said = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path} can't be read as {'Parquet' if parquet else 'JSON lines'}: {said}") from error


def numbered_rows(path):
    """Yields (number, object) of a JSON-lines file, or of the Parquet file of that name where only that is there.

    JSON not through `datasets`, which makes dates of texts that look like one, gives each row the keys of all, and names no
    line; and nano would pay a second for its import.
    """
    parquet = Path(path).with_suffix(".parquet")
    if Path(path).is_file() or not parquet.is_file():
        yield from json_lines(path)
        return
    for n, row in table_rows(parquet):
        yield n, {key: value for key, value in row.items() if value is not None}  # a column that this row does not have


def call_tests(tests, name):
    """ValueError where a function can't be called on these tests: all values must be JSON, and its name a text."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"the function's name {name!r} must be a text")
    for n, (given, wanted) in enumerate(zip(tests["inputs"], tests["outputs"], strict=True), 1):
        try:
            for line in [*filter(str.strip, given.split("\n")), wanted]:
                json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"test {n} of {name} is not JSON, line by line: {error}") from error


def read_problems(path, convert=dict, rows=numbered_rows) -> list[Problem]:
    """The problems of a file's `rows`, each through `convert`. ValueError, with file and line, for what is not one."""
    if not Path(path).is_file() and not Path(path).with_suffix(".parquet").is_file():
        raise ValueError(f"{path} does not exist; a task is a folder with a file for train and one for test")
    problems, seen = [], {}
    for n, row in rows(path):
        try:
            row = convert(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}") from error
        if row.get("verifier") == "code":
            row.setdefault("answer", "its tests")
            texts = (row.get("inputs"), row.get("outputs"))
            if not all(isinstance(t, list) and t and all(isinstance(x, str) for x in t) for t in texts) \
                    or len(texts[0]) != len(texts[1]):
                raise ValueError(f"{path}, line {n}: code needs inputs and outputs, two lists of texts of one length")
            try:
                row.get("fn_name") is None or call_tests(row, row["fn_name"])
            except ValueError as error:
                raise ValueError(f"{path}, line {n}: {error}") from error
        row.setdefault("system", "")
        bad = [k for k in ("id", "prompt", "answer", "verifier") if not isinstance(row.get(k), str) or not row[k]]
        if bad := bad + ["system"] * (not isinstance(row["system"], str)):
            raise ValueError(f"{path}, line {n}: {' and '.join(bad)} must be given, as text")
        if row["verifier"] not in VERIFIERS:
            raise ValueError(f"{path}, line {n}: no verifier {row['verifier']!r}; there are {', '.join(VERIFIERS)}")
        if row["verifier"] == "last_number" and not re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]):
            raise ValueError(f"{path}, line {n}: the answer {row['answer']!r} is no number, as last_number wants it")
        if row["id"] in seen:
            raise ValueError(f"{path}, line {n} repeats the id {row['id']!r} of line {seen[row['id']]}")
        seen[row["id"]] = n
        known = {k: row.pop(k) for k in ("id", "prompt", "answer", "verifier", "system")}
        problems.append(Problem(**known, extra=row))
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return problems


# LiveCodeBench. Three protocols; in all of them a program is right when it passes every test that is asked of it.
#
#             training problems                           evaluation problems           asks for          which block
#   sdpo      the window, half of the hidden tests        the window, all hidden tests  a bare function   the longest
#   older     dated before the window, all hidden tests   the window, all hidden tests  a bare function   the longest
#   official  the window, public tests only (ours)        the window, public + hidden   class Solution    the last
#
# The prompts have the published form in our own words (a deviation).

SDPO_PROMPT = """You write programs for programming contests. Think about the problem, then give the complete Python \
code in a code block enclosed with ``` ```. The time limit is 1 second.

{content}"""
SIGNATURE = """

Your solution should have the following signature:
```python
{signature}
```"""
OFFICIAL_SYSTEM = "You are an expert in Python. Write a correct program for the question, one that passes all of its tests."
OFFICIAL_PROMPT = """### Question:
{content}

### Format: {form}
```python
{starter}
```

### Answer: (in the format above, with backticks)

"""


class Strings(pickle.Unpickler):
    """Downloaded pickles may hold a string. They may not name a class or function, which is how pickles run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def decode_tests(text) -> list[dict]:
    """The tests of a row: JSON, or JSON pickled as a string, compressed and written in base64. ValueError if neither."""
    try:
        if not text.startswith("["):
            text = Strings(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load()
        tests = json.loads(text)
        return [{"input": str(t["input"]), "output": str(t["output"])} for t in tests]
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(f"its tests can't be decoded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def read_livecodebench(data):
    """Yields (where, row) of the official files: a JSON-lines file, a folder of them, or the Hub's where data is empty."""
    if not data:  # not run: the parquet branch, since the Hub runs no loading scripts any more
        import datasets
        name = "livecodebench/code_generation_lite"
        table = datasets.load_dataset(name, revision="refs/pr/6", split="test")
        yield from ((f"{name}, row {n}", row) for n, row in enumerate(table, 1))
        return
    files = sorted(f for f in Path(data).glob("*.*") if f.suffix in (".jsonl", ".parquet")) if Path(data).is_dir() \
        else [Path(data)]
    if not files or not files[0].is_file():
        raise ValueError(f"livecodebench needs --data, a JSON-lines or Parquet file in the official schema or a folder of "
                         f"such; {data} is none")
    for path in files:
        yield from ((f"{path}, line {n}", row) for n, row in table_rows(path))


def code_problem(tests, id, prompt, system, **extra) -> Problem:
    return Problem(id, prompt, "its tests", "code", system, {
        "inputs": [t["input"] for t in tests], "outputs": [t["output"] for t in tests], **extra})


def livecodebench(data, protocol, since, until):
    """(name, train, test): the contests of since <= date < until (YYYY-MM-DD), under a protocol of the table above.

    The name says protocol, window and number of problems, for reports. SDPO's half of the tests is drawn with seed 0 in the
    order of the file, as its description has it; its script was not at hand to compare.
    """
    if protocol not in ("sdpo", "older", "official"):
        raise ValueError(f"livecodebench has no protocol {protocol!r}; it has sdpo, older and official")
    try:
        since, until = (str(date.fromisoformat(day)) for day in (since, until))
    except ValueError as error:
        raise ValueError(f"the window is given in days like {WINDOW[0]}, not as {since} to {until}: {error}") from error
    train, test, days, seen, rng = [], [], [], {}, np.random.RandomState(0)
    for where, row in read_livecodebench(data):
        if isinstance(row.get("contest_date"), datetime):  # `datasets` knows a time when it sees one
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
                raise ValueError(f"its contest_date {row['contest_date']!r} is no day like {WINDOW[0]}")
            days.append(day)
            if day >= until or day < since and protocol != "older":
                continue
            public, hidden = decode_tests(row["public_test_cases"]), decode_tests(row["private_test_cases"])
            if not isinstance(metadata := json.loads(row["metadata"]), dict):
                raise ValueError("its metadata is no JSON object")
            if not hidden:
                raise ValueError("it has no hidden tests")
            if (name := metadata.get("func_name")) is not None:
                call_tests(code_problem(public + hidden, "", "", "").extra, name)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        content, starter, system, block = row["question_content"], row["starter_code"], "", "longest"
        if protocol == "official":
            form = "Fill in this class." if name else "Read the input from stdin and print the answer to stdout."
            prompt = OFFICIAL_PROMPT.format(content=content, form=form, starter=starter or "# YOUR CODE HERE")
            system, block = OFFICIAL_SYSTEM, "last"
        else:
            signature = re.sub(r"\(self,?\s*", "(", "".join(line.strip() for line in starter.split("\n") if "def " in line))
            prompt = SDPO_PROMPT.format(content=content) + (SIGNATURE.format(signature=signature) if name else "")

        known = {"id": row["question_id"], "prompt": prompt, "system": system, "fn_name": name, "block": block, "date": day}
        if day < since:
            train.append(code_problem(hidden, feedback=True, **known))
            continue
        test.append(code_problem(public + hidden if protocol == "official" else hidden, feedback=False, **known))
        if protocol == "sdpo":
            half = sorted(rng.choice(len(hidden), max(1, len(hidden) // 2), replace=False))
            train.append(code_problem([hidden[i] for i in half], feedback=True, **known))
        elif protocol == "official":
            train.append(code_problem(public, feedback=True, **known))
    if not test or not train:
        raise ValueError(f"{data or 'the Hub'} has contests of {min(days)} to {max(days)}: none to "
                         f"{'train on' if test else 'evaluate'} with protocol {protocol}, since {since}, until {until}")
    expected = " of 131" if (since, until) == WINDOW and len(test) != 131 else ""
    return f"livecodebench ({protocol}, {since} to {until}, {len(test)}{expected} problems)", train, test


def load_task(name, dev=0.1, seed=42, data="", protocol="sdpo", since=WINDOW[0], until=WINDOW[1],
              exclude_flagged=False) -> Task:
    """The task `nano`, `nano/SEED`, `sciknoweval/DOMAIN`, `livecodebench` or a folder's path.

    data: for sciknoweval, the folder that holds DOMAIN/train.json and test.json as SDPO publishes them; for livecodebench,
    the official file or a folder of such; empty for the Hub. protocol, since, until: of livecodebench. exclude_flagged: of
    sciknoweval, leaves out what `defects` finds. dev: the share of the training split that is held out, by `seed`, to
    select checkpoints on (the default seed is that of SDPO's own splits). Raises ValueError in one sentence for a task or
    file that can't be used.
    """
    if not 0 <= dev < 1:
        raise ValueError(f"dev={dev} is not a share of the training split: it must be at least 0 and below 1")
    if name != "livecodebench" and (protocol, since, until) != ("sdpo", *WINDOW):
        raise ValueError(f"--protocol, --since and --until are for livecodebench, not for {name}")
    if exclude_flagged and not name.startswith("sciknoweval/"):
        raise ValueError(f"--exclude_flagged is for sciknoweval: nothing is flagged in {name}")
    card = ""
    if name == "livecodebench":
        name, train, test = livecodebench(data, protocol, since, until)
    elif name.startswith("sciknoweval/"):
        name, train, test, card = sciknoweval(name, data, exclude_flagged)
    else:
        train, test = (read_problems(task_folder(name) / f"{split}.jsonl") for split in ("train", "test"))
    held = set(random.Random(seed).sample(range(len(train)), round(dev * len(train))))
    return Task(name, [p for i, p in enumerate(train) if i not in held], [train[i] for i in sorted(held)], test, card)


def task_folder(name) -> Path:
    """The folder of a task's files: nano/worlds/SEED for nano/SEED, nano/worlds/plain/SEED for nano/plain/SEED."""
    if name == "nano" or name.startswith("nano/"):
        _, *kind = name.split("/")
        plain = kind[:1] == ["plain"]
        seed = "/".join(kind[plain:]) or "0"
        folder = NANO / "worlds" / ("plain" if plain else "") / seed
        if not (folder / "train.jsonl").is_file():
            raise ValueError(f"there is no task {name!r}: make it with `python nano/make.py world --seed {seed}"
                             f"{' --plain' * plain}`")
        return folder
    if not Path(name).is_dir():
        raise ValueError(f"there is no task {name!r}: give nano, nano/plain, nano/SEED, nano/plain/SEED, "
                         "sciknoweval/DOMAIN, livecodebench or a folder with train.jsonl and test.jsonl")
    return Path(name)


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Verdict:
    """reward: 1.0 or 0.0. answer: what the estimators vote on. feedback: text for the teacher, empty where there is none.

    For programs, test_pass_rate is the share of tests passed (never the reward) and status that of Judgement, or no_code.
    """

    reward: float
    answer: str
    feedback: str = ""
    test_pass_rate: float | None = None
    status: str = ""


def verify_steps(problem, completion) -> Verdict:
    """nano: word by word equal to the answer, in which `vo=*` stands for any operation named for vo. A confidence at the end
    (`Confidence: 0.50`) is no part of it.

    In a world that speaks (`feedback: true`) the verdict on a failure says which step was the first wrong one, by the
    operation that was named there: `vo!rev`. Nothing where no operation is to blame: the right one was miscalculated, or
    the completion lost the form of an answer.
    """
    words, wanted = re.sub(r"\s+Confidence: \d\.\d\d\s*\Z", "", completion).split(), problem.answer.split()
    fits = [w == a or a.endswith("=*") and w.startswith(a[:-1]) for w, a in zip(words, wanted, strict=False)]
    right = len(words) == len(wanted) and all(fits)
    feedback = "" if right or not problem.extra.get("feedback") else first_wrong_step(problem, words, fits)
    return Verdict(float(right), " ".join(w for w in words if "=" not in w), feedback)


def first_wrong_step(problem, words, fits) -> str:
    """`vo!rev` where the digits after vo=rev are the first words that miss the answer, and vo hides another; else ""."""
    first = fits.index(False) if False in fits else len(fits)
    steps = [word for word in words[:first] if "=" in word]
    if first == len(fits) or not words[first].isdigit() or not steps:
        return ""
    syllable, _, operation = steps[-1].partition("=")
    if not re.fullmatch("[a-z]+", operation) or steps[-1] in problem.extra.get("hidden", "").split():
        return ""
    return f"{syllable}!{operation}"


def verify_choice(problem, completion) -> Verdict:
    """Multiple choice, SDPO's rule to the letter: what stands after the last <answer>, up to </answer>, is the key.

    Exact and case-sensitive. A bare `B` and an unclosed `<answer>B` pass, `b`, `B.` and `(B)` do not.
    """
    answer = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    return Verdict(float(answer == problem.answer), answer)


# A letter that is said to be the answer: clearly, unless there is a first or a last group. Gaps are bounded, for speed.
STATED = re.compile(
    r"(\bor\W{1,9})?\b(?:(?i:answer|option|choice|boxed)(?i: is)?\W{1,9}(?i:option\W{1,3})?([A-Z]\b|[a-z]\b(?=\W*$|[).,;:]))"
    r"|([A-Z]) is (?:the|my) (?:\w{1,9} )?(?:answer|option|choice)\b)"
    r"(?=(\W{1,3}(?:or|and|isn.t|is (?:not|wrong|incorrect|false))\b)?)")


def verify_choice_lenient(problem, completion) -> Verdict:
    """Multiple choice as a person would read it (`b`, `(B)`, `**B**`, `\\boxed{B}`, `B: 1.4`): ours, reported apart.

    The last clear statement wins (`B is the answer`), else a letter alone, else one that the text starts with (`B, since`).
    """
    said = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    plain = " ".join(re.sub(r"\\(?:text|math)\w*|[*$`{\\]", " ", said).replace("}", ")").split())
    letters = [a or b for before, a, b, after in STATED.findall(plain) if not before and not after]
    start = r"\W*([A-Za-z])(?:\W*$| ?[).:](?! or\b| and\b)|,(?! (?:or |and )?[A-Z]\b)| [-–—] )"
    if letters := letters or re.findall(rf"\A{start}", plain):
        said = letters[-1].upper()
    return Verdict(float(said == problem.answer), said)


def verify_last_number(problem, completion) -> Verdict:
    """The last number of the text equals the answer, as numbers: for sums, and for tasks of your own."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", completion)
    return Verdict(float(bool(numbers) and float(numbers[-1]) == float(problem.answer)), numbers[-1] if numbers else "")


@dataclass(frozen=True)
class Judgement:
    """Of a program. status: passed, or the worst that happened: runtime_error, time_limit, wrong_answer, in this order."""

    passed: bool
    status: str
    n_passed: int
    feedback: str


def same_text(output, expected) -> bool:
    """The official rule for stdout: line by line, ends stripped, equal as texts or token by token as decimal numbers."""
    output, expected = output.strip(), expected.strip()
    return output.count("\n") == expected.count("\n") and all(a.strip() == b.strip() or same_numbers(a, b) for a, b in zip(
        output.split("\n"), expected.split("\n"), strict=True))


def same_numbers(ours, theirs) -> bool:
    theirs = theirs.split()
    ours = ours.split(None, len(theirs))  # no further than one too many
    try:
        return len(ours) == len(theirs) and all(Decimal(a) == Decimal(b) for a, b in zip(ours, theirs, strict=True))
    except InvalidOperation:  # no number, or a signalling NaN
        return False


def same_value(output, expected) -> bool:
    """The official rule for return values: equal as JSON values. Tuples are lists, True is 1 and 2.0 is 2.

    Of equal values one text may be longer, by \\u escapes twelve times; what is far beyond that is not parsed at all.
    """
    try:
        return output.strip() == expected.strip() or \
            len(output) <= 12 * len(expected) + 1000 and json.loads(output) == json.loads(expected)
    except (ValueError, RecursionError):  # thousands of digits or of brackets
        return False


def judge(code, inputs, outputs, fn_name=None, time_limit=6.0, memory_mb=1024) -> Judgement:
    """Runs a program on each input, in a sandbox, and compares here what it gives with the outputs, which stay here.

    inputs, outputs: as many texts each. fn_name: None for a program that reads stdin and prints; else a function, or a
    method of Solution, that gets the JSON values on the lines of the input and returns what the output says in JSON.
    time_limit: CPU seconds a test. memory_mb: MiB. The first test that runs out of time is the last one run; those after it
    count as failed (ours: SDPO runs them all at once). ValueError where there is no sandbox.
    """
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs: judge needs as many of both, and at least one")
    same, failures, n_passed = same_value if fn_name else same_text, [], 0
    for n, outcome in enumerate(execute(code, inputs, fn_name, time_limit, memory_mb)):
        output, status = outcome.output.decode(errors="replace"), outcome.status
        if status == "ran" and same(output, outputs[n]):
            n_passed += 1
        else:
            failures.append((n, "wrong_answer" if status == "ran" else status, output[:2000], outcome.error))
    passed = n_passed == len(inputs)
    if not passed and not failures:
        failures = [(n_passed, "runtime_error", "", "The program ended its sandbox.")]
    kinds = [kind for _, kind, _, _ in failures]
    status = "passed" if passed else next(k for k in ("runtime_error", "time_limit", "wrong_answer") if k in kinds)
    return Judgement(passed, status, n_passed, explain(failures, status, inputs, outputs))


def clip(text, lines=None) -> str:
    """The first lines of a text, or all, of 250 characters each (of all together, where lines is not given)."""
    parts = text.strip().split("\n") if lines else [text.strip()]
    cut = [part if len(part) <= 250 else part[:250] + "..." for part in parts[:lines]]
    return "\n".join(cut + ["..."] * (lines is not None and len(parts) > lines))


def explain(failures, status, inputs, outputs) -> str:
    """SDPO's feedback: the first error or timeout, else the one or two wrong answers with the shortest input and output.

    At most 2000 characters, cut so that the expected output is never what is lost. Nothing that passed is shown.
    failures: (test, kind, output, error).
    """
    if status in ("runtime_error", "time_limit"):
        n, _, _, error = next(f for f in failures if f[1] == status)
        head = f"Runtime Error\n{error.strip()}" if status == "runtime_error" else "Time Limit Exceeded"
        return f"{head[:1000]}\n\nLast Executed Input\n{clip(inputs[n], 8)[:900]}"
    wrong = sorted(failures, key=lambda f: len(inputs[f[0]]) + len(f[2]))[:2]
    return "\n\n".join(f"Test Case {n + 1}: Wrong Answer\n\nInput\n{clip(inputs[n], 8)[:400]}\n\nOutput\n{clip(output)}\n\n"
                       f"Expected\n{clip(outputs[n])}" for n, _, output, _ in wrong)


def extract_code(completion, block="longest") -> str:
    """SDPO's longest closed code block, or, officially, what is between the last two lines with a fence. "" if none."""
    if block == "longest":
        return max(re.findall(r"```\w*\n(.*?)```", completion, re.DOTALL), key=len, default="")
    lines = completion.split("\n")
    fences = [n for n, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1:fences[-1]]) if len(fences) > 1 else ""


def verify_code(problem, completion) -> Verdict:
    """A program that passes every test in problem.extra; feedback only where that holds no `feedback: false`."""
    tests, code = problem.extra, extract_code(completion, problem.extra.get("block", "longest"))
    if code.strip():
        found = judge(code, tests["inputs"], tests["outputs"], tests.get("fn_name"))
    else:
        found = Judgement(False, "no_code", 0, "Truncated Attempt\nThe code block has no end." if completion.count("```") % 2
                          else "Incorrect Format\nThere is no code block: put the code between ```python and ```.")
    feedback = found.feedback if tests.get("feedback", True) else ""
    return Verdict(float(found.passed), code, feedback, found.n_passed / len(tests["inputs"]), found.status)


VERIFIERS = {"steps": verify_steps, "choice": verify_choice, "last_number": verify_last_number, "code": verify_code}


def verify(problem, completion, lenient=False) -> Verdict:
    """The verdict on one completion (text): a pure function of both. lenient concerns multiple choice alone."""
    if lenient and problem.verifier == "choice":
        return verify_choice_lenient(problem, completion)
    return VERIFIERS[problem.verifier](problem, completion)


def verify_all(problems, completions, lenient=False) -> list[Verdict]:
    """verify on each pair, in order; programs run side by side, as many as there are cores."""
    if not any(p.verifier == "code" for p in problems):
        return [verify(p, text, lenient) for p, text in zip(problems, completions, strict=True)]
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(verify, problems, completions))


def need_sandbox(task, unsafe_exec=False):
    """ValueError, in one sentence, where a task's answers are programs and there is no sandbox to run them in."""
    if any(p.verifier == "code" for p in task.test):
        allow_unsafe_exec() if unsafe_exec else sandbox_command()


# ---------------------------------------------------------------------------------------------------------------------
# Estimators. rewards: (problems, k) of 0 and 1.
# ---------------------------------------------------------------------------------------------------------------------

def avg_at_k(rewards) -> float:
    """The mean reward over all problems and samples (the paper's avg@16)."""
    return float(np.mean(rewards))


def best_at_k(rewards, k=None) -> float:
    """The unbiased pass@k: over problems, the mean of 1 - C(n-c, k) / C(n, k), c of n samples being right."""
    rewards = np.asarray(rewards)
    n = rewards.shape[1]
    k = n if k is None else k
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in rewards.sum(1)]))


def majority(rewards, answers) -> np.ndarray:
    """(problems,) whether the most frequent answer is right, a tie counting in expectation. answers: (problems, k)."""
    scores = []
    for row, said in zip(rewards, answers, strict=True):
        votes = Counter(said)
        top = [a for a, n in votes.items() if n == max(votes.values())]
        right = {a for a, r in zip(said, row, strict=True) if r}
        scores.append(sum(a in right for a in top) / len(top))
    return np.array(scores)


def maj_at_k(rewards, answers) -> float:
    """The share of problems whose most frequent answer is right."""
    return float(majority(rewards, answers).mean())


def headroom(rewards, answers) -> np.ndarray:
    """(problems,) what a perfect choice among the k samples would add to their majority: best@k - maj@k (Fig. 3)."""
    return np.asarray(rewards).max(1) - majority(rewards, answers)


def coverage(solved) -> dict:
    """{name: (solved, solved by no other)}, two masks of the problems that all were asked (Fig. 4).

    solved: {name: {problem: whether at least one of k samples is right}}.
    """
    asked = [p for p in next(iter(solved.values()), ()) if all(p in of for of in solved.values())]
    table = np.array([[bool(of[p]) for p in asked] for of in solved.values()])  # (methods, problems)
    return {name: (row, row & (table.sum(0) == 1)) for name, row in zip(solved, table, strict=True)}


def resample(scores, groups=None, seed=0, draws=10_000) -> np.ndarray:
    """(draws,) means of scores (problems,) or (runs, problems), with problems, and runs too, drawn with replacement.

    groups: (problems,) names; problems that share one are drawn together. How often each is drawn is multinomial.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=float))
    _, index = np.unique(np.arange(scores.shape[1]) if groups is None else groups, return_inverse=True)
    sums, counts = np.stack([np.bincount(index, row) for row in scores]), np.bincount(index)  # (runs, groups), (groups,)
    rng, (runs, n) = np.random.default_rng(seed), sums.shape
    drawn = rng.multinomial(n, np.full(n, 1 / n), draws)  # (draws, groups)
    mean = rng.multinomial(runs, np.full(runs, 1 / runs), draws) @ sums / runs  # (draws, groups)
    return (drawn * mean).sum(1) / (drawn @ counts)


def interval(scores, groups=None, seed=0, draws=10_000) -> tuple[float, float] | None:
    """The 95% percentile-bootstrap interval of a mean: see resample. Of one run it speaks of other test problems, not of
    other training seeds; of several, of both, though a handful of seeds makes it too narrow.

    None for fewer than two problems or groups, which say nothing about others.
    """
    if len(set(range(np.shape(scores)[-1]) if groups is None else groups)) < 2:
        return None
    low, high = np.percentile(resample(scores, groups, seed, draws), [2.5, 97.5])
    return float(low), float(high)


def names(task, ids):
    """The groups that problems are drawn in: nano asks of each name several times; elsewhere each stands alone."""
    return [i.rpartition("-")[0] if task.partition("/")[0] == "nano" else i for i in ids]


def answer_rows(problems, samples, verdicts):
    """The lines of evals/STEP-SPLIT.jsonl: k samples of each problem and their verdicts, both in order of the problems."""
    k = len(verdicts) // len(problems)
    for i, (s, v) in enumerate(zip((s for group in samples for s in group), verdicts, strict=True)):
        rate = {} if v.test_pass_rate is None else {"test_pass_rate": v.test_pass_rate, "status": v.status}
        yield {"problem": problems[i // k].id, "sample": i % k, "answer": v.answer, "reward": v.reward, **rate,
               "tokens": len(s.ids), "text": s.text}


class Answers(NamedTuple):
    """What was answered to P problems, k times each: ids (P,), rewards, answers and tokens (P, k)."""

    ids: list
    rewards: np.ndarray
    answers: list
    tokens: np.ndarray

    @classmethod
    def of(cls, rows, path=""):
        """Of the rows of a file, which a ValueError names if it was cut: then its last problem has fewer samples."""
        groups = {}
        for row in rows:
            groups.setdefault(row["problem"], []).append(row)
        if len(sizes := sorted(set(map(len, groups.values())))) != 1:
            raise ValueError(f"{path} is not whole: its problems have {' or '.join(map(str, sizes)) or 'no'} samples each")
        table = {key: [[row[key] for row in group] for group in groups.values()] for key in ("reward", "answer", "tokens")}
        return cls(list(groups), np.array(table["reward"]), table["answer"], np.array(table["tokens"]))

    def estimates(self, task) -> dict:
        """What a line of metrics.jsonl says of them."""
        return {"avg_at_k": avg_at_k(self.rewards), "k": self.rewards.shape[1], "n_problems": len(self.ids),
                "interval": interval(self.rewards.mean(1), names(task, self.ids)), "best_at_k": best_at_k(self.rewards),
                "maj_at_k": maj_at_k(self.rewards, self.answers),
                "headroom": float(headroom(self.rewards, self.answers).mean()), "tokens": float(self.tokens.mean())}


# ---------------------------------------------------------------------------------------------------------------------
# The command line. It alone knows of the sampler, of the memory and of reports, and imports them when it runs.
# ---------------------------------------------------------------------------------------------------------------------

def evaluate(argv):
    """Answers the test problems of a task, n times each, into OUT/NAME/evals/0-test.jsonl; goes on where it stopped.

    On several ranks each answers and judges its share. Rank 0 alone reads, writes and speaks.
    """
    import pmd
    import records
    from memory import Memory
    from report import evaluated

    parser = argparse.ArgumentParser(
        prog="python eval.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False,
        epilog="--task, --data, --n, --temperature, --top_p, --retrieve_k, --tiers, --embedder, --seed, --max_completion,\n"
               "--batch_size (problems between two writes), --nproc, --out, --name and all others are those of pmd.py.")
    parser.add_argument("--model", required=True, help="a Hugging Face folder, such as RUN/final, or a Hub name")
    parser.add_argument("--memory", default="", help="a run's memory.db, for the prompt: the insight and the latest\n"
                        "success of the nearest training problem, and the --retrieve_k\nnearest behaviors [Tab. 4, Fig. 2]")
    args, rest = parser.parse_known_args(argv)
    cfg = pmd.parse_flags(["--model", args.model, *rest])
    pmd.transformers_logging.set_verbosity_error()
    pmd.transformers_logging.disable_progress_bar()
    ranks = pmd.count_ranks(cfg)
    with pmd.ranks_around(cfg):
        task, tokenizer = pmd.check(replace(cfg, method="eval", batch_size=ranks, name="", resume=False), ranks=ranks,
                                    quiet=pmd.rank() > 0 or pmd.world() < ranks,
                                    reads=cfg.max_reprompt if args.memory else 0)
    first = pmd.rank() == 0
    parts = ["eval", cfg.task, *Path(cfg.model).parts[-2:], *Path(args.memory).parts[-2:-1]]
    cfg = replace(cfg, method="eval", memory_from=args.memory, name=cfg.name or "-".join(parts).replace("/", "-"))
    folder, problems = Path(cfg.out) / cfg.name, task.test
    path, rows, memory = folder / "evals" / "0-test.jsonl", [], None
    if 0 < cfg.eval_problems < len(problems):
        problems = random.Random("evaluate").sample(problems, cfg.eval_problems)
    if first:
        if (folder / "config.json").exists():
            records.refuse_changes(json.loads((folder / "config.json").read_text()), cfg)
        if args.memory:
            memory = Memory(args.memory, pmd.make_embedder(cfg), None, embedder=cfg.embedder, mode="frozen",
                            retrieve_k=cfg.retrieve_k)
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write(folder / "config.json", json.dumps(asdict(cfg), indent=1))
        rows = records.read_lines(path) if path.exists() else []
        answered = Counter(row["problem"] for row in rows)
        rows = [row for row in rows if answered[row["problem"]] == cfg.eval_k]  # a stop may have come within a problem
        records.write_lines(path, rows)
    whole = pmd.broadcast({row["problem"] for row in rows})
    if first:
        print(task.card, end="\n" if task.card else "")
        print(f"{task.name} with {cfg.model}: {len(problems)} problems, {len(whole)} of them done before; {path}")
    todo = [p for p in problems if p.id not in whole]
    if todo:
        sampler = pmd.make_sampler(pmd.shard(pmd.load_policy(cfg), cfg), tokenizer, cfg)
        sampler.wake()
    with tqdm(total=len(problems), initial=len(whole), unit="problem", disable=not first or None, dynamic_ncols=True) as bar:
        for i in range(0, len(todo), cfg.batch_size):
            batch, texts = todo[i: i + cfg.batch_size], None
            if memory:
                contexts = memory.inference_contexts(batch, cfg.tiers.split(","), cfg.inference_retrieval)
                texts = [pmd.reprompt(p, c, tokenizer, cfg) for p, c in zip(batch, contexts, strict=True)]
            samples = sampler.answer(batch, cfg.eval_k, "test", cfg.eval_temperature, cfg.eval_top_p, pmd.broadcast(texts))
            judged = pmd.verdicts(batch, samples, cfg)
            if first:
                new = list(answer_rows(batch, samples, [v for _, _, v in judged]))
                for row in new:
                    records.append(path, row)
                rows += new
            bar.update(len(batch))
    if first:
        found = {"step": 0, "split": "test", "mcq": cfg.mcq, **Answers.of(rows).estimates(cfg.task)}
        records.write_lines(folder / "metrics.jsonl", [found])
        print(evaluated(task.name, found))
    pmd.end_ranks()


def main(argv=None):
    from report import compare, figures
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] in (["compare"], ["figures"]):
            parser = argparse.ArgumentParser(prog=f"python eval.py {argv[0]}")
            parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or that of an evaluation")
            parser.add_argument("--out", default="figures", help="for figures: the folder of pictures and data")
            args = parser.parse_args(argv[1:])
            print(compare(args.runs) if argv[0] == "compare" else figures(args.runs, args.out))
        else:
            evaluate(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
