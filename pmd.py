"""Procedural Memory Distillation (PMD, arXiv 2607.01480): a policy and a memory that co-evolve.

    python pmd.py                            all of it on the embedded tiny model, in minutes
    python pmd.py --method sdpo              another method: a file of methods/, or your own
    python pmd.py --compare grpo,sdpo,pmd    several in turn, on equal budgets, in one figure

The memory-free student answers each problem several times and a verifier scores the answers. From
those attempts a three-tier memory grows (memory.py). A teacher, the same model reading that memory,
re-scores the student's own tokens, and the student is pulled towards it token by token
(kernels.py). At inference there is no memory.

Read `Config`, `train()` and `PMD`, with Algorithm 1 of the paper beside them.

Shape letters: B rows of a micro-batch, T padded length, N completion tokens of a micro-batch, C
those of one completion, H hidden, V vocabulary, G group.

Deviations from the paper
 1. The divergence is over the full vocabulary and exact (Eq. 7). Table 11's top-k is `--top_k`.
 2. The top-k's tail is a logsumexp over the logits outside it. SDPO's expm1 form is wrong where the
    student is confident.
 3. A dev split is held out of the training problems, to select checkpoints on. `--dev 0` trains on
    all, as Table 10 does.
 4. Behaviors are written by the policy itself, not by GPT-5.4.
 5. A rollout is supervised whenever its teacher prompt differs from its own (`--supervise all`).
    The paper does not say which rollouts are supervised.
 6. Insights are written by the step's own policy before the step goes on. The paper has a server
    that may lag behind (B.1).
 7. `--ground_insights` is on for nano and off elsewhere. Reflection reads one attempt at a time,
    until that attempt has given an insight. An insight must be contained in its evidence. A failure
    that contradicts a strategy ends it, and on nano a success that contradicts a lesson ends it. A
    behavior needs two supports. nano's line of confidence has no counts. See nano/grounded.py.
 8. A batch without a single supervised token takes no optimizer step. verl would step on Adam's
    momentum alone.
 9. nano embeds text by hashing its words. The paper uses Qwen3-Embedding-0.6B.
10. LiveCodeBench's prompts are the published forms in our words. So is SciKnowEval's system message
    if the data come from the Hub.
11. Activations are recomputed in the backward pass outside nano (`--no_gradient_checkpointing`
    switches it off). Without recomputation 8B does not fit on a node of 80 GB cards.
12. The mean over tokens is that of SDPO's code: the token mean of each rollout, summed, divided by
    the number of all rollouts of the mini-batch. This holds for GRPO too. Eq. 7 sums over a
    response's tokens (`--loss_mean sum`).
13. `--lora_rank` trains adapters of a frozen base. It is off by default. The paper trains all
    weights. An averaged teacher averages the two factors of each adapter, not their product.
14. `--memory_format` can ask for reflections and abstractions in another form than B.3's free JSON.
    guided: the sampler can write only the JSON asked for. lines: plain lines, for small models.
"""

import functools
import multiprocessing
import random
import statistics
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from eval import Answers, EvalOptions, evaluate, some_of, verdicts
from kernels import distill_loss
from memory import Memory, MemoryOptions, reprompt
from nano.grounded import GroundedMemory
from runtime import check as checks
from runtime.chat import encode_turns, encode_within, encoder  # noqa: F401  for methods
from runtime.check import (  # noqa: F401  for methods
    need_groups,
    need_mastered,
    need_reverse_kl,
    need_unbounded_logits,
)
from runtime.checkpoint import batches_per_epoch, default_name, total_steps
from runtime.clock import clock
from runtime.flags import Flags, given_flags
from runtime.jobs import at_end, compare, explained, quiet_libraries
from runtime.methods import declared, listed, method_class, method_name, method_of
from runtime.model import ModelOptions, copy_of, folder_or_name, follow, load_policy, make_optimizer
from runtime.open_memory import open_memory
from runtime.options import option
from runtime.policy_gradient import policy_loss
from runtime.ranks import (
    broadcast,
    compute,
    count_ranks,
    end_ranks,
    forward,
    gather,
    rank,
    ranks_around,
    reshard,
    shard,
    whole,
    world,
)
from runtime.rows import (
    add,
    completion_hidden,
    micro_batches,
    note,
    note_old_logprobs,
    own_logprobs,
    per_token,
    pick,
    problem_ids,
    require_small_gap,
    sampler_gap,
    scored,  # noqa: F401  for methods
    states_under,
    token_ids,
    tokens_of,
    totals,
)
from runtime.run import Run, RunOptions
from runtime.sampler import Sample, SamplerOptions
from runtime.services import make_embedder  # noqa: F401  for those who import pmd
from runtime.vllm_sampler import make_sampler
from runtime.watch import lesson_pull
from tasks import TaskOptions
from tasks.problem import SUCCESS, Problem

