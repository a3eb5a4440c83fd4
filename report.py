"""Tables and figures: the paper's, for the runs at hand, beside its own numbers; and a run's learning curve and last words.

    python eval.py compare RUN RUN ...     Tables 2, 3, 4, 5 and 7
    python eval.py figures RUN RUN ...     Figures 2 to 6, as PNG with their data as CSV

Everything is read from what runs left in their folders (config.json, metrics.jsonl, evals/STEP-test.jsonl); the estimators
are those of eval.py.
"""

import csv
import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from eval import WINDOW, Answers, coverage, headroom, interval, json_lines, names, resample

matplotlib.use("Agg")  # figures are files; no screen is needed
DOMAINS = {  # columns of Tables 2 to 4
    "sciknoweval/biology": "Biology", "sciknoweval/chemistry": "Chemistry", "sciknoweval/physics": "Physics",
    "sciknoweval/material": "Materials", "AVG": "AVG", f"livecodebench (sdpo, {WINDOW[0]} to {WINDOW[1]})": "LCB v6"}
QWEN, OLMO = "Qwen3-8B", "OLMo3-Instruct-7B"
METHODS = {"grpo": "GRPO", "sdpo": "SDPO", "pmd": "PMD", "pmd-transient": "PMD-Transient",
           "frozen-memory": "Frozen memory + evolving policy", "frozen-policy": "Evolving memory + frozen policy"}
FROZEN = METHODS["frozen-policy"]
TABLES = {  # {table: (title, {row: {model: the paper's numbers}})}
    2: ("main results", {
        "Base": {QWEN: (32.4, 41.6, 58.5, 59.2, 47.9, 27.1), OLMO: (15.4, 22.6, 35.9, 36.7, 27.7, 27.7)},
        "GRPO": {QWEN: (63.2, 73.2, 70.6, 70.7, 69.4, 41.2), OLMO: (45.8, 70.1, 63.3, 76.5, 63.9, 36.1)},
        "SDPO": {QWEN: (63.6, 80.6, 72.8, 80.4, 74.4, 47.9), OLMO: (54.1, 79.0, 66.1, 76.8, 69.5, 45.0)},
        "PMD": {QWEN: (68.5, 82.8, 74.7, 82.9, 77.2, 51.7), OLMO: (66.1, 81.3, 68.2, 77.4, 73.3, 51.1)}}),
    3: ("mechanism controls", {
        FROZEN: {QWEN: (34.3, 49.8, 60.9, 70.8, 54.0, 35.9)},
        METHODS["frozen-memory"]: {QWEN: (44.6, 77.7, 63.1, 74.5, 65.0, 47.5)},
        "PMD-Transient": {QWEN: (67.4, 81.8, 73.8, 79.8, 75.7, 48.1)},
        "PMD": {QWEN: (68.5, 82.8, 74.7, 82.9, 77.2, 51.7)}}),
    4: ("memory levels", {
        f"{FROZEN} (experience)": {QWEN: (42.3, 53.5, 59.1, 68.8, 55.9)},
        f"{FROZEN} (experience,insight)": {QWEN: (50.4, 52.5, 62.6, 67.8, 58.3)},
        FROZEN: {QWEN: (45.6, 54.4, 59.5, 69.4, 57.2)},
        "PMD (experience)": {QWEN: (63.0, 80.6, 73.3, 80.4, 74.3)},
        "PMD (experience,insight)": {QWEN: (67.1, 82.1, 75.2, 78.2, 75.7)},
        "PMD": {QWEN: (68.5, 82.7, 74.1, 83.6, 77.2)}})}
LENGTHS = {"GRPO": "63.2 2457 1306 8192 492", "SDPO": "63.6 186 185 251 120", "PMD": "68.5 481 474 711 296"}  # Tab. 5
COSTS = {"SDPO": "37.0 54.6", "PMD": "53.6 54.9"}  # Tab. 7

# ---------------------------------------------------------------------------------------------------------------------
# Runs, and the rows they make
# ---------------------------------------------------------------------------------------------------------------------

CONFIG = ("task", "model", "method", "seed", "tiers", "memory_from", "retrieve_k")  # what is read here of those files
STEP, ANSWER = ("seconds", "keywords", "memory"), ("problem", "reward", "answer", "tokens")


