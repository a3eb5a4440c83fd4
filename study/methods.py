"""The field on one loop: all files of methods/ under equal conditions, in plain worlds and in
worlds whose verifier gives feedback.

    python study/methods.py                      # hours on two cores: it says how many first
    python study/methods.py --quick              # minutes: short runs that show the machinery
    python study/methods.py --report             # methods/README.md again, from the records
    python study/methods.py --report --quick     # the same from the records of --quick

Declared before the first full run:

- Equal for every method: 80 steps of 8 problems, 4 rollouts each, one update a step, the shipped
  checkpoint. A world's number is the seed of its run. (lightning-opd samples once, which is what it
  is for.)
- AUC is the mean of avg@4 on 80 held-out problems over steps 10, 20, ..., 80, from the prompt that
  the method's evaluations ask: the plain one, but for caopd and frozen-policy.
- One learning rate for each method: the best by mean AUC of the same three, on the same two worlds.
- Then 4 other worlds, each in its plain form and with feedback: 8 runs of each method.
- A claim is shown where the difference in AUC to the method that it claims more than, paired by
  world and form, has a 95% t interval above 0. Nothing corrects for the number of methods.
- Costs: tokens passed forward in training (docs/metrics.md) and CPU seconds, divided by SDPO's.
- No run is dropped. One that fails is named, and is not made again.

One thread a run and one run a core. A record is a line of FOLDER/records.jsonl, written when its
run ends, and the same command goes on with the runs that have none.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch
    os.environ[variable] = "1"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import pandas as pd  # noqa: E402
from transformers.utils import logging as transformers_logging

import pmd
from runtime.files import read_lines
from runtime.methods import cards, method_class
from study.study import EVERY, STEPS, K, auc, read_records, run_all, world_of
from study.tables import ends, markdown, text

PAGE = HERE.parent / "methods" / "README.md"
KINDS = ("plain", "feedback")
RATES = (3e-4, 1e-3, 3e-3)
TUNING = (("plain", 411), ("feedback", 412))  # (kind, world)
# Worlds of one number are alike in all but the feedback, which most methods do not read
MAIN = (*(("plain", w) for w in range(461, 465)), *(("feedback", w) for w in range(465, 469)))
UNTRAINED = ("frozen-policy",)  # has no rate
QUICK = {"steps": 6, "eval_problems": 8}
SECONDS = 45  # of one core, for a run of 80 steps without a record of its method
START = 3  # seconds of one core that a run of any length takes


@dataclass(frozen=True)
class Job:
    """One run of a method in a world. rate: None for the preset's."""

    part: str
    method: str
    kind: str
    world: int
    rate: float | None = None

    @property
    def name(self) -> str:
        name = f"{self.part}/{self.method}/{self.kind}/{self.world}"
        return f"{name}@{self.rate:g}" if self.part == "tuning" and self.rate else name


# --------------------------------------------------------------------------------------------------
# The grid
# --------------------------------------------------------------------------------------------------


def tuning() -> list[Job]:
    """Gives the runs that choose the rates, world after world."""
    jobs = []
    for place in TUNING:
        for method in cards():
            if method not in UNTRAINED:
                jobs += [Job("tuning", method, *place, rate) for rate in RATES]
    return jobs


def tuned(records) -> dict:
    """Gives {method: the rate with the best mean AUC}, of rates whose runs all ended."""
    found = {}
    for method in cards():
        means = {}
        for rate in RATES:
            names = [Job("tuning", method, *place, rate).name for place in TUNING]
            rows = [records[name] for name in names if "test" in records.get(name, {})]
            if len(rows) == len(names):
                means[rate] = statistics.mean(map(auc, rows))
        if means:
            found[method] = max(means, key=means.get)
    return found


def main_part(rates) -> list[Job]:
    """Gives the runs that are compared."""
    return [Job("main", method, *place, rates.get(method)) for place in MAIN for method in cards()]


def quick() -> list[Job]:
    """Gives the runs of --quick, in the worlds of the tuning: no other is looked at."""
    return [Job("quick", method, *place) for place in TUNING for method in cards()]


def estimate(jobs, records, steps) -> float:
    """Estimates seconds of one core: by the records of a method where there are some."""
    total = 0.0
    for job in jobs:
        rows = [row for name, row in records.items() if f"/{job.method}/" in name]
        spent = [row["cpu"] for row in rows if "cpu" in row]
        run_of_unknown = START + SECONDS * steps / STEPS
        total += statistics.mean(spent) if spent else run_of_unknown
        if job.method == "frozen-memory":  # and its lender, which is in no record
            total += run_of_unknown
    return total


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------


