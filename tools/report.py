"""Prints the paper's Tables 2, 3, 4, 5 and 7 for the runs at hand, beside the paper's numbers.

    python eval.py compare RUN RUN ...

It reads the folders of finished runs: config.json, metrics.jsonl, evals/STEP-test.jsonl. The
estimators are eval.py's. figures.py draws the same runs.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pandas as pd

from eval import Answers, interval, names, resample
from runtime.tables import aligned, percent
from tasks.livecodebench import WINDOW
from tools.run_files import answers_of, metrics_of, need_whole, read_config

# ------------------------------------------------------------------------------------------------
# The paper's rows, columns and numbers
# ------------------------------------------------------------------------------------------------

SCIKNOWEVAL = {
    "sciknoweval/biology": "Biology",
    "sciknoweval/chemistry": "Chemistry",
    "sciknoweval/physics": "Physics",
    "sciknoweval/material": "Materials",
}
LIVECODEBENCH = f"livecodebench (sdpo, {WINDOW[0]} to {WINDOW[1]})"
TASKS = {**SCIKNOWEVAL, "AVG": "AVG", LIVECODEBENCH: "LCB v6"}  # the columns of Tables 2 to 4
QWEN = "Qwen3-8B"
OLMO = "OLMo3-Instruct-7B"
FROZEN = "Evolving memory + frozen policy"
METHODS = {
    "eval": "Base",
    "grpo": "GRPO",
    "sdpo": "SDPO",
    "pmd": "PMD",
    "pmd-transient": "PMD-Transient",
    "frozen-memory": "Frozen memory + evolving policy",
    "frozen-policy": FROZEN,
}


def paper_rows(text) -> dict:
    """Reads lines `method | model | numbers` as {method: {model: numbers}}."""
    rows = {}
    for line in text.strip().splitlines():
        method, model, numbers = [cell.strip() for cell in line.split("|")]
        rows.setdefault(method, {})[model] = [float(number) for number in numbers.split()]
    return rows


TABLE_2 = """
Base | Qwen3-8B          | 32.4  41.6  58.5  59.2  47.9  27.1
Base | OLMo3-Instruct-7B | 15.4  22.6  35.9  36.7  27.7  27.7
GRPO | Qwen3-8B          | 63.2  73.2  70.6  70.7  69.4  41.2
GRPO | OLMo3-Instruct-7B | 45.8  70.1  63.3  76.5  63.9  36.1
SDPO | Qwen3-8B          | 63.6  80.6  72.8  80.4  74.4  47.9
SDPO | OLMo3-Instruct-7B | 54.1  79.0  66.1  76.8  69.5  45.0
PMD  | Qwen3-8B          | 68.5  82.8  74.7  82.9  77.2  51.7
PMD  | OLMo3-Instruct-7B | 66.1  81.3  68.2  77.4  73.3  51.1
"""
TABLE_3 = """
Evolving memory + frozen policy | Qwen3-8B | 34.3  49.8  60.9  70.8  54.0  35.9
Frozen memory + evolving policy | Qwen3-8B | 44.6  77.7  63.1  74.5  65.0  47.5
PMD-Transient                   | Qwen3-8B | 67.4  81.8  73.8  79.8  75.7  48.1
PMD                             | Qwen3-8B | 68.5  82.8  74.7  82.9  77.2  51.7
"""
TABLE_4 = """
Evolving memory + frozen policy (experience)         | Qwen3-8B | 42.3  53.5  59.1  68.8  55.9
Evolving memory + frozen policy (experience,insight) | Qwen3-8B | 50.4  52.5  62.6  67.8  58.3
Evolving memory + frozen policy                      | Qwen3-8B | 45.6  54.4  59.5  69.4  57.2
PMD (experience)                                     | Qwen3-8B | 63.0  80.6  73.3  80.4  74.3
PMD (experience,insight)                             | Qwen3-8B | 67.1  82.1  75.2  78.2  75.7
PMD                                                  | Qwen3-8B | 68.5  82.7  74.1  83.6  77.2
"""
TABLES = {
    2: ("main results", paper_rows(TABLE_2)),
    3: ("mechanism controls", paper_rows(TABLE_3)),
    4: ("memory levels", paper_rows(TABLE_4)),
}
LENGTHS = {  # Table 5: correct, and mean, median, most and fewest tokens
    ("Biology", QWEN, "GRPO"): "63.2 2457 1306 8192 492",
    ("Biology", QWEN, "SDPO"): "63.6 186 185 251 120",
    ("Biology", QWEN, "PMD"): "68.5 481 474 711 296",
}
COSTS = {(QWEN, "SDPO"): "37.0 54.6", (QWEN, "PMD"): "53.6 54.9"}  # Table 7: seconds, GB

# ------------------------------------------------------------------------------------------------
# Runs, and the rows of tables that they make
# ------------------------------------------------------------------------------------------------

# The options in which the seeds of one row may differ.
FREE = (
    "seed name out resume device nproc data memory_from log log_every save_every keep max_minutes"
).split()


def task_of(config) -> str:
    """Names a run's task, with each option that changes its test problems."""
    task = config["task"]
    if task == "livecodebench":
        task += f" ({config['protocol']}, {config['since']} to {config['until']})"
    if config.get("exclude_flagged"):
        task += " without flagged items"
    return task


