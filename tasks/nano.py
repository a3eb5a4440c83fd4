"""The embedded task: attempts step by step, and a verifier that may say which step was wrong."""

import re
from pathlib import Path

from tasks.problem import Verdict

NANO = Path(__file__).resolve().parent.parent / "nano"


def task_folder(name) -> Path:
    """Finds the folder of a task's files.

    That is nano/worlds/SEED for nano/SEED, nano/worlds/plain/SEED for nano/plain/SEED, and the path
    itself for any other. Raises ValueError if there is none.
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
            "sciknoweval/DOMAIN, livecodebench, gym/NAME, a jsonl, json, csv or parquet file, a "
            "folder with train.jsonl and test.jsonl, or OWNER/NAME on the Hub"
        )
    return Path(name)


def verify_steps(problem, completion) -> Verdict:
    """Compares word by word with the answer, in which `vo=*` stands for any operation of vo.

    A confidence at the end (`Confidence: 0.50`) is no part of an answer. In a world that speaks
    (`feedback: true`) the verdict on a failure names the first wrong step, by the operation that
    was named there: `vo!rev`. It names none where no operation is to blame: the right one was
    miscalculated, or the completion lost the form of an answer.
    """
    words = re.sub(r"(?<!\s)\s+Confidence: \d\.\d\d\s*\Z", "", completion).split()
    wanted = problem.answer.split()
    fits = []
    for word, want in zip(words, wanted, strict=False):
        fits.append(word == want or want.endswith("=*") and word.startswith(want[:-1]))
    right = len(words) == len(wanted) and all(fits)
    feedback = ""
    if not right and problem.extra.get("feedback"):
        feedback = first_wrong_step(problem, words, fits)
    compared = " ".join(w.partition("=")[0] + "=*" if "=" in w else w for w in words)
    return Verdict(float(right), compared, feedback)


def first_wrong_step(problem, words, fits) -> str:
    """Gives `vo!rev` if the digits after vo=rev are the first wrong words and vo hides another
    operation, else "".
    """
    first = fits.index(False) if False in fits else len(fits)
    steps = [word for word in words[:first] if "=" in word]
    if first == len(fits) or not words[first].isdigit() or not steps:
        return ""
    syllable, _, operation = steps[-1].partition("=")
    is_right = steps[-1] in problem.extra.get("hidden", "").split()
    if is_right or not re.fullmatch("[a-z]+", operation):
        return ""
    return f"{syllable}!{operation}"
