"""The study: does PMD beat SDPO, where, and why? In the embedded world, with seeds.

    python study/study.py                 # all runs that have no record yet: about 8 core-hours
    python study/study.py --parts main    # or some of tuning,main,scale,mastered
    python study/study.py --report        # study/results.md and the figures, from the records
    python study/study.py --quick --out X # a world a kind, 10 steps: the machinery, no result

DECLARATION. This text, the grid below and tables.py were committed before the first run. Changed
since, before the first run of `main`: what is said of the probes, under Worlds, and that a part is
shown when all of its runs are made. After it: a figure has no panel for a part without runs, and
what was found by looking is in tables of its own or beside others, as exploratory: two comparisons,
the cost of a whole run, and blocks beside weights.

Worlds. 24 a kind: 510 to 533, whose verifier names the first wrong step (feedback), and 534 to
557, whose verifier says nothing (plain). 558 to 563 are those of part `mastered`. No draft and no
table has used any of them. A world's number is the seed of its run. Checkpoints go round three,
which differ in the seed of their pre-training and pass the reading probes of nano/README.md, but
for what study/README.md names.

Score. avg@4 on 80 held-out problems, without memory in the prompt. AUC is its mean over steps 10,
20, ..., 80. A run is 80 steps of 8 problems and 4 rollouts each, one update a step, for every arm.

Primary comparisons, in AUC, paired by world, two-sided t tests, Holm's correction over the five:
    P1  PMD minus SDPO, feedback (24 worlds)
    P2  PMD minus SDPO, plain (24 worlds)
    P3  PMD minus PMD with a transient memory, both kinds (48 worlds)
    P4  PMD minus a frozen memory, both kinds (48 worlds). The memory is that of a frozen policy
        that ran in the same world, and all of it is read from the first step on
    P5  PMD minus PMD whose teacher reads no lessons, plain (24 worlds)
A comparison is won or lost if its corrected p is below 0.05, and else open. All else is
exploratory. Wilcoxon's p and the mean of each checkpoint stand beside it: worlds of one checkpoint
share its pre-training, and three checkpoints say little about a fourth.

Rates. Each arm has its own: the best mean AUC of 3e-4, 6e-4, 1e-3 and 2e-3 over the tuning worlds
411 to 416, three a kind, the same for all arms. PMD with --supervise solved takes PMD's. No other
world tunes anything.

Scale (part `scale`). PMD and SDPO in the eight feedback worlds of the shipped checkpoint, with
checkpoints of 0.2, 0.7 and 6 million parameters that pass the probes. The shipped one, 0.9
million, has its runs in `main`. In its eight plain worlds they run with one that fails the lesson
probe (0.6 million, the shipped one until 2026-11-26), which was never shown feedback. Rates are
the tuned ones times 96 / hidden size, at most 2e-3. A size that does not pass after its training
stays in the table, named as one that fails.

Mastered problems (part `mastered`). --supervise_mastered or not, times --loss_mean sequence or
token, for SDPO, PMD and transient memory, in 6 worlds of 160 steps. Leaving mastered problems out
becomes the default if for each of the three, under `sequence`, the final score is higher (the 95%
interval of the paired difference is above 0) and the mean over steps 20 to 160 is not lower (the
interval's lower end is above -0.02). Else it stays off.

What else becomes the default. `--supervise solved`, if PMD with it is above PMD in plain worlds
and not below it in feedback worlds, by the 95% intervals of the differences in AUC. Else `all`.

Compute. AUC at equal CPU seconds, and at equal forward tokens of student and teacher with
reflection: the mean score over the budget, linear between evaluations, where the budget of a world
is the smaller total of its SDPO and PMD runs. Evaluating, watching and a frozen memory's lender are
left out.

Why. Every ten steps the quality of the teacher is measured, exactly: see variants.py.

No run is dropped: one that fails has a record that says so, and is named in results.md. One thread
a run, one run a core. A record is a line of records.jsonl, written when its run ends, and the same
command goes on with the runs that have none.

Estimate, in core-hours: tuning 1.5, main 4.0, scale 1.1, mastered 1.6, together 8.2. The
checkpoints are made before: study/README.md.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: one thread a run
    os.environ[variable] = "1"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tqdm import tqdm  # noqa: E402
from transformers.utils import logging as transformers_logging

import pmd
from nano.world import write_world
from runtime.files import append, read_lines
from study.tables import KINDS, report

STEPS, EVERY, K = 80, 10, 4
RATES = (3e-4, 6e-4, 1e-3, 2e-3)
CHECKPOINTS = ("nano", HERE / "models" / "1", HERE / "models" / "2")  # by seed of pre-training
# {checkpoint: (its folder, its hidden size)}
SIZES = {
    "0.2M": (HERE / "models" / "0.2M", 32),
    "0.7M": (HERE / "models" / "0.7M", 80),
    "0.9M": ("nano", 96),
    "6M": (HERE / "models" / "6M", 256),
    "misreads": (HERE / "models" / "misreads", 96),
}
# {arm: the file of arms/ that it is, and flags}
ARMS = {
    "grpo": ("grpo", {}),
    "sdpo": ("sdpo", {}),
    "pmd": ("pmd", {}),
    "pmd-transient": ("pmd_transient", {}),
    "frozen-memory": ("frozen_memory", {}),
    "pmd-nolessons": ("pmd_nolessons", {}),
    "pmd-solved": ("pmd", {"supervise": "solved"}),
}
TUNED = [arm for arm in ARMS if arm != "pmd-solved"]
TEACHERS = ("sdpo", "pmd", "pmd-transient")  # of part mastered
# CPU seconds of a run of 80 steps, for the estimate
SECONDS = {"grpo": 27, "sdpo": 30, "pmd": 42, "pmd-transient": 46, "frozen-memory": 36}
LENDER = 32  # the frozen policy's, once a world
SLOWER = {"6M": 4.5, "0.2M": 0.6, "0.7M": 0.9}  # than the shipped checkpoint


@dataclass
class Job:
    """One run: an arm in a world, by a checkpoint."""

    part: str
    arm: str
    world: int
    kind: str
    checkpoint: str  # seed of pre-training, or size
    label: str = ""  # what else tells it from other runs of the part
    flags: dict = field(default_factory=dict)  # of pmd.Config, over those of the arm
    model: str = ""  # the folder of the checkpoint

    def __post_init__(self):
        # here, and not where it runs: a worker has the grid that is declared, not a --quick one
        if self.checkpoint in SIZES:
            self.model = str(SIZES[self.checkpoint][0])
        else:
            self.model = str(CHECKPOINTS[int(self.checkpoint)])

    @property
    def name(self) -> str:
        return "/".join(filter(None, [self.part, self.arm, self.label, str(self.world)]))

    @property
    def seconds(self) -> float:
        steps = self.flags.get("steps", STEPS) / STEPS
        lends = self.arm == "frozen-memory" and self.label in ("", f"{RATES[0]:g}")
        alone = SECONDS.get(self.arm, SECONDS["pmd"]) * SLOWER.get(self.checkpoint, 1)
        return alone * steps + LENDER * lends


# --------------------------------------------------------------------------------------------------
# The grid
# --------------------------------------------------------------------------------------------------


def worlds_of(first, each) -> list[tuple]:
    """Lists (world, kind, checkpoint) of `each` worlds a kind, from world `first` on."""
    found = []
    for number, kind in enumerate(KINDS):
        for i in range(each):
            found.append((first + number * each + i, kind, str(i % len(CHECKPOINTS))))
    return found


TUNING, MAIN, MASTERED = worlds_of(411, 3), worlds_of(510, 24), worlds_of(558, 3)


def tuning(rates) -> list[Job]:
    """The arms at all rates, whatever the rates are that were found so far."""
    jobs = []
    for world in TUNING:
        for arm in TUNED:
            jobs += [Job("tuning", arm, *world, f"{rate:g}", {"lr": rate}) for rate in RATES]
    return jobs


def main_part(rates) -> list[Job]:
    return [Job("main", arm, *world, "", {"lr": rates[arm]}) for world in MAIN for arm in ARMS]


def scale(rates) -> list[Job]:
    jobs = []
    for world, kind, seed in MAIN:
        for size, (_, width) in SIZES.items():
            wanted = "plain" if size == "misreads" else "feedback"
            if seed != "0" or kind != wanted or size == "0.9M":
                continue
            for arm in ("sdpo", "pmd"):
                rate = min(2e-3, rates[arm] * 96 / width)
                jobs.append(Job("scale", arm, world, kind, size, size, {"lr": rate}))
    return jobs


def mastered(rates) -> list[Job]:
    jobs = []
    for world in MASTERED:
        for arm in TEACHERS:
            for supervised in (True, False):
                for mean in ("sequence", "token"):
                    label = f"{mean}-{'all' if supervised else 'unmastered'}"
                    flags = {"lr": rates[arm], "steps": 2 * STEPS, "eval_every": 2 * EVERY}
                    flags |= {"loss_mean": mean, "supervise_mastered": supervised}
                    jobs.append(Job("mastered", arm, *world, label, flags))
    return jobs


PARTS = {"tuning": tuning, "main": main_part, "scale": scale, "mastered": mastered}


def tuned(records) -> dict:
    """{arm: the rate with the best mean AUC over the tuning worlds}; PMD's for pmd-solved.

    1e-3, the preset's, for an arm whose runs are not all there or failed.
    """
    found = {}
    for arm in TUNED:
        means = {}
        for rate in RATES:
            rows = [records.get(Job("tuning", arm, *w, f"{rate:g}").name, {}) for w in TUNING]
            if all("test" in row for row in rows):
                means[rate] = statistics.mean(auc(row) for row in rows)
        found[arm] = max(means, key=means.get) if len(means) == len(RATES) else 1e-3
    return found | {"pmd-solved": found["pmd"]}


def auc(record) -> float:
    """The mean of avg@4 over the evaluations after the first."""
    return statistics.mean(row["avg"] for row in record["test"] if row["step"])


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------


def work(job, out, short) -> dict:
    """Runs a job and returns its record. In a process of its own, which does one after another."""
    record = {"job": job.name, "part": job.part, "arm": job.arm, "label": job.label}
    record |= {"world": job.world, "kind": job.kind, "checkpoint": job.checkpoint}
    record |= {"rate": job.flags["lr"]}
    transformers_logging.set_verbosity_error()
    with open(os.devnull, "w") as silence:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            try:
                train(job, out, short)
            except (Exception, SystemExit) as error:
                return record | {"failed": f"{type(error).__name__}: {error}"}
    record |= harvest(out / job.name)
    if job.arm == "frozen-memory":
        lender = harvest(out / lender_of(job))["test"]
        record["lender"] = lender[-1]["avg"]  # the frozen policy, with its memory in the prompt
    shutil.rmtree(out / job.name)
    return record


def train(job, out, short):
    """Trains an arm, watched; a frozen memory's lender first, where it has not run yet."""
    shutil.rmtree(out / job.name, ignore_errors=True)
    flags = {**pmd.PRESETS["nano"], "group_size": 4, "eval_k": K, "eval_every": EVERY}
    flags |= {"steps": STEPS, "eval_problems": 80, "dev": 0.0, "save_every": 0, "seed": job.world}
    flags |= {"device": "cpu", "model": job.model, "task": str(world_of(job, out)), "out": str(out)}
    flags |= short
    if job.arm == "frozen-memory":
        lender = lender_of(job)
        if not (out / lender / "summary.json").exists():
            aside = f"{lender}-{os.getpid()}"  # another worker may make it at the same time
            run("frozen_policy", flags | {"name": aside, "eval_every": 0})
            with contextlib.suppress(OSError):
                (out / aside).rename(out / lender)
        flags["memory_from"] = str(out / lender)
    arm, own = ARMS[job.arm]
    flags |= {"name": job.name, **own, **job.flags}
    if short:
        flags["steps"] = short["steps"]
    run(arm, flags)