def names_of(config) -> tuple[str, str, str]:
    """Returns a run's model, its label in the tables, and its series in Figure 2.

    An evaluation is named after the run that trained its weights and after the memory in its
    prompt. It is a frozen policy's row if it answers as the frozen policy that wrote the memory.
    A method outside the paper is named as it was given to --method.
    """
    method = config["method"]
    weights, memory = Path(config["model"]), Path(config["memory_from"])
    model = OLMO if weights.name == "Olmo-3-7B-Instruct" else weights.name
    series = METHODS.get(method, method)
    lender = {}
    if method == "eval":
        folders = weights.parents if weights.is_absolute() else ()  # else a name of the Hub
        trained = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
        if trained:
            model, *_ = names_of(read_config(trained[0] / "config.json"))
            series = f"{weights.name} of {trained[0].name}"
        if memory.name:
            series += f", memory of {memory.parent.name} in the prompt, top-{config['retrieve_k']}"
            path = memory.parent / "config.json"
            if path.is_file():
                lender = read_config(path)
    prompt = {key: config[key] for key in ("model", "task", "retrieve_k")}
    replays = (prompt | {"method": "frozen-policy"}).items() <= lender.items()
    label = FROZEN if replays else series
    variant = ""
    if config["tiers"].count(",") < 2:
        variant = f" ({config['tiers']})"
    if config.get("mcq") == "lenient":
        variant += ", lenient"
    return model, label + variant, series + variant


