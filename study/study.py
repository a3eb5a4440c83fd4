"""The study: does PMD beat SDPO, when, and why? Every table of the paper in the embedded world,
with seeds.

    python study/study.py                      # the declared grid: tuning, main, tiers (about two
                                               hours on two cores)
    python study/study.py --parts knobs        # or some of
                                               lessons,rarity,groups,wrong,sharing,teacher,epochs,late,rates
    python study/study.py --report             # study/results.md and the figures again, from the
                                               records
    python study/study.py --quick --out FOLDER # two worlds, twenty steps, some minutes: shows that
    all of it works

Declared before the first run (this text, the grid below and tables.py were committed first):

- The primary comparison is PMD minus SDPO in AUC with groups of 4: 24 worlds, paired by world. AUC
  is the mean of avg@4 on
  the held-out problems, without memory, over steps 10, 20, ..., 80. PMD is the default of pmd.py.
  All other comparisons are exploratory, that of PMD under the other reading of who is supervised
  (pmd-solved) included: it was added when a run on a tuning world had shown that it matters, before
  any run of `main`.
- 24 worlds, 8 for each of 3 checkpoints that differ in the seed of their pre-training. A world's
  number is the seed of its
  run. Its secret, its problems and its dev split differ from those of every other world, the worlds
  of `tuning` included.
- Equal problems, rollouts and updates for every method: 80 steps of 8 problems, 4 rollouts each,
  one update a step.
- One learning rate for each method: the best by AUC of the same four, on the same three worlds,
  made for this (part
  tuning). Controls of PMD that differ in what the teacher reads (tiers) take PMD's. A frozen policy
  has none.
- Three checkpoints are reported: final, best on dev, and best on test (never with an interval).
- No run is dropped. One that fails is counted and named in results.md. (58 runs of the part `wrong`
  were, and its grid has
  changed: README.md says why.)
- Added when the results were known, to explain them: part `lessons`, PMD whose teacher reads no
  lessons, and part `late`,
  which asks why distillation turns down after 100 steps (part `epochs`): is it the rate, which
  falls to 0 over the second half there, or the supervision of problems whose attempts all succeed,
  on which GRPO takes no step and which is left out?

One thread a run and one run a core. A record of every run is appended to study/records.jsonl when
it ends, so that the command goes on where it stopped; its times go to study/timings.jsonl. Records
are the same bit for bit whenever they are made again on one machine; another machine's float sums
can turn a sampled token.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

for variable in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
):  # before torch: a tiny model's threads wait more than they work
    os.environ[variable] = "1"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tqdm import tqdm  # noqa: E402
from transformers.utils import logging as transformers_logging

import eval as ev
import pmd  # noqa: E402
from nano.make import write_world  # noqa: E402
from runtime.files import append, read_lines
from runtime.methods import method_class
from study.tables import report

STEPS, EVERY, K = 80, 10, 4
METHODS = ("grpo", "sdpo", "pmd", "pmd-solved", "pmd-transient", "frozen-policy", "frozen-memory")
TUNED = ("grpo", "sdpo", "pmd", "pmd-solved", "pmd-transient", "frozen-memory")
COMPARED = ("grpo", "sdpo", "pmd", "pmd-solved", "pmd-transient")  # in the knobs
ARMS = {
    "pmd-solved": {"method": "pmd", "supervise": "solved"}
}  # the other reading of who is supervised
VARIANTS = {"pmd": HERE / "variants.py", "sdpo": HERE / "variants_sdpo.py"}
RATES = (3e-4, 6e-4, 1e-3, 2e-3)
CHECKPOINTS = {
    0: "nano",
    1: HERE / "models" / "1",
    2: HERE / "models" / "2",
}  # by the seed of pre-training
SIZES = {"0.2M": HERE / "models" / "small", "0.6M": "nano", "0.9M": HERE / "models" / "large"}
WORLDS = {
    200 + 8 * c + i: c for i in range(8) for c in CHECKPOINTS
}  # {world: checkpoint}, in the order of the runs
TUNING_WORLDS = {100: 0, 101: 1, 102: 2}
KNOB_WORLDS = {world: c for world, c in WORLDS.items() if c == 0}  # those of the shipped checkpoint
TIERS = ("experience", "experience,insight", "experience,insight,behavior")
WORLD_KINDS = {  # arguments of nano.make.make_world
    "plain": {},
    "rare": {"names": ((1, 0), (2, 14), (3, 26))},  # no name of one syllable
    "common": {"names": ((1, 8), (2, 8)), "inputs": 10},  # none of three
    "apart": {"names": ((1, 8), (2, 8)), "inputs": 10, "shared": False},  # by no syllable
    "speaking": {"speaks": True},  # whose verifier gives feedback; for methods.py
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, or with `memory` one reading of a run's memory (by `model`, without training)."""

    name: str
    world: int
    checkpoint: int = 0
    kind: str = "plain"  # of the world
    flags: dict = dataclasses.field(default_factory=dict)  # of pmd.Config
    wrong: float = (
        0.0  # share of the operations in the model's reflected strategies that are made wrong
    )
    lessons: bool = True  # whether the teacher reads them
    falls: bool = False  # the learning rate, to 0 over the second half of the run
    model: str = ""  # for a reading
    memory: str | None = None  # the job whose memory is read; "" for none
    needs: tuple = ()  # names of jobs


