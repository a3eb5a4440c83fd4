"""Tasks, verdicts and estimators: what a problem is, when an answer is right, what a set of answers is worth.

    python eval.py --model DIR_OR_NAME --task T --n 16     answers a task's test problems, with a memory or without
    python eval.py compare RUN RUN ...                     the paper's Tables 2, 3, 4, 5 and 7 for these runs
    python eval.py figures RUN RUN ...                     its Figures 2 to 6, with their data

    load_task(name)               -> Task(train, dev, test), from JSON-lines files
    verify(problem, completion)   -> Verdict(reward, feedback): one function for training and evaluation alike
    judge(code, inputs, outputs)  -> Judgement(passed, status, n_passed, feedback), of a program; sandbox.py runs it
    avg_at_k, maj_at_k, best_at_k -> estimators over k samples a problem; `interval`, a bootstrap over problems and runs

A task is a folder with `train.jsonl` and `test.jsonl`, one JSON object a line, or the same rows as `.parquet`:

    id        text, unique in its file
    prompt    the user message
    answer    what the verifier compares with (for `code`: instead of it, inputs, outputs and perhaps fn_name, see judge)
    verifier  a name in VERIFIERS
    system    the system message (optional)

What can't work is refused by line: a key that no reply can match, half a surrogate pair in any text. All other keys are
kept in `Problem.extra`, out of every prompt. `nano` is the embedded task, whose verifier says which step went wrong,
`nano/plain` the same with a silent one, `nano/7` and `nano/plain/7` other worlds (`python nano/make.py world --seed 7`),
`sciknoweval/chemistry` a domain of SciKnowEval in SDPO's files or from the Hub, `livecodebench` a window of LiveCodeBench in
its official files, a path any folder of yours.
"""

import argparse
import base64
import hashlib
import io
import json
import keyword
import pickle
import random
import re
import sys
import tempfile
import traceback
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal, Inexact, InvalidOperation, localcontext
from fractions import Fraction
from math import comb
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sandbox import CORES, DISK, allow_unsafe_exec, execute, sandbox_command

NANO = Path(__file__).resolve().parent / "nano"
SCIKNOWEVAL_HUB = "hicai-zju/SciKnowEval"
SCIKNOWEVAL = {"biology": (450, 50), "chemistry": (1890, 210), "material": (841, 94), "physics": (720, 80)}  # Tab. 10
SDPO_SPLITS = {"biology": "9349f38c83f7d86c", "chemistry": "e2254d6e32009a6f", "material": "2391f902dc62214b",
               "physics": "9e5f0145a7a5f98b"}  # see digest
LIVECODEBENCH_HUB = "hf://datasets/livecodebench/code_generation_lite"
LIVECODEBENCH_FILES = ("test.jsonl", *(f"test{n}.jsonl" for n in range(2, 7)))
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


def sciknoweval_from_hub(domain, source="") -> list[list[Problem]]:
    """Train and test of a domain, rebuilt as SDPO built its files: L3, multiple choice, 90/10 by `datasets` with seed 42.

    source: the Hub's name of the data set, or a folder in its layout: a card (README.md) that names the files, and those.
    As in SDPO's loader no configuration is named, since the card has one with all domains, v2. Not run on the Hub itself,
    which was out of reach; run on such a folder, with the card's front matter and the published columns.
    """
    import datasets  # here: it takes a second, and no other task needs it
    folder, source = source, str(source or SCIKNOWEVAL_HUB)
    try:
        with tempfile.TemporaryDirectory() as scratch:  # the cache takes two folders with one card for the same data
            cache = {"cache_dir": scratch, "keep_in_memory": True} if folder else {}
            table = datasets.load_dataset(source, split="test", **cache)
    except Exception as error:
        raise ValueError(f"sciknoweval/{domain} needs --data, a folder with {domain}/train.json and test.json (SDPO's "
                         f"repository has it as datasets/sciknoweval), or the Hub's {source}, which can't be loaded: "
                         f"{cause(error)}") from error
    if missing := {"question", "choices", "answerKey", "type", "domain", "details"} - set(table.column_names):
        raise ValueError(f"{source} has no column {', '.join(sorted(missing))}")

    def wanted(row):
        level = row["details"].get("level") if isinstance(row["details"], dict) else None
        return (str(row["domain"]).lower() in (domain, f"{domain}s") and level == "L3"
                and row["type"] in ("mcq-4-choices", "mcq-2-choices"))

    table = table.select([n for n, row in enumerate(table) if wanted(row)])
    if len(table) < 2:
        raise ValueError(f"{source} has {len(table)} multiple-choice items of level L3 in {domain}: too few for two splits")
    parts = table.add_column("idx", list(range(len(table)))).train_test_split(test_size=0.1, seed=42)

    def problem(row):
        try:
            prompt = f"{question_with_options(row)}{REASON}"
            return read_problem(from_sciknoweval(
                {"idx": row["idx"], "prompt": prompt, "answer": row["answerKey"], "system": HUB_SYSTEM}))
        except ValueError as error:
            raise ValueError(f"{source}, item {row['idx']} of {domain} (L3, multiple choice): {error}") from error

    return [[problem(row) for row in parts[split]] for split in ("train", "test")]


