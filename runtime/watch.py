"""Watches whether the teacher reads lessons the right way round: see `lesson_pull`.

tools/reads.py measures every block, on any model.
"""

import math
import random
import statistics
from typing import NamedTuple

from runtime.chat import encoder
from runtime.ranks import alone, broadcast, rank
from runtime.rows import Continuation, scored

PROBLEMS = 32  # that are looked at
ENOUGH = 8  # problems; of fewer nothing is said


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
            " tools/reads.py` measures each block, and --supervise solved leaves out rollouts whose"
            " teacher reads no success, no strategy and no feedback"
        )


def lesson_pull(method, step, teacher_prompts) -> Pull | None:
    """Measures what lessons alone do to failed attempts, under the teacher's weights.

    The attempts are the newest failure that is stored of each of PROBLEMS problems with lessons.
    Each is scored after the plain prompt and after the prompt with the problem's lessons. On every
    rank. teacher_prompts: that of pmd.py. Returns None where nobody is taught from a memory, or too
    few problems have lessons.
    """
    reads = method.memory_mode and method.teaches and "insight" in method.cfg.tiers
    if not reads:
        return None
    failures = broadcast(failures_of(method, step) if rank() == 0 else None)
    rows = rows_of(failures, method, teacher_prompts)
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


def failures_of(method, step) -> list[tuple]:
    """Picks problems with lessons and a failure: (problem id, text, its lessons). On rank 0 alone.

    lessons: as memory.compose takes them.
    """
    memory = alone(method.memory)
    tally = memory.tally("insight")
    ids = [p.id for p in method.task.train if tally[p.id, "lesson"]]
    random.Random(f"{method.cfg.seed} watch {step}").shuffle(ids)
    ids = ids[:PROBLEMS]
    attempts = memory.living_of("experience", ids)
    insights = memory.living_of("insight", ids)
    failures = []
    for id in ids:
        texts = [a.text for a in attempts[id] if a.kind == "failure"]
        lessons = [(i.title, i.text) for i in insights[id] if i.kind == "lesson"]
        if texts:
            failures.append((id, texts[-1], lessons))
    return failures


def rows_of(failures, method, teacher_prompts) -> list[Continuation]:
    """Lays out failures, two rows each, where lessons change the prompt."""
    tokenizer, cfg = method.tokenizer, method.cfg
    by_id = {p.id: p for p in method.task.train}
    problems = [by_id[id] for id, *_ in failures]
    contexts = [{"lessons": lessons} for *_, lessons in failures]
    prompts = teacher_prompts(problems, contexts, tokenizer, cfg)
    encode = encoder(tokenizer, cfg)
    rows = []
    for problem, (_, text, _), (_, beside) in zip(problems, failures, prompts, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids and beside:
            plain = encode(problem.prompt, problem.system)
            rows.append(Continuation((problem.id, "plain"), ids, plain))
            rows.append(Continuation((problem.id, "lessons"), ids, beside))
    return rows
