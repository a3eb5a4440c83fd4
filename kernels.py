"""Computes the losses over the vocabulary: a definition, and a chunked form that equals it.

PMD's Eq. 7 sums KL(p || stopgrad(q)) over the tokens that the student wrote. p is the student's
next-token distribution. q is the teacher's, which scores the same completion under a richer prompt.
The alpha of Table 11 chooses a divergence D from the family below, as in the code of SDPO, on which
PMD builds. z are the student's logits:

    alpha     D                                         dD/dz
    0         forward KL(q || p)                        p - q
    between   (1 - alpha) KL(p || m) + alpha KL(q || m) (1 - alpha) p (d - E_p[d]), d = log(p / m)
              with m = (1 - alpha) p + alpha q
    1         reverse KL(p || q), Eq. 7                 p (d - E_p[d]), d = log(p / q)

The ends are KLs by convention, as in SDPO's code. The middle row itself tends to 0 there.

Top-k with tail reduces p and q to K + 1 buckets: the student's K most likely tokens, and a tail of
all the others. D is taken between the buckets. With g = dD/dz of the buckets, a token of the top-k
receives its own g, and a token i of the tail receives g_tail p_i / p_tail. At K = V there is no
tail. Deviation from SDPO's code: our tail is the logsumexp over the logits outside the top-k. SDPO
takes one minus the sum of the top-k, which cancels where the student is confident.

The logits of N tokens are too many to hold, so a loss takes the rows a chunk at a time. It forms
the terms of a chunk and their gradient while the logits exist, still in the forward pass. Gradients
add up in float32, and the backward pass only scales them. A chunk is large for the sake of its
matrix products. Within a chunk a loss works through tiles of a few rows, which stay in the cache,
and leaves the gradient where the logits were.

`distill_loss` has its gradient in closed form. `chunked_loss` takes any formula for the loss of a
token, and autograd differentiates the formula within each tile. GRPO's surrogate is such a formula:
runtime/policy_gradient.py.

Some models, such as Gemma, bound their logits to z = cap tanh(z' / cap). The bound is a context, as
autocast is, since it belongs to the model and not to a loss: SOFTCAP holds it, or None. Within it
every softmax below is taken of bounded logits, and the gradient passes through the bound.

Products run in the dtype of the inputs or of autocast. All else runs in float32, or in float64 for
float64 inputs. The errors of `distill_loss` and of its gradients are at most 1.5 times those of the
naive loss, as root mean squares over draws. Logits of +-1e4 are safe. Inputs of float16 are not:
gradients are formed before a loss scale is known, and their range is too small. docs/costs.md says
what a loss costs.

Shapes: N tokens, H hidden width, V vocabulary, K top-k, n rows of a tile. Divergences and entropies
are in nats. Where a head is sharded, call a loss within the forward pass of the module that holds
the head, as `ranks.forward` does. Read `oracle` first, then `distill_loss`, `_distillation`,
`_run_tile`, `_sum_over_chunks`, `_fill`.

This file imports torch only. It has no version attribute, because transformers probes for an
unrelated package that is also called `kernels`.
"""

import functools
import math
import warnings
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY_BUDGET = 2**31  # bytes for one chunk's logits, student's and teachers', as if in float32
LARGEST_CHUNK = 1024  # rows, where the caller names none, by benchmarks/kernels.py
ON_GPU = 2  # times both, by docs/gpu.md: there a chunk pays for a pass over the head's gradient
TILE = 2**17  # logits of a tile, for the cache of each thread. A GPU takes 512 times as many
COMPILE_FROM = 2**25  # logits (N V) of a call. A smaller one never earns the compilation back
SOFTCAP = ContextVar("SOFTCAP", default=None)  # the bound of logits, above 0. runtime.ranks sets it


class Distilled(NamedTuple):
    """Holds what `distill_loss` returns.

    All but `loss` are detached, without the weight, and 0 in rows of weight 0.
    """

    loss: Tensor  # () weighted sum of the divergences
    divergence: Tensor  # (N,) nats
    logprobs: Tensor  # (N,) the student's log-probability of token_ids
    entropy: Tensor  # (N,) nats, the student's, over the full vocabulary even with top_k
    teacher_entropy: Tensor  # (N,) nats, likewise


