"""Writes the study's records as tables (results.md) and figures, in the paper's layout.

study.py has the design. Intervals are 95% t intervals over worlds. Differences are paired by world.
They have the p of the paired t test and that of Wilcoxon's signed ranks, which assumes nothing of
their distribution (scipy's normal approximation where differences tie). Worlds of one checkpoint
share its pre-training, which these intervals leave out of account. The mean difference of each
checkpoint is therefore given apart, and for the primary comparison the interval over these three
means. Nothing is corrected for the number of comparisons.
"""

import functools
import itertools
import statistics
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

matplotlib.use("Agg")  # figures are files; no screen is needed

NAMES = {
    "grpo": "GRPO",
    "sdpo": "SDPO",
    "pmd": "PMD",
    "pmd-solved": "PMD, supervised as SDPO is",
    "pmd-transient": "PMD, transient memory",
    "frozen-memory": "frozen memory",
    "frozen-policy": "frozen policy, memory in the prompt",
    "pmd-experience": "PMD, experience",
    "pmd-experience,insight": "PMD, experience + insight",
    "pmd-nolessons": "PMD, lessons hidden",
}
COLORS = {
    "grpo": "tab:orange",
    "sdpo": "tab:green",
    "pmd": "tab:blue",
    "pmd-solved": "tab:pink",
    "pmd-transient": "tab:cyan",
    "frozen-memory": "tab:red",
    "frozen-policy": "tab:purple",
    "pmd-experience": "navy",
    "pmd-experience,insight": "slateblue",
    "pmd-nolessons": "black",
}
# Qwen3-8B, average of the four SciKnowEval domains (Tables 2 to 4), in percent
PAPER = {
    "base": 47.9,
    "grpo": 69.4,
    "sdpo": 74.4,
    "pmd": 77.2,
    "pmd-transient": 75.7,
    "frozen-memory": 65.0,
    "frozen-policy": 54.0,
    "pmd-experience": 74.3,
    "pmd-experience,insight": 75.7,
}

SCORES = ["", "worlds", "AUC", "final", "dev-selected", "best on test", "paper"]


class Cell:
    """Holds the runs of one method under one condition: {world: record}."""

    def __init__(self, records, part, label):
        start = f"{part}/{label}/"
        self.runs = {}
        for name, record in records.items():
            if name.startswith(start) and "test" in record:
                self.runs[record["world"]] = record

    def __bool__(self):
        return bool(self.runs)

    def curve(self):
        """Returns (steps, {world: scores}) of all evaluations on test."""
        steps = [row["step"] for row in next(iter(self.runs.values()))["test"]]
        scores = {w: [row["avg"] for row in run["test"]] for w, run in self.runs.items()}
        return steps, scores

    def auc(self):
        """Returns {world: mean of avg@k after the first evaluation, to step 80}."""
        found = {}
        for world, run in self.runs.items():
            scores = [row["avg"] for row in run["test"] if 0 < row["step"] <= 80]
            found[world] = statistics.mean(scores)
        return found

    def final(self, key="avg"):
        return {world: run["test"][-1][key] for world, run in self.runs.items()}

    def base(self):
        return {world: run["test"][0]["avg"] for world, run in self.runs.items()}

    def after(self, step):
        """Returns {world: score}, of the worlds that were evaluated after a step."""
        found = {}
        for world, run in self.runs.items():
            scores = {row["step"]: row["avg"] for row in run["test"]}
            if step in scores:
                found[world] = scores[step]
        return found

    def on_dev(self):
        """Returns {world: test score of the checkpoint that is best on dev}.

        Of equals it is the first.
        """
        found = {}
        for world, run in self.runs.items():
            if run["dev"]:
                best = max(run["dev"], key=lambda row: row["avg"])
                scores = {row["step"]: row["avg"] for row in run["test"]}
                found[world] = scores[best["step"]]
        return found

    def on_test(self):
        return {w: max(row["avg"] for row in run["test"]) for w, run in self.runs.items()}

    def rollouts_to(self, level, per_step=32):
        """Returns the rollouts (worlds,) until avg@k first reaches a level.

        They are linear between evaluations, and infinite if avg@k never does.
        """
        found = []
        for run in self.runs.values():
            at = np.inf
            for a, b in itertools.pairwise(run["test"]):
                if b["avg"] >= level:
                    share = 0
                    if a["avg"] < level:
                        share = (level - a["avg"]) / (b["avg"] - a["avg"])
                    at = (a["step"] + share * (b["step"] - a["step"])) * per_step
                    break
            found.append(at)
        return np.array(found)


def spread(values):
    """Returns mean, low and high of the 95% t interval; NaN for the last two of a single value."""
    x = np.array(list(values), float)
    x = x[~np.isnan(x)]
    if len(x) < 2:
        return x.mean(), np.nan, np.nan
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def text(values, digits=3):
    """Writes a mean with its interval."""
    mean, low, high = spread(values)
    written = f"{mean:.{digits}f}"
    if np.isnan(low):
        return written
    return f"{written} [{low:.{digits}f}, {high:.{digits}f}]"


def gaps(a, b):
    """Returns {world: a - b} of the worlds in both."""
    return {world: a[world] - b[world] for world in a if world in b}


