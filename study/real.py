"""One run on real text: GRPO, SDPO and PMD train SmolLM2-135M-Instruct on a task of reasoning-gym.

    python study/real.py look --model DIR     # how often the model is right on each task
    python study/real.py train --model DIR    # the learning rates, then the three runs: hours
    python study/real.py report               # study/real/results.md and its figure

DIR is a folder or a name of the Hub. After an interruption the same command goes on. `train` takes
about five core-hours, by steps of a trial, and 25 GB of disk under --work. Its records come into
study/real/ run by run, and a run that is there is not made again.

DECLARATION, committed before the first run of `train`:

- The task is chosen by `look`, by the rule of `chosen`, before anything is trained.
- Equal for the three methods: model, seed, problems, rollouts, steps, evaluations, and the flags of
  FLAGS. PMD writes its memory with `--memory_format guided`.
- Each method has its own learning rate: of RATES the one with the best mean of avg@4 on the dev
  problems after the start, in runs of TUNING steps. Those runs never see the test problems: their
  task has the dev problems in their place.
- The result is avg@4 on TEST held-out problems, without a memory in the prompt, at the end of STEPS
  steps, with a bootstrap interval over the problems. One seed: it says nothing of another.
- No run is dropped.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import reasoning_gym  # noqa: E402
from tqdm import tqdm

import pmd
from eval import Answers, evaluate
from runtime.files import append, read_lines, write_lines
from runtime.model import load_policy
from runtime.tables import plot_curves, score
from runtime.vllm_sampler import make_sampler
from study.tables import markdown
from tasks.problem import SUCCESS
from tools.share_memory import export_memory

RESULTS = HERE / "real"
METHODS = ("grpo", "sdpo", "pmd")
TRAIN, DEV, TEST = 60, 40, 200  # problems
RATES = ("1e-5", "3e-5", "1e-4")
TUNING, STEPS = 20, 60
EVERY = 20  # steps between two evaluations; half of it where rates are tuned
LOOKED_AT = 32  # problems of a task, K answers each
K = 4
KEYS = 8  # different ones among the problems of a task, or a guess would do
# Tasks of reasoning-gym at their easiest, for a model of this size. Where all keys are whole
# numbers, the last number of the reply is judged
CANDIDATES = {
    "chain_sum": dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    "products": dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    "word_sorting": dict(min_words=3, max_words=3),
    "spell_backward": dict(min_word_len=3, max_word_len=4),
    "letter_counting": dict(min_words=2, max_words=4),
    "gcd": dict(min_numbers=2, max_numbers=2, min_value=2, max_value=50),
    "lcm": dict(min_numbers=2, max_numbers=2, min_value=2, max_value=30),
    "count_bits": dict(min_n=1, max_n=1000),
    "leg_counting": dict(min_animals=1, max_animals=2, min_instances=1, max_instances=3),
    "simple_equations": dict(min_terms=2, max_terms=2, min_value=1, max_value=9),
    "number_sequence": dict(min_value=0, max_value=9, max_complexity=1),
    "fraction_simplification": dict(min_value=1, max_value=30, min_factor=2, max_factor=5),
    "needle_haystack": dict(min_num_statements=3, max_num_statements=6),
    "time_intervals": {},
    "calendar_arithmetic": {},
}
FLAGS = (
    "--device cpu --dtype float32 --sampler transformers --no_gradient_checkpointing"
    " --batch_size 4 --mini_batch_size 4 --group_size 4 --warmup_steps 0 --save_every 20 --keep 1"
    " --max_prompt 200 --max_completion 32 --max_reprompt 1024 --memory_completion 192"
    f" --memory_format guided --embedder hashing --seed 0 --dev 0 --eval_k {K}"
).split()


# --------------------------------------------------------------------------------------------------
# The task
# --------------------------------------------------------------------------------------------------


def problems_of(name, size) -> list[dict]:
    """Makes problems of a task of reasoning-gym, none twice, as rows of a file."""
    random.seed(0)  # some generators draw from the global one
    made = reasoning_gym.create_dataset(name, size=5 * size, seed=0, **CANDIDATES[name])
    entries = {}
    for entry in made:
        entries.setdefault(entry["question"].strip(), entry)
        if len(entries) == size:
            break
    keys = {str(entry["answer"]) for entry in entries.values()}
    numeric = all(re.fullmatch(r"-?\d+", key) for key in keys)
    rows = []
    for number, (question, entry) in enumerate(entries.items()):
        row = {"id": str(number), "prompt": question, "answer": str(entry["answer"])}
        row |= {"verifier": "last_number"} if numeric else {"verifier": "gym", "task": name}
        rows.append(row if numeric else row | {"entry": entry})
    return rows


def write_task(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "test.jsonl", test)


def look(model, work):
    """Answers some problems of every task, as in training; writes a line a task."""
    path = RESULTS / "tasks.jsonl"
    done = {row["task"] for row in read_lines(path)} if path.is_file() else set()
    cfg = pmd.parse_flags(["--model", model, "--eval_temperature", "1", *FLAGS])
    cfg.eval_top_p = 1.0
    policy = load_policy(cfg)
    for name in tqdm(sorted(CANDIDATES.keys() - done), unit="task"):
        row = {"task": name}
        try:
            cfg.task = str(work / "tasks" / name)
            rows = problems_of(name, cfg.batch_size + LOOKED_AT)
            row["keys"] = len({problem["answer"] for problem in rows})
            write_task(Path(cfg.task), rows[: cfg.batch_size], rows[cfg.batch_size :])
            task, tokenizer = pmd.check(cfg, quiet=True)
            answers = evaluate(make_sampler(policy, tokenizer, cfg), task.test, cfg)
            rewards = Answers.of(answers).rewards
            right = (rewards >= SUCCESS).mean(1)
            row |= {"problems": len(right), "right": float(right.mean())}
            row |= {"mixed": float(((right > 0) & (right < 1)).mean())}
        except ValueError as error:  # of a generator, or of the check of its problems
            row["left out"] = " ".join(str(error).split())[:200]
        append(path, row)
    print(f"chosen: {chosen()}")


def chosen() -> str:
    """The task with the largest share of problems that are answered both right and wrong.

    Of those on which the model is right in 10% to 60% of its answers, whose problems have at least
    KEYS different keys, and all of whose prompts are short. Ends the program if there is none.
    """
    rows = [row for row in read_lines(RESULTS / "tasks.jsonl") if "left out" not in row]
    fit = [r for r in rows if 0.1 <= r["right"] <= 0.6 and r["keys"] >= KEYS]
    whole = [row for row in fit if row["problems"] == LOOKED_AT]
    if not whole:
        sys.exit("real.py: no task fits the rule of `chosen`")
    return max(whole, key=lambda row: row["mixed"])["task"]


# --------------------------------------------------------------------------------------------------
# The runs
# --------------------------------------------------------------------------------------------------


def name_of(method, rate="") -> str:
    return f"tuning/{method}@{rate}" if rate else method


def run(model, task, work, method, rate, name, steps, every):
    """Trains a method, or goes on with it, in a process of its own, and keeps its records.

    What it prints goes to a log. A run whose records are here is not made again.
    Raises RuntimeError if it fails.
    """
    if (RESULTS / name / "metrics.jsonl").is_file():
        return
    command = [sys.executable, str(HERE.parent / "pmd.py"), "--model", model, "--task", str(task)]
    command += ["--method", method, "--lr", rate, "--steps", str(steps), "--out", str(work)]
    command += ["--eval_every", str(every), "--name", name, "--resume", *FLAGS]
    log = work / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=file, stderr=file, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed: see {log}")
    keep(work, name)


def keep(work, name):
    """Copies the records of a run that has ended into the repository, the metrics last."""
    folder, kept = work / name, RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    if name == "pmd":  # its memory as lines, without the embeddings
        (kept / "memory.jsonl").unlink(missing_ok=True)
        export_memory(folder / "memory.db", kept / "memory.jsonl")
    config = json.loads((folder / "config.json").read_text())
    places = {name: Path(config[name]).name for name in ("model", "task", "out")}
    (kept / "config.json").write_text(json.dumps(config | places, indent=1))
    for file in ("samples.jsonl", "metrics.jsonl"):
        shutil.copy(folder / file, kept)


def evaluations(folder) -> dict:
    """{step: row} of a run's evaluations on the test problems of its task."""
    rows = read_lines(folder / "metrics.jsonl")
    return {row["step"]: row for row in rows if row.get("split") == "test"}


