"""SOD (arXiv 2605.07725): GRPO, and a teacher whose weight falls in the turns where the student is
further from it than in the first turn.

A_t = A + w_k d_t, see advantage_plus.py. D_k is the mean of |log p - log q| over the tokens of turn
k, and w_k = min((D_1 + e) / (D_k + e), 1 + delta) with e = 1e-6. The weight of the first turn is 1.
The code forms a product over turns, which telescopes to this.

The authors' code was read: delta 0.2, a coefficient of 1, and a rate of 1e-6 at 64 x 16 rollouts.
Their turns are calls of tools, and their teacher is another model. Ours: the teacher is the same
model and reads what SDPO's reads. A turn is a syllable's step on nano, and a line elsewhere.

Teacher reads: what SDPO's teacher reads.
Loss: policy gradient with A + w d, w by turn.
Claims more than: grpo.
"""

from dataclasses import dataclass

import torch

import pmd
from methods import advantage_plus

EPSILON = 1e-6  # [SOD]


@dataclass
class Config(advantage_plus.Config):
    """SOD."""

    lr: float = pmd.option(
        1e-6, "AdamW's learning rate, constant after the warm-up [SOD]", within="(0, inf)"
    )
    plus_lambda: float = pmd.option(
        1.0, "weight of the teacher's w_k d_t beside the advantage [SOD]", within="[0, inf)"
    )
    sod_delta: float = pmd.option(
        0.2, "how far above 1 the weight of a turn may be [SOD]", within="[0, inf)"
    )


class Method(advantage_plus.Method):
    Config = Config

    def shaped(self, row, d):
        turns = self.turns(row)  # (C,)
        sizes = [d[turns == k].abs().mean() + EPSILON for k in range(int(turns[-1]) + 1)]
        weights = (sizes[0] / torch.stack(sizes)).clamp(max=1 + self.cfg.sod_delta)
        weights[0] = 1.0
        return weights[turns] * d

    def turns(self, row):
        """Numbers the turn of each token (C,), from 0. The first turn has what stands before it."""
        texts = [self.tokenizer.decode([id]) for id in row.ids]
        if row.problem.verifier == "steps":  # a step begins with its bare syllable
            begins = [text.strip().isalpha() for text in texts]
        else:
            begins = ["\n" in text for text in [" ", *texts[:-1]]]
        number = torch.tensor(begins).cumsum(0)
        if row.problem.verifier == "steps":
            number = (number - 1).clamp(min=0)
        return number
