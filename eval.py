"""Answers problems, estimates from the answers how good a policy is, and compares runs.

python eval.py --model DIR_OR_NAME --task T --n 16     answers a task's test problems
python eval.py compare RUN RUN ...                     prints the paper's Tables 2, 3, 4, 5 and 7
python eval.py figures RUN RUN ...                     draws the paper's Figures 2 to 6

`avg_at_k`, `maj_at_k` and `best_at_k` are estimators over k samples a problem. `interval` is a
bootstrap over problems and runs. `evaluate` answers problems, in training and on the command line
alike.
"""

import argparse
import random
import sys
from collections import Counter
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from memory import Memory, reprompt
from runtime.check import check, check_name, refuse_idle_flags
from runtime.checkpoint import claim, release
from runtime.errors import RunError
from runtime.files import append, read_rows, write_lines
from runtime.jobs import failure, quiet_libraries
from runtime.model import load_policy
from runtime.options import check_numbers, option
from runtime.provenance import refuse_other_flags, refuse_other_problems, write_origin
from runtime.ranks import (
    broadcast,
    count_ranks,
    end_ranks,
    gather,
    rank,
    ranks_around,
    shard,
    world,
)
from runtime.services import make_embedder
from runtime.store import memory_file
from runtime.tables import evaluated
from runtime.vllm_sampler import make_sampler
from tasks import VERIFIERS, Problem, Verdict, load_task, verify  # noqa: F401  for those who import eval
from tasks.problem import SUCCESS
from tasks.verdicts import verify_all


@dataclass
class EvalOptions:
    """Evaluation, without memory except for frozen-policy and eval.py --memory."""

    eval_every: int = option(
        5,
        "steps between evaluations on dev and test; 0 for first and last only [Tab. 11]",
        within="[0, inf)",
    )
    eval_k: int = option(16, "samples per problem: avg@k [Tab. 11]", "--n", within="[1, inf)")
    eval_problems: int = option(
        0, "evaluate on at most this many problems of a split; 0 for all [ours]", within="[0, inf)"
    )
    eval_temperature: float = option(
        0.6, "temperature of evaluations [SDPO]", "--temperature", within="[0.01, inf)"
    )
    eval_top_p: float = option(0.95, "top-p of evaluations [SDPO]", "--top_p", within="(0, 1]")


# --------------------------------------------------------------------------------------------------
# Estimators. rewards: (problems, k) from 0 to 1.
# --------------------------------------------------------------------------------------------------


def reward_table(rewards) -> np.ndarray:
    """Returns rewards as numbers (problems, k).

    Raises ValueError if there are none, if problems have different numbers of them, or if one is
    not from 0 to 1.
    """
    sizes = sorted({len(row) for row in rewards})
    if len(sizes) != 1 or not sizes[0]:
        counts = " or ".join(map(str, sizes)) or "no"
        raise ValueError(
            f"each problem has {counts} rewards: estimators need as many of each, and at least one"
        )
    rewards = np.asarray(rewards, float)
    if not ((rewards >= 0) & (rewards <= 1)).all():  # a NaN is neither
        raise ValueError("the rewards are not all numbers from 0 to 1")
    return rewards


def avg_at_k(rewards) -> float:
    """Returns the mean reward over all problems and samples (the paper's avg@16)."""
    return float(reward_table(rewards).mean())


def best_at_k(rewards, k=None) -> float:
    """Returns the unbiased pass@k: the mean over problems of 1 - C(n-c, k) / C(n, k).

    n: the samples of a problem. c: those of at least SUCCESS. k: n, if it is not given.
    Raises ValueError if k is no number from 1 to n.
    """
    solved = reward_table(rewards) >= SUCCESS
    n = solved.shape[1]
    k = n if k is None else k
    if k not in range(1, n + 1):  # 1.5 is not
        raise ValueError(
            f"best@{k} can't be told from {n} samples of each problem: k has to be a number from 1"
            f" to {n}"
        )
    return float(np.mean([1 - comb(n - int(c), int(k)) / comb(n, int(k)) for c in solved.sum(1)]))


def majority(rewards, answers) -> np.ndarray:
    """Returns (problems,) the mean reward of the samples that gave the most frequent answer.

    Several answers of equal frequency count alike. answers: (problems, k), texts. The empty text is
    an answer, too.
    """
    scores = []
    for row, texts in zip(reward_table(rewards), answers, strict=True):
        votes = Counter(texts)
        most = max(votes.values())
        # equally many rewards of each such answer: their mean is the mean over the answers
        scores.append(np.mean([r for r, t in zip(row, texts, strict=True) if votes[t] == most]))
    return np.array(scores)


