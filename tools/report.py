"""Prints tables and draws figures: those of a run, and the paper's for the runs at hand.

    python eval.py compare RUN RUN ...     Tables 2, 3, 4, 5 and 7, beside the paper's numbers
    python eval.py figures RUN RUN ...     Figures 2 to 6, as PNG with their data as CSV

The first section is what an evaluation prints of itself. All other sections read the folders of
finished runs (config.json, metrics.jsonl, evals/STEP-test.jsonl). The estimators are eval.py's.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eval import Answers, coverage, headroom, interval, names, resample
from runtime.tables import aligned, percent
from tasks.files import json_lines
from tasks.livecodebench import WINDOW
from tasks.problem import SUCCESS

matplotlib.use("Agg")  # figures are files; no screen is needed


# ------------------------------------------------------------------------------------------------
# What an evaluation prints of itself
# ------------------------------------------------------------------------------------------------


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

CONFIG = "task model method seed tiers memory_from retrieve_k".split()  # the keys that are read
STEP = "step seconds keywords memory".split()
EVALUATION = "step avg_at_k".split()
ANSWER = "problem reward answer tokens".split()
FREE = (  # options in which the seeds of one row may differ
    "seed name out resume device nproc data memory_from log log_every save_every keep max_minutes"
).split()


def need(row, keys, where) -> dict:
    """Returns the row.

    Raises ValueError if it lacks one of the keys.
    """
    for key in keys:
        if key not in row:
            raise ValueError(f"{where} has no {key}")
    return row


def read_config(path) -> dict:
    """Reads a config.json.

    Raises ValueError if it is not JSON, or lacks a key that is read here.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not JSON: {error.msg}") from error
    return need(config, CONFIG, path)