def by_checkpoint(differences, checkpoints):
    """Returns {checkpoint: mean difference}, in order of the checkpoints."""
    means = {}
    for checkpoint in sorted({checkpoints[world] for world in differences}):
        found = [gap for world, gap in differences.items() if checkpoints[world] == checkpoint]
        means[checkpoint] = np.mean(found)
    return means


def compared(a, b, checkpoints):
    """Returns the cells of a difference.

    They are the mean with its interval, the worlds won, p of t and of Wilcoxon, and the mean of
    each checkpoint.
    """
    differences = gaps(a, b)
    x = np.round(list(differences.values()), 9)  # or the last bit of a float would break a tie
    won = f"{int((x > 0).sum())} of {len(x)}"
    if len(x) < 2 or not x.any():
        return [text(x) if len(x) else "-", won, "-", "-", "-"]
    each = [f"{mean:+.3f}" for mean in by_checkpoint(differences, checkpoints).values()]
    t, wilcoxon = stats.ttest_1samp(x, 0).pvalue, stats.wilcoxon(x).pvalue
    return [text(x), won, f"{t:.2g}", f"{wilcoxon:.2g}", ", ".join(each)]


def markdown(head, rows):
    """Writes a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def results_row(label, cell):
    """Returns the cells of a method in a table of scores."""
    on_dev, on_test = cell.on_dev(), list(cell.on_test().values())
    return [
        NAMES.get(label, label),
        len(cell.runs),
        text(cell.auc().values()),
        text(cell.final().values()),
        text(on_dev.values()) if on_dev else "-",
        f"{np.mean(on_test):.3f} (of {len(cell.curve()[0])})",
        PAPER.get(label, "-"),
    ]


def main_cells(records, grid):
    """Returns {method: Cell} of the parts main, tiers and lessons, of all methods with a record."""
    cells = {method: Cell(records, "main", method) for method in grid.METHODS}
    for tiers in grid.TIERS[:-1]:
        cells[f"pmd-{tiers}"] = Cell(records, "tiers", f"pmd-{tiers}")
    cells["pmd-nolessons"] = Cell(records, "lessons", "pmd-nolessons")
    return {label: cell for label, cell in cells.items() if cell}


def report(records, times, rates, out, grid) -> str:
    """Writes OUT/results.md and the figures, and returns where they are.

    grid: the module study.py, for what it declares.
    """
    checkpoints = {record["world"]: record["checkpoint"] for record in records.values()}
    main = main_cells(records, grid)
    lines = []

    def say(*blocks):
        lines.extend([*blocks, ""])

    introduction(say, main, records, checkpoints, out)
    learning_rates(say, records, rates, grid)
    if main:
        methods(say, main)
        paired_differences(say, main, checkpoints)
        rollouts_to_levels(say, main)
    tiers(say, main, records, grid.TIERS)
    if main:
        headroom_and_coverage(say, main)
    memory_over_time(say, main)
    transfer(say, records, grid.SIZES)
    cost(say, main, times)
    knobs(say, records, checkpoints, rates, grid.KNOBS, grid.COMPARED)
    (out / "results.md").write_text("\n".join(lines), encoding="utf-8")
    figures(main, records, checkpoints, rates, grid, out)
    return f"{out / 'results.md'} and its figures"


def introduction(say, main, records, checkpoints, out):
    failed = {name: record["failed"] for name, record in records.items() if "failed" in record}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    say("# Results of the study")
    if (out / "note.md").is_file():  # what has to be known of these records
        say((out / "note.md").read_text(encoding="utf-8").strip())
    if {"pmd", "sdpo"} <= main.keys():
        say(headline(main, checkpoints))
    say(
        f"Made by `python study/study.py` from the {len(records)} records in records.jsonl; "
        f"{len(failed)} runs failed{': ' if failed else ''}{reasons}. "
        "What was declared before the first run stands at the top of study.py. Everything here is "
        "the embedded world: it says how the methods compare where a tiny model has to find "
        "eight-way facts, not what an 8B model gains on chemistry. The paper's numbers (Qwen3-8B, "
        "average of four SciKnowEval domains, one run each, in percent) stand beside ours for the "
        "order only."
    )


def learning_rates(say, records, rates, grid):
    """Says what each learning rate scored, the chosen one in bold."""
    if not any(name.startswith("tuning/") for name in records):
        return
    rows = []
    for method in grid.TUNED:
        row = [NAMES[method]]
        for rate in grid.RATES:
            scores = tuning(records, method, rate)
            mean = f"{np.mean(scores):.3f}" if scores else "-"
            row.append(f"**{mean}**" if rate == rates.get(method) else mean)
        rows.append(row)
    say(
        "## The learning rate of each method",
        "AUC, mean of the three tuning worlds; bold: chosen. Same rates, same worlds, same number "
        "of runs for each.",
        "",
        markdown(["", *(f"{rate:g}" for rate in grid.RATES)], rows),
    )


def methods(say, main):
    """Says what each method scores: Tables 2 and 3 of the paper."""
    first = main.get("sdpo") or next(iter(main.values()))
    base = text(first.base().values())
    rows = [["base", len(first.runs), "-", base, "-", "-", PAPER["base"]]]
    rows += [results_row(label, cell) for label, cell in main.items() if "experience" not in label]
    say(
        "## Tables 2 and 3: methods and controls",
        "avg@4 on held-out problems, without memory in the prompt; a frozen policy has it there, "
        "or it would score as the base.",
        "",
        markdown(SCORES, rows),
    )


PAIRS = [
    ("pmd", "sdpo"),
    ("pmd", "grpo"),
    ("sdpo", "grpo"),
    ("pmd-solved", "pmd"),
    ("pmd-solved", "sdpo"),
    ("pmd-solved", "grpo"),
    ("pmd", "pmd-transient"),
    ("pmd-transient", "sdpo"),
    ("pmd", "frozen-memory"),
    ("pmd-transient", "frozen-policy"),
    ("frozen-memory", "frozen-policy"),
    ("pmd", "pmd-experience,insight"),
    ("pmd-experience,insight", "pmd-experience"),
    ("pmd-experience", "sdpo"),
    ("pmd-nolessons", "pmd"),
    ("pmd-nolessons", "sdpo"),
]


def paired_differences(say, main, checkpoints):
    """Says how the methods of PAIRS differ, world by world."""
    head = ["", "difference", "worlds won", "p (t)", "p (Wilcoxon)", "by checkpoint"]
    for title, scores in (("AUC", Cell.auc), ("final score", Cell.final)):
        rows = []
        for a, b in PAIRS:
            if a in main and b in main:
                primary = title == "AUC" and (a, b) == ("pmd", "sdpo")
                name = f"{NAMES[a]} - {NAMES[b]}"
                cells = compared(scores(main[a]), scores(main[b]), checkpoints)
                rows.append([f"**primary** {name}" if primary else name, *cells])
        say(f"### Paired differences: {title}", markdown(head, rows))
    say("![learning curves](curves.png)", "", "![differences by world](differences.png)")


def rollouts_to_levels(say, main):
    """Says how many rollouts each method needs to reach 50% and 90%."""
    rows = []
    for label, cell in main.items():
        row = [NAMES[label]]
        for level in (0.5, 0.9):
            at = cell.rollouts_to(level)
            median = np.median(at)
            row.append(f"{np.isfinite(at).sum()} of {len(at)}")
            row.append(f"{median:.0f}" if np.isfinite(median) else "not by half of them")
        rows.append(row)
    say(
        "### Rollouts to 50% and 90%",
        "Median over worlds, those that never get there counted as infinite.",
        "",
        markdown(["", "reach 50%", "rollouts", "reach 90%", "rollouts"], rows),
    )


def headroom_and_coverage(say, main):
    """Says what more samples add, and which problems which methods solve: Figures 3 and 4."""
    rows = []
    for label, cell in main.items():
        maj, best = cell.final("maj"), cell.final("best")
        tokens = text(cell.final("tokens").values(), 1)
        scores = [text(found.values()) for found in (maj, best, gaps(best, maj))]
        rows.append([NAMES[label], *scores, tokens])
    say(
        "## Figure 3 and Table 5: headroom and length",
        "At the final step, k = 4; tokens of a completion.",
        "",
        markdown(["", "maj@4", "best@4", "headroom", "tokens"], rows),
    )
    solved = venn(main, [label for label in ("grpo", "sdpo", "pmd") if label in main])
    say(
        "## Figure 4: coverage",
        "Share of held-out problems that at least one of 4 samples solves at the final step, by "
        "exactly these methods.",
        "",
        markdown(["solved by", "share"], [[who, text(shares)] for who, shares in solved.items()]),
        "",
        "![coverage](coverage.png)",
    )


def tuning(records, method, rate):
    """Returns the AUC of each tuning run of a method at a rate."""
    scores = []
    for name, record in records.items():
        ours = name.startswith(f"tuning/{method}/") and name.endswith(f"@{rate:g}")
        if ours and "test" in record:
            scores.append(statistics.mean(row["avg"] for row in record["test"] if row["step"]))
    return scores


def headline(main, checkpoints):
    """Writes the first paragraph: the primary comparison, and whether the order is the paper's."""
    pmd, sdpo = main["pmd"].auc(), main["sdpo"].auc()
    difference, won, t, wilcoxon, each = compared(pmd, sdpo, checkpoints)
    means = by_checkpoint(gaps(pmd, sdpo), checkpoints).values()
    methods = ("pmd", "pmd-transient", "sdpo", "grpo", "frozen-memory", "frozen-policy")
    mean = {label: np.mean(list(main[label].auc().values())) for label in methods if label in main}
    ours = sorted(mean, key=mean.get, reverse=True)
    theirs = sorted(mean, key=PAPER.get, reverse=True)
    same = "is the paper's"
    if ours != theirs:
        same = f"is NOT the paper's ({' > '.join(NAMES[label] for label in theirs)})"
    order = " > ".join(f"{NAMES[label]} {mean[label]:.3f}" for label in ours)
    return (
        f"**PMD minus SDPO in AUC, the primary comparison: {difference}; PMD ahead in {won} "
        f"worlds; p = {t} (paired t), {wilcoxon} (Wilcoxon); by checkpoint {each}, over which "
        f"alone {text(means)}.** The order by mean AUC, {order}, {same}; neighbours in it need not "
        "differ, see the paired differences."
    )