def question_with_options(row) -> str:
    """An item of the Hub's as SDPO writes it, `A: text` on a line. ValueError where it has no question or whole options."""
    choices = row["choices"] if isinstance(row["choices"], dict) else {}
    labels, texts = choices.get("label") or [], choices.get("text") or []
    if not row["question"] or not labels or len(labels) != len(texts) or None in (*labels, *texts):
        raise ValueError("it has to have a question, and choices with as many texts as labels")
    return f"{row['question']}\n\n" + "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))


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


def digest(splits) -> str:
    """Of the ids, prompts and answers of splits, in their order; the system messages may be in our words."""
    items = [[[p.id, p.prompt, p.answer] for p in split] for split in splits]
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def sciknoweval(name, data, exclude_flagged):
    """(name, train, test, card) of a domain, from SDPO's files in the folder `data` or from the Hub."""
    domain = name.partition("/")[2]
    if domain not in SCIKNOWEVAL:
        raise ValueError(f"sciknoweval has no domain {domain!r}; it has {', '.join(SCIKNOWEVAL)}")
    folder = Path(data) / domain
    if data and folder.is_dir():
        splits = [read_problems(folder / f"{split}.json", from_sciknoweval, table_rows) for split in ("train", "test")]
    elif not data or (Path(data) / "README.md").is_file():  # the Hub's, or a copy of its repository
        splits = sciknoweval_from_hub(domain, data)
    else:
        raise ValueError(f"{name} needs --data, a folder with {domain}/train.json and test.json; {folder} is none")
    if (sizes := tuple(map(len, splits))) != SCIKNOWEVAL[domain]:
        raise ValueError(f"{name} has {sizes[0]} train and {sizes[1]} test items, but {SCIKNOWEVAL[domain][0]} and "
                         f"{SCIKNOWEVAL[domain][1]} were published; for items of your own, give --task a folder")
    found = defects(*splits)
    lines = [f"{name}: {sizes[0]} train and {sizes[1]} test items of HICAI-ZJU/SciKnowEval (L3), as split by SDPO"]
    for split, flags in zip(("train", "test"), found, strict=True):
        lines += [f"  {split}: {n} {kind}" for kind, n in sorted(Counter(filter(None, flags)).items())]
    if digest(splits) != SDPO_SPLITS[domain]:
        lines += ["  NOT to the letter the items, or not in the splits, that SDPO and the paper used"]
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
    data = Path(path).read_bytes()
    if data.startswith((b"\x1f\x8b", b"PK\3\4")):
        raise ValueError(f"{path} is compressed; unpack it")
    if b"\0" in data[:4] and data[:4].strip(b"\0"):  # JSON begins with two characters of ASCII
        raise ValueError(f"{path} is not in UTF-8 but, it seems, in UTF-16 or UTF-32; save it as UTF-8")
    for n, line in enumerate(data.split(b"\n")[:-1 if cut else None], 1):
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


def cause(error) -> str:
    """What an error of a library says, or the one that caused it; where neither says a word, its name."""
    said = " ".join(str(error.__cause__ or error).split())
    return said or type(error.__cause__ or error).__name__


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
        if not parquet and not whole_lines(path):  # names the line, which they do not
            raise ValueError(f"{path} holds no problem") from error
        raise ValueError(f"{path} can't be read as {'Parquet' if parquet else 'JSON lines'}: {cause(error)}") from error


def whole_lines(path) -> int:
    """How many rows a JSON-lines file has. ValueError, with file and line, for one that is no JSON or can't be held."""
    rows = 0
    for n, row in json_lines(path):
        try:
            refuse_unholdable(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}") from error
        rows += 1
    return rows


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
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"no function can have the name {name!r}")
    for n, (given, wanted) in enumerate(zip(tests["inputs"], tests["outputs"], strict=True), 1):
        try:
            for line in [*filter(str.strip, given.split("\n")), wanted]:
                json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"test {n} of {name} is not JSON, line by line: {error}") from error


def code_tests(row):
    """ValueError where a row can't be verified by `code`: it has to have inputs and outputs that fit each other."""
    texts = (row.get("inputs"), row.get("outputs"))
    if not all(isinstance(t, list) and t and all(isinstance(x, str) for x in t) for t in texts) \
            or len(texts[0]) != len(texts[1]):
        raise ValueError("code needs inputs and outputs, two lists of texts of one length")
    if row.get("fn_name") is not None:
        call_tests(row, row["fn_name"])
    elif (largest := max(len(x.encode()) for x in texts[0])) > DISK:
        raise ValueError(f"an input of {largest} bytes is too large: the sandbox takes {DISK}")