class TokenLoss(NamedTuple):
    """Holds what `chunked_loss` returns.

    All but `loss` are detached, without the weight, and 0 in rows of weight 0.
    """

    loss: Tensor  # () weighted sum of token_losses
    token_losses: Tensor  # (N,)
    logprobs: Tensor  # (N,) the student's log-probability of token_ids
    entropy: Tensor  # (N,) nats, the student's
    outputs: tuple[Tensor, ...]  # (N,) each, what token_loss returned beside its losses


def oracle(student_logits, teacher_logits, alpha, top_k=None):
    """Computes the divergence of each token (N,) in float64, by the definition above.

    student_logits, teacher_logits (N, V): only the student's receive gradients.
    alpha, top_k: as in `distill_loss`. Ties for the top-k fall as torch.topk breaks them.

    Raises ValueError if the shapes differ, or if alpha or top_k is out of range.
    """
    student = student_logits.double()
    teacher = teacher_logits.detach().double()
    _require(
        student.shape == teacher.shape,
        f"student_logits has shape {tuple(student.shape)}, "
        f"but teacher_logits has shape {tuple(teacher.shape)}.",
    )
    _check_divergence(alpha, top_k, student.shape[-1])
    if top_k not in (None, student.shape[-1]):
        index = student.topk(top_k).indices  # (N, K)
        student = _buckets(student, index)  # (N, K + 1)
        teacher = _buckets(teacher, index)  # (N, K + 1)
    log_p = student.log_softmax(-1)
    log_q = teacher.log_softmax(-1)
    if alpha == 0:
        return _kl(log_q, log_p)
    if alpha == 1:
        return _kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(1 - alpha), log_q + math.log(alpha))
    return (1 - alpha) * _kl(log_p, log_m) + alpha * _kl(log_q, log_m)


def _kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _buckets(logits, index):
    """Reduces logits or log-probabilities (n, V) to index (n, K) and a tail: (n, K + 1)."""
    tail = logits.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, index), tail], -1)


def logprobs_of(log_p, token_ids):
    """Picks the log-probabilities (n,) of token_ids (n,) out of the vocabulary's (n, V)."""
    return log_p.gather(-1, token_ids.long()[:, None]).squeeze(-1)


def distill_loss(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    weights,
    token_ids,
    alpha,
    top_k=None,
    old_logprobs=None,
    is_clip=None,
    chunk_size=None,
):
    """Sums the weighted divergences of tokens from student to teacher (PMD Eq. 7, Table 11).

        loss = sum_n weights_n ratio_n D(p_n, q_n)
        ratio_n = stopgrad(min(p_n(y_n) / p_old(y_n), is_clip))
        p = softmax(student_hidden student_head^T), q = softmax(teacher_hidden teacher_head^T)
        y = token_ids

    student_hidden (N, H), student_head (V, H): each receives gradients if it requires them.
    teacher_hidden (N, H'), teacher_head (V, H'): never do, even if the two heads are one tensor.
    weights (N,): of any sign. A row of weight 0 costs nothing and may hold anything, such as NaN
        or a padding id.
    token_ids (N,): the tokens that the student sampled, for logprobs and the ratio.
    alpha in [0, 1], top_k in [1, V] or None for the full divergence: see the top of this file.
    old_logprobs (N,): log p_old(y), in nats. None makes the ratio 1.
    is_clip: the upper bound of the ratio, above 0, or None.
    chunk_size: rows of a chunk, which change no result. None takes LARGEST_CHUNK rows, or fewer
        where their logits exceed MEMORY_BUDGET. On a GPU both are ON_GPU times as large.

    Returns Distilled. A non-finite loss is returned as it is.
    Raises ValueError if shapes, vocabularies, dtypes or strides do not fit, or if a value or token
    id is out of range. The sentence names the argument.
    """
    _require(is_clip is None or is_clip > 0, f"is_clip is {is_clip}, but must be above 0.")
    _check_divergence(alpha, top_k, len(student_head))
    pairs = {
        "student_": (student_hidden, student_head),
        "teacher_": (teacher_hidden, teacher_head),
    }
    formula = functools.partial(
        _distillation, alpha=alpha, top_k=top_k, ratio_limit=is_clip or math.inf
    )
    return Distilled(
        *_sum_over_chunks(
            formula,
            pairs,
            chunk_size,
            token_ids=token_ids,
            weights=weights,
            old_logprobs=old_logprobs,
        )
    )


