"""Writes a memory as JSON lines, to publish or to read elsewhere, and makes a memory of such lines.

    python tools/show_memory.py export runs/x/memory.db bank.jsonl
    python tools/show_memory.py import bank.jsonl runs/bank/memory.db
    python pmd.py --method frozen-memory --memory_from bank

The first line names the embedder. The embeddings are not in the file: `import` embeds the texts
anew, with the same embedder.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.chat import clean
from runtime.files import ELSEWHERE, write_lines
from runtime.replies import text_of
from runtime.services import make_embedder
from runtime.store import COLUMNS, KINDS, WITH_EMBEDDING, Item, Store
from tasks.files import json_lines

FORM = "pmd memory, version 1"
NAMES = COLUMNS.replace(" ", "").split(",")  # of an item, in order
PROBLEM = ("id", "text", "cluster")
TEXTS = ("tier", "kind", "problem", "text", "evidence", "shortcuts")
PERHAPS_TEXTS = ("title", "feedback")  # or None
LAST_STEP = 10_000_000  # that an item may be of: a page and a table have a row for each step
LARGEST = 2**63 - 1  # SQLite holds no larger number


def export_memory(source, target) -> str:
    """Writes the problems, items and counts of a memory to a file of lines; says how many.

    Raises ValueError if the target exists, or as Store does.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} exists; name another file, or remove it")
    with contextlib.closing(Store(source, frozen=True)) as memory:
        problems = memory.query(f"SELECT {', '.join(PROBLEM)} FROM problem ORDER BY id")
        items = memory.query(f"SELECT {COLUMNS} FROM item ORDER BY id")
        head = {"form": FORM, "problems": len(problems), "items": len(items), **memory.meta}
        lines = [{"problem": dict(zip(PROBLEM, row, strict=True))} for row in problems]
        lines += [{"item": dict(zip(NAMES, row, strict=True))} for row in items]
        write_lines(target, [head, *lines], ELSEWHERE)
    return f"{len(problems)} problems and {len(items)} items: {target}"


