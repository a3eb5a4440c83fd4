"""Writes a run as a page: RUN/run.html, one file that opens by a double click.

    python tools/show_run.py runs/x
    python tools/show_run.py runs/*          all of them, comparisons too

It shows curves with intervals, alarms, results and samples. Each sample is a heat map: how many
nats the teacher pulled at each token, and what the teacher had read. RUN/memory.html, the page of
show_memory.py, is written beside it and has each problem's story. You can also look at a run that
is still going. No other file of the run is changed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.files import read_rows
from tools.memory_page import write_memory_page
from tools.page import write_page
from tools.run_files import metrics_of, need, read_object, summary_of

GAPS = {"float32": 1e-3, "bfloat16": 0.05}  # nats a token between sampler and trainer
LOST = 0.2  # share of the replies without a well-formed item
ABOUT = "method task model seed".split()  # of config.json
DECIDED = 0.9  # share of rollouts that are right, above which a small entropy is no alarm


def alarm(name, on, says) -> dict:
    return {"name": name, "on": bool(on), "says": says}


def mean_of(rows, key) -> float | None:
    """Gives the mean of a number over rows that have it."""
    values = [row[key] for row in rows if key in row]
    return float(np.mean(values)) if values else None


def collapse(rows) -> dict:
    """Compares the last evaluation on dev with the best: a fall by more than the half of the wider
    of their two intervals is a collapse.
    """
    devs = [row for row in rows if row.get("split") == "dev"]
    if not devs:
        return alarm("collapse", False, "there is no dev split to tell it by")
    best, last = max(devs, key=lambda row: row["avg_at_k"]), devs[-1]
    halves = [np.ptp(row["interval"]) / 2 for row in (best, last) if row.get("interval")]
    fall, half = best["avg_at_k"] - last["avg_at_k"], max(halves, default=0.0)
    says = f"dev is {last['avg_at_k']:.3f} at step {last['step']}, its best"
    says += f" {best['avg_at_k']:.3f} at step {best['step']}, give or take {half:.3f}"
    return alarm("collapse", fall > half, says)


def change(name, first, last, key, unit, factor) -> dict:
    """Compares a number of the first steps with the last: less than `factor` of it is an alarm."""
    before, now = mean_of(first, key), mean_of(last, key)
    if before is None or now is None:
        return alarm(name, False, "it was not logged")
    return alarm(name, now < factor * before, f"{before:.3g} {unit} at first, {now:.3g} at last")


def entropy(first, last) -> dict:
    """Looks for an entropy that has gone while the policy is still wrong, or that has doubled."""
    found = change("entropy", first, last, "entropy", "nats a token", 0.1)
    right = mean_of(last, "reward") or 0.0
    before, now = mean_of(first, "entropy") or 0.0, mean_of(last, "entropy") or 0.0
    says = f"{found['says']}, with {right:.0%} of rollouts right"
    return alarm("entropy", found["on"] and right < DECIDED or now > 2 * before > 0, says)


def parse_failures(last) -> dict:
    """Counts the reflections and abstractions of the last steps that held no well-formed item."""
    asked = failed = 0
    for row in last:
        events = row.get("memory_events", {})
        asked += events.get("reflection", 0) + events.get("abstraction", 0)
        failed += events.get("reflect_parse_failure", 0) + events.get("abstract_parse_failure", 0)
    if not asked:
        return alarm("parse failures", False, "nothing was asked for in the last steps")
    says = f"{failed} of {asked} replies of the last steps held no well-formed item"
    return alarm("parse failures", failed > LOST * asked, says)


def sampler_gap(steps, config) -> dict:
    """Looks for the largest gap between the sampler's and the trainer's log-probabilities."""
    limit = GAPS["float32" if config.get("device") == "cpu" else "bfloat16"]
    limit = GAPS.get(config.get("dtype"), limit)
    steps = [row for row in steps if "sampler_gap" in row]
    if not steps:  # of another commit
        return alarm("sampler gap", False, "it was not logged")
    worst = max(steps, key=lambda row: row["sampler_gap"])
    says = f"at most {worst['sampler_gap']:.1e} nats a token, at step {worst['step']}"
    return alarm("sampler gap", worst["sampler_gap"] > limit, f"{says}; {limit} is too much")


def alarms(rows, config) -> list[dict]:
    """Looks for what goes wrong in such runs, in rows of metrics.jsonl."""
    steps = [row for row in rows if "split" not in row]
    if not steps:
        return []
    n = max(1, len(steps) // 10)
    first, last = steps[:n], steps[-n:]
    return [
        collapse(rows),
        change("length", first, last, "completion_tokens", "tokens", 0.5),
        entropy(first, last),
        parse_failures(last),
        sampler_gap(steps, config),
    ]


def write_run_page(folder) -> Path:
    """Writes a run's pages; returns run.html.

    Raises ValueError or OSError if the folder's files can't be read.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = need(read_object(path), ABOUT, path)
    rows = metrics_of(folder / "metrics.jsonl", ["step"])
    summary = summary_of(folder / "summary.json")
    samples = []
    if (folder / "samples.jsonl").is_file():
        samples = read_rows(folder / "samples.jsonl")
    has_memory = (folder / "memory.db").is_file()
    if has_memory:
        write_memory_page(folder / "memory.db")
    about = f"{config['method']} on {config['task']} with {config['model']}, seed {config['seed']}"
    about += f"; alpha {config.get('alpha', 'unknown')}"
    if summary:
        about += f"; commit {str(summary.get('commit') or 'unknown')[:9]}"
    data = {
        "rows": rows,
        "samples": samples,
        "summary": summary,
        "memory": has_memory,
        "alarms": alarms(rows, config),
    }
    title = str(folder)
    return write_page(folder / "run.html", "run.html", title=title, about=about, data=data)


def runs_in(paths) -> list[Path]:
    """Gives the runs among folders, and those in the folders of comparisons; others are named.

    Raises ValueError if none is a run.
    """
    found = []
    for folder in map(Path, paths):
        inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        if (folder / "metrics.jsonl").is_file():
            inside = [folder]
        if not inside:
            print(f"{folder}: no metrics.jsonl, left out")
        found += inside
    if not found:
        raise ValueError("none of these has a metrics.jsonl; name the folder of a run")
    return found


def main(argv=None):
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/show_run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    args = parser.parse_args(argv)
    try:
        for folder in tqdm(runs_in(args.runs), unit="run", disable=None, leave=False):
            tqdm.write(str(write_run_page(folder)))
    except (ValueError, OSError) as error:
        sys.exit(f"show_run.py: {error}")


if __name__ == "__main__":
    main()
