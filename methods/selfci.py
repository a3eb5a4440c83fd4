"""SELFCI (arXiv 2605.20258): two teachers, each with its own feedback, whose product is followed.

One teacher reads what solves the problem, the other what was wrong with the attempt. The loss is
KL(p || q_1) + KL(p || q_2). It has the gradient of twice the KL to their normalised geometric mean,
whose logits are the mean of theirs. So the mean of their last hidden states is one teacher.

Only the abstract was read, and no hyper-parameters were found. There, one feedback is about utility
and the other about what must not be disclosed. Ours: the first teacher reads a successful sibling,
the second the verifier's feedback, by SDPO's rules otherwise. A rollout with one of the two has one
teacher. Where the verifier says nothing, this is SDPO with a reverse KL, so that plain worlds can't
test the claim.

Teacher reads: two contexts, a successful sibling and feedback.
Loss: reverse KL to the product of both.
Claims more than: sdpo.
"""

from dataclasses import dataclass

import pmd
from methods import sdpo
from methods.avsd import give_teachers


@dataclass
class Config(pmd.Config):
    """SELFCI."""

    alpha: float = pmd.option(1.0, "reverse KL; see pmd.py [SELFCI]", within="[0, 1]")


class Method(sdpo.Method):
    Config = Config

    def make_teacher(self, policy):
        pmd.need_unbounded_logits(policy, self.cfg)
        return super().make_teacher(policy)

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        pmd.need_reverse_kl(cfg)  # two teachers are followed as one

    def condition(self, step, rollouts):
        rows = super().condition(step, rollouts)
        shown = zip(rows, self.contexts(step, rows), strict=True)
        solved = {r.id for r, context in shown if "solution" in context}
        both = [r for r in pmd.supervised(rows, self.cfg) if r.id in solved and r.feedback]
        give_teachers(self, both, [[{"feedback": r.feedback}] for r in both])
        for r in both:
            if r.teachers == [r.prompt_ids]:  # its feedback did not fit into --max_reprompt
                r.teachers = []
            elif r.teacher_ids:
                r.weight = 2.0  # the loss is a sum over two teachers
            else:  # the solution did not fit
                (r.teacher_ids,), r.teachers = r.teachers, []
        return rows

    def teacher_hidden(self, batch):
        first = super().teacher_hidden(batch)
        prompts = [r.teachers[0] if r.teachers else r.teacher_ids for r in batch]
        second = pmd.states_under(self.teacher, prompts, batch)
        return (first + second) / 2
