"""The field on one loop: all files of methods/ under equal conditions, in plain worlds and in
worlds whose verifier speaks.

    python study/methods.py                      # hours on two cores: it says how many first
    python study/methods.py --quick              # minutes: short runs that show the machinery
    python study/methods.py --report             # methods/README.md again, from the records
    python study/methods.py --report --quick     # the same from the records of --quick

Declared before the first full run:

- Equal for every method: 80 steps of 8 problems, 4 rollouts each, one update a step, the same
  checkpoint. A world's number is the seed of its run. (lightning-opd samples once, which is what it
  is for.)
- AUC is the mean of avg@4 on the held-out problems over steps 10, 20, ..., 80, from the prompt that
  the method's evaluations ask: the plain one, but for caopd and frozen-policy.
- One learning rate for each method: the best by mean AUC of the same three, on the same two worlds.
- Then 4 other worlds, each in its plain and in its speaking form: 8 runs of each method.
- A claim is shown where the difference in AUC to the method that it claims more than, paired by
  world and form, has a 95% t interval above 0. Nothing corrects for the number of methods.
- Costs: tokens passed forward in training (docs/metrics.md) and CPU seconds, divided by SDPO's.
- No run is dropped. One that fails is named, and is not made again.

One thread a run and one run a core. Records are appended to FOLDER/records.jsonl as runs end, one a
line, and their costs to FOLDER/timings.jsonl, so that the command goes on where it stopped.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch
    os.environ[variable] = "1"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from transformers.utils import logging as transformers_logging  # noqa: E402

from runtime.methods import cards  # noqa: E402
from study import study  # noqa: E402
from study.tables import gaps, markdown, spread, text  # noqa: E402

PAGE = HERE.parent / "methods" / "README.md"
RATES = (3e-4, 1e-3, 3e-3)
TUNING = (("plain", 411), ("speaking", 412))  # (kind, world)
MAIN = tuple((kind, world) for world in (461, 462, 463, 464) for kind in ("plain", "speaking"))
UNTRAINED = ("frozen-policy",)  # has no rate; its memory is lent to frozen-memory
QUICK = {"steps": 6, "eval_problems": 8}
SECONDS = 45  # of one core, for a run of 80 steps without a record of its method
START = 3  # seconds of one core that a run of any length takes


# --------------------------------------------------------------------------------------------------
# The grid
# --------------------------------------------------------------------------------------------------


def job(part, method, kind, world, rate=None):
    """Gives a run. rate: None for the preset's."""
    place = f"{kind}/{world}"
    flags, needs, name = {"method": method}, (), f"{part}/{method}/{place}"
    if rate is not None:
        flags["lr"] = rate
    if part == "tuning" and rate is not None:
        name += f"@{rate:g}"
    if method == "frozen-memory":
        flags["memory_from"] = f"{part}/frozen-policy/{place}"
        needs = (flags["memory_from"],)
    return study.Job(name, world, kind=kind, flags=flags, needs=needs)


def tuning() -> list:
    """Gives the runs that choose the rates, world after world."""
    jobs = []
    for place in TUNING:
        for method in cards():
            rates = (None,) if method in UNTRAINED else RATES
            jobs += [job("tuning", method, *place, rate) for rate in rates]
    return jobs


def tuned(records) -> dict:
    """Gives {method: the rate with the best mean AUC}, of rates whose runs all ended."""
    found = {}
    for method in cards():
        means = {}
        for rate in RATES:
            names = [job("tuning", method, *place, rate).name for place in TUNING]
            rows = [records[name] for name in names if "test" in records.get(name, {})]
            if len(rows) == len(names):
                means[rate] = statistics.mean(map(study.auc, rows))
        if means:
            found[method] = max(means, key=means.get)
    return found


def main_part(rates) -> list:
    """Gives the runs that are compared."""
    return [job("main", method, *place, rates.get(method)) for place in MAIN for method in cards()]


def quick() -> list:
    """Gives the runs of --quick, in the worlds of the tuning: no other is looked at."""
    return [job("quick", method, *place) for place in TUNING for method in cards()]


def estimate(jobs, times, steps) -> float:
    """Estimates seconds of one core: by the records of a method where there are some."""
    total = 0.0
    for one in jobs:
        name = f"/{one.flags['method']}/"
        spent = [row["cpu"] for job, row in times.items() if name in job and "cpu" in row]
        total += statistics.mean(spent) if spent else START + SECONDS * steps / study.STEPS
    return total


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


def scores(records, part, method) -> dict:
    """Gives {(kind, world): AUC} of a method's runs that ended."""
    found = {}
    for place in TUNING if part == "quick" else MAIN:
        row = records.get(job(part, method, *place).name, {})
        if "test" in row:
            found[place] = study.auc(row)
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
    differences = list(gaps(found[method], found[rival]).values())
    if len(differences) < len(MAIN):
        return "runs"
    _, low, high = spread(differences)
    shown = f"{text(differences)} beside {rival}"
    if low > 0:
        return f"claim shown at nano scale: {shown}"
    if high < 0:
        return f"runs, claim not shown and less than that: {shown}"
    return f"runs, claim not shown: {shown}"


