"""Programs: taken out of an answer, run in the sandbox, judged by their tests."""

import json
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from tasks.problem import Verdict
from tasks.sandbox import execute


@dataclass(frozen=True)
class Judgement:
    """Of a program. status: passed, or the worst that happened: runtime_error, time_limit,
    wrong_answer, in this order.
    """

    passed: bool
    status: str
    n_passed: int
    feedback: str


def same_text(output, expected) -> bool:
    """The official rule for stdout: line by line, ends stripped, equal as texts or token by token
    as decimal numbers.
    """
    output, expected = output.strip(), expected.strip()
    return output.count("\n") == expected.count("\n") and all(
        a.strip() == b.strip() or same_numbers(a, b)
        for a, b in zip(output.split("\n"), expected.split("\n"), strict=True)
    )


def same_numbers(ours, theirs) -> bool:
    theirs = theirs.split()
    ours = ours.split(None, len(theirs))  # no further than one too many
    try:
        return len(ours) == len(theirs) and all(
            Decimal(a) == Decimal(b) for a, b in zip(ours, theirs, strict=True)
        )
    except InvalidOperation:  # no number, or a signalling NaN
        return False


def same_value(output, expected) -> bool:
    """The official rule for return values: equal as JSON values. Tuples are lists, True is 1 and
    2.0 is 2.

    Of equal values one text may be longer, by \\u escapes twelve times; what is far beyond that is
    not parsed at all.
    """
    try:
        return (
            output.strip() == expected.strip()
            or len(output) <= 12 * len(expected) + 1000
            and json.loads(output) == json.loads(expected)
        )
    except (ValueError, RecursionError):  # thousands of digits or of brackets
        return False


def judge(code, inputs, outputs, fn_name=None, time_limit=6.0, memory_mb=1024) -> Judgement:
    """Runs a program on each input, in a sandbox, and compares here what it gives with the outputs,
    which stay here.

    inputs, outputs: as many texts each. fn_name: None for a program that reads stdin and prints;
    else a function, or a method of Solution, that gets the JSON values on the lines of the input
    and returns what the output says in JSON. time_limit: CPU seconds a test. memory_mb: MiB. The
    first test that runs out of time is the last one run; those after it count as failed (ours: SDPO
    runs them all at once). ValueError where there is no sandbox.
    """
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(
            f"{len(inputs)} inputs and {len(outputs)} outputs: judge needs as many of both, and at"
            " least one"
        )
    same, failures, n_passed = same_value if fn_name else same_text, [], 0
    for n, outcome in enumerate(execute(code, inputs, fn_name, time_limit, memory_mb)):
        output, status = outcome.output.decode(errors="replace"), outcome.status
        if status == "ran" and same(output, outputs[n]):
            n_passed += 1
        else:
            failures.append(
                (n, "wrong_answer" if status == "ran" else status, output[:2000], outcome.error)
            )
    passed = n_passed == len(inputs)
    if not passed and not failures:
        failures = [(n_passed, "runtime_error", "", "The program ended its sandbox.")]
    kinds = [kind for _, kind, _, _ in failures]
    status = (
        "passed"
        if passed
        else next(k for k in ("runtime_error", "time_limit", "wrong_answer") if k in kinds)
    )
    return Judgement(passed, status, n_passed, explain(failures, status, inputs, outputs))


def clip(text, lines=None) -> str:
    """The first lines of a text, or all, of 250 characters each (of all together, where lines is
    not given).
    """
    parts = text.strip().split("\n") if lines else [text.strip()]
    cut = [part if len(part) <= 250 else part[:250] + "..." for part in parts[:lines]]
    return "\n".join(cut + ["..."] * (lines is not None and len(parts) > lines))


def explain(failures, status, inputs, outputs) -> str:
    """SDPO's feedback: the first error or timeout, else the one or two wrong answers with the
    shortest input and output.

    At most 2000 characters, cut so that the expected output is never what is lost. Nothing that
    passed is shown. failures: (test, kind, output, error).
    """
    if status in ("runtime_error", "time_limit"):
        n, _, _, error = next(f for f in failures if f[1] == status)
        head = (
            f"Runtime Error\n{error.strip()}"
            if status == "runtime_error"
            else "Time Limit Exceeded"
        )
        return f"{head[:1000]}\n\nLast Executed Input\n{clip(inputs[n], 8)[:900]}"
    wrong = sorted(failures, key=lambda f: len(inputs[f[0]]) + len(f[2]))[:2]
    return "\n\n".join(
        f"Test Case {n + 1}: Wrong"
        f" Answer\n\nInput\n{clip(inputs[n], 8)[:400]}\n\nOutput\n{clip(output)}\n\n"
        f"Expected\n{clip(outputs[n])}"
        for n, _, output, _ in wrong
    )


def extract_code(completion, block="longest") -> str:
    """SDPO's longest closed code block, or, officially, what is between the last two lines with a
    fence. "" if none.
    """
    if block == "longest":
        return max(re.findall(r"```\w*\n(.*?)```", completion, re.DOTALL), key=len, default="")
    lines = completion.split("\n")
    fences = [n for n, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def no_code(completion) -> str:
    """The feedback where extract_code finds nothing: why, as far as the fences tell. The rule is
    SDPO's, to the letter.
    """
    if "```" not in completion:
        return "Incorrect Format\nThere is no code block: put the code between ```python and ```."
    if completion.count("```") % 2:
        return "Truncated Attempt\nThe code block has no end."
    if any(map(str.strip, re.findall(r"```[^\n]*\n(.*?)```", completion, re.DOTALL))):
        return (
            "Incorrect Format\nThe code block can't be read: its first line has to be ```python"
            " with nothing after it, not even a blank or a carriage return."
        )
    return (
        "Incorrect Format\nThe code block has no line of code: put the code on its own lines"
        " between ```python and ```."
    )


def verify_code(problem, completion) -> Verdict:
    """A program that passes every test in problem.extra; feedback only where that holds no
    `feedback: false`.
    """
    tests, code = problem.extra, extract_code(completion, problem.extra.get("block", "longest"))
    if code.strip():
        found = judge(code, tests["inputs"], tests["outputs"], tests.get("fn_name"))
    else:
        found = Judgement(False, "no_code", 0, no_code(completion))
    feedback = found.feedback if tests.get("feedback", True) else ""
    return Verdict(
        float(found.passed), code, feedback, found.n_passed / len(tests["inputs"]), found.status
    )
