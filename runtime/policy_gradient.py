"""Computes the policy-gradient loss of PPO and GRPO in the chunks of kernels.py."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import chunked_loss, logprobs_of


class PolicyLoss(NamedTuple):
    """Holds what `policy_loss` returns.

    All but `loss` are detached, without the weight, and 0 in rows of weight 0.
    """

    loss: Tensor  # () weighted sum of the surrogates
    logprobs: Tensor  # (N,) log-probability of token_ids
    entropy: Tensor  # (N,) nats
    clipped: Tensor  # (N,) 1 where the clip is active, so that the token has no gradient


def policy_loss(
    hidden,
    head,
    token_ids,
    advantages,
    weights,
    old_logprobs,
    clip_low,
    clip_high,
    clip_dual=None,
    chunk_size=None,
):
    """Sums the weighted clipped policy-gradient surrogates of PPO and GRPO, to be minimised.

        loss = sum_n weights_n * -min(r_n A_n, clip(r_n, 1 - clip_low, 1 + clip_high) A_n)
        r_n = p_n(y_n) / p_old(y_n), p = softmax(hidden head^T), y = token_ids, A = advantages

    With clip_dual a term of negative advantage is at most clip_dual |A_n|. This dual clip is that
    of SDPO's code, through verl's compute_policy_loss_vanilla, which has 3.0.

    hidden (N, H), head (V, H): each receives gradients if it requires them.
    token_ids, advantages (N,), weights (N,), chunk_size: as in `kernels.distill_loss`.
    old_logprobs (N,): log p_old(y), in nats. None stands for the detached log-probabilities of now:
        the ratio is exactly 1, and its gradient is that of log p(y).
    clip_low, clip_high: at least 0. clip_dual: above 1, or None for no such bound.

    Returns PolicyLoss. A non-finite loss is returned as it is.
    Raises ValueError as `kernels.distill_loss`.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(
            f"clip_low is {clip_low} and clip_high is {clip_high}, but both must be at least 0."
        )
    if clip_dual is not None and clip_dual <= 1:
        raise ValueError(f"clip_dual is {clip_dual}, but must be above 1.")
    dual = clip_dual or math.inf
    token_loss = functools.partial(_surrogate, low=1 - clip_low, high=1 + clip_high, dual=dual)
    loss, _, logprobs, entropy, outputs = chunked_loss(
        token_loss,
        hidden,
        head,
        token_ids,
        weights,
        chunk_size=chunk_size,
        advantages=advantages,
        old_logprobs=old_logprobs,
    )
    return PolicyLoss(loss, logprobs, entropy, *outputs)


def _surrogate(log_p, token_ids, advantages, low, high, dual, old_logprobs=None):
    """Computes -min(r A, clip(r) A) of each token (n,), and whether the clip is active.

    The minimum bounds r from above where A is positive, and from below where A is negative. The
    dual clip bounds r there from above, too. Bounds on r keep an infinite r from an A of 0.
    """
    logprobs = logprobs_of(log_p, token_ids)
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.detach().exp()
    bounded = torch.where(advantages < 0, ratio.clamp(low, dual), ratio.clamp(max=high))
    clipped = bounded != ratio
    # The 0 keeps an infinite ratio out of the backward pass, where 0 times infinity is NaN.
    free = torch.where(clipped, 0, log_ratio).exp()
    losses = -torch.where(clipped, bounded, free) * advantages
    return losses, clipped & (advantages != 0)
