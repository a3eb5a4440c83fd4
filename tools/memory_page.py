"""Writes a memory as a page, RUN/memory.html: what `show_memory.py --html` and show_run.py call.

pages/memory.js draws it: problems and bank at any step, what replaced what, and each problem's
story. It composes a teacher's prompt anew, with the headings of memory.py.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from memory import BEHAVIORS, CLOSING, LESSONS, SOLUTION, STRATEGIES
from runtime.files import read_json, read_rows
from runtime.store import Store, nearest
from tools.page import write_page
from tools.run_files import need
from tools.show_memory import ALL_KINDS, growth

CUT = 2000  # characters of a text in the page
ROOM = 60e6  # of all attempts in it: a memory of 10,000 problems has to stay usable
SHOWN = 3  # behaviors that a teacher was offered [paper]; a run's config.json says otherwise


def items_of(memory, place, cut) -> list[tuple]:
    """Gives all items, oldest first, as pages/memory.js reads them.

    place: {problem id: its number}. A behavior's is -1. cut: characters of an attempt.
    """
    rows = memory.query(
        "SELECT id, kind, problem, title, text, feedback, evidence, born, ended, policy_step,"
        " shortcuts FROM item ORDER BY id"
    )
    items = []
    for id, kind, problem, title, text, feedback, evidence, *times in rows:
        number = place[problem] if problem else -1
        longest = cut if kind in ("success", "failure") else CUT
        texts = (title, text[:longest], feedback and feedback[:longest])
        items.append((id, ALL_KINDS.index(kind), number, *texts, json.loads(evidence), *times))
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
    attempts, longest = memory.query(
        "SELECT COUNT(*), COALESCE(MAX(length(text)), 0) FROM item WHERE tier = 'experience'"
    )[0]
    cut = int(min(CUT, max(200, ROOM / max(1, attempts))))
    curves = growth(memory)
    return {
        "problems": problems,
        "items": items_of(memory, place, cut),
        "visits": visits_of(memory, place, shown),
        "growth": np.stack([curves[kind] for kind in ALL_KINDS], axis=1).tolist(),
        "kinds": ALL_KINDS,
        "last": memory.last_step(),
        "cut": cut if longest > cut else 0,
        "headings": (STRATEGIES, LESSONS, BEHAVIORS, SOLUTION),
        "closing": CLOSING,
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
        cure = f"remove it, and the page shows {SHOWN} behaviors"
        shown = need(read_json(config, cure), [], config).get("retrieve_k", SHOWN)
    data = memory_data(Store(path, frozen=True), samples, shown)
    data["run"] = path.with_name("run.html").is_file() or config.is_file()
    return write_page(path.with_name("memory.html"), "memory.html", title=f"{path}", data=data)


def write_memory_pages(paths):
    """Writes the pages of runs, or of memory.db files; a run without a memory is named.

    Raises ValueError or OSError if none has a memory, or if a file can't be read.
    """
    written = 0
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted([*path.glob("memory.db"), *path.glob("*/memory.db")])
        elif not path.exists():
            files = [path / "memory.db"]  # which is then missed by name
        for file in files:
            print(write_memory_page(file))
        if not files:
            print(f"{path}: no memory.db, left out")
        written += len(files)
    if not written:
        raise ValueError("none of these has a memory.db; name the folder of a run")