# --------------------------------------------------------------------------------------------------
# The grid
# --------------------------------------------------------------------------------------------------


def cells(part, methods, worlds, rates, label="", **more):
    """Jobs of the methods on the worlds. A frozen memory is that of the frozen policy in the same
    world.
    """
    found, flags = [], more.pop("flags", {})
    for world, checkpoint in worlds.items():
        for method in methods:
            lender = f"{part}/frozen-policy{label}/{world}"
            own = {
                "method": method,
                **ARMS.get(method, {}),
                **({"lr": rates[method]} if method in rates else {}),
                **flags,
            }
            needs = ()
            if method == "frozen-memory":
                own["memory_from"], needs = lender, (lender,)
            found.append(
                Job(
                    f"{part}/{method}{label}/{world}",
                    world,
                    checkpoint,
                    flags=own,
                    needs=needs,
                    **more,
                )
            )
    return found


def readings(part, worlds, models, memories, tiers=TIERS[-1:]):
    """Jobs that put a memory into the prompt of a model that was not trained."""
    return [
        Job(
            f"{part}/{name}-reads-{memory.split('/')[1] if memory else 'nothing'}"
            f"{'' if t == TIERS[-1] else '-' + t}/{world}",
            world,
            checkpoint,
            flags={"tiers": t},
            model=str(model(checkpoint) if callable(model) else model),
            memory=memory and f"{memory}/{world}",
            needs=(f"{memory}/{world}",) if memory else (),
        )
        for world, checkpoint in worlds.items()
        for name, model in models.items()
        for memory in memories
        for t in tiers
    ]


def tuning(rates):
    lenders = cells("tuning", ["frozen-policy"], TUNING_WORLDS, {})
    jobs = cells("tuning", TUNED, TUNING_WORLDS, {})
    at_rates = [
        dataclasses.replace(job, flags={**job.flags, "lr": rate}, name=f"{job.name}@{rate:g}")
        for rate in RATES
        for job in jobs
    ]
    return lenders + at_rates


def main_part(rates):
    return cells("main", METHODS, WORLDS, rates)


def tiers(rates):
    jobs = []
    for shown in TIERS[:-1]:
        jobs += cells("tiers", ["pmd"], WORLDS, rates, f"-{shown}", flags={"tiers": shown})
    memories = ["main/frozen-policy"]
    return jobs + readings("tiers", WORLDS, {"base": CHECKPOINTS.get}, memories, TIERS)


def transfer(rates):
    return readings("transfer", KNOB_WORLDS, SIZES, ["", "main/frozen-policy", "main/pmd"])


def knob(part, methods, rates, label, **more):
    """Cells on the worlds of the shipped checkpoint."""
    return cells(part, methods, KNOB_WORLDS, rates, label, **more)


def groups(rates):
    jobs = []
    for size in (2, 8):
        jobs += knob("groups", COMPARED, rates, f"-{size}", flags={"group_size": size})
    return jobs


def rarity(rates):
    jobs = []
    for kind in ("rare", "common"):
        jobs += knob("rarity", COMPARED, rates, f"-{kind}", kind=kind)
    return jobs


