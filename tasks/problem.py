"""A problem, a task and a verdict, with the checks of what a verifier returns."""

import math
from dataclasses import dataclass, field, replace
from numbers import Real

import numpy as np


@dataclass(frozen=True)
class Problem:
    """Is one question. The student sees its `prompt` and its `system` message, and nothing else."""

    id: str
    prompt: str
    answer: str
    verifier: str
    system: str = ""
    extra: dict = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Task:
    """Holds the splits of a task. dev is held out of the published training split (deviation 3).

    name: with what a report has to say of it, such as a window. card: what is known to be wrong
    with the data.
    """

    name: str
    train: list[Problem]
    dev: list[Problem]
    test: list[Problem]
    card: str = ""


SUCCESS = 0.5  # a reward of at least this is a success (SDPO code: success_reward_threshold)
# characters of feedback that are kept: it is tokenised for every teacher and every reflection
MAX_FEEDBACK = 20_000


@dataclass(frozen=True)
class Verdict:
    """Says how good one answer is.

    reward: a number from 0 to 1. answer: text that the estimators vote on, the same for all answers
    that the verifier takes for equal. feedback: text for the teacher, or "". For programs,
    test_pass_rate is the share of tests passed (never the reward), and status that of Judgement, or
    no_code.
    """

    reward: float
    answer: str
    feedback: str = ""
    test_pass_rate: float | None = None
    status: str = ""


def checked(verdict) -> Verdict:
    """Gives the verdict with numbers of Python's own, its feedback cut to MAX_FEEDBACK.

    Raises ValueError, with what is wrong and what it has to be, if estimators, memory or records
    could not use it.
    """
    if not isinstance(verdict, Verdict):
        raise ValueError(f"{shown(verdict)}, where it has to return a Verdict")
    reward, rate, answer = number(verdict.reward), number(verdict.test_pass_rate), verdict.answer
    if reward is None or not 0 <= reward <= 1:  # a NaN is not
        raise ValueError(
            f"the reward {shown(verdict.reward)}, where it has to be a number from 0 to 1"
        )
    if verdict.test_pass_rate is not None and (rate is None or not 0 <= rate <= 1):
        raise ValueError(
            f"the test_pass_rate {shown(verdict.test_pass_rate)}, where it has to be None or from 0"
            " to 1"
        )
    if number(answer) is not None:
        answer = str(answer)
    for name, text in (
        ("answer", answer),
        ("feedback", verdict.feedback),
        ("status", verdict.status),
    ):
        if not isinstance(text, str):
            raise ValueError(f"the {name} {shown(text)}, where it has to be a text")
        if not holdable(text):
            raise ValueError(
                f"the {name} {shown(text)}, with half a surrogate pair, which UTF-8 can't hold"
            )
    feedback = verdict.feedback.replace("\0", "\ufffd")  # a program may print one
    if len(feedback) > MAX_FEEDBACK:
        feedback = f"{feedback[:MAX_FEEDBACK]}\n[cut here: {len(feedback)} characters]"
    return replace(verdict, reward=reward, test_pass_rate=rate, answer=answer, feedback=feedback)


def number(value) -> float | None:
    """Makes a float of a number or truth value of Python or numpy; None of anything else."""
    try:
        return float(value) if isinstance(value, (Real, np.bool_)) else None
    except OverflowError:  # a whole number, or a fraction, beyond floats
        return math.inf


def shown(value) -> str:
    """Writes a value in an error: on one line, and short."""
    text = " ".join(ascii(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def holdable(text) -> bool:
    """Says whether UTF-8 can hold a text: not half a surrogate pair, as JSON's escapes allow."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False