def refuse_unholdable(row):
    """ValueError for half a surrogate pair in any text of a row: UTF-8, and so no file, database or tokenizer, can hold it;
    and for a NUL in what a model reads. Refused and not cleaned, since two ids could become one.
    """
    for key, value in row.items():
        try:
            text = json.dumps([key, value], ensure_ascii=False, default=str)
        except RecursionError as error:
            raise ValueError(f"{key} is nested too deeply") from error
        if not holdable(text):
            raise ValueError(f"{shown(key)} holds half a surrogate pair, such as \\ud83d, which UTF-8 can't hold; write the "
                             "whole character, or none")
        if key in ("id", "prompt", "answer", "system") and "\0" in str(value):
            raise ValueError(f"{key} holds the character NUL; leave it out")


def refuse_unreachable(problem):
    """ValueError where no reply can be right: verify, asked of the ideal reply to a verifier of ours, does not say 1.

    What a verifier of one's own takes is not known. The tests of `code` are checked by code_tests.
    """
    ideal = {verify_steps: problem.answer, verify_last_number: problem.answer,
             verify_choice: f"<answer>{problem.answer}</answer>"}.get(VERIFIERS[problem.verifier])
    if ideal is None or verify(problem, ideal).reward == 1:
        return
    raise ValueError(f"the answer {shown(problem.answer)} " + {
        "last_number": "is no number that last_number can read, such as 7, -0.5, 1e-3 or 3/4",
        "choice": "can't be matched by any reply: what stands between <answer> and </answer> is read without white space "
                  "around it"}.get(problem.verifier, "can't be matched by any reply"))


def read_problem(row) -> Problem:
    """A row of our schema as a problem. ValueError, in one sentence, where it is none, or no reply to it can be right."""
    refuse_unholdable(row)
    if row.get("verifier") == "code":
        row.setdefault("answer", "its tests")
        code_tests(row)
    row.setdefault("system", "")
    bad = [k for k in ("id", "prompt", "answer", "verifier") if not isinstance(row.get(k), str) or not row[k].strip()]
    if bad := bad + ["system"] * (not isinstance(row["system"], str)):
        raise ValueError(f"{' and '.join(bad)} must be given, as text")
    if row["verifier"] not in VERIFIERS:
        raise ValueError(f"no verifier {row['verifier']!r}; there are {', '.join(VERIFIERS)}")
    known = {k: row.pop(k) for k in ("id", "prompt", "answer", "verifier", "system")}
    problem = Problem(**known, extra=row)
    refuse_unreachable(problem)
    return problem


