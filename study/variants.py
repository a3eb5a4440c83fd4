"""A method as the study runs it: watched, and for one arm with lessons hidden from its teacher.

The arms are the files of arms/.

What is watched changes nothing that is learned, and its time is left out of a run's times.
"""

import time

import numpy as np

from memory import reprompt
from runtime.chat import encode_prompt
from runtime.clock import clock
from runtime.files import append
from runtime.rows import Continuation, scored
from tasks.problem import SUCCESS
from tasks.references import hidden_rules, reference

EVERY = 10  # steps between two looks at the teacher
BLOCKS = ("solution", "strategies", "lessons", "behaviors", "feedback")


def watched(base, lessons=True) -> type:
    """Makes the class of a method that is watched. lessons: whether its teacher reads them."""
    return type("Method", (Watched, base), {"lessons": lessons})


class Watched:
    """Writes watched.jsonl into the run's folder: CPU seconds, and how good the teacher is.

    Teacher quality: on one rollout of each problem of the batch, a failed one if there is one, the
    probability that a reader gives to the right operation at each step, after the right steps
    before it, averaged over the steps. The readers are the student, and the teacher with its
    weights alone, with each block of what it reads alone, and with all of it. All but the first are
    given less the student. It is exact: one pass of the model over the right attempt.
    """

    lessons = True

    def __init__(self, cfg, *parts):
        super().__init__(cfg, *parts)
        self.solved = set()  # ids of problems with a success so far
        self.read = {}  # {rollout id: what its teacher is offered}
        self.spent = self.aside = 0.0  # CPU seconds of the steps so far, and of watching

    def attempt(self, step, problems):
        self.began, self.aside = time.process_time(), 0.0
        return super().attempt(step, problems)

    def contexts(self, step, rollouts):
        contexts = super().contexts(step, rollouts)
        if not self.lessons:
            contexts = [{**context, "lessons": []} for context in contexts]
        self.read = {r.id: context for r, context in zip(rollouts, contexts, strict=True)}
        return contexts

    def condition(self, step, rollouts):
        self.rollouts = rollouts
        self.solved |= {r.problem.id for r in rollouts if r.reward >= SUCCESS}
        return super().condition(step, rollouts)

    def weigh(self, step, rows):
        super().weigh(step, rows)
        if step % EVERY == 0:
            since = time.process_time()
            with clock("evaluate"):
                self.quality = self.look()
            self.aside = time.process_time() - since

    def follow(self, step):
        super().follow(step)
        self.spent += time.process_time() - self.began - self.aside
        if step % EVERY == 0:
            line = {"step": step, "cpu": round(self.spent, 2), "teacher": self.quality}
            append(self.folder / "watched.jsonl", line)

    # -- teacher quality

    def look(self) -> dict:
        """Measures the readers: {solved or unsolved: {reader: [mean, problems]}}."""
        chosen = {}
        for r in self.rollouts:
            held = chosen.get(r.problem.id)
            if held is None or r.reward < SUCCESS <= held.reward:
                chosen[r.problem.id] = r
        plain, richer = [], []
        for r in chosen.values():
            plain.append(self.row(r.problem, "weights", {}))
            for reader, context in self.readers(r).items():
                richer.append(self.row(r.problem, reader, context))
        student = self.probabilities(self.policy, plain)
        values = {(id, "student"): p for (id, _), p in student.items()}
        if self.teaches:
            for (id, reader), p in self.probabilities(self.teacher, plain + richer).items():
                values[id, reader] = p - student[id, "weights"]
        groups = {}
        for (id, reader), value in values.items():
            group = "solved" if id in self.solved else "unsolved"
            groups.setdefault(group, {}).setdefault(reader, []).append(value)
        return {
            group: {name: [round(float(np.mean(v)), 5), len(v)] for name, v in readers.items()}
            for group, readers in groups.items()
        }

    def readers(self, rollout) -> dict:
        """The contexts to measure: each block alone, and all of what the teacher of a row reads."""
        context = self.read.get(rollout.id, {})
        readers = {block: {block: context[block]} for block in BLOCKS if context.get(block)}
        return readers | ({"all": context} if rollout.teacher_ids else {})

    def row(self, problem, reader, context) -> Continuation:
        """Lays out the right attempt at a problem after a prompt."""
        prompt = reprompt(problem, context, self.tokenizer, self.cfg)
        ids = self.tokenizer(reference(problem), add_special_tokens=False)["input_ids"]
        return Continuation((problem.id, reader), ids, encode_prompt(self.tokenizer, prompt))

    def probabilities(self, model, rows) -> dict:
        """Scores rows: {row id: mean probability of the right operation over the steps}."""
        vocabulary = self.tokenizer.get_vocab()
        problems = {problem.id: problem for problem in self.task.train}
        found = scored(model, rows, lambda row: row.prompt_ids, self.cfg)
        means = {}
        for row in rows:
            logprobs, _ = found[row.id]
            where = [row.ids.index(vocabulary[rule]) for rule in hidden_rules(problems[row.id[0]])]
            means[row.id] = float(logprobs[where].exp().mean())
        return means