def read_config(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not JSON: {error.msg}") from error
    if missing := [k for k in CONFIG if k not in config]:
        raise ValueError(f"{path} has no {missing[0]}")
    return config


class Run:
    """What a run, or an evaluation of `python eval.py --model`, left in its folder. ValueError where that is none."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not all((self.folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
            raise ValueError(f"{folder} is no run: it has no config.json and metrics.jsonl")
        self.config = read_config(self.folder / "config.json")
        self.steps, tests, devs = [], {}, {}
        for row in self.rows("metrics.jsonl", lambda row: ["step", *(["avg_at_k"] if "split" in row else STEP)]):
            if "split" in row:
                (devs if row["split"] == "dev" else tests)[row["step"]] = row["avg_at_k"]
            else:
                self.steps.append(row)
        if not tests:
            raise ValueError(f"{folder} has no evaluation on test yet")
        self.looks, self.read = len(tests), {}
        self.selected = {"base": min(tests), "final": max(tests), "dev": max(devs, key=devs.get, default=None),
                         "test": max(tests, key=tests.get)}
        self.task, name = self.config["task"], Path(self.config["model"]).name
        if self.task == "livecodebench":
            self.task += " ({protocol}, {since} to {until})".format(**self.config)
        self.task += " without flagged items" * self.config.get("exclude_flagged", False)
        self.model = {"Olmo-3-7B-Instruct": OLMO}.get(name, name)
        memory, tiers = Path(self.config["memory_from"]), self.config["tiers"]
        self.label = METHODS.get(self.config["method"], "Base")  # its row in the tables
        control = False
        if self.config["method"] == "eval":  # of another run's weights, perhaps
            for source in [p for p in Path(self.config["model"]).parents if (p / "metrics.jsonl").is_file()][:1]:
                self.model, self.label = Run(source).model, f"{name} of {source.name}"
            if memory.name:
                self.label += f", memory of {memory.parent.name} in the prompt, top-{self.config['retrieve_k']}"
                lender = memory.parent / "config.json"
                lender = read_config(lender) if lender.is_file() else {"method": ""}
                control = lender["method"] == "frozen-policy" and all(
                    lender[k] == self.config[k] for k in ("model", "task", "retrieve_k"))  # answers as that run does
        self.lenient = self.config.get("mcq") == "lenient"
        variant = f" ({tiers})" * (tiers.count(",") < 2) + ", lenient" * self.lenient
        self.series = self.label + variant  # in Figure 2, which has many models and tasks for a memory
        self.label = FROZEN + variant if control else self.series

    def rows(self, name, keys):
        """The rows of a file, each of which must have keys(row)."""
        for n, row in json_lines(self.folder / name):
            if missing := [k for k in keys(row) if k not in row]:
                raise ValueError(f"{self.folder / name}, line {n} has no {missing[0]}")
            yield row

    def answers(self, which) -> Answers:
        """At the step that is `selected` as base, final, dev or test."""
        step = self.selected[which]
        if step not in self.read:
            path = f"evals/{step}-test.jsonl"
            self.read[step] = Answers.of(self.rows(path, lambda row: ANSWER), self.folder / path)
        return self.read[step]


class Row(NamedTuple):
    """A row of a table: the runs of a method, of several seeds where they differ in nothing else. AVG has four parts."""

    label: str
    parts: list  # of lists of runs, one for each task
    base: bool = False  # what they scored before any step

    @property
    def method(self):
        return self.label.partition(" [")[0]

    def answers(self, which="final"):
        return [run.answers("base" if self.base else which) for run in self.parts[0]]

    def scores(self, which="final"):
        """(ids, names, (runs, problems) average rewards) of the problems that all its runs were asked."""
        tables = [dict(zip(a.ids, a.rewards.mean(1), strict=True)) for a in self.answers(which)]
        ids = [i for i in tables[0] if all(i in t for t in tables)]
        return ids, names(self.parts[0][0].task, ids), np.array([[t[i] for i in ids] for t in tables])

    def cells(self) -> list:
        """final, dev-selected, best on test: a mean, and its interval but where the test split itself did the selecting."""
        found = []
        looks = 1 if self.base else max(run.looks for runs in self.parts for run in runs)
        for which in ("final", "dev", "test"):
            steps = [run.selected[which] for runs in self.parts for run in runs]
            if looks == 1 and which != "final" or None in steps:
                found.append("")
                continue
            parts = [self._replace(parts=[runs]).scores(which) for runs in self.parts]
            draws = np.mean([resample(s, groups, seed) for seed, (_, groups, s) in enumerate(parts)], 0)
            notes = {"dev": f" @{','.join(map(str, steps))}", "test": f" (of {looks})"}
            silent = which == "test" or min(len(set(groups)) for _, groups, _ in parts) < 2
            found.append(percent(np.mean([s.mean() for _, _, s in parts]),
                                 None if silent else np.percentile(draws, [2.5, 97.5])) + notes.get(which, ""))
        return found

    def count(self):
        (seeds, problems), k = self.scores()[2].shape, self.answers()[0].rewards.shape[1]
        size = f"{problems} x {k}" + f" x {seeds} seeds" * (seeds > 1)
        return size if len(self.parts) == 1 else f"{len(self.parts)} domains"

    def seconds(self):
        """Of each step, evaluation and saving left out."""
        return [sum(t for phase, t in step["seconds"].items() if phase not in ("evaluate", "save"))
                for run in self.parts[0] for step in run.steps if not self.base]


def rows_of(folders) -> dict:
    """{(task, model): [Row, ...]}, in the paper's order. Runs that differ in their seed alone share a row; others of
    one label are told apart by their folders' names. What a run evaluated before its first step is the row Base."""
    free = {"seed", "name", "out", "resume", "device", "log", "log_every", "save_every", "keep", "max_minutes", "nproc",
            "data", "memory_from"}
    tables, groups = {}, {}
    for run in map(Run, folders):
        key = json.dumps([run.label, {k: v for k, v in run.config.items() if k not in free}])
        while run.config["seed"] in [r.config["seed"] for r in groups.get(key, [])]:
            key += "again"  # the same seed twice is no second seed
        groups.setdefault(key, []).append(run)
    for runs in groups.values():
        tables.setdefault((runs[0].task, runs[0].model), []).append(Row(runs[0].label, [runs]))
    for rows in tables.values():
        labels, first = Counter(row.label for row in rows), [row.parts[0][0] for row in rows]
        rows[:] = [row if labels[row.label] == 1 else row._replace(label=f"{row.label} [{run.folder.name}]")
                   for row, run in zip(rows, first, strict=True)]
        started = [run for run in first if run.steps and run.selected["base"] == 0]
        started.sort(key=lambda run: run.lenient)
        base = "Base" + ", lenient" * (started[0].lenient if started else False)
        if started and base not in labels:
            rows.insert(0, Row(base, [started[:1]], True))
    for model in {model for _, model in tables}:
        domains = [{row.label: row for row in tables.get((task, model), [])} for task in DOMAINS if "/" in task]
        if shared := [Row(label, [d[label].parts[0] for d in domains], row.base) for label, row in domains[0].items()
                      if all(label in d for d in domains)]:
            tables["AVG", model] = shared
    return dict(sorted(tables.items(), key=lambda item: ([*DOMAINS, item[0][0]].index(item[0][0]),
                                                        [QWEN, OLMO, item[0][1]].index(item[0][1]))))

# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

def percent(mean, bounds=None):
    return f"{100 * mean:.1f}" + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds is not None else "")


