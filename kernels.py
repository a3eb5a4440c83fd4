"""The losses over the vocabulary: the definition, and a chunked form that must equal it.

PMD's Eq. 7 sums KL(p || stopgrad(q)) over the tokens the student wrote: p is the student's next-token distribution, q the
teacher's, which scores the same completion under a richer prompt. The alpha of Table 11 chooses, in the code of SDPO on
which PMD builds, from the family below. D is the divergence at one token and z are the student's logits:

    alpha     D                                                dD/dz
    0         forward KL(q || p)                               p - q
    between   (1 - alpha) KL(p || m) + alpha KL(q || m),       (1 - alpha) p (d - E_p[d]), d = log p - log m
              m = (1 - alpha) p + alpha q
    1         reverse KL(p || q), Eq. 7                        p (d - E_p[d]), d = log p - log q

The ends are KLs by convention, as in SDPO's code; the middle row itself tends to 0 there.

Top-k with tail: p and q are reduced to K + 1 buckets, the student's K most likely tokens and a tail of all the others, and
D is taken between the buckets. With g = dD/dz of the buckets, a top-k token receives its own g, and a token i of the tail
g_tail p_i / p_tail. Deviation from SDPO's code: our tail is the logsumexp over the logits outside the top-k; one minus the
sum of the top-k, as there, cancels where the student is confident. At K = V there is no tail.

The logits of N tokens are too many to hold, so rows are taken a chunk at a time. While a chunk's logits exist, its loss AND
its gradient are formed, in closed form and still in the forward pass; gradients add up in float32, and the backward pass
only scales them. A chunk is large, for its matrix products; within it a loss works through tiles of a few rows, which stay
in the cache, and leaves the gradient where the logits were.

Products run in the dtype of the inputs or of autocast, all else in float32 (float64 for float64 inputs). Errors of loss and
gradients are at most 1.5 times the naive loss's (root mean squares over draws); logits of +-1e4 are safe. Not for float16:
its range is too small for gradients formed before a loss scale is known.

Cost, by `python benchmarks/kernels.py --peers FOLDER` on one CPU thread (AVX2), N 2048, H 512, V 32768, float32, entropies
included, over the four matrix products alone: reverse KL 1.11, JSD 1.14 (Liger-Kernel's JSD 1.46, the least that autograd on
full logits can do 3.07, SDPO's formula as TRL has it 3.73); peak memory 252 MB at N 8192 (416; 12,895; 13,971). With AVX-512
1.05 and 1.09, there in bfloat16 1.33 and 1.39. Not run on a GPU.

Shapes: N tokens, H hidden width, V vocabulary, K top-k, n rows of a chunk or tile. Divergences and entropies are in nats.
Read `oracle` first, then `distill_loss`, `_distill_tile`, `_ChunkedLoss`. Where a head is sharded, call a loss within the
forward pass of the module that holds it, as `ranks.forward` does. This file imports torch only and has no version attribute,
because transformers probes for an unrelated package that is also called `kernels`.
"""
import functools
import math
import warnings
from typing import NamedTuple

import torch

MEMORY_BUDGET = 2**31  # bytes for the logits of one chunk, the student's and the teacher's, as if in float32
LARGEST_CHUNK = 1024   # rows, where nobody asks for more: 512 and 1024 are the fastest (benchmarks/kernels.py)
TILE = 2**17           # logits of a tile, for each thread's cache; times 512 on a GPU, where it was not measured
COMPILE_FROM = 2**25   # logits (N V) of a call whose tile function is compiled: fewer never earn the tens of seconds back


class Distilled(NamedTuple):
    """From `distill_loss`. All but `loss` are detached, without the weight, and 0 in rows of weight 0."""
    loss: torch.Tensor             # ()   weighted sum of the divergences
    divergence: torch.Tensor       # (N,) nats
    logprobs: torch.Tensor         # (N,) the student's log-probability of token_ids
    entropy: torch.Tensor          # (N,) nats, the student's, over the full vocabulary even with top_k
    teacher_entropy: torch.Tensor  # (N,) nats, likewise


class PolicyLoss(NamedTuple):
    """From `policy_loss`. All but `loss` are detached, without the weight, and 0 in rows of weight 0."""
    loss: torch.Tensor      # ()   weighted sum of the surrogates
    logprobs: torch.Tensor  # (N,) log-probability of token_ids
    entropy: torch.Tensor   # (N,) nats
    clipped: torch.Tensor   # (N,) 1 where the clipped branch is active and the token has no gradient