def _distillation(
    p, log_p, log_q, token_ids, weights, alpha, top_k, ratio_limit, old_logprobs=None
):
    """Computes the weighted divergence and its gradient in closed form, for `_run_tile`."""
    if top_k in (None, log_p.shape[-1]):
        divergence, gradient = _divergence_and_gradient(p, log_p, log_q, alpha)
    else:
        index = log_p.topk(top_k).indices  # (n, K)
        buckets = _buckets(log_p, index)  # (n, K + 1)
        divergence, of_buckets = _divergence_and_gradient(
            buckets.exp(), buckets, _buckets(log_q, index), alpha
        )
        # p_i / p_tail is at most 1 in the tail. The entries of the top-k are replaced.
        share = (log_p - buckets[:, -1:]).exp()
        gradient = (share * of_buckets[:, -1:]).scatter(-1, index, of_buckets[:, :-1])
    if old_logprobs is not None:
        ratio = (logprobs_of(log_p, token_ids) - old_logprobs).exp()
        weights = weights * ratio.clamp(max=ratio_limit)
    teacher_entropy = -(log_q.exp() * log_q).sum(-1)
    return weights * divergence, weights[:, None] * gradient, divergence, teacher_entropy


def _divergence_and_gradient(p, log_p, log_q, alpha):
    """Computes D (n,) and dD/dz (n, B) from probabilities (n, B) over B tokens or buckets.

    Probabilities multiply differences of logarithms, never their infinite ratio. So an underflow
    gives 0.
    """
    if alpha == 0:
        return _kl(log_q, log_p), p - log_q.exp()
    if alpha == 1:
        log_m = log_q
    else:  # The clamp matters where p and q both underflow. logaddexp has one exponential more.
        log_m = p.lerp(log_q.exp(), alpha).clamp(min=torch.finfo(p.dtype).tiny).log()
    difference = log_p - log_m
    student_term = (p * difference).sum(-1)  # E_p[d], which is also KL(p || m)
    gradient = p * (difference - student_term[:, None])
    if alpha == 1:
        return student_term, gradient
    return (1 - alpha) * student_term + alpha * _kl(log_q, log_m), (1 - alpha) * gradient


def chunked_loss(
    token_loss,
    hidden,
    head,
    token_ids,
    weights,
    teachers=(),
    chunk_size=None,
    **per_token,
):
    """Sums a loss of one's own over tokens, from a naive formula that autograd differentiates.

        loss = sum_n weights_n token_loss(log p_n, log q_n, ...)
        p = softmax(hidden head^T), q = softmax(teacher_hidden teacher_head^T) of each teacher

    Eq. 7, for example:

        def reverse_kl(log_p, log_q, token_ids):
            return (log_p.exp() * (log_p - log_q)).sum(-1)

        chunked_loss(reverse_kl, hidden, head, token_ids, weights, [(teacher_hidden, teacher_head)])

    token_loss: takes log_p (n, V), the log-probabilities (n, V) of each teacher, then token_ids
        (n,) and per_token by keyword. It returns the losses (n,), or a tuple of the losses and of
        further tensors (n,) to be reported. It treats each row by itself, because it sees a few
        rows at a time and padding among them. It calls functions of torch and branches on no
        value, because a large call compiles it. functools.partial binds its settings. A number
        that changes from step to step belongs in per_token, because each number compiles anew.
    hidden (N, H), head (V, H): each receives gradients if it requires them.
    token_ids, weights (N,), chunk_size: as in `distill_loss`.
    teachers: a pair (teacher_hidden (N, H'), teacher_head (V, H')) each, which receive none.
    per_token: tensors (N,) by the names that token_loss has for them, which receive none.

    Returns TokenLoss. A non-finite loss is returned as it is.
    Raises ValueError as `distill_loss`, and if what token_loss returns has another shape.
    """
    pairs = {"": (hidden, head)}
    for i, teacher in enumerate(teachers):
        pairs[f"teacher {i} "] = teacher
    formula = functools.partial(_by_autograd, token_loss)
    results = _sum_over_chunks(
        formula, pairs, chunk_size, token_ids=token_ids, weights=weights, **per_token
    )
    return TokenLoss(*results[:4], results[4:])


