"""RLTF-FM (arXiv 2602.02482, "Expanding the Capabilities of RL via Text Feedback"): attempts over
two turns are reinforced, and the policy learns to say what its critic said.

First and second attempts are reinforced, each under the prompt that it was sampled under. Beside
them the policy is trained on -log p(critique | critic's prompt), times a weight, so that at test
time it can criticise itself. With a weight of 0 this is GRPO over two turns.

Read in notes by others, as rltf_sd.py says, which gives the second attempts and the critiques. The
weight is unknown; 0.1 is ours. Ours, too: each turn's advantage is relative to the same turn of the
group, and the critic's prompt for the policy shows no reference. Control tokens in a critique are
broken before it is learned, and the end of a critique that the limit cut is not learned.

Teacher reads: nothing (there is no teacher); a critic names the first wrong step.
Loss: policy gradient over two turns, and the critique's log-probability.
Claims more than: grpo.
"""

from dataclasses import dataclass, replace

import pmd
from memory import critic_prompt
from methods import rltf_sd


@dataclass
class Config(pmd.Config):
    """RLTF-FM."""

    rltf_feedback: float = pmd.option(
        0.1, "weight of the critique's log-probability; 0 for none [ours]", within="[0, inf)"
    )


class Method(rltf_sd.Method):
    Config = Config

    def condition(self, step, rollouts):
        again = self.second_attempts(rollouts)
        pmd.set_advantages(rollouts)
        pmd.set_advantages(again)
        return rollouts + again + (self.critiques_to_learn() if self.cfg.rltf_feedback else [])

    def critiques_to_learn(self) -> list:
        """Gives the rows that train the policy as its own critic."""
        rows, empty = [], [("user", "")]
        for r, critique in zip(self.failed, self.critiques, strict=True):
            prompt = critic_prompt(r.problem.prompt, r.text)
            row = replace(r, id=f"{r.id}/critique", text=critique)
            row.advantage = self.cfg.rltf_feedback
            row.prompt_ids = pmd.encode_within(self.tokenizer, prompt, self.cfg.max_reprompt)
            begun = pmd.encode_turns(self.tokenizer, empty, given=critique)
            row.ids = begun[len(pmd.encode_turns(self.tokenizer, empty)) :]
            if r.feedback or self.written[r.id].finished:
                row.ids.append(self.tokenizer.eos_token_id)
            row.rollout_logprobs = None  # it was not sampled under this prompt
            rows.append(row)
        return [row for row in rows if row.ids]
