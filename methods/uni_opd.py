"""Uni-OPD (arXiv 2605.03677): SDPO on the sampled tokens, its rewards calibrated by the verifier.

A token's advantage is d, how much likelier the teacher finds it than the student. A rollout's
return is its mean d. Where the returns of a group's successes do not exceed those of its failures
by a margin, all tokens of a success are raised, or those of a failure lowered, by what is missing.

The authors' code was read. Its teacher is another model; here SDPO's stands for it. Ours: a rollout
of a mixed group without a teacher prompt has d = 0; of the larger class the first rollouts are
kept, and the others count in the mean. Left out: a margin over the batch in place of the group, and
dropping the worst rollouts.

Teacher reads: what SDPO's teacher reads.
Loss: policy gradient with d, calibrated by the verdicts.
Claims more than: sdpo.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import pmd
from methods import sdpo


@dataclass
class Config(pmd.Config):
    """Uni-OPD."""

    uni_opd_margin: float = pmd.option(
        0.1, "of successes over failures in a group, in nats a token [Uni-OPD]", within="[0, inf)"
    )
    uni_opd_shift: Literal["successes", "failures", "both"] = pmd.option(
        "successes", "which are shifted where the margin is missed; both by half each [Uni-OPD]"
    )
    uni_opd_returns: Literal["mean", "extreme"] = pmd.option(
        "mean", "what is compared; extreme: the lowest success, the highest failure [Uni-OPD]"
    )
    uni_opd_balance: bool = pmd.option(
        True, "thin mixed groups to as many successes as failures [Uni-OPD]"
    )


class Method(sdpo.Method):
    Config = Config
    idle = "alpha top_k"

    def weigh(self, step, rows):
        taught = [r for r in rows if r.teacher_ids]
        teacher = pmd.scored(self.teacher, taught, lambda r: r.teacher_ids, self.cfg)
        student = pmd.scored(self.policy, taught, lambda r: r.prompt_ids, self.cfg)
        for r in taught:
            r.advantage = teacher[r.id][0] - student[r.id][0]
            r.teacher_ids = []
        for group in pmd.groups_of(rows).values():
            wins = [r for r in group if r.reward >= pmd.SUCCESS]
            losses = [r for r in group if r.reward < pmd.SUCCESS]
            kept = min(len(wins), len(losses))
            if kept == 0:
                continue
            if self.cfg.uni_opd_balance:
                for r in wins[kept:] + losses[kept:]:
                    r.advantage = None
                wins, losses = wins[:kept], losses[:kept]
            self.calibrate(wins, losses)

    def calibrate(self, wins, losses):
        """Shifts the advantages of a mixed group to the margin."""
        for r in wins + losses:
            if r.advantage is None:
                r.advantage = torch.zeros(len(r.ids))
        high, low = ([float(r.advantage.mean()) for r in rows] for rows in (wins, losses))
        if self.cfg.uni_opd_returns == "mean":
            gap = sum(high) / len(high) - sum(low) / len(low)
        else:
            gap = min(high) - max(low)
        missing = max(0.0, self.cfg.uni_opd_margin - gap)
        up = {"successes": 1.0, "failures": 0.0, "both": 0.5}[self.cfg.uni_opd_shift]
        for r in wins:
            r.advantage = r.advantage + up * missing
        for r in losses:
            r.advantage = r.advantage - (1 - up) * missing