# What no table, preset or study varies
MAX_GRAD_NORM = 1.0  # [SDPO]
ROLLOUT_CLIP = 2.0  # bound on the per-token ratio of trainer to sampler [SDPO; Tab. 11: per token]
IS_CLIP = 2.0  # bound on the per-token ratio of this update's policy to the batch's [SDPO]
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # of GRPO's ratio [SDPO]
CLIP_DUAL = 3.0  # of GRPO's ratio where the advantage is negative [SDPO: verl's clip_ratio_c]


@dataclass
class Config(TaskOptions, ModelOptions, SamplerOptions, MemoryOptions, EvalOptions, RunOptions):
    """The method and its training.

    The defaults are the paper's SciKnowEval run. A task's preset overrides them, but for what
    `preset_of` leaves a method, and a flag overrides both. In brackets stands where a default comes
    from: Tab. 11, B.1 and "paper" are the PMD paper, "SDPO" its authors' code, "ours" ours. Every
    room of the code declares the options that it reads; here are those of this file.
    """

    method: str = option(
        "pmd",
        "the name of a file of methods/, such as pmd, sdpo or grpo (its docstring says what it"
        " does), or the path of a file of your own. --method NAME --help shows its flags",
    )
    compare: str = option("", "methods to run in turn on equal budgets, such as grpo,sdpo,pmd")
    epochs: int = option(20, "passes over the training problems [Tab. 11]", within="[1, inf)")
    steps: int = option(
        0, "stop after this many batches; 0 for all epochs [ours]", within="[0, inf)"
    )
    batch_size: int = option(32, "problems per batch [Tab. 11]", within="[1, inf)")
    group_size: int = option(8, "rollouts per problem [Tab. 11]", within="[1, inf)")
    mini_batch_size: int = option(
        32,
        "problems per update; with batch_size or more there is one update per batch [Tab. 11]",
        within="[1, inf)",
    )
    lr: float = option(
        1e-5, "AdamW's learning rate, constant after the warm-up [Tab. 11]", within="(0, inf)"
    )
    warmup_steps: int = option(10, "updates of linear warm-up [Tab. 11]", within="[0, inf)")
    beta2: float = option(0.999, "AdamW's second beta [SDPO]", within="[0, 1)")
    loss_mean: Literal["sequence", "token", "sum"] = option(
        "sequence",
        "how the tokens of a mini-batch are averaged, for every method. sequence: each trained"
        " rollout's token mean, summed and divided by ALL rollouts [SDPO's code]. token: one mean"
        " over all trained tokens [the name in SDPO's config]. sum: each rollout's sum over its"
        " tokens, divided by all rollouts [Eq. 7]",
    )

    # distillation
    alpha: float = option(
        0.5,
        "the divergence. 0: forward KL. 1: reverse KL (Eq. 7). Between: generalized JSD [Tab. 11]",
        within="[0, 1]",
    )
    top_k: int = option(
        0,
        "take the divergence over the student's k likeliest tokens and a tail; 0 for the full"
        " vocabulary, exact [deviation 1; Tab. 11 has 100 and 20]",
        within="[0, inf)",
    )
    teacher: Literal["ema", "live"] = option(
        "ema",
        "the teacher's weights. ema: a moving average of the student's [SDPO; Tab. 11]. live: the "
        "student's own weights at this update (Eq. 6)",
    )
    ema_rate: float = option(
        0.05,
        "how far the moving average goes towards the student, once per batch: 0 keeps the initial"
        " policy, 1 copies the student [SDPO]",
        within="[0, 1]",
    )
    max_reprompt: int = option(
        10240,
        "maximum tokens of the teacher's prompt; blocks that do not fit are dropped, see"
        " memory.compose_within [SDPO]",
        within="[1, inf)",
    )
    supervise: Literal["all", "solved"] = option(
        "all",
        "which rollouts a teacher with a memory supervises. all: those whose teacher reads more"
        " than the student [deviation 5]. solved: those whose teacher reads a success, a strategy"
        " or feedback, which is SDPO's rule applied to the whole memory",
    )
    supervise_mastered: bool = option(
        True,
        "also supervise problems whose attempts of this step all succeed; "
        "--no_supervise_mastered leaves them out, as GRPO does in effect [ours]",
    )


