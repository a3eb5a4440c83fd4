"""TRACE (arXiv 2605.10194): GRPO, with a divergence on the few tokens that an annotator marks.

An annotator marks the key spans of successes, at most a quarter of the tokens, and names their
kind. A teacher that reads the kind alone pulls on the marked tokens by forward KL; the others are
reinforced. The divergence is annealed: from then on it is GRPO, without a teacher. This is the
paper's TRACE-FKL; trace_rkl.py marks the errors of failures.

The first page of the paper was read, the rest in notes by others; no code was found. Ours, where
these are silent: the prompt and the kinds of the annotator, which is the policy itself and marks
lines. On nano it is exact and marks operations, and a kind names the operation, since the
checkpoint reads nothing coarser: its teacher knows more than the paper's. Left out: both kinds of
spans in one run, the cap of 0.05 on the divergence of a vocabulary entry, and thinking, which the
paper has on for student and teacher (here see --thinking). The teacher is a copy every 10 steps,
whatever --ema_rate.

Teacher reads: the kind of step that was marked.
Loss: policy gradient, and forward KL on marked tokens of successes.
Claims more than: grpo.
"""

import itertools
import re
from dataclasses import dataclass

import torch

import pmd
from memory import strip_thoughts
from methods import grpo, sdpo
from tasks.references import hidden_rules, on_nano

SHARE = 0.25  # of a rollout's tokens are marked, at most [TRACE]
HOLD = 10  # steps of the whole divergence [TRACE]
FALL = 30  # further steps, in which it falls to 0 [TRACE]
SYNC = 10  # steps between copies of the policy to the teacher [TRACE]
KINDS = "calculation, case analysis, definition, method, reading of the problem"
QUESTION = """Which of these lines {}? Reply with the numbers of at most a quarter of the lines, and
with the kind of step that they are, one of: {}."""


@dataclass
class Config(pmd.Config):
    """TRACE."""

    alpha: float = pmd.option(0.0, "forward KL; see pmd.py [TRACE-FKL]", within="[0, 1]")
    trace_lambda: float = pmd.option(
        0.5, "weight of the divergence at first; 0 for GRPO [TRACE]", within="[0, 1]"
    )


class Method(sdpo.Method):
    Config = Config
    presets = grpo.Method.presets
    asks = True
    idle = "ema_rate"
    succeeds = True  # of the rollouts that are marked
    sought = "decide that the answer is right"
    block = "strategies"  # of memory.compose, where the teacher reads a kind

    def condition(self, step, rollouts):
        pmd.set_advantages(rollouts)
        share = min(1.0, (HOLD + FALL - step) / FALL)
        weight = share * self.cfg.trace_lambda
        if weight <= 0:
            return rollouts
        taught = pmd.supervised(rollouts, self.cfg)
        marked = [r for r in taught if (r.reward >= pmd.SUCCESS) == self.succeeds]
        annotate = self.exact if on_nano(marked) else self.told
        notes = list(annotate(marked))
        problems = [r.problem for r in marked]
        contexts = [context for context, _ in notes]
        prompts = pmd.teacher_prompts(problems, contexts, self.tokenizer, self.cfg)
        for r, (_, names), (prompt, ids) in zip(marked, notes, prompts, strict=True):
            mask = self.mask_of(r, names)
            if ids and mask.any():
                r.teacher_prompt = prompt
                r.teacher_ids = ids
                r.weight = weight * mask
                r.advantage = r.advantage * (1 - share * mask)
        return rollouts

    def mask_of(self, rollout, names):
        """Gives (C,) ones at the tokens, and at those of the lines, that are named."""
        pieces = self.tokenizer.batch_decode([[id] for id in rollout.ids])
        lines = itertools.accumulate((piece.count("\n") for piece in pieces), initial=1)
        named = [p in names or line in names for p, line in zip(pieces, lines, strict=False)]
        mask = torch.tensor(named).float()
        mask[mask.nonzero()[int(SHARE * len(mask)) :]] = 0
        return mask

    def exact(self, rollouts):
        """Yields contexts and the tokens to mark on nano: the hidden operations."""
        for r in rollouts:
            names = hidden_rules(r.problem)
            yield {"strategies": [("rule", name) for name in names]}, names

    def told(self, rollouts):
        """Yields contexts and the numbers of lines to mark, as the policy itself names them."""
        prompts = []
        for r in rollouts:
            text = self.tokenizer.decode(r.ids, skip_special_tokens=True)
            lines = [f"{i}. {line}" for i, line in enumerate(text.split("\n"), 1)]
            prompts.append(
                "\n".join([r.problem.prompt, *lines, QUESTION.format(self.sought, KINDS)])
            )
        for reply in map(strip_thoughts, self.sampler.ask(prompts)):
            kinds = [("kind", kind) for kind in KINDS.split(", ") if kind in reply.lower()]
            numbers = [int(number) for number in re.findall(r"\d+", reply)]
            yield {self.block: kinds[:1]}, numbers

    def follow(self, step):
        if step % SYNC == 0:
            pmd.follow(self.teacher, self.policy, 1.0)