def task_of(config) -> str:
    """Names a run's task, with all that makes its test problems others."""
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
    """
    weights, memory = Path(config["model"]), Path(config["memory_from"])
    model = OLMO if weights.name == "Olmo-3-7B-Instruct" else weights.name
    series, lender = METHODS.get(config["method"], "Base"), {}
    if config["method"] == "eval":
        trained = [folder for folder in weights.parents if (folder / "metrics.jsonl").is_file()]
        if trained:
            model, *_ = names_of(read_config(trained[0] / "config.json"))
            series = f"{weights.name} of {trained[0].name}"
        if memory.name:
            series += f", memory of {memory.parent.name} in the prompt, top-{config['retrieve_k']}"
            path = memory.parent / "config.json"
            lender = read_config(path) if path.is_file() else {}
    prompt = {key: config[key] for key in ("model", "task", "retrieve_k")}
    replays = (prompt | {"method": "frozen-policy"}).items() <= lender.items()
    variant = "" if config["tiers"].count(",") == 2 else f" ({config['tiers']})"
    if config.get("mcq") == "lenient":
        variant += ", lenient"
    return model, (FROZEN if replays else series) + variant, series + variant


class Run:
    """Reads what a run, or an evaluation of `python eval.py --model`, left in its folder.

    selected: {base, final, dev, test: step}, the checkpoints that are reported.
    looks: how many checkpoints were evaluated on test.
    Raises ValueError if the folder holds no run, or no evaluation on test.
    """

    def __init__(self, folder):
        self.folder, self.answered = Path(folder), {}
        path, metrics = self.folder / "config.json", self.folder / "metrics.jsonl"
        if not path.is_file() or not metrics.is_file():
            raise ValueError(f"{folder} is no run: it has no config.json and metrics.jsonl")
        self.config = read_config(path)
        self.seed, self.lenient = self.config["seed"], self.config.get("mcq") == "lenient"
        self.task = task_of(self.config)
        self.model, self.label, self.series = names_of(self.config)
        self.steps, self.seconds, self.peak = [], [], 0
        scores = defaultdict(dict)
        for n, row in json_lines(metrics):
            need(row, EVALUATION if "split" in row else STEP, f"{metrics}, line {n}")
            if "split" in row:
                scores[row["split"]][row["step"]] = row["avg_at_k"]
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
        """Returns its answers at a `selected` checkpoint."""
        step = self.selected[which]
        if step not in self.answered:
            path = self.folder / f"evals/{step}-test.jsonl"
            rows = [need(row, ANSWER, f"{path}, line {n}") for n, row in json_lines(path)]
            self.answered[step] = Answers.of(rows, path)
        return self.answered[step]


def avg(answers):
    return answers.rewards.mean(1)


def per_problem(runs, which, estimate=avg) -> pd.DataFrame:
    """Returns (runs, problems) estimates, of the problems that all runs were asked."""
    found = [run.answers(which) for run in runs]
    rows = [pd.Series(estimate(answers), answers.ids) for answers in found]
    return pd.DataFrame(rows).dropna(axis="columns")


@dataclass
class Row:
    """A row of a table: the runs of a method, of several seeds if they differ in nothing else.

    parts: lists of runs, one list for each task; the row of an average has four.
    which: `base` for what the runs scored before their first step, else `final`.
    """

    label: str
    parts: list
    which: str = "final"

    def __post_init__(self):
        self.runs = self.parts[0]
        self.run = self.runs[0]
        self.model = self.run.model
        self.task = TASKS.get(self.run.task, self.run.task) if len(self.parts) == 1 else "AVG"
        self.method = self.label.partition(" [")[0]
        self.head = {"task": self.task, "model": self.model, "method": self.label}
        self.trained = self.runs if self.which == "final" else []
        self.scores = per_problem(self.runs, self.which)

    def estimate(self, which, of=avg) -> tuple[float, float, float]:
        """Returns a mean over tasks, runs and problems, and its interval.

        The interval is NaN if all problems of a task are of one group.
        """
        means, draws = [], []
        for seed, runs in enumerate(self.parts):
            values = per_problem(runs, which, of)
            groups = names(runs[0].task, values)
            means.append(values.to_numpy().ravel().mean())
            draws.append(resample(values, groups, seed) if len(set(groups)) > 1 else [np.nan])
        return np.mean(means), *np.percentile(np.mean(draws, 0), [2.5, 97.5])

    def size(self) -> str:
        """Writes how much was evaluated."""
        seeds, problems = self.scores.shape
        k = self.run.answers(self.which).rewards.shape[1]
        if len(self.parts) > 1:
            return f"{len(self.parts)} domains"
        return f"{problems} x {k} x {seeds} seeds" if seeds > 1 else f"{problems} x {k}"

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
        final = percent(*self.estimate(self.which))
        found = {"problems x k": self.size(), "final": final}
        return self.head | found | {"dev-selected": dev, "best on test": test}


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

    Rows of one label are told apart by their folders. The row Base is what a run scored before its
    first step, unless there is an evaluation of the base policy.
    """
    rows, labels = [], [runs[0].label for runs in groups]
    for runs in groups:
        label = runs[0].label
        if labels.count(label) > 1:
            label += f" [{runs[0].folder.name}]"
        rows.append(Row(label, [runs]))
    started = [row.run for row in rows if row.run.steps and row.run.selected["base"] == 0]
    for run in sorted(started, key=lambda run: run.lenient)[:1]:
        base = Row("Base, lenient" if run.lenient else "Base", [[run]], "base")
        if base.label not in labels:
            rows.insert(0, base)
    return rows


def blocks_of(folders) -> list[list[Row]]:
    """Makes the rows of all tables, in lists of one task and model, in the paper's order.

    A row that a model has in all four domains of SciKnowEval makes one of their average.
    """

    def order(place):
        task, model = place
        return [*TASKS, task].index(task), [QWEN, OLMO, model].index(model)

    groups, domains = {}, {}
    for runs in seeds_together(map(Run, folders)):
        groups.setdefault((runs[0].task, runs[0].model), []).append(runs)
    blocks = {place: block(groups[place]) for place in sorted(groups, key=order)}
    for (task, model), rows in blocks.items():
        for row in rows if task in SCIKNOWEVAL else []:
            domains.setdefault((model, row.label), []).append(row)
    for (model, label), rows in domains.items():
        if len(rows) == 4:
            average = Row(label, [row.runs for row in rows], rows[0].which)
            blocks.setdefault(("AVG", model), []).append(average)
    return [blocks[place] for place in sorted(blocks, key=order)]


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