def means_by_rate(method) -> dict[str, float]:
    """{rate: mean of avg@4 on the dev problems after the start}"""
    means = {}
    for rate in RATES:
        rows = evaluations(RESULTS / name_of(method, rate))
        means[rate] = statistics.mean(row["avg_at_k"] for step, row in rows.items() if step)
    return means


def tuned(method) -> str:
    means = means_by_rate(method)
    return max(means, key=means.get)


def train(model, work, workers):
    """Makes the runs that choose the rates, then those of the result."""
    rows = problems_of(chosen(), TRAIN + DEV + TEST)
    write_task(work / "dev", rows[:TRAIN], rows[TRAIN : TRAIN + DEV])
    write_task(work / "test", rows[:TRAIN], rows[TRAIN + DEV :])
    with ThreadPoolExecutor(workers) as pool:
        # PMD's first: they take longest
        pairs = [(method, rate) for method in reversed(METHODS) for rate in RATES]
        jobs = [
            pool.submit(run, model, work / "dev", work, *pair, name_of(*pair), TUNING, EVERY // 2)
            for pair in pairs
        ]
        for job in tqdm(jobs, unit="run", desc="rates"):
            job.result()
        pairs = [(method, tuned(method)) for method in reversed(METHODS)]
        jobs = [
            pool.submit(run, model, work / "test", work, *pair, name_of(pair[0]), STEPS, EVERY)
            for pair in pairs
        ]
        for job in tqdm(jobs, unit="run", desc="runs"):
            job.result()


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


def report() -> str:
    """Writes results.md and its figure from the records."""
    steps = range(0, STEPS + 1, EVERY)
    rows, curves = [], {}
    for method in METHODS:
        metrics = read_lines(RESULTS / method / "metrics.jsonl")
        tests = evaluations(RESULTS / method)
        trained = [row for row in metrics if "split" not in row]
        rate = json.loads((RESULTS / method / "config.json").read_text())["lr"]
        cells = [score(tests[step]) for step in steps]
        spent = 0.0
        for row in trained:
            spent += sum(row["seconds"].values()) - row["seconds"].get("evaluate", 0)
        rows.append([f"`{method}`", f"{rate:g}", *cells, f"{spent / 60:.0f}"])
        curves[method] = metrics
    head = ["method", "rate", *(f"step {step}" for step in steps), "minutes of training"]
    rates = []
    for method in METHODS:
        means = means_by_rate(method)
        rates.append([f"`{method}`", *(f"{mean:.3f}" for mean in means.values())])
    settings = ", ".join(f"{name} {value}" for name, value in CANDIDATES[chosen()].items())
    plot_curves(curves, RESULTS / "curve.png", f"{chosen()}, SmolLM2-135M-Instruct, one seed")
    page = [
        "# One run on real text",
        "Made by `python study/real.py report`. The declaration is the docstring of study/real.py.",
        f"avg@{K} on {TEST} held-out problems of reasoning-gym's {chosen()} ({settings}), without a"
        " memory in the prompt, with 95% bootstrap intervals over the problems:",
        markdown(head, rows),
        "![avg@4 by step](curve.png)",
        f"The rates: mean of avg@{K} on {DEV} dev problems, in runs of {TUNING} steps:",
        markdown(["method", *RATES], rates),
    ]
    path = RESULTS / "results.md"
    path.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return str(path)


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("look", "train", "report"))
    parser.add_argument("--model", help="the folder of SmolLM2-135M-Instruct, or its name")
    work = "the runs themselves (default: runs/real)"
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "real", help=work)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if args.command == "report":
        print(report())
        return
    if not args.model:
        parser.error(f"{args.command} needs --model")
    if args.command == "look":
        look(args.model, args.work)
    else:
        train(args.model, args.work.resolve(), args.workers)


if __name__ == "__main__":
    main()
