"""The embedded task: attempts step by step, and a verifier that may say which step was wrong."""

import re
from pathlib import Path

from tasks.problem import Verdict

NANO = Path(__file__).resolve().parent.parent / "nano"


def task_folder(name) -> Path:
    """The folder of a task's files: nano/worlds/SEED for nano/SEED, nano/worlds/plain/SEED for
    nano/plain/SEED.
    """
    if name == "nano" or name.startswith("nano/"):
        _, *kind = name.split("/")
        plain = kind[:1] == ["plain"]
        seed = "/".join(kind[plain:]) or "0"
        folder = NANO / "worlds" / ("plain" if plain else "") / seed
        if not (folder / "train.jsonl").is_file():
            raise ValueError(
                f"there is no task {name!r}: make it with `python nano/make.py world --seed {seed}"
                f"{' --plain' * plain}`"
            )
        return folder
    if not Path(name).is_dir():
        raise ValueError(
            f"there is no task {name!r}: give nano, nano/plain, nano/SEED, nano/plain/SEED, "
            "sciknoweval/DOMAIN, livecodebench or a folder with train.jsonl and test.jsonl"
        )
    return Path(name)


def verify_steps(problem, completion) -> Verdict:
    """nano: word by word equal to the answer, in which `vo=*` stands for any operation named for
    vo. A confidence at the end (`Confidence: 0.50`) is no part of it.

    In a world that speaks (`feedback: true`) the verdict on a failure says which step was the first
    wrong one, by the operation that was named there: `vo!rev`. Nothing where no operation is to
    blame: the right one was miscalculated, or the completion lost the form of an answer.
    """
    words, wanted = (
        re.sub(r"\s+Confidence: \d\.\d\d\s*\Z", "", completion).split(),
        problem.answer.split(),
    )
    fits = [
        w == a or a.endswith("=*") and w.startswith(a[:-1])
        for w, a in zip(words, wanted, strict=False)
    ]
    right = len(words) == len(wanted) and all(fits)
    feedback = (
        "" if right or not problem.extra.get("feedback") else first_wrong_step(problem, words, fits)
    )
    compared = " ".join(w.partition("=")[0] + "=*" if "=" in w else w for w in words)
    return Verdict(float(right), compared, feedback)


def first_wrong_step(problem, words, fits) -> str:
    """`vo!rev` where the digits after vo=rev are the first words that miss the answer, and vo hides
    another; else "".
    """
    first = fits.index(False) if False in fits else len(fits)
    steps = [word for word in words[:first] if "=" in word]
    if first == len(fits) or not words[first].isdigit() or not steps:
        return ""
    syllable, _, operation = steps[-1].partition("=")
    if (
        not re.fullmatch("[a-z]+", operation)
        or steps[-1] in problem.extra.get("hidden", "").split()
    ):
        return ""
    return f"{syllable}!{operation}"