def run(arm, flags):
    """Trains the method of a file of arms/."""
    pmd.train(pmd.Config(method=str(HERE / "arms" / f"{arm}.py"), **flags))


def lender_of(job) -> str:
    return f"lenders/{job.checkpoint}/{job.world}"


def world_of(job, out) -> Path:
    """The folder of a job's task, made where it is not there yet."""
    task = out / "worlds" / job.kind / str(job.world)
    if not task.exists():
        aside = task.with_name(f"{job.world}.{os.getpid()}")
        write_world(job.world, aside, speaks=job.kind == "feedback")
        with contextlib.suppress(OSError):  # the other worker was first
            aside.rename(task)
    return task


def harvest(folder) -> dict:
    """What a run's folder says, but for the job: scores and costs, the memory, the teacher."""
    rows = read_lines(folder / "metrics.jsonl")
    steps = [row for row in rows if "split" not in row]
    looks = read_lines(folder / "watched.jsonl")
    cpu = {0: 0.0} | {row["step"]: row["cpu"] for row in looks}
    test = []
    for row in rows:
        if row.get("split") == "test":
            line = {"step": row["step"], "avg": row["avg_at_k"], "maj": row["maj_at_k"]}
            line |= {"best": row["best_at_k"], "cpu": cpu.get(row["step"])}
            passed = [s.get("forward_tokens") for s in steps if s["step"] <= row["step"]]
            if all(passed):
                line["tokens"] = sum(sum(tokens.values()) for tokens in passed)
            test.append(line)
    kept = [row for row in steps if row["step"] % EVERY == 0]
    grown = [{"step": r["step"], "right": r.get("memory_precision"), **r["memory"]} for r in kept]
    return {"test": test, "memory": grown, "teacher": looks}