def oracle(student_logits, teacher_logits, alpha, top_k=None):
    """Divergence of each token (N,) in float64, from logits (N, V), by the definition above.

    Differentiable in student_logits only. Ties for the top-k fall as torch.topk breaks them. ValueError for logits of
    different shapes, alpha outside [0, 1] and top_k outside [1, V].
    """
    student, teacher = student_logits.double(), teacher_logits.detach().double()
    _require(student.shape == teacher.shape,
             f"student_logits has shape {tuple(student.shape)}, but teacher_logits has shape {tuple(teacher.shape)}.")
    _check_divergence(alpha, top_k, student.shape[-1])
    if top_k is not None and top_k < student.shape[-1]:
        index = student.topk(top_k, dim=-1).indices                            # (N, K)
        student, teacher = _buckets(student, index), _buckets(teacher, index)  # (N, K + 1)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    if alpha == 0:
        return _kl(log_q, log_p)
    if alpha == 1:
        return _kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(1 - alpha), log_q + math.log(alpha))
    return (1 - alpha) * _kl(log_p, log_m) + alpha * _kl(log_q, log_m)


def _kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _buckets(logits, index):
    """Logits (or log-probabilities) of the tokens in index (n, K), then that of the tail: (n, K + 1)."""
    tail = logits.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, index), tail], dim=-1)


def distill_loss(student_hidden, student_head, teacher_hidden, teacher_head, weights, token_ids, alpha, top_k=None,
                 old_logprobs=None, is_clip=None, chunk_size=None, memory_budget=MEMORY_BUDGET):
    """Weighted sum of per-token divergences from student to teacher (PMD Eq. 7; alpha, top_k: Table 11).

        loss = sum_n weights_n ratio_n D(p_n, q_n),   ratio_n = stopgrad(min(p_n(y_n) / p_old(y_n), is_clip)),
        p = softmax(student_hidden student_head^T), q = softmax(teacher_hidden teacher_head^T), y = token_ids

    student_hidden (N, H), student_head (V, H): receive gradients, each only if it requires one.
    teacher_hidden (N, H'), teacher_head (V, H'): never do, even if the two heads are one tensor.
    weights (N,): of any sign. A row of weight 0 costs nothing and may hold anything (NaN, a padding id).
    token_ids (N,): the tokens the student sampled, for logprobs and the ratio.
    alpha in [0, 1]; top_k in [1, V], or None for the full divergence: see the top of this file.
    old_logprobs (N,): log p_old(y); None makes the ratio 1. is_clip: its upper bound, or None.
    chunk_size: rows of a chunk, else as many as fit memory_budget (bytes), at most 1024. Neither changes the result.

    Returns Distilled. Raises ValueError, naming the argument, where shapes, vocabularies, dtypes or strides do not fit, or
    a value or token id is out of range. A non-finite loss is returned as it is.
    """
    _check("student_", student_hidden, student_head, weights=weights, token_ids=token_ids, old_logprobs=old_logprobs)
    _check("teacher_", teacher_hidden, teacher_head)
    vocabulary = len(student_head)
    _require(len(teacher_head) == vocabulary,
             f"teacher_head has a vocabulary of {len(teacher_head)}, but student_head has one of {vocabulary}.")
    _require(len(teacher_hidden) == len(student_hidden),
             f"teacher_hidden has {len(teacher_hidden)} rows, but student_hidden has {len(student_hidden)}.")
    _require(is_clip is None or is_clip > 0, f"is_clip is {is_clip}, but must be above 0.")
    _check_divergence(alpha, top_k, vocabulary)
    return Distilled(*_sum_over_chunks(
        _distill_tile, (alpha, None if top_k == vocabulary else top_k, is_clip), 5, student_hidden, student_head,
        (teacher_hidden, teacher_head), (token_ids, weights, old_logprobs), chunk_size, memory_budget))