def _by_autograd(token_loss, p, log_p, /, *log_q, token_ids, weights, **per_token):
    """Computes the weighted token_loss and its gradient by autograd, for `_run_tile`."""

    def weighted_sum(log_p):
        outputs = token_loss(log_p, *log_q, token_ids=token_ids, **per_token)
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        for output in outputs:
            _require(
                output.shape == weights.shape,
                f"token_loss returned shape {tuple(output.shape)}, "
                f"but must return {tuple(weights.shape)}.",
            )
        return (weights * outputs[0]).sum(), outputs

    gradient, (losses, *others) = torch.func.grad(weighted_sum, has_aux=True)(log_p)
    gradient = gradient - p * gradient.sum(-1, keepdim=True)  # through log_softmax
    return weights * losses, gradient, losses, *others


@torch.no_grad()
def score(hidden, head, token_ids, chunk_size=None):
    """Computes the log-probabilities of token_ids, and the entropies, without gradient.

    hidden (N, H), head (V, H), token_ids (N,), chunk_size: as in `distill_loss`.

    Returns log softmax(hidden head^T)[token_ids] (N,) and entropies (N,), in nats, as float32, or
    as float64 for float64 inputs.
    Raises ValueError as `distill_loss`.
    """
    _, logprobs, entropy = _sum_over_chunks(
        None,
        {"": (hidden, head)},
        chunk_size,
        token_ids=token_ids,
        weights=torch.ones_like(token_ids),
    )
    return logprobs, entropy


