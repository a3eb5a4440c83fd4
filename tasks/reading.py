"""Problems out of rows: what cannot be asked, judged or stored is refused by line."""

import json
import keyword
from pathlib import Path

from tasks.choice import verify_choice
from tasks.files import numbered_rows, refuse_unholdable
from tasks.last_number import verify_last_number
from tasks.nano import verify_steps
from tasks.problem import Problem, shown
from tasks.sandbox import DISK
from tasks.verdicts import VERIFIERS, verify


def call_tests(tests, name):
    """ValueError where a function can't be called on these tests: all values must be JSON, and its
    name a text.
    """
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
    """ValueError where a row can't be verified by `code`: it has to have inputs and outputs that
    fit each other.
    """
    texts = (row.get("inputs"), row.get("outputs"))
    if not all(
        isinstance(t, list) and t and all(isinstance(x, str) for x in t) for t in texts
    ) or len(texts[0]) != len(texts[1]):
        raise ValueError("code needs inputs and outputs, two lists of texts of one length")
    if row.get("fn_name") is not None:
        call_tests(row, row["fn_name"])
    elif (largest := max(len(x.encode()) for x in texts[0])) > DISK:
        raise ValueError(f"an input of {largest} bytes is too large: the sandbox takes {DISK}")


def refuse_unreachable(problem):
    """ValueError where no reply can be right: verify, asked of the ideal reply to a verifier of
    ours, does not say 1.

    What a verifier of one's own takes is not known. The tests of `code` are checked by code_tests.
    """
    ideal = {
        verify_steps: problem.answer,
        verify_last_number: problem.answer,
        verify_choice: f"<answer>{problem.answer}</answer>",
    }.get(VERIFIERS[problem.verifier])
    if ideal is None or verify(problem, ideal).reward == 1:
        return
    raise ValueError(
        f"the answer {shown(problem.answer)} "
        + {
            "last_number": "is no number that last_number can read, such as 7, -0.5, 1e-3 or 3/4",
            "choice": (
                "can't be matched by any reply: what stands between <answer> and </answer> is read"
                " without white space around it"
            ),
        }.get(problem.verifier, "can't be matched by any reply")
    )


def read_problem(row) -> Problem:
    """A row of our schema as a problem. ValueError, in one sentence, where it is none, or no reply
    to it can be right.
    """
    refuse_unholdable(row)
    if row.get("verifier") == "code":
        row.setdefault("answer", "its tests")
        code_tests(row)
    row.setdefault("system", "")
    bad = [
        k
        for k in ("id", "prompt", "answer", "verifier")
        if not isinstance(row.get(k), str) or not row[k].strip()
    ]
    if bad := bad + ["system"] * (not isinstance(row["system"], str)):
        raise ValueError(f"{' and '.join(bad)} must be given, as text")
    if row["verifier"] not in VERIFIERS:
        raise ValueError(f"no verifier {row['verifier']!r}; there are {', '.join(VERIFIERS)}")
    known = {k: row.pop(k) for k in ("id", "prompt", "answer", "verifier", "system")}
    problem = Problem(**known, extra=row)
    refuse_unreachable(problem)
    return problem


def read_problems(path, convert=dict, rows=numbered_rows) -> list[Problem]:
    """The problems of a file's `rows`, each through `convert`. ValueError, with file and line, for
    what is not one.
    """
    if not Path(path).is_file() and not Path(path).with_suffix(".parquet").is_file():
        raise ValueError(
            f"{path} does not exist; a task is a folder with a file for train and one for test"
        )
    problems, seen = [], {}
    for n, row in rows(path):
        try:
            problem = read_problem(convert(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}") from error
        if problem.id in seen:
            raise ValueError(
                f"{path}, line {n} repeats the id {problem.id!r} of line {seen[problem.id]}"
            )
        seen[problem.id] = n
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return problems
