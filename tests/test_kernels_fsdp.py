"""The head with its loss under FSDP2: two gloo processes must give the gradient of autograd on the definition in one."""
import copy
import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from kernels import LossHead, distill_loss, oracle, policy_loss

N, H, V = 9, 6, 14
PARTS = ([slice(0, 4), slice(4, 6)], [slice(6, 9), slice(9, 9)])  # micro-batches of each rank; one has no rows left
CASES = tuple(product(("untied", "tied"), ("live", "ema", "policy")))


class Tiny(torch.nn.Module):
    """The parts of a language model that matter here: embedding, something between, head."""

    def __init__(self, tied):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(V, H)
        self.between = torch.nn.Linear(H, H)
        self.lm_head = LossHead(self.embed_tokens.weight if tied else torch.nn.Parameter(torch.randn(V, H)))

    def forward(self, tokens, *loss):
        hidden = self.between(self.embed_tokens(tokens)).tanh()
        return self.lm_head(hidden, *loss) if loss else hidden


def make(tied):
    torch.manual_seed(0)
    student, teacher = Tiny(tied).double(), Tiny(tied).double()
    torch.manual_seed(1)
    tokens, teacher_tokens, ids = torch.randint(V, (3, N))
    weights, advantages = torch.rand(N).double() + 0.1, torch.randn(N).double()
    return student, teacher, tokens, teacher_tokens, ids, weights, advantages


def shard(model, tied):
    for module in (model.between, model) if tied else (model.between, model.lm_head, model):  # the root comes last
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)


def one_case(rank, tied, kind):
    """(loss, {name: whole gradient}) of two micro-batches on each of two ranks."""
    student, ema, tokens, teacher_tokens, ids, weights, advantages = make(tied)
    shard(student, tied)
    shard(ema, tied)
    teacher = ema if kind == "ema" else student
    total = torch.zeros((), dtype=torch.float64)
    for rows in PARTS[rank]:
        if kind == "policy":
            loss = student(tokens[rows], policy_loss, ids[rows], advantages[rows], weights[rows], None, 0.2, 0.2).loss
        else:
            with torch.no_grad():
                teacher_hidden = teacher(teacher_tokens[rows])
            teacher_head, group = None, ema if tied else ema.lm_head
            if kind == "ema":
                group.unshard()
                teacher_head = ema.lm_head.weight
            loss = student(tokens[rows], distill_loss, teacher_hidden, teacher_head, weights[rows], ids[rows], 0.5).loss
            if kind == "ema":
                group.reshard()
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    assert all(p.grad is None for p in ema.parameters())
    return total, {name: p.grad.full_tensor() for name, p in student.named_parameters()}


def work(rank, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {(tied, kind): one_case(rank, tied == "tied", kind) for tied, kind in CASES}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("tied,kind", CASES)
def test_two_ranks_equal_autograd_in_one_process(sharded, tied, kind):
    student, ema, tokens, teacher_tokens, ids, weights, advantages = make(tied == "tied")
    logits = student(tokens) @ student.lm_head.weight.T
    if kind == "policy":
        expected = (weights * -advantages * logits.log_softmax(-1)[torch.arange(N), ids]).sum()
    else:
        teacher = copy.deepcopy(student) if kind == "live" else ema
        expected = (weights * oracle(logits, teacher(teacher_tokens) @ teacher.lm_head.weight.T, 0.5)).sum()
    loss, gradients = sharded[tied, kind]
    torch.testing.assert_close(loss, -(weights * advantages).sum() if kind == "policy" else expected.detach(),
                               rtol=1e-10, atol=1e-10)
    assert set(gradients) == {name for name, _ in student.named_parameters()}
    for name, gradient in zip(gradients, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_a_head_alone_gives_logits():
    student, _, tokens, *_ = make(False)
    hidden = student(tokens)
    torch.testing.assert_close(student.lm_head(hidden), hidden @ student.lm_head.weight.T)
