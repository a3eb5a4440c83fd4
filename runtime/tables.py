"""The table and the curves that a run ends with."""

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("Agg")  # figures are files; no screen is needed


def score(found) -> str:
    """Writes avg@k, with its interval if it has one."""
    text = f"{found['avg_at_k']:.3f}"
    if not found.get("interval"):
        return text
    low, high = found["interval"]
    return f"{text} [{low:.3f}, {high:.3f}]"


def table(summaries) -> str:
    """Lays out the results of runs, {method: summary}: held-out avg@k with 95% intervals."""
    first = next(iter(summaries.values()))
    final = first["final"]
    prompt = "no memory in the prompt"
    if "frozen-policy" in summaries:
        prompt = "memory in the prompt of frozen-policy alone"
    if first.get("mcq") == "lenient":
        prompt = f"read leniently, {prompt}"
    asked = f"avg@{final['k']} on {final['n_problems']} held-out problems of {first['data']}"
    step = first["base"]["step"]
    start = f"policy at step {step}, where the fork begins" if step else "base policy"
    rows = {"": f"{asked}, {prompt}", start: score(first["base"])}
    for name, summary in summaries.items():
        dev, test = summary["dev_best"], summary["test_best"]
        rows[f"{name}, after training"] = score(summary["final"])
        if dev:
            rows[f"{name}, best on dev"] = f"{score(dev)}  at step {dev['step']}"
        searched = f"selected on test among {test['n_checkpoints_searched']} checkpoints"
        rows[f"{name}, best on test"] = f"{score(test)}  at step {test['step']}, {searched}"
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}s}  {text}" for name, text in rows.items())


def drawn(text) -> str:
    """A name as matplotlib draws it: a $ begins no formula, and a leading _ hides no label."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def plot_curves(curves, path, title):
    """Draws learning curves on test with their intervals, as a PNG.

    curves: {name: rows of a metrics.jsonl}.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, rows in curves.items():
        tests = [row for row in rows if row.get("split") == "test"]
        steps = [row["step"] for row in tests]
        values = [row["avg_at_k"] for row in tests]
        bounds = [row["interval"] or [row["avg_at_k"]] * 2 for row in tests]
        (line,) = axes.plot(steps, values, marker="o", markersize=3, label=drawn(name))
        color = line.get_color()
        axes.fill_between(steps, *np.transpose(bounds), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="share of answers that are right", ylim=(0, 1.02))
    axes.set_title(drawn(title))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def title(summary):
    return f"{summary['data']}\navg@{summary['final']['k']} on held-out problems"


def percent(mean, low=np.nan, high=np.nan) -> str:
    """Writes a share in percent, with its interval if it has one."""
    text = f"{100 * mean:.1f}"
    return text if np.isnan(low) else f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def aligned(rows) -> str:
    """Lays out rows {head: cell}, all with the same heads, as a table."""
    rows = list(rows)
    if not rows:
        return "none of these runs"
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    text = [form.format(*line).rstrip() for line in lines]
    text.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(text)


def evaluated(name, found) -> str:
    """Lays out one evaluation of a task, given its row of metrics.jsonl."""
    k = found["k"]
    row = {
        "task": f"{name}, lenient" if found.get("mcq") == "lenient" else name,
        "problems": f"{found['n_problems']}",
        f"avg@{k}": percent(found["avg_at_k"], *(found["interval"] or ())),
        f"maj@{k}": percent(found["maj_at_k"]),
        f"best@{k}": percent(found["best_at_k"]),
        "headroom": percent(found["headroom"]),
        "tokens": f"{found['tokens']:.0f}",
    }
    return aligned([row])


def model_card(summary) -> str:
    """Writes the card of a trained model: what it was made by, and its scores with intervals.

    The head is the metadata that the Hub reads. A base model in a folder has no name there, even
    if the folder's path reads like one.
    """
    name = summary["model"]
    is_named = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir()
    base = [f"base_model: {name}"] if is_named else []
    head = ["---", "library_name: transformers", *base, "tags: [pmd, self-distillation]", "---"]
    lines = [*head, "", f"# {Path(name).name}, trained by {summary['method']}", ""]
    reads = "It answers without a memory."
    if summary["method"] == "frozen-policy":
        reads = "Its weights were not trained: the scores are those with the memory in the prompt."
    lines += [
        f"Trained by {summary['method']} on {summary['data']} for {summary['steps']} steps"
        f" ({summary['rollouts']} rollouts), seed {summary['seed']}, with the reference"
        " implementation of Procedural Memory Distillation (arXiv 2607.01480),"
        f" commit {summary['commit'] or 'unknown'}. {reads}",
        "",
        f"| checkpoint | step | avg@{summary['final']['k']} on {summary['final']['n_problems']}"
        " held-out problems, 95% interval over problems |",
        "|---|---|---|",
    ]
    for which in ("base", "final"):
        row = summary[which]
        lines.append(f"| {which} | {row['step']} | {score(row)} |")
    lines += ["", "The weights here are those of the row `final`. One run; seeds are not averaged."]
    return "\n".join(lines) + "\n"
