"""SD-Zero (arXiv 2604.12002, "Self-Distillation Zero"): the teacher reads the student's own attempt
and one bit, whether it was right.

Stage 2: in the assistant's turn the teacher has the attempt before it, and a cue that says whether
it was right. It scores the same attempt once more, and the student follows it there by reverse KL.
There is no sibling, no reference and no feedback. The teacher is frozen.

Stage 1 makes a policy that can revise. After each attempt and its cue a revision is sampled. Those
that are right become rows with an advantage of 1 and, with one update a batch, no ratio, which is
the gradient of SFT: from the prompt to attempt, cue and revision, and from prompt, attempt and cue
to the revision.

The authors' code was read. Paper and README say reverse KL, the script's default is half of each:
here it is the reverse KL. Ours: stage 1 is the first steps of the same run, both kinds of rows at
once, and by default there are none of it, because nano's checkpoint can revise. The authors make
6000 revisions once and train on them for 3 epochs. Left out: the teacher's top 64, and
`--group_size 1`, because all methods share one sampling budget.

Teacher reads: the rollout itself, and whether it was right.
Loss: reverse KL.
Claims more than: grpo.
"""

from dataclasses import dataclass, replace

import pmd
from memory import REVISE_RIGHT, REVISE_WRONG
from methods import sdpo


@dataclass
class Config(pmd.Config):
    """SD-Zero."""

    lr: float = pmd.option(
        5e-6, "AdamW's learning rate, constant after the warm-up [SD-Zero]", within="(0, inf)"
    )
    alpha: float = pmd.option(1.0, "reverse KL; see pmd.py [SD-Zero]", within="[0, 1]")
    ema_rate: float = pmd.option(0.0, "the teacher is frozen [SD-Zero]", within="[0, 1]")
    sd_zero_stage1: int = pmd.option(
        0,
        "steps that train the policy to revise, before the teacher is frozen [ours]",
        within="[0, inf)",
    )


class Method(sdpo.Method):
    Config = Config

    @classmethod
    def check(cls, cfg):
        pmd.PMD.check(cfg)  # groups of one will do

    def condition(self, step, rollouts):
        for r in pmd.supervised(rollouts, self.cfg):
            cue = REVISE_RIGHT if r.reward >= pmd.SUCCESS else REVISE_WRONG
            begun, turn = f"{r.text}\n\n{cue}\n\n", [("user", r.problem.prompt)]
            budget, system = self.cfg.max_reprompt, r.problem.system
            r.teacher_ids = pmd.encode_turns(
                self.tokenizer, turn, system, begun, budget, self.cfg.thinking
            )
            r.teacher_prompt = f"{r.problem.prompt}\n\n{begun}"
        if step > self.cfg.sd_zero_stage1:
            return rollouts
        rows = self.revisions(rollouts)
        for r in rollouts:
            r.teacher_ids, r.teacher_prompt = [], ""
        return rows or rollouts

    def revisions(self, rollouts) -> list:
        """Samples a revision of each attempt; gives two rows for each that is right."""
        rollouts = [r for r in rollouts if r.teacher_ids]
        prompts, keys = [r.teacher_ids for r in rollouts], [("revise", r.id) for r in rollouts]
        with pmd.clock("sample"):
            samples = self.sampler.generate(prompts, keys, self.cfg.max_completion, 1.0, 1.0)
        problems, groups = [r.problem for r in rollouts], [[sample] for sample in samples]
        rows = []
        for r, judged in zip(rollouts, pmd.verdicts(problems, groups, self.cfg), strict=True):
            _, sample, verdict = judged
            if verdict.reward < pmd.SUCCESS:
                continue
            row = replace(r, text=sample.text, ids=sample.ids, reward=verdict.reward)
            row = replace(row, teacher_prompt="", teacher_ids=[], rollout_logprobs=None)
            row.advantage = 1.0
            rows.append(replace(row, id=f"{r.id}/revision", prompt_ids=r.teacher_ids))
            begun = r.teacher_ids[len(r.prompt_ids) :]
            rows.append(replace(row, id=f"{r.id}/whole", ids=begun + sample.ids))
        return rows

    def follow(self, step):
        super().follow(step)
        if step == self.cfg.sd_zero_stage1:
            pmd.follow(self.teacher, self.policy, 1.0)
