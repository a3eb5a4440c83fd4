"""Step-aligned critique (arXiv 2606.11173, "The role of feedback alignment in self-distillation"):
the teacher reads the student's own attempt, rewritten from its first wrong step on.

A critic copies the right steps of a rollout word for word, and replaces the first wrong one. Of a
right rollout the teacher reads the rollout itself. So the teacher agrees with the student up to the
error, and its pull stands there. The wrong step is never quoted, since a quoted error anchors the
teacher (measured there). The loss is the forward KL, the teacher has the student's weights.

Read in notes by others; no code was found. Ours: on nano the critic is exact, and its text ends
with the step that it put right, because the checkpoint reads this form. On nano that text is the
beginning of the reference, too, as a step has only one spelling: what alignment gains over a
reference in other words can't be seen there. Elsewhere the critic is the policy of this step, by a
prompt of ours, beside the reference if the task has one. The authors' critic is a larger model,
and condenses and finishes unfinished attempts; here they are copied as others are.

Teacher reads: the rollout, put right from its first wrong step on.
Loss: forward KL.
Claims more than: none, wiring only: its claim is about references in other words.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import pmd
from memory import strip_thoughts
from methods import sdpo
from runtime.sampler import MEMORY_TEMPERATURE, MEMORY_TOP_P
from tasks.references import on_nano, reference, reference_or_nothing

QUESTION = """Copy the attempt word for word up to its first wrong step. Leave that step out.
Write it as it should be, and go on from there to the right answer."""


@dataclass
class Config(pmd.Config):
    """Step-aligned critique."""

    alpha: float = pmd.option(0.0, "forward KL; see pmd.py [step-aligned]", within="[0, 1]")
    teacher: Literal["ema", "live"] = pmd.option(
        "live", "the student's own weights; see pmd.py [step-aligned]"
    )


class Method(sdpo.Method):
    Config = Config
    needs = staticmethod(reference_or_nothing)  # where there is one, it is a text

    @classmethod
    def check(cls, cfg):
        pmd.PMD.check(cfg)  # groups of one will do

    def contexts(self, step, rollouts):
        failed = [r for r in rollouts if r.reward < pmd.SUCCESS]
        rewrite = exact if on_nano(failed) else self.rewritten
        texts = {r.id: text for r, text in zip(failed, rewrite(failed), strict=True)}
        return [{"critique": texts.get(r.id, r.text)} for r in rollouts]

    def rewritten(self, rollouts) -> list[str]:
        """Gives the policy's own rewriting of each attempt."""
        prompts = []
        for r in rollouts:
            parts = [r.problem.prompt, "Attempt:", r.text]
            solution = reference_or_nothing(r.problem)
            parts += ["Reference solution:", solution] if solution else []
            request = "\n\n".join([*parts, QUESTION])
            prompts.append(pmd.encode_within(self.tokenizer, request, self.cfg.max_reprompt))
        keys, limit = [("critique", r.id) for r in rollouts], self.cfg.max_completion
        sampling = MEMORY_TEMPERATURE, MEMORY_TOP_P
        with pmd.clock("reflect"):
            replies = self.sampler.generate(prompts, keys, limit, *sampling) if prompts else []
        return [strip_thoughts(reply.text) for reply in replies]


def exact(rollouts) -> list[str]:
    """Gives the rewriting on nano: the right words, up to and with the step that was wrong."""
    texts = []
    for r in rollouts:
        wanted = reference(r.problem).split()
        pairs = zip(r.text.split(), wanted, strict=False)
        right = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        ends = range(10, len(wanted) + 1, 6)  # four digits, then six words a step
        end = next((end for end in ends if end > right), len(wanted))
        texts.append(" ".join(wanted[:end]))
    return texts
