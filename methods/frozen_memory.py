"""Frozen memory, a control of the paper (Table 3): the teacher reads the memory of another run,
which never changes.

python pmd.py --method frozen-policy --name lender
python pmd.py --method frozen-memory --memory_from lender

Teacher reads: another run's memory, which never changes.
Loss: PMD's divergence.
Claims more than: none, a control of the paper.
"""

import pmd


class Method(pmd.PMD):
    remembers = False
    memory_mode = "frozen"

    @classmethod
    def check(cls, cfg):
        if not cfg.memory_from:
            raise ValueError(
                "--method frozen-memory and --memory_from RUN go together; `python pmd.py --method "
                f"frozen-policy --name frozen` makes such a run, {cfg.out}/frozen"
            )

    def remember(self, step, problems, rollouts):
        """Nothing is remembered."""
