"""The study's records as tables (results.md) and figures, in the paper's layout. See study.py for the design.

Intervals are 95% t intervals over worlds; differences are paired by world, with the p of the paired t test and, which makes
no assumption on their distribution, that of Wilcoxon's signed ranks (scipy's normal approximation where differences tie).
Worlds of one checkpoint share its pre-training, which these intervals leave out of account: the mean difference of each
checkpoint is given apart, and for the primary comparison the interval over these three means. Nothing is corrected for the
number of comparisons.
"""

import functools
import itertools
import statistics
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

NAMES = {"grpo": "GRPO", "sdpo": "SDPO", "pmd": "PMD", "pmd-solved": "PMD, supervised as SDPO is",
         "pmd-transient": "PMD, transient memory",
         "frozen-memory": "frozen memory", "frozen-policy": "frozen policy, memory in the prompt",
         "pmd-experience": "PMD, experience", "pmd-experience,insight": "PMD, experience + insight",
         "pmd-nolessons": "PMD, lessons hidden"}
COLORS = dict(zip(NAMES, ("tab:orange", "tab:green", "tab:blue", "tab:pink", "tab:cyan", "tab:red", "tab:purple", "navy",
                          "slateblue", "black"), strict=True))
# Qwen3-8B, average of the four SciKnowEval domains (Tables 2 to 4), in percent
PAPER = {"base": 47.9, "grpo": 69.4, "sdpo": 74.4, "pmd": 77.2, "pmd-transient": 75.7, "frozen-memory": 65.0,
         "frozen-policy": 54.0, "pmd-experience": 74.3, "pmd-experience,insight": 75.7}

SCORES = ["", "worlds", "AUC", "final", "dev-selected", "best on test", "paper"]


class Cell:
    """The runs of one method under one condition: {world: record}."""

    def __init__(self, records, part, label):
        start = f"{part}/{label}/"
        self.runs = {r["world"]: r for name, r in records.items() if name.startswith(start) and "test" in r}

    def __bool__(self):
        return bool(self.runs)

    def curve(self, split="test", key="avg"):
        """(steps, {world: values})"""
        steps = [row["step"] for row in next(iter(self.runs.values()))[split]]
        return steps, {w: [row[key] for row in r[split]] for w, r in self.runs.items()}

    def auc(self):
        """{world: mean of avg@k after the first evaluation, to step 80}"""
        return {w: statistics.mean(row["avg"] for row in r["test"] if 0 < row["step"] <= 80) for w, r in self.runs.items()}

    def final(self, key="avg"):
        return {w: r["test"][-1][key] for w, r in self.runs.items()}

    def base(self):
        return {w: r["test"][0]["avg"] for w, r in self.runs.items()}

    def after(self, step):
        return {w: row["avg"] for w, r in self.runs.items() for row in r["test"] if row["step"] == step}

    def on_dev(self):
        """{world: test score of the checkpoint that is best on dev, the earliest of equals}"""
        best = {w: max(r["dev"], key=lambda row: row["avg"])["step"] for w, r in self.runs.items() if r["dev"]}
        return {w: next(row["avg"] for row in self.runs[w]["test"] if row["step"] == step) for w, step in best.items()}

    def on_test(self):
        return {w: max(row["avg"] for row in r["test"]) for w, r in self.runs.items()}

    def rollouts_to(self, level, per_step=32):
        """Rollouts until avg@k first reaches `level`, linear between evaluations; infinity where it never does."""
        found = []
        for r in self.runs.values():
            rows, at = r["test"], np.inf
            for a, b in zip(rows, rows[1:], strict=False):
                if b["avg"] >= level:
                    share = 0 if a["avg"] >= level else (level - a["avg"]) / (b["avg"] - a["avg"])
                    at = (a["step"] + share * (b["step"] - a["step"])) * per_step
                    break
            found.append(at)
        return np.array(found)


def spread(values):
    """mean, low, high: the 95% t interval; of fewer than two values the mean alone"""
    x = np.array(list(values), float)
    x = x[~np.isnan(x)]
    if len(x) < 2:
        return x.mean(), np.nan, np.nan
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def text(values, digits=3):
    m, low, high = spread(values)
    return f"{m:.{digits}f}" + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def gaps(a, b):
    """{world: a - b} where both are known"""
    return {w: a[w] - b[w] for w in a if w in b}


