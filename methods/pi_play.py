"""The student of pi-Play (arXiv 2604.14054): GRPO, and a teacher that reads how the problem was
made, whose weight falls to 0.

A_t = A + lambda d_t: see advantage_plus.py. The teacher, an EMA, reads the construction path of a
problem, not its answer. The half of pi-Play that writes problems is not here.

Of the paper third-party notes were read; its repository holds no code. They say that lambda decays
and that the EMA's rate is 0.05. Ours: the values of lambda, and the line to 0 over 50 steps, which
is the student's share of one of the paper's rounds. On nano the path is the hidden operation of
each syllable, told as strategies. Elsewhere it is the key `construction` of the problem's row.

Teacher reads: how the problem was made.
Loss: policy gradient with A + lambda d, lambda falling to 0.
Claims more than: grpo.
"""

from dataclasses import dataclass

import pmd
from methods import advantage_plus
from tasks.references import hidden_rules


def construction(problem) -> list[tuple]:
    """Gives the path on which a problem was made, as strategies (title, content).

    Raises ValueError if the problem has none.
    """
    if rules := hidden_rules(problem):
        return [("rule", operation) for operation in rules]
    if not problem.extra.get("construction"):
        raise ValueError(
            f"problem {problem.id} has no construction path, which the teacher of pi-play reads;"
            " give each row of the task's train.jsonl a text `construction`, or use another method"
        )
    return [("construction", problem.extra["construction"])]


@dataclass
class Config(advantage_plus.Config):
    """The student of pi-Play."""

    ema_rate: float = pmd.option(
        0.05, "of the teacher, once a batch; see pmd.py [pi-Play, by notes]", within="[0, 1]"
    )
    plus_steps: int = pmd.option(
        50,
        "steps over which plus_lambda falls to 0 on a line; 0 keeps it constant [ours]",
        within="[0, inf)",
    )


class Method(advantage_plus.Method):
    Config = Config
    needs = staticmethod(construction)

    def contexts(self, step, rollouts):
        return [{"strategies": construction(r.problem)} for r in rollouts]