def sharing(rates):
    jobs = knob("sharing", COMPARED, rates, "-apart", kind="apart")
    for kind in ("apart", "common"):
        label, flags = f"-{kind}-nobehavior", {"tiers": TIERS[1]}
        jobs += knob("sharing", ["pmd"], rates, label, kind=kind, flags=flags)
    return jobs


def other_rates(rates):
    """A method's own rate is in main."""
    jobs = []
    for rate in RATES:
        methods = [method for method in COMPARED if rates.get(method) != rate]
        jobs += knob("rates", methods, dict.fromkeys(COMPARED, rate), f"-{rate:g}")
    return jobs


def wrong(rates):
    jobs = []
    for grounded in (True, False):
        for share in (0.0, 0.2, 0.5):
            if share or not grounded:
                label = f"-{share:g}-{'' if grounded else 'un'}grounded"
                flags = {"ground_insights": grounded}
                jobs += knob("wrong", ["pmd", "pmd-solved"], rates, label, wrong=share, flags=flags)
    return jobs


def lessons(rates):
    return cells("lessons", ["pmd"], WORLDS, rates, "-nolessons", lessons=False)


def teacher(rates):
    return knob("teacher", COMPARED[1:], rates, "-live", flags={"teacher": "live"})


def epochs(rates):
    return knob("epochs", COMPARED, rates, "-160", flags={"steps": 2 * STEPS})


def late(rates):
    flags = {"steps": 2 * STEPS}
    falling = knob("late", ("sdpo", "pmd-solved"), rates, "-falls", flags=flags, falls=True)
    flags = {"steps": 2 * STEPS, "supervise_mastered": False}
    return falling + knob("late", ("sdpo", "pmd", "pmd-solved"), rates, "-unsolved", flags=flags)


KNOBS = {
    "lessons": lessons,
    "rarity": rarity,
    "groups": groups,
    "wrong": wrong,
    "sharing": sharing,
    "teacher": teacher,
    "epochs": epochs,
    "late": late,
    "rates": other_rates,
}
PARTS = {"tuning": tuning, "main": main_part, "tiers": tiers, "transfer": transfer, **KNOBS}


def grid(part, rates) -> list[Job]:
    """The jobs of a part, given the tuned learning rates {method: rate}."""
    if part not in PARTS:
        raise ValueError(
            f"there is no part {part!r}; there are {', '.join(PARTS)}, and knobs for the last nine"
        )
    return PARTS[part](rates)


def auc(record):
    """The mean of avg@k over the evaluations after the first, to the 80th step."""
    return statistics.mean(row["avg"] for row in record["test"] if 0 < row["step"] <= STEPS)


def tuned(records) -> dict:
    """{method: the rate with the best mean AUC over the tuning worlds}; PMD's for all where there
    was no tuning.
    """
    found = {}
    for method in TUNED:
        scores = {
            rate: [
                auc(records[name])
                for name in (f"tuning/{method}/{w}@{rate:g}" for w in TUNING_WORLDS)
                if name in records and "test" in records[name]
            ]
            for rate in RATES
        }
        if all(len(s) == len(TUNING_WORLDS) for s in scores.values()):
            found[method] = max(RATES, key=lambda rate: sum(scores[rate]))
    return found


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------


def work(job, folder, short):
    """Runs a job; (record, times). In a process of its own, which does one job after another."""
    out, name = Path(folder), job.name
    task = world_of(job, out)
    shutil.rmtree(out / name, ignore_errors=True)
    record = {"job": name, "world": job.world, "checkpoint": job.checkpoint}
    silence = open(os.devnull, "w")
    with silence, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            if job.memory is None:
                train(job, task, out, short)
            else:
                read_memory(job, task, out, short)
        except (Exception, SystemExit) as error:
            return record | {"failed": f"{type(error).__name__}: {error}"}, {"job": name}
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    results, seconds = harvest(out / name)
    if job.memory is None:  # of a run only the memory may be read again
        for path in (out / name).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("memory"):
                path.unlink()
    return record | results, {"job": name, "cpu": round(cpu, 1), "wall": round(wall, 1), **seconds}


