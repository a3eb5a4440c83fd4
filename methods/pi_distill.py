"""pi-Distill (arXiv 2602.04942, "Privileged Information Distillation"): the policy answers with
privileged information in its prompt, and learns from these answers with it and without it.

Each rollout is sampled under the privileged prompt (q) and becomes two rows: under that prompt,
with weight a, and under the plain one (p), with weight 1 - a. Both have the advantage of
R - beta mean_t(log q - log p), relative to the group. The plain row has the ratio p / q, too.

Of the paper the abstract and the authors' blog were read, and the code of a third party, which puts
the KL into the reward and recommends beta 0.25. Ours: the ratio is at most 2, as every ratio to the
sampler is here; no deviation in the advantage; the information is the reference solution, or its
first steps. Nano's model follows a whole reference, which leaves no advantage but the KL's, so its
preset shows half of the steps, rounded down: nothing of a name of one syllable. `reward` in the
records is that of the privileged prompt.

Teacher reads: the reference or its first steps; it answers, too.
Loss: policy gradient under both prompts.
Claims more than: grpo.
"""

import re
from dataclasses import dataclass, replace

import pmd
from methods import grpo, sdpo
from tasks.references import reference


@dataclass
class Config(pmd.Config):
    """pi-Distill."""

    pi_share: float = pmd.option(
        0.5, "a: the share of the rows under the privileged prompt [paper]", within="[0, 1]"
    )
    pi_beta: float = pmd.option(
        0.25, "weight of the KL in the reward [a third party's code]", within="[0, inf)"
    )
    pi_shown: float = pmd.option(
        1.0, "share of the reference's steps in the privileged prompt [ours]", within="[0, 1]"
    )


class Method(sdpo.Method):
    Config = Config
    presets = {**grpo.Method.presets, "nano": dict(pi_shown=0.5)}
    idle = "alpha top_k teacher ema_rate"
    needs = staticmethod(reference)

    @classmethod
    def check(cls, cfg):
        super().check(cfg)
        pmd.need_mastered(cfg)

    def make_teacher(self, policy):
        """Gives the policy, which teaches under another prompt."""
        return policy

    def attempt(self, step, problems):
        contexts = [privileged(p, self.cfg.pi_shown) for p in problems]
        prompts = pmd.teacher_prompts(problems, contexts, self.tokenizer, self.cfg)
        told = [replace(p, prompt=text) for p, (text, _) in zip(problems, prompts, strict=True)]
        rollouts = pmd.attempt(self.sampler, told, self.cfg)
        plain = {p.id: p for p in problems}
        for r in rollouts:
            r.teacher_prompt = r.problem.prompt
            r.problem = plain[r.problem.id]
        return rollouts

    def condition(self, step, rollouts):
        pmd.set_advantages(rollouts)
        self.pairs = []
        rows = []
        for r in rollouts:
            ids = pmd.encoder(self.tokenizer, self.cfg)(r.problem.prompt, r.problem.system)
            plain = replace(r, id=f"{r.id}/plain", prompt_ids=ids, rollout_logprobs=None)
            self.pairs.append((r, plain))
            rows += [r] * (self.cfg.pi_share > 0) + [plain] * (self.cfg.pi_share < 1)
        return rows

    def weigh(self, step, rows):
        both = sum(self.pairs, ())
        logprobs = pmd.scored(self.policy, both, lambda r: r.prompt_ids, self.cfg)
        d = {}
        penalised = []
        for r, plain in self.pairs:
            d[r.id] = logprobs[r.id][0] - logprobs[plain.id][0]
            # to six places: where both prompts are the same, float error is no reward
            divergence = round(float(d[r.id].mean()), 6)
            penalised.append(replace(r, reward=r.reward - self.cfg.pi_beta * divergence))
        pmd.set_advantages(penalised)
        share = self.cfg.pi_share
        for (r, plain), gain in zip(self.pairs, penalised, strict=True):
            ratio = (-d[r.id]).exp().clamp(max=pmd.ROLLOUT_CLIP)
            # the mean is over all rows
            advantage = gain.advantage * len(rows) / len(penalised)
            r.advantage = share * advantage
            plain.advantage = (1 - share) * advantage * ratio


def privileged(problem, shown):
    """Says what the privileged prompt adds: the reference, or its first steps or lines."""
    text = reference(problem)
    if shown == 1:
        return {"solution": text}
    step = r".*?=\S+(?: \d)+" if problem.verifier == "steps" else r".+\n*"
    steps = re.findall(step, text)
    return {"beginning": "".join(steps[: int(shown * len(steps))])}
