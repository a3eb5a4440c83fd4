"""Measures what the memory costs beside its bare SQL and matrix products, and whether its size or
its history makes a step slower.

    python benchmarks/memory.py            stores of 100, 1,000 and 10,000 problems with full tiers:
                                           5 + 3 attempts and
                                           10 + 10 insights a problem, 500 behaviors, embeddings of
                                           1,024 dimensions
    python benchmarks/memory.py --quick    100 and 1,000 problems

A step is 32 problems with 8 rollouts each. Embedding and generation are excluded: vectors and
replies are made beforehand. SQLite's automatic checkpoint of its log is taken out of the operations
and timed after each step, with the writes of both sides in it. Everything that is compared is timed
in turn, in one run. Times mean little on a busy machine, so read the ratios and their quartiles,
which come last. It needs 5 GB for temporary files. --scratch says where.
"""

import argparse
import json
import multiprocessing
import resource
import sqlite3
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memory as mem
from runtime.store import WITH_EMBEDDING

D, BATCH, GROUP = 1024, 32, 8
TIERS = {"experience": {"success": 5, "failure": 3}, "insight": {"strategy": 10, "lesson": 10}}
# Tab. 5, 6 and 8
CHARACTERS = {"problem": 800, "completion": 1900, "feedback": 200, "insight": 350, "behavior": 200}


@dataclass
class Problem:
    id: str
    prompt: str


@dataclass
class Rollout:
    id: str
    problem: Problem
    text: str
    reward: float
    feedback: str


