"""What makes an update faster on a GPU gives the update that there was, on the CPU."""

import dataclasses

import pytest
import torch
from conftest import method_of

import pmd
from runtime import model
from runtime.model import copy_of, load_policy, make_optimizer


def updated(cfg, updates=2, draw=0):
    """Weights and gradients after updates by a teacher with a longer prompt. draw: of the texts."""
    policy = load_policy(cfg)
    method, optimizer = method_of(cfg, policy, copy_of(policy, cfg)), make_optimizer(policy, cfg)
    rows = []
    for i, length in enumerate((5, 9, 12)):
        ids = [30 + (7 * i + 3 * t + 11 * draw) % 50 for t in range(length)]
        sample = [20 + i, 21, 22], ids, torch.full((length,), -3.0), "", True
        teacher_ids = [40, 41, 42, 43, 20 + i]
        rows.append(pmd.Rollout(*sample, str(i), None, 0.0, teacher_ids=teacher_ids))
    for step in range(updates):
        pmd.update(method, optimizer, rows, step)
    named = list(policy.named_parameters())
    return {n: p.detach() for n, p in named}, {n: p.grad for n, p in named}


@pytest.fixture
def cfg(make_config):
    return make_config(lr=1e-3, max_sampler_gap=99.0)


def test_the_fused_optimizer_moves_the_weights_as_the_other_does(cfg, monkeypatch):
    plain, _ = updated(cfg)
    monkeypatch.setattr(model, "is_fused", lambda device: True)
    fused, _ = updated(cfg)
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=0, atol=1e-6)


def test_what_would_compile_for_each_length_is_refused(cfg):
    with pytest.raises(ValueError, match="one process with --sampler vllm"):
        pmd.check(dataclasses.replace(cfg, compile_layers=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, recomputes", [("float32", False), ("bfloat16", True)])
def test_compiled_layers_give_the_same_gradients(cfg, dtype, recomputes):
    """Up to the order of float32 sums, or within what bfloat16 rounds, of a first update.

    What bfloat16 rounds is a draw: errors are root mean squares over ten.
    """
    cfg = dataclasses.replace(cfg, dtype=dtype, gradient_checkpointing=recomputes)
    squares = {}  # {name: those of the error, of the noise and of the size}
    for draw in range(10 if dtype == "bfloat16" else 1):
        exact = updated(dataclasses.replace(cfg, dtype="float32"), 1, draw)[1]
        plain = updated(cfg, 1, draw)[1]
        compiled = updated(dataclasses.replace(cfg, compile_layers=True), 1, draw)[1]
        for name, gradient in plain.items():
            if dtype == "float32":
                assert (compiled[name] - gradient).norm() < 1e-3 * exact[name].norm(), name
            vectors = compiled[name] - exact[name], gradient - exact[name], exact[name]
            norms = torch.stack([vector.norm() for vector in vectors])
            squares[name] = squares.get(name, 0) + norms**2
    for name, sums in squares.items() if dtype == "bfloat16" else ():
        error, noise, size = sums.sqrt()
        assert error < 1.5 * noise + 0.01 * size, name