# By task; the defaults above are SciKnowEval's. nano/README.md says how nano's were found.
PRESETS = {
    "sciknoweval": {},
    "livecodebench": dict(
        lr=1e-6, warmup_steps=0, mini_batch_size=1, alpha=1.0, ema_rate=0.01, eval_k=4
    ),  # Tab. 11
    "nano": dict(
        steps=80,
        batch_size=8,
        group_size=8,
        max_prompt=64,
        max_completion=32,
        max_reprompt=512,
        lr=1e-3,
        warmup_steps=0,
        beta2=0.95,
        mini_batch_size=8,
        ground_insights=True,
        embedder="hashing",
        gradient_checkpointing=False,
        memory_completion=96,
        clusters=20,
        eval_every=10,
        eval_k=8,
        save_every=40,
    ),
}


def kind_of(model, task) -> str:
    """Gives the kind of a task, by which PRESETS go; that of the embedded model is nano."""
    return "nano" if model == "nano" else task.split("/")[0]


def preset_of(kind, method) -> dict:
    """Gives the preset of a kind of task, but for what a method declares anew.

    These are its divergence, its teacher and its learning rate. nano's rate holds for all methods.
    """
    preset = dict(PRESETS.get(kind, {}))
    for name in declared(method.Config, Config):
        if name in ("alpha", "ema_rate") or (name == "lr" and kind != "nano"):
            preset.pop(name, None)
    return preset | method.presets.get(kind, {})


def train(cfg: Config, checked=None) -> dict:
    """Runs Algorithm 1 with the phases of the method that cfg names; returns the run's summary.

    checked: what `check` returned for cfg, where it was called before.
    """
    task, tokenizer = checked or check(cfg, quiet=rank() > 0)
    policy = shard(load_policy(cfg), cfg)  # float32 master weights
    method = method_of(cfg)(cfg, task, tokenizer, policy)  # makes the teacher
    optimizer = make_optimizer(policy, cfg)
    sampler = method.sampler = make_sampler(policy, tokenizer, cfg)  # all text comes from it
    sampler.sleep()  # what a checkpoint holds is filled in where there is room for it
    run = Run(cfg, task, tokenizer)
    method.folder = run.folder
    method.memory = open_memory(run, method)
    first = run.restore(method, optimizer)
    sampler.wake()
    if run.must_evaluate(first - 1):
        evaluate_held_out(first - 1, run, method)

    for step, problems in batches(task.train, first, cfg):
        sampler.step = step

        # 1. Attempt: the memory-free student answers, the verifier responds               (Eq. 1)
        with run.phase("attempt"):
            rollouts = method.attempt(step, problems)

        # 2. Remember: experience -> insight (per problem) -> behavior (shared)         (Eq. 2, 3)
        with run.phase("remember"):
            method.remember(step, problems, rollouts)

        # 3. Condition the teacher: same completion, richer prompt                      (Eq. 4, 5)
        with run.phase("condition"):
            rows = method.condition(step, rollouts)

        # 4. Distill: match the teacher token by token on the student's own text        (Eq. 6-8)
        with run.phase("distill"):
            learns = any(map(is_trained, rows))
            if learns:
                sampler.sleep()  # the device is the trainer's
            method.weigh(step, rows)
            learns = learns or any(map(is_trained, rows))
            sums = Counter()
            for minibatch in mini_batches(rows, policy, cfg):
                sums = add(sums, update(method, optimizer, minibatch, step))
            method.follow(step)
        with run.phase("sync"):
            if learns:
                sampler.wake()  # with the new weights

        run.log(step, rollouts, rows, sums, method.memory)
        if run.must_evaluate(step):
            evaluate_held_out(step, run, method)
        method.end_step(step)
        if run.must_save(step):
            run.save(step, method, optimizer)

    return run.finish(policy, method.memory)


