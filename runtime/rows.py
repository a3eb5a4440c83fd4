"""Rows through a model: micro-batches, the alignment of student and teacher, log-probabilities, the
sampler's gap.

A row is a pmd.Rollout. Shape letters: B rows of a micro-batch, T padded length, N completion
tokens, C those of one completion, H hidden, V vocabulary.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import torch

from kernels import score
from runtime.clock import clock
from runtime.logits import logit_scale
from runtime.ranks import compute, forward, gather, rank, reshard, world


def by_tokens(lengths, budget) -> list[list[int]]:
    """Indices grouped into batches of like length, each of at most `budget` padded tokens (at least
    one row).
    """
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def micro_batches(rollouts, cfg, prompt_of=None) -> list[list]:
    """This rank's share of a mini-batch, in micro-batches of `micro_tokens` padded tokens.

    Every rank gets as many, the last ones perhaps empty: sharded weights are gathered by all ranks
    or by none.
    """

    def longest(row):
        return (
            len(prompt_of(row))
            if prompt_of
            else max(map(len, (row.prompt_ids, row.teacher_ids, *row.teachers)))
        )

    def cut(share):
        lengths = [longest(r) + len(r.ids) for r in share]
        return [[share[i] for i in rows] for rows in by_tokens(lengths, cfg.micro_tokens)]

    shares = [cut(rollouts[i :: world()]) for i in range(world())]
    own = shares[rank()]
    return own + [[]] * (max(map(len, shares)) - len(own))


def completion_hidden(model, prompts, rollouts) -> torch.Tensor:
    """(N, H): the hidden states that predict each token of each rollout's completion, rollout after
    rollout. Their products with the head are the logits.

    This is the alignment of student and teacher: both predict the same completion ids, each after
    its own prompt. Rows are padded on the right, where causal attention never looks, and lengths,
    not pad ids, say what is real.
    """
    lengths = [len(p) + len(r.ids) for p, r in zip(prompts, rollouts, strict=True)]
    clock.count(sum(lengths))
    # (B, T); N may be 0
    tokens = torch.zeros(len(prompts) or 1, max(lengths, default=1), dtype=torch.long)
    rows, columns = [], []
    for b, (prompt, r) in enumerate(zip(prompts, rollouts, strict=True)):
        tokens[b, : lengths[b]] = torch.tensor(prompt + r.ids)
        rows += [b] * len(r.ids)
        columns += range(len(prompt) - 1, lengths[b] - 1)
    # (B, T, H)
    hidden = model.get_decoder()(
        input_ids=tokens.to(model.device), use_cache=False
    ).last_hidden_state
    hidden = hidden[rows, columns]
    scale = logit_scale(model.config)
    return hidden if scale == 1 else hidden * scale


def states_under(model, prompts, rollouts) -> torch.Tensor:
    """Gives completion_hidden as one forward pass of a model, which may be sharded."""
    return forward(model, lambda: completion_hidden(model, prompts, rollouts))


@torch.no_grad()
def own_logprobs(policy, rollouts, cfg):
    """(N,) on the host: the trainer's log-probabilities of the rollouts' tokens."""

    prompts = [r.prompt_ids for r in rollouts]
    with compute(policy, cfg):
        logprobs, _ = forward(policy, lambda: scores_under(policy, prompts, rollouts))
    return logprobs


def scores_under(model, prompts, rollouts) -> tuple:
    """Gives the log-probabilities (N,) and entropies (N,) of completions, in nats, on the host."""
    hidden = completion_hidden(model, prompts, rollouts)
    head = model.get_output_embeddings().weight
    logprobs, entropy = score(hidden, head, token_ids(rollouts, head))
    return logprobs.cpu(), entropy.cpu()


def note_old_logprobs(policy, parts, cfg):
    """Notes the trainer's own log-probabilities in all rows, before the batch's first update.

    parts: lists of rows, each the rows of one update, which are cut as the update cuts them.
    """
    scores = {}
    for part in parts:
        for batch in micro_batches(part, cfg):
            logprobs = own_logprobs(policy, batch, cfg).split([len(r.ids) for r in batch])
            scores |= {r.id: row for r, row in zip(batch, logprobs, strict=True)}
    reshard(policy)
    scores = {id: row for share in gather(scores) for id, row in share.items()}
    for part in parts:
        for r in part:
            r.old_logprobs = scores[r.id]


@dataclass
class Continuation:
    """Holds tokens behind a prompt, which are no rollout, for `scored`."""

    id: tuple  # any, of its own
    ids: list[int]
    prompt_ids: list[int]


def scored(model, rows, prompt_of, cfg) -> dict[str, tuple]:
    """{row id: (log-probabilities (C,), entropies (C,) in nats) of its completion under
    prompt_of(row)}, on the host.

    Each rank scores its share; all get all. Without gradient.
    """

    found = {}
    of_student = all(prompt_of(r) is r.prompt_ids for r in rows)
    with clock("student" if of_student else "teacher"), torch.no_grad(), compute(model, cfg):
        for batch in micro_batches(rows, cfg, prompt_of):
            prompts = [prompt_of(r) for r in batch]
            values = forward(model, functools.partial(scores_under, model, prompts, batch))
            columns = [column.split([len(r.ids) for r in batch]) for column in values]
            found |= {r.id: pair for r, pair in zip(batch, zip(*columns, strict=True), strict=True)}
    reshard(model)
    return {id: pair for part in gather(found) for id, pair in part.items()}


def token_ids(rollouts, like):
    # (N,)
    return torch.tensor([t for r in rollouts for t in r.ids], dtype=torch.long, device=like.device)


def sampler_gap(batch, logprobs) -> dict:
    """Sum and maximum of |log p_trainer - log p_sampler| over a micro-batch's tokens, and their
    number. logprobs (N,): the trainer's now, where the rollouts don't hold older ones of the
    weights that sampled.
    """
    now = logprobs.cpu().split([len(r.ids) for r in batch])
    pairs = [
        (row if r.old_logprobs is None else r.old_logprobs, r.rollout_logprobs)
        for r, row in zip(batch, now, strict=True)
        if r.rollout_logprobs is not None
    ]
    gap = torch.cat([torch.zeros(0), *(ours - theirs for ours, theirs in pairs)]).abs()
    return {
        "sampler_gap": float(gap.sum()),
        "sampler_gap_max": float(gap.max()) if len(gap) else 0.0,
        "compared": len(gap),
    }


def require_small_gap(gaps, step, cfg) -> Counter:
    """Sum of the gaps of all micro-batches and ranks. FloatingPointError where the mean says that
    the sampler does not run the weights that are trained: what it wrote would be learned from at
    wrong ratios.
    """
    gap = functools.reduce(add, gather(functools.reduce(add, gaps, Counter())), Counter())
    mean = gap["sampler_gap"] / max(1, gap["compared"])
    if not mean <= cfg.max_sampler_gap:  # a NaN is neither
        raise FloatingPointError(
            f"sampler and trainer differ by {mean:.3f} nats a token at step {step}, more than "
            f"--max_sampler_gap {cfg.max_sampler_gap}: the sampler does not run the trained weights"
        )
    return gap


def totals(batch, out) -> dict:
    """Sums the per-token values (N,) of a micro-batch's loss: {name: number}.

    Each distilled row keeps its divergences, which a sample shows token by token.
    """
    if "divergence" in out:
        parts = out["divergence"].detach().cpu().split([len(r.ids) for r in batch])
        for row, part in zip(batch, parts, strict=True):
            row.divergence = part if row.teacher_ids else None
    return {name: float(value.detach().sum()) for name, value in out.items()}


def tokens_of(batch, chosen) -> torch.Tensor:
    """(N,) bool on the host: whether a token is of a row for which chosen(row) is true."""
    return torch.tensor([chosen(r) for r in batch for _ in r.ids], dtype=torch.bool)


def pick(values, at):
    """The values (N, ...) of the tokens `at` (N,); None stays None. No copy if they are all."""
    if values is None or bool(at.all()):
        return values
    return values[at.to(values.device)]


def note(out, term, at):
    """Adds a kernel's loss and per-token values, of the tokens `at`, to those of a micro-batch."""
    out["loss"] = out["loss"] + term.loss
    at = at.to(out["logprobs"].device)
    for name in set(term._fields) - {"loss"}:
        values = torch.zeros_like(out["logprobs"])
        values[at] = getattr(term, name).to(values.dtype)
        out[name] = torch.where(at, values, out[name]) if name in out else values


def problem_ids(rollouts) -> str:
    """Names the problems of rollouts in an error."""
    names = list(dict.fromkeys(r.problem.id for r in rollouts))
    return f"problems {', '.join(names[:8])}{' and others' if len(names) > 8 else ''}"


def per_token(batch, value, like) -> torch.Tensor:
    """(N,) float32 where `like` is: value(row), one number or (C,) of them, of each row's
    tokens.
    """
    rows = [torch.as_tensor(value(r)).cpu().expand(len(r.ids)) for r in batch]
    return torch.cat([torch.zeros(0), *rows]).to(like.device, torch.float32)


def add(sums, more) -> Counter:
    """Sums of what is counted, the larger of what is a maximum.

    Not Counter's own +, which drops what is negative.
    """
    total = Counter(sums)
    for name, value in more.items():
        if name.endswith("_max"):
            total[name] = max(total[name], value)
        else:
            total[name] += value
    return total
