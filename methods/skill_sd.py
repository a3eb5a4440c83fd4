"""Skill-SD (arXiv 2604.10674): GRPO, and a teacher that reads one skill out of a bank that the
model's own attempts fill.

A_t = A + lambda d_t: see advantage_plus.py. Each problem has a bank of skills, and a bandit (UCB)
picks one for its whole group. The teacher is a copy of the student, renewed now and then.

Of the paper third-party notes were read; no code was found. They give lambda 0.001 and the form of
the loss. Ours, where they are silent: a skill is what reflection (memory.py) wrote about a problem
in one step, strategies and lessons together, by the policy itself and not by another model. A
skill's gain is the problem's success rate at its next visit, after the student was taught with the
skill. The bandit is UCB1. Each skill starts with one virtual trial, half won, so that a good record
can beat a new skill within the few visits that a problem gets. For the same reason --ucb is small.
A skill whose insights end in part goes on with the rest. The record of a skill without living
insights stays and is not read. The copy is renewed every 10 steps, whatever --ema_rate, and reads a
skill whatever --tiers and --supervise. One turn, and a reward of 0 or 1. On nano lambda is 0.1, as
in advantage_plus.py.

Teacher reads: what reflection wrote in one step, picked by a bandit.
Loss: policy gradient with A + lambda d.
Claims more than: grpo.
"""

import math
from dataclasses import dataclass

import pmd
from methods import advantage_plus

NEW = (1, 0.5)  # times judged, and sum of gains, of a skill at first [ours]


@dataclass
class Config(advantage_plus.Config):
    """Skill-SD."""

    plus_lambda: float = pmd.option(
        0.001,
        "weight of the teacher's d_t beside the advantage [paper, by notes]",
        within="[0, inf)",
    )
    teacher_every: int = pmd.option(
        10, "steps between the copies of the student to its teacher [ours]", within="[1, inf)"
    )
    ucb: float = pmd.option(
        0.1, "how much UCB favours skills that were shown less often [ours]", within="[0, inf)"
    )


class Method(advantage_plus.Method):
    Config = Config
    presets = {**advantage_plus.Method.presets, "nano": dict(plus_lambda=0.1)}
    remembers = True
    memory_mode = "evolving"
    idle = (
        "alpha top_k ema_rate tiers retrieve_k query_feedback supervise behavior_every"
        " behaviors_refreshed clusters abstractor"
    )

    def __init__(self, *parts):
        super().__init__(*parts)
        self.load({})

    def state(self):
        return {"shown": self.shown, "trials": self.trials}

    def load(self, state):
        self.shown = dict(state.get("shown", {}))  # {problem id: skill}, not judged yet
        self.trials = dict(state.get("trials", {}))  # {skill: as NEW, of those judged}

    def remember(self, step, problems, rollouts):
        for id, group in pmd.groups_of(rollouts).items():
            if id in self.shown:
                times, gains = self.trials.get(self.shown[id], NEW)
                gain = sum(r.reward >= pmd.SUCCESS for r in group) / len(group)
                self.trials[self.shown.pop(id)] = [times + 1, gains + gain]
        self.memory.record(step, rollouts)
        self.memory.reflect(step, problems)

    def contexts(self, step, rollouts):
        ids = list(pmd.groups_of(pmd.supervised(rollouts, self.cfg)))
        banks = self.memory.living_of("insight", ids)
        chosen = {id: self.choose(id, bank) for id, bank in banks.items()}
        return [chosen.get(r.problem.id, {}) for r in rollouts]

    def choose(self, id, bank) -> dict:
        """Picks a problem's skill by UCB1, and notes it: the insights of one step."""
        skills = {}
        for item in bank:
            skills.setdefault(f"{id} {item.born}", []).append(item)
        records = {skill: self.trials.get(skill, NEW) for skill in skills}
        total = sum(times for times, _ in records.values())

        def bound(skill):
            times, gains = records[skill]
            return gains / times + self.cfg.ucb * math.sqrt(2 * math.log(total) / times)

        self.shown[id] = max(skills, key=bound)  # of equal ones the oldest
        kinds = {"strategy": [], "lesson": []}
        for item in skills[self.shown[id]]:
            kinds[item.kind].append((item.title, item.text))
        return {"strategies": kinds["strategy"], "lessons": kinds["lesson"]}

    def follow(self, step):
        if step % self.cfg.teacher_every == 0:
            pmd.follow(self.teacher, self.policy, 1.0)
