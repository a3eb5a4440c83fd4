"""RCSD (arXiv 2606.19327, "Rethinking Reward Supervision"): OPSD whose teacher reads a rubric and
the answer, in place of a reference solution.

A rubric is a list of criteria that a good solution meets. Each problem's is written once and kept.
The loss is OPSD's: forward KL to the frozen initial policy.

The authors' code was read; it is a fork of OPSD's. Their rubrics are those of a generator that was
not released. Ours: the policy writes the rubric, from the problem and its reference, by a prompt of
ours, when the problem first comes. On nano the criteria are exact, one for each step, since the
checkpoint can't write any, and the answer is left out, because its digits tell the checkpoint
nothing. The cap of 0.05 on a vocabulary entry is off, see opsd.py. All methods share one sampling
budget. Left out: that the teacher first writes what the rubric demands, its top 20, sampling at
temperature 1.2 with top-p 0.95 and top-k 20, and thinking, which the authors have on for student
and teacher (here see --thinking).

Teacher reads: a rubric, and the answer unless it is a program.
Loss: forward KL.
Claims more than: none, wiring only: its claim is about rubrics that a model writes.
"""

import re

from memory import strip_thoughts
from methods import opsd
from methods.opsd import Config  # noqa: F401  RCSD's are the same
from tasks.references import hidden_rules, on_nano, reference, short_answer

QUESTION = """Write the criteria that a good solution meets, at most eight, one a line, so that they
can be checked without the reference. Do not write the answer."""
MOST = 8  # criteria that are kept [ours]
BULLET = r"^\s*(?:[-*]+|\d+[.)])(?:\s+|$)"  # one of a line, so that no number of a criterion goes


class Method(opsd.Method):
    asks = True

    def __init__(self, *parts):
        super().__init__(*parts)
        self.rubrics = {}  # {the problem's text: its criteria}; --from may be of other ids

    def contexts(self, step, rollouts):
        problems = {r.problem.prompt: r.problem for r in rollouts}
        write = exact if on_nano(rollouts) else self.written
        missing = [p for text, p in problems.items() if text not in self.rubrics]
        for p, criteria in zip(missing, write(missing), strict=True):
            self.rubrics[p.prompt] = criteria
        contexts = []
        for r in rollouts:
            context = {"strategies": [("criterion", c) for c in self.rubrics[r.problem.prompt]]}
            if r.problem.verifier != "steps":
                context["solution"] = short_answer(r.problem)
            contexts.append(context)
        return contexts

    def written(self, problems) -> list[list[str]]:
        """Gives the criteria that the policy writes for each problem."""
        prompts = [
            f"{p.prompt}\n\nReference solution:\n{reference(p)}\n\n{QUESTION}" for p in problems
        ]
        replies = self.sampler.ask(prompts) if prompts else []
        rubrics = []
        for reply in replies:
            lines = strip_thoughts(reply).splitlines()
            criteria = [re.sub(BULLET, "", line).strip() for line in lines]
            rubrics.append([line for line in criteria if line][:MOST])
        return rubrics

    def state(self):
        return {"rubrics": self.rubrics}

    def load(self, state):
        self.rubrics = state.get("rubrics", {})


def exact(problems) -> list[list[str]]:
    """Gives a criterion for each step on nano: the operation that is right there."""
    return [hidden_rules(p) for p in problems]