def tiers(say, main, records, names):
    """Says what each level of the memory is worth: Table 4 of the paper."""
    trained = ("pmd-experience", "pmd-experience,insight", "pmd")
    rows = [results_row(label, main[label]) for label in trained if label in main]
    readings = []
    for levels, paper in zip(names, (55.9, 58.3, 57.2), strict=True):
        suffix = "" if levels == names[-1] else f"-{levels}"
        cell = Cell(records, "tiers", f"base-reads-frozen-policy{suffix}")
        if cell:
            score = text(cell.final().values())
            readings.append([levels.replace(",", " + "), len(cell.runs), score, paper])
    if len(rows) < 2 and not readings:
        return
    head = ["the initial policy, with the frozen policy's", "worlds", "avg@4", "paper"]
    say(
        "## Table 4: memory levels",
        "Above, what the teacher reads while it trains the student; below, what the initial policy "
        "reads in its prompt, out of the memory that grew under it.",
        "",
        markdown(SCORES, rows),
        "",
        markdown(head, readings),
    )


def venn(main, chosen):
    """Returns {methods: shares}: of each world, the problems that exactly these methods solve.

    It has every set of the chosen methods.
    """
    worlds = sorted(set.intersection(*(set(main[label].runs) for label in chosen)))
    solved = {}  # {method: (worlds, problems)}
    for label in chosen:
        marks = [list(main[label].runs[world]["solved"]) for world in worlds]
        solved[label] = np.array(marks) == "1"
    shares = {}
    for which in sorted(
        itertools.product((True, False), repeat=len(chosen)), key=sum, reverse=True
    ):
        names = [NAMES[label] for label, one in zip(chosen, which, strict=True) if one]
        agree = [solved[label] == one for label, one in zip(chosen, which, strict=True)]
        shares[", ".join(names) or "none"] = np.all(agree, axis=0).mean(1)
    return shares


