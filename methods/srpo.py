"""SRPO (arXiv 2604.02288): each rollout is either distilled or reinforced, by whether it failed and
has a teacher.

A router on top of SDPO and GRPO. A success is reinforced. A failure with a teacher (a successful
sibling or feedback) is distilled. A failure without one is reinforced, too. Distilled tokens are
weighted by the teacher's certainty, exp(-beta H) over its mean, H the teacher's entropy at the
token. One mean over all tokens of both kinds.

The paper was read in full; no authors' code was found. Ours, where it is silent: advantages are
relative to all rollouts of a group, routed or not; the weights have no gradient, and their
mean is that of the batch, also with several updates; H is taken over
the full vocabulary.

Teacher reads: what SDPO's teacher reads, of failures alone.
Loss: PMD's divergence on failures, policy gradient on the rest.
Claims more than: sdpo.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import pmd
from methods import sdpo


@dataclass
class Config(pmd.Config):
    lr: float = pmd.option(
        5e-6, "AdamW's learning rate, constant after the warm-up [SRPO]", within="(0, inf)"
    )
    loss_mean: Literal["sequence", "token", "sum"] = pmd.option(
        "token", "over all trained tokens; see pmd.py [SRPO]"
    )
    srpo_beta: float = pmd.option(
        1.0,
        "how much a teacher's uncertainty lowers a token's weight; 0 for not at all [SRPO]",
        within="[0, inf)",
    )


class Method(sdpo.Method):
    Config = Config

    def condition(self, step, rollouts):
        rows = super().condition(step, rollouts)
        pmd.set_advantages(rows)
        for r in rows:
            if r.reward >= pmd.SUCCESS:
                r.teacher_ids, r.teacher_prompt = [], ""
            elif r.teacher_ids:
                r.advantage = None
        return rows

    def weigh(self, step, rows):
        taught = [r for r in rows if r.teacher_ids]
        if not taught:
            return
        scores = pmd.scored(self.teacher, taught, lambda r: r.teacher_ids, self.cfg)
        certainty = {
            id: (-self.cfg.srpo_beta * entropy).exp() for id, (_, entropy) in scores.items()
        }
        mean = torch.cat(list(certainty.values())).mean()
        for r in taught:
            r.weight = certainty[r.id] / mean
