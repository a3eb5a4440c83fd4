"""Shows what a run remembers, also of a run that is still going; nothing is changed.

python tools/show_memory.py show runs/x/memory.db [--problem ID | --tier behavior] [--step N]
[--grep TEXT]
python tools/show_memory.py export runs/x/memory.db bank.jsonl, and import: see share_memory.py
python tools/show_memory.py stats runs/x/memory.db        growth as in the paper's Figure 6: a table
                                                          and a PNG
python tools/show_memory.py runs/x --html                 RUN/memory.html: all of it as a page, with
                                                          each problem's story
"""

import argparse
import itertools
import json
import signal
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.store import KINDS, TIERS, Store, describe, line_of, printable

ALL_KINDS = tuple(itertools.chain(*KINDS.values()))


def show(memory, problem=None, tier=None, step=None, grep=None) -> str:
    """Lays out the memory of one problem, or the items of one tier or of all.

    step: shows the memory at its end, instead of now. grep: a text that items have to hold.
    """
    if problem is not None:
        return describe(memory, problem, step)
    at = 10**9 if step is None else step
    tiers = [tier] if tier else TIERS
    held = f" that hold {grep!r}" if grep else ""
    lines = []
    for name in tiers:
        items = memory.as_of(at, name)
        if grep:
            items = [item for item in items if holds(item, grep)]
        lines.append(f"{name}: {len(items)} items{held}")
        groups = defaultdict(list)
        for item in items:
            groups[item.problem].append(item)
        is_whole = tier or grep or name == "behavior"
        shown = len(groups) if is_whole else 3
        for id, group in list(groups.items())[:shown]:
            if id:  # a behavior has no problem
                lines.append(f"  problem {id}")
            lines += [f"    {line_of(item)}" for item in group]
        if len(groups) > shown:
            lines.append(
                f"  ... and {len(groups) - 3} more problems: --tier {name} shows all, --problem ID"
                " one of them"
            )
    return printable("\n".join(lines))


def holds(item, text) -> bool:
    """Whether an item holds a text, in capital letters or not."""
    return text.lower() in f"{item.problem} {item.title} {item.text} {item.feedback}".lower()


def growth(memory) -> dict[str, np.ndarray]:
    """Counts the living items at the end of each step: {kind: (steps + 1,)}.

    The steps are 0 to the last one that left a trace.
    """
    rows = memory.query("SELECT kind, born, ended, shortcuts != '' FROM item")
    last = memory.last_step()
    kinds = (*ALL_KINDS, "shortcut")
    changes = {kind: np.zeros(last + 2, int) for kind in kinds}
    for kind, born, ended, flagged in rows:
        for name in [kind] + ["shortcut"] * flagged:
            changes[name][born] += 1
            changes[name][last + 1 if ended is None else ended] -= 1
    return {kind: change.cumsum()[:-1] for kind, change in changes.items()}


def stats(memory, png) -> str:
    """Draws the growth curves of the paper's Figure 6 into the file `png`; returns their table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = growth(memory)
    ((problems,),) = memory.query("SELECT COUNT(*) FROM problem")
    last = len(curves["behavior"]) - 1
    lines = [f"{'step':>6} " + " ".join(f"{kind:>9}" for kind in curves)]
    for step in sorted({round(x) for x in np.linspace(0, last, 13)}):
        lines += [f"{step:>6} " + " ".join(f"{curve[step]:>9}" for curve in curves.values())]
    cap = json.loads(memory.meta["caps"])["strategy"] * problems
    highest = max(curves["strategy"].max(), curves["lesson"].max(), 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(curves["strategy"], label="strategies")
    left.plot(curves["lesson"], label="lessons")
    left.axhline(cap, linestyle=":", color="gray", label=f"cap of each, {cap}")
    left.set(title="insight", xlabel="step", ylabel="living items")
    left.set_yscale("symlog" if cap > 20 * highest else "linear")
    left.legend()
    right.plot(curves["behavior"], color="tab:green")
    right.set(title="behavior", xlabel="step", ylabel="living items")
    figure.savefig(png, dpi=150)
    pyplot.close(figure)
    return "\n".join([*lines, f"{problems} problems; picture: {png}"])


def pages(argv):
    """Runs the command line with --html."""
    from tools.memory_page import write_memory_pages  # takes seconds, and no other command needs it

    parser = argparse.ArgumentParser(
        prog="python tools/show_memory.py",
        description="Writes RUN/memory.html: see docs/looking.md.",
    )
    parser.add_argument("--html", action="store_true", help="as a page")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its memory.db")
    write_memory_pages(parser.parse_args(argv).runs)


def main(argv=None):
    """Runs the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["export"], ["import"]):
        from tools import share_memory  # takes seconds, and no other command needs it

        return share_memory.main(argv)
    if "--html" in argv:
        try:
            return pages([word for word in argv if word != "show"])
        except (ValueError, OSError) as error:
            sys.exit(f"show_memory.py: {error}")
    parser = make_parser()
    args = vars(parser.parse_args(argv))
    if args.get("problem") is not None and (args["tier"] or args["grep"]):
        parser.error("--problem shows all that is remembered of it: leave --tier and --grep out")
    if not 0 <= (args.get("step") or 0) < 2**63:  # SQLite holds no larger one
        parser.error(f"--step {args['step']} is no step of a run")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` has seen enough
    command, path = args.pop("command"), args.pop("path")
    try:
        memory = Store(path, frozen=True)
        png = args.pop("png", None) or Path(memory.path).with_name("memory.png")
        print(show(memory, **args) if command == "show" else stats(memory, png))
    except (ValueError, OSError) as error:
        sys.exit(f"show_memory.py: {error}")


def make_parser():
    """Makes the parser of `show` and `stats`."""
    parser = argparse.ArgumentParser(
        prog="python tools/show_memory.py",
        description="Shows the memory of a run, or writes it as a page or as JSON lines. The memory"
        " itself is not changed.",
        epilog="`python tools/show_memory.py RUN --html` writes the page RUN/memory.html."
        " `python tools/show_memory.py export` and `import` write and read JSON lines: see"
        " `export --help`.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "show": "prints what is remembered",
        "stats": "prints how each tier grew, as a table, and draws a picture",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", help="a run's folder, or its memory.db")
        if name == "show":
            command.add_argument(
                "--problem",
                metavar="ID",
                help="one problem: its attempts, its insight, its behaviors",
            )
            command.add_argument(
                "--tier",
                choices=TIERS,
                help="all items of one tier",
            )
            command.add_argument(
                "--step",
                type=int,
                metavar="N",
                help="the memory as it was at the end of step N (default: now)",
            )
            command.add_argument(
                "--grep", metavar="TEXT", help="only items that contain TEXT; case is ignored"
            )
        else:
            command.add_argument(
                "--png", help="where the picture goes (default: memory.png beside the file)"
            )
    return parser


if __name__ == "__main__":
    main()
