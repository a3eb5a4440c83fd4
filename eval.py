"""Tasks, verdicts and estimators: what a problem is, when an answer is right, and what a set of answers is worth.

    load_task(name)               -> Task(train, dev, test), from JSON-lines files
    verify(problem, completion)   -> Verdict(reward, feedback): one function for training and evaluation alike
    avg_at_k, maj_at_k, best_at_k -> estimators over k samples a problem; `interval`, a bootstrap over problems

A task is a folder with `train.jsonl` and `test.jsonl`, one JSON object a line:

    id        text, unique in the task
    prompt    the user message
    answer    what the verifier compares with
    verifier  a name in VERIFIERS
    system    the system message (optional)

All other keys are kept in `Problem.extra`, out of every prompt. `nano` is the embedded task, `nano/7` another of its
worlds (`python nano/make.py world --seed 7`), `sciknoweval/chemistry` a domain of SciKnowEval in SDPO's files, a path any
folder of yours.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from math import comb
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import bootstrap

matplotlib.use("Agg")  # figures are files; no screen is needed
NANO = Path(__file__).resolve().parent / "nano"
SCIKNOWEVAL = ("biology", "chemistry", "material", "physics")


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
    """The splits of a task. dev is held out of the published training split (a deviation; dev=0 trains on all of it)."""

    name: str
    train: list[Problem]
    dev: list[Problem]
    test: list[Problem]


def from_sciknoweval(row) -> dict:
    """An item of SDPO's SciKnowEval files in our schema; its prompt ends in lines `A: text` and holds the published form."""
    letters = re.findall(r"^([A-Z]): ", str(row.get("prompt")), re.MULTILINE)
    if row.get("answer") not in letters:
        raise ValueError(f"the answer key {row.get('answer')!r} is none of the options {', '.join(letters)}")
    return {"id": str(row.get("idx", "")), "prompt": row["prompt"], "answer": row["answer"], "verifier": "choice",
            "system": row.get("system", "")}


def read_problems(path, convert=dict) -> list[Problem]:
    """The problems of a JSON-lines file, each row through `convert`. ValueError, with file and line, for what is not one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a task is a folder with a file for train and one for test")
    problems, seen = [], {}
    for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # not splitlines: texts hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {n} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {n} is not a JSON object")
        try:
            row = convert(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}") from error
        bad = [k for k in ("id", "prompt", "answer", "verifier") if not isinstance(row.get(k), str) or not row[k]]
        if bad:
            raise ValueError(f"{path}, line {n}: {' and '.join(bad)} must be given, as text")
        if row["verifier"] not in VERIFIERS:
            raise ValueError(f"{path}, line {n}: no verifier {row['verifier']!r}; there are {', '.join(VERIFIERS)}")
        if row["verifier"] == "last_number" and not re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]):
            raise ValueError(f"{path}, line {n}: the answer {row['answer']!r} is no number, as last_number wants it")
        if row["id"] in seen:
            raise ValueError(f"{path}, line {n} repeats the id {row['id']!r} of line {seen[row['id']]}")
        seen[row["id"]] = n
        known = {k: row.pop(k) for k in ("id", "prompt", "answer", "verifier")}
        problems.append(Problem(**known, system=row.pop("system", ""), extra=row))
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return problems


def load_task(name, dev=0.1, seed=42, data="") -> Task:
    """The task `nano`, `nano/SEED`, `sciknoweval/DOMAIN` or a folder's path.

    data: for sciknoweval, the folder that holds DOMAIN/train.json and test.json as SDPO publishes them. dev: the share of
    the training split that is held out, by `seed`, to select checkpoints on (the default seed is that of SDPO's own
    splits). Raises ValueError in one sentence for a task or file that can't be used.
    """
    ending, convert = "jsonl", dict
    if name == "nano" or name.startswith("nano/"):
        world = name.partition("/")[2] or "0"
        folder = NANO / "worlds" / world
        if not folder.is_dir():
            raise ValueError(f"there is no task {name!r}: make it with `python nano/make.py world --seed {world}`")
    elif name.startswith("sciknoweval/"):
        domain, ending, convert = name.partition("/")[2], "json", from_sciknoweval
        if domain not in SCIKNOWEVAL:
            raise ValueError(f"sciknoweval has no domain {domain!r}; it has {', '.join(SCIKNOWEVAL)}")
        folder = Path(data) / domain
        if not data or not folder.is_dir():
            raise ValueError(f"{name} needs --data, a folder with {domain}/train.json and test.json (SDPO's repository has "
                             f"it as datasets/sciknoweval){f'; {folder} is none' if data else ''}")
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise ValueError(f"there is no task {name!r}: give nano, nano/SEED, sciknoweval/DOMAIN or a folder with "
                             "train.jsonl and test.jsonl")
    train, test = (read_problems(folder / f"{split}.{ending}", convert) for split in ("train", "test"))
    if not 0 <= dev < 1:
        raise ValueError(f"dev={dev} is not a share of the training split: it must be at least 0 and below 1")
    held = set(random.Random(seed).sample(range(len(train)), round(dev * len(train))))
    return Task(name, [p for i, p in enumerate(train) if i not in held], [train[i] for i in sorted(held)], test)


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Verdict:
    """reward: 1.0 or 0.0. answer: what the estimators vote on. feedback: text for the teacher, empty where there is none."""

    reward: float
    answer: str
    feedback: str = ""


def verify_steps(problem, completion) -> Verdict:
    """nano: word by word equal to the answer, in which `vo=*` stands for any operation named for vo."""
    words, wanted = completion.split(), problem.answer.split()
    right = len(words) == len(wanted) and all(
        w == a or a.endswith("=*") and w.startswith(a[:-1]) for w, a in zip(words, wanted, strict=True))
    return Verdict(float(right), " ".join(w for w in words if "=" not in w))


def verify_choice(problem, completion) -> Verdict:
    """Multiple choice, SDPO's rule to the letter: what stands after the last <answer>, up to </answer>, is the key.

    Exact and case-sensitive. A bare `B` and an unclosed `<answer>B` pass, `b`, `B.` and `(B)` do not.
    """
    answer = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    return Verdict(float(answer == problem.answer), answer)


def verify_last_number(problem, completion) -> Verdict:
    """The last number of the text equals the answer, as numbers: for sums, and for tasks of your own."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", completion)
    return Verdict(float(bool(numbers) and float(numbers[-1]) == float(problem.answer)), numbers[-1] if numbers else "")