def read_problems(path, convert=dict, rows=numbered_rows) -> list[Problem]:
    """The problems of a file's `rows`, each through `convert`. ValueError, with file and line, for what is not one."""
    if not Path(path).is_file() and not Path(path).with_suffix(".parquet").is_file():
        raise ValueError(f"{path} does not exist; a task is a folder with a file for train and one for test")
    problems, seen = [], {}
    for n, row in rows(path):
        try:
            problem = read_problem(convert(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}") from error
        if problem.id in seen:
            raise ValueError(f"{path}, line {n} repeats the id {problem.id!r} of line {seen[problem.id]}")
        seen[problem.id] = n
        problems.append(problem)
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
    """Yields (where, row) of the official files: a JSON-lines file, a folder of them, or the Hub's where data is empty.

    The Hub has them beside a loading script, which `datasets` runs no more and refuses, so they are loaded by their names:
    all six, 4.5 GB, which are release_v6. Not run on the Hub itself, which was out of reach; run on a folder like it.
    """
    if not data:
        import datasets  # here: it takes a second, and no other task needs it
        for name in LIVECODEBENCH_FILES:
            place = f"{LIVECODEBENCH_HUB}/{name}"
            try:
                table = datasets.load_dataset("json", data_files=place, split="train")
            except Exception as error:
                raise ValueError(f"livecodebench needs --data, its official files, or the Hub's {place}, which can't be "
                                 f"loaded: {cause(error)}") from error
            yield from ((f"{place}, row {n}", row) for n, row in enumerate(table, 1))
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

    The name says protocol, window and number of problems, for reports. SDPO's half of the tests is drawn as its script does:
    numpy's seed 0, problem by problem in the order of the file, max(1, n // 2) of n tests, which keep their order.
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
            name = metadata.get("func_name")
            texts = (row["question_id"], row["question_content"], row["starter_code"])
            whole = code_problem(public + hidden, *texts, fn_name=name)
            refuse_unholdable(vars(whole))
            code_tests(whole.extra)
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

    data: for sciknoweval, the folder that holds DOMAIN/train.json and test.json as SDPO publishes them, or a copy of the
    Hub's repository; for livecodebench, the official file or a folder of such; empty for the Hub. protocol, since, until:
    of livecodebench. exclude_flagged: of sciknoweval, leaves out what `defects` finds. dev: the share of the training split
    that is held out, by `seed`, to select checkpoints on (the default seed is that of SDPO's own splits). Raises ValueError
    in one sentence for a task or file that can't be used.
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

SUCCESS = 0.5  # a reward above this is a success: that of memory.py, which knows nothing of tasks, nor they of it
MAX_FEEDBACK = 20_000  # characters of feedback that are kept: it is tokenised for every teacher and every reflection


@dataclass(frozen=True)
class Verdict:
    """reward: a number from 0 to 1. answer: text that the estimators vote on, the same for all answers that the verifier
    takes for equal. feedback: text for the teacher, empty where there is none.

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
    compared = " ".join(w.partition("=")[0] + "=*" if "=" in w else w for w in words)
    return Verdict(float(right), compared, feedback)


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


# How a person says that a letter is the answer, in pieces. Gaps are bounded, so that no text takes long.
TAKEN_BACK = (  # words before a statement that make it none
    r"(?P<before>(?i:\b(?:or|nor|not|neither|never|anything|than|instead of|eliminate|exclude|rule out|cannot|\w{1,8}n.t)"
    r"\W{1,3}(?:(?:be|the|choose|pick|select|go|with)\W{1,3}){0,3}))?")
NAMED = (r"\b(?i:answer|option|choice|letter|boxed|pick|picked|choose|chose|select|selected|selection|go with|going with|"
         r"réponse|antwort|respuesta|resposta|risposta|ответ|jawaban)"
         r"(?i:.s)?\b")
FILLED = (r"(?i:\W{1,3}(?:is|was|be|est|ist|es|é|è|would|should|must|has|to|the|it.s|it|option|choice|letter|answer|"
          r"probably|likely|clearly|definitely|indeed|thus|therefore|then|still|just)\b){0,5}")
NAMED_IN_CHINESE = ("(?:答案|选项|選項|选择|選擇|选|選|答え|解答|正解)"
                    "(?:应该?|應該?|当然|當然|为|為|是|就|选|選|项|項|は){0,4}")
NAMED_LETTER = r"(?!I(?:'| [a-z]))(?:(?P<named>[A-Z])\b|(?P<small>[a-z])\b(?=\W*$|[).,;:]))"
MEANT = (r"\b(?i:it.s|that.s|it is|that is|must be|should be|has to be|so|thus|hence|therefore|but|final|definitely|clearly|"
         r"surely|probably|guess|say|think|believe|looks like|hmm)\W{1,9}(?P<meant>[A-Z])\b(?=\W*$|\W?[.,;:!?)])")
JUDGED = (r"\b(?P<judged>[A-Z]) (?:it is\b|(?:is|must be|has to be|should be|would be|seems(?: to be)?|looks) "
          r"(?:(?:the|my) (?:\w{1,9} )?(?:answer|option|choice|one)|right|correct|true)\b)")
DENIED = (  # and after it, such as another letter
    r"(?=(?P<after>\W{0,3}(?:(?:or|nor)\b|(?:and\b|[/&+])\W{0,3}[A-HJ-Z]\b|\w{1,8}n.t\b|cannot\b|"
    r"is (?:not|wrong|incorrect|false)\b)|\W{0,2},\W{0,3}[A-Z]\b(?! (?:is|was|isn)))?)")
NAMED = rf"(?:{NAMED}{FILLED}|{NAMED_IN_CHINESE})\W{{1,9}}{NAMED_LETTER}"
STATED = re.compile(rf"{TAKEN_BACK}(?:{NAMED}|{MEANT}|{JUDGED}){DENIED}")
OPENING = re.compile(
    r"\W*([A-Za-z])(?:\W*$| ?[).:;、](?! or\b| and\b)|,(?! (?:or |and )?[A-Z]\b)| [-–—] | \((?!or |and |[A-Z]\b)| "
    r"(?:because|since|as|rather than|instead of)\b| (?:选项|選項))")
CORRECTION = re.compile(r"(?i)\b(?:wait|actually|sorry|correction|scratch that|on second thoughts?|i meant?|make that|oops|"
                        r"my mistake|no(?= ?[,.:;!–—-]))\b|不对|更正|等等|抱歉")
WRONG = re.compile(r"(?i)\b(?:wrong|incorrect|not (?:right|correct|it|that))\b")


def letter_said(text) -> str:
    """The letter that a text says is the answer, or "": the last clear statement of one (`B is the answer`), else the only
    one that the text opens with (`B, since`), ends with as a sentence of its own, or has as the name of an option (`B:`).
    """
    stated = [found for found in STATED.finditer(text) if not found["before"] and not found["after"]]
    if stated:
        last = stated[-1]
        return last["named"] or last["small"] or last["meant"] or last["judged"]
    opening = OPENING.match(text)
    letters = {opening[1], *re.findall(r"[.;:!?] {0,2}\W{0,2}([A-Z])(?=[).:,;])", text)} if opening else set()
    end = len(text)
    while end and not text[end - 1].isalnum():
        end -= 1
    closing = re.search(r"(?<!vs)(?:[.:;!?=。→]|->)[ (\[\"']{0,4}([A-Z])$", text[max(0, end - 12):end])
    if closing:
        letters.add(closing[1])
    return letters.pop() if len(letters) == 1 else ""


def verify_choice_lenient(problem, completion) -> Verdict:
    """Multiple choice as a person would read it (`b`, `(B)`, `\\boxed{B}`, `It's B.`, `答案：B`): ours, reported apart.

    What comes after a correction counts above all: `A. No wait, B.` is B. What passes the strict rule passes here.
    """
    strict = verify_choice(problem, completion)
    if strict.reward:
        return strict
    plain = unicodedata.normalize("NFKC", strict.answer)  # full-width letters and punctuation
    plain = re.sub(r"\\(?:text|math)\w*|</?\w{1,9}>|[*$`{\\]", " ", plain.replace("\n", " ; "))
    plain = re.sub(r"(?<=[\u3040-\u9fff])(?=[A-Za-z])|(?<=[A-Za-z])(?=[\u3040-\u9fff])", " ", plain)
    parts = CORRECTION.split(" ".join(plain.replace("}", ")").replace("’", "'").split()))
    said = ""
    while parts and not said:
        part = parts.pop()
        said = letter_said(part.strip())
        if parts and not said and WRONG.search(part):
            break
    if not said:
        return strict
    right = said.upper() == problem.answer.upper()
    return Verdict(float(right), problem.answer if right else said.upper())


# What a text has where a number may stand; of two that fit, the first. Signs, digits and separators are ASCII by then.
LETTERS = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u04ff"  # Latin, Greek, Cyrillic
ODD = "\u00bc-\u00be\u2150-\u215e\u03c0\u221a"  # halves and thirds in one character, pi, a root
NUMERALS = re.compile(
    # A name with digits, or raised to a power: x2, H2O, v1.2.3, x_1, m^2, and as LaTeX has them: H$_2$O, \text{m}^2.
    rf"(?P<name>\\?[{LETTERS}][{LETTERS}\d]*(?:[}}$]{{0,3}}_\{{?[{LETTERS}\d]+)*(?:(?<=\d)(?:\.\d+)+)?"
    rf"(?:[}}$)\]]{{0,3}}\^\{{?[-+]?[{LETTERS}\d]+)?)"
    # A date or a telephone number: digits with two hyphens or more between them.
    r"|\d+(?:-\d+){2,}"
    r"|(?P<based>0x[0-9a-f]+|0b[01]+|0o[0-7]+)"
    # A sign that does not stand between two numbers or names, perhaps the 1 of 1 3/4, digits, and what is joined to them.
    rf"|(?:(?<![{LETTERS}\d)\]}}%])[-+])?(?:\d+ (?=\d+/))?(?:\d+|(?<![{LETTERS}\d.])\.\d+|[{ODD}])"
    rf"(?:[.,:/'_]\d+|_\{{\d+|e[-+]?\d+|[}}$)\]]{{0,3}}(?:\*\*|\^)\{{?[-+]?[{LETTERS}\d]+\}}?"
    rf"| ?(?:[{ODD}]|\\pi\b|\\sqrt\b))*",
    re.IGNORECASE)
NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<decimal>(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e(?P<power>[-+]?\d+))?"
    r"|(?:(?P<whole>\d+) )?(?P<above>\d+)/(?P<below>\d+))", re.IGNORECASE)
FRAC = r"\\[cdt]?frac *(?:\{ *(?P<above>\d+) *\}|(?P<digit>\d)) *(?:\{ *(?P<below>\d+) *\}|(?P<other>\d))"
SIGNED_FRAC = r"(?<![-+])\\[cdt]?frac *\{ *(?:-(\d+) *\} *\{ *(\d+)|(\d+) *\} *\{ *-(\d+)) *\}"
PLAIN = [  # (how others and LaTeX write it, how we do), in this order
    ("[\u2010-\u2013\u2212\ufe63\uff0d]", "-"), ("\uff0b", "+"), ("[\uff0e\u066b]", "."), ("[\uff0c\u066c]", ","),
    ("[\uff0f\u2044\u2215]", "/"), (r"\\times\b|\\cdot\b|[\u00b7\u2022\u2217\u2219\u22c5]", "×"), (r"\{,\}|,\\!", ","),
    ("<sup>", "^"), ("<sub>", "_"), ("</su[bp]>", ""), (r"\{(\d+)\}(?=\^)", r"\1"),  # a power may stand apart from its base
    (r" ?\^ ?\{ ?([-+]?\w+) ?\}", r"^{\1}"), (r"(?<=\w) ?\^ ?(?=[-+]?\d)", "^"), (r"(?<=\d) \*\* (?=[-+]?\d)", "**"),
    (r"\\(?:text|math)\w{0,9} ?\{ ?([-+]?[\d.,]+) ?\}", r"\1"),  # a number in another font
    (r"\\(?:text)?color ?\{\w{1,20}\}", ""),
    (r"([:=]) ?\} ?(?=[-+][.\d])", r"\1 "),  # a sign behind \text{..: } or before $
    (r"(?<![\w$)\]}%])-\\?[$£¥\u20a0-\u20bf](?=[.\d])", "-"),
    (r"(?<=\d)(?:[\u00a0\u2007\u2009\u202f'’_~]|\\[,;:! ])(?=\d{3}(?!\d))", ","),  # between groups of three
    (rf"(?<=\d) ?{FRAC}", r" \g<above>\g<digit>/\g<below>\g<other>"), (FRAC, r"\g<above>\g<digit>/\g<below>\g<other>"),
    (SIGNED_FRAC, r"-\1\3/\2\4"),
    (r"(?<=\d) ?[×x*] ?10(?:\^|\*\*)\{?([-+]?\d+)\}?", r"e\1"), (r"(?<![\w.,^*])10(?:\^|\*\*)\{?([-+]?\d+)\}?", r"1e\1"),
    (r"(?<=\d) / (?=\d)", "/"), (r"([=≈]) *-(?: |\\[,;:! ]){1,3}(?=[.\d])", r"\1-")]


def plain_digits(text) -> str:
    """A text with the digits, signs and separators of numbers written in ASCII, and LaTeX's fractions with a slash."""
    raised = {ord(c): d for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True)}
    text = re.sub("[⁻⁺]?[⁰¹²³⁴-⁹]+", lambda found: "^" + found[0].translate(raised), text)
    text = re.sub(r"[^\D0-9]", lambda found: str(unicodedata.decimal(found[0])), text)  # full-width, Arabic, all others
    for theirs, ours in PLAIN:
        text = re.sub(theirs, ours, text)
    return text


def read_number(text) -> Fraction | None:
    """The number that a text in plain_digits is, or None: where it is none, and beyond 400 digits or powers of ten."""
    found = NUMBER.fullmatch(text) if len(text) <= 400 else None
    if not found:
        return None
    sign = -1 if found["sign"] == "-" else 1
    if found["decimal"]:
        power = int(found["power"] or 0)
        return sign * Fraction(found["decimal"].replace(",", "")) * Fraction(10) ** power if abs(power) <= 400 else None
    whole, above, below = int(found["whole"] or 0), int(found["above"]), int(found["below"])
    return sign * (whole + Fraction(above, below)) if below else None


def last_number(text) -> tuple[Fraction | None, str]:
    """The last numeral of a text as a number, None where it is none, and as a text, one for each number."""
    text = plain_digits(text)
    numerals = [found for found in NUMERALS.finditer(text) if not found["name"]]
    if not numerals:
        return None, ""
    last = numerals[-1]
    before = text[max(0, last.start() - 10):last.start()].replace(" ", "")
    inside = before.endswith(  # part of a fraction, under a root, digits that recur, or how much a number is uncertain
        ("/", "}{", "frac{", "√", "sqrt{", "sqrt(", "sqrt", "]{", "overline{", "dot{", "±", "\\pm", "+/-"))
    value = Fraction(int(last[0], 0)) if last["based"] and len(last[0]) < 400 else read_number(last[0])
    if inside or value is None:
        return None, f"{before[-1:]}{last[0]}"[:100] + "..."
    with localcontext(prec=2000) as context:
        context.clear_flags()
        quotient = Decimal(value.numerator) / Decimal(value.denominator)
        return value, str(value) if context.flags[Inexact] else f"{quotient.normalize():f}"


def verify_last_number(problem, completion) -> Verdict:
    """The last number of the text equals the answer exactly, as rational numbers: for sums, and for tasks of your own.

    Numbers are 7, -7 (also with a Unicode minus), +7, .5, 1,234 with groups of three, 1.5e-3, 1.5 x 10^-3, 3/4, 1 3/4, 0x1F
    (0b1, 0o7), in the digits of any script and as LaTeX has them (`1{,}234`, `\\frac{3}{4}`). A hyphen between two numbers
    or names is no sign (3-4). What follows a number is its unit: 50% is 50, 7kg is 7. What has digits and begins with
    a letter is a name, and passed over: x2, H2O, v1.2.3, the unit in `7\\text{ cm}^2`. Other numerals are read whole or
    not at all, never a piece: where the last one is 12,34 or 1.234.567, a date, a time, a power (2^10), a root, part of a
    fraction with letters or an uncertainty (9.8 ± 0.1), the reply is wrong.
    """
    value, answer = last_number(completion)
    return Verdict(float(value is not None and value == read_number(plain_digits(problem.answer))), answer)


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


def no_code(completion) -> str:
    """The feedback where extract_code finds nothing: why, as far as the fences tell. The rule is SDPO's, to the letter."""
    if "```" not in completion:
        return "Incorrect Format\nThere is no code block: put the code between ```python and ```."
    if completion.count("```") % 2:
        return "Truncated Attempt\nThe code block has no end."
    if any(map(str.strip, re.findall(r"```[^\n]*\n(.*?)```", completion, re.DOTALL))):
        return ("Incorrect Format\nThe code block can't be read: its first line has to be ```python with nothing after it, "
                "not even a blank or a carriage return.")
    return "Incorrect Format\nThe code block has no line of code: put the code on its own lines between ```python and ```."


def verify_code(problem, completion) -> Verdict:
    """A program that passes every test in problem.extra; feedback only where that holds no `feedback: false`."""
    tests, code = problem.extra, extract_code(completion, problem.extra.get("block", "longest"))
    if code.strip():
        found = judge(code, tests["inputs"], tests["outputs"], tests.get("fn_name"))
    else:
        found = Judgement(False, "no_code", 0, no_code(completion))
    feedback = found.feedback if tests.get("feedback", True) else ""
    return Verdict(float(found.passed), code, feedback, found.n_passed / len(tests["inputs"]), found.status)


VERIFIERS = {"steps": verify_steps, "choice": verify_choice, "last_number": verify_last_number, "code": verify_code}


def verify(problem, completion, lenient=False) -> Verdict:
    """The verdict on one completion (text): a pure function of both. lenient concerns multiple choice alone.

    ValueError, which names verifier and problem, for a verifier that fails or returns what is no verdict: see checked.
    """
    verifier = VERIFIERS[problem.verifier]
    if lenient and problem.verifier == "choice":
        verifier = verify_choice_lenient
    if not holdable(completion):  # what a model wrote is no fault of the verifier
        completion = completion.encode("utf-8", "replace").decode()
    try:
        verdict = verifier(problem, completion)
    except Exception as error:  # whatever a verifier of one's own raises
        if verifier is verify_code and isinstance(error, ValueError):  # there is no sandbox, in a sentence
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"the verifier {problem.verifier} failed on problem {problem.id!r}: {type(error).__name__} in "
                         f"{Path(last.filename).name}, line {last.lineno}: {' '.join(str(error).split())}") from error
    try:
        return checked(verdict)
    except ValueError as error:
        raise ValueError(f"the verifier {problem.verifier} returned {error} for problem {problem.id!r}") from error


