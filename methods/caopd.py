"""CaOPD (arXiv 2604.16830, "The Illusion of Certainty"): the student is taught to state how often
it is right.

Every prompt asks for a confidence at the end of the answer. After the group has answered, s is the
share of its rollouts that are right. In each rollout the line with the confidence is replaced by s,
the same s for right and wrong ones. The teacher reads a demonstration that ends in s, too. So the
teacher likes the edited line, and the student learns it beside the solution.

The authors' code was read: forward KL, an EMA of 0.01, and the first three tokens are not trained.
Ours: the demonstration is the reference solution, so that groups without a success are taught, too;
a rollout that the limit cut is not edited. Left out: the note that asks the teacher for s once
more, and the cosine schedule of the rate. The line is no part of the answer that is judged.
Held-out problems are asked for it, too, where the verifier ignores it by itself, as nano's does and
that of programs. On nano all of the claim can be seen but its scale.

Teacher reads: the reference and the group's success rate.
Loss: forward KL on rollouts that state this rate.
Claims more than: none, wiring only: its claim is calibration.
"""

from dataclasses import dataclass, replace

import torch

import pmd
from memory import ASK_CONFIDENCE, CONFIDENCE
from methods import opsd
from tasks.references import reference

FORM = f" Write it as the last line, a number from 0 to 1: {CONFIDENCE} 0.75"
IGNORE_IT = ("steps", "code")  # the verifiers that the line does not reach
UNTRAINED = 3  # tokens at the beginning of an answer [CaOPD]


@dataclass
class Config(pmd.Config):
    """CaOPD."""

    lr: float = pmd.option(
        2e-5, "AdamW's learning rate, constant after the warm-up [CaOPD]", within="(0, inf)"
    )
    alpha: float = pmd.option(0.0, "forward KL; see pmd.py [CaOPD]", within="[0, 1]")
    ema_rate: float = pmd.option(0.01, "of the teacher, once per batch [CaOPD]", within="[0, 1]")


class Method(opsd.ReferenceTaught):
    Config = Config

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        pmd.need_groups(cfg)

    def asked(self, problems):
        return [asking(p).prompt if p.verifier in IGNORE_IT else p.prompt for p in problems]

    def attempt(self, step, problems):
        rollouts = super().attempt(step, [asking(p) for p in problems])
        stated = [r for r in rollouts if r.problem.verifier not in IGNORE_IT]
        answers = [[replace(r, text=without_line(r.text))] for r in stated]
        judged = pmd.verdicts([r.problem for r in stated], answers, self.cfg)
        for r, (_, _, verdict) in zip(stated, judged, strict=True):
            r.reward, r.feedback = verdict.reward, verdict.feedback
        return rollouts

    def contexts(self, step, rollouts):
        self.lines = {}
        for id, group in pmd.groups_of(rollouts).items():
            share = sum(r.reward >= pmd.SUCCESS for r in group) / len(group)
            self.lines[id] = f"\n{CONFIDENCE} {share:.2f}"
        contexts = []
        for r in rollouts:
            solution = reference(r.problem) + self.lines[r.problem.id]
            contexts.append({"solution": solution})
        return contexts

    def condition(self, step, rollouts):
        return [self.edited(r) for r in super().condition(step, rollouts)]

    def edited(self, rollout):
        """Gives the row to train: the rollout, stating the share of its group that is right."""
        row = rollout
        if rollout.finished:
            text = without_line(rollout.text) + self.lines[rollout.problem.id]
            ids = self.tokenizer(text, add_special_tokens=False).input_ids + rollout.ids[-1:]
            row = replace(rollout, text=text, ids=ids, rollout_logprobs=None)
        trained = max(1, len(row.ids) - UNTRAINED)
        row.weight = torch.full((len(row.ids),), len(row.ids) / trained)  # 1 in the mean
        row.weight[:UNTRAINED] = 0.0
        return row


def without_line(text) -> str:
    """Takes off the line with the confidence."""
    answer, line, rest = text.rpartition(CONFIDENCE)
    return answer.rstrip() if line and "\n" not in rest.strip() else text


def asking(problem):
    """Gives the problem with a request for a confidence behind it."""
    form = "" if problem.verifier == "steps" else FORM  # nano knows no other sentence
    return replace(problem, prompt=f"{problem.prompt}\n{ASK_CONFIDENCE}{form}")
