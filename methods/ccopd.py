"""CCOPD (arXiv 2605.30251, "Same Evidence, Different Answers"): a student that is told a problem in
pieces follows itself as it answers when told all at once.

The student reads the problem over two turns, with its own reply to the first part between them. The
teacher is the frozen initial policy, and reads all of the problem in one message. On the last reply
the student follows it by reverse KL.

Read in notes by others; no code was found, and only the abstract's claims. Ours: two turns; the
first part is the first half of the problem's sentences, or all of a single one, which the second
message then repeats. On nano a problem has one sentence, so that the evidence is parted and not the
problem: the first message has the problem with the operations of all steps but the last, and the
second message has the last one. There the teacher knows nothing but what the student is told, and
only the answers to prompts in pieces get better. `reward` in the records is that of last replies.
Held-out problems are asked plainly, and should stay as they are.

Teacher reads: the whole problem, told to the student in two turns.
Loss: reverse KL.
Claims more than: none, wiring only: its claim is about problems told in turns.
"""

import re
from dataclasses import dataclass

import pmd
from memory import AGAIN, compose
from methods import sdpo
from methods.rltf_sd import answered
from tasks.references import hidden_rules


@dataclass
class Config(pmd.Config):
    """CCOPD."""

    alpha: float = pmd.option(1.0, "reverse KL; see pmd.py [CCOPD]", within="[0, 1]")
    ema_rate: float = pmd.option(0.0, "the teacher is the initial policy [CCOPD]", within="[0, 1]")


class Method(sdpo.Method):
    Config = Config

    @classmethod
    def check(cls, cfg):
        pmd.PMD.check(cfg)  # groups of one will do

    def attempt(self, step, problems):
        size, told, conversations = self.cfg.group_size, [], []
        firsts = [parts(p)[0] for p in problems]
        replies = self.sampler.answer(problems, size, texts=firsts)
        for p, group in zip(problems, replies, strict=True):
            first, second = parts(p)
            for number, reply in enumerate(group):
                id = f"{step}/{p.id}/{number}"
                told.append(pmd.Rollout(**vars(reply), id=id, problem=p, reward=0.0))
                turns = [("user", first), ("assistant", reply.text), ("user", second)]
                conversations.append(turns)
        return answered(self, told, conversations)

    def condition(self, step, rollouts):
        for r in pmd.supervised(rollouts, self.cfg):
            r.teacher_prompt = whole(r.problem)
            encode = pmd.encoder(self.tokenizer, self.cfg)
            r.teacher_ids = encode(r.teacher_prompt, r.problem.system)
        return rollouts


def whole(problem) -> str:
    """Gives the message that has everything: what the teacher reads."""
    return compose(problem.prompt, strategies=rules(problem))


def parts(problem) -> tuple[str, str]:
    """Gives the two messages in which the student is told the same."""
    if hidden_rules(problem):
        *others, (_, last) = rules(problem)
        return compose(problem.prompt, strategies=others), f"{AGAIN}\n{last}"
    sentences = re.split(r"(?<=[.?!])\s+", problem.prompt)
    half = (len(sentences) + 1) // 2
    return " ".join(sentences[:half]), " ".join(sentences[half:]) or problem.prompt


def rules(problem) -> list[tuple]:
    return [("rule", rule) for rule in hidden_rules(problem)]