class PMD:
    """Is the paper, phase by phase. Another method is a file of methods/ that replaces some hooks.

    Rows decide how they are trained (see Rollout): phase 4 does not ask for the method. Every hook
    but check and make_teacher finds cfg, task, tokenizer, policy, teacher, sampler, memory and
    folder (the run's) in self.
    """

    Config = Config  # a method's own flags and defaults: a subclass, in its file
    presets = {}  # {task: {flag: default}}, over PRESETS and under what is given
    remembers = True  # phase 2 writes a memory
    memory_mode = "evolving"  # of memory.Memory; None: there is none
    reprompts = True  # prompts of up to --max_reprompt tokens are read
    teaches = True  # an update has a teacher's pass
    asks = False  # the policy is asked for other text than answers, beside a memory's
    idle = ""  # flags without effect, beside those that the attributes above leave without
    needs = None  # called with each training problem before the run; raises what it lacks

    def __init__(self, cfg, task, tokenizer, policy):
        self.cfg, self.task, self.tokenizer, self.policy = cfg, task, tokenizer, policy
        self.teacher = self.make_teacher(policy)
        self.sampler = self.memory = self.folder = None  # train() sets them

    @classmethod
    def check(cls, cfg):
        """Checks the flags. Raises ValueError, in one sentence, if they do not fit the method."""
        if cfg.memory_from:
            raise ValueError(
                "--memory_from and --method frozen-memory go together; leave one out or give both"
            )

    def memory_class(self) -> type:
        """The class of the memory: that of the paper, or the grounded one (deviation 7)."""
        return GroundedMemory if self.cfg.ground_insights else Memory

    def make_teacher(self, policy):
        """Makes the teacher (Eq. 6): an average that starts at the policy, or the policy itself."""
        return policy if self.cfg.teacher == "live" else copy_of(policy, self.cfg)

    def attempt(self, step, problems) -> list["Rollout"]:
        """Samples G completions of each problem and has them judged (Eq. 1)."""
        return attempt(self.sampler, problems, self.cfg)

    def remember(self, step, problems, rollouts):
        """Writes experience and insight after every batch, behaviors less often (Eq. 2, 3)."""
        self.memory.record(step, rollouts)
        self.memory.reflect(step, problems)
        if step % self.refresh_period() == 0:
            self.memory.abstract(step)

    def refresh_period(self) -> int:
        """Says after how many steps the bank is refreshed: an epoch by default (Eq. 3)."""
        return self.cfg.behavior_every or batches_per_epoch(self.task.train, self.cfg)

    def contexts(self, step, rollouts) -> list[dict]:
        """Says what each rollout's teacher reads: keyword arguments of memory.compose (Eq. 4)."""
        return self.recall(step, rollouts, self.cfg.behaviors_refreshed)

    def recall(self, step, rollouts, refreshed) -> list[dict]:
        """Reads `contexts` from the memory. refreshed: with the bank after this step's refresh."""
        contexts = self.memory.contexts(rollouts, step, self.cfg.tiers.split(","), refreshed)
        if self.cfg.supervise == "solved":
            keys = ("strategies", "solution", "feedback")
            contexts = [context if any(context[k] for k in keys) else {} for context in contexts]
        return contexts

    def condition(self, step, rollouts) -> list["Rollout"]:
        """Gives rollouts their teacher's prompt (Eq. 5); returns the rows that phase 4 trains on.

        A rollout whose teacher prompt equals its own prompt is not supervised.
        """
        contexts = self.contexts(step, rollouts)
        context_of = {r.id: context for r, context in zip(rollouts, contexts, strict=True)}
        taught = supervised(rollouts, self.cfg)
        problems, contexts = [r.problem for r in taught], [context_of[r.id] for r in taught]
        prompts = teacher_prompts(problems, contexts, self.tokenizer, self.cfg)
        for r, (prompt, ids) in zip(taught, prompts, strict=True):
            if prompt != r.problem.prompt:
                r.teacher_prompt, r.teacher_ids = prompt, ids
        return rollouts

    def weigh(self, step, rows):
        """Changes rows by what models say of them, before the first update: see `scored`.

        Give a row that gets its advantage here one before, if only 0.0. Where no row is trained by
        then, the sampler keeps the device.
        """

    def teacher_hidden(self, batch) -> torch.Tensor:
        """Gives the states (N, H) that teach the tokens of rows with teacher_ids (Eq. 6).

        Under the head of self.teacher they become the teacher's distribution.
        """
        return states_under(self.teacher, [r.teacher_ids for r in batch], batch)

    def divergence(self, hidden, head, teacher_hidden, teacher_head, weights, ids, **ratio):
        """Sums the divergences of distilled tokens: arguments and result as of `distill_loss`.

        teacher_hidden: what the hook of that name gave.
        """
        alpha, top_k = self.cfg.alpha, self.cfg.top_k or None
        return distill_loss(
            hidden, head, teacher_hidden, teacher_head, weights, ids, alpha, top_k, **ratio
        )

    def loss(self, batch, total) -> dict:
        """Computes the loss of a micro-batch (Eq. 7): see `loss_of`."""
        return loss_of(self, batch, total)

    def follow(self, step):
        """Moves an EMA teacher once, after the batch's last update (Table 11)."""
        follow(self.teacher, self.policy, self.cfg.ema_rate)

    def end_step(self, step):
        """Comes after the step's evaluation and before its checkpoint."""

    def asked(self, problems) -> list[str] | None:
        """Says what held-out problems read in an evaluation; None is their plain prompt."""

    def state(self) -> dict:
        """Gives what a checkpoint has to hold of the method: values of JSON."""
        return {}

    def load(self, state):
        """Takes up what `state` gave."""


