"""AVSD over the full vocabulary (arXiv 2605.20643): avsd.py's target for every entry of it.

The loss of a token is the reverse KL to the renormalised q* of avsd.py, which has no gradient.

This is the form of the paper, which was read only as notes report it; the authors' code holds it
and was run with the sampled token. Ours: as in avsd.py, and no ratio of the policy of now to that
of the batch.

Teacher reads: three views of the reference, each by itself.
Loss: reverse KL to q*.
Claims more than: opsd.
"""

from dataclasses import dataclass

import torch

import pmd
from methods import avsd, opsd


@dataclass
class Config(avsd.Config):
    """AVSD over the full vocabulary."""

    alpha: float = pmd.option(1.0, "reverse KL; see pmd.py [AVSD]", within="[0, 1]")


class Method(avsd.Method):
    Config = Config
    idle = ""  # other values of what avsd does not read are refused

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        pmd.need_reverse_kl(cfg)

    def condition(self, step, rollouts):
        rows = super().condition(step, rollouts)
        for r in rows:
            r.teacher_ids = r.teachers[0] if r.teachers else []  # distilled, by all of r.teachers
            r.advantage = None
        return rows

    def weigh(self, step, rows):
        """Nothing is weighed."""

    def teacher_hidden(self, batch) -> list:
        """Gives the states (N, H) of each view."""
        states = []
        for number in range(avsd.VIEWS):
            prompts = [r.teachers[number] for r in batch]
            states.append(pmd.states_under(self.teacher, prompts, batch))
        return states

    def divergence(self, hidden, head, teacher_hidden, teacher_head, weights, ids, **ratio):
        teachers = [(states, teacher_head) for states in teacher_hidden]
        return opsd.by_formula(reverse_kl, hidden, head, teachers, weights, ids)


def reverse_kl(log_p, *log_q, token_ids):
    """Computes KL(p || q*) (n,), without a gradient through q*, and the entropy of q*."""
    log_target = avsd.target(log_p.detach(), torch.stack(log_q)).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_target)).sum(-1)
    return divergence, -(log_target.exp() * log_target).sum(-1)
