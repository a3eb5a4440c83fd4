"""Writes the study's records as tables (results.md) and figures.

Intervals are 95% t intervals over worlds, and differences are paired by world. study.py has the
design and the criteria.
"""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

matplotlib.use("Agg")  # figures are files; no screen is needed

KINDS = ("feedback", "plain")  # of worlds
NAMES = {
    "grpo": "GRPO",
    "sdpo": "SDPO",
    "pmd": "PMD",
    "pmd-solved": "PMD, supervise solved",
    "pmd-nolessons": "PMD, lessons hidden",
    "pmd-transient": "PMD, transient memory",
    "frozen-memory": "frozen memory",
}
# (title, arm, less arm, kinds)
PRIMARIES = {
    "P1": ("pmd", "sdpo", ["feedback"]),
    "P2": ("pmd", "sdpo", ["plain"]),
    "P3": ("pmd", "pmd-transient", ["feedback", "plain"]),
    "P4": ("pmd", "frozen-memory", ["feedback", "plain"]),
    "P5": ("pmd", "pmd-nolessons", ["plain"]),
}
EXPLORED = [("sdpo", "grpo"), ("pmd", "grpo"), ("pmd-solved", "pmd"), ("pmd-nolessons", "pmd")]
EXPLORED += [("pmd", "pmd-transient"), ("pmd-solved", "grpo")]
# Qwen3-8B, average of the four SciKnowEval domains (Tables 2 and 3), in percent
PAPER = {"grpo": 69.4, "sdpo": 74.4, "pmd": 77.2, "pmd-transient": 75.7, "frozen-memory": 65.0}
COLORS = {arm: f"C{i}" for i, arm in enumerate(NAMES)}
BLOCKS = ("weights", "solution", "strategies", "lessons", "behaviors", "feedback", "all")
TAUGHT = ("sdpo", "pmd", "pmd-transient")  # arms whose blocks are looked at one by one
COSTS = {"cpu": "CPU seconds", "tokens": "forward tokens"}
BUDGET_OF = ["sdpo", "pmd"]  # the cheaper of them sets the budget of equal compute
MARGIN = 0.02  # by which the mean of a run without mastered problems may be lower
# What stands under tables
OF_PRIMARIES = """won, lost: the first is higher or lower, and Holm's p is below 0.05. open: neither
is shown. p: two-sided t test, paired by world. by checkpoint: the mean over the worlds of each, by
seed of pre-training."""
OF_COMPUTE = """The mean score over a budget, which in each world is the smaller total of its SDPO
and PMD runs. Whole run: the mean cost of all 80 steps."""
OF_TEACHERS = """student: its own probability, on all problems. Each other column: what is added by
the teacher's weights alone, by one block alone, or by all that it reads, on the problems that have
such a block. Means over looks, then over worlds."""
OF_BLOCKS = """What a block alone adds to the teacher's weights alone, over the looks at which all
problems of the group have the block, so that both are of the same problems."""


# ------------------------------------------------------------------------------------------------
# Records and estimates
# ------------------------------------------------------------------------------------------------


def frame(records) -> pd.DataFrame:
    """Lays out the runs that did not fail, a row each, with `auc`, `base`, `final` and the rest."""
    rows = []
    for record in records.values():
        if "test" in record:
            scores = [row["avg"] for row in record["test"]]
            summary = {"base": scores[0], "final": scores[-1], "auc": np.mean(scores[1:])}
            rows.append(record | summary)
    columns = ["part", "arm", "label", "kind", "world", "checkpoint", "auc", "base", "final"]
    return pd.DataFrame(rows, columns=None if rows else columns)


def cell(runs, part, arm, kinds=None, label=None) -> pd.DataFrame:
    """Picks the runs of an arm, by world."""
    chosen = (runs.part == part) & (runs.arm == arm)
    if kinds:
        chosen &= runs.kind.isin(kinds)
    if label is not None:
        chosen &= runs.label == label
    return runs[chosen].set_index("world").sort_index()


