"""Shows what a run remembers, also of a run that is still going; nothing is changed.

python tools/show_memory.py show runs/x/memory.db [--problem ID | --tier behavior] [--step N]
[--grep TEXT]
python tools/show_memory.py stats runs/x/memory.db        growth as in the paper's Figure 6: a table
                                                          and a PNG
"""

import argparse
import json
import signal
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.store import Store, describe, line_of, printable


def show(memory, problem=None, tier=None, step=None, grep=None) -> str:
    """Readable tiers: one problem's, or the items of one tier or of all, at the end of `step` or
    now, that hold `grep`.
    """
    if problem is not None:
        return describe(memory, problem, step)
    at = 10**9 if step is None else step
    items = {
        t: memory.as_of(at, t) for t in ([tier] if tier else ["experience", "insight", "behavior"])
    }
    lines = []
    for name, found in items.items():
        if grep:
            found = [
                i
                for i in found
                if grep.lower() in f"{i.problem} {i.title} {i.text} {i.feedback}".lower()
            ]
        lines.append(f"{name}: {len(found)} items" + (f" that hold {grep!r}" if grep else ""))
        groups = defaultdict(list)
        for item in found:
            groups[item.problem].append(item)
        whole = tier or grep or name == "behavior"
        for pid, group in groups.items() if whole else list(groups.items())[:3]:
            lines += [f"  problem {pid}"] * bool(pid) + [f"    {line_of(i)}" for i in group]
        if not whole and len(groups) > 3:
            lines.append(
                f"  ... and {len(groups) - 3} more problems: --tier {name} shows all, --problem ID"
                " one of them"
            )
    return printable("\n".join(lines))


def growth(memory) -> dict[str, np.ndarray]:
    """Living items at the end of each step, 0 to the last with an event or a birth: {kind: (steps +
    1,)}.
    """
    rows = memory.query("SELECT kind, born, ended, shortcuts != '' FROM item")
    last = max(
        [
            0,
            *(born for _, born, *_ in rows),
            *memory.query("SELECT COALESCE(MAX(step), 0) FROM event")[0],
        ]
    )
    kinds = ("success", "failure", "strategy", "lesson", "behavior", "shortcut")
    changes = {kind: np.zeros(last + 2, int) for kind in kinds}
    for kind, born, ended, flagged in rows:
        for name in [kind] + ["shortcut"] * flagged:
            changes[name][born] += 1
            changes[name][last + 1 if ended is None else ended] -= 1
    return {kind: change.cumsum()[:-1] for kind, change in changes.items()}


def stats(memory, png) -> str:
    """The growth curves of the paper's Figure 6, as a table, and as a picture in the file `png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves, problems = growth(memory), memory.query("SELECT COUNT(*) FROM problem")[0][0]
    last = len(curves["behavior"]) - 1
    at = sorted({round(x) for x in np.linspace(0, last, 13)})
    lines = [f"{'step':>6} " + " ".join(f"{kind:>9}" for kind in curves)]
    lines += [
        f"{step:>6} " + " ".join(f"{curve[step]:>9}" for curve in curves.values()) for step in at
    ]
    cap = json.loads(memory.meta["caps"])["strategy"] * problems
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for kind in ("strategy", "lesson"):
        left.plot(curves[kind], label={"strategy": "strategies", "lesson": "lessons"}[kind])
    left.axhline(cap, linestyle=":", color="gray", label=f"cap of each, {cap}")
    left.set(
        title="insight",
        xlabel="step",
        ylabel="living items",
        yscale=(
            "symlog"
            if cap > 20 * max(curves["strategy"].max(), curves["lesson"].max(), 1)
            else "linear"
        ),
    )
    left.legend()
    right.plot(curves["behavior"], color="tab:green")
    right.set(title="behavior", xlabel="step", ylabel="living items")
    figure.savefig(png, dpi=150)
    pyplot.close(figure)
    return "\n".join([*lines, f"{problems} problems; picture: {png}"])


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python tools/show_memory.py",
        description="Look at the memory of a run; nothing is changed.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("show", "print what is remembered"),
        ("stats", "how each tier grew: a table and a picture"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("path", help="a run's memory.db")
        if name == "show":
            command.add_argument(
                "--problem",
                metavar="ID",
                help="one problem: its attempts, its insight, its behaviors",
            )
            command.add_argument(
                "--tier",
                choices=("experience", "insight", "behavior"),
                help="all items of one tier",
            )
            command.add_argument(
                "--step",
                type=int,
                metavar="N",
                help="as it was at the end of step N (default: now)",
            )
            command.add_argument(
                "--grep", metavar="TEXT", help="only items that hold TEXT, in upper or lower case"
            )
        else:
            command.add_argument(
                "--png", help="where the picture goes (default: memory.png beside the file)"
            )
    args = vars(parser.parse_args(argv))
    if not 0 <= (args.get("step") or 0) < 2**63:  # SQLite holds no larger one
        parser.error(f"--step {args['step']} is no step of a run")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` has seen enough
    command, path = args.pop("command"), args.pop("path")
    try:
        memory = Store(path, frozen=True)
        png = args.pop("png", None) or Path(path).with_name("memory.png")
        print(show(memory, **args) if command == "show" else stats(memory, png))
    except (ValueError, OSError) as error:
        sys.exit(f"show_memory.py: {error}")


if __name__ == "__main__":
    main()