def cost(times, part, method, key) -> float | None:
    """Gives the mean of a cost over a method's runs; None where there are none."""
    names = [job(part, method, *place).name for place in (TUNING if part == "quick" else MAIN)]
    values = [times[name][key] for name in names if key in times.get(name, {})]
    return statistics.mean(values) if values else None


def against(value, other) -> str:
    return f"{value / other:.2f}" if value and other else "-"


def line(records, times, part, method) -> list[str]:
    """Makes a method's cells of the table."""
    says, rates = cards(), tuned(records)
    found = {name: scores(records, part, name) for name in says}
    aucs = ["-", "-"]  # short runs have none
    if part == "main":
        aucs = [of_kind(found[method], kind) for kind in ("plain", "speaking")]
    names = [name for name in records if name.startswith(f"{part}/{method}/")]
    failures = sum("failed" in records[name] for name in names)
    costs = []
    for key in ("forward_tokens", "cpu"):
        costs.append(against(*(cost(times, part, who, key) for who in (method, "sdpo"))))
    rate = f"{rates[method]:g}" if method in rates else "preset"
    card = says[method]
    first = [f"`{method}`", card["Teacher reads"], card["Loss"], rate]
    return [*first, *aucs, *costs, status(card, found, failures, method)]


def of_kind(found, kind) -> str:
    """Writes the mean AUC over the worlds of a kind, with its interval. found: as of `scores`."""
    values = [auc for (where, _), auc in found.items() if where == kind]
    return text(values) if values else "-"


def report(records, times, part) -> str:
    """Makes the page of methods/ from records. part: main or quick."""
    head = ["method", "its teacher reads", "its loss", "rate", "AUC, plain", "AUC, speaking"]
    head += ["tokens", "CPU", "status"]
    rows = [line(records, times, part, method) for method in cards()]
    runs = sum(name.startswith(f"{part}/") for name in records)
    parts = ["# The field on one loop", introduction(part, runs), markdown(head, rows), NOTES]
    return "\n\n".join(parts) + "\n"


def introduction(part, runs) -> str:
    """Says what the page was made from."""
    made = f"`python study/methods.py --report{' --quick' * (part == 'quick')}` made this page."
    if part == "quick":
        return (
            f"{made} Its {runs} records are those of `--quick`: {QUICK['steps']} steps, evaluations"
            f" of {QUICK['eval_problems']} problems, no tuned rate, one world of each kind. They"
            " show that each method runs. Their scores say nothing and are left out. Their costs"
            " are those of first steps, in which few groups have a success to learn from."
        )
    return (
        f"{made} {runs} runs: {len(MAIN)} of each method, in {len(MAIN) // 2} worlds whose verifier"
        " says nothing (plain) and in the same worlds with a verifier that names the first wrong"
        " step (speaking). study/methods.py has what was declared before."
    )


NOTES = """AUC: the mean of avg@4 on held-out problems after steps 10 to 80, with its 95% t
interval over worlds. Rate: the learning rate. Tokens: those that the policy and its teacher pass
forward in training, rollouts and reflections included, divided by SDPO's. CPU: seconds of one core,
evaluations included, divided by SDPO's. Status: the difference in AUC to the method that a paper
claims more than, paired by world, with its interval. What teachers read and what losses are, is
said in the last lines of each file's docstring.

Each file begins with its paper, with what was read of it, and with our readings.

Not here, and why:

- d-OPSD (arXiv 2606.18195) needs a diffusion language model.
- OPCoD (arXiv 2606.14368) trains two policies with two optimizers.
- The whole of pi-Play (arXiv 2604.14054) has a policy that writes problems. Its student is here.
- SPD (arXiv 2605.22675) changes activations while it generates, and has no equations or code.
- TSD-KD (arXiv 2603.13260) has three losses of its own, and a teacher that is another model.
- CurioSFT is fine-tuning on demonstrations: no rollout of the policy is trained on."""


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


def run_part(label, jobs, records, args, pool):
    """Runs the jobs of a part that have no record yet, and says before how long that takes."""
    left = [one for one in jobs if one.name not in records]
    times = study.read(args.out / "timings.jsonl")
    steps = QUICK["steps"] if args.quick else study.STEPS
    minutes = estimate(left, times, steps) / args.workers / 60
    print(
        f"{label}: {len(jobs)} runs, {len(left)} of them left, about {minutes:.0f} minutes with"
        f" {args.workers} at a time",
        flush=True,
    )
    short = QUICK if args.quick else {}
    work = args.work.resolve()
    study.run(jobs, records, work, args.out, pool, args.workers, short, jobs)


def main():
    args = parse_args()
    transformers_logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    records = study.read(args.out / "records.jsonl")
    if not args.report:
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            if args.quick:
                run_part("quick", quick(), records, args, pool)
            else:
                run_part("tuning", tuning(), records, args, pool)
                run_part("main", main_part(tuned(records)), records, args, pool)
    if not records:
        sys.exit(f"study/methods.py: there are no records in {args.out}; run it without --report")
    page = report(
        records, study.read(args.out / "timings.jsonl"), "quick" if args.quick else "main"
    )
    if args.report:
        PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
