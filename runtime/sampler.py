"""The one seam where text is generated, by transformers' generate."""

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from runtime.chat import encode_within, encoder, turn_ends
from runtime.clock import clock
from runtime.formats import schema_of
from runtime.guide import Guide
from runtime.model import outline
from runtime.options import option
from runtime.ranks import compute, copy_weights, device_of, gather, materialise, rank, world
from runtime.rows import by_tokens


@dataclass
class SamplerOptions:
    """Generation."""

    sampler: Literal["", "vllm", "transformers"] = option(
        "",
        "generates all text (default: vllm on cuda where it is "
        "installed, else transformers) [paper: SGLang]",
    )
    max_completion: int = option(
        8192,
        "maximum tokens of a completion; longer ones are cut and counted [Tab. 11]",
        within="[1, inf)",
    )
    thinking: bool = option(
        False,
        "student and teacher think, if the chat template has a switch for it; reflections do not."
        " The paper has no measurement with thinking [SDPO: off]",
    )
    gpu_memory_utilization: float = option(
        0.5, "share of a GPU's memory that vLLM may use while it is awake [C.1]", within="(0, 1]"
    )
    tensor_parallel: int = option(
        1,
        "ranks that share one vLLM engine, for models that need it (tested on a CPU only) [ours]",
        within="[1, inf)",
    )
    max_sampler_gap: float = option(
        0.1,
        "stop if sampler and trainer differ by more nats per token in the mean [ours]",
        within="(0, inf)",
    )


MEMORY_TEMPERATURE, MEMORY_TOP_P = 0.6, 0.95  # of reflection and abstraction [ours]
NUCLEUS = 64  # tokens that are tried first as those that hold top_p


@dataclass
class Sample:
    """One generated text: its ids (EOS included), the log-probabilities (C,) it was sampled with,
    and the text.
    """

    prompt_ids: list[int]
    ids: list[int]
    rollout_logprobs: torch.Tensor
    text: str
    finished: bool  # False if the limit cut it


class KeyedSampling(LogitsProcessor):
    """Draws each row's next token with that row's own uniform numbers (B, C), so that batching
    changes no text.

    Token = the inverse of the cumulative distribution at the uniform. The choice is handed to
    transformers' greedy decoding as the only finite logit; the log-probabilities it was drawn with
    are kept in `chosen`.
    """

    def __init__(self, uniforms, temperature, top_p):
        self.uniforms, self.temperature, self.top_p, self.chosen = uniforms, temperature, top_p, []

    def __call__(self, input_ids, scores):
        logprobs = torch.log_softmax(scores.float() / self.temperature, -1)  # (B, V)
        probs, order = logprobs.double().exp(), None
        if self.top_p < 1:
            probs, order = likeliest(probs, self.top_p)
        total = probs.cumsum(-1)
        target = self.uniforms[:, len(self.chosen), None].to(total) * total[:, -1:]
        # (B, 1)
        token = torch.searchsorted(total, target, right=True).clamp(max=total.shape[1] - 1)
        self.chosen.append((probs.gather(1, token) / total[:, -1:]).log().float().squeeze(1))
        token = token if order is None else order.gather(1, token)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def likeliest(probs, top_p):
    """Finds the smallest set of likeliest tokens of each row (B, V) that holds top_p of its mass.

    Returns probabilities (B, K), the likeliest first and 0 outside of the set, and their ids
    (B, K). Sorting whole rows takes more time than a small model does, so some tokens are tried
    first.
    """
    found, order = probs.topk(min(NUCLEUS, probs.shape[-1]))
    mass = found.cumsum(-1)
    if (mass[:, -1] < top_p).any():
        found, order = probs.sort(-1, descending=True)
        mass = found.cumsum(-1)
    return found * (mass - found < top_p), order


