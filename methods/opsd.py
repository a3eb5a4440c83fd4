"""OPSD (arXiv 2601.18734): the teacher reads the reference solution, and nothing is remembered.

The frozen initial policy reads the problem with its reference and scores the student's own rollout.
The student follows it by forward KL over the whole vocabulary.

The authors' code was read, and their answer in its issue 14. The defaults are the recipe of that
answer, but for the cap of 0.05 on each vocabulary entry: the gradient lowers an entry above it. The
published scripts have alpha 0.5. Ours: all methods share one sampling budget, where the authors
have `--group_size 1`, and the teacher's prompt ends with memory.py's closing sentence, where theirs
asks to reason anew. With the cap and one update a batch there is no ratio, as in their code. Left
out: LoRA, the teacher's top 50, and the variant whose teacher first explains the reference.

Teacher reads: the reference.
Loss: forward KL.
Claims more than: grpo.
"""

import functools
from dataclasses import dataclass

import kernels
import pmd
from tasks.references import reference


@dataclass
class Config(pmd.Config):
    """OPSD."""

    lr: float = pmd.option(
        5e-6, "AdamW's learning rate, constant after the warm-up [OPSD]", within="(0, inf)"
    )
    alpha: float = pmd.option(0.0, "forward KL; see pmd.py [OPSD]", within="[0, 1]")
    ema_rate: float = pmd.option(0.0, "the teacher is the initial policy [OPSD]", within="[0, 1]")
    opsd_cap: float = pmd.option(
        0.0,
        "bound on each vocabulary entry of the forward KL; 0 for none [ours; OPSD: 0.05]",
        within="[0, inf)",
    )


class ReferenceTaught(pmd.PMD):
    """Is a method whose teacher reads the reference solution."""

    remembers = False
    memory_mode = None
    needs = staticmethod(reference)

    def remember(self, step, problems, rollouts):
        """Nothing is remembered."""

    def contexts(self, step, rollouts):
        return [{"solution": reference(r.problem)} for r in rollouts]


class Method(ReferenceTaught):
    Config = Config

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        if cfg.opsd_cap and (cfg.alpha or cfg.top_k):
            raise ValueError(
                "--opsd_cap bounds the entries of a full forward KL: give --alpha 0 and --top_k 0"
            )

    def divergence(self, hidden, head, teacher_hidden, teacher_head, weights, ids, **ratio):
        teacher = teacher_hidden, teacher_head
        if not self.cfg.opsd_cap:
            return super().divergence(hidden, head, *teacher, weights, ids, **ratio)
        formula = functools.partial(capped_forward_kl, cap=self.cfg.opsd_cap)
        return by_formula(formula, hidden, head, [teacher], weights, ids)


def capped_forward_kl(log_p, log_q, token_ids, cap):
    """Computes KL(q || p) (n,), each entry of its sum at most `cap`, and the entropy of q."""
    q = log_q.exp()
    return (q * (log_q - log_p)).clamp(max=cap).sum(-1), -(q * log_q).sum(-1)


def by_formula(formula, hidden, head, teachers, weights, ids) -> kernels.Distilled:
    """Computes a divergence of one's own, without a ratio to the sampler.

    formula: a token_loss of kernels.chunked_loss that also gives the teacher's entropies. teachers:
    as there. Everything else is as for the hook `divergence`.
    """
    sums = kernels.chunked_loss(formula, hidden, head, ids, weights, teachers)
    losses = sums.loss, sums.token_losses
    return kernels.Distilled(*losses, sums.logprobs, sums.entropy, *sums.outputs)