def compared(a, b, checkpoints):
    """The cells of a row: difference with interval, worlds won, p of t and of Wilcoxon, mean of each checkpoint"""
    d = gaps(a, b)
    x = np.round(list(d.values()), 9)  # or the last bit of a float would break a tie
    if len(x) < 2 or not x.any():
        return [text(x) if len(x) else "-", f"{int((x > 0).sum())} of {len(x)}", "-", "-", "-"]
    each = [f"{np.mean([d[w] for w in d if checkpoints[w] == c]):+.3f}" for c in sorted({checkpoints[w] for w in d})]
    return [text(x), f"{(x > 0).sum()} of {len(x)}", f"{stats.ttest_1samp(x, 0).pvalue:.2g}",
            f"{stats.wilcoxon(x).pvalue:.2g}", ", ".join(each)]


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)])


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

def results_row(label, cell, paper):
    return [NAMES.get(label, label), len(cell.runs), text(cell.auc().values()), text(cell.final().values()),
            text(cell.on_dev().values()) if cell.on_dev() else "-",
            f"{np.mean(list(cell.on_test().values())):.3f} (of {len(cell.curve()[0])})", PAPER.get(paper, "-")]


def report(records, times, rates, out, grid) -> str:
    """Writes OUT/results.md and the figures; returns where. grid: the module study.py, for what it declares."""
    failed = {name: r["failed"] for name, r in records.items() if "failed" in r}
    checkpoints = {r["world"]: r["checkpoint"] for r in records.values()}
    main = {m: Cell(records, "main", m) for m in grid.METHODS}
    main |= {f"pmd-{t}": Cell(records, "tiers", f"pmd-{t}") for t in grid.TIERS[:-1]}
    main["pmd-nolessons"] = Cell(records, "lessons", "pmd-nolessons")
    main = {label: cell for label, cell in main.items() if cell}
    lines = []

    def say(*blocks):
        lines.extend([*blocks, ""])

    say("# Results of the study")
    if (out / "note.md").is_file():  # what has to be known of these records
        say((out / "note.md").read_text(encoding="utf-8").strip())
    if {"pmd", "sdpo"} <= main.keys():
        say(headline(main, checkpoints))
    say(f"Made by `python study/study.py` from the {len(records)} records in records.jsonl; {len(failed)} runs failed"
        + (": " + "; ".join(f"{n}: {why}" for n, why in failed.items()) if failed else "") + ". "
        "What was declared before the first run stands at the top of study.py. Everything here is the embedded world: it "
        "says how the methods compare where a tiny model has to find eight-way facts, not what an 8B model gains on "
        "chemistry. The paper's numbers (Qwen3-8B, average of four SciKnowEval domains, one run each, in percent) stand "
        "beside ours for the order only.")

    if any(name.startswith("tuning/") for name in records):
        def scored(method, rate):
            scores = tuning(records, method, rate)
            mean = f"{np.mean(scores):.3f}" if scores else "-"
            return f"**{mean}**" if rate == rates.get(method) else mean

        rows = [[NAMES[m], *(scored(m, rate) for rate in grid.RATES)] for m in grid.TUNED]
        say("## The learning rate of each method", "AUC, mean of the three tuning worlds; bold: chosen. Same rates, same "
            "worlds, same number of runs for each.", "", markdown(["", *(f"{r:g}" for r in grid.RATES)], rows))

    head = SCORES
    if main:
        first = main.get("sdpo") or next(iter(main.values()))
        base = ["base", len(first.runs), "-", text(first.base().values()), "-", "-", PAPER["base"]]
        say("## Tables 2 and 3: methods and controls", "avg@4 on held-out problems, without memory in the prompt; a frozen "
            "policy has it there, or it would score as the base.", "",
            markdown(head, [base, *(results_row(m, c, m) for m, c in main.items() if "experience" not in m)]))
        pairs = [("pmd", "sdpo"), ("pmd", "grpo"), ("sdpo", "grpo"), ("pmd-solved", "pmd"), ("pmd-solved", "sdpo"),
                 ("pmd-solved", "grpo"), ("pmd", "pmd-transient"), ("pmd-transient", "sdpo"),
                 ("pmd", "frozen-memory"), ("pmd-transient", "frozen-policy"), ("frozen-memory", "frozen-policy"),
                 ("pmd", "pmd-experience,insight"), ("pmd-experience,insight", "pmd-experience"),
                 ("pmd-experience", "sdpo"), ("pmd-nolessons", "pmd"), ("pmd-nolessons", "sdpo")]
        for title, of in (("AUC", Cell.auc), ("final score", Cell.final)):
            rows = [[f"{'**primary** ' * (title == 'AUC' and (a, b) == ('pmd', 'sdpo'))}{NAMES[a]} - {NAMES[b]}",
                     *compared(of(main[a]), of(main[b]), checkpoints)] for a, b in pairs if a in main and b in main]
            say(f"### Paired differences: {title}",
                markdown(["", "difference", "worlds won", "p (t)", "p (Wilcoxon)", "by checkpoint"], rows))
        say("![learning curves](curves.png)", "", "![differences by world](differences.png)")
        rows = []
        for m, cell in main.items():
            row = [NAMES[m]]
            for level in (0.5, 0.9):
                at = cell.rollouts_to(level)
                row += [f"{np.isfinite(at).sum()} of {len(at)}",
                        f"{np.median(at):.0f}" if np.isfinite(np.median(at)) else "not by half of them"]
            rows.append(row)
        say("### Rollouts to 50% and 90%", "Median over worlds, those that never get there counted as infinite.", "",
            markdown(["", "reach 50%", "rollouts", "reach 90%", "rollouts"], rows))

    tiers(say, main, records, grid.TIERS)
    if main:
        rows = [[NAMES[m], text(c.final("maj").values()), text(c.final("best").values()),
                 text(gaps(c.final("best"), c.final("maj")).values()), text(c.final("tokens").values(), 1)]
                for m, c in main.items()]
        say("## Figure 3 and Table 5: headroom and length", "At the final step, k = 4; tokens of a completion.", "",
            markdown(["", "maj@4", "best@4", "headroom", "tokens"], rows))
        chosen = [m for m in ("grpo", "sdpo", "pmd") if m in main]
        say("## Figure 4: coverage", "Share of held-out problems that at least one of 4 samples solves at the final step, "
            "by exactly these methods.", "", markdown(["solved by", "share"], [
                [who, text(shares)] for who, shares in venn(main, chosen).items()]), "", "![coverage](coverage.png)")
    memory_over_time(say, main)
    transfer(say, records, grid.SIZES)
    cost(say, main, times)
    knobs(say, records, checkpoints, rates, grid.KNOBS, grid.COMPARED)
    (out / "results.md").write_text("\n".join(lines), encoding="utf-8")
    figures(main, records, checkpoints, rates, grid, out)
    return f"{out / 'results.md'} and its figures"


