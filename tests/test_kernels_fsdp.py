"""The losses within the forward pass of a sharded model, which holds the head: two gloo processes
must give, in float64, the loss and gradient of autograd on the definition in one. The whole program
on several ranks: see test_ranks.py.
"""

import copy
import functools
import math
import os
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import method_of
from transformers import PreTrainedConfig

import pmd
from kernels import chunked_loss, logprobs_of, oracle
from runtime.ranks import end_ranks, forward, rank, reshard, shard, whole
from runtime.rows import completion_hidden, token_ids

H, V, TOTAL = 6, 14, 4  # TOTAL: rollouts of the mini-batch, one of which supervises nothing
CASES = tuple(product(("untied", "tied"), ("live", "ema", "grpo", "own")))


class Decoder(torch.nn.Module):
    """Embedding, something between that looks back, as attention does."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(V, H)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(H, H)])

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(
            last_hidden_state=self.layers[0](self.embed_tokens(input_ids).cumsum(1)).tanh()
        )


class Tiny(torch.nn.Module):
    """What the trainer asks of a model of transformers."""

    device = torch.device("cpu")
    config = PreTrainedConfig()

    def __init__(self, tied):
        super().__init__()
        self.model = Decoder()
        self.lm_head = torch.nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_decoder(self):
        return self.model

    def get_output_embeddings(self):
        return self.lm_head


def make(tied, kind):
    """(config, student, teacher, rollouts of 8, 4 and 2 tokens, whose weights are exact in
    float32).
    """
    cfg = pmd.Config(method="grpo" if kind == "grpo" else "pmd", alpha=0.5, top_k=0, device="cpu")
    torch.manual_seed(0)
    student, average = Tiny(tied == "tied").double(), Tiny(tied == "tied").double()
    problem, rollouts = SimpleNamespace(id="p"), []
    for i, length in enumerate((8, 4, 2)):
        prompt, ids = torch.randint(V, (3 + i,)).tolist(), torch.randint(V, (length,)).tolist()
        sampled = torch.randn(length) - 2.5
        # a weight of 1, or beyond its bound: exact in float32, which forms it
        old = sampled + torch.arange(length) % 2
        rollouts.append(
            SimpleNamespace(
                problem=problem,
                prompt_ids=prompt,
                ids=ids,
                teacher_ids=[*torch.randint(V, (2,)).tolist(), *prompt],
                rollout_logprobs=sampled,
                advantage=(0.5, -0.25, -0.25)[i] if kind == "grpo" else None,
                weight=1.0,
                old_logprobs=old if kind == "grpo" else None,
            )
        )
        if kind == "grpo":
            rollouts[-1].teacher_ids = []
    return cfg, student, student if kind != "ema" else average, rollouts


def ratio_times_divergence(log_p, log_q, token_ids, sampled):
    """The loss of the kinds `live` and `ema`, as a formula of one's own."""
    ratio = (logprobs_of(log_p, token_ids).detach() - sampled).exp().clamp(max=pmd.ROLLOUT_CLIP)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ratio * sum((x.exp() * (x - log_m)).sum(-1) / 2 for x in (log_p, log_q))


def own_loss(batch, student, teacher):
    """As pmd.loss_of, by chunked_loss."""
    with torch.no_grad():
        states = forward(
            teacher, lambda: completion_hidden(teacher, [r.teacher_ids for r in batch], batch)
        )
    hidden, head = (
        completion_hidden(student, [r.prompt_ids for r in batch], batch),
        student.lm_head.weight,
    )
    nothing = torch.zeros(0)
    weights = torch.cat(
        [nothing, *(torch.full((len(r.ids),), 1 / (TOTAL * len(r.ids))) for r in batch)]
    )
    sampled = torch.cat([nothing, *(r.rollout_logprobs for r in batch)])
    return chunked_loss(
        ratio_times_divergence,
        hidden,
        head,
        token_ids(batch, head),
        weights,
        [(states, teacher.lm_head.weight)],
        sampled=sampled,
    )


def one_case(tied, kind):
    """(loss, {name: whole gradient}) of two micro-batches on each of two ranks; the last one has no
    rollout left.
    """
    cfg, student, teacher, (first, second, third) = make(tied, kind)
    teacher = shard(teacher, cfg)
    student = shard(student, cfg)
    total = torch.zeros((), dtype=torch.float64)
    for batch in (([first], [second]), ([third], []))[rank()]:
        method, mean = (
            method_of(cfg, student, teacher),
            pmd.Total(TOTAL, kind != "grpo", kind == "grpo"),
        )
        formed = functools.partial(method.loss, batch, mean)
        if kind == "own":
            formed = functools.partial(own_loss, batch, student, teacher)
        found = forward(student, formed)
        loss = found.loss if kind == "own" else found["loss"]
        loss.backward()
        reshard(teacher)
        total += loss.detach()
    dist.all_reduce(total)
    assert teacher is student or all(p.grad is None for p in teacher.parameters())
    return total, {name: whole(p.grad) for name, p in student.named_parameters()}


def work(rank, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {case: one_case(*case) for case in CASES}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    end_ranks()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "results.pt")


def logits_of(model, prompt, ids):
    hidden = model.model(torch.tensor([prompt + ids]), False).last_hidden_state[
        0, len(prompt) - 1 : -1
    ]
    return hidden @ model.lm_head.weight.T


@pytest.mark.parametrize("tied,kind", CASES)
def test_two_ranks_equal_autograd_in_one_process(sharded, tied, kind):
    cfg, student, teacher, rollouts = make(tied, kind)
    teacher, expected = copy.deepcopy(teacher), 0
    for r in rollouts:
        logits = logits_of(student, r.prompt_ids, r.ids)
        now, sampled = (
            logits.log_softmax(-1)[torch.arange(len(r.ids)), r.ids],
            r.rollout_logprobs.double(),
        )
        if kind == "grpo":
            old, a = r.old_logprobs.double(), r.advantage
            ratio, weight = (now - old).exp(), (old - sampled).exp().clamp(max=pmd.ROLLOUT_CLIP)
            terms = -torch.minimum(ratio * a, ratio.clamp(1 - pmd.CLIP_LOW, 1 + pmd.CLIP_HIGH) * a)
        else:
            weight = (now.detach() - sampled).exp().clamp(max=pmd.ROLLOUT_CLIP)
            terms = oracle(logits, logits_of(teacher, r.teacher_ids, r.ids), 0.5)
        expected = expected + (weight * terms).mean() / TOTAL
    loss, gradients = sharded[tied, kind]
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    assert set(gradients) == {name for name, _ in student.named_parameters()}
    for name, gradient in zip(
        gradients, torch.autograd.grad(expected, list(student.parameters())), strict=True
    ):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10)
