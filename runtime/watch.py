"""Watches whether the teacher reads lessons the right way round: see `lesson_pull`.

tools/reads.py measures every block, on any model.
"""

import functools
import math
import random
import statistics
from dataclasses import dataclass
from typing import NamedTuple

from runtime.chat import encoder
from runtime.ranks import alone, broadcast, rank
from runtime.rows import scored

PROBLEMS = 32  # that are looked at
ENOUGH = 8  # problems; of fewer nothing is said


@dataclass
class Row:
    """Holds the tokens of a failed attempt after one prompt, for `scored`."""

    id: tuple
    ids: list[int]
    prompt_ids: list[int]


class Pull(NamedTuple):
    """Says what lessons do to the log-probability of failed attempts, in nats an attempt."""

    mean: float
    error: float  # standard error over problems
    problems: int

    @property
    def warning(self) -> str:
        """Says so if lessons make failed attempts likelier, by more than two standard errors."""
        if self.mean <= 2 * self.error:
            return ""
        return (
            "WARNING: lessons make failed attempts likelier in the teacher's eyes, by"
            f" {self.mean:.2f} +- {self.error:.2f} nats ({self.problems} problems): it reads"
            " warnings as advice and pulls the student towards what failed; `python"
            " tools/reads.py` measures each block, and --supervise solved leaves out problems of"
            " which nothing but failures is known"
        )


def lesson_pull(method, step) -> Pull | None:
    """Measures what lessons alone do to failed attempts, under the teacher's weights.

    The attempts are the newest failure that is stored of each of PROBLEMS problems with lessons.
    Each is scored after the plain prompt and after the prompt with the problem's lessons. On every
    rank. Returns None where nobody is taught from a memory, or too few problems have lessons.
    """
    reads = method.memory_mode and method.teaches and "insight" in method.cfg.tiers
    if not reads:
        return None
    rows = broadcast(rows_of(method, step) if rank() == 0 else None)
    if len(rows) < 2 * ENOUGH:
        return None
    method.sampler.sleep()  # the device is the teacher's
    found = scored(method.teacher, rows, lambda row: row.prompt_ids, method.cfg)
    method.sampler.wake()
    totals = {id: float(logprobs.sum()) for id, (logprobs, _) in found.items()}
    problems = list(dict.fromkeys(problem for problem, _ in totals))
    changes = [totals[id, "lessons"] - totals[id, "plain"] for id in problems]
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    return Pull(statistics.mean(changes), error, len(changes))


def rows_of(method, step) -> list[Row]:
    """Lays out failed attempts of problems with lessons, two rows each, whole ones only.

    On rank 0 alone.
    """
    memory, tokenizer, cfg = alone(method.memory), method.tokenizer, method.cfg
    tally = memory.tally("insight")
    problems = [p for p in method.task.train if tally[p.id, "lesson"]]
    random.Random(f"{cfg.seed} watch {step}").shuffle(problems)
    problems = problems[:PROBLEMS]
    attempts = memory.living_of("experience", [p.id for p in problems])
    insights = memory.living_of("insight", [p.id for p in problems])
    rows = []
    for problem in problems:
        encode = functools.partial(encoder(tokenizer, cfg), system=problem.system)
        failures = [a.text for a in attempts[problem.id] if a.kind == "failure"]
        lessons = [(i.title, i.text) for i in insights[problem.id] if i.kind == "lesson"]
        beside = memory.compose_within(
            cfg.max_reprompt,
            lambda text, encode=encode: len(encode(text)),
            problem.prompt,
            lessons=lessons,
        )
        ids = tokenizer(failures[-1], add_special_tokens=False)["input_ids"] if failures else []
        if ids and beside != problem.prompt:
            rows.append(Row((problem.id, "plain"), ids, encode(problem.prompt)))
            rows.append(Row((problem.id, "lessons"), ids, encode(beside)))
    return rows