def gaps(ours, theirs, column="auc") -> pd.Series:
    """Subtracts two cells, in the worlds that both have."""
    return (ours[column] - theirs[column]).dropna()


def ends(values) -> tuple[float, float]:
    """Returns the 95% t interval of a mean; NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) == 0:
        return values.iloc[0], values.iloc[0]
    return tuple(stats.ttest_1samp(values, 0).confidence_interval(0.95))


def text(values, sign="") -> str:
    """Writes a mean with its interval."""
    values = pd.Series(values, dtype=float)
    if values.empty:
        return "-"
    low, high = ends(values)
    mean = f"{values.mean():{sign}.3f}"
    return mean if np.isnan(low) else f"{mean} [{low:{sign}.3f}, {high:{sign}.3f}]"


def holm(p_values) -> list[float]:
    """Corrects p values for their number (Holm 1979); scipy has no such function."""
    order = np.argsort(p_values)
    corrected, highest = np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected.tolist()


def p_of(test, values) -> float:
    """Runs a test of scipy on differences; 1 if all are 0, or if there are too few."""
    return float(test(values).pvalue) if len(values) > 1 and np.any(values) else 1.0


def t_test(values):
    return stats.ttest_1samp(values, 0)


def at_equal_cost(runs, others, cost) -> pd.Series:
    """The mean score of runs over a budget of CPU seconds or forward tokens, by world.

    The score is linear between evaluations, and after the last one as it was there. others: cells;
    the cheapest of their runs in a world sets its budget, for every arm alike. A world in which one
    of them failed has no budget, and is left out.
    """
    means = {}
    for world, run in runs.iterrows():
        if not all(world in other.index for other in others):
            continue
        totals = [other.test[world][-1].get(cost) for other in others]
        spent = [row.get(cost) for row in run.test]
        if None in spent or None in totals:
            continue
        spent[0] = 0
        budget = min(totals)
        grid = np.linspace(0, budget, 401)
        scores = np.interp(grid, spent, [row["avg"] for row in run.test])
        means[world] = np.trapezoid(scores, grid) / budget
    return pd.Series(means, dtype=float)


def quality(runs, group, reader) -> pd.DataFrame:
    """(worlds, steps): what a reader gives to the right operation. group: solved or unsolved."""
    values = {}
    for world, run in runs.iterrows():
        looks = {look["step"]: look["teacher"].get(group, {}).get(reader) for look in run.teacher}
        values[world] = {step: pair[0] if pair else np.nan for step, pair in looks.items()}
    return pd.DataFrame.from_dict(values, orient="index").sort_index(axis=1)


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def markdown(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def difference(values, checkpoints) -> list:
    """The cells of a difference: mean and interval, worlds won, its p by Wilcoxon, checkpoints.

    checkpoints: {world: checkpoint}, as a Series.
    """
    won = f"{int((values > 1e-9).sum())} of {len(values)}"
    means = values.groupby(checkpoints[values.index]).mean()
    each = ", ".join(f"{mean:+.3f}" for mean in means)
    return [text(values, "+"), won, f"{p_of(stats.wilcoxon, values.round(9)):.2g}", each or "-"]


def verdict(values, p) -> str:
    """Says whether a primary comparison is won."""
    if p >= 0.05:
        return "open"
    return "won" if values.mean() > 0 else "lost"


def primaries(runs, checkpoints) -> str:
    found = {}
    for name, (arm, other, kinds) in PRIMARIES.items():
        found[name] = gaps(cell(runs, "main", arm, kinds), cell(runs, "main", other, kinds))
    p_values = [p_of(t_test, values) for values in found.values()]
    rows = []
    for (name, values), p, corrected in zip(found.items(), p_values, holm(p_values), strict=True):
        arm, other, kinds = PRIMARIES[name]
        title = f"{name}: {NAMES[arm]} minus {NAMES[other]} ({' and '.join(kinds)})"
        cells = difference(values, checkpoints)
        rows.append([title, f"**{verdict(values, corrected)}**", *cells])
        rows[-1][3:3] = [f"{p:.2g}", f"{corrected:.2g}"]
    head = ["AUC", "", "difference", "p", "Holm", "worlds won", "Wilcoxon", "by checkpoint"]
    return f"{markdown(head, rows)}\n\n{OF_PRIMARIES}"


def methods(runs) -> str:
    """The table of the README."""
    main = runs[runs.part == "main"]
    base = [text(main[(main.kind == kind) & (main.arm == "sdpo")].base) for kind in KINDS]
    rows = [["base", base[0], "-", base[1], "-", 47.9]]
    for arm, name in NAMES.items():
        row = [name]
        for kind in KINDS:
            found = cell(runs, "main", arm, [kind])
            row += [text(found.final), text(found.auc)]
        rows.append([*row, PAPER.get(arm, "-")])
    if "lender" in main:
        lent = main[main.arm == "frozen-memory"]
        scores = [text(lent[lent.kind == kind].lender) for kind in KINDS]
        name = "frozen policy, memory in the prompt"
        rows.append([name, scores[0], "-", scores[1], "-", 54.0])
    head = ["method", "feedback: final", "AUC", "plain: final", "AUC", "paper: SciKnowEval, %"]
    return markdown(head, rows)


def explored(runs, checkpoints) -> str:
    rows = []
    for kind in KINDS:
        for arm, other in [("pmd", "sdpo"), *EXPLORED]:
            values = gaps(cell(runs, "main", arm, [kind]), cell(runs, "main", other, [kind]))
            title = f"{NAMES[arm]} minus {NAMES[other]} ({kind})"
            rows.append([title, *difference(values, checkpoints)])
    head = ["AUC", "difference", "worlds won", "Wilcoxon", "by checkpoint"]
    exploratory = "Exploratory: no p is corrected."
    return f"{markdown(head, rows)}\n\n{exploratory} {supervise_rule(runs)}"


def supervise_rule(runs) -> str:
    """What the declared criterion says of `--supervise`.

    Not below in feedback worlds: the interval does not lie below 0.
    """
    spans = {}
    for kind in ("plain", "feedback"):
        ours, theirs = (cell(runs, "main", arm, [kind]) for arm in ("pmd-solved", "pmd"))
        spans[kind] = ends(gaps(ours, theirs))
    above, not_below = spans["plain"][0] > 0, spans["feedback"][1] >= 0
    said = "is met" if above and not_below else "is not met"
    return (
        f"The declared criterion for `--supervise solved` as the default {said}. Its interval in"
        f" plain worlds lies above 0: {'yes' if above else 'no'}. That in feedback worlds does not"
        f" lie below 0: {'yes' if not_below else 'no'}."
    )


def rates_table(runs, rates) -> str:
    tuning = runs[runs.part == "tuning"]
    columns = sorted(tuning.label.unique(), key=float)
    rows, worlds, failed = [], tuning.world.nunique(), False
    for arm in tuning.arm.unique():
        row = [NAMES[arm]]
        for rate in columns:
            scores = tuning[(tuning.arm == arm) & (tuning.label == rate)].auc
            mean = f"{scores.mean():.3f}" if len(scores) else "-"
            mean = f"**{mean}**" if float(rate) == rates[arm] else mean
            if len(scores) < worlds:
                mean, failed = f"{mean} ({len(scores)} of {worlds} worlds)", True
            row.append(mean)
        rows.append(row)
    table = markdown(["", *columns], rows)
    return table + "\n\nAn arm with a failed run has the preset's rate, 0.001." * failed


def compute(runs) -> str:
    rows = []
    for kind in KINDS:
        budget_of = [cell(runs, "main", arm, [kind]) for arm in BUDGET_OF]
        for cost, name in COSTS.items():
            scores = {}
            for arm in NAMES:
                scores[arm] = at_equal_cost(cell(runs, "main", arm, [kind]), budget_of, cost)
            less = {arm: (s - scores["sdpo"]).dropna() for arm, s in scores.items()}
            for arm, values in scores.items():
                gap = text(less[arm], "+") if arm != "sdpo" else "-"
                spent = [test[-1].get(cost) for test in cell(runs, "main", arm, [kind]).test]
                whole = f"{np.mean(spent):,.0f}" if spent and None not in spent else "-"
                rows.append([f"{kind}, {name}", NAMES[arm], text(values), gap, whole])
    table = markdown(["equal", "method", "mean score", "minus SDPO", "whole run"], rows)
    return f"{table}\n\n{OF_COMPUTE}"


def teachers(runs) -> str:
    """What each reader adds to the student, over all looks of a run, on main's worlds."""
    rows = []
    for kind in KINDS:
        for arm in NAMES:
            found = cell(runs, "main", arm, [kind])
            for group in ("unsolved", "solved"):
                row = [f"{NAMES[arm]}, {kind}, {group}"]
                for reader in ("student", *BLOCKS):
                    means = quality(found, group, reader).mean(axis=1).dropna()
                    row.append(f"{means.mean():.3f}" if len(means) else "-")
                rows.append(row)
    return f"{markdown(['', 'student', *BLOCKS], rows)}\n\n{OF_TEACHERS}"


