"""Answers problems, estimates what the answers are worth, and compares runs.

python eval.py --model DIR_OR_NAME --task T --n 16     answers a task's test problems, with a memory
                                                       or without
python eval.py compare RUN RUN ...                     the paper's Tables 2, 3, 4, 5 and 7 for these
                                                       runs
python eval.py figures RUN RUN ...                     its Figures 2 to 6, with their data

avg_at_k, maj_at_k, best_at_k -> estimators over k samples a problem; `interval`, a bootstrap over
problems and runs
evaluate(sampler, problems)   -> the samples of an evaluation, one row each: in training and on the
                              command line alike
"""

import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from memory import Memory, reprompt
from runtime.check import check, check_name
from runtime.checkpoint import claim, release
from runtime.files import RunError, append, read_json, read_lines, write, write_lines
from runtime.jobs import failure, quiet_libraries
from runtime.model import load_policy
from runtime.options import check_numbers, option
from runtime.provenance import fingerprint, refuse_changes, refuse_other_problems
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
from runtime.tables import evaluated
from runtime.vllm_sampler import make_sampler
from tasks import load_task, verify, verify_all  # noqa: F401  also for those who import eval
from tasks.problem import SUCCESS, Problem  # noqa: F401


@dataclass
class EvalOptions:
    """Evaluation, always without memory."""

    eval_every: int = option(
        5,
        "steps between evaluations on dev and test; 0 for first and last only [Tab. 11]",
        within="[0, inf)",
    )
    eval_k: int = option(16, "samples per problem: avg@k [Tab. 11]", "--n", within="[1, inf)")
    eval_problems: int = option(
        0, "evaluate on at most this many problems of a split; 0 for all [ours]", within="[0, inf)"
    )
    eval_temperature: float = option(0.6, "[SDPO]", "--temperature", within="[0.01, inf)")
    eval_top_p: float = option(0.95, "[SDPO]", "--top_p", within="(0, 1]")


# --------------------------------------------------------------------------------------------------
# Estimators. rewards: (problems, k) from 0 to 1.
# --------------------------------------------------------------------------------------------------


def reward_table(rewards) -> np.ndarray:
    """Rewards as numbers (problems, k). ValueError where there are none, not as many of each
    problem, or not from 0 to 1.
    """
    sizes = sorted({len(row) for row in rewards})
    if len(sizes) != 1 or not sizes[0]:
        raise ValueError(
            f"each problem has {' or '.join(map(str, sizes)) or 'no'} rewards: estimators need as"
            " many of each, and at least one"
        )
    rewards = np.asarray(rewards, float)
    if not ((rewards >= 0) & (rewards <= 1)).all():  # a NaN is neither
        raise ValueError("the rewards are not all numbers from 0 to 1")
    return rewards


def avg_at_k(rewards) -> float:
    """The mean reward over all problems and samples (the paper's avg@16)."""
    return float(reward_table(rewards).mean())


def best_at_k(rewards, k=None) -> float:
    """The unbiased pass@k: over problems, the mean of 1 - C(n-c, k) / C(n, k), c of n samples being
    above SUCCESS.

    k: n, if not given. ValueError where there are not as many samples.
    """
    solved = reward_table(rewards) > SUCCESS
    n = solved.shape[1]
    k = n if k is None else k
    if k not in range(1, n + 1):  # 1.5 is not
        raise ValueError(
            f"best@{k} can't be told from {n} samples of each problem: k has to be a number from 1"
            f" to {n}"
        )
    return float(np.mean([1 - comb(n - int(c), int(k)) / comb(n, int(k)) for c in solved.sum(1)]))


def majority(rewards, answers) -> np.ndarray:
    """(problems,) the mean reward of the samples that gave the most frequent answer; of several
    such answers, their mean.

    answers: (problems, k), texts. The empty answer is one as well.
    """
    scores = []
    for row, said in zip(reward_table(rewards), answers, strict=True):
        votes = Counter(said)
        most = max(votes.values())
        top = [
            [r for a, r in zip(said, row, strict=True) if a == answer]
            for answer, n in votes.items()
            if n == most
        ]
        scores.append(np.mean(top))  # as many rewards of each
    return np.array(scores)