def tuning(records, method, rate):
    return [statistics.mean(row["avg"] for row in r["test"] if row["step"]) for name, r in records.items()
            if name.startswith(f"tuning/{method}/") and name.endswith(f"@{rate:g}") and "test" in r]


def headline(main, checkpoints):
    """The first paragraph: the primary comparison, and whether the order is the paper's."""
    difference, won, t, wilcoxon, each = compared(main["pmd"].auc(), main["sdpo"].auc(), checkpoints)
    d = gaps(main["pmd"].auc(), main["sdpo"].auc())
    means = [np.mean([d[w] for w in d if checkpoints[w] == c]) for c in {checkpoints[w] for w in d}]
    order = [m for m in ("pmd", "pmd-transient", "sdpo", "grpo", "frozen-memory", "frozen-policy") if m in main]
    mean = {m: np.mean(list(main[m].auc().values())) for m in order}
    ours = sorted(order, key=mean.get, reverse=True)
    theirs = sorted(order, key=PAPER.get, reverse=True)
    same = "is the paper's" if ours == theirs else "is NOT the paper's (" + " > ".join(NAMES[m] for m in theirs) + ")"
    return (f"**PMD minus SDPO in AUC, the primary comparison: {difference}; PMD ahead in {won} worlds; p = {t} (paired t), "
            f"{wilcoxon} (Wilcoxon); by checkpoint {each}, over which alone {text(means)}.** The order by mean AUC, "
            + " > ".join(f"{NAMES[m]} {mean[m]:.3f}" for m in ours) + f", {same}; neighbours in it need not differ, see the "
            "paired differences.")