COMPARED = f"""avg@k in percent, with 95% bootstrap intervals over problems (on nano over names), and over seeds where there
are several. dev-selected: at the step @ that was best on the dev split. best on test: the best of (so many) checkpoints
by the very problems it is measured on; no interval holds for it, and the paper's own numbers seem to be of this kind.
A frozen policy has the memory in its prompt; all others are evaluated without. LCB v6: protocol sdpo, {WINDOW[0]} to
{WINDOW[1]}. There, as with protocol official, the dev problems are test problems too, judged by fewer of their tests, so
that dev-selected is in part selected on test."""  # noqa: E501
COST_TITLE = """
Table 7: cost of a step, evaluation and saving left out; peak memory of the GPU, or else of the process"""  # noqa: E501


def results(blocks, numbers):
    """Yields the lines of Table 2, 3 or 4, given the paper's numbers. A base alone makes none."""
    for rows in blocks:
        shown = [row for method in numbers for row in rows if row.method == method]
        if not any(row.trained for row in shown):
            continue
        for row in shown:
            paper = dict(zip(TASKS.values(), numbers[row.method].get(row.model, []), strict=False))
            yield row.results | {"paper": f"{paper.get(row.task, '-')}"}


def lengths(rows):
    """Yields the lines of Table 5."""
    for row in rows:
        tokens = np.concatenate([run.answers(row.which).tokens.ravel() for run in row.runs])
        found = pd.Series(tokens).agg(["mean", "median", "max", "min"]).map("{:.0f}".format)
        paper = LENGTHS.get((row.task, row.model, row.label), "-")
        correct = percent(row.scores.to_numpy().mean())
        yield {**row.head, "correct": correct, **found, "paper: the same five": paper}


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

    Seeds are paired in their order if both rows have as many, else their means are.
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


def compare(folders) -> str:
    """Prints Tables 2, 3, 4, 5 and 7 of the paper for runs, and their differences by problem."""
    blocks = blocks_of(folders)
    single = [rows for rows in blocks if rows[0].task != "AVG"]
    rows = list(chain(*single))
    text, known = [COMPARED], {"Base"}
    for number, (title, numbers) in TABLES.items():
        known |= numbers.keys()
        text += [f"\nTable {number}: {title}", aligned(results(blocks, numbers))]
    if others := [row.results for row in chain(*blocks) if row.method not in known]:
        text += ["\nNot in the paper's tables", aligned(others)]
    text += ["\nTable 5: tokens of a completion, at the final step", aligned(lengths(rows))]
    text += ["\nTable 6: not reproduced; the authors annotated it by hand", COST_TITLE]
    text += [aligned(costs(single)), "\nDifferences at the final step, paired by problem"]
    return "\n".join([*text, aligned(differences(single))])


# ------------------------------------------------------------------------------------------------
# Figures. Their data are rows (panel, x, series, value, low, high).
# ------------------------------------------------------------------------------------------------

WORDS_TITLE = "Figure 5, words of the memory in the student's training completions"
NO_INTERVAL = (np.nan, np.nan)


def transfer(rows):
    """Yields the data of Figure 2: scores with a memory in the prompt."""
    for row in rows:
        if row.run.config["method"] == "eval":
            series = row.label.replace(row.run.label, row.run.series)  # all but its folder
            yield f"{row.task}, avg@k", row.model, series, *row.estimate("final")


def headrooms(rows):
    """Yields the data of Figure 3: what a perfect choice among the samples would add."""
    for row in rows:
        found = row.estimate(row.which, lambda a: headroom(a.rewards, a.answers))
        place = f"{row.task}\n{row.model}"
        yield "best@k - maj@k, share of problems", place, row.label, *found


def coverages(rows):
    """Yields the data of Figure 4, of rows of one task and model: what their policies solve."""
    solved = {}
    for row in rows:
        if row.trained:
            answers = row.run.answers("final")
            right = answers.rewards.max(1) > SUCCESS
            solved[row.label] = dict(zip(answers.ids, right, strict=True))
    panels = "solved by at least one of k samples", "that no other method solved"
    for label, masks in coverage(solved).items():
        for panel, mask in zip(panels, masks, strict=True):
            place = f"{rows[0].task}\n{rows[0].model}"
            yield f"share of problems {panel}", place, label, mask.mean(), *NO_INTERVAL