def _distill_tile(logits, teacher_logits, token_ids, weights, old_logprobs, alpha, top_k, is_clip):
    """Replaces logits (n, V) by the gradient, and returns the terms of the loss, then Distilled's others: (5, n)."""
    log_p = logits.to(weights.dtype).log_softmax(-1)                          # (n, V)
    log_q = teacher_logits.to(weights.dtype).log_softmax(-1)                  # (n, V)
    if top_k is None:
        divergence, gradient = _divergence_and_gradient(log_p, log_q, alpha)  # (n,), (n, V)
    else:
        index = logits.topk(top_k, dim=-1).indices                            # (n, K)
        buckets = _buckets(log_p, index)                                      # (n, K + 1)
        divergence, of_buckets = _divergence_and_gradient(buckets, _buckets(log_q, index), alpha)
        share = (log_p - buckets[:, -1:]).exp()  # p_i / p_tail: at most 1 in the tail; the others are replaced
        gradient = (share * of_buckets[:, -1:]).scatter(-1, index, of_buckets[:, :-1])
    logprobs = log_p.gather(-1, token_ids[:, None]).squeeze(-1)
    if old_logprobs is not None:
        ratio = (logprobs - old_logprobs.to(weights.dtype)).exp()
        weights = weights * (ratio if is_clip is None else ratio.clamp(max=is_clip))
    logits.copy_(weights[:, None] * gradient)
    return torch.stack([weights * divergence, divergence, logprobs, _entropy(log_p), _entropy(log_q)])


def _divergence_and_gradient(log_p, log_q, alpha):
    """D (n,) and dD/dz (n, B), from log-probabilities (n, B) over B tokens or buckets.

    Probabilities multiply differences of logarithms, never their infinite ratio, so an underflow gives 0.
    """
    p = log_p.exp()
    if alpha == 0:
        return _kl(log_q, log_p), p - log_q.exp()
    # The clamp matters only where p and q both underflow. The oracle's logaddexp would take one exponential more.
    log_m = log_q if alpha == 1 else p.lerp(log_q.exp(), alpha).clamp(min=torch.finfo(p.dtype).tiny).log()
    difference = log_p - log_m
    student_term = (p * difference).sum(-1)  # E_p[d], which is also KL(p || m)
    gradient = p * (difference - student_term[:, None])
    if alpha == 1:
        return student_term, gradient
    return (1 - alpha) * student_term + alpha * _kl(log_q, log_m), (1 - alpha) * gradient


def _entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def policy_loss(hidden, head, token_ids, advantages, weights, old_logprobs, clip_low, clip_high, clip_dual=None,
                chunk_size=None):
    """Clipped policy-gradient surrogate of PPO and GRPO, as a weighted sum to be minimised.

        loss = sum_n weights_n * -min(r_n A_n, clip(r_n, 1 - clip_low, 1 + clip_high) A_n)
        r_n = p_n(y_n) / p_old(y_n), p = softmax(hidden head^T), y = token_ids, A = advantages

    With clip_dual a term of negative advantage is at most clip_dual |A_n| (dual clip; SDPO's code, through verl's
    compute_policy_loss_vanilla, has 3.0).

    hidden (N, H), head (V, H): receive gradients, each only if it requires one.
    token_ids, advantages (N,); weights (N,) and chunk_size as in `distill_loss`.
    old_logprobs (N,): log p_old(y), or None for the detached log-probabilities of now: the ratio is then exactly 1, and
        its gradient that of log p(y).
    clip_low, clip_high: at least 0. clip_dual: above 1, or None for no such bound.

    Returns PolicyLoss. Raises ValueError as `distill_loss`. A non-finite loss is returned as it is.
    """
    per_row = dict(token_ids=token_ids, weights=weights, advantages=advantages, old_logprobs=old_logprobs)
    _check("", hidden, head, **per_row)
    _require(clip_low >= 0 and clip_high >= 0,
             f"clip_low is {clip_low} and clip_high is {clip_high}, but both must be at least 0.")
    _require(clip_dual is None or clip_dual > 1, f"clip_dual is {clip_dual}, but must be above 1.")
    settings = (clip_low, clip_high, math.inf if clip_dual is None else clip_dual)
    return PolicyLoss(*_sum_over_chunks(_policy_tile, settings, 4, hidden, head, None, per_row.values(), chunk_size))


def _policy_tile(logits, token_ids, weights, advantages, old_logprobs, clip_low, clip_high, clip_dual):
    """As `_distill_tile`, with PolicyLoss's others: (4, n)."""
    log_p = logits.to(weights.dtype).log_softmax(-1)  # (n, V)
    logprobs = log_p.gather(-1, token_ids[:, None]).squeeze(-1)
    advantages = advantages.to(weights.dtype)
    ratio = (logprobs - (logprobs if old_logprobs is None else old_logprobs.to(weights.dtype))).exp()
    # The minimum bounds the ratio from above where A is positive, from below where it is negative; the dual clip bounds it
    # there from above, too. Said this way, an infinite ratio never multiplies an advantage of 0.
    rewarded = advantages >= 0
    clipped = torch.where(rewarded, ratio > 1 + clip_high, (ratio < 1 - clip_low) | (ratio > clip_dual))
    bounded = torch.where(rewarded, ratio.clamp(max=1 + clip_high), ratio.clamp(1 - clip_low, clip_dual))
    terms = -weights * bounded * advantages
    # dr/dz = r (onehot(y) - p). Where the clip is active, the loss does not depend on r.
    slope = torch.where(clipped, 0.0, terms)[:, None]
    logits.copy_((-slope * log_p.exp()).scatter_add(-1, token_ids[:, None], slope))
    return torch.stack([terms, logprobs, _entropy(log_p), (clipped & (advantages != 0)).to(weights.dtype)])


