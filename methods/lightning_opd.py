"""Lightning OPD (arXiv 2604.13010): distillation on rollouts that were sampled and scored once,
before training.

At the first step the policy answers all training problems, and under its teacher's prompt it scores
these answers, log q(y_t). No step samples or asks a teacher again. Every row has the advantage
A_t = log q(y_t) - log p(y_t), with the p of now, and no ratio to the policy that sampled. So the
further p moves, the less the rows are its own.

The authors' code was read: one rollout per problem, beta2 0.98, a rate of 2e-6 at 256 rollouts (and
a weight decay of 0.1, which is not taken over). Their teacher is another model, the one that made
the SFT data. Ours: it is the initial policy, which reads the reference solution. Rollouts and
scores are part of each checkpoint, so that a run which resumes goes on with the same ones. All rows
are trained: none is sampled in a step, so that --no_supervise_mastered would mean nothing. One
whose reference does not fit into --max_reprompt has an advantage of 0.

Teacher reads: the reference, once before training.
Loss: policy gradient with d on rollouts of the initial policy.
Claims more than: none, wiring only: its claim is speed.
"""

from dataclasses import dataclass, replace

import torch

import pmd
from methods import opsd

KEPT = "id prompt_ids ids text finished reward feedback test_pass_rate".split()


@dataclass
class Config(pmd.Config):
    """Lightning OPD."""

    lr: float = pmd.option(
        2e-6, "AdamW's learning rate, constant after the warm-up [Lightning OPD]", within="(0, inf)"
    )
    beta2: float = pmd.option(0.98, "AdamW [Lightning OPD]", within="[0, 1)")
    group_size: int = pmd.option(1, "rollouts per problem [Lightning OPD]", within="[1, inf)")


class Method(opsd.ReferenceTaught):
    Config = Config
    idle = "alpha top_k teacher ema_rate"
    rollouts, scores = {}, {}  # {problem id: its rollouts}, {rollout id: (C,) log q}

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        pmd.need_mastered(cfg)

    def make_teacher(self, policy):
        """Gives the policy: what is kept of the initial one are its scores, not its weights."""
        return policy

    def attempt(self, step, problems):
        if any(p.id not in self.rollouts for p in self.task.train):
            sampled = pmd.attempt(self.sampler, self.task.train, self.cfg)
            self.rollouts, self.scores = pmd.groups_of(sampled), {}
        return [replace(r) for p in problems for r in self.rollouts[p.id]]

    def condition(self, step, rollouts):
        for r in super().condition(step, rollouts):
            r.teacher_ids, r.rollout_logprobs = [], None  # its teacher has scored it
            r.advantage = 0.0
        return rollouts

    def weigh(self, step, rows):
        if not self.scores:
            self.score_all()
        student = pmd.scored(self.policy, rows, lambda r: r.prompt_ids, self.cfg)
        for r in rows:
            if r.id in self.scores:  # its reference fits into --max_reprompt
                r.advantage = self.scores[r.id] - student[r.id][0]

    def score_all(self):
        """Scores all rollouts under the teacher's prompts, while the policy is the initial one."""
        rollouts = sum(self.rollouts.values(), [])
        prompts = pmd.teacher_prompts(
            [r.problem for r in rollouts], self.contexts(0, rollouts), self.tokenizer, self.cfg
        )
        ids = {r.id: ids for r, (_, ids) in zip(rollouts, prompts, strict=True)}
        scores = pmd.scored(self.policy, rollouts, lambda r: ids[r.id] or r.prompt_ids, self.cfg)
        self.scores = {id: logprobs for id, (logprobs, _) in scores.items() if ids[id]}

    def state(self):
        return {
            "rollouts": [
                [r.problem.id, r.problem.prompt, {name: getattr(r, name) for name in KEPT}]
                for r in sum(self.rollouts.values(), [])
            ],
            "scores": {id: logprobs.tolist() for id, logprobs in self.scores.items()},
        }

    def load(self, state):
        problems = {(p.id, p.prompt): p for p in self.task.train}  # --from may be of other ones
        self.rollouts = pmd.groups_of(
            pmd.Rollout(rollout_logprobs=None, problem=problems[id, text], **kept)
            for id, text, kept in state.get("rollouts", [])
            if (id, text) in problems
        )
        self.scores = {id: torch.tensor(row) for id, row in state.get("scores", {}).items()}