def maj_at_k(rewards, answers) -> float:
    """Returns the mean reward of each problem's most frequent answer.

    With rewards of 0 and 1 that is the share of problems whose majority is right.
    """
    return float(majority(rewards, answers).mean())


def headroom(rewards, answers) -> np.ndarray:
    """Returns (problems,) the gain of a perfect choice among the k samples over their majority.

    It is never below 0. With rewards of 0 and 1 it is best@k - maj@k (Fig. 3).
    """
    return reward_table(rewards).max(1) - majority(rewards, answers)


def resample(scores, groups, seed=0, draws=10_000) -> np.ndarray:
    """Returns (draws,) means of scores (problems,) or (runs, problems), drawn with replacement.

    Problems are drawn, and runs as well. groups: (problems,) names. Problems of one name are drawn
    together. How often each is drawn is multinomial.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=float))
    _, index = np.unique(groups, return_inverse=True)
    sizes = np.bincount(index)  # (groups,)
    sums = np.stack([np.bincount(index, row) for row in scores])  # (runs, groups)
    runs, n = sums.shape
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.full(n, 1 / n), draws)  # (draws, groups)
    mean = rng.multinomial(runs, np.full(runs, 1 / runs), draws) @ sums / runs  # (draws, groups)
    return (drawn * mean).sum(1) / (drawn @ sizes)


def interval(scores, groups=None) -> tuple[float, float] | None:
    """Returns the 95% percentile-bootstrap interval of a mean: see `resample`.

    The interval of one run covers other test problems, not other training seeds. That of several
    runs covers both, though a handful of seeds makes it too narrow. Fewer than two problems or
    groups tell nothing about others: then it is None.
    """
    if groups is None:
        groups = range(np.shape(scores)[-1])
    if len(set(groups)) < 2:
        return None
    low, high = np.percentile(resample(scores, groups), [2.5, 97.5])
    return float(low), float(high)


def names(task, ids):
    """Returns the group of each problem, for `resample`.

    nano has several problems about each name, which form a group. Elsewhere each is its own.
    """
    if task.partition("/")[0] == "nano":
        return [id.rpartition("-")[0] for id in ids]
    return list(ids)


class Answers(NamedTuple):
    """Holds the answers to P problems, k samples each."""

    ids: list  # (P,)
    rewards: np.ndarray  # (P, k)
    answers: list  # (P, k)
    tokens: np.ndarray  # (P, k)

    @classmethod
    def of(cls, rows, path=""):
        """Makes it of the rows of a file.

        Raises ValueError, which names the file, if problems have different numbers of samples. The
        last problem of a file that was cut has fewer.
        """
        groups = {}
        for row in rows:
            groups.setdefault(row["problem"], []).append(row)
        sizes = sorted({len(group) for group in groups.values()})
        if len(sizes) != 1:
            counts = " or ".join(map(str, sizes)) or "no"
            raise ValueError(f"{path} is not whole: its problems have {counts} samples each")

        def column(key):
            return [[row[key] for row in group] for group in groups.values()]

        rewards, tokens = np.array(column("reward")), np.array(column("tokens"))
        return cls(list(groups), rewards, column("answer"), tokens)

    def estimates(self, task) -> dict:
        """Returns the estimates of a line of metrics.jsonl."""
        return {
            "avg_at_k": avg_at_k(self.rewards),
            "k": self.rewards.shape[1],
            "n_problems": len(self.ids),
            "interval": interval(self.rewards.mean(1), names(task, self.ids)),
            "best_at_k": best_at_k(self.rewards),
            "maj_at_k": maj_at_k(self.rewards, self.answers),
            "headroom": float(headroom(self.rewards, self.answers).mean()),
            "tokens": float(self.tokens.mean()),
        }


# --------------------------------------------------------------------------------------------------
# Answering
# --------------------------------------------------------------------------------------------------


def some_of(problems, limit) -> list:
    """Returns at most `limit` of the problems, the same ones at every step of every run.

    limit: 0 for all of them.
    """
    if 0 < limit < len(problems):
        return random.Random("evaluate").sample(problems, limit)
    return problems


def evaluate(sampler, problems, cfg, split="test", texts=None) -> list[dict]:
    """Answers problems eval_k times each; returns the rows of evals/STEP-SPLIT.jsonl on every rank.

    texts: the prompts of the problems, if they are not their plain ones.
    """
    sampling = cfg.eval_temperature, cfg.eval_top_p
    samples = sampler.answer(problems, cfg.eval_k, split, *sampling, texts)
    rows = []
    for i, (problem, sample, verdict) in enumerate(verdicts(problems, samples, cfg)):
        row = {"problem": problem.id, "sample": i % cfg.eval_k}
        row |= {"answer": verdict.answer, "reward": verdict.reward}
        if verdict.test_pass_rate is not None:
            row |= {"test_pass_rate": verdict.test_pass_rate, "status": verdict.status}
        rows.append(row | {"tokens": len(sample.ids), "text": sample.text})
    return rows


def verdicts(problems, samples, cfg) -> list:
    """Returns (problem, sample, verdict) of each sample, on every rank.

    Each rank judges its share, so that no program runs twice and all ranks agree.
    Raises RunError if a verifier raises ValueError.
    """
    pairs = []
    for problem, group in zip(problems, samples, strict=True):
        pairs += [(problem, sample) for sample in group]
    share = pairs[rank() :: world()]
    texts = [sample.text for _, sample in share]
    try:
        judged = verify_all([problem for problem, _ in share], texts, cfg.mcq == "lenient")
    except ValueError as error:
        raise RunError(str(error)) from error
    parts = gather(judged)
    return [(*pair, parts[i % world()][i // world()]) for i, pair in enumerate(pairs)]


# of a row of evals/
ANSWER = {"problem": str, "answer": str, "reward": (int, float), "tokens": int}

# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def answer_task(argv, parse_flags):
    """Answers the test problems of a task, n times each, into OUT/NAME/evals/0-test.jsonl.

    The same command goes on with the problems that are left. Each rank answers and judges its
    share. Rank 0 alone reads, writes and prints. parse_flags: that of pmd.py.
    """
    parser = argparse.ArgumentParser(
        prog="python eval.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
        epilog=(
            "All other flags are those of pmd.py (python pmd.py --help): --task, --data, --n,"
            " --temperature, --top_p,\n--retrieve_k, --tiers, --embedder, --seed, --max_completion,"
            " --nproc, --out, --name, and so on.\n--batch_size is the number of problems between"
            " two writes to disk."
        ),
    )
    parser.add_argument(
        "--model", required=True, help="a Hugging Face folder, such as RUN/final, or a Hub name"
    )
    parser.add_argument(
        "--memory",
        default="",
        type=memory_file,
        help=(
            "a run's memory.db, to put into the prompts: the insight and the\nlatest success of the"
            " --retrieve_k nearest training problems, and\nas many behaviors [Tab. 4, Fig. 2]"
        ),
    )
    args, rest = parser.parse_known_args(argv)
    cfg = parse_flags(["--model", args.model, *rest])
    parts = ["eval", cfg.task, *Path(args.model).parts[-2:], *Path(args.memory).parts[-2:-1]]
    name = cfg.name or "-".join(parts).replace("/", "-")
    quiet_libraries()
    ranks = count_ranks(cfg)
    with ranks_around(cfg) as restarts:
        check_name(cfg)
        refuse_idle_flags(cfg, args.memory)
        check_numbers(cfg)  # batch_size too, which is another one below
        asked = replace(cfg, batch_size=ranks, name="", resume=False)
        quiet = restarts or rank() > 0
        reads = cfg.max_reprompt if args.memory else 0
        task, tokenizer = check(asked, None, quiet, ranks, reads=reads)
    cfg = replace(cfg, method="eval", memory_from=args.memory, name=name)
    try:
        answer(cfg, replace(task, train=[], dev=[]), tokenizer)
    except Exception as error:
        sentence = failure(error, cfg)
        if not sentence:
            raise
        raise RunError(sentence) from error


def answer(cfg, task, tokenizer):
    """Answers the test problems that are left, and prints the estimates of all.

    cfg: its method is eval, and its memory_from the path of --memory.
    """
    first = rank() == 0
    folder = Path(cfg.out) / cfg.name
    path = folder / "evals" / "0-test.jsonl"
    problems = some_of(task.test, cfg.eval_problems)
    rows, memory = [], None
    refusal = broadcast(claim(folder, resume=True) if first else "")
    if refusal:
        raise ValueError(refusal)
    if first:
        memory = lent_memory(cfg)
        refuse_other_flags(folder, cfg)
        refuse_other_problems(folder, task, tokenizer, memory)
        write_origin(folder, cfg, task, tokenizer, memory)
        rows = whole_problems(path, cfg)
    done = broadcast({row["problem"] for row in rows})
    left = [problem for problem in problems if problem.id not in done]
    if first:
        size = f"{len(problems)} problems, {len(done)} of them done before"
        overlap = memory.overlap(problems) if memory else ""
        sentences = [task.card, f"{task.name} with {cfg.model}: {size}; {path}", overlap]
        print("\n".join(filter(None, sentences)))
    if left:
        sampler = make_sampler(shard(load_policy(cfg), cfg), tokenizer, cfg)
        sampler.wake()
    bar = {"total": len(problems), "initial": len(done), "unit": "problem", "dynamic_ncols": True}
    with tqdm(**bar, disable=not first or None) as progress:
        for i in range(0, len(left), cfg.batch_size):
            batch = left[i : i + cfg.batch_size]
            texts = broadcast(prompts_with(memory, batch, tokenizer, cfg))
            answered = evaluate(sampler, batch, cfg, texts=texts)
            if first:
                for row in answered:
                    append(path, row)
                rows += answered
            progress.update(len(batch))
    if first:
        row = {"step": 0, "split": "test", "mcq": cfg.mcq, **Answers.of(rows).estimates(cfg.task)}
        write_lines(folder / "metrics.jsonl", [row])
        print(evaluated(task.name, row))
        release(folder)
    end_ranks()


def lent_memory(cfg) -> Memory | None:
    """Opens the memory that --memory names.

    Raises ValueError if it is empty.
    """
    path = cfg.memory_from
    if not path:
        return None
    options = {"embedder": cfg.embedder, "mode": "frozen", "retrieve_k": cfg.retrieve_k}
    memory = Memory(path, make_embedder(cfg), None, **options)
    memory.detach()
    if not any(memory.sizes().values()):
        raise ValueError(
            f"--memory {path} holds nothing; name the memory.db of another run, or leave it out"
        )
    return memory


def prompts_with(memory, problems, tokenizer, cfg) -> list[str] | None:
    """Writes the prompts of problems with what a memory holds for them; None without a memory."""
    if not memory:
        return None
    contexts = memory.inference_contexts(problems, cfg.tiers.split(","))
    pairs = zip(problems, contexts, strict=True)
    return [reprompt(problem, context, tokenizer, cfg) for problem, context in pairs]


def whole_problems(path, cfg) -> list[dict]:
    """Returns the rows that an earlier process left, of problems with all of their samples.

    The other rows are taken out of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path, **ANSWER) if path.exists() else []
    samples = Counter(row["problem"] for row in rows)
    rows = [row for row in rows if samples[row["problem"]] == cfg.eval_k]
    write_lines(path, rows)
    return rows


