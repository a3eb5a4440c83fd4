"""SDPO (arXiv 2601.20802): the teacher reads what this step's siblings found, and nothing is
remembered.

The rules are those of the authors' code (lasgroup/SDPO): the first successful sibling of the group
is shown, never the rollout's own success; feedback is shown where there is no such sibling; a
rollout without either is not supervised.

Teacher reads: a successful sibling, or feedback.
Loss: a generalized JSD, as PMD's.
Claims more than: grpo.
"""

import pmd


class Method(pmd.PMD):
    remembers = False
    memory_mode = None

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        pmd.need_groups(cfg)

    def remember(self, step, problems, rollouts):
        """Nothing is remembered."""

    def contexts(self, step, rollouts):
        groups, contexts = pmd.groups_of(rollouts), []
        for r in rollouts:
            siblings = [
                s.text for s in groups[r.problem.id] if s is not r and s.reward >= pmd.SUCCESS
            ]
            contexts.append({"solution": siblings[0]} if siblings else {"feedback": r.feedback})
        return contexts
