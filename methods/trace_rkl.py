"""TRACE-RKL (arXiv 2605.10194): see trace.py; it marks the error spans of failures, by reverse KL.

On nano the marked token is the first operation of a failure that is not the hidden one, and the
teacher reads that it is wrong, as the feedback of a world that speaks says it.

Teacher reads: the kind of error that was marked.
Loss: policy gradient, and reverse KL on marked tokens of failures.
Claims more than: grpo.
"""

from dataclasses import dataclass

import pmd
from methods import trace
from tasks.references import hidden_rules


@dataclass
class Config(trace.Config):
    """TRACE-RKL."""

    alpha: float = pmd.option(1.0, "reverse KL; see pmd.py [TRACE-RKL]", within="[0, 1]")


class Method(trace.Method):
    Config = Config
    succeeds = False
    sought = "hold the error that makes the answer wrong"
    block = "lessons"

    def exact(self, rollouts):
        for r in rollouts:
            hidden = hidden_rules(r.problem)
            wrong = [word for word in r.text.split() if "=" in word and word not in hidden][:1]
            yield {"feedback": "".join(wrong).replace("=", "!")}, wrong
