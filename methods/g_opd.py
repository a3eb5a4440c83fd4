"""G-OPD, or ExOPD (arXiv 2602.12125, "Learning beyond Teacher"), in a self form: the teacher is
extrapolated beyond what its context adds.

The target is b (q / b)^L, normalised. q is the teacher under its prompt, b the same weights under
the plain prompt. L = 1 is ordinary distillation. L above 1 exaggerates what the context changes.
Both have one head, so the target is one teacher with the hidden state h_b + L (h_q - h_b).

The authors' code was read: sampled tokens, A_t = (log b - log p) + L (log q - log b), and L 1.25,
with another model as q. Ours: the self form, over the full vocabulary and as a reverse KL, with
SDPO's contexts and its EMA teacher. The authors take one rollout of each of 1024 problems.

Teacher reads: what SDPO's teacher reads, exaggerated.
Loss: reverse KL.
Claims more than: sdpo.
"""

from dataclasses import dataclass

import pmd
from methods import sdpo


@dataclass
class Config(pmd.Config):
    """G-OPD."""

    alpha: float = pmd.option(1.0, "reverse KL; see pmd.py [G-OPD]", within="[0, 1]")
    extrapolation: float = pmd.option(
        1.25,
        "how far the target goes from the teacher without a context, at 0, to the teacher with it,"
        " at 1, and beyond [G-OPD]",
        within="[0, inf)",
    )


class Method(sdpo.Method):
    Config = Config

    def make_teacher(self, policy):
        pmd.need_unbounded_logits(policy, self.cfg)
        return super().make_teacher(policy)

    def teacher_hidden(self, batch):
        told = super().teacher_hidden(batch)
        prompts = [r.prompt_ids for r in batch]
        plain = pmd.states_under(self.teacher, prompts, batch)
        return plain.lerp(told, self.cfg.extrapolation)  # exactly `told` at 1
