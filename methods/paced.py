"""PACED (arXiv 2603.11178): SDPO whose problems weigh by how near they are to being learned.

A problem's divergence is weighted by s (1 - s), with s its pass rate: nothing is learned from a
problem that is always or never solved. In its two-stage variant the first half of the steps takes
the forward KL, and the second half the reverse KL.

The first page and the abstract of the paper were read, the two stages in notes by others; the
authors' repository has no code of it. Ours, where that is silent: the teacher is SDPO's; s is the
share of successes in this step's group; the weights have mean 1 over the batch's supervised
rollouts, so that PACED and SDPO take steps of one size. A problem of weight 0 is not supervised.
It includes those that only feedback, a memory or a reference could open.

Teacher reads: what SDPO's teacher reads.
Loss: reverse KL, problems weighted by s (1 - s).
Claims more than: sdpo.
"""

from dataclasses import dataclass, replace

import pmd
from methods import sdpo


@dataclass
class Config(pmd.Config):
    """PACED."""

    alpha: float = pmd.option(
        1.0, "0 forward KL, 1 reverse KL, between a generalized JSD [PACED]", within="[0, 1]"
    )
    paced_a: float = pmd.option(
        1.0, "the weight is s^a (1 - s)^b; a and b of 0 give SDPO [PACED]", within="[0, inf)"
    )
    paced_b: float = pmd.option(1.0, "see --paced_a [PACED]", within="[0, inf)")
    paced_stages: bool = pmd.option(
        False, "forward KL in the first half of the steps, then reverse KL, for --alpha [PACED]"
    )


class Method(sdpo.Method):
    Config = Config

    def condition(self, step, rollouts):
        rows = super().condition(step, rollouts)
        for group in pmd.groups_of(rows).values():
            rate = sum(r.reward >= pmd.SUCCESS for r in group) / len(group)
            weight = rate**self.cfg.paced_a * (1 - rate) ** self.cfg.paced_b
            for r in group:
                r.weight = weight
                if weight == 0:
                    r.teacher_ids, r.teacher_prompt = [], ""
        taught = [r for r in rows if r.teacher_ids]
        total = sum(r.weight for r in taught)
        for r in taught:
            r.weight *= len(taught) / total
        return rows

    def weigh(self, step, rows):
        if self.cfg.paced_stages:
            steps = pmd.total_steps(self.task.train, self.cfg)
            self.cfg = replace(self.cfg, alpha=float(2 * step > steps))
