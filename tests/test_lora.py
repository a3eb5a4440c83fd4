"""--lora_rank: adapters on a frozen base, against factors and an AdamW of the test's own, merged
weights, and a run left alone.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import method_of, small_config
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import pmd
from kernels import oracle
from runtime import check as checks
from runtime import lora
from runtime.checkpoint import checkpoints, save_model
from runtime.errors import RunError
from runtime.model import copy_of, follow, load_policy, make_optimizer, trained

pytest.importorskip("peft")

RANK = 4


@pytest.fixture
def cfg(make_config):
    return make_config(lora_rank=RANK, lr=0.01, name="run", max_sampler_gap=99.0)


def stirred(cfg):
    """An adapted policy whose adapter does something."""
    policy = load_policy(cfg)
    generator = torch.Generator().manual_seed(1)
    for p in trained(policy):
        p.data = 0.2 * torch.randn(p.shape, generator=generator).to(p)
    return policy


def rows(ids=((5, 6, 7, 8), (9, 10, 11))):
    """Rollouts that a teacher supervises under a longer prompt."""
    made = []
    for i, completion in enumerate(ids):
        sampled = torch.full((len(completion),), -3.0)
        sample = [20 + i, 21, 22], list(completion), sampled, "", True
        made.append(pmd.Rollout(*sample, str(i), None, 0.0, teacher_ids=[30, 31, 32, 20 + i, 21]))
    return made


IDS = torch.arange(5, 25)[None]


def logits(model):
    return (
        model.get_decoder()(input_ids=IDS).last_hidden_state
        @ model.get_output_embeddings().weight.T
    )


def own_update(model, factors, teacher_factors, batch, cfg):
    """One update by the textbook: W + 2 B A in place of W, the divergence by its definition, the
    gradient clipped to norm 1, AdamW's first step. factors: {a layer's name: (A, B)}.
    """

    def hidden(row, prompt, pairs):
        base = dict(model.named_parameters())
        changed = {f"{n}.weight": base[f"{n}.weight"] + 2 * b @ a for n, (a, b) in pairs.items()}
        ids = torch.tensor([prompt + row.ids])
        out = functional_call(model, changed, kwargs={"input_ids": ids}).logits[0]
        return out[len(prompt) - 1 : -1]

    loss = 0.0
    for row in batch:
        student = hidden(row, row.prompt_ids, factors)
        with torch.no_grad():
            teacher = hidden(row, row.teacher_ids, teacher_factors)
        logprobs = student.log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        ratio = (logprobs - row.rollout_logprobs).exp().clamp(max=2).detach()
        loss = loss + (ratio * oracle(student, teacher, cfg.alpha)).mean() / len(batch)
    leaves = [leaf for pair in factors.values() for leaf in pair]
    gradients = torch.autograd.grad(loss, leaves)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    scale = min(1.0, 1 / (float(norm) + 1e-6))
    with torch.no_grad():
        for leaf, g in zip(leaves, gradients, strict=True):
            g = g * scale
            leaf -= cfg.lr * (g / (g.abs() + 1e-8) + 0.01 * leaf)


def test_an_update_is_that_of_factors_of_ones_own(cfg):
    """In float64, since AdamW's first step is g / |g|."""
    policy = stirred(cfg).double()
    teacher = copy_of(policy, cfg)
    for p in teacher.parameters():
        p.data.mul_(0.5)
    own = load_policy(dataclasses.replace(cfg, lora_rank=0)).double()
    found = dict(lora.adapter(policy, lora.STUDENT))
    factors = {}
    for name, a in found.items():
        if ".lora_A." in name:
            pair = a, found[name.replace("lora_A", "lora_B")]
            factors[name.split(".lora_A")[0]] = [p.detach().clone().requires_grad_() for p in pair]
    half = {name: [p.detach() * 0.5 for p in pair] for name, pair in factors.items()}
    own_update(own, factors, half, rows(), cfg)
    before = [p.detach().clone() for p in trained(policy)]
    pmd.update(method_of(cfg, policy, teacher), make_optimizer(policy, cfg), rows(), 1)
    assert len(before) == 2 * len(factors) == 2 * 7 * policy.config.num_hidden_layers
    ours = [p.detach() for p in trained(policy)]
    theirs = [p.detach() for pair in factors.values() for p in pair]
    for now, expected, then in zip(ours, theirs, before, strict=True):
        moved = expected - then
        assert moved.abs().max() > 0.005
        # where a gradient is next to nothing, its sign is rounding
        assert ((now - expected).abs() < 1e-6).float().mean() > 0.99
        torch.testing.assert_close(now, expected, atol=2.1 * cfg.lr, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_give_the_logits_of_the_adapter(cfg, dtype, tmp_path, tokenizer):
    policy = stirred(dataclasses.replace(cfg, dtype=dtype))
    base = getattr(torch, dtype)
    assert {p.dtype for p in trained(policy)} == {torch.float32}
    assert policy.get_output_embeddings().weight.dtype == base
    save_model(policy, tokenizer, tmp_path / "final")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    beside = AutoModelForCausalLM.from_pretrained(tmp_path / "final" / "adapter", dtype=base)
    assert merged.dtype == base and not lora.is_adapted(merged) and lora.is_adapted(beside)
    names = {name for name, _ in lora.merged(policy)}
    assert names == {name for name, _ in merged.named_parameters()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        ours, theirs, others = (logits(model).float() for model in (policy, merged, beside))
        plain = logits(load_policy(dataclasses.replace(cfg, lora_rank=0)))
    noise = 1e-4 if dtype == "float32" else 0.05 * float(ours.std())
    assert (ours - theirs).abs().mean() < noise and (ours - others).abs().mean() < noise
    assert (ours - plain.float()).abs().mean() > 10 * noise


def test_a_teacher_is_another_adapter_of_the_same_base(cfg):
    policy = load_policy(cfg)
    base = logits(load_policy(dataclasses.replace(cfg, lora_rank=0)))
    teacher, frozen = copy_of(policy, cfg), None
    torch.testing.assert_close(logits(teacher), base)  # B is 0: a run starts at the base
    assert teacher.get_output_embeddings().weight is policy.get_output_embeddings().weight
    frozen = [p.clone() for p in teacher.parameters()]
    method, optimizer = method_of(cfg, policy, teacher), make_optimizer(policy, cfg)
    weights = {name: p.clone() for name, p in policy.named_parameters() if "lora_" not in name}
    pmd.update(method, optimizer, rows(), 1)
    moved = [p.detach().clone() for p in trained(policy)]
    assert all((p.grad is None) == (not p.requires_grad) for p in policy.parameters())
    assert all(torch.equal(weights[n], p) for n, p in policy.named_parameters() if n in weights)
    torch.testing.assert_close(logits(teacher), base)
    assert (logits(policy) - base).abs().max() > 0.01
    follow(teacher, policy, 0.0)
    assert all(map(torch.equal, teacher.parameters(), frozen))
    follow(teacher, policy, 0.25)
    for p, start, now in zip(teacher.parameters(), frozen, moved, strict=True):
        torch.testing.assert_close(p.detach(), 0.75 * start + 0.25 * now)
    live = pmd.PMD(dataclasses.replace(cfg, teacher="live"), None, None, policy)
    assert live.teacher is policy


def test_recomputed_activations_change_nothing(cfg):
    """The backward pass recomputes the student's layers after the teacher's adapter was active."""
    ends = []
    for recomputes in (False, True):
        changed = dataclasses.replace(cfg, gradient_checkpointing=recomputes)
        policy = stirred(changed)
        teacher = copy_of(policy, changed)
        for p in teacher.parameters():
            p.data.zero_()
        method = method_of(changed, policy, teacher)
        pmd.update(method, make_optimizer(policy, changed), rows(), 1)
        ends.append([p.grad.clone() for p in trained(policy)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def small(out, **changes):
    sizes = dict(steps=4, method="sdpo", group_size=6, eval_problems=2, save_every=2)
    return small_config(out, **(sizes | dict(lora_rank=RANK, lr=3e-3) | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is left alone."""
    cfg = small(tmp_path_factory.mktemp("lora"), name="whole")
    pmd.train(cfg)
    return cfg


def end_of(cfg, name):
    """Final weights, adapter and metrics without times."""
    folder = Path(cfg.out, name)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        for key in ("seconds", "share", "tokens_per_second", "peak_gb"):
            row.pop(key, None)
    files = "model.safetensors", "adapter/adapter_model.safetensors"
    return metrics, *((folder / "final" / file).read_bytes() for file in files)


def test_resume_equals_never_having_stopped(whole, monkeypatch):
    broken = dataclasses.replace(whole, name="broken", resume=True)
    update = pmd.update

    def dies(method, optimizer, rows, step):
        if step == 4:
            raise KeyboardInterrupt
        return update(method, optimizer, rows, step)

    monkeypatch.setattr(pmd, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        pmd.train(broken)
    monkeypatch.setattr(pmd, "update", update)
    pmd.train(broken)
    assert end_of(whole, "broken") == end_of(whole, "whole")


def test_a_checkpoint_holds_adapters_alone_and_can_be_evaluated(whole):
    saved = checkpoints(Path(whole.out, "whole"))[-1]
    assert not list(saved.glob("model*.safetensors"))
    adapter = load_file(saved / lora.FILE)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    size = sum(tensor.numel() for tensor in adapter.values())
    stored = FileSystemReader(saved / "trainer").read_metadata().state_dict_metadata
    numbers = {name: tensor.size.numel() for name, tensor in stored.items()}
    steps = sum(name.endswith(".step") for name in numbers)
    assert steps == len(adapter) and sum(numbers.values()) == 3 * size + steps
    policy = load_policy(dataclasses.replace(whole, lora_rank=0, model=str(saved)))
    final = load_policy(
        dataclasses.replace(whole, lora_rank=0, model=str(Path(whole.out, "whole", "final")))
    )
    assert not lora.is_adapted(policy)
    torch.testing.assert_close(logits(policy), logits(final))


def test_a_fork_with_another_rank_is_refused(whole):
    fork = dataclasses.replace(whole, name="fork", fork_from="whole@2")
    for rank in (0, 8):
        with pytest.raises(ValueError, match=f"trained with --lora_rank {RANK}, .* give the same"):
            pmd.check(dataclasses.replace(fork, lora_rank=rank))
    late = dataclasses.replace(fork, teacher="live", steps=3)
    assert pmd.train(late)["base"]["step"] == 2
    # an average that begins at a step without one begins at the student's adapter
    again = dataclasses.replace(fork, name="again", fork_from="fork@3", steps=4)
    assert pmd.train(again)["steps"] == 4


def test_what_it_does_not_do_is_refused_in_one_sentence(cfg, monkeypatch):
    with pytest.raises(ValueError, match="trains in one process, not in 2; give --nproc 1"):
        pmd.check(cfg, ranks=2)
    with pytest.raises(ValueError, match="--lora_rank is for training"):
        checks.check(cfg, None)
    with pytest.raises(ValueError, match="lora_rank -1 must be at least 0"):
        pmd.check(dataclasses.replace(cfg, lora_rank=-1))
    path = Path(cfg.out, "torn") / lora.FILE
    path.parent.mkdir()
    path.write_bytes(b"half of it")
    with pytest.raises(RunError, match="a cure"):
        lora.read_adapter(path.parent, load_policy(cfg), [lora.STUDENT], "a cure")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install peft"):
        pmd.check(cfg)


@pytest.mark.slow
def test_pmd_with_adapters_learns(make_config):
    """Eighty steps of nano's preset by a rank of 16. Three times the rate collapses."""
    flags = "--lora_rank 16 --lr 3e-3 --supervise solved --eval_every 0 --eval_problems 60"
    cfg = pmd.parse_flags(flags.split())
    summary = pmd.train(dataclasses.replace(cfg, out=make_config().out, name="learns"))
    assert summary["base"]["avg_at_k"] < 0.1 and summary["final"]["avg_at_k"] > 0.8
