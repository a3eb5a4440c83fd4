"""SGSD (arXiv 2605.28791): skills and mistakes of a bank teach, and each is first checked.

Each pair of a skill and a mistake is a teacher of the same rollout. A teacher that found a success
likelier than the student did, or a failure less likely, draws the student. A teacher that was wrong
about the rollout pushes the student away. d_t = log q - log p of the sampled token:

    support s = mean_t clip(d_t, -3, 3), and 0 if |s| <= 0.05, without special tokens
    polarity = sign(s), turned around if the rollout failed
    advantage = sum over pairs of weight * polarity * sigmoid(-d_t^2 / 2) * d_t

The authors' code was read. The pairs are the 8 skills and 8 mistakes that are nearest to the
question, paired by rank; a pair's weight is a softmax over the mean cosines.

On failures a wrong teacher also draws the student, because any other claim finds the text of a
failure unlikely, too. There polarity validates no teacher.

Ours: the bank is the memory's strategies and lessons of all problems, which grows with every step.
The authors make it before training, and add to it every 25 steps. A pair may lack one of the two.
All methods share one sampling budget, where the authors have `--group_size 1`. Left out: LoRA,
gradient clipping at 0.1, masks of think tags and newlines, and the variant with a gated forward KL.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np
import torch

import pmd
from memory import as_context
from methods.avsd import give_teachers
from runtime.store import nearest

CLIP = 3.0  # nats, of d_t in the support
LEAST_SUPPORT = 0.05  # nats


@dataclass
class Config(pmd.Config):
    """SGSD."""

    lr: float = pmd.option(
        5e-6, "AdamW's learning rate, constant after the warm-up [SGSD]", within="(0, inf)"
    )
    teacher: Literal["ema", "live"] = pmd.option(
        "live", "the student's own weights; see pmd.py [SGSD]"
    )
    sgsd_pairs: int = pmd.option(
        8, "pairs of a skill and a mistake, each of them a teacher [SGSD]", within="[1, inf)"
    )


class Method(pmd.PMD):
    Config = Config

    def remember(self, step, problems, rollouts):
        """Writes experience and insight. Nobody reads behaviors."""
        self.memory.record(step, rollouts)
        self.memory.reflect(step, problems)

    def condition(self, step, rollouts):
        problems = {r.problem.id: r.problem for r in rollouts}
        questions = self.memory.question_vectors(problems.values())
        bank = {"strategy": {}, "lesson": {}}
        for item in self.memory.living("insight"):
            bank[item.kind][item.text] = item  # each text once
        ranked = [
            nearest(questions, list(of.values()), self.cfg.sgsd_pairs) for of in bank.values()
        ]
        contexts, self.pair_weights = {}, {}
        for id, question, skills, mistakes in zip(problems, questions, *ranked, strict=True):
            pairs = [list(filter(None, pair)) for pair in zip_longest(skills, mistakes)]
            contexts[id] = [as_context(pair, []) for pair in pairs]
            cosines = [np.mean([item.embedding @ question for item in pair]) for pair in pairs]
            self.pair_weights[id] = torch.tensor(cosines).softmax(0)
        give_teachers(self, rollouts, [contexts[r.problem.id] for r in rollouts])
        return rollouts

    def weigh(self, step, rows):
        student = pmd.scored(self.policy, rows, lambda r: r.prompt_ids, self.cfg)
        for r in rows:
            r.advantage = torch.zeros(len(r.ids)) if r.teachers else None
        for number in range(max(len(r.teachers) for r in rows)):
            taught = [r for r in rows if number < len(r.teachers)]
            scores = pmd.scored(self.teacher, taught, lambda r, k=number: r.teachers[k], self.cfg)
            for r in taught:
                gain = scores[r.id][0] - student[r.id][0]
                weight = self.pair_weights[r.problem.id][number]
                r.advantage += weight * self.pull(r, gain)

    def pull(self, row, gain) -> torch.Tensor:
        """Says how one teacher pulls on each token (C,). gain: d_t (C,)."""
        content = torch.tensor([id not in self.tokenizer.all_special_ids for id in row.ids])
        support = (gain.clamp(-CLIP, CLIP) * content).sum() / content.sum().clamp(min=1)
        polarity = support.sign() * (support.abs() > LEAST_SUPPORT)
        if row.reward <= pmd.SUCCESS:
            polarity = -polarity
        return polarity * content * torch.sigmoid(-(gain**2) / 2) * gain