def of_steps(cell, get):
    """Returns (steps, {world: values}) of the records of training steps."""
    steps = [row["step"] for row in next(iter(cell.runs.values()))["steps"]]
    return steps, {w: [get(row) for row in run["steps"]] for w, run in cell.runs.items()}


def wrong_share(row):
    """Returns the share of living strategies that are wrong; NaN if none lives."""
    return np.nan if row["right"] is None else 1 - row["right"]


REMEMBER = ("pmd", "pmd-solved", "pmd-transient", "frozen-policy")
TIERS = ("experience", "insight", "behavior")  # in the order of a record's sizes


def memory_over_time(say, main):
    """Says how large each memory is over time, and how much of it is wrong: Figure 6."""
    rows = []
    for label in REMEMBER:
        if label not in main:
            continue
        for i, tier in enumerate(TIERS):
            steps, sizes = of_steps(main[label], lambda row, i=i: row["memory"][i])
            rows.append([NAMES[label], tier, *(f"{mean:.0f}" for mean in means_of(sizes))])
        steps, shares = of_steps(main[label], wrong_share)
        rows.append(
            [NAMES[label], "wrong strategies", *(f"{mean:.3f}" for mean in means_of(shares))]
        )
    if rows:
        say(
            "## Figure 6: growth of the memory, and how much of it is wrong",
            "Means over worlds at the step; wrong: the share of living strategies that the hidden "
            "truth denies, over the worlds that have any at that step.",
            "",
            "![memory](memory.png)",
            "",
            markdown(["", "", *steps], rows),
        )


def means_of(by_world):
    """Returns the mean over worlds at each step."""
    return [spread(column)[0] for column in zip(*by_world.values(), strict=True)]


READERS = ("nothing", "frozen-policy", "pmd")  # whose memory is read


def transfer(say, records, sizes):
    """Says what a memory is worth in the prompts of models of other sizes: Figure 2."""
    rows = []
    for size in sizes:
        cells = [Cell(records, "transfer", f"{size}-reads-{label}") for label in READERS]
        if any(cells):
            rows.append([size, *(text(cell.final().values()) if cell else "-" for cell in cells)])
    head = ["reader", "no memory", "a frozen policy's memory"]
    head.append("the memory that co-evolved with a policy")
    if rows:
        say(
            "## Figure 2: the memory in the prompt of models that were not trained",
            "Parameters of the reader; avg@4 on held-out problems of eight worlds.",
            "",
            markdown(head, rows),
            "",
            "![transfer](transfer.png)",
        )


def step_seconds(cell, times):
    """Returns {world: seconds of a step}, of the runs that were timed."""
    found = {world: times.get(record["job"], {}) for world, record in cell.runs.items()}
    return {world: row["step_seconds"] for world, row in found.items() if "step_seconds" in row}


