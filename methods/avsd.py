"""AVSD (arXiv 2605.20643): three views of one reference teach where they agree, and a little more.

Each view of the reference solution is a teacher: the whole, its first half, its end. The target is
their geometric mean, raised towards their arithmetic mean by a gate that never flips the sign of
what they agree on. q_m are the teachers, p the student, at one token:

    A = mean_m(log q_m) - log p      J = log mean_m(q_m) - mean_m(log q_m)
    C = |A| / mean_m |log q_m - log p|      R = |A| / (|A| + J)
    log q* = mean_m(log q_m) + C R J

The authors' code was read; the paper only as notes report it. As the code was run, the advantage of
a sampled token is log q* - log p. `--method avsd-full` has the paper's full vocabulary.

Ours: nano's third view is the rule of the last step as a strategy, because the final digits alone
tell its checkpoint nothing (measured). A program's is its second half. All methods share one
sampling budget, where the authors have `--group_size 1`. Left out: LoRA, gradient clipping at 0.1,
and the code's other weights and gates.

Teacher reads: three views of the reference, each by itself.
Loss: policy gradient with log q* - log p.
Claims more than: opsd.
"""

import math
from dataclasses import dataclass

import torch

import pmd
from methods import opsd
from tasks.references import hidden_rules, reference, short_answer

EPSILON = 1e-8
VIEWS = 3


@dataclass
class Config(pmd.Config):
    """AVSD."""

    lr: float = pmd.option(
        5e-6, "AdamW's learning rate, constant after the warm-up [AVSD]", within="(0, inf)"
    )
    ema_rate: float = pmd.option(0.0, "the teacher is the initial policy [AVSD]", within="[0, 1]")


class Method(opsd.ReferenceTaught):
    Config = Config
    idle = "alpha top_k"

    def condition(self, step, rollouts):
        rows = super().condition(step, rollouts)
        taught = [r for r in rows if r.teacher_ids]
        give_teachers(self, taught, [views(r.problem) for r in taught])
        for r in taught:
            r.teacher_ids = []  # not distilled
            r.advantage = 0.0  # but reinforced, by what weigh finds
        return rows

    def weigh(self, step, rows):
        taught = [r for r in rows if r.teachers]
        student = pmd.scored(self.policy, taught, lambda r: r.prompt_ids, self.cfg)
        teachers = scores_of_views(self.teacher, taught, self.cfg)
        for r in taught:
            log_p = student[r.id][0]
            r.advantage = target(log_p, teachers[r.id]) - log_p


def target(log_p, log_q):
    """Computes log q*, not renormalised, from log_p (...) and the teachers' log_q (M, ...)."""
    consensus = log_q.mean(0) - log_p
    residual = log_q.logsumexp(0) - log_q.mean(0) - math.log(len(log_q))
    size = consensus.abs()
    agreement = size / ((log_q - log_p).abs().mean(0) + EPSILON)
    gate = agreement * size / (size + residual + EPSILON)
    return log_q.mean(0) + gate * residual


def give_teachers(method, rows, contexts):
    """Sets r.teachers: each row's prompt with each of its contexts (arguments of memory.compose).

    Where the token budget leaves nothing of a context, it is the student's own prompt. The first
    becomes the row's teacher_prompt, which records show, where it has none.
    """
    problems = [r.problem for r, several in zip(rows, contexts, strict=True) for _ in several]
    flat = [context for several in contexts for context in several]
    prompts = iter(pmd.teacher_prompts(problems, flat, method.tokenizer, method.cfg))
    for r, several in zip(rows, contexts, strict=True):
        pairs = [next(prompts) for _ in several]
        r.teachers = [ids or r.prompt_ids for _, ids in pairs]
        shown = [text for text, ids in pairs if ids]
        r.teacher_prompt = r.teacher_prompt or next(iter(shown), "")


def scores_of_views(teacher, rows, cfg) -> dict:
    """Scores rows under each of their teachers: {row id: log-probabilities (M, C)}."""
    scores = [pmd.scored(teacher, rows, lambda r, m=m: r.teachers[m], cfg) for m in range(VIEWS)]
    return {r.id: torch.stack([view[r.id][0] for view in scores]) for r in rows}


def views(problem) -> list[dict]:
    """Gives three contexts of one reference: the whole, its first half, its end."""
    whole = reference(problem)
    half = whole[: len(whole) // 2]
    end = {"solution": short_answer(problem) or whole[len(half) :]}
    if rules := hidden_rules(problem):  # nano: four digits, then six words a step
        half = " ".join(whole.split()[: 4 + 6 * math.ceil(len(rules) / 2)])
        end = {"strategies": [("rule", rules[-1])]}
    return [{"solution": whole}, {"beginning": half}, end]