def _sum_over_chunks(formula, pairs, chunk_size, /, **per_token):
    """Sums a formula's terms over the rows whose weight is not 0, and forms their gradient.

    formula: as in `_run_tile`.
    pairs: (hidden, head) of the student, then of each teacher, by the prefix of their names.
    per_token: token_ids, weights and whatever else the formula takes, (N,) each. Only old_logprobs
        may be None.

    Returns the loss (), then each output of `_run_tile` but the terms, (N,).
    Raises ValueError as `distill_loss`.
    """
    _check(pairs, per_token)
    hidden, head = next(iter(pairs.values()))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if chunk_size is None:
        row_bytes = max(2, len(pairs)) * len(head) * dtype.itemsize
        chunk_size = rows_of_chunk(row_bytes, head.device.type)
    _require(
        isinstance(chunk_size, int) and chunk_size >= 1,
        f"chunk_size is {chunk_size}, but must be a whole number, at least 1.",
    )
    per_token["weights"] = per_token["weights"].to(dtype)
    live = per_token["weights"].nonzero().squeeze(-1)
    if len(live):  # only now, because padding may carry any id
        low, high = per_token["token_ids"][live].aminmax()
        _require(
            0 <= low and high < len(head),
            f"token_ids holds ids from {low} to {high}, but the vocabulary has {len(head)}.",
        )
    gradients = [None, None]
    for i, tensor in enumerate((hidden, head)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            gradients[i] = torch.zeros_like(tensor, dtype=dtype)
    outputs = _fill(*gradients, formula, pairs.values(), chunk_size, live, per_token)
    return _Formed.apply(hidden, head, outputs[0, live].sum(), *gradients), *outputs[1:]


def rows_of_chunk(row_bytes, device_type):
    """Chooses the rows of a chunk whose logits take row_bytes a row as if in float32."""
    larger = 1 if device_type == "cpu" else ON_GPU
    return min(larger * LARGEST_CHUNK, max(1, larger * MEMORY_BUDGET // row_bytes))


@torch.no_grad()
def _fill(hidden_gradient, head_gradient, formula, pairs, chunk_size, live, per_token):
    """Runs a formula over the live rows, chunk by chunk, and adds to the gradients.

    hidden_gradient (N, H), head_gradient (V, H): zeros, or None where no gradient is needed.
    live: the indices of the rows. The others: as in `_sum_over_chunks`.

    Returns the outputs of `_run_tile`, (3 or more, N), with 0 in the other rows.
    """
    dtype = per_token["weights"].dtype
    # as autocast casts for its products; one copy of a head that several teachers share
    cast = functools.cache(lambda tensor: tensor.to(_product_dtype(tensor)))
    pairs = [(cast(hidden), cast(head)) for hidden, head in pairs]
    hidden, head = pairs[0]
    processors = 512
    if head.device.type == "cpu":
        processors = torch.get_num_threads()
    tile = min(chunk_size, max(1, TILE * processors // len(head)))  # rows
    chunk_size = min(chunk_size, max(1, len(live)))
    run = _run_tile
    if len(live) * len(head) >= COMPILE_FROM:
        run = _compiler()
    else:
        tile = min(tile, chunk_size)

    shape = math.ceil(chunk_size / tile) * tile, len(head)  # whole tiles
    buffers = [states.new_empty(shape) for states, _ in pairs]
    outputs = None
    for chunk in live.split(chunk_size):  # without live rows, one empty chunk gives the outputs
        for (states, weight), logits in zip(pairs, buffers, strict=True):
            torch.mm(states[chunk], weight.T, out=logits[: len(chunk)])
        for start in range(0, max(1, len(chunk)), tile):
            rows = chunk[start : start + tile]
            logits = [buffer[start : start + tile] for buffer in buffers]
            padding = 0, tile - len(rows)  # to a whole tile, because a new shape compiles anew
            of_tile = {
                name: torch.nn.functional.pad(tensor[rows], padding)
                for name, tensor in per_token.items()
                if tensor is not None
            }
            result = run(formula, logits, SOFTCAP.get(), **of_tile).to(dtype)
            if outputs is None:  # one tensor: small ones between large ones fragment the heap
                outputs = result.new_zeros(len(result), len(hidden))
            outputs[:, rows] = result[:, : len(rows)]
        gradient = buffers[0][: len(chunk)]
        if hidden_gradient is not None:
            hidden_gradient[chunk] = (gradient @ head).to(dtype)
        if head_gradient is None:
            continue
        factors = gradient.T, hidden[chunk]
        if head.dtype == dtype:
            head_gradient.addmm_(*factors)
        elif head.is_cuda:  # the product itself adds up in float32
            torch.addmm(head_gradient, *factors, out_dtype=dtype, out=head_gradient)
        else:
            head_gradient += torch.mm(*factors)
    return outputs


def _run_tile(formula, logits, softcap, /, token_ids, weights, **per_token):
    """Replaces the student's logits (n, V) by the gradient of the sum of a formula's terms.

    formula(p, *log_probabilities, token_ids, weights, ...): takes the student's probabilities
        (n, V), and the log-probabilities (n, V) of the student and of each teacher. It returns the
        terms (n,), their gradient (n, V) with respect to the student's bounded logits, the losses
        without weight (n,), and further outputs (n,). None asks for scores only.
    logits: of the student, then of each teacher, before the bound softcap, which may be None.

    Returns the terms, the losses, the student's log-probabilities and entropies, and the further
    outputs: (4 or more, n). Without formula it returns the weights, and the student's
    log-probabilities and entropies: (3, n).
    """
    bounded = [tile.to(weights.dtype) for tile in logits]
    if softcap:
        bounded = [softcap * (tile / softcap).tanh() for tile in bounded]
    log_p, *log_q = (tile.log_softmax(-1) for tile in bounded)  # (n, V)
    p = log_p.exp()
    scores = logprobs_of(log_p, token_ids), -(p * log_p).sum(-1)
    if formula is None:
        return torch.stack([weights, *scores])
    terms, gradient, losses, *others = formula(
        p, log_p, *log_q, token_ids=token_ids, weights=weights, **per_token
    )
    if softcap:
        gradient = gradient * (1 - (bounded[0] / softcap).square())
    logits[0].copy_(gradient)
    return torch.stack([terms, losses, *scores, *others])


def _product_dtype(tensor):
    """Chooses the dtype of a tensor's products, which autocast may lower."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:  # which it never casts
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class _Formed(torch.autograd.Function):
    """Gives a loss the gradients that were formed beside it."""

    @staticmethod
    def forward(ctx, hidden, head, loss, *gradients):
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, head.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        scaled = [None, None]
        for i, gradient in enumerate(ctx.saved_tensors):
            if gradient is not None:  # product in float32, rounded once, without a copy in float32
                scaled[i] = torch.empty_like(gradient, dtype=ctx.dtypes[i])
                torch.mul(gradient, scale, out=scaled[i])
        return *scaled, None, None, None


@functools.cache
def _compiler():
    """Compiles `_run_tile`. Where that fails, it warns once and runs the tile uncompiled."""
    torch._dynamo.config.recompile_limit = 64  # torch 2.11's compile does not take it
    run = torch.compile(_run_tile, dynamic=False)

    def run_compiled(*arguments, **per_token):
        nonlocal run
        try:
            return run(*arguments, **per_token)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(
                "kernels.py runs its losses uncompiled, which is slower: "
                f"{str(error).splitlines()[0]}",
                stacklevel=2,
            )
            run = _run_tile
            return run(*arguments, **per_token)

    return run_compiled


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _check_divergence(alpha, top_k, vocabulary):
    _require(0 <= alpha <= 1, f"alpha is {alpha}, but must be from 0 to 1.")
    _require(
        top_k is None or isinstance(top_k, int) and 1 <= top_k <= vocabulary,
        f"top_k is {top_k}, but must be a whole number from 1 to the vocabulary of {vocabulary}.",
    )


def _check(pairs, per_token):
    """Raises ValueError if tensors do not fit together: pairs, per_token of `_sum_over_chunks`."""
    student, *_ = pairs
    rows, vocabulary = map(len, pairs[student])
    for role, (hidden, head) in pairs.items():
        _check_matrix(f"{role}hidden", hidden)
        _check_matrix(f"{role}head", head)
        _require(
            0 < len(head) == vocabulary,
            f"{role}head has a vocabulary of {len(head)}, "
            f"but {student}head has one of {vocabulary}, and at least one token is needed.",
        )
        _require(
            len(hidden) == rows,
            f"{role}hidden has {len(hidden)} rows, but {student}hidden has {rows}.",
        )
        _require(
            hidden.shape[1] == head.shape[1],
            f"{role}hidden has width {hidden.shape[1]}, but {role}head has width {head.shape[1]}.",
        )
        _require(
            _product_dtype(hidden) == _product_dtype(head),
            f"{role}hidden is {hidden.dtype}, but {role}head is {head.dtype}.",
        )
    for name, tensor in per_token.items():
        mismatch = f"but {student}hidden has {rows} rows."
        if name != "old_logprobs" or tensor is not None:
            _require(isinstance(tensor, Tensor), f"{name} is {tensor}, {mismatch}")
            _require(tensor.shape == (rows,), f"{name} has shape {tuple(tensor.shape)}, {mismatch}")
    dtype = per_token["token_ids"].dtype
    _require(
        not (dtype.is_floating_point or dtype == torch.bool),
        f"token_ids is {dtype}, but must be an integer type.",
    )


def _check_matrix(name, tensor):
    """Raises ValueError if hidden states or a head are no contiguous matrix of numbers."""
    shape = tuple(tensor.shape)
    _require(len(shape) == 2, f"{name} has shape {shape}, but must have 2 dimensions.")
    _require(tensor.is_floating_point(), f"{name} is {tensor.dtype}, but must be floating point.")
    _require(
        tensor.is_contiguous(),
        f"{name} of shape {shape} has strides {tensor.stride()}, "
        "but must be contiguous; call .contiguous() on it.",
    )