def cost(say, main, times):
    """Says what a step costs beside SDPO's, and what equal time buys: Table 7."""
    if "sdpo" not in main:
        return
    sdpo = main["sdpo"]
    theirs = step_seconds(sdpo, times)
    rows = []
    for label, cell in main.items():
        ours = step_seconds(cell, times)
        worlds = [world for world in ours if world in theirs]
        if label == "pmd-nolessons" or not worlds:
            continue
        seconds = [ours[world] / theirs[world] for world in worlds]
        jobs = [(cell.runs[world]["job"], sdpo.runs[world]["job"]) for world in worlds]
        cpu = [times[mine]["cpu"] / times[other]["cpu"] for mine, other in jobs]
        equal = "-"
        if label in ("grpo", "pmd", "pmd-solved", "pmd-transient", "sdpo"):
            equal = text(at_equal_compute(cell, sdpo, ours, theirs).values())
        ratios = [f"{np.median(x):.2f} [{min(x):.2f}, {max(x):.2f}]" for x in (seconds, cpu)]
        rows.append([NAMES[label], *ratios, equal])
    if not rows:
        return
    head = [
        "",
        "seconds over SDPO's",
        "CPU seconds over SDPO's",
        "AUC in the time of SDPO's 80 steps",
    ]
    say(
        "## Table 7: cost of a step, and equal compute",
        "Seconds of a step over SDPO's in the same world (evaluation left out; two runs at a time "
        "on two cores): median [least, largest]. The paper: 1.45. Then the same of all the CPU "
        "seconds of a run, evaluations included, which depend less on what else the machine did. "
        "Then AUC over the time in which SDPO makes its 80 steps, on the clock: who is slower "
        "makes fewer, and who is faster than SDPO is not run beyond 80. Times differ from run to "
        "run, and with them this table. GRPO scores every rollout before the update, for its "
        "ratios, and trains on all of them; SDPO on those alone that have a successful sibling.",
        "",
        markdown(head, rows),
    )


def at_equal_compute(cell, reference, seconds, of_reference):
    """Returns {world: mean score over the time in which the reference makes its 80 steps}.

    The scores are read at the times of the reference's evaluations.
    """
    found = {}
    for world, run in cell.runs.items():
        if world not in seconds or world not in of_reference:
            continue
        steps = [row["step"] for row in run["test"]]
        scores = [row["avg"] for row in run["test"]]
        asked = [row["step"] for row in reference.runs[world]["test"] if row["step"]]
        at = np.multiply(asked, of_reference[world]) / seconds[world]
        found[world] = float(np.mean(np.interp(at, steps, scores)))
    return found


LATE = {
    "falls": "the rate falling to 0 from step 80 on",
    "unsolved": "nothing supervised where all attempts succeed",
}  # arms of the part of that name

# of each knob: (title, [(setting, part, suffix of the label, and what is told if not AUC)])
SETTINGS = {
    "groups": ("Group size", [("2", "groups", "-2"), ("4", "main", ""), ("8", "groups", "-8")]),
    "rarity": (
        "How rare success is at the start",
        [
            ("no name of one syllable (0.7%)", "rarity", "-rare"),
            ("as in main (3%)", "main", ""),
            ("16 names of one or two syllables (7%)", "rarity", "-common"),
        ],
    ),
    "sharing": (
        "How much problems share",
        [
            ("16 names, syllables shared", "rarity", "-common"),
            ("16 names, none shared", "sharing", "-apart"),
        ],
    ),
    "rates": ("Learning rate", [(f"{r:g}", "rates", f"-{r:g}") for r in (3e-4, 6e-4, 1e-3, 2e-3)]),
    "teacher": (
        "The teacher's weights",
        [
            ("average of the student's, 0.05", "main", ""),
            ("the student's own (Eq. 6)", "teacher", "-live"),
        ],
    ),
    "epochs": (
        "Twice the steps: not AUC, but the score",
        [
            *(
                (f"after {step}", "epochs", "-160", functools.partial(Cell.after, step=step))
                for step in (40, 80, 120, 160)
            ),
            ("of the best on dev", "epochs", "-160", Cell.on_dev),
            *(
                (f"after 160, {said}", "late", f"-{arm}", functools.partial(Cell.after, step=160))
                for arm, said in LATE.items()
            ),
        ],
    ),
}


PAIRED = {
    "PMD - SDPO": ("pmd", "sdpo"),
    "the other PMD - SDPO": ("pmd-solved", "sdpo"),
    "the other PMD - GRPO": ("pmd-solved", "grpo"),
    "PMD - transient": ("pmd", "pmd-transient"),
}

PANELS = (
    "rarity",
    "groups",
    "rates",
)  # the knobs of the figure; the others have two settings, or a figure of their own


def knobs(say, records, checkpoints, rates, parts, methods):
    """Says what each knob changes, in the worlds of the shipped checkpoint."""
    recorded = {name.partition("/")[0] for name in records}
    shown = [part for part in parts if part in recorded and part not in ("lessons", "late")]
    if not shown:
        return
    figure = ["", "![the knobs](knobs.png)"] if {*shown} & {*PANELS} else []
    say(
        "## When? The knobs",
        "Worlds of the shipped checkpoint, the one where PMD is not behind SDPO in main; AUC, and "
        "differences paired by world. Exploratory.",
        *figure,
    )
    for part in shown:
        if part == "wrong":
            harm(say, records)
            continue
        knob(say, records, part, rates, methods)
        if part == "sharing":
            without_behaviors(say, records, checkpoints)
        if part == "epochs" and "late" in recorded:
            late(say, records, checkpoints, methods)