def world_of(job, out) -> Path:
    """The folder of a job's task, made where it is not there yet."""
    task = out / "worlds" / job.kind / str(job.world)
    if not task.exists():
        aside = task.with_name(f"{job.world}.{os.getpid()}")
        write_world(job.world, aside, **{"speaks": False} | WORLD_KINDS[job.kind])
        with contextlib.suppress(OSError):  # the other worker was first
            aside.rename(task)
    return task


def train(job, task, out, short):
    """One run of a method, varied where the job says so."""
    flags = {
        "model": str(CHECKPOINTS[job.checkpoint]),
        "task": str(task),
        "seed": job.world,
        "steps": STEPS,
        "group_size": 4,
        "eval_k": K,
        "save_every": 0,
        "eval_every": EVERY,
        "out": str(out),
        "name": job.name,
        **job.flags,
        **short,
    }
    if job.wrong or job.falls or not job.lessons:
        flags["method"] = str(VARIANTS[job.flags["method"]])
        flags |= {"wrong": job.wrong, "lessons": job.lessons, "falls": job.falls}
    method = method_class(flags["method"])
    pmd.train(method.Config(**pmd.PRESETS["nano"] | method.presets.get("nano", {}) | flags))


def read_memory(job, task, out, short):
    """One evaluation of a model that was not trained, with a run's memory in its prompt."""
    preset = pmd.PRESETS["nano"]
    flags = {name: preset[name] for name in preset if name.startswith("max_") or name == "embedder"}
    flags |= {"task": task, "seed": job.world, "n": K, "out": out, "name": job.name, **job.flags}
    if "eval_problems" in short:
        flags["eval_problems"] = short["eval_problems"]
    if job.memory:
        flags["memory"] = out / job.memory / "memory.db"
    argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    ev.main(pmd.parse_flags, ["--model", job.model, *argv])


def harvest(folder):
    """What a run's folder says: the record, and the times."""
    rows = read_lines(folder / "metrics.jsonl")
    record = {
        split: [
            {
                "step": r["step"],
                "avg": r["avg_at_k"],
                "maj": r["maj_at_k"],
                "best": r["best_at_k"],
                "tokens": r["tokens"],
            }
            for r in rows
            if r.get("split") == split
        ]
        for split in ("test", "dev")
    }
    last = record["test"][-1]["step"]
    of = Counter()
    for row in read_lines(folder / "evals" / f"{last}-test.jsonl"):
        of[row["problem"]] += row["reward"] > 0
    # which problems were solved by at least one of the samples at the end, in the order of the
    # world's file
    record["solved"] = "".join(str(int(n > 0)) for n in of.values())
    steps = [r for r in rows if "split" not in r]
    kept = [r for r in steps if r["step"] % EVERY == 0]
    record["steps"] = [
        {
            "step": r["step"],
            "reward": r["reward"],
            "groups_solved": r["groups_solved"],
            "memory": list(r["memory"].values()),
            "right": r.get("memory_precision"),
            "rejected": r["memory_events"].get("insight_rejected", 0),
        }
        for r in kept
    ]
    spent = [
        sum(t for phase, t in r["seconds"].items() if phase not in ("evaluate", "save"))
        for r in steps
    ]
    if not steps:
        return record, {}
    passed = sum(sum(r.get("forward_tokens", {}).values()) for r in steps)
    return record, {"step_seconds": round(statistics.median(spent), 4), "forward_tokens": passed}


# --------------------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------------------

SECONDS = {
    "grpo": 24,
    "sdpo": 24,
    "frozen-policy": 36,
    "reading": 4,
}  # of one core, for the estimate; others 36


def estimate(jobs):
    """Seconds of one core."""
    return sum(
        (
            SECONDS["reading"]
            if job.memory is not None
            else SECONDS.get(job.flags["method"], 36)
            * job.flags.get("group_size", 4)
            / 4
            * job.flags.get("steps", STEPS)
            / STEPS
        )
        for job in jobs
    )


