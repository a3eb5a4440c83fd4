"""ATESD without its controller (arXiv 2605.11458): the teacher reads a part of the reference.

OPSD whose teacher is shown the first floor(a m) of the reference's m segments, and its answer
always, where it is no program. The exposure a goes in a straight line from one value to another
over the run; two equal values are the paper's fixed exposure, of which it finds 0.5 best. atesd.py
learns it.

Read in notes by others; no code was found. Ours: the line from one value to another. Segments are
lines. On nano they are steps, rounded up: the checkpoint reads the first steps of a solution, and
no answer without them. An exposure of 1 is OPSD's prompt.

Teacher reads: a fixed or scheduled part of the reference.
Loss: forward KL.
Claims more than: opsd.
"""

import math
import re
from dataclasses import dataclass

import pmd
from methods import opsd
from tasks.references import reference, short_answer


@dataclass
class Taught(pmd.Config):
    """ATESD."""

    lr: float = pmd.option(
        5e-6, "AdamW's learning rate, constant after the warm-up [OPSD]", within="(0, inf)"
    )
    alpha: float = pmd.option(0.0, "forward KL; see pmd.py [ATESD]", within="[0, 1]")
    ema_rate: float = pmd.option(0.0, "the teacher is the initial policy [OPSD]", within="[0, 1]")


@dataclass
class Config(Taught):
    """ATESD, scheduled."""

    atesd_from: float = pmd.option(0.5, "exposure in the first step [ATESD]", within="[0, 1]")
    atesd_to: float = pmd.option(0.5, "exposure in the last step [ATESD]", within="[0, 1]")


class Method(opsd.ReferenceTaught):
    Config = Config

    def exposure(self, step) -> float:
        """Gives the share of the reference that the teachers of a step read."""
        last = pmd.total_steps(self.task.train, self.cfg)
        progress = (step - 1) / max(1, last - 1)
        return self.cfg.atesd_from + progress * (self.cfg.atesd_to - self.cfg.atesd_from)

    def contexts(self, step, rollouts):
        exposure = self.exposure(step)
        return [exposed(r.problem, exposure) for r in rollouts]


def exposed(problem, exposure) -> dict:
    """Gives the context that shows a share of a problem's reference."""
    text = reference(problem)
    if problem.verifier == "steps":
        head, *segments = re.split(r" (?=[a-z]+ )", text)  # the digits, then a segment a syllable
        shown = math.ceil(exposure * len(segments))
        beginning = " ".join([head, *segments[:shown]]) if shown else ""
    else:
        segments = text.splitlines()
        shown = math.floor(exposure * len(segments))
        answer = short_answer(problem)
        beginning = "\n".join([*segments[:shown], *([f"Answer: {answer}"] if answer else [])])
    return {"solution": text} if shown == len(segments) else {"beginning": beginning}
