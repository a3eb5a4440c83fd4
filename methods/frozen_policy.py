"""Evolving memory under a frozen policy, a control of the paper (Tables 3 and 4): only the memory
learns.

Nothing is trained. The policy would score as the base model does, so that held-out problems read
the memory in their prompt: the insight and the latest success of the --retrieve_k nearest training
problems, and as many behaviors (ours: the paper's "top-3" does not say of what).

Teacher reads: nothing (there is no teacher).
Loss: none: nothing is trained.
Claims more than: none, a control of the paper.
"""

import pmd
from eval import prompts_with


class Method(pmd.PMD):
    teaches = False
    idle = (
        "lr warmup_steps beta2 loss_mean mini_batch_size supervise supervise_mastered"
        " behaviors_refreshed query_feedback"
    )

    def make_teacher(self, policy):
        """Nobody is taught."""
        return policy

    def condition(self, step, rollouts):
        return rollouts

    def asked(self, problems):
        return prompts_with(self.memory, problems, self.tokenizer, self.cfg)
