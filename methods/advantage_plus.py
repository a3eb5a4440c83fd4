"""Advantage plus (A + lambda d): the group's advantage, and what the teacher says of each token.

Every rollout is reinforced by A_t = A + lambda d_t. A is GRPO's advantage of the rollout. d_t is
log q(y_t) - log p(y_t): the teacher's log-probability of the sampled token minus the student's.
The second term is the gradient of lambda KL(p || q), sampled at the tokens of the student.

This is the form that four papers share: pi_opsd.py (arXiv 2602.04942), skill_sd.py (2604.10674),
pi_play.py (2604.14054) and sod.py (2605.07725) say what was read of each. Here the teacher reads
what SDPO's reads. Ours: the teacher, the value of lambda, and that a rollout without a teacher is
reinforced by A alone. The penalty k3(log p - log q) of Skill-SD, times the undetached ratio, has
the same gradient (our derivation).

Teacher reads: what SDPO's teacher reads.
Loss: policy gradient with A + lambda d.
Claims more than: grpo.
"""

from dataclasses import dataclass

import pmd
from methods import grpo, sdpo


@dataclass
class Config(pmd.Config):
    """The advantage and what is added to it."""

    plus_lambda: float = pmd.option(
        0.1, "weight of the teacher's d_t beside the advantage; 0 is GRPO [ours]", within="[0, inf)"
    )
    plus_steps: int = pmd.option(
        0,
        "steps over which plus_lambda falls to 0 on a line; 0 keeps it constant [ours]",
        within="[0, inf)",
    )


class Method(sdpo.Method):
    Config = Config
    presets = grpo.Method.presets
    idle = "alpha top_k"

    def strength(self, step) -> float:
        """Gives lambda at a step. From step plus_steps + 1 on it is 0, and the method is GRPO."""
        if not self.cfg.plus_steps:
            return self.cfg.plus_lambda
        return self.cfg.plus_lambda * max(0.0, 1 - (step - 1) / self.cfg.plus_steps)

    def shaped(self, row, d):
        """Changes d (C,) of a row before it is added, for other methods."""
        return d

    def condition(self, step, rollouts):
        if self.strength(step):
            super().condition(step, rollouts)
        pmd.set_advantages(rollouts)
        for r in rollouts:  # its teacher is scored in `weigh`; there is no divergence
            r.teachers = [r.teacher_ids] if r.teacher_ids else []
            r.teacher_ids = []
        return rollouts

    def weigh(self, step, rows):
        taught = [r for r in rows if r.teachers]
        student = pmd.scored(self.policy, taught, lambda r: r.prompt_ids, self.cfg)
        teacher = pmd.scored(self.teacher, taught, lambda r: r.teachers[0], self.cfg)
        for r in taught:
            d = teacher[r.id][0] - student[r.id][0]
            r.advantage = r.advantage + self.strength(step) * self.shaped(r, d)
            r.teachers = []  # no pass of the update reads it