def by_step(rows, key, panel):
    """Yields the data of Figures 5 and 6: the numbers under a key of each training step."""
    for row in rows:
        for run in row.trained:
            series = f"{row.model} on {row.task}: {row.label}"
            if len(row.trained) > 1:
                series += f", seed {run.seed}"
            for step in run.steps:
                if key == "memory" and not any(step[key].values()):
                    continue  # an empty memory is not drawn
                for name, value in step[key].items():
                    yield panel.format(name), step["step"], series, value, *NO_INTERVAL


def draw(path, title, rows, bars=False) -> str:
    """Writes PATH.csv and PATH.png of rows (panel, x, series, value, low, high); says so."""
    data = pd.DataFrame(rows, columns=["panel", "x", "series", "value", "low", "high"])
    if data.empty:
        return f"{title}: nothing to draw in these runs"
    data.to_csv(f"{path}.csv", index=False, lineterminator="\r\n")
    panels, xs, series = [list(data[name].unique()) for name in ("panel", "x", "series")]
    width = max(4.5, 1.5 * len(xs)) if bars else 4.5
    size = max(7, len(panels) * width), 4.2 + 0.1 * len(series)
    grid = {"figsize": size, "sharey": bars, "squeeze": False, "layout": "constrained"}
    figure, (row,) = plt.subplots(1, len(panels), **grid)
    for axes, panel in zip(row, panels, strict=True):
        for i, name in enumerate(series):
            shown = data[(data["panel"] == panel) & (data["series"] == name)]
            draw_series(axes, shown, name, i, xs if bars else [], 0.8 / len(series))
        axes.set_title(panel, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    plt.setp(row, ylim=(0, None))  # when all is drawn, or later rows would be cut off
    handles, labels = row[0].get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) < 48 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(f"{path}.png", dpi=130)
    plt.close(figure)
    return f"{title}: {path}.png, {path}.csv"


def draw_series(axes, rows, label, i, xs, width):
    """Draws rows (x, value, low, high) of series i: bars at the places of xs, or else a line."""
    x, value = rows["x"], rows["value"]
    style = {"label": label, "capsize": 2}
    if rows["low"].notna().any():
        style["yerr"] = np.array([value - rows["low"], rows["high"] - value]).clip(0)
    if xs:
        left = [xs.index(place) + i * width - 0.4 for place in x]
        hatch = "//" if i > 9 else ""  # there are ten colors
        axes.bar(left, value, width, align="edge", hatch=hatch, **style)
        axes.set_xticks(range(len(xs)), xs, fontsize=8)
    else:
        style |= {"marker": "o" if len(x) < 20 else "", "markersize": 4, "linewidth": 1.2}
        style["linestyle"] = ("-", "--", "-.", ":")[(i + i // 10) % 4]
        axes.errorbar(x, value, **style)
        axes.set_xlabel("step" if x.dtype.kind == "i" else "")


def figures(folders, out) -> str:
    """Draws Figures 2 to 6 of the paper for runs: OUT/figureN.png, and OUT/figureN.csv; says so."""
    blocks = [rows for rows in blocks_of(folders) if rows[0].task != "AVG"]
    rows, out = list(chain(*blocks)), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    solved = chain(*map(coverages, blocks))
    words = by_step(rows, "keywords", 'share of completions with "{}"')
    sizes = by_step(rows, "memory", "{}: living items")
    said = [
        draw(out / "figure2", "Figure 2, memory in the prompt of other models", transfer(rows)),
        draw(out / "figure3", "Figure 3, headroom at the final step", headrooms(rows), bars=True),
        draw(out / "figure4", "Figure 4, problems solved at the final step", solved, bars=True),
        draw(out / "figure5", WORDS_TITLE, words),
        draw(out / "figure6", "Figure 6, growth of the memory", sizes),
    ]
    return "\n".join(said)