def look_at_runs(argv):
    """Prints the tables of runs (`compare`), or draws their figures (`figures`)."""
    from tools import figures, report  # pandas takes a second to import

    command, *rest = argv
    parser = argparse.ArgumentParser(
        prog=f"python eval.py {command}",
        description="Prints the paper's Tables 2, 3, 4, 5 and 7 for runs, and paired differences.",
    )
    runs = "the folder of a run or of an evaluation"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    if command == "figures":
        parser.description = "Draws the paper's Figures 2 to 6 for runs: PNG, with the data as CSV."
        out = "the folder of pictures and data (default: figures)"
        parser.add_argument("--out", default="figures", help=out)
    args = parser.parse_args(rest)
    if command == "compare":
        print(report.compare(args.runs))
    else:
        print(figures.draw_figures(args.runs, args.out))


def main(parse_flags, argv=None):
    """Runs the command line. parse_flags: that of pmd.py, which imports this file."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] in (["compare"], ["figures"]):
            look_at_runs(argv)
        else:
            answer_task(argv, parse_flags)
    except KeyboardInterrupt:
        again = "the same command goes on with the problems that are left"
        print(f"eval.py: interrupted; {again}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    import eval  # pmd imports eval: were this module __main__, there would be two of every class
    import pmd

    eval.main(pmd.parse_flags)