# --------------------------------------------------------------------------------------------------
# Phase 1: attempt
# --------------------------------------------------------------------------------------------------


@dataclass
class Rollout(Sample):
    """Holds a sample that answers a problem, its verdict, and how it is trained.

    rollout_logprobs is None where the text was not sampled under prompt_ids. Such a row has no
    ratio to the sampler, and no part in the sampler gap.
    """

    id: str  # step/problem/sample
    problem: Problem
    reward: float
    feedback: str = ""
    test_pass_rate: float | None = None  # of programs; logged, never a reward
    # How it is trained, as a row of phase 4. Numbers are one a row, or (C,), one a token
    teacher_prompt: str = ""  # the teacher's user message; empty where it has nothing to add
    teacher_ids: list[int] = field(default_factory=list)  # of that prompt; empty: not distilled
    teachers: list[list[int]] = field(default_factory=list)  # further ones, for other methods
    weight: float | torch.Tensor = 1.0  # of its divergence
    # None: it is not reinforced. 0.0 is reinforced, and counts in the mean
    advantage: float | torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None  # (C,) the trainer's, before the batch's first update
    # (C,) nats, for the log alone: what pulled its tokens, on the rank that distilled it
    divergence: torch.Tensor | None = None


def attempt(sampler, problems, cfg) -> list[Rollout]:
    """Samples G completions of each problem from its plain prompt, with their verdicts (Eq. 1)."""
    samples = sampler.answer(problems, cfg.group_size)
    rollouts = []
    for i, (problem, sample, verdict) in enumerate(verdicts(problems, samples, cfg)):
        rollouts.append(
            Rollout(
                **vars(sample),
                id=f"{sampler.step}/{problem.id}/{i % cfg.group_size}",
                problem=problem,
                reward=verdict.reward,
                feedback=verdict.feedback,
                test_pass_rate=verdict.test_pass_rate,
            )
        )
    return rollouts


# --------------------------------------------------------------------------------------------------
# Phase 3: condition the teacher
# --------------------------------------------------------------------------------------------------


def set_advantages(rollouts):
    """Sets advantages relative to the group, not divided by their deviation [SDPO's GRPO]."""
    for group in groups_of(rollouts).values():
        mean = statistics.mean(r.reward for r in group)  # exact: equal rewards leave 0
        for r in group:
            r.advantage = r.reward - mean


def groups_of(rollouts) -> dict[str, list[Rollout]]:
    """Groups rollouts: {problem id: its rollouts}."""
    groups = {}
    for r in rollouts:
        groups.setdefault(r.problem.id, []).append(r)
    return groups


def supervised(rollouts, cfg) -> list[Rollout]:
    """Leaves out mastered problems, whose attempts of the step all succeed, where the flag says so.

    The flag is --no_supervise_mastered.
    """
    failed = {r.problem.id for r in rollouts if r.reward < SUCCESS}
    return [r for r in rollouts if cfg.supervise_mastered or r.problem.id in failed]


