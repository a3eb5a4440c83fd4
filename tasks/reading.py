"""Problems out of rows: what cannot be asked, judged or stored is refused by line."""

import json
import keyword
from pathlib import Path

from tasks.choice import verify_choice
from tasks.files import numbered_rows, refuse_unholdable
from tasks.gym import refuse_unscorable
from tasks.last_number import verify_last_number
from tasks.maths import verify_math
from tasks.nano import verify_steps
from tasks.problem import Problem, shown
from tasks.sandbox import DISK
from tasks.verdicts import VERIFIERS, verify


def call_tests(tests, name):
    """Checks that a function can be called on these tests.

    Raises ValueError if a value is not JSON, or the name no function's.
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
    """Checks the tests of a row that `code` verifies.

    Raises ValueError if it has no inputs and outputs that fit each other.
    """
    inputs, outputs = row.get("inputs"), row.get("outputs")
    if not is_texts(inputs) or not is_texts(outputs) or len(inputs) != len(outputs):
        raise ValueError("code needs inputs and outputs, two lists of texts of one length")
    if row.get("fn_name") is not None:
        call_tests(row, row["fn_name"])
        return
    largest = max(len(text.encode()) for text in inputs)
    if largest > DISK:
        raise ValueError(f"an input of {largest} bytes is too large: the sandbox takes {DISK}")


def is_texts(value) -> bool:
    """Says whether a value is a list of texts that is not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def refuse_unreachable(problem):
    """Judges the ideal reply to a verifier of ours; what a verifier of one's own takes is not
    known.

    Raises ValueError if the ideal reply is not right, so that no reply can be. The tests of `code`
    are checked by code_tests.
    """
    ideal_replies = {
        verify_steps: problem.answer,
        verify_last_number: problem.answer,
        verify_choice: f"<answer>{problem.answer}</answer>",
        verify_math: f"\\boxed{{{problem.answer}}}",
    }
    ideal = ideal_replies.get(VERIFIERS[problem.verifier])
    if ideal is None or verify(problem, ideal).reward == 1:
        return
    reasons = {
        "last_number": "is no number that last_number can read, such as 7, -0.5, 1e-3 or 3/4",
        "math": "is nothing that math-verify reads; give the row a verifier of its own",
        "choice": (
            "can't be matched by any reply: what stands between <answer> and </answer> is read"
            " without white space around it"
        ),
    }
    reason = reasons.get(problem.verifier, "can't be matched by any reply")
    raise ValueError(f"the answer {shown(problem.answer)} {reason}")


def read_problem(row) -> Problem:
    """Makes a problem of a row of our schema.

    Raises ValueError, in one sentence, if it is none, or if no reply to it can be right.
    """
    refuse_unholdable(row)
    if row.get("verifier") == "code":
        row.setdefault("answer", "its tests")
        code_tests(row)
    if row.get("verifier") == "gym" and not {"task", "entry"} <= row.keys():
        raise ValueError(
            "gym needs task and entry, as reasoning-gym has them; give --task gym/NAME"
        )
    row.setdefault("system", "")
    missing = []
    for key in ("id", "prompt", "answer", "verifier"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            missing.append(key)
    if not isinstance(row["system"], str):
        missing.append("system")
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given, as text")
    if row["verifier"] not in VERIFIERS:
        raise ValueError(f"no verifier {row['verifier']!r}; there are {', '.join(VERIFIERS)}")
    if row["verifier"] == "steps" and not isinstance(row.get("hidden", ""), str):
        raise ValueError("hidden must be text: the operations of the problem's steps, with blanks")
    if row["verifier"] == "gym":
        refuse_unscorable(row["task"], row["entry"], row["answer"])
    known = {k: row.pop(k) for k in ("id", "prompt", "answer", "verifier", "system")}
    problem = Problem(**known, extra=row)
    refuse_unreachable(problem)
    return problem


def read_problems(path, convert=dict, rows=numbered_rows) -> list[Problem]:
    """Makes problems of a file's `rows`, each through `convert`.

    Raises ValueError, with file and line, if a row is no problem.
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
