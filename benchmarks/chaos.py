"""Kills a run with SIGKILL at random moments, aimed at each of its phases in turn, and resumes it
every time.

    OMP_NUM_THREADS=1 python benchmarks/chaos.py --kills 50
    OMP_NUM_THREADS=1 python benchmarks/chaos.py --kills 20 --ranks 2      of which one dies first,
                                                                           as on a cluster

Half of the kills hit a PMD run. The other half hit a GRPO run whose first update comes late, so
that checkpoints are written before it. When a run ends, it is compared with a run that was never
interrupted. The final weights, the rows and events of the memory, the evaluations, and all metrics
except the times must be equal: nothing lost, nothing twice. The program prints how many kills hit
each phase, how far the runs had come, and how many ends were compared. It exits with status 1 at
the first difference.

The children are forked from a process that has everything imported, so that a kill costs one second
in place of ten.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import memory
import pmd
from runtime.checkpoint import checkpoints
from runtime.sampler import Sampler

PHASES = {
    "sampling": (Sampler, "generate"),
    "recording": (memory.Memory, "record"),
    "reflecting": (memory.Memory, "reflect"),
    "behavior update": (memory.Memory, "abstract"),
    "commit": (memory.Memory, "_admit"),
    "optimizer step": (pmd, "update"),
    "metrics": (pmd.Run, "note"),
    "checkpoint": (pmd.Run, "save"),
    "rename": (Path, "rename"),
    "end of the run": (pmd.Run, "finish"),
}
RUNS = {
    "pmd": (
        "--steps 6 --batch_size 8 --mini_batch_size 4 --group_size 4 --save_every 2"
        " --behavior_every 2"
    ),
    "grpo": (
        "--steps 8 --batch_size 4 --mini_batch_size 4 --group_size 2 --save_every 1 --method grpo"
    ),
}
ALL = "--eval_problems 4 --eval_k 2 --eval_every 2 --log_every 2 --resume"


def child(flags, name, told, rank, ranks, store):
    """Runs or resumes, as one rank of several; rank 0 tells every entry into a phase, and its end,
    to the pipe `told`.
    """

    def watched(owner, attribute, phase):
        original = getattr(owner, attribute)

        def wrapper(*args, **kwargs):
            told.send(phase)
            result = original(*args, **kwargs)
            told.send(None)
            return result

        setattr(owner, attribute, wrapper)

    for phase, (owner, attribute) in PHASES.items() if rank == 0 else ():
        watched(owner, attribute, phase)
    # its own: killed while it holds the shared one, it would stop the parent
    tqdm.set_lock(threading.RLock())
    with (
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        torch.set_num_threads(1)
        if ranks > 1:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
            )
        pmd.train(dataclasses.replace(pmd.parse_flags(flags), name=name))
    if rank == 0:
        told.send("done")


def attempt(flags, name, ranks, phase=None, n=1, delay=0.0, first=0):
    """Runs until rank 0's nth entry into `phase`, then kills after `delay` seconds, rank `first`
    before the others.

    Returns whether it was killed, and the entries and seconds of each phase.

    The seconds of nested phases are part of those of the outer one; they only say how long to wait
    before a kill.
    """
    parent, told = multiprocessing.Pipe(duplex=False)
    store = tempfile.mktemp()  # a name for the ranks to meet at
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=child, args=(flags, name, told, rank, ranks, store))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    told.close()
    entered, seconds, stack = Counter(), defaultdict(list), []
    while True:
        try:
            said = parent.recv()
        except EOFError:
            sys.exit(f"the run {name} died by itself")
        if said == "done":
            for process in processes:
                process.join()
            return False, entered, seconds
        if said is None:
            inner, start = stack.pop()
            seconds[inner].append(time.perf_counter() - start)
            continue
        entered[said] += 1
        stack.append((said, time.perf_counter()))
        if said == phase and entered[said] == n:
            time.sleep(delay)
            for process in processes[first:] + processes[:first]:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            return True, entered, seconds


def end_state(folder):
    """Digest of what must not depend on interruptions."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("seconds", "share", "tokens_per_second", "peak_gb"):
            row.pop(key, None)
    tables, names = [], ("item ORDER BY id", "event", "problem ORDER BY id")
    if (folder / "memory.db").exists():  # GRPO remembers nothing
        with contextlib.closing(sqlite3.connect(folder / "memory.db")) as db:
            tables = [db.execute(f"SELECT * FROM {name}").fetchall() for name in names]
    evals = {p.name: p.read_text() for p in sorted((folder / "evals").iterdir())}
    parts = {
        "weights": (folder / "final" / "model.safetensors").read_bytes(),
        "metrics": repr(rows).encode(),
        "memory": repr(tables).encode(),
        "evaluations": repr(evals).encode(),
        "leftovers": repr(sorted(p.name for p in folder.rglob("*.partial"))).encode(),
    }
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def first_update(folder):
    """The step of a run's first update."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row["step"] for row in rows if row.get("updates"))


def torture(method, kills, ranks, rng):
    """Kills and resumes runs of a method, so often, and compares each that ends with one left
    alone. Prints what was hit.
    """
    killed, reached, compared = Counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as out:
        flags = [*RUNS[method].split(), *ALL.split(), "--out", out]
        steps = pmd.parse_flags(flags).steps
        _, entries, seconds = attempt(flags, "whole", ranks)
        expected, late = end_state(Path(out, "whole")), first_update(Path(out, "whole"))
        if method == "grpo" and late < 3:
            sys.exit(
                f"the first update of the GRPO run is at step {late}: too early to show anything;"
                " choose other flags"
            )
        order = [phase for phase in PHASES if entries[phase]]
        bar = tqdm(total=kills, unit="kill", desc=method)
        for number in range(10**6):
            if killed.total() >= kills:
                break
            name = f"run{number}"
            for _ in range(6):  # at most so many kills on one run, then it may end
                phase = min(order, key=lambda p: (killed[p], rng.random()))
                typical = sorted(seconds[phase])[len(seconds[phase]) // 2]
                saved = checkpoints(Path(out, name))
                left = 1 - int(saved[-1].name) / steps if saved else 1
                n = rng.randint(1, max(1, int(left * entries[phase])))
                delay, first = rng.uniform(0, 1.2 * typical), rng.randrange(ranks)
                hit, *_ = attempt(flags, name, ranks, phase, n, delay, first)
                if not hit or killed.total() >= kills:
                    break
                killed[phase] += 1
                reached[int(saved[-1].name) if saved else 0] += 1
                bar.update()
            attempt(flags, name, ranks)
            found = end_state(Path(out, name))
            if wrong := [part for part in expected if found[part] != expected[part]]:
                sys.exit(
                    f"{method}: {name} ended with other {', '.join(wrong)} than the run that was"
                    " never interrupted"
                )
            compared += 1
        bar.close()
    hits = ", ".join(f"{n} in {phase}" for phase, n in killed.items())
    at_hand = ", ".join(f"{step or 'none'}: {n}" for step, n in sorted(reached.items()))
    print(f"{method}, first update at step {late}: {killed.total()} kills: {hits}")
    print(f"  the checkpoint at hand when killed: {at_hand}")
    print(
        f"  {compared} runs came to their end, each equal to the uninterrupted one in weights,"
        " memory, metrics and evaluations",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in all (default: 50)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    if args.kills < 1 or args.ranks < 1:
        parser.error("--kills and --ranks must be at least 1")
    rng = random.Random(args.seed)
    torture("pmd", args.kills - args.kills // 2, args.ranks, rng)
    torture("grpo", args.kills // 2, args.ranks, rng)


if __name__ == "__main__":
    main()