def teacher_prompts(problems, contexts, tokenizer, cfg) -> list:
    """Composes and encodes each problem's prompt with its context: its text and its ids.

    Rollouts of a group often share a prompt. Each rank does its share of the problems, since
    seconds of a step are spent here. All ranks get all prompts.
    """
    names = list(dict.fromkeys(p.id for p in problems))
    rank_of = {id: i % world() for i, id in enumerate(names)}
    encode = functools.cache(encoder(tokenizer, cfg))  # it is also counted
    share = {}
    for i, (problem, context) in enumerate(zip(problems, contexts, strict=True)):
        if rank_of[problem.id] == rank():
            text = reprompt(problem, context, tokenizer, cfg, encode)
            share[i] = text, encode(text, problem.system) if text != problem.prompt else []
    prompts = {i: pair for part in gather(share) for i, pair in part.items()}
    return [prompts[i] for i in range(len(problems))]


# --------------------------------------------------------------------------------------------------
# Phase 4: distill
# --------------------------------------------------------------------------------------------------


def parts_of(rows, cfg):
    """Cuts a batch into the rows of each update: `mini_batch_size` problems, as they first come."""
    groups, size = list(groups_of(rows).values()), cfg.mini_batch_size
    return [sum(groups[i : i + size], []) for i in range(0, len(groups), size)]


def mini_batches(rows, policy, cfg):
    """Cuts a batch into `mini_batch_size` problems an update, with all rows of each problem.

    Where a ratio needs them, the trainer's own log-probabilities of the batch are scored first:
    with several updates a batch, and for rows that are reinforced or were sampled under another
    prompt. A single distillation update goes without: its policy IS the one that would be scored.
    """
    parts = parts_of(rows, cfg)
    has_ratio = any(r.advantage is not None or r.rollout_logprobs is None for r in rows)
    several = len(parts) > 1 and any(map(is_trained, rows))
    if has_ratio or several:
        note_old_logprobs(policy, parts, cfg)
    yield from parts


def is_distilled(row) -> bool:
    return bool(row.teacher_ids)


def is_reinforced(row) -> bool:
    return row.advantage is not None


def is_trained(row) -> bool:
    return is_distilled(row) or is_reinforced(row)


def has_signal(row) -> bool:
    """Says whether a row can have a gradient: an advantage of 0 has none."""
    return is_distilled(row) or is_reinforced(row) and bool(torch.as_tensor(row.advantage).any())


class Total(NamedTuple):
    """Says what a mini-batch's mean divides by, and which terms its loss has, on every rank."""

    divisor: int
    distills: bool
    reinforces: bool


def update(method, optimizer, rows, step) -> Counter:
    """Takes one optimizer step on a mini-batch (Eq. 7, 8); returns sums over its trained tokens.

    Rows and tokens are counted over the whole mini-batch before it is cut into micro-batches, so
    that the cut changes neither loss nor gradient. Raises FloatingPointError if a loss or gradient
    is not finite, before it touches the weights.
    """
    policy, cfg = method.policy, method.cfg
    trained = [r for r in rows if is_trained(r)]
    if not any(len(r.ids) for r in trained) or not any(has_signal(r) for r in trained):
        some = micro_batches(rows[:4], cfg)  # the sampler is watched all the same
        gaps = [sampler_gap(batch, own_logprobs(policy, batch, cfg)) for batch in some]
        reshard(policy)
        return add(require_small_gap(gaps, step, cfg), {"updates_skipped": 1})
    counts = {
        "tokens": sum(len(r.ids) for r in trained),
        "distilled_tokens": sum(len(r.ids) for r in trained if is_distilled(r)),
        "reinforced_tokens": sum(len(r.ids) for r in trained if is_reinforced(r)),
    }
    divisor = counts["tokens"] if cfg.loss_mean == "token" else len(rows)
    total = Total(divisor, any(map(is_distilled, trained)), any(map(is_reinforced, trained)))
    sums, gaps = {}, []
    optimizer.zero_grad()
    # transformers recomputes activations in train mode only; nothing else differs
    policy.train(cfg.gradient_checkpointing)
    for batch in micro_batches(trained, cfg):
        with compute(policy, cfg):
            out = forward(policy, functools.partial(method.loss, batch, total))
        loss, logprobs = out["loss"], out.pop("logprobs")
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}, on {problem_ids(batch)}"
            )
        loss.backward()
        reshard(method.teacher)
        gaps.append(sampler_gap(batch, logprobs))
        sums = add(sums, totals(batch, out))
    policy.eval()
    gap = require_small_gap(gaps, step, cfg)
    with clock("optimizer"):
        norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM))
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm.item()} at step {step}, on {problem_ids(trained)}"
            )
        for group in optimizer.param_groups:  # linear warm-up, then constant
            group["lr"] = cfg.lr * min(1.0, (optimizer.updates + 1) / max(1, cfg.warmup_steps))
        optimizer.step()
        optimizer.updates += 1
    sums = functools.reduce(add, gather(sums), gap)
    return add(sums, {**counts, "updates": 1, "grad_norm": float(norm)})


