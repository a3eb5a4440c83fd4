"""UniSD (arXiv 2605.06597): a demonstration teaches, weighted by how far its variants agree.

The teacher reads the reference solution, and the student follows it by forward KL. Other contexts
about the same reference score the same tokens. Where they disagree, the divergence counts less:

    token: w = 1 / (1 + gamma v), v the variance over contexts of log q_k(y_t), divided by its 0.95
        quantile and at most 10; w is at least 0.01
    sequence: w = exp(-gamma v), v the variance over contexts of mean_t log q_k(y_t)

The loss is the sum of w times divergence over the sum of w. The EMA teacher moves every 10 steps.

The authors' code was read. Ours: the contexts are the three views of avsd.py, the first of them is
the teacher's, and variances are over these three, without Bessel's correction; quantile and sum are
of a batch. Left out: their contrast with a wrong demonstration, the match of hidden states, the
clip of a token's divergence at 10, the cosine schedule of the rate and its warm-up over 10% of the
steps, sampling at temperature 0.7, and `--group_size 1`.

Teacher reads: the reference, and two other views of it.
Loss: forward KL, weighted by agreement.
Claims more than: opsd.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import pmd
from methods import avsd, opsd

LARGEST = 10.0  # variance, in quantiles
LEAST_WEIGHT = 0.01


@dataclass
class Config(pmd.Config):
    """UniSD."""

    lr: float = pmd.option(
        2e-5, "AdamW's learning rate, constant after the warm-up [UniSD]", within="(0, inf)"
    )
    loss_mean: Literal["sequence", "token", "sum"] = pmd.option(
        "token", "over all trained tokens; see pmd.py [UniSD]"
    )
    alpha: float = pmd.option(0.0, "forward KL; see pmd.py [UniSD]", within="[0, 1]")
    ema_rate: float = pmd.option(
        0.1, "of the teacher, once in unisd_every steps [UniSD]", within="[0, 1]"
    )
    unisd_every: int = pmd.option(
        10, "steps between moves of the teacher [UniSD]", within="[1, inf)"
    )
    unisd_agreement: Literal["token", "sequence"] = pmd.option(
        "token", "whether contexts agree on a token, or on a rollout as a whole [UniSD has both]"
    )
    unisd_gamma: float = pmd.option(
        1.0, "how much disagreement lowers a weight; 0 for not at all [UniSD]", within="[0, inf)"
    )


class Method(opsd.ReferenceTaught):
    Config = Config

    def condition(self, step, rollouts):
        rows = super().condition(step, rollouts)
        taught = [r for r in rows if r.teacher_ids]
        avsd.give_teachers(self, taught, [avsd.views(r.problem) for r in taught])
        return rows

    def weigh(self, step, rows):
        taught = [r for r in rows if r.teacher_ids and len(r.ids)]
        if not taught:
            return
        scores = avsd.scores_of_views(self.teacher, taught, self.cfg)
        weights = self.agreement(scores)
        mean = torch.cat(list(weights.values())).mean()
        for r in taught:
            r.weight = weights[r.id] / mean

    def agreement(self, scores) -> dict:
        """Weighs tokens by agreement: {row id: (C,)}. scores: {row id: log q_k (K, C)}."""
        gamma = self.cfg.unisd_gamma
        if self.cfg.unisd_agreement == "sequence":
            spread = {id: log_q.mean(1).var(0, unbiased=False) for id, log_q in scores.items()}
            return {
                id: (-gamma * spread[id]).exp().expand(log_q.shape[1])
                for id, log_q in scores.items()
            }
        spread = {id: log_q.var(0, unbiased=False) for id, log_q in scores.items()}
        unit = torch.cat(list(spread.values())).quantile(0.95) + avsd.EPSILON
        return {
            id: (1 / (1 + gamma * (variance / unit).clamp(max=LARGEST))).clamp(min=LEAST_WEIGHT)
            for id, variance in spread.items()
        }

    def follow(self, step):
        if step % self.cfg.unisd_every == 0:
            super().follow(step)