def unit(rng, n):
    vectors = rng.standard_normal((n, D), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def words(rng, characters):
    return " ".join("".join(map(chr, row)) for row in rng.integers(97, 123, (characters // 6, 5)))


class Scripted:
    """Stands in for embedder and model: fresh random unit vectors, drawn in a pool, and one
    well-formed reply.
    """

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.pool = unit(self.rng, 4096)
        self.items = [words(self.rng, CHARACTERS["insight"]) for _ in range(64)]

    def embed(self, texts):
        return self.pool[self.rng.integers(0, len(self.pool), len(texts))]

    def generate(self, prompts):
        def item():
            content = (  # equal texts would be refused
                f"{self.rng.integers(10**9)} {self.items[self.rng.integers(64)]}"
            )
            return {"title": "some few words", "content": content}

        actions = [
            {
                "action": "new",
                "name": f"behavior_{self.rng.integers(10**9)}",
                "instruction": item()["content"],
            }
        ]
        return [
            json.dumps(
                {"strategies": [item(), item()], "lessons": [item(), item()], "actions": actions}
            )
            for _ in prompts
        ]


INSERT_ITEM = (
    f"INSERT INTO item ({WITH_EMBEDDING}) VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, '', ?, ?, ?, ?)"
)


def fill(path, n, epochs=1, seed=0):
    """A store with full tiers, written row by row past the gate.

    epochs: one of living rows, after others of ended rows and of events.
    """
    scripted, rng = Scripted(seed), np.random.default_rng(seed)
    texts = {kind: [words(rng, count) for _ in range(50)] for kind, count in CHARACTERS.items()}
    memory = mem.Memory(path, scripted.embed, scripted.generate, forms="question")
    memory.db.execute("PRAGMA synchronous = OFF")
    problems = [Problem(f"p{i}", texts["problem"][i % 50]) for i in range(n)]
    questions = []
    for i, (p, vector) in enumerate(zip(problems, unit(rng, n), strict=True)):
        questions.append((p.id, p.prompt, i % 16, vector.tobytes()))
    kinds = ("success", "failure", "reflection", "proposed")
    with memory.db:
        memory.db.executemany("INSERT INTO problem VALUES (?, ?, ?, ?)", questions)
        for epoch in range(1, epochs + 1):
            rows = rows_of(rng, problems, texts, epoch, ended=epoch < epochs)
            memory.db.executemany(INSERT_ITEM, rows)
            events = [(epoch, p.id, kind, 4) for p in problems for kind in kinds]
            memory.db.executemany("INSERT INTO event VALUES (?, ?, ?, ?)", events)
        memory.db.executemany(INSERT_ITEM, behaviors_of(rng, texts, epochs))
    memory.db.execute("PRAGMA synchronous = NORMAL")
    memory.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    # `step_of` does it, or it would hit now the one, now the other
    memory.db.execute("PRAGMA wal_autocheckpoint = 0")
    sizes = {tier: n * sum(caps.values()) for tier, caps in TIERS.items()}
    memory._sizes.update(sizes | {"behavior": 500})
    return memory, problems


def rows_of(rng, problems, texts, epoch, ended):
    """An epoch's rows of experience and insight: all that the caps allow, of every problem."""
    for i, p in enumerate(problems):
        for tier, caps in TIERS.items():
            vectors = unit(rng, sum(caps.values()))
            kinds = [kind for kind, cap in caps.items() for _ in range(cap)]
            bodies = texts["completion" if tier == "experience" else "insight"]
            for j, (kind, vector) in enumerate(zip(kinds, vectors, strict=True)):
                evidence = f'["{epoch}/{p.id}/{j}"]'
                end, embedding = (epoch + 1, None) if ended else (None, vector.tobytes())
                item = (tier, kind, p.id, "some few words", bodies[(i + j) % 50])
                yield *item, 1.0, texts["feedback"][0], evidence, epoch, end, epoch, embedding


def behaviors_of(rng, texts, epoch):
    """The rows of a full bank."""
    for i, vector in enumerate(unit(rng, 500)):
        item = ("behavior", "behavior", "", f"behavior_{i}", texts["behavior"][i % 50])
        yield *item, None, None, "[]", epoch, None, 1, vector.tobytes()


def bare_contexts(db, batch, _):
    """The rows and the product that a step's teacher prompts are made of, one SELECT a problem and
    tier.
    """
    vectors = []
    for p in batch:
        for tier in TIERS:
            db.execute(
                "SELECT id, kind, title, text, evidence FROM item WHERE tier = ? AND problem = ?"
                " AND ended IS NULL",
                (tier, p.id),
            ).fetchall()
        vectors.append(
            np.frombuffer(
                db.execute("SELECT embedding FROM problem WHERE id = ?", (p.id,)).fetchone()[0],
                np.float32,
            )
        )
    bank = db.execute(
        "SELECT id, title, text, embedding FROM item WHERE tier = 'behavior' AND ended IS NULL"
    ).fetchall()
    return np.stack(vectors) @ np.stack([np.frombuffer(row[-1], np.float32) for row in bank]).T


def bare_record(db, batch, rollouts, vectors, step):
    """The rows a step's gate compares, their products, and about as many rows inserted and ended as
    by the gate (see the table): random vectors are never duplicates, but newcomers replace each
    other too. Returns how many.
    """
    groups = defaultdict(list)
    for i, r in enumerate(rollouts):
        groups[r.problem.id, "success" if r.reward else "failure"].append(i)
    inserts, ends = [], []
    for (pid, kind), new in groups.items():
        old = db.execute(
            "SELECT id, embedding FROM item WHERE tier = 'experience' AND problem = ? AND kind = ?"
            " AND ended IS NULL",
            (pid, kind),
        ).fetchall()
        table = np.stack([*(np.frombuffer(v, np.float32) for _, v in old), *vectors[new]])
        table @ table.T
        for (id, _), i in zip(old, new[:2] if kind == "success" else new[:3], strict=False):
            ends.append((step, id))
            r = rollouts[i]
            inserts.append(
                (
                    "experience",
                    kind,
                    pid,
                    None,
                    r.text,
                    r.reward,
                    r.feedback,
                    "[]",
                    "",
                    step,
                    None,
                    step,
                    vectors[i].tobytes(),
                )
            )
    with db:
        db.executemany("UPDATE item SET ended = ? WHERE id = ?", ends)
        db.executemany(f"INSERT INTO item ({WITH_EMBEDDING}) VALUES (NULL{', ?' * 13})", inserts)
        db.executemany(
            "INSERT INTO event VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET n = n + 1",
            [(step, pid, kind) for pid, kind in groups],
        )
    return len(ends)


def timed(times, key, call, *args):
    start = time.perf_counter()
    result = call(*args)
    times[key].append(time.perf_counter() - start)
    return result


def step_of(name, memory, problems, step, rng, times, refresh):
    """One step on a store, each of its operations timed beside its bare counterpart."""
    batch = [problems[i] for i in rng.choice(len(problems), BATCH, replace=False)]
    completion, feedback = words(rng, CHARACTERS["completion"]), words(rng, CHARACTERS["feedback"])
    rollouts = [
        Rollout(f"{step}/{p.id}/{g}", p, f"{g} {completion}", float(g % 2), feedback)
        for p in batch
        for g in range(GROUP)
    ]
    vectors = memory.embed(rollouts)
    drawn, memory.embed = memory.embed, lambda texts: vectors
    ended = "SELECT COUNT(*) FROM item WHERE ended = ?"
    n = 0
    if step % 2:  # whoever comes first also warms the caches
        n = timed(
            times, (name, "bare record"), bare_record, memory.db, batch, rollouts, vectors, step
        )
    timed(times, (name, "record, gate, evict"), memory.record, step, rollouts)
    times[name, "rows ended by record"].append(memory.db.execute(ended, (step,)).fetchone()[0] - n)
    if not step % 2:
        n = timed(
            times, (name, "bare record"), bare_record, memory.db, batch, rollouts, vectors, step
        )
    times[name, "rows ended by bare record"].append(n)
    memory.embed = drawn
    timed(times, (name, "reflect"), memory.reflect, step, batch)

    def composed():
        return [
            mem.compose(r.problem.prompt, **c)
            for r, c in zip(rollouts, memory.contexts(rollouts, step), strict=True)
        ]

    if step % 2:
        timed(times, (name, "bare contexts"), bare_contexts, memory.db, batch, rollouts)
    timed(times, (name, "contexts and compose"), composed)
    if not step % 2:
        timed(times, (name, "bare contexts"), bare_contexts, memory.db, batch, rollouts)
    timed(
        times, (name, "sizes and counts of a step"), lambda: (memory.sizes(), memory.counts(step))
    )
    timed(times, (name, "bank as of a step"), memory.as_of, step - 1, "behavior")
    if refresh:
        timed(times, (name, "abstract, once an epoch"), memory.abstract, step)
        timed(times, (name, "back one step"), memory.truncate_after, step - 1)
    timed(
        times, (name, "checkpoint of the log"), memory.db.execute, "PRAGMA wal_checkpoint(TRUNCATE)"
    )


def resident(path, queue):
    """MB at the peak of five steps on a store."""
    scripted = Scripted(1)
    memory = mem.Memory(path, scripted.embed, scripted.generate, forms="question")
    problems = [Problem(*row) for row in memory.db.execute("SELECT id, text FROM problem")]
    for step in range(100, 105):
        step_of("", memory, problems, step, np.random.default_rng(step), defaultdict(list), False)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=resident, args=(path, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def ratio(over, under):
    """Median of the paired ratios, with quartiles."""
    low, middle, high = np.percentile(np.array(over) / np.array(under), [25, 50, 75])
    return f"{middle:5.2f} [{low:.2f}, {high:.2f}]"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="100 and 1,000 problems, five epochs of history"
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="timed steps on each store (default: 40)"
    )
    parser.add_argument("--scratch", help="folder for the stores (default: the system's)")
    args = parser.parse_args()
    sizes, epochs = ([100, 1000], 5) if args.quick else ([100, 1000, 10_000], 20)
    times, rng = defaultdict(list), np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        wanted = {f"{n:,}": (n, 1) for n in sizes} | {
            f"1,000 after {epochs} epochs": (1000, epochs)
        }
        stores = {
            name: fill(Path(folder) / f"{i}.db", *size)
            for i, (name, size) in enumerate(tqdm(wanted.items(), desc="filling stores"))
        }
        for name, (memory, _) in stores.items():
            file = Path(memory.path)
            print(f"{name}: {memory.sizes()}, {file.stat().st_size / 2**20:.0f} MB")
        for step in tqdm(range(epochs + 1, epochs + 1 + args.steps + 2), desc="steps"):
            for i in rng.permutation(len(stores)):
                name = list(stores)[i]
                step_of(name, *stores[name], step, rng, times, step % 8 == 0)
        for memory, _ in stores.values():
            memory.close()
        full, empty = peak(Path(folder) / f"{len(sizes) - 1}.db"), peak(Path(folder) / "0.db")
    # two to warm up
    times = {key: spent[2:] if len(spent) > 10 else spent for key, spent in times.items()}
    names = list(stores)
    print_medians(times, names)
    print_ratios(times, names, f"{sizes[-1]:,}", f"1,000 after {epochs} epochs")
    abstract = "abstract, once an epoch"
    few, many = (np.median(times[f"{n:,}", abstract]) / (n // BATCH) for n in (100, sizes[-1]))
    print(
        f"{abstract}, divided by the steps of an epoch, {sizes[-1]:,} over 100: {many / few:.2f}\n"
        f"resident memory at its peak, {sizes[-1]:,} over 100 problems: {full - empty:+.0f} MB"
        f" ({full:.0f}, {empty:.0f})   at most 200"
    )


def print_medians(times, names):
    print(
        f"\nmedian milliseconds, {BATCH} problems x {GROUP} rollouts, sqlite"
        f" {sqlite3.sqlite_version}"
    )
    print(f"{'':28}" + "".join(f"{name:>22}" for name in names))
    for operation in dict.fromkeys(operation for _, operation in times):
        scale = 1 if operation.startswith("rows") else 1000
        medians = [scale * np.median(times[name, operation]) for name in names]
        print(f"{operation:28}" + "".join(f"{median:22.2f}" for median in medians))


def print_ratios(times, names, largest, long):
    print("\nratios: median of the pairs [quartiles]")
    bare = {"contexts and compose": "bare contexts", "record, gate, evict": "bare record"}
    for operation, other in bare.items():
        for name in names:
            times_as_long = ratio(times[name, operation], times[name, other])
            print(f"{operation} over {other}, {name}: {times_as_long}   at most 3")
    for operation in dict.fromkeys(operation for _, operation in times):
        if operation.startswith(("bare", "rows", "checkpoint")):
            continue
        limit = "at most 1.3"
        if operation.startswith("abstract"):
            limit = "once an epoch; a step of it: see below"
        for name, other in ((largest, "100"), (long, "1,000")):
            times_as_long = ratio(times[name, operation], times[other, operation])
            print(f"{operation}, {name} over {other}: {times_as_long}   {limit}")


if __name__ == "__main__":
    main()