def cell_text(values):
    return text(values.values()) if values else "-"


def paired(scores, a, b):
    """Returns {world: a - b} of {method: {world: score}}; empty where a method is not there."""
    return gaps(scores[a], scores[b]) if {a, b} <= scores.keys() else {}


def knob(say, records, part, rates, methods):
    """Says what the methods score at each setting of a knob, and how they differ."""
    settings = list(by_setting(records, part, rates, methods))
    rows = []
    for setting, scores in settings:
        differences = [paired(scores, a, b) for a, b in PAIRED.values()]
        cells = [scores.get(label, {}) for label in methods]
        rows.append([setting, *map(cell_text, cells), *map(cell_text, differences)])
    if part in PANELS:  # ordered settings: does what PMD gains change from one end to the other?
        (_, first), (_, last) = settings[0], settings[-1]
        changes = [gaps(paired(last, a, b), paired(first, a, b)) for a, b in PAIRED.values()]
        rows.append(["last less first", *("-" for _ in methods), *map(cell_text, changes)])
    worlds = len(worlds_of(records, part))
    said = f"{worlds} worlds." if worlds >= 8 else f"Only {worlds} of 8 worlds so far."
    head = ["", *(NAMES[label] for label in methods), *PAIRED]
    say(f"### {SETTINGS[part][0]}", said, "", markdown(head, rows))


def harm(say, records):
    """Says what wrong insights cost, with grounding and without."""
    sdpo = Cell(records, "main", "sdpo").auc()
    rows, unharmed = [], {}
    for how, share, *pair in wrong(records):
        scores = [cell.auc() for cell in pair]
        whole = unharmed.setdefault(how, scores)
        losses = [gaps(score, none) for score, none in zip(scores, whole, strict=True)]
        leads = [gaps(score, sdpo) for score in scores]
        cells = map(cell_text, (*scores, *losses, *leads))
        rows.append([how, f"{share:g}", text(last_wrong(pair[0])), *cells])
    head = ["", "share", "wrong at the end", NAMES["pmd"], NAMES["pmd-solved"]]
    head += ["PMD - its share 0", "the other PMD - its share 0"]
    head += ["PMD - SDPO", "the other PMD - SDPO"]
    say(
        "### How wrong may insights be?",
        f"{len(worlds_of(records, 'wrong'))} worlds.",
        "A share of the operations in the strategies that reflection writes is exchanged for wrong "
        "ones, before the memory sees them; lessons are left alone. Wrong at the end: the share of "
        "PMD's living strategies that the hidden truth denies. Grounding keeps the wrong ones out; "
        "what it then costs is that fewer are left.",
        "",
        markdown(head, rows),
        "",
        "![memory that harms](harm.png)",
    )


def without_behaviors(say, records, checkpoints):
    """Says what behaviors are worth, where problems share syllables and where they do not."""
    rows = []
    for name, kind, part in (("shared", "common", "rarity"), ("none shared", "apart", "sharing")):
        full = Cell(records, part, f"pmd-{kind}")
        without = Cell(records, "sharing", f"pmd-{kind}-nobehavior")
        if full and without:
            rows.append([name, *compared(full.auc(), without.auc(), checkpoints)[:4]])
    say(
        "PMD minus PMD whose teacher reads no behaviors, AUC:",
        "",
        markdown(["syllables", "difference", "worlds won", "p (t)", "p (Wilcoxon)"], rows),
    )


def late(say, records, checkpoints, methods):
    """Says what each arm of the part late changes after 160 steps."""
    rows = []
    for label in methods:
        constant = Cell(records, "epochs", f"{label}-160").after(160)
        for arm, said in LATE.items():
            if cell := Cell(records, "late", f"{label}-{arm}"):
                cells = compared(cell.after(160), constant, checkpoints)
                rows.append([NAMES[label], said, *cells[:4]])
    say(
        "After 160 steps, minus the same method at a constant rate, everything supervised:",
        "",
        markdown(["", "with", "difference", "worlds won", "p (t)", "p (Wilcoxon)"], rows),
    )


def by_setting(records, part, rates, methods):
    """Yields (setting, {method: {world: score}}) for each setting of a knob.

    The score is AUC, or what else the part tells.
    """
    worlds = worlds_of(records, part)
    for setting, where, suffix, *told in SETTINGS[part][1]:
        tell = told[0] if told else Cell.auc
        scores = {}
        for label in methods:
            cell = Cell(records, where, label + suffix)
            if part == "rates" and suffix == f"-{rates.get(label, 0):g}":
                cell = Cell(records, "main", label)  # its own rate
            if cell:
                found = tell(cell).items()
                scores[label] = {world: score for world, score in found if world in worlds}
        if scores:
            yield setting, scores


def worlds_of(records, part):
    return {record["world"] for name, record in records.items() if name.startswith(f"{part}/")}


def last_wrong(cell):
    """Returns the share of wrong strategies at the last step, of each world."""
    return [wrong_share(record["steps"][-1]) for record in cell.runs.values()]


