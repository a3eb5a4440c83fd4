"""ATESD (arXiv 2605.11458): OPSD whose teacher reads as much of the reference as a controller says.

Exposure is the share of the reference that a teacher reads, see atesd_scheduled.py. A controller
draws it from a Beta distribution, for some steps and the whole batch. A decision earns the
discounted sum of the divergence's drops from step to step, and the discounted mean of the
reference's log-probability under the exposed teacher. The controller learns by REINFORCE. The
student follows the frozen teacher by forward KL.

Read in notes by others; no code was found, nor any number of the controller. Ours are therefore all
constants below, and rewards normalised over all decisions so far. A decision's first step earns no
drop, since the divergence changes there with the exposure itself. Left out: the controller's hidden
layer, four of its six inputs, and the penalty on the distribution's entropy. A run of 80 steps
makes 16 decisions.

Teacher reads: as much of the reference as a controller says.
Loss: forward KL.
Claims more than: opsd.
"""

import random
from dataclasses import replace

import torch

import pmd
from methods import atesd_scheduled
from tasks.references import reference

PERIOD, GAMMA = 5, 0.9  # steps of a decision, and the discount of what they earn [ours]
LIKELIHOOD = 0.0244  # of the reference's log-probability in it [ours]: 0.1 for the discounted mean
RATE = 0.5  # the controller's learning rate [ours]: a tenth of it hardly moves in 16 decisions


class Method(atesd_scheduled.Method):
    Config = atesd_scheduled.Taught

    def __init__(self, cfg, task, tokenizer, policy):
        super().__init__(cfg, task, tokenizer, policy)
        # the controller's weights, its decisions, and what was last seen, as means over tokens
        self.memo = {"weights": [[0.0] * 3] * 2, "decisions": [], "divergence": 0.0, "logprob": 0.0}

    def exposure(self, step):
        decisions = self.memo["decisions"]
        if (step - 1) % PERIOD == 0 or not decisions:
            if decisions:
                self.learn(decisions)
            last = pmd.total_steps(self.task.train, self.cfg)
            inputs = [1.0, step / last, self.memo["divergence"]]
            shape, _ = self.controller(inputs)
            drawn = random.Random(f"{self.cfg.seed} exposure {step}").betavariate(*shape.tolist())
            decisions.append({"inputs": inputs, "exposure": drawn, "earned": 0.0})
        return decisions[-1]["exposure"]

    def controller(self, inputs):
        """Gives the two parameters of the Beta distribution, and the controller's weights."""
        weights = torch.tensor(self.memo["weights"], requires_grad=True)
        return 1 + torch.nn.functional.softplus(weights @ torch.tensor(inputs)), weights

    def learn(self, decisions):
        """Takes a step of REINFORCE on the last decision."""
        rewards = torch.tensor([decision["earned"] for decision in decisions])
        advantage = (rewards[-1] - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        shape, weights = self.controller(decisions[-1]["inputs"])
        drawn = torch.tensor(decisions[-1]["exposure"])
        (advantage * torch.distributions.Beta(*shape).log_prob(drawn)).backward()
        self.memo["weights"] = (weights + RATE * weights.grad).tolist()

    def weigh(self, step, rows):
        """Scores the references under their teachers' prompts."""
        self.rows = rows
        probes = [
            replace(r, ids=self.tokenizer(reference(r.problem), add_special_tokens=False).input_ids)
            for r, *_ in pmd.groups_of(pmd.supervised(rows, self.cfg)).values()
        ]
        scores = pmd.scored(self.teacher, probes, lambda r: r.teacher_ids or r.prompt_ids, self.cfg)
        if scores:
            self.memo["logprob"] = float(torch.cat([row for row, _ in scores.values()]).mean())

    def follow(self, step):
        super().follow(step)
        seen = pmd.gather([r.divergence for r in self.rows if r.divergence is not None])
        last = self.memo["divergence"]
        if any(seen):
            self.memo["divergence"] = float(torch.cat(sum(seen, [])).mean())
        i = (step - 1) % PERIOD
        drop = max(0.0, last - self.memo["divergence"]) * (i > 0)
        earned = drop + LIKELIHOOD * self.memo["logprob"]
        self.memo["decisions"][-1]["earned"] += GAMMA**i * earned

    def state(self):
        return self.memo

    def load(self, state):
        self.memo |= state  # after a fork another method's, with other keys