def blocks(runs) -> str:
    """What each block adds to the weights alone, on the same problems."""
    rows = []
    for kind in KINDS:
        for arm in TAUGHT:
            found = cell(runs, "main", arm, [kind])
            for group in ("unsolved", "solved"):
                row = [f"{NAMES[arm]}, {kind}, {group}"]
                for block in BLOCKS[1:]:
                    row.append(text(beside_weights(found, group, block), "+"))
                rows.append(row)
    return f"{markdown(['', *BLOCKS[1:]], rows)}\n\n{OF_BLOCKS}"


def beside_weights(runs, group, block) -> pd.Series:
    """By world, the mean over looks of a block alone less the weights alone; see OF_BLOCKS."""
    means = {}
    for world, run in runs.iterrows():
        added = []
        for look in run.teacher:
            readers = look["teacher"].get(group, {})
            mean, problems = readers.get(block, (0, 0))
            bare, of = readers.get("weights", (0, 0))
            if problems and problems == of:
                added.append(mean - bare)
        if added:
            means[world] = np.mean(added)
    return pd.Series(means, dtype=float)


def sizes_of(runs) -> dict:
    """{size: (cell of SDPO, cell of PMD)}, plain worlds last.

    The shipped checkpoint's are runs of main. The one that misreads ran in plain worlds.
    """
    found = {}
    for size in runs[runs.part == "scale"].checkpoint.unique():
        name = "misreads, plain" if size == "misreads" else size
        found[name] = [cell(runs, "scale", arm, label=size) for arm in ("sdpo", "pmd")]
    for name, kind in (("0.9M", "feedback"), ("0.9M, plain", "plain")):
        shipped = [cell(runs, "main", arm, [kind]) for arm in ("sdpo", "pmd")]
        found[name] = [rows[rows.checkpoint == "0"] for rows in shipped]
    return dict(sorted(found.items(), key=lambda item: ("plain" in item[0], item[0])))


