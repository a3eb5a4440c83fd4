"""The one function that judges an answer, in training and evaluation alike."""

import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tasks.choice import verify_choice, verify_choice_lenient
from tasks.code import verify_code
from tasks.gym import verify_gym
from tasks.last_number import verify_last_number
from tasks.maths import verify_math
from tasks.nano import verify_steps
from tasks.problem import Verdict, checked, holdable
from tasks.sandbox import CORES

VERIFIERS = {
    "steps": verify_steps,
    "choice": verify_choice,
    "last_number": verify_last_number,
    "math": verify_math,
    "gym": verify_gym,
    "code": verify_code,
}


def verify(problem, completion, lenient=False) -> Verdict:
    """Judges one completion (text): a pure function of both. lenient concerns multiple choice.

    Raises ValueError, with verifier and problem, if the verifier fails or returns no verdict: see
    `checked`.
    """
    verifier = VERIFIERS[problem.verifier]
    if lenient and problem.verifier == "choice":
        verifier = verify_choice_lenient
    if not holdable(completion):  # what a model wrote is no fault of the verifier
        completion = completion.encode("utf-8", "replace").decode()
    try:
        verdict = verifier(problem, completion)
    except Exception as error:  # whatever a verifier of one's own raises
        if verifier is verify_code and isinstance(error, ValueError):  # there is no sandbox
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        # it may quote the completion, with a terminal's escape codes
        said = "".join(c if c.isprintable() else " " for c in str(error))
        raise ValueError(
            f"the verifier {problem.verifier} failed on problem {problem.id!r}:"
            f" {type(error).__name__} in {Path(last.filename).name}, line {last.lineno}:"
            f" {' '.join(said.split())[:300]}"
        ) from error
    try:
        return checked(verdict)
    except ValueError as error:
        raise ValueError(
            f"the verifier {problem.verifier} returned {error} for problem {problem.id!r}"
        ) from error


def verify_all(problems, completions, lenient=False) -> list[Verdict]:
    """Judges each pair, in order. Programs run side by side, as many as there are cores; all else
    in this thread, the only one that math-verify can interrupt.
    """
    pairs = list(enumerate(zip(problems, completions, strict=True)))
    programs = {}
    with ThreadPoolExecutor(CORES) as pool:
        for i, (problem, text) in pairs:
            if problem.verifier == "code":
                programs[i] = pool.submit(verify, problem, text)
        others = {i: verify(*pair, lenient) for i, pair in pairs if i not in programs}
        return [programs[i].result() if i in programs else others[i] for i, _ in pairs]
