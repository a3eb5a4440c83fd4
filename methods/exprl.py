"""ExpRL (arXiv 2606.17024): GRPO on a dense reward: how much of a reference an answer has.

Nothing is distilled. A judge compares each rollout with a reference that the student never sees,
and advantages are relative to the group's scores. It is the baseline for a method that claims to
gain by a reference.

The authors' code was read: the judge is the same model, and gives 1 to 5 points. Ours: on nano the
score is exact, the share of right steps before the first wrong one, and a failure never has the
whole of it; elsewhere the policy of this step judges, by a prompt of ours, and a reply without
points counts as 1. A success is 1 by the verifier. Left out: the judge of single steps, and the KL
to the initial policy, as for GRPO.

Teacher reads: nothing (there is no teacher).
Loss: policy gradient with the dense reward, relative to the group.
Claims more than: grpo.
"""

import re
from dataclasses import dataclass, replace

import pmd
from memory import strip_thoughts
from methods import grpo
from tasks.nano import verify_steps
from tasks.references import on_nano, reference

QUESTION = """Compare this answer with the reference solution. Reply with one number, from 1 where
nothing of it is right to 5 where it agrees in every step that matters."""


@dataclass
class Config(pmd.Config):
    """ExpRL."""

    lr: float = pmd.option(
        1e-6, "AdamW's learning rate, constant after the warm-up [ExpRL]", within="(0, inf)"
    )


class Method(grpo.Method):
    Config = Config
    reprompts = asks = True
    needs = staticmethod(reference)

    def condition(self, step, rollouts):
        score_of = self.scores(rollouts)
        for group in pmd.groups_of(rollouts).values():
            mean = sum(score_of[r.id] for r in group) / len(group)
            for r in group:
                r.advantage = score_of[r.id] - mean
        return rollouts

    def scores(self, rollouts) -> dict[str, float]:
        """Gives each rollout's dense reward, from 0 to 1."""
        failed = [r for r in rollouts if r.reward < pmd.SUCCESS]
        judge = exact if on_nano(failed) else self.judged
        scores = {r.id: score for r, score in zip(failed, judge(failed), strict=True)}
        return {r.id: scores.get(r.id, 1.0) for r in rollouts}

    def judged(self, rollouts):
        """Yields the policy's own judgements, from 0 for 1 point to 1 for 5."""
        prompts = [
            f"{r.problem.prompt}\n\nReference solution:\n{reference(r.problem)}\n\n"
            f"Answer:\n{r.text}\n\n{QUESTION}"
            for r in rollouts
        ]
        for reply in self.sampler.ask(prompts):
            points = re.findall(r"\b[1-5]\b", strip_thoughts(reply))
            yield (int(points[0]) - 1) / 4 if points else 0.0


def exact(rollouts):
    """Yields the shares of steps of nano that are right, up to the first wrong one."""
    for r in rollouts:
        words, wanted = r.text.split(), r.problem.answer.split()
        ends = [i + 5 for i, word in enumerate(wanted) if "=" in word]  # after its four digits
        right = 0
        for end in ends:
            beginning = replace(r.problem, answer=" ".join(wanted[:end]))
            right += verify_steps(beginning, " ".join(words[:end])).reward
        yield min(right, len(ends) - 1) / len(ends)