def checked(verdict) -> Verdict:
    """The verdict with numbers of Python's own, its feedback cut to MAX_FEEDBACK. ValueError, with what is wrong and what it
    has to be, for one that estimators, memory and records could not use.
    """
    if not isinstance(verdict, Verdict):
        raise ValueError(f"{shown(verdict)}, where it has to return a Verdict")
    reward, rate, answer = number(verdict.reward), number(verdict.test_pass_rate), verdict.answer
    if reward is None or not 0 <= reward <= 1:  # a NaN is not
        raise ValueError(f"the reward {shown(verdict.reward)}, where it has to be a number from 0 to 1")
    if verdict.test_pass_rate is not None and (rate is None or not 0 <= rate <= 1):
        raise ValueError(f"the test_pass_rate {shown(verdict.test_pass_rate)}, where it has to be None or from 0 to 1")
    if number(answer) is not None:
        answer = str(answer)
    for name, text in (("answer", answer), ("feedback", verdict.feedback), ("status", verdict.status)):
        if not isinstance(text, str):
            raise ValueError(f"the {name} {shown(text)}, where it has to be a text")
        if not holdable(text):
            raise ValueError(f"the {name} {shown(text)}, with half a surrogate pair, which UTF-8 can't hold")
    feedback = verdict.feedback.replace("\0", "\ufffd")  # a program may print one
    if len(feedback) > MAX_FEEDBACK:
        feedback = f"{feedback[:MAX_FEEDBACK]}\n[cut here: {len(feedback)} characters]"
    return replace(verdict, reward=reward, test_pass_rate=rate, answer=answer, feedback=feedback)