def wrong(records):
    """Yields grounded or not, share, PMD's cell, and that of PMD supervised as SDPO is."""
    worlds = worlds_of(records, "wrong")
    for how, share in itertools.product(("grounded", "ungrounded"), (0.0, 0.2, 0.5)):
        part, suffix = "wrong", f"-{share:g}-{how}"
        if how == "grounded" and not share:
            part, suffix = "main", ""
        pair = [Cell(records, part, label + suffix) for label in ("pmd", "pmd-solved")]
        for cell in pair:
            cell.runs = {world: run for world, run in cell.runs.items() if world in worlds}
        if any(pair):
            yield how, share, *pair


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def band(axes, x, by_world, label, color, **style):
    """Draws the mean over worlds with its interval."""
    values = np.array([spread(column) for column in zip(*by_world.values(), strict=True)])
    axes.plot(x, values[:, 0], label=label, color=color, **style)
    axes.fill_between(x, values[:, 1], values[:, 2], color=color, alpha=0.15, linewidth=0)


def points(axes, x, spreads, **style):
    """Draws means with their intervals, given (mean, low, high) at each x."""
    values = np.array(spreads)
    errors = np.abs(values[:, 1:].T - values[:, 0])
    axes.errorbar(x, values[:, 0], yerr=errors, capsize=3, **style)


def save(figure, path):
    figure.savefig(path, dpi=130)
    plt.close(figure)


def figures(main, records, checkpoints, rates, grid, out):
    """Draws all figures of which there are records."""
    draw_transfer(records, grid.SIZES, out)
    draw_knobs(records, rates, grid.COMPARED, out)
    draw_harm(main, records, out)
    if main:
        draw_curves(main, records, out)
        draw_coverage(main, out)
    if {"pmd", "sdpo"} <= main.keys():
        draw_differences(main, checkpoints, out)
    if remember := [label for label in ("pmd", "pmd-transient", "frozen-policy") if label in main]:
        draw_memory(main, remember, out)


