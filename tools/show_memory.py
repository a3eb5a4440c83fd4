"""Shows what a run remembers, also of a run that is still going; nothing is changed.

python tools/show_memory.py show runs/x/memory.db [--problem ID | --tier behavior] [--step N]
[--grep TEXT]
python tools/show_memory.py stats runs/x/memory.db        growth as in the paper's Figure 6: a table
                                                          and a PNG
python tools/show_memory.py runs/x --html                 RUN/memory.html: all of it as a page, with
                                                          each problem's story
"""

import argparse
import json
import signal
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.files import RunError, read_rows
from runtime.store import Store, describe, line_of, nearest, printable
from tools.page import write_page

KINDS = ("success", "failure", "strategy", "lesson", "behavior")
CUT = 2000  # characters of a text in the page: 10,000 problems have to stay usable
SHOWN = 3  # behaviors that a teacher was offered [paper]; a run's config.json says otherwise


def show(memory, problem=None, tier=None, step=None, grep=None) -> str:
    """Lays out the memory of one problem, or the items of one tier or of all.

    step: shows the memory at its end, instead of now. grep: a text that items have to hold.
    """
    if problem is not None:
        return describe(memory, problem, step)
    at = 10**9 if step is None else step
    tiers = [tier] if tier else ["experience", "insight", "behavior"]
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

    The steps are 0 to the last one with an event or a birth.
    """
    rows = memory.query("SELECT kind, born, ended, shortcuts != '' FROM item")
    ((last,),) = memory.query("SELECT COALESCE(MAX(step), 0) FROM event")
    last = max([last, *(born for _, born, *_ in rows)])
    kinds = ("success", "failure", "strategy", "lesson", "behavior", "shortcut")
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


def items_of(memory, place) -> list[tuple]:
    """Gives all items, oldest first, as pages/memory.js reads them.

    place: {problem id: its number}. A behavior's is -1.
    """
    rows = memory.query(
        "SELECT id, kind, problem, title, text, feedback, evidence, born, ended, policy_step,"
        " shortcuts FROM item ORDER BY id"
    )
    items = []
    for id, kind, problem, title, text, feedback, evidence, *times in rows:
        number = place[problem] if problem else -1
        texts = (title, text[:CUT], feedback and feedback[:CUT])
        items.append((id, KINDS.index(kind), number, *texts, json.loads(evidence), *times))
    return items


def visits_of(memory, place, shown) -> list[tuple]:
    """Gives each problem's attempts by step: (problem, step, right, all, behaviors offered).

    The behaviors are those nearest to its question in the bank of the step before, which is what
    a teacher reads by default (Eq. 4).
    """
    counts = defaultdict(lambda: [0, 0])
    for step, id, kind, n in memory.query(
        "SELECT step, subject, kind, n FROM event WHERE kind IN ('success', 'failure')"
    ):
        counts[step, id][0] += n if kind == "success" else 0
        counts[step, id][1] += n
    vectors = dict(memory.query("SELECT id, embedding FROM problem"))
    by_step = defaultdict(list)
    for step, id in sorted(counts):
        by_step[step].append(id)
    visits = []
    for step, ids in by_step.items():
        bank = memory.as_of(step - 1, "behavior")
        questions = np.stack([np.frombuffer(vectors[id], np.float32) for id in ids])
        for id, offered in zip(ids, nearest(questions, bank, shown), strict=True):
            behaviors = [item.id for item in offered]
            visits.append((place[id], step, *counts[step, id], behaviors))
    return visits


def memory_data(memory, samples, shown) -> dict:
    """Gathers what pages/memory.js draws."""
    problems = memory.query("SELECT id, substr(text, 1, ?), cluster FROM problem ORDER BY id", CUT)
    place = {id: number for number, (id, *_) in enumerate(problems)}
    items = items_of(memory, place)
    ((longest,),) = memory.query("SELECT MAX(MAX(length(text)), MAX(length(feedback))) FROM item")
    curves = growth(memory)
    return {
        "problems": problems,
        "items": items,
        "visits": visits_of(memory, place, shown),
        "growth": np.stack([curves[kind] for kind in KINDS], axis=1).tolist(),
        "kinds": KINDS,
        "last": memory.last_step(),
        "cut": CUT if (longest or 0) > CUT else 0,
        "samples": samples,
    }


def write_memory_page(path) -> Path:
    """Writes memory.html beside a memory.db, with the samples of its run; returns its path."""
    path = Path(path)
    samples, shown = [], SHOWN
    if path.with_name("samples.jsonl").is_file():
        samples = read_rows(path.with_name("samples.jsonl"))
    config = path.with_name("config.json")
    if config.is_file():
        shown = json.loads(config.read_text(encoding="utf-8")).get("retrieve_k", SHOWN)
    data = memory_data(Store(path, frozen=True), samples, shown)
    data["run"] = path.with_name("run.html").is_file() or config.is_file()
    return write_page(path.with_name("memory.html"), "memory.html", title=f"{path}", data=data)


def write_memory_pages(paths):
    """Writes the pages of runs, or of memory.db files; a run without a memory is named.

    Raises ValueError if none has a memory.
    """
    written = 0
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted([*path.glob("memory.db"), *path.glob("*/memory.db")])
        for file in files:
            print(write_memory_page(file))
        if not files:
            print(f"{path}: no memory.db, left out")
        written += len(files)
    if not written:
        raise ValueError("none of these has a memory.db; name the folder of a run")


def main(argv=None):
    """Runs the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if "--html" in argv:
        paths = [word for word in argv if word not in ("--html", "show")]
        try:
            return write_memory_pages(paths)
        except (RunError, ValueError, OSError) as error:
            sys.exit(f"show_memory.py: {error}")
    parser = argparse.ArgumentParser(
        prog="python tools/show_memory.py",
        description="Look at the memory of a run; nothing is changed.",
        epilog="`python tools/show_memory.py RUN --html` writes it as a page, RUN/memory.html",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "show": "print what is remembered",
        "stats": "how each tier grew: a table and a picture",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
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