def work(job, out, short) -> dict:
    """Runs a job and returns its record. In a process of its own, which does one after another."""
    record = {"job": job.name, "method": job.method, "kind": job.kind, "world": job.world}
    record["rate"] = job.rate
    transformers_logging.set_verbosity_error()
    with open(os.devnull, "w") as silence:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            try:
                cpu = train(job, out, short)
            except (Exception, SystemExit) as error:
                return record | {"failed": f"{type(error).__name__}: {error}"}
    rows = read_lines(out / job.name / "metrics.jsonl")
    tests = [row for row in rows if row.get("split") == "test"]
    record["test"] = [{"step": row["step"], "avg": row["avg_at_k"]} for row in tests]
    steps = [row for row in rows if "split" not in row]
    record["reward"] = [round(row["reward"], 4) for row in steps if row["step"] % EVERY == 0]
    record["tokens"] = sum(sum(row["forward_tokens"].values()) for row in steps)
    shutil.rmtree(out / job.name)
    return record | {"cpu": round(cpu, 1)}


def train(job, out, short) -> float:
    """Trains a method; returns its CPU seconds, those of a frozen memory's lender not counted."""
    shutil.rmtree(out / job.name, ignore_errors=True)
    flags = {"group_size": 4, "eval_k": K, "eval_every": EVERY, "steps": STEPS, "dev": 0.0}
    flags |= {"eval_problems": 80, "save_every": 0, "seed": job.world, "device": "cpu"}
    flags |= {"task": str(world_of(job, out)), "out": str(out), **short}
    if job.rate is not None:
        flags["lr"] = job.rate
    own = {"method": job.method, "name": job.name}
    if job.method == "frozen-memory":
        lender = f"{job.name}-lender".replace("@", "-")  # RUN@STEP means a step
        shutil.rmtree(out / lender, ignore_errors=True)
        run(flags | {"method": "frozen-policy", "name": lender, "eval_every": 0})
        own["memory_from"] = lender
    began = time.process_time()
    run(flags | own)
    return time.process_time() - began


def run(flags):
    method = method_class(flags["method"])
    pmd.train(method.Config(**pmd.preset_of("nano", method) | flags))


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


def scores(records, part, method) -> dict:
    """Gives {(kind, world): AUC} of a method's runs that ended."""
    found = {}
    for place in TUNING if part == "quick" else MAIN:
        row = records.get(Job(part, method, *place).name, {})
        if "test" in row:
            found[place] = auc(row)
    return found


def status(card, found, failures, method) -> str:
    """Says what the records show of a method's claim. found: {method: its scores}."""
    if failures:
        return f"{failures} runs failed"
    if not found[method]:
        return "not run"
    rival = card["Claims more than"]
    if rival.startswith("none, "):
        return rival.removeprefix("none, ")
    both = [place for place in MAIN if place in found[method] and place in found[rival]]
    if len(both) < len(MAIN):
        return "runs"
    differences = [found[method][place] - found[rival][place] for place in both]
    low, high = ends(pd.Series(differences))
    shown = f"{text(differences)} beside {rival}"
    if low > 0:
        return f"claim shown at nano scale: {shown}"
    if high < 0:
        return f"runs, claim not shown and less than that: {shown}"
    return f"runs, claim not shown: {shown}"


def cost(records, part, method, key) -> float | None:
    """Gives the mean of a cost over a method's runs; None where there are none."""
    names = [Job(part, method, *place).name for place in (TUNING if part == "quick" else MAIN)]
    values = [records[name][key] for name in names if key in records.get(name, {})]
    return statistics.mean(values) if values else None


def against(value, other) -> str:
    return f"{value / other:.2f}" if value and other else "-"


def line(records, part, method) -> list[str]:
    """Makes a method's cells of the table."""
    says, rates = cards(), tuned(records)
    found = {name: scores(records, part, name) for name in says}
    aucs = ["-", "-"]  # short runs have none
    if part == "main":
        aucs = [of_kind(found[method], kind) for kind in KINDS]
    # a run of the tuning that failed takes away a rate, and no comparison
    names = [name for name in records if name.startswith(f"{part}/{method}/")]
    failures = sum("failed" in records[name] for name in names)
    costs = []
    for key in ("tokens", "cpu"):
        costs.append(against(*(cost(records, part, who, key) for who in (method, "sdpo"))))
    rate = f"{rates[method]:g}" if method in rates else "preset"
    card = says[method]
    first = [f"`{method}`", card["Teacher reads"], card["Loss"], rate]
    return [*first, *aucs, *costs, status(card, found, failures, method)]


