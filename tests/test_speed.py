"""What makes an update faster on a GPU gives the update that there was, on the CPU."""

import dataclasses

import pytest
import torch
from conftest import method_of

import pmd
from runtime import model
from runtime.model import copy_of, load_policy, make_optimizer


def updated(cfg, updates=2):
    """Weights and gradients after updates by a teacher with a longer prompt."""
    policy = load_policy(cfg)
    method, optimizer = method_of(cfg, policy, copy_of(policy, cfg)), make_optimizer(policy, cfg)
    rows = []
    for i, length in enumerate((5, 9, 12)):
        ids = [30 + (7 * i + 3 * t) % 50 for t in range(length)]
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
    """Up to the order of float32 sums, or within what bfloat16 rounds, of a first update."""
    cfg = dataclasses.replace(cfg, dtype=dtype, gradient_checkpointing=recomputes)
    exact = updated(dataclasses.replace(cfg, dtype="float32"), 1)[1]
    plain = updated(cfg, 1)[1]
    compiled = updated(dataclasses.replace(cfg, compile_layers=True), 1)[1]
    for name, gradient in plain.items():
        size = exact[name].norm()
        if dtype == "float32":
            assert (compiled[name] - gradient).norm() < 1e-3 * size, name
        else:
            error, noise = ((g - exact[name]).norm() for g in (compiled[name], gradient))
            assert error < 1.5 * noise + 0.01 * size, name