def import_memory(source, target, embedder="") -> str:
    """Makes a memory of a file of lines; says how much it holds.

    embedder: another than the one that the file names. Raises ValueError if the target exists, if
    the lines are no memory, or if there is no such embedder.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} exists; name another file, or remove it")
    head, *rows = [row for _, row in json_lines(source)] or [{}]
    if head.get("form") != FORM or not are_caps(head.get("caps")):
        raise ValueError(f"{source} is no {FORM!r}: its first line does not say so")
    problems = [problem_of(row["problem"], source) for row in rows if "problem" in row]
    ids = {id for id, *_ in problems}
    if len(ids) < len(problems):
        raise ValueError(f"{source} has a problem twice: it was changed")
    items = [item_of(row["item"], ids, source) for row in rows if "item" in row]
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{source} has an item's id twice: it was changed")
    promised = head.get("problems"), head.get("items")
    if promised != (len(problems), len(items)) or len(rows) != len(problems) + len(items):
        raise ValueError(
            f"{source} has {len(problems)} problems and {len(items)} items where its first line"
            f" says {promised[0]} and {promised[1]}: it is cut, or was changed"
        )
    embedder = embedder or str(head.get("embedder") or "hashing")
    embed = make_embedder(SimpleNamespace(embedder=embedder, device=""))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name("import.partial")
    remove(partial)
    try:
        with contextlib.closing(Store(partial, embed, embedder)) as memory:
            fill(memory, problems, items)
            memory.db.execute("UPDATE meta SET value = ? WHERE key = 'caps'", (head["caps"],))
            memory.db.commit()
            memory.settle()
        partial.rename(target)
    finally:
        remove(partial)
    return f"{len(problems)} problems and {len(items)} items: {target}"


def remove(path):
    """Removes a database that may not be there, with its log."""
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def fill(memory, problems, items):
    """Writes problems and items with their embeddings, which ended insights do without."""
    vectors = memory.vectors([text for _, text, _ in problems])
    rows = [(*p, vector.tobytes()) for p, vector in zip(problems, vectors, strict=True)]
    needed = [item for item in items if item.ended is None or item.tier == "behavior"]
    embedded = dict(zip([i.id for i in needed], memory.embedded(needed), strict=True))
    marks = ", ".join("?" * (len(NAMES) + 1))
    with memory.writing():
        memory.db.executemany("INSERT INTO problem VALUES (?, ?, ?, ?)", rows)
        for item in items:
            vector = embedded[item.id].tobytes() if item.id in embedded else None
            values = [getattr(item, name) for name in NAMES]
            memory.db.execute(
                f"INSERT INTO item ({WITH_EMBEDDING}) VALUES ({marks})", [*values, vector]
            )


def problem_of(row, source) -> tuple[str, str, int]:
    """Makes a problem of a row. Raises ValueError if it is none of a memory."""
    is_problem = isinstance(row, dict) and set(row) == set(PROBLEM)
    if is_problem:
        is_problem = isinstance(row["id"], str) and isinstance(row["text"], str)
        is_problem &= is_count(row["cluster"], LARGEST)
    if not is_problem:
        raise ValueError(f"{source} has a problem that no memory has: {str(row)[:80]}")
    return clean(row["id"]), clean(row["text"]), row["cluster"]


def item_of(row, problems, source) -> Item:
    """Makes an item of a row. problems: their ids. Raises ValueError if it is none of a memory."""
    if not (isinstance(row, dict) and set(row) == set(NAMES) and has_types(row)):
        raise ValueError(f"{source} has an item that no memory has: {str(row)[:80]}")
    names = [name for name in (*TEXTS, *PERHAPS_TEXTS) if row[name] is not None]
    row = row | {name: clean(row[name]) for name in names}
    if row["tier"] != "experience":  # on one line, as parse_items has them: no heading of a prompt
        row = row | {name: text_of(row[name]) for name in ("title", "text")}
    is_item = row["kind"] in KINDS.get(row["tier"], ())
    is_item &= row["problem"] == "" if row["tier"] == "behavior" else row["problem"] in problems
    if not is_item:
        raise ValueError(f"{source} has an item that no memory has: {str(row)[:80]}")
    return Item(**row)


def has_types(row) -> bool:
    """Says whether the values of a row with an item's names are of an item's types."""
    steps = [row["born"], row["policy_step"] or 0, row["ended"] or 0]
    texts = [row[name] for name in TEXTS] + [row[name] or "" for name in PERHAPS_TEXTS]
    reward = row["reward"] or 0.0
    sources = loaded(row["evidence"])  # ids: texts, or numbers of items
    return (
        is_count(row["id"], LARGEST)
        and all(is_count(step, LAST_STEP) for step in steps)
        and all(isinstance(text, str) for text in texts)
        and isinstance(reward, (int, float))
        and abs(reward) <= LARGEST
        and isinstance(sources, list)
        and all(isinstance(source, (str, int)) for source in sources)
    )


def is_count(value, most) -> bool:
    return type(value) is int and 0 <= value <= most


def are_caps(text) -> bool:
    """Says whether a text is the caps of a memory: what show_memory.py reads of them."""
    caps = loaded(text)
    return isinstance(caps, dict) and is_count(caps.get("strategy"), LARGEST)


def loaded(text):
    """Reads JSON; None of what is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def main(argv=None):
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/show_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("export", "import"))
    parser.add_argument("source", help="export: a memory.db; import: a file of lines")
    parser.add_argument("target", help="the file to write")
    other = "import: embed with this model instead of the one that the file names"
    parser.add_argument("--embedder", default="", help=other)
    args = parser.parse_args(argv)
    try:
        if args.command == "export":
            print(export_memory(args.source, args.target))
        else:
            print(import_memory(args.source, args.target, args.embedder))
    except (ValueError, OSError, KeyError, TypeError) as error:
        sys.exit(f"show_memory.py: {error}")


if __name__ == "__main__":
    main()