def of_kind(found, kind) -> str:
    """Writes the mean AUC over the worlds of a kind, with its interval. found: as of `scores`."""
    values = [auc for (where, _), auc in found.items() if where == kind]
    return text(values)


def report(records, part) -> str:
    """Makes the page of methods/ from records. part: main or quick."""
    head = ["method", "its teacher reads", "its loss", "rate", "AUC, plain", "AUC, feedback"]
    head += ["tokens", "CPU", "status"]
    rows = [line(records, part, method) for method in cards()]
    runs = sum(name.startswith(f"{part}/") for name in records)
    parts = ["# The field on one loop", introduction(part, runs), markdown(head, rows), NOTES]
    failed = [f"{name} ({row['failed']})" for name, row in records.items() if "failed" in row]
    if failed:
        parts.insert(3, f"Runs that failed: {'; '.join(failed)}.")
    return "\n\n".join(parts) + "\n"


def introduction(part, runs) -> str:
    """Says what the page was made from."""
    made = f"`python study/methods.py --report{' --quick' * (part == 'quick')}` made this page."
    if part == "quick":
        return (
            f"{made} Its {runs} records are those of `--quick`: {QUICK['steps']} steps, evaluations"
            f" of {QUICK['eval_problems']} problems, no tuned learning rate, one world of each"
            " kind. They show that each method runs. Their scores mean nothing and are left out."
            " Their costs are those of the first steps, in which few groups have a success to learn"
            " from."
        )
    return (
        f"{made} There are {runs} runs: {len(MAIN)} of each method, in {len(MAIN) // 2} worlds"
        " whose verifier gives no feedback (plain) and in as many others whose verifier names the"
        " first wrong step (feedback). The docstring of study/methods.py has what was declared"
        " before the runs."
    )


NOTES = """The columns:

- Rate: the learning rate. `preset` is that of the task's or the method's preset.
- AUC: the mean of avg@4 on held-out problems after steps 10 to 80, with its 95% t interval over
  worlds.
- Tokens: the tokens that the policy and its teacher pass forward in training, rollouts and
  reflections included, divided by SDPO's.
- CPU: seconds of one core, evaluations included, divided by SDPO's. Neither tokens nor CPU include
  the run that lends a frozen memory.
- Status: after the full run, the difference in AUC to the method that the paper claims to beat,
  paired by world, with its interval. Until then `runs` means that short runs ended without a fault.
  `wiring only` means that these worlds can't test the claim.

The texts about teachers and losses are the last lines of each file's docstring. The docstring also
names the paper, the sources that were read, and our readings.

These methods are not here, for these reasons:

- d-OPSD (arXiv 2606.18195) needs a diffusion language model.
- OPCoD (arXiv 2606.14368) trains two policies with two optimizers.
- pi-Play as a whole (arXiv 2604.14054) has a policy that writes problems. Only its student is here.
- SPD (arXiv 2605.22675) changes activations while it generates, and has no equations or code.
- TSD-KD (arXiv 2603.13260) has three losses of its own, and a teacher that is another model.
- CurioSFT fine-tunes on demonstrations. It trains on no rollout of the policy."""


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out", type=Path, help="of records (default: study/field, with --quick study/field/quick)"
    )
    add("--work", type=Path, default=HERE.parent / "runs" / "field", help="of the runs themselves")
    add("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    add("--quick", action="store_true", help="short runs: a check of the machinery, no result")
    add("--report", action="store_true", help="writes methods/README.md from the records")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    args.out = args.out or HERE / "field" / ("quick" * args.quick)
    return args


def run_part(label, jobs, records, args):
    """Runs the jobs of a part that have no record yet, and says before how long that takes."""
    left = [job for job in jobs if job.name not in records]
    short = QUICK if args.quick else {}
    minutes = estimate(left, records, short.get("steps", STEPS)) / args.workers / 60
    print(
        f"{time.strftime('%H:%M')} {label}: {len(jobs)} runs, {len(left)} of them left, about"
        f" {minutes:.0f} minutes with {args.workers} at a time",
        flush=True,
    )
    path = args.out / "records.jsonl"
    run_all(work, left, records, path, args.work.resolve(), args.workers, short)


def main():
    """Runs the command line."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    records = read_records(args.out / "records.jsonl")
    if not args.report and args.quick:
        run_part("quick", quick(), records, args)
    elif not args.report:
        run_part("tuning", tuning(), records, args)
        run_part("main", main_part(tuned(records)), records, args)
    if not records:
        sys.exit(f"study/methods.py: there are no records in {args.out}; run it without --report")
    page = report(records, "quick" if args.quick else "main")
    if args.report:
        PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