def loss_of(method, batch, total) -> dict:
    """Computes the loss of one micro-batch, its share of the mean over the mini-batch.

    Over one forward pass, the sum of two terms: the divergence of the rows that have a teacher, and
    the policy-gradient surrogate of those that have an advantage.

    total: see Total. Returns the loss (), logprobs (N,) of the batch's tokens, and per-token values
    that are summed up: divergence, entropy and teacher_entropy (nats), clipped.
    """
    policy, cfg = method.policy, method.cfg
    if total.distills:
        # before the student's pass: a live teacher has the student's weights
        with clock("teacher"), torch.no_grad():
            teacher_hidden = method.teacher_hidden([r for r in batch if is_distilled(r)])
    hidden = completion_hidden(policy, [r.prompt_ids for r in batch], batch)  # (N, H)
    head = policy.get_output_embeddings().weight  # (V, H)
    ids = token_ids(batch, head)  # (N,)
    weights = per_token(batch, lambda r: token_weight(r, total.divisor, cfg), head)
    old = None
    if batch and batch[0].old_logprobs is not None:
        old = per_token(batch, lambda r: r.old_logprobs, head)
    sampled = per_token(
        batch, lambda r: r.old_logprobs if r.rollout_logprobs is None else r.rollout_logprobs, head
    )
    if old is not None:
        # the sampler's probabilities are not quite the trainer's
        weights = weights * (old - sampled).exp().clamp(max=ROLLOUT_CLIP)
    out = {"loss": 0.0, "logprobs": torch.zeros_like(weights), "entropy": torch.zeros_like(weights)}
    if total.distills:
        at = tokens_of(batch, is_distilled)
        # with one update a batch p_now is p_old: the rollout correction is the ratio in the kernel
        reference, clip = (sampled, ROLLOUT_CLIP) if old is None else (old, IS_CLIP)
        distilled = method.divergence(
            pick(hidden, at),
            head,
            teacher_hidden,
            method.teacher.get_output_embeddings().weight.detach(),
            pick(weights * per_token(batch, lambda r: r.weight, head), at),
            pick(ids, at),
            old_logprobs=pick(reference, at),
            is_clip=clip,
        )
        note(out, distilled, at)
    if total.reinforces:
        at = tokens_of(batch, is_reinforced)
        advantages = per_token(batch, lambda r: r.advantage if is_reinforced(r) else 0.0, head)
        reinforced = policy_loss(
            pick(hidden, at),
            head,
            pick(ids, at),
            pick(advantages, at),
            pick(weights, at),
            pick(old, at),
            CLIP_LOW,
            CLIP_HIGH,
            CLIP_DUAL,
        )
        note(out, reinforced, at)
    return out


def token_weight(rollout, divisor, cfg) -> float:
    """Gives the weight of a rollout's tokens in the loss of its mini-batch, before the ratios."""
    if cfg.loss_mean == "sequence":
        return 1 / (divisor * max(1, len(rollout.ids)))
    return 1 / divisor


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def evaluate_held_out(step, run, method):
    """Answers dev and test from the plain prompt, or from what the method asks (Tab. 2)."""
    sampler, cfg = method.sampler, method.cfg
    sampler.step = step
    with run.phase("evaluate"):
        for split in ("dev", "test"):
            problems = some_of(getattr(run.task, split), cfg.eval_problems)
            if not problems:
                continue
            texts = method.asked(problems)
            if texts and step == run.origin:
                run.say(split, method.memory.overlap(problems))
            rows = evaluate(sampler, problems, cfg, split, texts)
            pull = lesson_pull(method, step, teacher_prompts) if split == "test" else None
            run.note_answers(step, split, rows, Answers.of(rows).estimates(cfg.task), pull)


