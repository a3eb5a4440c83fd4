"""--sampler vllm against transformers, on vLLM's CPU build; skipped where vllm is not installed (.ci/run makes a place).

The embedded model can't take part: its heads have 24 dimensions, and vLLM's CPU attention wants 32 or more. Random models of
its vocabulary with heads of 32 stand in.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NANO
from scipy.stats import chisquare
from transformers import AutoConfig

import pmd
from eval import load_task

pytestmark = pytest.mark.skipif(pmd.vllm_version() is None, reason="vllm is not installed")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    """A folder with a random model."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = pmd.AutoTokenizer.from_pretrained(NANO)
    config = AutoConfig.from_pretrained(NANO, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
                                            intermediate_size=96, tie_word_embeddings=request.param)
    policy = pmd.AutoModelForCausalLM.from_config(config)
    for p in policy.parameters():
        p.data.mul_(3)  # logits worth telling apart
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def made(model, make_config):
    """(sampler, policy, tokenizer, config), the sampler verified while it was made."""
    cfg = make_config(model=str(model), sampler="vllm", max_reprompt=256, group_size=4)
    tokenizer, policy = pmd.AutoTokenizer.from_pretrained(model), pmd.load_policy(cfg)
    return pmd.make_sampler(policy, tokenizer, cfg), policy, tokenizer, cfg


def test_everything_the_engine_claims(made):
    """One engine, several properties: an engine takes ten seconds to make."""
    sampler, policy, tokenizer, cfg = made
    assert isinstance(sampler, pmd.VLLM)
    problems = load_task("nano").train[:4]
    teacher, optimizer = pmd.copy.deepcopy(policy), pmd.make_optimizer(policy, cfg)

    # its log-probabilities are the trainer's, now and after updates
    for step in (1, 2, 3):
        sampler.step = step
        rollouts = pmd.attempt(sampler, problems, cfg)
        for r in rollouts:
            r.teacher_ids = pmd.encode_prompt(tokenizer, r.problem.prompt + " Confidence: low.")
        sums = pmd.update(policy, teacher, optimizer, rollouts, step, cfg)
        assert sums["sampler_gap_max"] < 1e-3
        sampler.sleep()
        sampler.wake()
    stale = [p.clone() for p in policy.parameters()]

    # completions end with EOS, or at the limit, and are keyed: the same whatever else is asked with them
    alone, together = sampler.answer(problems[:1], 2), sampler.answer(problems, 2)
    assert [s.ids for s in alone[0]] == [s.ids for s in together[0]]
    for group in together:
        for s in group:
            assert s.finished == (s.ids[-1] in sampler.eos) and len(s.ids) <= cfg.max_completion
            assert len(s.ids) == len(s.rollout_logprobs)

    # the first token follows the model's own distribution at the temperature asked for
    prompt = pmd.encode_prompt(tokenizer, problems[0].prompt)
    with torch.no_grad():
        p = (policy(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1).numpy()
    drawn = sampler.generate([prompt] * 3000, [("first", i) for i in range(3000)], 1, 0.7, 1.0)
    counts = np.bincount([s.ids[0] for s in drawn], minlength=len(p))
    common = p * 3000 > 5
    observed, expected = np.append(counts[common], counts[~common].sum()), np.append(p[common], p[~common].sum()) * 3000
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-4
    for s in drawn[:20]:  # and the log-probability it reports is that of this distribution
        assert float(s.rollout_logprobs[0]) == pytest.approx(np.log(p[s.ids[0]]), abs=1e-4)

    # a push that is ignored is found out
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    real, sampler.llm.collective_rpc = sampler.llm.collective_rpc, lambda *args, **kwargs: None
    with pytest.raises(FloatingPointError, match="vLLM does not run the true weights"):
        sampler.compare("true")
    sampler.llm.collective_rpc = real
    assert sampler.compare("true") < 1e-4

    # so is a head that stays behind, which an unchanged copy would not show
    if policy.config.tie_word_embeddings:
        sampler._tie = lambda model: None
        with pytest.raises(FloatingPointError, match="vLLM does not run the changed weights"):
            sampler.verify()
        with torch.no_grad():  # which puts the trainer's weights back only where it succeeds
            for p, saved in zip(policy.parameters(), stale, strict=True):
                p.copy_(saved)


def test_the_whole_loop(model, make_config):
    cfg = make_config(model=str(model), sampler="vllm", max_reprompt=256, memory_completion=16, behavior_every=1, name="run",
                      eval_every=1, save_every=1)
    summary = pmd.train(cfg)
    assert summary["memory"]["experience"] > 0 and Path(cfg.out, "run", "final").is_dir()
    rows = [json.loads(line) for line in Path(cfg.out, "run", "metrics.jsonl").read_text().splitlines()]
    assert all(row["sampler_gap_max"] < 1e-3 for row in rows if row.get("updates"))
    pmd.train(dataclasses.replace(cfg, resume=True, steps=3))