class Run:
    """Reads the folder of a run, or of an evaluation by `python eval.py --model`.

    selected: {base, final, dev, test: step}, the checkpoints that are reported.
    looks: how many checkpoints were evaluated on test.
    steps, seconds: of the training steps, their rows of metrics.jsonl and their durations.
    tests: {step: row of metrics.jsonl} of the evaluations on test.
    Raises ValueError if the folder holds no run, or no evaluation on test.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        path, metrics = self.folder / "config.json", self.folder / "metrics.jsonl"
        if not path.is_file() or not metrics.is_file():
            raise ValueError(f"{folder} is no run: it has no config.json and metrics.jsonl")
        self.config = read_config(path)
        self.seed = self.config["seed"]
        self.lenient = self.config.get("mcq") == "lenient"
        self.task = task_of(self.config)
        self.model, self.label, self.series = names_of(self.config)
        self.answered = {}
        self.steps, self.seconds, self.tests = [], [], {}
        self.peak = 0
        scores = defaultdict(dict)
        for row in metrics_of(metrics):
            if "split" in row:
                scores[row["split"]][row["step"]] = row["avg_at_k"]
                if row["split"] == "test":
                    self.tests[row["step"]] = row
                continue
            spent = [t for name, t in row["seconds"].items() if name not in ("evaluate", "save")]
            self.steps.append(row)
            self.seconds.append(sum(spent))
            self.peak = max(self.peak, row.get("peak_gb", 0))
        dev, test = scores["dev"], scores["test"]
        if not test:
            raise ValueError(f"{folder} has no evaluation on test yet")
        self.looks = len(test)
        self.selected = {"base": min(test), "final": max(test), "test": max(test, key=test.get)}
        self.selected["dev"] = max(dev, key=dev.get, default=None)

    def answers(self, which) -> Answers:
        """Returns the answers at a `selected` checkpoint."""
        step = self.selected[which]
        if step not in self.answered:
            path = self.folder / f"evals/{step}-test.jsonl"
            found = Answers.of(answers_of(path), path)
            need_whole(path, *found.rewards.shape, self.tests[step])
            self.answered[step] = found
        return self.answered[step]


def mean_reward(answers):
    return answers.rewards.mean(1)


def per_problem(runs, which, estimate=mean_reward) -> pd.DataFrame:
    """Returns (runs, problems) estimates, of the problems that all runs were asked."""
    answered = [run.answers(which) for run in runs]
    rows = [pd.Series(estimate(answers), answers.ids) for answers in answered]
    return pd.DataFrame(rows).dropna(axis="columns")


@dataclass
class Row:
    """Holds the runs behind a row of a table: one method, and all seeds of one configuration.

    parts: lists of runs, one list for each task. The row of an average has four.
    which: `base` for the scores before the first step, else `final`.
    """

    label: str
    parts: list
    which: str = "final"

    def __post_init__(self):
        self.runs = self.parts[0]
        self.run = self.runs[0]
        self.model = self.run.model
        self.task = TASKS.get(self.run.task, self.run.task)
        if len(self.parts) > 1:
            self.task = "AVG"
        self.method = self.label.partition(" [")[0]
        self.head = {"task": self.task, "model": self.model, "method": self.label}
        self.trained = self.runs if self.which == "final" else []
        self.scores = per_problem(self.runs, self.which)

    def estimate(self, which, estimator=mean_reward) -> tuple[float, float, float]:
        """Returns a mean over tasks, runs and problems, and its interval.

        The interval is NaN if all problems of a task are of one group.
        """
        means, draws = [], []
        for seed, runs in enumerate(self.parts):
            values = per_problem(runs, which, estimator)
            means.append(values.to_numpy().ravel().mean())
            groups = names(runs[0].task, values)
            drawn = [np.nan]
            if len(set(groups)) > 1:
                drawn = resample(values, groups, seed)
            draws.append(drawn)
        return np.mean(means), *np.percentile(np.mean(draws, 0), [2.5, 97.5])

    def size(self) -> str:
        """Writes how much was evaluated."""
        if len(self.parts) > 1:
            return f"{len(self.parts)} domains"
        seeds, problems = self.scores.shape
        k = self.run.answers(self.which).rewards.shape[1]
        text = f"{problems} x {k}"
        return f"{text} x {seeds} seeds" if seeds > 1 else text

    @cached_property
    def results(self) -> dict:
        """Writes the scores of the three checkpoints that are reported."""
        runs = list(chain(*self.parts))
        looks = max(run.looks for run in runs)
        steps = [run.selected["dev"] for run in runs]
        dev = test = ""
        if self.trained and looks > 1:
            mean, *_ = self.estimate("test")  # test itself selected: no interval holds
            test = f"{percent(mean)} (of {looks})"
            if None not in steps:
                dev = f"{percent(*self.estimate('dev'))} @{','.join(map(str, steps))}"
        return self.head | {
            "problems x k": self.size(),
            "final": percent(*self.estimate(self.which)),
            "dev-selected": dev,
            "best on test": test,
        }


def seeds_together(runs) -> list[list[Run]]:
    """Groups runs that differ in their seed alone. One seed twice makes two groups."""
    groups = {}
    for run in runs:
        options = {key: value for key, value in run.config.items() if key not in FREE}
        key = json.dumps([run.label, options])
        while run.seed in [other.seed for other in groups.get(key, [])]:
            key += " again"
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def block(groups) -> list[Row]:
    """Makes the rows of one task and model, out of groups of runs.

    Rows of one label are told apart by their folders. The row Base shows an evaluation of the base
    policy, or else the scores of a run before its first step.
    """
    labels = [runs[0].label for runs in groups]
    rows = []
    for runs in groups:
        label = runs[0].label
        if labels.count(label) > 1:
            label += f" [{runs[0].folder.name}]"
        rows.append(Row(label, [runs]))
    started = [row.run for row in rows if row.run.steps and row.run.selected["base"] == 0]
    for run in sorted(started, key=lambda run: run.lenient)[:1]:
        label = "Base, lenient" if run.lenient else "Base"
        if label not in labels:
            rows.insert(0, Row(label, [[run]], "base"))
    return rows


def blocks_of(folders) -> list[list[Row]]:
    """Makes the rows of all tables, in lists of one task and model, in the paper's order.

    Rows of one model and label in all four domains of SciKnowEval make a row of their average.
    """

    def order(place):
        task, model = place
        return [*TASKS, task].index(task), [QWEN, OLMO, model].index(model)

    groups, domains = {}, {}
    for runs in seeds_together(map(Run, folders)):
        groups.setdefault((runs[0].task, runs[0].model), []).append(runs)
    blocks = {place: block(groups[place]) for place in sorted(groups, key=order)}
    for (task, model), rows in blocks.items():
        if task in SCIKNOWEVAL:
            for row in rows:
                domains.setdefault((model, row.label), []).append(row)
    for (model, label), rows in domains.items():
        if len(rows) == 4:
            average = Row(label, [row.runs for row in rows], rows[0].which)
            blocks.setdefault(("AVG", model), []).append(average)
    return [blocks[place] for place in sorted(blocks, key=order)]


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

COMPARED = f"""\
avg@k in percent, with 95% bootstrap intervals over problems (on nano over names), and over seeds
where there are several. dev-selected: at the step @ that was best on the dev split. best on test:
the best of (so many) checkpoints by the very problems it is measured on; no interval holds for it,
and the paper's own numbers seem to be of this kind. A frozen policy has the memory in its prompt;
all others are evaluated without. LCB v6: protocol sdpo, {WINDOW[0]} to {WINDOW[1]}. There, as with
protocol official, the dev problems are test problems too, judged by fewer of their tests, so that
dev-selected is in part selected on test."""
TITLE_7 = (
    "cost of a step, evaluation and saving left out; peak memory of the GPU, or else of the process"
)


def results(blocks, numbers):
    """Yields the lines of Table 2, 3 or 4, given the paper's numbers.

    Rows of a task and model without a trained one are left out.
    """
    for rows in blocks:
        shown = [row for method in numbers for row in rows if row.method == method]
        if not any(row.trained for row in shown):
            continue
        for row in shown:
            published = numbers[row.method].get(row.model, [])
            by_task = dict(zip(TASKS.values(), published, strict=False))
            yield row.results | {"paper": f"{by_task.get(row.task, '-')}"}


def lengths(rows):
    """Yields the lines of Table 5."""
    for row in rows:
        tokens = np.concatenate([run.answers(row.which).tokens.ravel() for run in row.runs])
        sizes = pd.Series(tokens).agg(["mean", "median", "max", "min"]).map("{:.0f}".format)
        paper = LENGTHS.get((row.task, row.model, row.label), "-")
        correct = percent(row.scores.to_numpy().mean())
        yield {**row.head, "correct": correct, **sizes, "paper: the same five": paper}


def costs(blocks):
    """Yields the lines of Table 7."""
    for rows in blocks:
        seconds = {row.label: [t for run in row.trained for t in run.seconds] for row in rows}
        sdpo = seconds.get("SDPO")
        for row in rows:
            if not seconds[row.label]:
                continue
            low, median, high = np.percentile(seconds[row.label], [25, 50, 75])
            peak = max(run.peak for run in row.runs)
            yield row.head | {
                "median s": f"{median:.3g}",
                "quartiles": f"{low:.3g}, {high:.3g}",
                "to SDPO": f"{median / np.median(sdpo):.2f}" if sdpo else "-",
                "peak GB": f"{peak:.1f}" if peak else "-",
                "paper: s, GB": COSTS.get((row.model, row.label), "-"),
            }


def differences(blocks):
    """Yields the lines of all pairs of rows of one task and model, paired by problem.

    Seeds are paired in their order if both rows have equally many, else the means over seeds are.
    """
    for a, b in chain(*(combinations(rows, 2) for rows in blocks)):
        theirs, ours = a.scores.align(b.scores, "inner", axis="columns")
        groups = names(a.run.task, ours)
        if len(ours) != len(theirs):
            ours, theirs = ours.mean(), theirs.mean()
        gaps = ours.to_numpy() - theirs.to_numpy()
        if groups:
            difference = percent(gaps.mean(), *(interval(gaps, groups) or ()))
            line = {"task": a.task, "model": a.model, "methods": f"{b.label} - {a.label}"}
            yield line | {"problems": f"{len(groups)}", "difference": difference}


def unfinished(blocks):
    """Yields a sentence for each training run that has not come to its end."""
    for run in dict.fromkeys(chain(*(row.trained for row in chain(*blocks)))):
        if run.config["method"] != "eval" and not (run.folder / "summary.json").is_file():
            yield (
                f"{run.folder} is not finished: its final step here is"
                f" {run.selected['final']}, the last that was evaluated"
            )


def compare(folders) -> str:
    """Prints Tables 2, 3, 4, 5 and 7 of the paper for runs, and their differences by problem."""
    blocks = blocks_of(folders)
    single = [rows for rows in blocks if rows[0].task != "AVG"]
    known = {"Base"}
    text = [COMPARED, *unfinished(single)]
    for number, (title, numbers) in TABLES.items():
        known |= numbers.keys()
        text += [f"\nTable {number}: {title}", aligned(results(blocks, numbers))]
    others = [row.results for row in chain(*blocks) if row.method not in known]
    if others:
        text += ["\nNot in the paper's tables", aligned(others)]
    text += ["\nTable 5: tokens of a completion, at the final step"]
    text += [aligned(lengths(chain(*single)))]
    text += ["\nTable 6: not reproduced; the authors annotated it by hand"]
    text += [f"\nTable 7: {TITLE_7}", aligned(costs(single))]
    text += ["\nDifferences at the final step, paired by problem", aligned(differences(single))]
    return "\n".join(text)