def aligned(head, lines) -> str:
    """Rows of cells under their heads."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *lines)]
    text.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(text) if lines else "none of these runs"


def evaluated(name, found) -> str:
    """The table of one evaluation, out of its line of metrics.jsonl."""
    k, shares = found["k"], [percent(found[key]) for key in ("maj_at_k", "best_at_k", "headroom")]
    name += ", lenient" * (found.get("mcq") == "lenient")
    return aligned(["task", "problems", f"avg@{k}", f"maj@{k}", f"best@{k}", "headroom", "tokens"], [[
        name, f"{found['n_problems']}", percent(found["avg_at_k"], found["interval"]), *shares, f"{found['tokens']:.0f}"]])


COMPARED = f"""avg@k in percent, with 95% bootstrap intervals over problems (on nano over names), and over seeds where there
are several. dev-selected: at the step @ that was best on the dev split. best on test: the best of (so many) checkpoints
by the very problems it is measured on; no interval holds for it, and the paper's own numbers seem to be of this kind.
A frozen policy has the memory in its prompt; all others are evaluated without. LCB v6: protocol sdpo, {WINDOW[0]} to
{WINDOW[1]}. There, as with protocol official, the dev problems are test problems too, judged by fewer of their tests, so
that dev-selected is in part selected on test."""


def compare(folders) -> str:
    """Tables 2, 3, 4, 5 and 7 of the paper for these runs, and what differs from what, paired by problem."""
    blocks = rows_of(folders)
    listed = [(DOMAINS.get(task, task), model, row) for (task, model), rows in blocks.items() for row in rows]
    single = [line for line in listed if line[0] != "AVG"]

    def paper(numbers, task, model, row):
        given, column = numbers[row.method].get(model, ()), [*DOMAINS.values(), task].index(task)
        return f"{given[column]}" if column < len(given) else "-"

    def scored(chosen, numbers):
        return [[*place, row.label, row.count(), *row.cells(), *([paper(numbers, *place, row)] if numbers else [])]
                for *place, row in chosen]

    out, known = [COMPARED], {"Base"}
    head = ["task", "model", "method", "problems x k", "final", "dev-selected", "best on test"]
    for n, (title, numbers) in TABLES.items():
        known |= set(numbers)
        chosen = [line for block in dict.fromkeys(line[:2] for line in listed) for method in numbers for line in listed
                  if line[:2] == block and line[2].method == method]  # rows in the paper's order
        shown = {line[:2] for line in chosen if not line[2].base}  # the base policy alone makes no table
        chosen = [line for line in chosen if line[:2] in shown or line[2].parts[0][0].config["method"] == "eval"]
        out += [f"\nTable {n}: {title}", aligned([*head, "paper"], scored(chosen, numbers))]
    if other := [line for line in listed if line[2].method not in known]:
        out += ["\nNot in the paper's tables", aligned(head, scored(other, None))]

    lines = []
    for task, model, row in single:
        tokens = np.concatenate([a.tokens.ravel() for a in row.answers()])
        lines.append([task, model, row.label, percent(row.scores()[2].mean()), *(
            f"{f(tokens):.0f}" for f in (np.mean, np.median, np.max, np.min)),
            LENGTHS.get(row.label, "-") if (task, model) == ("Biology", QWEN) else "-"])
    head = ["task", "model", "method", "correct", "mean", "median", "max", "min", "paper: the same five"]
    out += ["\nTable 5: tokens of a completion, at the final step", aligned(head, lines),
            "\nTable 6: not reproduced; the authors annotated it by hand"]

    lines, sdpo = [], {line[:2]: np.median(line[2].seconds()) for line in single if line[2].label == "SDPO"}
    for task, model, row in single:
        if s := row.seconds():
            peak = max(step.get("peak_gb", 0) for run in row.parts[0] for step in run.steps)
            quartiles = "{:.3g}, {:.3g}".format(*np.percentile(s, [25, 75]))
            lines.append([task, model, row.label, f"{np.median(s):.3g}", quartiles,
                          f"{np.median(s) / sdpo[task, model]:.2f}" if (task, model) in sdpo else "-",
                          f"{peak:.1f}" if peak else "-", COSTS.get(row.label, "-") if model == QWEN else "-"])
    head = ["task", "model", "method", "median s", "quartiles", "to SDPO", "peak GB", "paper: s, GB"]
    out += ["\nTable 7: cost of a step, evaluation and saving left out; peak memory of the GPU, or else of the process",
            aligned(head, lines)]

    lines = []
    for (task, model, a), (task_b, model_b, b) in combinations(single, 2):
        if (task, model) == (task_b, model_b):
            ids, groups, gaps = paired(b, a)
            if ids:
                difference = percent(gaps.mean(), interval(gaps, groups))
                lines.append([task, model, f"{b.label} - {a.label}", f"{len(ids)}", difference])
    head = ["task", "model", "methods", "problems", "difference"]
    return "\n".join([*out, "\nDifferences at the final step, paired by problem", aligned(head, lines)])


def paired(a, b):
    """(ids, names, differences of final scores): of seed and seed where both rows have as many, else of their means."""
    (ids, _, x), (others, _, y) = a.scores(), b.scores()
    both = [i for i in ids if i in set(others)]
    x, y = x[:, [ids.index(i) for i in both]], y[:, [others.index(i) for i in both]]
    return both, names(a.parts[0][0].task, both), x - y if len(x) == len(y) else x.mean(0) - y.mean(0)


def table(summaries) -> str:
    """The results of runs by their methods: held-out avg@k, with 95% intervals over problems."""
    def cell(row):
        return f"{row['avg_at_k']:.3f}" + (" [{:.3f}, {:.3f}]".format(*row["interval"]) if row.get("interval") else "")

    first = next(iter(summaries.values()))
    prompt = "memory in the prompt of frozen-policy alone" if "frozen-policy" in summaries else "no memory in the prompt"
    prompt = "read leniently, " * (first.get("mcq") == "lenient") + prompt
    rows = [("", "avg@{k} on {n_problems} held-out problems of {data}, {prompt}".format(
        **first["final"], data=first["data"], prompt=prompt)), ("base policy", cell(first["base"]))]
    for name, s in summaries.items():
        rows += [(f"{name}, after training", cell(s["final"]))]
        if s["dev_best"]:
            rows += [(f"{name}, best on dev", f"{cell(s['dev_best'])}  at step {s['dev_best']['step']}")]
        rows += [(f"{name}, best on test", f"{cell(s['test_best'])}  at step {s['test_best']['step']}, selected on test "
                                           f"among {s['test_best']['n_checkpoints_searched']} checkpoints")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}s}  {value}" for name, value in rows)

# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------

def draw(path, title, data, bars=False) -> str:
    """PATH.csv and PATH.png of rows (panel, x, series, value, low, high), the last two "" where there is no interval."""
    if not data:
        return f"{title}: nothing to draw in these runs"
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("panel", "x", "series", "value", "low", "high"), *data])
    panels, series, xs = (list(dict.fromkeys(row[i] for row in data)) for i in (0, 2, 1))
    size = max(7, 4.5 * len(panels), 1.5 * len(panels) * len(xs) * bars), 4.2 + 0.1 * len(series)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=bars, squeeze=False, layout="constrained")
    for panel, ax in zip(panels, axes[0], strict=True):
        for i, name in enumerate(series):
            rows = [row for row in data if row[0] == panel and row[2] == name]
            x, y = [row[1] for row in rows], [row[3] for row in rows]
            errors = np.array([(row[3] - row[4], row[5] - row[3]) if row[4] != "" else (0, 0) for row in rows]).T.clip(0)
            if bars:
                width = 0.8 / len(series)
                ax.bar([xs.index(v) + (i + 0.5) * width - 0.4 for v in x], y, width, label=name,
                       yerr=errors if errors.any() else None, capsize=2, hatch="//" * (i > 9))  # there are ten colors
                ax.set_xticks(range(len(xs)), xs, fontsize=8)
            else:
                ax.errorbar(x, y, errors if errors.any() else None, label=name, capsize=2, linewidth=1.2,
                            marker="o" if len(x) < 20 else "", markersize=4,
                            linestyle=("-", "--", "-.", ":")[(i + i // 10) % 4])
                ax.set_xlabel("step" if isinstance(xs[0], int) else "")
        ax.set_title(panel, fontsize=10)
        ax.set_ylim(0)
        ax.grid(axis="y", alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 + (max(map(len, labels)) < 48), fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(f"{path}.png", dpi=130)
    plt.close(figure)
    return f"{title}: {path}.png, {path}.csv"


def bounded(scores, groups):
    """value, low, high for `draw`"""
    return np.mean(scores), *(interval(scores, groups) or ("", ""))


def figures(folders, out) -> str:
    """Figures 2 to 6 of the paper for these runs: OUT/figureN.png, and its data in OUT/figureN.csv. Says what it wrote."""
    transfer, head, covered, keywords, growth = [], [], [], [], []
    for (task, model), rows in rows_of(folders).items():
        if task == "AVG":
            continue
        task, solved = DOMAINS.get(task, task), {}
        for row in rows:
            (ids, groups, scores), place = row.scores(), f"{task}\n{model}"
            if row.parts[0][0].config["method"] == "eval":
                series = row.label.replace(row.parts[0][0].label, row.parts[0][0].series)  # all but its folder
                transfer.append((f"{task}, avg@k", model, series, *bounded(scores, groups)))
            gaps = np.array([headroom(a.rewards, a.answers) for a in row.answers() if a.ids == ids])
            head.append(("best@k - maj@k, share of problems", place, row.label, *bounded(gaps, groups)))
            if not row.base:
                solved[row.label] = dict(zip(ids, row.answers()[0].rewards.max(1) > 0, strict=False))
            for run in [] if row.base else row.parts[0]:
                name = f"{model} on {task}: {row.label}" + f", seed {run.config['seed']}" * (len(row.parts[0]) > 1)
                for step in run.steps:
                    keywords += [(f'share of completions with "{word}"', step["step"], name, share, "", "")
                                 for word, share in step["keywords"].items()]
                    growth += [(f"{tier}: living items", step["step"], name, n, "", "") for tier, n in step["memory"].items()
                               if any(step["memory"].values())]
        for label, (found, alone) in coverage(solved).items():
            covered += [("share of problems solved by at least one of k samples", place, label, found.mean(), "", ""),
                        ("share of problems that no other method solved", place, label, alone.mean(), "", "")]
    Path(out).mkdir(parents=True, exist_ok=True)
    return "\n".join([
        draw(Path(out, "figure2"), "Figure 2, memory in the prompt of other models", transfer),
        draw(Path(out, "figure3"), "Figure 3, headroom at the final step", head, bars=True),
        draw(Path(out, "figure4"), "Figure 4, problems solved at the final step", covered, bars=True),
        draw(Path(out, "figure5"), "Figure 5, words of the memory in the student's training completions", keywords),
        draw(Path(out, "figure6"), "Figure 6, growth of the memory", growth)])


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