# --------------------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------------------


def read_records(path) -> dict:
    """{job: record} of a file that run_all wrote; none if there is no file."""
    return {row["job"]: row for row in read_lines(path)} if path.exists() else {}


def run_all(work, jobs, records, path, out, workers, short):
    """Runs work(job, out, short), which gives a record, for jobs without one.

    As many run at a time as there are workers. Records go to `records` and to the file `path`.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        futures = [pool.submit(work, job, out, short) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            record = future.result()
            records[record["job"]] = record
            append(path, record)
            if "failed" in record:
                tqdm.write(f"{record['job']} failed: {record['failed']}")


def end_with_parent():
    """Ends this worker when the program that started it is killed.

    It would go on else, beside the same runs of the program's next start.
    """

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shortened():
    """Cuts the grid down to a look at the machinery; returns the flags of its runs.

    Its worlds are no worlds of the study.
    """
    global TUNING, MAIN, MASTERED, RATES, CHECKPOINTS, SIZES
    TUNING, MAIN, MASTERED = worlds_of(451, 1), worlds_of(453, 1), worlds_of(455, 1)[:1]
    RATES, CHECKPOINTS = (1e-3,), ("nano",)
    SIZES = {"0.9M": ("nano", 96), "again": ("nano", 96)}
    return {"steps": 10, "eval_problems": 20}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(PARTS)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {known} (default: all)")
    out = "records, tables and figures are written here"
    parser.add_argument("--out", type=Path, default=HERE, help=out)
    parser.add_argument("--work", type=Path, help="the runs themselves (default: runs/study)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="one world a kind, 10 steps")
    parser.add_argument("--report", action="store_true", help="tables and figures only")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    unknown = [part for part in args.parts.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"--parts takes some of {known}, not {', '.join(map(repr, unknown))}")
    if args.quick and args.out == HERE:
        parser.error("--quick needs an --out of its own: its records are no results")
    args.work = args.work or (args.out if args.quick else HERE.parent) / "runs" / "study"
    return args


def main():
    """Runs the command line."""
    args = parse_args()
    short = shortened() if args.quick else {}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "records.jsonl"
    records = read_records(path)
    for part in [] if args.report else args.parts.split(","):
        jobs = [job for job in PARTS[part](tuned(records)) if job.name not in records]
        need_checkpoints(jobs)
        if part != "tuning" and not args.quick:
            need_rates(records)
        minutes = sum(job.seconds for job in jobs) / 60 * short.get("steps", STEPS) / STEPS
        print(
            f"{time.strftime('%H:%M')} {part}: {len(jobs)} runs left, about {minutes:.0f} minutes"
            f" of one core, {minutes / args.workers:.0f} with {args.workers} runs at a time",
            flush=True,
        )
        run_all(work, jobs, records, path, args.work.resolve(), args.workers, short)
    planned = {part: len(make(tuned(records))) for part, make in PARTS.items()}
    print(report(records, tuned(records), args.out, planned))


def need_rates(records):
    """Ends the program with a sentence if a run that the rates are chosen by has no record."""
    left = sum(job.name not in records for job in PARTS["tuning"]({}))
    if left:
        sys.exit(f"study.py: {left} runs of part tuning have no record; run --parts tuning first")


def need_checkpoints(jobs):
    """Ends the program with a sentence if a checkpoint that the jobs use is not there."""
    folders = {job.model for job in jobs} - {"nano"}
    missing = sorted(folder for folder in folders if not Path(folder).is_dir())
    if missing:
        sys.exit(f"study.py: no checkpoint at {', '.join(missing)}: {HERE / 'README.md'} says how")


if __name__ == "__main__":
    main()
