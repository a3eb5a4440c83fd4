"""pi-OPSD (arXiv 2602.04942, "Privileged Information Distillation", its variant named OPSD): the
student is rewarded, and kept near a teacher that reads privileged information.

Maximises E_p[R] - lambda KL(p || q), that is A_t = A + lambda d_t: see advantage_plus.py. Teacher
and student share their weights. Not to be taken for OPSD of arXiv 2601.18734.

Of the paper the abstract and the authors' blog were read, and the code of a third party, which
recommends 0.25. Ours: the privileged information is the reference solution; advantages are those
of our GRPO, not divided by their deviation.

Teacher reads: the reference.
Loss: policy gradient with A + lambda d.
Claims more than: grpo.
"""

from dataclasses import dataclass
from typing import Literal

import pmd
from methods import advantage_plus
from tasks.references import reference


@dataclass
class Config(advantage_plus.Config):
    """pi-OPSD."""

    plus_lambda: float = pmd.option(
        0.25, "weight of the KL to the teacher [a third party's code]", within="[0, inf)"
    )
    teacher: Literal["ema", "live"] = pmd.option("live", "shared weights; see pmd.py [paper]")


class Method(advantage_plus.Method):
    Config = Config
    needs = staticmethod(reference)

    def contexts(self, step, rollouts):
        return [{"solution": reference(r.problem)} for r in rollouts]