VERIFIERS = {"steps": verify_steps, "choice": verify_choice, "last_number": verify_last_number}


def verify(problem, completion) -> Verdict:
    """The verdict on one completion (text): a pure function of both."""
    return VERIFIERS[problem.verifier](problem, completion)


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


def maj_at_k(rewards, answers) -> float:
    """The share of problems whose most frequent answer is right; a tie counts in expectation. answers: (problems, k)."""
    scores = []
    for row, said in zip(rewards, answers, strict=True):
        votes = Counter(said)
        top = [a for a, n in votes.items() if n == max(votes.values())]
        right = {a for a, r in zip(said, row, strict=True) if r}
        scores.append(sum(a in right for a in top) / len(top))
    return float(np.mean(scores))


def interval(per_problem, seed=0, draws=10_000) -> tuple[float, float] | None:
    """The 95% percentile-bootstrap interval of a mean over problems: other test questions, not other training seeds.

    None for fewer than two problems, which say nothing about others.
    """
    if len(per_problem) < 2:
        return None
    found = bootstrap((np.asarray(per_problem, dtype=float),), np.mean, n_resamples=draws, method="percentile", rng=seed)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def plot_curves(curves, path, title):
    """Learning curves with intervals, as a PNG. curves: {name: rows of its metrics.jsonl}; those of test are drawn."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, rows in curves.items():
        rows = [row for row in rows if row.get("split") == "test"]
        steps, values = [row["step"] for row in rows], [row["avg_at_k"] for row in rows]
        lows, highs = zip(*(row["interval"] or [row["avg_at_k"]] * 2 for row in rows), strict=True)
        line, = axes.plot(steps, values, marker="o", markersize=3, label=name)
        axes.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="share of answers that are right", title=title, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(summaries) -> str:
    """The results of one or more runs: held-out avg@k of the memory-free policy, with 95% intervals over problems."""
    def cell(row):
        return f"{row['avg_at_k']:.3f}" + (" [{:.3f}, {:.3f}]".format(*row["interval"]) if row.get("interval") else "")

    first = next(iter(summaries.values()))
    rows = [("", f"avg@{first['final']['k']} on {first['final']['n_problems']} held-out problems, no memory in the prompt")]
    rows += [("base policy", cell(first["base"]))]
    for name, s in summaries.items():
        rows += [(f"{name}, after training", cell(s["final"]))]
        if s["dev_best"]:
            rows += [(f"{name}, best on dev", f"{cell(s['dev_best'])}  at step {s['dev_best']['step']}")]
        rows += [(f"{name}, best on test", f"{cell(s['test_best'])}  at step {s['test_best']['step']}, selected on test "
                                           f"among {s['test_best']['n_checkpoints_searched']} checkpoints")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}s}  {value}" for name, value in rows)