def number(value) -> float | None:
    """A number or truth value of Python or numpy as a float, or None where it is neither."""
    return float(value) if isinstance(value, (Real, np.bool_)) else None


def shown(value) -> str:
    """A value in an error: on one line, and short."""
    text = " ".join(ascii(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def holdable(text) -> bool:
    """Whether UTF-8 can hold a text: not where it has half a surrogate pair, as JSON's escapes allow."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


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
# Estimators. rewards: (problems, k) from 0 to 1.
# ---------------------------------------------------------------------------------------------------------------------

def reward_table(rewards) -> np.ndarray:
    """Rewards as numbers (problems, k). ValueError where there are none, not as many of each problem, or not from 0 to 1."""
    sizes = sorted({len(row) for row in rewards})
    if len(sizes) != 1 or not sizes[0]:
        raise ValueError(f"each problem has {' or '.join(map(str, sizes)) or 'no'} rewards: estimators need as many of "
                         "each, and at least one")
    rewards = np.asarray(rewards, float)
    if not ((rewards >= 0) & (rewards <= 1)).all():  # a NaN is neither
        raise ValueError("the rewards are not all numbers from 0 to 1")
    return rewards


def avg_at_k(rewards) -> float:
    """The mean reward over all problems and samples (the paper's avg@16)."""
    return float(reward_table(rewards).mean())


def best_at_k(rewards, k=None) -> float:
    """The unbiased pass@k: over problems, the mean of 1 - C(n-c, k) / C(n, k), c of n samples being above SUCCESS.

    k: n, if not given. ValueError where there are not as many samples.
    """
    solved = reward_table(rewards) > SUCCESS
    n = solved.shape[1]
    k = n if k is None else k
    if k not in range(1, n + 1):  # 1.5 is not
        raise ValueError(f"best@{k} can't be told from {n} samples of each problem: k has to be a number from 1 to {n}")
    return float(np.mean([1 - comb(n - int(c), int(k)) / comb(n, int(k)) for c in solved.sum(1)]))


def majority(rewards, answers) -> np.ndarray:
    """(problems,) the mean reward of the samples that gave the most frequent answer; of several such answers, their mean.

    answers: (problems, k), texts. The empty answer is one as well.
    """
    scores = []
    for row, said in zip(reward_table(rewards), answers, strict=True):
        votes = Counter(said)
        most = max(votes.values())
        top = [[r for a, r in zip(said, row, strict=True) if a == answer] for answer, n in votes.items() if n == most]
        scores.append(np.mean(top))  # as many rewards of each
    return np.array(scores)


def maj_at_k(rewards, answers) -> float:
    """The mean reward of each problem's most frequent answer, which for rewards of 0 and 1 is how often it is right."""
    return float(majority(rewards, answers).mean())


def headroom(rewards, answers) -> np.ndarray:
    """(problems,) what a perfect choice among the k samples would add to their majority: for rewards of 0 and 1,
    best@k - maj@k (Fig. 3); never below 0.
    """
    return reward_table(rewards).max(1) - majority(rewards, answers)


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
        pmd.check_numbers(cfg)  # batch_size too, which is another one below
        pmd.check_name(cfg)
        task, tokenizer = pmd.check(replace(cfg, batch_size=ranks, name="", resume=False), ranks=ranks, training=False,
                                    quiet=pmd.rank() > 0 or pmd.world() < ranks,
                                    reads=cfg.max_reprompt if args.memory else 0)
    parts = ["eval", cfg.task, *Path(cfg.model).parts[-2:], *Path(args.memory).parts[-2:-1]]
    cfg = replace(cfg, method="eval", memory_from=args.memory, name=cfg.name or "-".join(parts).replace("/", "-"))
    try:
        answer(cfg, task, tokenizer)
    except Exception as error:
        if not (said := pmd.failure(error, cfg)):
            raise
        raise records.RunError(said) from error


def answer(cfg, task, tokenizer):
    """The work of `evaluate`, after its checks. cfg: its method is eval, and memory_from the memory.db that is read."""
    import pmd
    import records
    from memory import Memory
    from report import evaluated

    first = pmd.rank() == 0
    folder, problems = Path(cfg.out) / cfg.name, task.test
    path, rows, memory = folder / "evals" / "0-test.jsonl", [], None
    if 0 < cfg.eval_problems < len(problems):
        problems = random.Random("evaluate").sample(problems, cfg.eval_problems)
    if refusal := pmd.broadcast(records.claim(folder, resume=True) if first else ""):
        raise ValueError(refusal)
    if first:
        asked = replace(task, train=[], dev=[])
        if (folder / "config.json").exists():
            cure = "remove it, and the same command writes it anew without comparing its flags"
            records.refuse_changes(records.read_json(folder / "config.json", cure), cfg)
            records.refuse_other_problems(folder, asked, tokenizer)
        if cfg.memory_from:
            memory = Memory(cfg.memory_from, pmd.make_embedder(cfg), None, embedder=cfg.embedder, mode="frozen",
                            retrieve_k=cfg.retrieve_k)
            if not any(memory.sizes().values()):
                raise ValueError(f"--memory {cfg.memory_from} holds nothing; name the memory.db of another run, or leave it "
                                 "out")
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write(folder / "config.json", json.dumps(asdict(cfg), indent=1))
        records.write(folder / "problems.json", json.dumps(records.fingerprint(asked, tokenizer), indent=1))
        rows = records.read_lines(path) if path.exists() else []
        answered = Counter(row["problem"] for row in rows)
        rows = [row for row in rows if answered[row["problem"]] == cfg.eval_k]  # a stop may have come within a problem
        records.write_lines(path, rows)
    whole = pmd.broadcast({row["problem"] for row in rows})
    if first:
        print(task.card, end="\n" if task.card else "")
        print(f"{task.name} with {cfg.model}: {len(problems)} problems, {len(whole)} of them done before; {path}")
        if memory and (said := memory.overlap(problems)):
            print(said)
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
        records.release(folder)
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
    except KeyboardInterrupt:
        print("eval.py: interrupted; the same command goes on with the problems that are left", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
