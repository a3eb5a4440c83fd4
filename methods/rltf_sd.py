"""RLTF-SD (arXiv 2602.02482, "Expanding the Capabilities of RL via Text Feedback"): a critique
makes a second attempt right, and the plain prompt learns the second attempt.

A failure is answered once more: the conversation goes on with a critique of the first attempt. The
row is the plain prompt with the SECOND attempt. Its advantage is its reward minus the mean reward
of the group's FIRST attempts. With one update a batch it has no ratio. With the mean of the second
attempts instead (`--rltf_baseline second`) the signal dies as critiques get better.

Read in notes by others, which have pseudocode; no code of the loss was found. Ours: the critique is
the verifier's feedback, or where it says nothing the policy's own, written beside the reference if
the task has one (the authors' critic is a larger model); a success is not answered again; first
attempts are reinforced, too, as by GRPO, with one mean over all rows, so that they weigh less where
there are more second ones; a conversation longer than --max_reprompt loses the beginning of the
attempt in it. `reward` in the records is that of first attempts.

Teacher reads: nothing (there is no teacher); a critic names the first wrong step.
Loss: policy gradient on second attempts under the plain prompt.
Claims more than: grpo.
"""

import statistics
from dataclasses import dataclass, replace
from typing import Literal

import pmd
from memory import AGAIN, critic_prompt, strip_thoughts
from methods import grpo
from tasks.references import reference_or_nothing


@dataclass
class Config(pmd.Config):
    """RLTF-SD."""

    rltf_baseline: Literal["first", "second"] = pmd.option(
        "first", "whose mean reward a second attempt's is compared with [RLTF-SD]"
    )
    rltf_first: bool = pmd.option(True, "reinforce the first attempts, too [ours]")


class Method(grpo.Method):
    Config = Config
    reprompts = asks = True
    needs = staticmethod(reference_or_nothing)  # where there is one, it is a text

    def condition(self, step, rollouts):
        pmd.set_advantages(rollouts)
        prompts = {r.problem.id: r.prompt_ids for r in rollouts}
        rows = [
            replace(again, prompt_ids=prompts[again.problem.id], rollout_logprobs=None)
            for again in self.second_attempts(rollouts)
        ]
        groups = {"first": pmd.groups_of(rollouts), "second": pmd.groups_of(rows)}
        for r in rows:
            group = groups[self.cfg.rltf_baseline][r.problem.id]
            r.advantage = r.reward - statistics.mean(other.reward for other in group)
        if self.cfg.rltf_first:
            return rollouts + rows
        for r in rollouts:
            r.advantage = None
        return rows or rollouts  # the mean is over second attempts

    def second_attempts(self, rollouts) -> list:
        """Samples an answer after a critique to each failure."""
        self.failed = [r for r in rollouts if r.reward < pmd.SUCCESS]
        self.critiques = self.criticise(self.failed)
        conversations = []
        for r, critique in zip(self.failed, self.critiques, strict=True):
            first = ("user", r.problem.prompt), ("assistant", r.text)
            conversations.append((*first, ("user", f"{AGAIN}\n{critique}")))
        return answered(self, self.failed, conversations)

    def criticise(self, rollouts) -> list[str]:
        """Gives a critique of each: the verifier's feedback, or what the policy says."""
        silent = [r for r in rollouts if not r.feedback]
        prompts = [
            critic_prompt(r.problem.prompt, r.text, reference_or_nothing(r.problem)) for r in silent
        ]
        replies = self.sampler.replies(prompts) if prompts else []
        self.written = {r.id: reply for r, reply in zip(silent, replies, strict=True)}
        return [r.feedback or strip_thoughts(self.written[r.id].text) for r in rollouts]


def answered(method, rollouts, conversations):
    """Samples what each conversation of (role, text) turns is answered by; gives new rollouts."""
    cfg = method.cfg
    limits = "", cfg.max_reprompt, cfg.thinking
    prompts = [
        pmd.encode_turns(method.tokenizer, turns, r.problem.system, *limits)
        for r, turns in zip(rollouts, conversations, strict=True)
    ]
    keys = [("again", r.id) for r in rollouts]
    with pmd.clock("sample"):
        samples = (
            method.sampler.generate(prompts, keys, cfg.max_completion, 1.0, 1.0) if prompts else []
        )
    problems = [r.problem for r in rollouts]
    groups = [[sample] for sample in samples]
    again = []
    for r, judged in zip(rollouts, pmd.verdicts(problems, groups, cfg), strict=True):
        _, sample, verdict = judged
        row = replace(r, **vars(sample), id=f"{r.id}/again", advantage=None)
        row.reward, row.feedback = verdict.reward, verdict.feedback
        row.test_pass_rate = verdict.test_pass_rate
        again.append(row)
    return again