def scale(runs) -> str:
    rows = []
    for size, (sdpo, pmd) in sizes_of(runs).items():
        row = [size, text(sdpo.base), text(sdpo.auc), text(pmd.auc), text(gaps(pmd, sdpo), "+")]
        for reader in ("lessons", "all"):
            row.append(text(quality(pmd, "unsolved", reader).mean(axis=1).dropna(), "+"))
        rows.append(row)
    head = ["checkpoint", "base", "SDPO", "PMD", "PMD minus SDPO"]
    head += ["what lessons add, unsolved", "what all adds, unsolved"]
    return markdown(head, rows)


def mastered(runs) -> str:
    """The factorial, and what the declared criterion says."""
    rows, holds = [], []
    arms = [arm for arm in NAMES if arm in set(runs[runs.part == "mastered"].arm)]
    for arm in arms:
        for mean in ("sequence", "token"):
            kept = cell(runs, "mastered", arm, label=f"{mean}-all")
            left = cell(runs, "mastered", arm, label=f"{mean}-unmastered")
            final, whole = gaps(left, kept, "final"), gaps(left, kept)
            scores = [text(kept.final), text(left.final), text(final, "+"), text(whole, "+")]
            rows.append([NAMES[arm], mean, *scores])
            if mean == "sequence":
                holds.append(ends(final)[0] > 0 and ends(whole)[0] > -MARGIN)
    said = "is met" if len(holds) == 3 and all(holds) else "is not met"
    head = ["", "mean", "final, supervised", "final, left out"]
    head += ["final: left out minus supervised", "AUC: left out minus supervised"]
    return f"{markdown(head, rows)}\n\nThe declared criterion for leaving them out {said}."


