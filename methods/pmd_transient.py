"""PMD-Transient, a control of the paper (Table 3): all of PMD, but the memory ends with each step.

The bank is therefore refreshed in every step, from this step's problems, and the teacher reads it
after that refresh.

Teacher reads: the memory of this step alone.
Loss: PMD's divergence.
Claims more than: none, a control of the paper.
"""

import pmd


class Method(pmd.PMD):
    memory_mode = "transient"
    idle = "behavior_every behaviors_refreshed"

    def refresh_period(self):
        return 1

    def contexts(self, step, rollouts):
        return self.recall(step, rollouts, refreshed=True)

    def end_step(self, step):
        self.memory.forget(step)
