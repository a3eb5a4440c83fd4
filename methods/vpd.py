"""VPD (arXiv 2605.15113): SDPO whose teacher prompt is trained, too, on the verdicts.

The M-step is SDPO's: in every batch the student follows itself under the teacher's prompt, by
reverse KL. In every F-th batch an E-step joins it in the same updates: the rollouts are trained
under the teacher's prompt, so that R = beta (log q(y) - log p(y)) exceeds a threshold for
successes, and falls below it for failures. The loss is BCO's, -log sigmoid(+-(R - threshold)).

Read in notes by others, which have the equations; no code was found. As BCO's gradient is that of a
policy-gradient row, the E-step needs rows alone: the same completions under the teacher's prompt,
with one advantage each. Ours, where the notes are silent: R is a sum over tokens, and so are both
losses; the threshold's momentum; a batch without successes or without failures leaves it as it is;
R is that of the weights before the batch. Two notes list a weight of a KL, 0.01 and 0.1, and none
says which KL that is. We read it as the weight of the M-step. The M-step's equation has no weight,
so --vpd_kl is 1.

Teacher reads: what SDPO's teacher reads; its prompt is trained, too.
Loss: reverse KL, and BCO under the teacher's prompt.
Claims more than: sdpo.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

import pmd
from methods import sdpo

MOMENTUM = 0.9  # of the threshold [ours]
E_STEP = "/E-step"  # ends the ids of the rows that it trains


@dataclass
class Config(pmd.Config):
    """VPD."""

    alpha: float = pmd.option(1.0, "reverse KL; see pmd.py [VPD]", within="[0, 1]")
    teacher: Literal["ema", "live"] = pmd.option(
        "live", "student and teacher share their weights; see pmd.py [VPD]"
    )
    loss_mean: Literal["sequence", "token", "sum"] = pmd.option(
        "sum", "over a rollout's tokens; see pmd.py [VPD]"
    )
    vpd_every: int = pmd.option(5, "batches between E-steps; 0 for none [VPD]", within="[0, inf)")
    vpd_beta: float = pmd.option(0.1, "of the implicit reward R [VPD]", within="(0, inf)")
    vpd_kl: float = pmd.option(
        1.0,
        "weight of the M-step's divergence [ours; VPD: of a KL, 0.01 or 0.1]",
        within="(0, inf)",
    )


class Method(sdpo.Method):
    Config = Config
    threshold = None  # before the first E-step with both classes

    def condition(self, step, rollouts):
        rows = super().condition(step, rollouts)
        if self.cfg.vpd_every == 0 or step % self.cfg.vpd_every:
            return rows
        taught = [r for r in rows if r.teacher_ids]
        return rows + [teacher_row(r) for r in taught]

    def weigh(self, step, rows):
        gained = self.gains(rows)
        for part in pmd.parts_of(rows, self.cfg):
            # the mean is over the rows of both steps in an update
            kinds = len(part) / sum(r.id not in gained for r in part)
            for r in part:
                r.weight = kinds * self.cfg.vpd_kl
                if r.id in gained:
                    sign = 1 if r.reward >= pmd.SUCCESS else -1
                    over = gained[r.id] - (self.threshold or 0.0)
                    pull = self.cfg.vpd_beta * float(torch.sigmoid(-sign * over))
                    r.advantage = kinds * sign * pull

    def gains(self, rows) -> dict:
        """Gives R of each row of the E-step, {} where there is none, and moves the threshold."""
        own, twins = [r for r in rows if r.teacher_ids], [r for r in rows if r.id.endswith(E_STEP)]
        if not twins:
            return {}
        student = pmd.scored(self.policy, own, lambda r: r.prompt_ids, self.cfg)
        teacher = pmd.scored(self.policy, twins, lambda r: r.prompt_ids, self.cfg)
        gained = {}
        for r, twin in zip(own, twins, strict=True):
            difference = teacher[twin.id][0] - student[r.id][0]
            gained[twin.id] = self.cfg.vpd_beta * difference.sum()
        self.move_threshold(twins, gained)
        return gained

    def move_threshold(self, twins, gained):
        """Moves the threshold towards the middle between the two classes' mean R."""
        wins = [gained[r.id] for r in twins if r.reward >= pmd.SUCCESS]
        losses = [gained[r.id] for r in twins if r.reward < pmd.SUCCESS]
        if wins and losses:
            middle = float(sum(wins) / len(wins) + sum(losses) / len(losses)) / 2
            before = middle if self.threshold is None else self.threshold
            self.threshold = MOMENTUM * before + (1 - MOMENTUM) * middle

    def state(self):
        return {"threshold": self.threshold}

    def load(self, state):
        self.threshold = state.get("threshold")


def teacher_row(rollout):
    """Gives the row that trains a rollout's completion under its teacher's prompt."""
    return replace(
        rollout,
        id=rollout.id + E_STEP,
        prompt_ids=rollout.teacher_ids,
        teacher_ids=[],
        rollout_logprobs=None,
    )
