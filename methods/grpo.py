"""GRPO, as the baseline of SDPO's repository has it: rows with an advantage and without a teacher.

Advantages are group-relative and not divided by their deviation; there is no reference KL. The
clips are 0.2 and 0.28, with a dual clip of 3 (CLIP_LOW, CLIP_HIGH and CLIP_DUAL of pmd.py).

Teacher reads: nothing (there is no teacher).
Loss: policy gradient with A.
Claims more than: none, a baseline.
"""

import pmd
from methods import sdpo


class Method(sdpo.Method):
    # experiments/rich_feedback/run_baseline_grpo.sh; SDPO has 1
    presets = {"livecodebench": dict(mini_batch_size=8)}
    reprompts = teaches = False
    idle = "supervise_mastered"

    def make_teacher(self, policy):
        """Nobody is taught."""
        return policy

    def condition(self, step, rollouts):
        pmd.set_advantages(rollouts)
        return rollouts