def tiers(say, main, records, names):
    rows = [results_row(m, main[m], m) for m in ("pmd-experience", "pmd-experience,insight", "pmd") if m in main]
    reads = {t: Cell(records, "tiers", "base-reads-frozen-policy" + ("" if t == names[-1] else f"-{t}")) for t in names}
    if len(rows) < 2 and not any(reads.values()):
        return
    say("## Table 4: memory levels", "Above, what the teacher reads while it trains the student; below, what the initial "
        "policy reads in its prompt, out of the memory that grew under it.", "", markdown(SCORES, rows), "",
        markdown(["the initial policy, with the frozen policy's", "worlds", "avg@4", "paper"],
                 [[t.replace(",", " + "), len(c.runs), text(c.final().values()), p]
                  for (t, c), p in zip(reads.items(), (55.9, 58.3, 57.2), strict=True) if c]))


def venn(main, chosen):
    """{methods: [share of a world's held-out problems that exactly these solve]}, of every set of the chosen ones"""
    worlds = sorted(set.intersection(*(set(main[m].runs) for m in chosen)))
    solved = [np.array([list(main[m].runs[w]["solved"]) for w in worlds]) == "1" for m in chosen]  # of (worlds, problems)
    sets = sorted(itertools.product((True, False), repeat=len(chosen)), key=sum, reverse=True)
    return {", ".join(NAMES[m] for m, one in zip(chosen, which, strict=True) if one) or "none":
            np.all([s == one for s, one in zip(solved, which, strict=True)], axis=0).mean(1) for which in sets}


def of_steps(cell, get):
    """(steps, {world: values}) of something in the training steps' records; nan where a step has none"""
    steps = [row["step"] for row in next(iter(cell.runs.values()))["steps"]]
    return steps, {w: [get(row) for row in r["steps"]] for w, r in cell.runs.items()}


def wrong_share(row):
    return np.nan if row["right"] is None else 1 - row["right"]


def memory_over_time(say, main):
    remembers = [m for m in ("pmd", "pmd-solved", "pmd-transient", "frozen-policy") if m in main]
    if not remembers:
        return
    rows = []
    for m in remembers:
        for name, get in (("experience", lambda r: r["memory"][0]), ("insight", lambda r: r["memory"][1]),
                          ("behavior", lambda r: r["memory"][2]),
                          ("wrong strategies", wrong_share)):
            steps, values = of_steps(main[m], get)
            means = [spread(column)[0] for column in zip(*values.values(), strict=True)]
            rows.append([NAMES[m], name, *(f"{v:.3f}" if name.startswith("wrong") else f"{v:.0f}" for v in means)])
    say("## Figure 6: growth of the memory, and how much of it is wrong", "Means over worlds at the step; wrong: the share "
        "of living strategies that the hidden truth denies, over the worlds that have any at that step.", "",
        "![memory](memory.png)", "",
        markdown(["", "", *steps], rows))


def transfer(say, records, sizes):
    rows = []
    for size in sizes:
        cells = {m: Cell(records, "transfer", f"{size}-reads-{m}") for m in ("nothing", "frozen-policy", "pmd")}
        if any(cells.values()):
            rows.append([size, *(text(c.final().values()) if c else "-" for c in cells.values())])
    if rows:
        say("## Figure 2: the memory in the prompt of models that were not trained", "Parameters of the reader; avg@4 on "
            "held-out problems of eight worlds.", "", markdown(
                ["reader", "no memory", "a frozen policy's memory", "the memory that co-evolved with a policy"], rows), "",
            "![transfer](transfer.png)")


def cost(say, main, times):
    seconds = {m: {w: times[r["job"]]["step_seconds"] for w, r in c.runs.items()
                   if "step_seconds" in times.get(r["job"], {})} for m, c in main.items() if m != "pmd-nolessons"}
    if not seconds.get("sdpo"):
        return
    rows = []
    for m, own in seconds.items():
        ratios = [own[w] / seconds["sdpo"][w] for w in own if w in seconds["sdpo"]]
        if not ratios:
            continue
        equal = "-"
        if m in ("grpo", "pmd", "pmd-solved", "pmd-transient", "sdpo"):
            equal = text(at_equal_compute(main[m], main["sdpo"], own, seconds["sdpo"]).values())
        cpu = [times[r["job"]]["cpu"] / times[main["sdpo"].runs[w]["job"]]["cpu"] for w, r in main[m].runs.items()
               if w in own and w in seconds["sdpo"]]
        rows.append([NAMES[m], *(f"{np.median(x):.2f} [{min(x):.2f}, {max(x):.2f}]" for x in (ratios, cpu)), equal])
    say("## Table 7: cost of a step, and equal compute", "Seconds of a step over SDPO's in the same world (evaluation left "
        "out; two runs at a time on two cores): median [least, largest]. The paper: 1.45. Then the same of all the CPU "
        "seconds of a run, evaluations included, which depend less on what else the machine did. Then AUC over the time in "
        "which SDPO makes its 80 steps, on the clock: who is slower makes fewer, and who is faster than SDPO is not run "
        "beyond 80. Times differ from run to run, and with them this table. GRPO scores every rollout before the update, "
        "for its ratios, and trains on all of them; SDPO on those alone that have a successful sibling.", "", markdown(
            ["", "seconds over SDPO's", "CPU seconds over SDPO's", "AUC in the time of SDPO's 80 steps"], rows))