def report(records, rates, out, planned) -> str:
    """Writes OUT/results.md and the figures, and says where they are.

    records: {name: record}. rates: the tuned ones, {arm: rate}. planned: {part: number of its
    runs}. A part is shown when all of its runs have a record: nobody looks at a comparison before.
    """
    made = {part: sum(row["part"] == part for row in records.values()) for part in planned}
    runs = frame(records)
    failed = [f"{r['job']} ({r['failed']})" for r in records.values() if "failed" in r]
    lines = ["# Results of the study", ""]
    if not records:
        lines += ["There are no records yet: `python study/study.py` makes them."]
    else:
        lines += [
            f"Made by `python study/study.py --report` from {len(records)} records;"
            f" {len(failed)} runs failed{': ' if failed else ''}{'; '.join(failed)}. The"
            " declaration stands at the top of study.py. Intervals are over worlds.",
            "",
        ]
    parts = {part for part in planned if made[part] == planned[part]}
    runs = runs[runs.part.isin(parts)]
    checkpoints = runs[runs.part == "main"].groupby("world").checkpoint.first()
    sections = {  # {part: [(title, what writes the table)]}
        "tuning": [
            ("Learning rates: AUC, the chosen one in bold", lambda: rates_table(runs, rates))
        ],
        "main": [
            ("Primary comparisons", lambda: primaries(runs, checkpoints)),
            ("Methods", lambda: methods(runs)),
            ("Other comparisons", lambda: explored(runs, checkpoints)),
            ("Equal compute", lambda: compute(runs)),
            (
                "The teacher: what it adds to the probability of the right operation",
                lambda: teachers(runs),
            ),
            ("The teacher: its blocks beside its weights", lambda: blocks(runs)),
        ],
        "scale": [
            ("Scale: AUC in eight feedback worlds, or in eight plain ones", lambda: scale(runs))
        ],
        "mastered": [("Mastered problems left out", lambda: mastered(runs))],
    }
    for part in planned:
        if 0 < made[part] < planned[part]:
            count = f"{made[part]} of its {planned[part]} runs"
            lines += [f"Part {part} has {count}: not shown yet.", ""]
    for part, tables in sections.items():
        for title, write in tables if part in parts else ():
            lines += [f"## {title}", "", write(), ""]
    drawn = []
    for part, figures in FIGURES.items():
        for name, draw in figures.items() if part in parts else ():
            draw(runs, out / f"{name}.png")
            drawn.append(f"![{name}]({name}.png)")
    lines += ["\n\n".join(drawn)]
    (out / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return f"{out / 'results.md'}{' and its figures' if drawn else ''}"


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def save(figure, path):
    # without the date and the version of matplotlib: equal records give equal bytes
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def band(axis, x, values, arm):
    """Draws the mean of values (worlds, x) with its 95% interval."""
    low, high = zip(*(ends(values[column].dropna()) for column in values), strict=True)
    axis.plot(x, values.mean(), color=COLORS[arm], label=NAMES[arm])
    axis.fill_between(x, low, high, alpha=0.15, color=COLORS[arm])


def learning_curves(runs, path):
    """Scores by step and by CPU seconds, a column a kind."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharey=True, layout="constrained")
    for column, kind in zip(axes.T, KINDS, strict=True):
        for arm in NAMES:
            found = cell(runs, "main", arm, [kind])
            if found.empty:
                continue
            scores = pd.DataFrame([[row["avg"] for row in test] for test in found.test])
            steps = [row["step"] for row in found.test.iloc[0]]
            band(column[0], steps, scores, arm)
            costs = pd.DataFrame([[row["cpu"] or 0 for row in test] for test in found.test])
            column[1].plot(costs.mean(), scores.mean(), color=COLORS[arm])
        column[0].set(title=f"worlds with {kind}" if kind == "feedback" else "plain worlds")
        column[0].set(xlabel="step", ylabel="avg@4")
        column[1].set(xlabel="CPU seconds", ylabel="avg@4")
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def teacher_curves(runs, path):
    """The teacher less its student: by method, and by block for PMD and for one that misreads.

    The last once part scale has its runs.
    """
    misreads = cell(runs, "scale", "pmd", label="misreads")
    shown = {"feedback: PMD by block,\nunsolved problems": cell(runs, "main", "pmd", ["feedback"])}
    if len(misreads):
        title = "plain: PMD by block, unsolved problems,\na checkpoint that misreads lessons"
        shown[title] = misreads
    panels = 1 + len(shown)
    size = {"figsize": (4.7 * panels, 4.2), "layout": "constrained"}
    figure, axes = plt.subplots(1, panels, sharey=True, **size)
    for arm, name in NAMES.items():
        found = cell(runs, "main", arm, ["feedback"])
        for group, style in (("unsolved", ".-"), ("solved", ".:")):
            values = quality(found, group, "all").mean()
            if len(values.dropna()):
                label = name if group == "unsolved" else None
                axes[0].plot(values.index, values, style, color=COLORS[arm], label=label)
    axes[0].set(title="feedback: all that it reads\n(dotted: solved problems)", xlabel="step")
    axes[0].set(ylabel="probability of the right operation,\nless the student's")
    for axis, (title, found) in zip(axes[1:], shown.items(), strict=True):
        for number, block in enumerate(BLOCKS):
            values = quality(found, "unsolved", block).mean()
            if len(values.dropna()):
                axis.plot(values.index, values, ".-", color=f"C{number}", label=block)
        axis.set(title=title, xlabel="step")
    for axis in axes:
        axis.axhline(0, color="gray", linewidth=0.8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save(figure, path)


def scale_figure(runs, path):
    """PMD less SDPO by checkpoint, beside what lessons add to its reader."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    sizes = sizes_of(runs)
    for offset, name in ((-0.08, "AUC: PMD - SDPO"), (0.08, "lessons: teacher - student")):
        for x, (sdpo, pmd) in enumerate(sizes.values()):
            values = gaps(pmd, sdpo)
            if offset > 0:
                values = quality(pmd, "unsolved", "lessons").mean(axis=1).dropna()
            if len(values):
                low, high = ends(values)
                color = "tab:orange" if offset > 0 else "tab:blue"
                label = name if x == 0 else None
                axis.vlines(x + offset, low, high, color=color)
                axis.plot(x + offset, values.mean(), "o", color=color, label=label)
    names = [name.replace(", plain", "\nplain") for name in sizes]
    axis.set_xticks(range(len(sizes)), names)
    axis.set(ylabel="difference, with its 95% interval")
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.legend()
    save(figure, path)


FIGURES = {  # {part: {name: what draws it}}
    "main": {"curves": learning_curves, "teacher": teacher_curves},
    "scale": {"scale": scale_figure},
}