class Sampler:
    """The one seam where text is generated: rollouts, reflection, abstraction and evaluation. This
    one uses transformers' generate and works everywhere; VLLM is the fast one.

    Randomness is keyed by the run's seed, the step, what is generated (problem or prompt) and the
    sample's index, not by batch: batching changes no text beyond floating-point ties.
    """

    def __init__(self, policy, tokenizer, cfg):
        self.trained, self.tokenizer, self.cfg, self.step = policy, tokenizer, cfg, 0
        eos = policy.generation_config.eos_token_id
        shipped = eos if isinstance(eos, list) else [eos]
        # all that ends a turn
        self.eos = {tokenizer.eos_token_id, *shipped, *turn_ends(tokenizer)} - {None}
        self.load()

    def load(self):
        self.policy = self.trained
        if world() > 1:  # whole: the ranks of a sharded model can't generate each on its own
            self.policy = outline(self.trained.config)
            materialise(self.policy, device_of(self.cfg), deal=False)
            self.wake()

    def answer(
        self, problems, k, split="train", temperature=1.0, top_p=1.0, texts=None
    ) -> list[list[Sample]]:
        """k samples from the plain prompt of each problem, the only one a student ever sees; from
        `texts` in its place where a memory, or a second turn, stands in the prompt.
        """
        texts = [p.prompt for p in problems] if texts is None else texts
        encode = encoder(self.tokenizer, self.cfg)
        prompts = [encode(text, p.system) for text, p in zip(texts, problems, strict=True)]
        with clock("sample" if split == "train" else "evaluate"):
            samples = self.generate(
                [ids for ids in prompts for _ in range(k)],
                [(split, p.id, j) for p in problems for j in range(k)],
                self.cfg.max_completion,
                temperature,
                top_p,
            )
        return [samples[i * k : (i + 1) * k] for i in range(len(problems))]

    def ask(self, prompts) -> list[str]:
        """The texts of `replies`."""
        return [s.text for s in self.replies(prompts)]

    def replies(self, prompts) -> list[Sample]:
        """The policy's replies to the prompts (user messages) of a memory, or of a method's critic.

        Whatever is longer than --max_reprompt loses its middle; a memory asks for nothing longer.
        """
        limit = self.cfg.memory_completion
        schemas = [None] * len(prompts)
        if self.cfg.memory_format == "guided":
            schemas = [schema_of(prompt, limit) for prompt in prompts]
        digests = [hashlib.sha256(p.encode()).hexdigest() for p in prompts]
        with clock("reflect"):
            return self.generate(
                [encode_within(self.tokenizer, p, self.cfg.max_reprompt) for p in prompts],
                [("ask", d) for d in digests],
                limit,
                MEMORY_TEMPERATURE,
                MEMORY_TOP_P,
                schemas,
            )

    def generate(
        self, prompts, keys, max_new_tokens, temperature, top_p, schemas=None
    ) -> list[Sample]:
        """One sample for each prompt (token ids) with its key (a tuple that JSON can write); every
        rank has them all. schemas: of JSON, one a prompt, or None where a reply is free.
        """
        schemas = schemas or [None] * len(prompts)
        own = dealt(
            prompts, rank() // self.cfg.tensor_parallel, world() // self.cfg.tensor_parallel
        )
        drawn = self.draw(
            [prompts[i] for i in own],
            [keys[i] for i in own],
            max_new_tokens,
            temperature,
            top_p,
            [schemas[i] for i in own],
        )
        if rank() % self.cfg.tensor_parallel == 0:  # one of a team, which draws the same
            clock.count(sum(len(s.prompt_ids) + len(s.ids) for s in drawn))
        samples = dict(pair for part in gather(list(zip(own, drawn, strict=True))) for pair in part)
        return [samples[i] for i in range(len(prompts))]

    def sleep(self):
        """Leaves the device to the trainer; nothing to do where the trainer's own weights
        generate.
        """

    def wake(self):
        """Takes over the trained weights."""
        if self.policy is not self.trained:
            copy_weights(self.trained, self.policy)

    @torch.no_grad()
    def draw(self, prompts, keys, max_new_tokens, temperature, top_p, schemas=None) -> list[Sample]:
        """This rank's samples, batched by length."""
        schemas = schemas or [None] * len(prompts)
        samples = [None] * len(prompts)
        for rows in by_tokens([len(p) + max_new_tokens for p in prompts], self.cfg.micro_tokens):
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for b, i in enumerate(rows):
                ids[b, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[b, longest - len(prompts[i]) :] = 1
            uniforms = np.stack([self._uniforms(keys[i], max_new_tokens) for i in rows])
            draw = KeyedSampling(
                torch.from_numpy(uniforms).to(self.policy.device), temperature, top_p
            )
            processors = [draw]
            if any(schemas[i] for i in rows):
                size = self.policy.get_output_embeddings().weight.shape[0]
                guide = Guide(self.tokenizer, size, self.eos, [schemas[i] for i in rows])
                processors = [guide, draw]
            config = GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(self.eos),
                pad_token_id=self.tokenizer.pad_token_id,
            )
            shipped, self.policy.generation_config = (
                self.policy.generation_config,
                GenerationConfig(),
            )
            # a model's own generation_config (Qwen3's has top_k 20) would fill whatever ours leaves
            # open
            try:
                with compute(self.policy, self.cfg):
                    out = self.policy.generate(
                        input_ids=ids.to(self.policy.device),
                        generation_config=config,
                        attention_mask=mask.to(self.policy.device),
                        logits_processor=LogitsProcessorList(processors),
                    )
            finally:
                self.policy.generation_config = shipped
            logprobs = torch.stack(draw.chosen, 1).cpu()  # (B, C)
            if not torch.isfinite(logprobs).all():
                raise FloatingPointError(
                    f"the policy's logits are no numbers any more at step {self.step}"
                )
            for b, i in enumerate(rows):
                new = out[b, longest:].tolist()
                stop = next((t for t, token in enumerate(new) if token in self.eos), None)
                new = new if stop is None else new[: stop + 1]
                samples[i] = Sample(
                    prompts[i], new, logprobs[b, : len(new)], self.text_of(new), stop is not None
                )
        return samples

    def text_of(self, ids) -> str:
        """What was said: without the token that ends the turn, which need not be a special one."""
        said = ids[:-1] if ids and ids[-1] in self.eos else ids
        return self.tokenizer.decode(said, skip_special_tokens=True).strip()

    def _uniforms(self, key, n):
        return np.random.Generator(np.random.Philox(key=self._number(key))).random(n)

    def _number(self, key):
        """128 bits of seed, step and key."""
        digest = hashlib.sha256(json.dumps([self.cfg.seed, self.step, *key]).encode()).digest()
        return int.from_bytes(digest[:16], "little")


def dealt(prompts, team, teams) -> list[int]:
    """The indices of the prompts that one of several engines answers. Equal neighbours stay
    together, so that an engine's prefix cache holds the prompt that a group shares.
    """
    group = itertools.accumulate(
        int(i > 0 and prompts[i] != prompts[i - 1]) for i in range(len(prompts))
    )
    return [i for i, g in enumerate(group) if g % teams == team]