def run(jobs, records, folder, out, pool, workers, short, others=None):
    """Runs what has no record yet, and appends records as they come.

    others: all jobs that a job may need; those of the study if they are not given.
    """
    todo = [job for job in jobs if job.name not in records]
    needed = {
        name for job in todo for name in job.needs
    }  # their memory has to be there, not only their record
    if others is None:
        others = [job for part in PARTS for job in grid(part, tuned(records))]
    by_name = {job.name: job for job in others}
    done = {name for name in needed if (folder / name / "memory.db").exists() and name in records}
    todo = [by_name[name] for name in sorted(needed - done) if name in records] + todo
    running, bar = {}, tqdm(total=len(todo), unit="run", dynamic_ncols=True, disable=not todo)
    while todo or running:
        for job in [job for job in todo if set(job.needs) <= done][: workers - len(running)]:
            todo.remove(job)
            running[pool.submit(work, job, str(folder), short)] = job
        if not running:
            raise RuntimeError(f"{todo[0].name} needs {', '.join(todo[0].needs)}, which failed")
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            record, seconds = future.result()
            bar.update()
            bar.set_postfix_str(job.name)
            if "failed" in record:
                bar.write(f"{job.name} failed: {record['failed']}")
            else:
                done.add(job.name)
            if job.name not in records:
                records[job.name] = record
                append(out / "records.jsonl", record)
                append(out / "timings.jsonl", seconds)
            elif (
                record != records[job.name]
            ):  # made again, for its memory; records of two machines may not mix
                raise RuntimeError(
                    f"{job.name} came out otherwise than its record: start a new --out"
                )
    bar.close()


def read(path):
    return {row["job"]: row for row in read_lines(path)} if path.exists() else {}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        default="tuning,main,tiers,transfer",
        help=f"of {', '.join(PARTS)}; knobs: the last 9",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="records, tables and figures are written here"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE.parent / "runs" / "study",
        help="the runs themselves; may be deleted, and what is needed of them is made again",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two worlds, 20 steps: a check of the machinery, no result",
    )
    parser.add_argument("--report", action="store_true", help="tables and figures only")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    unknown = set(args.parts.split(",")) - {*PARTS, "knobs"}
    if unknown:
        names = ", ".join(map(repr, sorted(unknown)))
        parser.error(f"--parts takes some of knobs, {', '.join(PARTS)}, not {names}")
    if args.quick and args.out == HERE:
        parser.error("--quick needs an --out of its own: its records are no results")
    args.parts = args.parts.replace("knobs", ",".join(KNOBS)).split(",")
    if args.report:
        args.parts = []
    return args


def main():
    args = parse_args()
    transformers_logging.set_verbosity_error()
    short = {}
    if args.quick:
        global WORLDS, KNOB_WORLDS, TUNING_WORLDS, RATES
        WORLDS, KNOB_WORLDS, TUNING_WORLDS = {200: 0, 208: 1}, {200: 0}, {100: 0}
        RATES = RATES[2:3]
        short = {"steps": 20, "eval_problems": 24}
        args.work = args.out / "runs"
    args.out.mkdir(parents=True, exist_ok=True)
    records = read(args.out / "records.jsonl")
    need_checkpoints(args.parts)
    worlds = [*TUNING_WORLDS, *WORLDS]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        for part in args.parts:
            # world after world, so that a part which is stopped has whole worlds
            jobs = sorted(grid(part, tuned(records)), key=lambda job: worlds.index(job.world))
            left = [job for job in jobs if job.name not in records]
            hours = estimate(left) / args.workers / 3600
            print(
                f"{part}: {len(jobs)} runs, {len(left)} of them left, about {hours:.1f} hours with"
                f" {args.workers} at a time",
                flush=True,
            )
            run(jobs, records, args.work.resolve(), args.out, pool, args.workers, short)
    timings = read(args.out / "timings.jsonl")
    print(report(records, timings, tuned(records), args.out, sys.modules[__name__]))


def need_checkpoints(parts):
    """Ends the program with a sentence if a checkpoint that the parts use is not there."""
    used = set()
    for part in parts:
        used |= {job.model or str(CHECKPOINTS[job.checkpoint]) for job in grid(part, {})}
    missing = sorted(path for path in used - {"nano"} if not Path(path).is_dir())
    if missing:
        sys.exit(f"study.py: no checkpoint at {', '.join(missing)}; see {HERE / 'README.md'}")


if __name__ == "__main__":
    main()
