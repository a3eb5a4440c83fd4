"""Draws the paper's Figures 2 to 6 for the runs at hand, as PNG with their data as CSV.

    python eval.py figures RUN RUN ...

The data of a figure are rows (panel, x, series, value, low, high). The runs and their rows of the
tables are report.py's, the estimators are eval.py's.
"""

from itertools import chain
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eval import headroom
from runtime.tables import drawn
from tasks.problem import SUCCESS
from tools.report import blocks_of, unfinished

matplotlib.use("Agg")  # figures are files; no screen is needed

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
        gain = row.estimate(row.which, lambda a: headroom(a.rewards, a.answers))
        place = f"{row.task}\n{row.model}"
        yield "best@k - maj@k, share of problems", place, row.label, *gain


def coverage(solved) -> dict:
    """Returns {name: (solved, solved by no other)}, masks of the problems that all share.

    solved: {name: {problem: whether at least one of k samples is right}}.
    """
    if not solved:
        return {}
    first, *others = solved.values()
    shared = [problem for problem in first if all(problem in other for other in others)]
    masks = {name: np.array([table[p] for p in shared], bool) for name, table in solved.items()}
    counts = np.sum(list(masks.values()), axis=0)  # (problems,)
    return {name: (mask, mask & (counts == 1)) for name, mask in masks.items()}


def coverages(rows):
    """Yields the data of Figure 4, of rows of one task and model: what their policies solve."""
    solved = {}
    for row in rows:
        if row.trained:
            answers = row.run.answers("final")
            right = answers.rewards.max(1) >= SUCCESS
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
                numbers = step[key]
                if key == "memory" and not any(numbers.values()):
                    continue  # an empty memory is not drawn
                for name, value in numbers.items():
                    yield panel.format(name), step["step"], series, value, *NO_INTERVAL


def draw(path, title, rows, bars=False) -> str:
    """Writes PATH.csv and PATH.png of rows (panel, x, series, value, low, high).

    Returns a sentence with the files.
    """
    data = pd.DataFrame(rows, columns=["panel", "x", "series", "value", "low", "high"])
    if data.empty:
        return f"{title}: nothing to draw in these runs"
    data.to_csv(f"{path}.csv", index=False, lineterminator="\r\n")
    panels, xs, series = [list(data[name].unique()) for name in ("panel", "x", "series")]
    places = xs if bars else []
    width = max(4.5, 1.5 * len(places))
    size = max(7, len(panels) * width), 4.2 + 0.1 * len(series)
    grid = {"figsize": size, "sharey": bars, "squeeze": False, "layout": "constrained"}
    figure, (row,) = plt.subplots(1, len(panels), **grid)
    for axes, panel in zip(row, panels, strict=True):
        for i, name in enumerate(series):
            shown = data[(data["panel"] == panel) & (data["series"] == name)]
            draw_series(axes, shown, name, i, places, 0.8 / len(series))
        axes.set_title(drawn(panel), fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    plt.setp(row, ylim=(0, None))  # when all is drawn, or later rows would be cut off
    handles, labels = row[0].get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) < 48 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(drawn(title), fontsize=11)
    figure.savefig(f"{path}.png", dpi=130)
    plt.close(figure)
    return f"{title}: {path}.png, {path}.csv"


def draw_series(axes, rows, label, i, places, width):
    """Draws rows (x, value, low, high) of series i: bars at their places, or a line without any."""
    x, value = rows["x"], rows["value"]
    style = {"label": drawn(label), "capsize": 2}
    if rows["low"].notna().any():
        style["yerr"] = np.array([value - rows["low"], rows["high"] - value]).clip(0)
    if places:
        left = [places.index(place) + i * width - 0.4 for place in x]
        hatch = "//" if i > 9 else ""  # there are ten colors
        axes.bar(left, value, width, align="edge", hatch=hatch, **style)
        axes.set_xticks(range(len(places)), [drawn(str(place)) for place in places], fontsize=8)
    else:
        marker = "o" if len(x) < 20 else ""
        line = ("-", "--", "-.", ":")[(i + i // 10) % 4]
        style |= {"marker": marker, "markersize": 4, "linewidth": 1.2, "linestyle": line}
        axes.errorbar(x, value, **style)
        axes.set_xlabel("step" if x.dtype.kind == "i" else "")


def draw_figures(folders, out) -> str:
    """Draws Figures 2 to 6 of the paper for runs, as OUT/figureN.png with OUT/figureN.csv.

    Returns a sentence for each figure.
    """
    blocks = [rows for rows in blocks_of(folders) if rows[0].task != "AVG"]
    rows = list(chain(*blocks))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    solved = chain(*map(coverages, blocks))
    words = by_step(rows, "keywords", 'share of completions with "{}"')
    sizes = by_step(rows, "memory", "{}: living items")
    sentences = [
        *unfinished(blocks),
        draw(out / "figure2", "Figure 2, memory in the prompt of other models", transfer(rows)),
        draw(out / "figure3", "Figure 3, headroom at the final step", headrooms(rows), bars=True),
        draw(out / "figure4", "Figure 4, problems solved at the final step", solved, bars=True),
        draw(out / "figure5", WORDS_TITLE, words),
        draw(out / "figure6", "Figure 6, growth of the memory", sizes),
    ]
    return "\n".join(sentences)