@torch.no_grad()
def score(hidden, head, token_ids, chunk_size=None):
    """log softmax(hidden head^T)[token_ids], (N,), float32 (float64 for float64 inputs), without gradient.

    hidden (N, H), head (V, H), token_ids (N,); chunk_size and ValueError as in `distill_loss`.
    """
    _check("", hidden, head, token_ids=token_ids)
    every_row = torch.ones(len(hidden), device=hidden.device)
    return _sum_over_chunks(_score_tile, (), 2, hidden, head, None, (token_ids, every_row), chunk_size)[1]


def _score_tile(logits, token_ids, weights):
    logits = logits.to(weights.dtype)
    logprobs = logits.gather(-1, token_ids[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return torch.stack([weights * logprobs, logprobs])


def _sum_over_chunks(tile_function, settings, count, hidden, head, teacher, per_row, chunk_size, budget=MEMORY_BUDGET):
    """Drop rows of weight 0, run tile_function over the rest, put its outputs back: loss (), then each (N,).

    tile_function(logits, the teacher's if there is one, *per_row, *settings) sees a few rows. It returns the terms of the
    loss, then its outputs, (count, n), and may leave the gradient of the terms' sum where the logits were. teacher is
    (hidden, head) or None; per_row is token_ids, weights, then tensors with N rows or None.
    """
    vocabulary, teacher = len(head), teacher or ()
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row_bytes = 2 * vocabulary * dtype.itemsize
    _require(chunk_size is None or isinstance(chunk_size, int) and chunk_size >= 1,
             f"chunk_size is {chunk_size}, but must be a whole number, at least 1.")
    _require(chunk_size is not None or budget >= row_bytes,
             f"memory_budget is {budget} bytes, but one row of a vocabulary of {vocabulary} needs {row_bytes}.")
    token_ids, weights, *others = per_row
    keep = weights.detach().nonzero().squeeze(-1)
    per_row = [tensor if tensor is None else tensor.detach().index_select(0, keep)
               for tensor in (token_ids.long(), weights.to(dtype), *others)]
    if len(keep):  # only now, because padding may carry any id
        low, high = (int(end) for end in per_row[0].aminmax())
        _require(0 <= low and high < vocabulary,
                 f"token_ids holds ids from {low} to {high}, but the vocabulary has {vocabulary}.")
    if not torch.is_grad_enabled():  # a Function is told which inputs require gradients even under no_grad
        hidden, head = hidden.detach(), head.detach()
    # Outside the Function, so that autograd itself gives the dropped rows a gradient of 0.
    hidden, *states = (tensor.index_select(0, keep) for tensor in (hidden, *teacher[:1]))
    loss, outputs = _ChunkedLoss.apply(hidden, head, (*states, *teacher[1:]), per_row, tile_function, settings, count,
                                       chunk_size or min(LARGEST_CHUNK, int(budget // row_bytes)))
    return loss, *outputs.new_zeros(len(outputs), len(weights)).index_copy(1, keep, outputs)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a per-token loss of the logits hidden head^T, whose gradient is formed on the way forward."""

    @staticmethod
    def forward(ctx, hidden, head, teacher, per_row, tile_function, settings, count, chunk_size):
        rows, vocabulary, dtype = len(hidden), len(head), per_row[1].dtype
        hidden_needs, head_needs = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden, dtype=dtype) if hidden_needs else None  # (N, H)
        head_gradient = torch.zeros_like(head, dtype=dtype) if head_needs else None        # (V, H)
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)  # which never casts float64
        pairs = [[x.to(torch.get_autocast_dtype(kind)) if autocast and x.dtype != torch.float64 else x for x in pair]
                 for pair in ((hidden, head), teacher) if pair]
        hidden, head = pairs[0]

        tile = min(chunk_size, max(1, TILE * (torch.get_num_threads() if kind == "cpu" else 512) // vocabulary))  # rows
        chunk_size = min(chunk_size, max(1, rows))
        if rows * vocabulary >= COMPILE_FROM:
            tile_function = _compiler(hidden.device)(tile_function)
        else:
            tile = min(tile, chunk_size)
        # Whole tiles, so that no shape ever changes: what they hold beyond the last row is computed and dropped.
        per_row = [tensor if tensor is None else torch.nn.functional.pad(tensor, (0, tile)) for tensor in per_row]
        buffers = [states.new_empty(math.ceil(chunk_size / tile) * tile, vocabulary) for states, _ in pairs]
        # One tensor: a small one a tile, kept between large temporaries, would break the heap to pieces.
        outputs = per_row[1].new_empty(count, rows + tile)
        for start in range(0, rows, chunk_size):
            chunk = slice(start, min(start + chunk_size, rows))
            n = chunk.stop - start
            for (states, weight), logits in zip(pairs, buffers, strict=True):
                torch.mm(states[chunk], weight.T, out=logits[:n])
            for i in range(start, chunk.stop, tile):  # what a tile says of rows beyond its chunk, the next one overwrites
                logits = (buffer[i - start: i - start + tile] for buffer in buffers)
                of_rows = (tensor if tensor is None else tensor[i: i + tile] for tensor in per_row)
                outputs[:, i: i + tile] = tile_function(*logits, *of_rows, *settings)
            gradient = buffers[0][:n]
            if hidden_needs:
                hidden_gradient[chunk] = gradient @ head
            if head_needs and head.dtype == dtype:
                head_gradient.addmm_(gradient.T, hidden[chunk])
            elif head_needs:
                head_gradient += gradient.T @ hidden[chunk]
        loss, outputs = outputs[0, :rows].sum(), outputs[1:, :rows]
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.mark_non_differentiable(outputs)
        return loss, outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, _):
        # The product is still in float32; autograd casts it to the dtype of the input.
        return *(None if saved is None else scale * saved for saved in ctx.saved_tensors), *[None] * 6


@functools.cache
def _compiler(device):
    """torch.compile as it serves here; where it does not work, one warning and no change."""
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        warnings.warn(f"kernels.py runs its losses uncompiled, which is slower: {str(error).splitlines()[0]}", stacklevel=2)
        return lambda function: function
    many = torch._dynamo.config.patch(recompile_limit=64)  # torch.compile takes it as an argument, but not yet in 2.11

    @functools.cache
    def compiled(function):
        fast = torch.compile(function, dynamic=False)

        def call(*args):
            with many:  # it is looked at when a call compiles
                return fast(*args)
        return call
    return compiled


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _check_divergence(alpha, top_k, vocabulary):
    _require(0 <= alpha <= 1, f"alpha is {alpha}, but must be from 0 to 1.")
    _require(top_k is None or isinstance(top_k, int) and 1 <= top_k <= vocabulary,
             f"top_k is {top_k}, but must be a whole number from 1 to the vocabulary of {vocabulary}.")


def _check(role, hidden, head, **per_row):
    """Refuse hidden states and a head that do not fit together, or per-token arguments that do not fit."""
    for name, tensor in ((f"{role}hidden", hidden), (f"{role}head", head)):
        shape = tuple(tensor.shape)
        _require(tensor.dim() == 2, f"{name} has shape {shape}, but must have 2 dimensions.")
        _require(tensor.is_floating_point(), f"{name} is {tensor.dtype}, but must be floating point.")
        _require(tensor.is_contiguous(),
                 f"{name} of shape {shape} has strides {tensor.stride()}, but must be contiguous; call .contiguous() on it.")
    _require(len(head) > 0, f"{role}head has shape {shape}, but must have a vocabulary.")
    _require(hidden.shape[1] == head.shape[1],
             f"{role}hidden has width {hidden.shape[1]}, but {role}head has width {head.shape[1]}.")
    cast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, head.dtype)
    _require(hidden.dtype == head.dtype or cast, f"{role}hidden is {hidden.dtype}, but {role}head is {head.dtype}.")
    for name, tensor in per_row.items():
        said = "is None" if tensor is None else f"has shape {tuple(tensor.shape)}"
        _require(name == "old_logprobs" if tensor is None else tensor.shape == (len(hidden),),
                 f"{name} {said}, but {role}hidden has {len(hidden)} rows.")
        _require(name != "token_ids" or not (tensor.is_floating_point() or tensor.dtype == torch.bool),
                 f"{name} is {getattr(tensor, 'dtype', None)}, but must be an integer type.")
