"""Checks that this checkout and another commit give the same results: six methods, some steps each.

    python tools/same.py HEAD              what is changed but not committed, against the last
                                           commit
    python tools/same.py 406e6d3           this checkout, against an older commit
    python tools/same.py HEAD --steps 8 --methods pmd,grpo

Run this before a commit that moves or rewrites code and should change no result. Every method runs
in a process of its own on the embedded model, once here and once in a temporary worktree of the
other commit. All rows of metrics.jsonl must be equal except for the times. The first row that is
not is printed, and the exit status is 1. The runs take about two minutes on one core. A commit that
is meant to change numbers, or the name of a metric, fails here: its message should say so.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "share", "tokens_per_second", "peak_gb")  # of a row of metrics.jsonl
# The first lends the second its memory.
METHODS = ("frozen-policy", "frozen-memory", "pmd", "pmd-transient", "sdpo", "grpo")
FLAGS = (
    "--batch_size 8 --mini_batch_size 4 --group_size 8 --behavior_every 2 --eval_problems 6"
    " --eval_k 2 --eval_every 2 --save_every 0 --device cpu --nproc 1"
).split()


def git(*words) -> subprocess.CompletedProcess:
    """Runs a git command in this checkout."""
    return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True)


@contextlib.contextmanager
def worktree(commit):
    """A temporary checkout of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "other")
        made = git("worktree", "add", "--quiet", "--detach", path, commit)
        if made.returncode:
            sys.exit(
                f"same.py: git can't make a worktree of {commit}"
                f" ({' '.join(made.stderr.split()[-40:])}): let this user write in {HERE}/.git and"
                f" in {folder}"
            )
        try:
            yield path
        finally:
            git("worktree", "remove", "--force", path)


def rows_of(checkout, method, steps, out) -> list[dict]:
    """Runs a method by the code in a checkout; returns the rows of metrics.jsonl without times."""
    command = [sys.executable, "pmd.py", *FLAGS, "--method", method, "--name", method]
    command += ["--out", str(out), "--steps", str(steps)]
    if method == "frozen-memory":
        command += ["--memory_from", "frozen-policy"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{method} failed in {checkout}:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    rows = [json.loads(line) for line in (out / method / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def difference(ours, theirs) -> str:
    """Describes the first difference between two lists of rows; "" if there is none."""
    for mine, other in zip(ours, theirs, strict=False):
        for key in sorted({*mine, *other}):
            here, there = mine.get(key), other.get(key)
            if here != there:
                return f"step {other.get('step')}, {key}: {there} there, {here} here"
    if len(ours) != len(theirs):
        return f"{len(theirs)} rows there, {len(ours)} here"
    return ""


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="what this checkout is compared with")
    parser.add_argument("--steps", type=int, default=4, help="batches a run (default: 4)")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="with commas between (default: all six)"
    )
    args = parser.parse_args()
    methods = args.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        parser.error(
            f"--methods takes some of {', '.join(METHODS)}, not {', '.join(map(repr, unknown))}"
        )
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    if not shutil.which("git"):
        parser.error("there is no git here to take the other commit from: install it")
    if git("rev-parse", "--verify", "--quiet", args.commit + "^{commit}").returncode:
        parser.error(f"{args.commit} is no commit of {HERE}")
    different = False
    with worktree(args.commit) as other, tempfile.TemporaryDirectory() as folder:
        for method in tqdm(methods, unit="method"):
            theirs = rows_of(other, method, args.steps, Path(folder, "theirs"))
            ours = rows_of(HERE, method, args.steps, Path(folder, "ours"))
            sentence = difference(ours, theirs)
            updates = sum(row.get("updates", 0) for row in ours)
            if not sentence and not updates and method != "frozen-policy":
                sentence = "the same, but no update was made: give more --steps"
            if sentence:
                different = True
            tqdm.write(f"{method}: {sentence or f'the same {len(ours)} rows, {updates} updates'}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