def at_equal_compute(cell, reference, seconds, of_reference):
    """{world: mean score over the time of the reference's 80 steps, at the times of its evaluations}"""
    found = {}
    for w, r in cell.runs.items():
        if w in seconds and w in of_reference:
            steps, values = [row["step"] for row in r["test"]], [row["avg"] for row in r["test"]]
            at = [row["step"] * of_reference[w] / seconds[w] for row in reference.runs[w]["test"] if row["step"]]
            found[w] = float(np.mean(np.interp(at, steps, values)))
    return found


LATE = {"falls": "the rate falling to 0 from step 80 on",
        "unsolved": "nothing supervised where all attempts succeed"}  # arms of the part of that name

# what each knob's part holds: (title, [(setting, part, suffix of the label, and what is told if not AUC)])
SETTINGS = {
    "groups": ("Group size", [("2", "groups", "-2"), ("4", "main", ""), ("8", "groups", "-8")]),
    "rarity": ("How rare success is at the start", [("no name of one syllable (0.7%)", "rarity", "-rare"),
                                                    ("as in main (3%)", "main", ""),
                                                    ("16 names of one or two syllables (7%)", "rarity", "-common")]),
    "sharing": ("How much problems share", [("16 names, syllables shared", "rarity", "-common"),
                                            ("16 names, none shared", "sharing", "-apart")]),
    "rates": ("Learning rate", [(f"{r:g}", "rates", f"-{r:g}") for r in (3e-4, 6e-4, 1e-3, 2e-3)]),
    "teacher": ("The teacher's weights", [("average of the student's, 0.05", "main", ""),
                                          ("the student's own (Eq. 6)", "teacher", "-live")]),
    "epochs": ("Twice the steps: not AUC, but the score", [
        *((f"after {step}", "epochs", "-160", functools.partial(Cell.after, step=step)) for step in (40, 80, 120, 160)),
        ("of the best on dev", "epochs", "-160", Cell.on_dev),
        *((f"after 160, {said}", "late", f"-{arm}", functools.partial(Cell.after, step=160))
          for arm, said in LATE.items())])}


PAIRED = {"PMD - SDPO": ("pmd", "sdpo"), "the other PMD - SDPO": ("pmd-solved", "sdpo"),
          "the other PMD - GRPO": ("pmd-solved", "grpo"), "PMD - transient": ("pmd", "pmd-transient")}

PANELS = ("rarity", "groups", "rates")  # the knobs of the figure; the others have two settings, or a figure of their own