def batches(problems, first, cfg):
    """Yields (step, batch) from step `first` on.

    Each epoch has a new order, drawn from seed and epoch. Its remainder is left out.
    """
    per_epoch = batches_per_epoch(problems, cfg)
    for step in range(first, total_steps(problems, cfg) + 1):
        epoch, i = divmod(step - 1, per_epoch)
        order = random.Random(f"{cfg.seed} epoch {epoch}").sample(problems, len(problems))
        yield step, order[i * cfg.batch_size : (i + 1) * cfg.batch_size]


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def check(cfg, quiet=False, ranks=0, checked=None):
    """Checks a run before any work is lost; returns (task, tokenizer).

    quiet: prints nothing of what is left out. ranks: of the job that is to be started, where it is
    not this one's world(). checked: what this gave for another method, with the same flags
    otherwise.

    Raises ValueError, in one sentence that names the flag, if the run can't work.
    """
    method = method_of(cfg)
    method.check(cfg)
    if not quiet:
        checks.name_idle_flags(cfg, method, preset_of(kind_of(cfg.model, cfg.task), method))
    return checks.check(cfg, method, quiet, ranks or world(), checked)


def parse_flags(argv=None) -> Config:
    """Reads the flags: defaults, then the preset of the task or embedded model, then what is given.

    Raises ValueError if there is no such --method.
    """
    argv = given_flags(argv)
    method = method_class(method_name(argv))
    parser = Flags(
        method.Config,
        description=__doc__.split("\n\nRead `Config`")[0],
        usage="python pmd.py [--flag value ...]",
        epilog="Defaults are those of the task: `--model Qwen3-8B --help` shows the paper's.",
    )
    rest = [flag for flag in argv if flag not in ("-h", "--help")]
    if rest != argv:
        parser.epilog += f"\n\n{listed()}"
    given, _ = parser.parse_known_args(rest)
    task = given.task or ("nano" if given.model == "nano" else "sciknoweval/chemistry")
    parser.set_defaults(**preset_of(kind_of(given.model, task), method))
    if given.model == "nano":  # too small to gain by a GPU, let alone by several
        parser.set_defaults(device="cpu")
    cfg = method.Config(**vars(parser.parse_args(argv)))
    return replace(cfg, task=task, model=folder_or_name(cfg.model), method=method_name(argv))


def compared(cfg, argv=None):
    """Gives the folder of a comparison and its runs: several methods, same flags, same budget."""
    checks.refuse_launcher()
    argv = given_flags(argv)
    folder = cfg.name or default_name(cfg)
    runs = {}
    for name in cfg.compare.split(","):
        # a method may have a preset of its own
        run = parse_flags([*argv, "--method", name.strip()])
        run = replace(run, compare="", name=f"{folder}/{Path(run.method).stem}")
        if run.name in runs:
            raise ValueError(
                f"--compare takes different methods, in files of different names, since"
                f" {run.name} is a run's folder; not {cfg.compare!r}"
            )
        runs[run.name] = run
    return Path(cfg.out) / folder, list(runs.values())


def checked_totals(runs, ranks) -> list[int]:
    """Checks runs and gives the steps of each. The problems are loaded once."""
    checked, totals = None, []
    for run in runs:
        checked = check(run, quiet=True, ranks=ranks, checked=checked)
        totals.append(total_steps(checked[0].train, run))
    return totals


def main():
    """Runs the command line. What stops it is one sentence, with the exit status of its kind."""
    with explained(when="before it began"):
        cfg = parse_flags()
        quiet_libraries()
    with explained(cfg, when="before it began", checks=True):
        if cfg.compare:
            folder, runs = compared(cfg)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as checker:
                # what it loads onto a GPU ends with it
                totals = checker.submit(checked_totals, runs, count_ranks(cfg)).result()
            return compare(folder, runs, totals, cfg)
        with ranks_around(cfg) as restarts:
            cfg = replace(cfg, name=cfg.name or broadcast(default_name(cfg)))
            checked = check(cfg, quiet=restarts or rank() > 0, ranks=count_ranks(cfg))
    with explained(cfg, when="before it could save"):
        if not at_end(cfg, checked[0]):
            train(cfg, checked)
    end_ranks()


if __name__ == "__main__":
    import pmd  # a method imports pmd: were this module __main__, there would be two of every class

    pmd.main()