def draw_curves(main, records, out):
    """Draws the learning curves of the methods, the controls and the long runs."""
    methods = ("grpo", "sdpo", "pmd", "pmd-solved", "pmd-transient")
    controls = ("sdpo", "pmd", "pmd-experience,insight", "pmd-experience")
    controls += ("frozen-memory", "frozen-policy")
    long = {label: Cell(records, "epochs", f"{label}-160") for label in methods}
    panels = [("methods", methods, main), ("controls", controls, main)]
    if any(long.values()):
        panels.append(("twice the steps, 8 worlds", methods, long))
    size = (15 if len(panels) == 3 else 11, 4.4)
    figure, row = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    for axes, (title, chosen, cells) in zip(row, panels, strict=True):
        for label in chosen:
            if cells.get(label):
                steps, curves = cells[label].curve()
                band(axes, steps, curves, NAMES[label], COLORS[label], marker="o", markersize=3)
        axes.set(title=title, xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    row[0].set_ylabel("avg@4 on held-out problems")
    save(figure, out / "curves.png")


DRAWN_PAIRS = [
    ("pmd", "sdpo"),
    ("pmd-solved", "sdpo"),
    ("pmd", "grpo"),
    ("pmd-solved", "grpo"),
    ("pmd", "pmd-transient"),
    ("pmd", "frozen-memory"),
]


def draw_differences(main, checkpoints, out):
    """Draws the differences in AUC, a point a world, with their mean and interval."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    pairs = [(a, b) for a, b in DRAWN_PAIRS if {a, b} <= main.keys()]
    for i, (a, b) in enumerate(pairs):
        differences = gaps(main[a].auc(), main[b].auc())
        for checkpoint in sorted(set(checkpoints.values())):
            x = [gap for world, gap in differences.items() if checkpoints[world] == checkpoint]
            y = np.full(len(x), i) + 0.12 * (checkpoint - 1)
            label = None if i else f"checkpoint {checkpoint}"
            axes.plot(x, y, ".", color=f"C{checkpoint}", label=label)
        mean, low, high = spread(differences.values())
        errors = [[mean - low], [high - mean]]
        axes.errorbar(mean, i - 0.35, xerr=errors, fmt="kD", markersize=4, capsize=3)
    axes.axvline(0, color="gray", linewidth=1)
    labels = [f"{NAMES[a]}\n- {NAMES[b]}" for a, b in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="difference in AUC, a point a world; diamond: mean and 95% interval")
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    save(figure, out / "differences.png")


def draw_memory(main, labels, out):
    """Draws how each memory grows, and how much of it is wrong."""
    panels = {
        "insight: living items": lambda row: row["memory"][1],
        "behavior: living items": lambda row: row["memory"][2],
        "share of strategies: wrong": wrong_share,
    }
    figure, row = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axes, (title, get) in zip(row, panels.items(), strict=True):
        for label in labels:
            steps, values = of_steps(main[label], get)
            if len(values) > 1:
                band(axes, steps, values, NAMES[label], COLORS[label])
        axes.set(title=title, xlabel="step")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    row[0].legend(fontsize=8)
    save(figure, out / "memory.png")


def draw_transfer(records, sizes, out):
    """Draws what a memory is worth in the prompts of models of other sizes."""
    lines = (
        ("nothing", "no memory", "gray"),
        ("pmd", "the co-evolved memory", "tab:blue"),
        ("frozen-policy", "a frozen policy's memory", "tab:purple"),
    )
    if not worlds_of(records, "transfer"):
        return
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for lender, label, color in lines:
        cells = [Cell(records, "transfer", f"{size}-reads-{lender}") for size in sizes]
        spreads = [spread(cell.final().values()) for cell in cells if cell]
        if spreads:
            points(axes, range(len(spreads)), spreads, label=label, color=color, marker="o")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(xlabel="parameters of the reader, which was not trained", ylim=(0, 1.02))
    axes.set_ylabel("avg@4 on held-out problems")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, out / "transfer.png")


def draw_knobs(records, rates, methods, out):
    """Draws what the methods score at the settings of the knobs in PANELS."""
    parts = [part for part in PANELS if worlds_of(records, part)]
    if not parts:
        return
    size = (5 * len(parts), 4.2)
    grid = {"figsize": size, "sharey": True, "layout": "constrained", "squeeze": False}
    figure, (row,) = plt.subplots(1, len(parts), **grid)
    for axes, part in zip(row, parts, strict=True):
        settings = list(by_setting(records, part, rates, methods))
        for i, label in enumerate(methods):
            scored = [n for n, (_, scores) in enumerate(settings) if scores.get(label)]
            if scored:
                spreads = [spread(settings[n][1][label].values()) for n in scored]
                x = np.array(scored) + 0.06 * (i - 2)  # side by side
                style = {"color": COLORS[label], "marker": "o", "markersize": 4}
                points(axes, x, spreads, label=NAMES[label], **style)
        labels = [textwrap.fill(setting, 18) for setting, _ in settings]
        axes.set_xticks(range(len(settings)), labels, fontsize=8)
        axes.set(title=SETTINGS[part][0], ylim=(0, 1))
        axes.grid(alpha=0.3)
    row[0].set_ylabel("AUC, mean and 95% interval over worlds")
    row[0].legend(fontsize=8)
    save(figure, out / "knobs.png")


def draw_harm(main, records, out):
    """Draws what wrong insights cost, with grounding and without."""
    worlds = worlds_of(records, "wrong")
    if not worlds:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    curves = {}  # {(how, place of the method): [(share, {world: AUC})]}
    for how, share, *pair in wrong(records):
        for i, cell in enumerate(pair):
            if cell:
                curves.setdefault((how, i), []).append((share, cell.auc()))
    for (how, i), found in sorted(curves.items()):
        label = ("pmd", "pmd-solved")[i]
        j = int(how == "ungrounded")
        x = [share + 0.006 * (2 * j + i - 1.5) for share, _ in found]  # side by side
        style = {"label": f"{NAMES[label]}, {how}", "color": COLORS[label]}
        style |= {"linestyle": ("-", "--")[j], "marker": ("s", "o")[j]}
        points(left, x, [spread(auc.values()) for _, auc in found], **style)
        _, whole = found[0]
        points(right, x, [spread(gaps(auc, whole).values()) for _, auc in found], **style)
    for label in ("sdpo", "pmd-transient"):
        if label in main:
            scores = [score for world, score in main[label].auc().items() if world in worlds]
            mean, low, high = spread(scores)
            name = f"{NAMES[label]}, as in main"
            left.axhline(mean, color=COLORS[label], linestyle=":", label=name)
            left.axhspan(low, high, color=COLORS[label], alpha=0.1, linewidth=0)
    left.set(title="AUC", ylim=(0, 0.7))
    right.set(title="less that of share 0, paired by world")
    right.axhline(0, color="gray", linewidth=1)
    for axes in (left, right):
        axes.set(xlabel="share of the operations in reflected strategies made wrong")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(figure, out / "harm.png")


def draw_coverage(main, out):
    """Draws what more samples add, and which problems which methods solve."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for i, (label, cell) in enumerate(main.items()):
        maj = np.mean(list(cell.final("maj").values()))
        best, low, high = spread(cell.final("best").values())
        errors = [[best - low], [high - best]]
        left.barh(i, maj, color=COLORS[label])
        left.barh(i, best - maj, left=maj, color=COLORS[label], alpha=0.4)
        left.errorbar(best, i, xerr=errors, fmt="none", ecolor="black", capsize=3)
    left.set_yticks(range(len(main)), [NAMES[label] for label in main], fontsize=8)
    left.invert_yaxis()
    left.set(xlim=(0, 1))
    left.set_title("Figure 3: maj@4, and the headroom to best@4 (pale)", fontsize=10)
    sets = venn(main, [label for label in ("grpo", "sdpo", "pmd") if label in main])
    spreads = np.array([spread(shares) for shares in sets.values()])
    mean, low, high = spreads.T
    right.barh(range(len(sets)), mean, color="tab:gray", xerr=[mean - low, high - mean], capsize=3)
    right.set_yticks(range(len(sets)), sets, fontsize=8)
    right.invert_yaxis()
    right.set_title("Figure 4: held-out problems solved by exactly these", fontsize=10)
    save(figure, out / "coverage.png")