def knobs(say, records, checkpoints, rates, parts, compared_methods):
    recorded = {name.partition("/")[0] for name in records}
    shown = [part for part in parts if part in recorded and part not in ("lessons", "late")]
    if not shown:
        return
    say("## When? The knobs", "Worlds of the shipped checkpoint, the one where PMD is not behind SDPO in main; AUC, and "
        "differences paired by world. Exploratory.", *(["", "![the knobs](knobs.png)"] if {*shown} & {*PANELS} else []))
    for part in shown:
        if part == "wrong":
            sdpo = Cell(records, "main", "sdpo").auc()
            rows, unharmed = [], {}
            for how, share, *pair in wrong(records):
                unharmed.setdefault(how, [c.auc() for c in pair])
                rows.append([how, f"{share:g}", text(last_wrong(pair[0])),
                             *(text(c.auc().values()) if c else "-" for c in pair),
                             *(text(d.values()) if (d := gaps(c.auc(), whole)) else "-"
                               for c, whole in zip(pair, unharmed[how], strict=True)),
                             *(text(d.values()) if (d := gaps(c.auc(), sdpo)) else "-" for c in pair)])
            say("### How wrong may insights be?", f"{len(worlds_of(records, part))} worlds.",
                "A share of the operations in the strategies that reflection writes is exchanged for wrong ones, before the "
                "memory sees them; lessons are left alone. Wrong at the end: the share of PMD's living strategies that the "
                "hidden truth denies. Grounding keeps the wrong ones out; what it then costs is that fewer are left.", "",
                markdown(["", "share", "wrong at the end", NAMES["pmd"], NAMES["pmd-solved"], "PMD - its share 0",
                          "the other PMD - its share 0", "PMD - SDPO", "the other PMD - SDPO"], rows), "",
                "![memory that harms](harm.png)")
            continue
        title, worlds = SETTINGS[part][0], worlds_of(records, part)
        settings = list(by_setting(records, part, rates, compared_methods))
        rows = [[setting, *(text(scores[m].values()) if m in scores else "-" for m in compared_methods),
                 *(text(gaps(scores[a], scores[b]).values()) if {a, b} <= scores.keys() else "-"
                   for a, b in PAIRED.values())]
                for setting, scores in settings]
        if part in PANELS:  # ordered settings: does what PMD gains change from one end to the other?
            (_, first), (_, last) = settings[0], settings[-1]
            rows.append(["last less first", *("-" for _ in compared_methods), *(
                text(gaps(gaps(last[a], last[b]), gaps(first[a], first[b])).values())
                if {a, b} <= first.keys() & last.keys() else "-" for a, b in PAIRED.values())])
        whole = f"{len(worlds)} worlds." if len(worlds) >= 8 else f"Only {len(worlds)} of 8 worlds so far."
        say(f"### {title}", whole, "", markdown(
            ["", *(NAMES[m] for m in compared_methods), *PAIRED], rows))
        if part == "sharing":
            rows = []
            for kind, where in (("common", "rarity"), ("apart", "sharing")):
                full, without = Cell(records, where, f"pmd-{kind}"), Cell(records, "sharing", f"pmd-{kind}-nobehavior")
                if full and without:
                    rows.append([{"common": "shared", "apart": "none shared"}[kind],
                                 *compared(full.auc(), without.auc(), checkpoints)[:4]])
            say("PMD minus PMD whose teacher reads no behaviors, AUC:", "",
                markdown(["syllables", "difference", "worlds won", "p (t)", "p (Wilcoxon)"], rows))
        if part == "epochs" and "late" in recorded:
            rows = [[NAMES[m], said, *compared(late.after(160), Cell(records, "epochs", f"{m}-160").after(160),
                                               checkpoints)[:4]]
                    for m in compared_methods for arm, said in LATE.items()
                    if (late := Cell(records, "late", f"{m}-{arm}"))]
            say("After 160 steps, minus the same method at a constant rate, everything supervised:", "",
                markdown(["", "with", "difference", "worlds won", "p (t)", "p (Wilcoxon)"], rows))


def by_setting(records, part, rates, methods):
    """(setting, {method: {world: AUC, or what else the part tells}}) for each setting of a knob"""
    worlds = worlds_of(records, part)
    for setting, where, suffix, *told in SETTINGS[part][1]:
        tell, scores = told[0] if told else Cell.auc, {}
        for m in methods:
            at_its_own_rate = part == "rates" and suffix == f"-{rates.get(m, 0):g}"
            if cell := Cell(records, "main", m) if at_its_own_rate else Cell(records, where, m + suffix):
                scores[m] = {w: v for w, v in tell(cell).items() if w in worlds}
        if scores:
            yield setting, scores


def worlds_of(records, part):
    return {r["world"] for name, r in records.items() if name.startswith(f"{part}/")}


def last_wrong(cell):
    """The share of wrong strategies at the last step, of each world"""
    return [wrong_share(r["steps"][-1]) for r in cell.runs.values()]


def wrong(records):
    """(grounded or not, share, PMD's cell, that of PMD supervised as SDPO is)"""
    for grounded in (True, False):
        how = "grounded" if grounded else "ungrounded"
        for share in (0.0, 0.2, 0.5):
            where, suffix = ("main", "") if grounded and not share else ("wrong", f"-{share:g}-{how}")
            pair = [Cell(records, where, m + suffix) for m in ("pmd", "pmd-solved")]
            worlds = worlds_of(records, "wrong")
            for cell in pair:
                cell.runs = {w: r for w, r in cell.runs.items() if w in worlds}
            if any(pair):
                yield how, share, *pair


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------