def maj_at_k(rewards, answers) -> float:
    """The mean reward of each problem's most frequent answer, which for rewards of 0 and 1 is how
    often it is right.
    """
    return float(majority(rewards, answers).mean())


def headroom(rewards, answers) -> np.ndarray:
    """(problems,) what a perfect choice among the k samples would add to their majority: for
    rewards of 0 and 1, best@k - maj@k (Fig. 3); never below 0.
    """
    return reward_table(rewards).max(1) - majority(rewards, answers)


def coverage(solved) -> dict:
    """{name: (solved, solved by no other)}, two masks of the problems that all were asked (Fig. 4).

    solved: {name: {problem: whether at least one of k samples is right}}.
    """
    asked = [p for p in next(iter(solved.values()), ()) if all(p in of for of in solved.values())]
    table = np.array(
        [[bool(of[p]) for p in asked] for of in solved.values()]
    )  # (methods, problems)
    return {name: (row, row & (table.sum(0) == 1)) for name, row in zip(solved, table, strict=True)}


def resample(scores, groups=None, seed=0, draws=10_000) -> np.ndarray:
    """(draws,) means of scores (problems,) or (runs, problems), with problems, and runs too, drawn
    with replacement.

    groups: (problems,) names; problems that share one are drawn together. How often each is drawn
    is multinomial.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=float))
    _, index = np.unique(
        np.arange(scores.shape[1]) if groups is None else groups, return_inverse=True
    )
    sums, counts = (
        np.stack([np.bincount(index, row) for row in scores]),
        np.bincount(index),
    )  # (runs, groups), (groups,)
    rng, (runs, n) = np.random.default_rng(seed), sums.shape
    drawn = rng.multinomial(n, np.full(n, 1 / n), draws)  # (draws, groups)
    mean = rng.multinomial(runs, np.full(runs, 1 / runs), draws) @ sums / runs  # (draws, groups)
    return (drawn * mean).sum(1) / (drawn @ counts)


def interval(scores, groups=None, seed=0, draws=10_000) -> tuple[float, float] | None:
    """The 95% percentile-bootstrap interval of a mean: see resample. Of one run it speaks of other
    test problems, not of other training seeds; of several, of both, though a handful of seeds makes
    it too narrow.

    None for fewer than two problems or groups, which say nothing about others.
    """
    if len(set(range(np.shape(scores)[-1]) if groups is None else groups)) < 2:
        return None
    low, high = np.percentile(resample(scores, groups, seed, draws), [2.5, 97.5])
    return float(low), float(high)


def names(task, ids):
    """The groups that problems are drawn in: nano asks of each name several times; elsewhere each
    stands alone.
    """
    return [i.rpartition("-")[0] if task.partition("/")[0] == "nano" else i for i in ids]


def answer_rows(problems, samples, verdicts):
    """The lines of evals/STEP-SPLIT.jsonl: k samples of each problem and their verdicts, both in
    order of the problems.
    """
    k = len(verdicts) // len(problems)
    for i, (s, v) in enumerate(zip((s for group in samples for s in group), verdicts, strict=True)):
        rate = (
            {}
            if v.test_pass_rate is None
            else {"test_pass_rate": v.test_pass_rate, "status": v.status}
        )
        yield {
            "problem": problems[i // k].id,
            "sample": i % k,
            "answer": v.answer,
            "reward": v.reward,
            **rate,
            "tokens": len(s.ids),
            "text": s.text,
        }


class Answers(NamedTuple):
    """What was answered to P problems, k times each: ids (P,), rewards, answers and tokens (P,
    k).
    """

    ids: list
    rewards: np.ndarray
    answers: list
    tokens: np.ndarray

    @classmethod
    def of(cls, rows, path=""):
        """Of the rows of a file, which a ValueError names if it was cut: then its last problem has
        fewer samples.
        """
        groups = {}
        for row in rows:
            groups.setdefault(row["problem"], []).append(row)
        if len(sizes := sorted(set(map(len, groups.values())))) != 1:
            raise ValueError(
                f"{path} is not whole: its problems have {' or '.join(map(str, sizes)) or 'no'}"
                " samples each"
            )
        table = {
            key: [[row[key] for row in group] for group in groups.values()]
            for key in ("reward", "answer", "tokens")
        }
        return cls(
            list(groups), np.array(table["reward"]), table["answer"], np.array(table["tokens"])
        )

    def estimates(self, task) -> dict:
        """What a line of metrics.jsonl says of them."""
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
    """At most `limit` of the problems (0: all of them), the same ones at every step of every
    run.
    """
    if 0 < limit < len(problems):
        return random.Random("evaluate").sample(problems, limit)
    return problems


def evaluate(sampler, problems, cfg, split="test", texts=None) -> list[dict]:
    """Answers problems eval_k times each; the rows of evals/STEP-SPLIT.jsonl, on every rank.

    texts: what the problems ask, where that is not their plain prompt.
    """
    samples = sampler.answer(
        problems, cfg.eval_k, split, cfg.eval_temperature, cfg.eval_top_p, texts
    )
    judged = verdicts(problems, samples, cfg)
    return list(answer_rows(problems, samples, [verdict for *_, verdict in judged]))


def verdicts(problems, samples, cfg) -> list:
    """(problem, sample, verdict) of each sample; each rank judges its share, so that no program
    runs twice and all agree.

    Raises RunError where a verifier raises ValueError.
    """
    pairs = [
        (problem, sample)
        for problem, group in zip(problems, samples, strict=True)
        for sample in group
    ]
    own = pairs[rank() :: world()]
    try:
        judged = verify_all([p for p, _ in own], [s.text for _, s in own], cfg.mcq == "lenient")
    except ValueError as error:
        raise RunError(str(error)) from error
    parts = gather(judged)
    return [(p, s, parts[i % world()][i // world()]) for i, (p, s) in enumerate(pairs)]


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def answer_task(argv, parse_flags):
    """Answers the test problems of a task, n times each, into OUT/NAME/evals/0-test.jsonl; goes on
    where it stopped.

    On several ranks each answers and judges its share. Rank 0 alone reads, writes and speaks.
    parse_flags: that of pmd.py.
    """
    parser = argparse.ArgumentParser(
        prog="python eval.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
        epilog=(
            "--task, --data, --n, --temperature, --top_p, --retrieve_k, --tiers, --embedder,"
            " --seed, --max_completion,\n--batch_size (problems between two writes), --nproc,"
            " --out, --name and all others are those of pmd.py."
        ),
    )
    parser.add_argument(
        "--model", required=True, help="a Hugging Face folder, such as RUN/final, or a Hub name"
    )
    parser.add_argument(
        "--memory",
        default="",
        help=(
            "a run's memory.db, for the prompt: the insight and the latest\nsuccess of the nearest"
            " training problem, and the --retrieve_k\nnearest behaviors [Tab. 4, Fig. 2]"
        ),
    )
    args, rest = parser.parse_known_args(argv)
    cfg = parse_flags(["--model", args.model, *rest])
    quiet_libraries()
    ranks = count_ranks(cfg)
    with ranks_around(cfg) as restarts:
        check_name(cfg)
        check_numbers(cfg)  # batch_size too, which is another one below
        asked = replace(cfg, batch_size=ranks, name="", resume=False)
        reads = cfg.max_reprompt if args.memory else 0
        task, tokenizer = check(asked, None, quiet=restarts or rank() > 0, ranks=ranks, reads=reads)
    parts = ["eval", cfg.task, *Path(cfg.model).parts[-2:], *Path(args.memory).parts[-2:-1]]
    cfg = replace(
        cfg,
        method="eval",
        memory_from=args.memory,
        name=cfg.name or "-".join(parts).replace("/", "-"),
    )
    try:
        answer(cfg, replace(task, train=[], dev=[]), tokenizer)
    except Exception as error:
        sentence = failure(error, cfg)
        if not sentence:
            raise
        raise RunError(sentence) from error


def answer(cfg, task, tokenizer):
    """The work of `answer_task`, after its checks. cfg: its method is eval, and memory_from the
    memory.db that is read.
    """
    first = rank() == 0
    folder = Path(cfg.out) / cfg.name
    path = folder / "evals" / "0-test.jsonl"
    problems, rows, memory = some_of(task.test, cfg.eval_problems), [], None
    refusal = broadcast(claim(folder, resume=True) if first else "")
    if refusal:
        raise ValueError(refusal)
    if first:
        refuse_other_flags(folder, cfg, task, tokenizer)
        memory = lent_memory(cfg)
        rows = whole_problems(path, cfg)
    done = broadcast({row["problem"] for row in rows})
    if first:
        print(task.card, end="\n" if task.card else "")
        print(
            f"{task.name} with {cfg.model}: {len(problems)} problems, {len(done)} of them done"
            f" before; {path}"
        )
        overlap = memory.overlap(problems) if memory else ""
        print(overlap, end="\n" if overlap else "")
    left = [p for p in problems if p.id not in done]
    if left:
        sampler = make_sampler(shard(load_policy(cfg), cfg), tokenizer, cfg)
        sampler.wake()
    bar = tqdm(
        total=len(problems),
        initial=len(done),
        unit="problem",
        disable=not first or None,
        dynamic_ncols=True,
    )
    with bar:
        for i in range(0, len(left), cfg.batch_size):
            batch, texts = left[i : i + cfg.batch_size], None
            if memory:
                contexts = memory.inference_contexts(batch, cfg.tiers.split(","))
                texts = [
                    reprompt(p, c, tokenizer, cfg) for p, c in zip(batch, contexts, strict=True)
                ]
            new = evaluate(sampler, batch, cfg, texts=broadcast(texts))
            if first:
                for row in new:
                    append(path, row)
                rows += new
            bar.update(len(batch))
    if first:
        found = {"step": 0, "split": "test", "mcq": cfg.mcq, **Answers.of(rows).estimates(cfg.task)}
        write_lines(folder / "metrics.jsonl", [found])
        print(evaluated(task.name, found))
        release(folder)
    end_ranks()


def refuse_other_flags(folder, cfg, task, tokenizer):
    """Raises ValueError where an evaluation in `folder` was begun with other flags or problems;
    else notes these.
    """
    if (folder / "config.json").exists():
        cure = "remove it, and the same command writes it anew without comparing its flags"
        refuse_changes(read_json(folder / "config.json", cure), cfg)
        refuse_other_problems(folder, task, tokenizer)
    write(folder / "config.json", json.dumps(asdict(cfg), indent=1))
    write(folder / "problems.json", json.dumps(fingerprint(task, tokenizer), indent=1))


def lent_memory(cfg) -> Memory | None:
    """The memory that --memory names. Raises ValueError where it is empty."""
    if not cfg.memory_from:
        return None
    memory = Memory(
        cfg.memory_from,
        make_embedder(cfg),
        None,
        embedder=cfg.embedder,
        mode="frozen",
        retrieve_k=cfg.retrieve_k,
    )
    if not any(memory.sizes().values()):
        raise ValueError(
            f"--memory {cfg.memory_from} holds nothing; name the memory.db of another run, or leave"
            " it out"
        )
    return memory


def whole_problems(path, cfg) -> list[dict]:
    """The rows that an earlier process left, without those of a problem that it was stopped
    within.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_lines(path) if path.exists() else []
    samples = Counter(row["problem"] for row in rows)
    rows = [row for row in rows if samples[row["problem"]] == cfg.eval_k]
    write_lines(path, rows)
    return rows


def main(parse_flags, argv=None):
    """The command line. parse_flags: that of pmd.py, which imports this file."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] in (["compare"], ["figures"]):
            from tools import report  # pandas takes a second to import

            parser = argparse.ArgumentParser(prog=f"python eval.py {argv[0]}")
            parser.add_argument(
                "runs", nargs="+", metavar="RUN", help="a run's folder, or that of an evaluation"
            )
            parser.add_argument(
                "--out", default="figures", help="for figures: the folder of pictures and data"
            )
            args = parser.parse_args(argv[1:])
            print(
                report.compare(args.runs)
                if argv[0] == "compare"
                else report.figures(args.runs, args.out)
            )
        else:
            answer_task(argv, parse_flags)
    except KeyboardInterrupt:
        print(
            "eval.py: interrupted; the same command goes on with the problems that are left",
            file=sys.stderr,
        )
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    import eval  # pmd imports eval: were this module __main__, there would be two of every class
    import pmd

    eval.main(pmd.parse_flags)
