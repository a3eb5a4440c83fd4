"""PMD as the study varies it: reflections made wrong, lessons unread, a rate that falls.

python pmd.py --method study/variants.py --wrong 0.2
"""

import random
import re
from dataclasses import dataclass, replace

import pmd
from nano.world import OPERATIONS


@dataclass
class Config(pmd.Config):
    wrong: float = pmd.option(
        0.0,
        "share of the operations in the model's reflected strategies that are made wrong",
        within="[0, 1]",
    )
    lessons: bool = pmd.option(True, "whether the teacher reads lessons; they are written anyway")
    falls: bool = pmd.option(False, "the rate falls to 0 over the second half of the run")


class Variant:
    """What the study varies, over any method."""

    Config = Config

    def __init__(self, cfg, *parts):
        super().__init__(cfg, *parts)
        self.lr = cfg.lr

    def remember(self, step, problems, rollouts):
        """Lets the memory read replies of which a share is wrong."""
        if self.memory is None or not self.cfg.wrong:
            return super().remember(step, problems, rollouts)
        generate = self.memory.generate
        self.memory.generate = lambda prompts: self.mistaken(step, prompts, generate(prompts))
        try:
            super().remember(step, problems, rollouts)
        finally:
            self.memory.generate = generate

    def mistaken(self, step, prompts, replies) -> list[str]:
        """Replies in which operations that strategies name are exchanged for others."""
        changed = []
        for prompt, reply in zip(prompts, replies, strict=True):
            rng = random.Random(f"{self.cfg.seed} {step} {prompt}")

            def exchange(claim, rng=rng):
                before, syllable, operation = claim.groups()
                if rng.random() >= self.cfg.wrong:
                    return claim[0]
                return f"{before}{syllable}={rng.choice([o for o in OPERATIONS if o != operation])}"

            changed.append(re.sub(r'("content": " *)(\w+)=(\w+)', exchange, reply))
        return changed

    def contexts(self, step, rollouts):
        contexts = super().contexts(step, rollouts)
        if self.cfg.lessons:
            return contexts
        return [{**context, "lessons": []} for context in contexts]

    def weigh(self, step, rows):
        super().weigh(step, rows)
        if self.cfg.falls:
            left = min(1.0, 2 * (self.cfg.steps - step + 1) / self.cfg.steps)
            self.cfg = replace(self.cfg, lr=self.lr * left)


class Method(Variant, pmd.PMD):
    pass