def band(ax, x, by_world, label, color, **more):
    """Mean over worlds with its interval"""
    values = np.array([spread(column) for column in zip(*by_world.values(), strict=True)])
    ax.plot(x, values[:, 0], label=label, color=color, **more)
    ax.fill_between(x, values[:, 1], values[:, 2], color=color, alpha=0.15, linewidth=0)


def save(figure, path):
    figure.savefig(path, dpi=130)
    plt.close(figure)


def figures(main, records, checkpoints, rates, grid, out):
    sizes = grid.SIZES
    if main:
        methods = ("grpo", "sdpo", "pmd", "pmd-solved", "pmd-transient")
        controls = ("sdpo", "pmd", "pmd-experience,insight", "pmd-experience", "frozen-memory", "frozen-policy")
        long = {m: cell for m in methods if (cell := Cell(records, "epochs", f"{m}-160"))}
        panels = [("methods", methods, main), ("controls", controls, main), ("twice the steps, 8 worlds", methods, long)]
        width = 15 if long else 11
        figure, axes = plt.subplots(1, 3 if long else 2, figsize=(width, 4.4), sharey=True, layout="constrained")
        for ax, (title, chosen, cells) in zip(axes, panels, strict=False):
            for m in chosen:
                if m in cells:
                    steps, curves = cells[m].curve()
                    band(ax, steps, curves, NAMES[m], COLORS[m], marker="o", markersize=3)
            ax.set(title=title, xlabel="step", ylim=(0, 1))
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        axes[0].set_ylabel("avg@4 on held-out problems")
        save(figure, out / "curves.png")
    if {"pmd", "sdpo"} <= main.keys():
        figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
        pairs = [(a, b) for a, b in (("pmd", "sdpo"), ("pmd-solved", "sdpo"), ("pmd", "grpo"), ("pmd-solved", "grpo"),
                                     ("pmd", "pmd-transient"), ("pmd", "frozen-memory")) if {a, b} <= main.keys()]
        for i, (a, b) in enumerate(pairs):
            d = gaps(main[a].auc(), main[b].auc())
            for c in sorted(set(checkpoints.values())):
                x = [v for w, v in d.items() if checkpoints[w] == c]
                ax.plot(x, np.full(len(x), i) + 0.12 * (c - 1), ".", color=f"C{c}",
                        label=None if i else f"checkpoint {c}")
            value, low, high = spread(d.values())
            ax.errorbar(value, i - 0.35, xerr=[[value - low], [high - value]], fmt="kD", markersize=4, capsize=3)
        ax.axvline(0, color="gray", linewidth=1)
        ax.set_yticks(range(len(pairs)), [f"{NAMES[a]}\n- {NAMES[b]}" for a, b in pairs], fontsize=8)
        ax.invert_yaxis()
        ax.set(xlabel="difference in AUC, a point a world; diamond: mean and 95% interval")
        ax.legend(fontsize=8)
        ax.grid(axis="x", alpha=0.3)
        save(figure, out / "differences.png")
    remembers = [m for m in ("pmd", "pmd-transient", "frozen-policy") if m in main]
    if remembers:
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
        for ax, title, get in zip(axes, ("insight: living items", "behavior: living items", "share of strategies: wrong"),
                                  (lambda r: r["memory"][1], lambda r: r["memory"][2], wrong_share), strict=True):
            for m in remembers:
                steps, values = of_steps(main[m], get)
                if len(values) > 1:
                    band(ax, steps, values, NAMES[m], COLORS[m])
            ax.set(title=title, xlabel="step")
            ax.set_ylim(0)
            ax.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        save(figure, out / "memory.png")
    reads = {(size, m): Cell(records, "transfer", f"{size}-reads-{m}") for size in sizes
             for m in ("nothing", "frozen-policy", "pmd")}
    if any(reads.values()):
        figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        for m, label, color in (("nothing", "no memory", "gray"), ("pmd", "the co-evolved memory", "tab:blue"),
                                ("frozen-policy", "a frozen policy's memory", "tab:purple")):
            values = np.array([spread(reads[size, m].final().values()) for size in sizes if reads[size, m]])
            if len(values):
                ax.errorbar(range(len(values)), values[:, 0], yerr=np.abs(values[:, 1:].T - values[:, 0]), label=label,
                            color=color, marker="o", capsize=3)
        ax.set_xticks(range(len(sizes)), sizes)
        ax.set(xlabel="parameters of the reader, which was not trained", ylabel="avg@4 on held-out problems", ylim=(0, 1.02))
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
        save(figure, out / "transfer.png")
    turned = {part: list(by_setting(records, part, rates, grid.COMPARED)) for part in PANELS if worlds_of(records, part)}
    if turned:
        figure, axes = plt.subplots(1, len(turned), figsize=(5 * len(turned), 4.2), sharey=True, layout="constrained",
                                    squeeze=False)
        for ax, (part, settings) in zip(axes[0], turned.items(), strict=True):
            for i, m in enumerate(grid.COMPARED):
                at = {n: spread(scores[m].values()) for n, (_, scores) in enumerate(settings) if scores.get(m)}
                if at:
                    x, y = np.array([*at]) + 0.06 * (i - 2), np.array([*at.values()])  # side by side
                    ax.errorbar(x, y[:, 0], yerr=np.abs(y[:, 1:].T - y[:, 0]), label=NAMES[m], color=COLORS[m], marker="o",
                                markersize=4, capsize=3)
            ax.set_xticks(range(len(settings)), [textwrap.fill(setting, 18) for setting, _ in settings], fontsize=8)
            ax.set(title=SETTINGS[part][0], ylim=(0, 1))
            ax.grid(alpha=0.3)
        axes[0][0].set_ylabel("AUC, mean and 95% interval over worlds")
        axes[0][0].legend(fontsize=8)
        save(figure, out / "knobs.png")
    rows = list(wrong(records))
    if worlds_of(records, "wrong"):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
        for j, (how, style) in enumerate((("grounded", "-"), ("ungrounded", "--"))):
            for i, m in enumerate(("pmd", "pmd-solved")):
                found = [(share, pair[i].auc()) for h, share, *pair in rows if h == how and pair[i]]
                for ax, of in zip(axes, (lambda auc: auc, lambda auc, whole=found: gaps(auc, whole[0][1])), strict=True):
                    if found:
                        y = np.array([spread(of(auc).values()) for _, auc in found])
                        x = [share + 0.006 * (2 * j + i - 1.5) for share, _ in found]  # side by side
                        ax.errorbar(x, y[:, 0], yerr=np.abs(y[:, 1:].T - y[:, 0]), label=f"{NAMES[m]}, {how}",
                                    color=COLORS[m], linestyle=style, marker="o" if j else "s", capsize=3)
        worlds = worlds_of(records, "wrong")
        for m in ("sdpo", "pmd-transient"):
            if m in main:
                value, low, high = spread(v for w, v in main[m].auc().items() if w in worlds)
                axes[0].axhline(value, color=COLORS[m], linestyle=":", label=f"{NAMES[m]}, as in main")
                axes[0].axhspan(low, high, color=COLORS[m], alpha=0.1, linewidth=0)
        axes[0].set(title="AUC", ylim=(0, 0.7))
        axes[1].set(title="less that of share 0, paired by world")
        axes[1].axhline(0, color="gray", linewidth=1)
        for ax in axes:
            ax.set(xlabel="share of the operations in reflected strategies made wrong")
            ax.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        save(figure, out / "harm.png")
    if main:
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        for i, (m, c) in enumerate(main.items()):
            maj, best = (np.mean(list(c.final(key).values())) for key in ("maj", "best"))
            _, low, high = spread(c.final("best").values())
            left.barh(i, maj, color=COLORS[m])
            left.barh(i, best - maj, left=maj, color=COLORS[m], alpha=0.4)
            left.errorbar(best, i, xerr=[[best - low], [high - best]], fmt="none", ecolor="black", capsize=3)
        left.set_yticks(range(len(main)), [NAMES[m] for m in main], fontsize=8)
        left.invert_yaxis()
        left.set(xlim=(0, 1))
        left.set_title("Figure 3: maj@4, and the headroom to best@4 (pale)", fontsize=10)
        chosen = [m for m in ("grpo", "sdpo", "pmd") if m in main]
        sets = venn(main, chosen)
        right.barh(range(len(sets)), [np.mean(v) for v in sets.values()], color="tab:gray",
                   xerr=np.array([[m - low, high - m] for m, low, high in map(spread, sets.values())]).T, capsize=3)
        right.set_yticks(range(len(sets)), sets, fontsize=8)
        right.invert_yaxis()
        right.set_title("Figure 4: held-out problems solved by exactly these", fontsize=10)
        save(figure, out / "coverage.png")
