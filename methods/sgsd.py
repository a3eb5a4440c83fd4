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
Nobody reads its behaviors. The authors make it before training, and add to it every 25 steps. A
pair may lack one of the two. Pairs are read whatever --tiers and --supervise. All methods share one
sampling budget, where the authors have `--group_size 1`. Left out: LoRA, gradient clipping at 0.1,
masks of think tags and newlines, the variant with a gated forward KL, sampling at temperature 1.1
with top-p 0.95 and top-k 20, and a teacher that thinks where the student does not.

Teacher reads: pairs of a strategy and a lesson, each checked by the verdict.
Loss: policy gradient with a gated d.
Claims more than: opsd.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

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
    idle = "alpha top_k tiers retrieve_k query_feedback supervise behaviors_refreshed"

    def condition(self, step, rollouts):
        problems = {r.problem.id: r.problem for r in rollouts}
        pairs = self.pairs(problems) if pmd.rank() == 0 else None  # whose memory it is
        contexts, self.pair_weights = pmd.broadcast(pairs)
        taught = pmd.supervised(rollouts, self.cfg)
        give_teachers(self, taught, [contexts[r.problem.id] for r in taught])
        for r in rollouts:
            r.advantage = 0.0 if r.teachers else None  # reinforced, by what weigh finds
        return rollouts

    def pairs(self, problems):
        """Gives contexts and weights of each problem's pairs: two {id: one a pair}."""
        questions = self.memory.question_vectors(problems.values())
        bank = {item.text: item for item in self.memory.living("insight")}  # each text once
        ranked = []
        for kind in ("strategy", "lesson"):
            items = [item for item in bank.values() if item.kind == kind]
            ranked.append(nearest(questions, items, self.cfg.sgsd_pairs))
        contexts = {}
        weights = {}
        for id, question, *nearby in zip(problems, questions, *ranked, strict=True):
            pairs = [list(filter(None, pair)) for pair in zip_longest(*nearby)]
            contexts[id] = [as_context(pair, []) for pair in pairs]
            cosines = [sum(i.embedding @ question for i in pair) / len(pair) for pair in pairs]
            weights[id] = torch.tensor(cosines).softmax(0)
        return contexts, weights

    def weigh(self, step, rows):
        student = pmd.scored(self.policy, rows, lambda r: r.prompt_ids, self.cfg)
        for number in range(max(len(r.teachers) for r in rows)):
            taught = [r for r in rows if number < len(r.teachers)]
            scores = pmd.scored(self.teacher, taught, lambda r, k=number: r.teachers[k], self.cfg)
            for r in taught:
                pull = self.pull(r, scores[r.id][0] - student[r.id][0])
                r.advantage = r.advantage + self.pair_weights[r.problem.id][number] * pull

    def pull(self, row, gain):
        """Says how one teacher pulls on each token (C,). gain: d_t (C,)."""
        special = set(self.tokenizer.all_special_ids)  # the tokenizer makes a list at each call
        content = torch.tensor([id not in special for id in row.ids])
        gain *= content
        support = gain.clamp(-CLIP, CLIP).sum() / content.sum().clamp(min=1)
        polarity = support.sign() * (support.abs() > LEAST_SUPPORT)
        if row.reward < pmd.SUCCESS:
            polarity = -polarity
        return polarity * torch.sigmoid(-(gain**2) / 2) * gain
