"""Programs: taken out of an answer, run in the sandbox, judged by their tests."""

import json
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from tasks.problem import Verdict
from tasks.sandbox import execute


@dataclass(frozen=True)
class Judgement:
    """Says how a program did on its tests.

    status: passed, or the worst that happened: runtime_error, time_limit, wrong_answer, in this
    order.
    """

    passed: bool
    status: str
    n_passed: int
    feedback: str


def same_text(output, expected) -> bool:
    """Compares stdout by the official rule: line by line, ends stripped.

    Two lines are the same as texts, or token by token as decimal numbers.
    """
    ours, theirs = output.strip().split("\n"), expected.strip().split("\n")
    if len(ours) != len(theirs):
        return False
    lines = zip(ours, theirs, strict=True)
    return all(a.strip() == b.strip() or same_numbers(a, b) for a, b in lines)


def same_numbers(ours, theirs) -> bool:
    """Compares two lines token by token, as decimal numbers."""
    theirs = theirs.split()
    ours = ours.split(None, len(theirs))  # no further than one too many
    try:
        return len(ours) == len(theirs) and all(
            Decimal(a) == Decimal(b) for a, b in zip(ours, theirs, strict=True)
        )
    except InvalidOperation:  # no number, or a signalling NaN
        return False


def same_value(output, expected) -> bool:
    """Compares return values by the official rule: equal as JSON. Tuples are lists, 2.0 is 2.

    Of equal values one text may be longer, by \\u escapes twelve times. What is far beyond that is
    not parsed at all.
    """
    if output.strip() == expected.strip():
        return True
    if len(output) > 12 * len(expected) + 1000:
        return False
    try:
        return json.loads(output) == json.loads(expected)
    except (ValueError, RecursionError):  # thousands of digits or of brackets
        return False


def judge(code, inputs, outputs, fn_name=None, time_limit=6.0, memory_mb=1024) -> Judgement:
    """Runs a program on each input, in a sandbox, and compares its output here.

    inputs, outputs: as many texts each. The outputs never enter the sandbox. fn_name: None for a
    program that reads stdin and prints. Else a function, or a method of Solution, that gets the
    JSON values on the lines of the input and returns what the output says in JSON. time_limit: CPU
    seconds a test. memory_mb: MiB.

    The first test that runs out of time is the last one run. Those after it count as failed (ours:
    SDPO runs them all at once). Raises ValueError if there is no sandbox.
    """
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(
            f"{len(inputs)} inputs and {len(outputs)} outputs: judge needs as many of both, and at"
            " least one"
        )
    same = same_value if fn_name else same_text
    failures, n_passed = [], 0
    for n, outcome in enumerate(execute(code, inputs, fn_name, time_limit, memory_mb)):
        output = outcome.output.decode(errors="replace")
        if outcome.status == "ran" and same(output, outputs[n]):
            n_passed += 1
            continue
        kind = "wrong_answer" if outcome.status == "ran" else outcome.status
        failures.append((n, kind, output[:2000], outcome.error))
    if n_passed == len(inputs):
        return Judgement(True, "passed", n_passed, "")
    if not failures:
        failures = [(n_passed, "runtime_error", "", "The program ended its sandbox.")]
    kinds = {kind for _, kind, _, _ in failures}
    worst = next(k for k in ("runtime_error", "time_limit", "wrong_answer") if k in kinds)
    return Judgement(False, worst, n_passed, explain(failures, worst, inputs, outputs))


def clip(text, lines=None) -> str:
    """Cuts a text to its first lines of 250 characters each; without `lines`, to 250 in all."""
    parts = text.strip().split("\n") if lines else [text.strip()]
    cut = [part if len(part) <= 250 else part[:250] + "..." for part in parts[:lines]]
    if lines is not None and len(parts) > lines:
        cut.append("...")
    return "\n".join(cut)


def explain(failures, status, inputs, outputs) -> str:
    """Writes SDPO's feedback: the first error or timeout, else one or two wrong answers.

    The wrong answers are those with the shortest input and output. At most 2000 characters, cut so
    that the expected output is never what is lost. Nothing that passed is shown. failures: (test,
    kind, output, error).
    """
    if status in ("runtime_error", "time_limit"):
        n, _, _, error = next(f for f in failures if f[1] == status)
        head = "Time Limit Exceeded"
        if status == "runtime_error":
            head = f"Runtime Error\n{error.strip()}"
        return f"{head[:1000]}\n\nLast Executed Input\n{clip(inputs[n], 8)[:900]}"
    shortest = sorted(failures, key=lambda f: len(inputs[f[0]]) + len(f[2]))
    parts = []
    for n, _, output, _ in shortest[:2]:
        parts += [f"Test Case {n + 1}: Wrong Answer"]
        parts += [f"Input\n{clip(inputs[n], 8)[:400]}"]
        parts += [f"Output\n{clip(output)}"]
        parts += [f"Expected\n{clip(outputs[n])}"]
    return "\n\n".join(parts)


def extract_code(completion, block="longest") -> str:
    """Takes SDPO's longest closed code block, or officially what is between the last two fences.

    "" if there is none.
    """
    if block == "longest":
        return max(re.findall(r"```\w*\n(.*?)```", completion, re.DOTALL), key=len, default="")
    lines = completion.split("\n")
    fences = [n for n, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def no_code(completion) -> str:
    """Says why extract_code finds nothing, as far as the fences tell. The rule is SDPO's."""
    if "```" not in completion:
        return "Incorrect Format\nThere is no code block: put the code between ```python and ```."
    if completion.count("```") % 2:
        return "Truncated Attempt\nThe code block has no end."
    if any(block.partition("\n")[2].strip() for block in completion.split("```")[1::2]):
        return (
            "Incorrect Format\nThe code block can't be read: its first line has to be ```python"
            " with nothing after it, not even a blank or a carriage return."
        )
    return (
        "Incorrect Format\nThe code block has no line of code: put the code on its own lines"
        " between ```python and ```."
    )


def verify_code(problem, completion) -> Verdict:
    """Judges a program: right if it passes every test in problem.extra.

    Feedback is given unless that holds `feedback: false`.
    """
    tests = problem.extra
    code = extract_code(completion, tests.get("block", "longest"))
    if code.strip():
        judgement = judge(code, tests["inputs"], tests["outputs"], tests.get("fn_name"))
    else:
        judgement = Judgement(False, "no_code", 0, no_code(completion))
    feedback = judgement.feedback if tests.get("feedback", True) else ""
    rate = judgement.n_passed / len(tests["inputs"])
    return Verdict(float(judgement.passed), code, feedback, rate, judgement.status)
