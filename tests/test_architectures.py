"""The loop on tiny random models of the architectures that people bring.

The table of docs/running.md is made from this list: python tests/test_architectures.py
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_config
from test_templates import CHATML, a_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

import pmd
from runtime import check
from runtime.logits import logit_scale
from runtime.methods import method_class
from runtime.model import load_policy
from runtime.ranks import Unsupported
from runtime.rows import Continuation, completion_hidden, own_logprobs

HERE = Path(__file__).resolve().parent.parent
SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# (name, model type of transformers, what differs from SMALL)
ARCHITECTURES = [
    ("Llama", "llama", {}),
    ("Qwen3", "qwen3", {}),
    ("Qwen3-MoE", "qwen3_moe", EXPERTS),
    (
        "Qwen3.5",
        "qwen3_5_text",
        dict(
            num_hidden_layers=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
    ),
    ("OLMo 3", "olmo3", dict(num_hidden_layers=4, sliding_window=32)),
    # a softcap near the size of logits of random weights, which are far below Gemma's 30
    ("Gemma 2", "gemma2", dict(final_logit_softcapping=0.2, sliding_window=32)),
    ("Gemma 3", "gemma3_text", dict(num_hidden_layers=6, sliding_window=32)),
    (
        "Gemma 4",
        "gemma4_text",
        dict(
            num_hidden_layers=6,
            sliding_window=32,
            global_head_dim=16,
            num_global_key_value_heads=2,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=98,
            num_kv_shared_layers=0,
            final_logit_softcapping=0.2,
        ),
    ),
    (
        "GPT-OSS",
        "gpt_oss",
        dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=32),
    ),
    ("SmolLM3", "smollm3", {}),
    (
        "LFM2",
        "lfm2",
        dict(num_hidden_layers=4, full_attn_idxs=[1, 3], block_multiple_of=16, conv_L_cache=3),
    ),
    ("Mistral", "mistral", dict(sliding_window=None)),
    ("Granite", "granite", dict(logits_scaling=0.25)),
    ("Cohere 2", "cohere2", dict(logit_scale=4.0, sliding_window=32, num_hidden_layers=4)),
]
TOKENS = ("<|im_start|>", "<|im_end|>")
ASCII = "".join(map(chr, range(33, 127))) + "ĠĊ"  # and blank and line break


def random_model(folder, kind, changes):
    """Writes a model of that architecture with a tokenizer of bytes; returns the folder."""
    tokenizer = a_tokenizer(CHATML, TOKENS, eos="<|im_end|>", only=ASCII)
    tokenizer.pad_token = "<|im_end|>"
    ids = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), tokenizer.eos_token_id)
    shape = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SMALL | ids | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name, kind, changes", ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_the_loop_runs_on(name, kind, changes, tmp_path):
    """Two steps of PMD: the sampler agrees with the trainer, weights move, the end is written."""
    folder = random_model(tmp_path / "model", kind, changes)
    rows = "".join(
        f'{{"question": "What is {n} + {n}?", "answer": "{2 * n}"}}\n' for n in range(30)
    )
    (tmp_path / "sums.jsonl").write_text(rows)
    flags = ["--model", str(folder), "--task", str(tmp_path / "sums.jsonl")]
    cfg = small_config(tmp_path, *flags, embedder="hashing", memory_completion=160, group_size=2)
    cfg = dataclasses.replace(
        cfg, max_prompt=200, max_completion=16, max_reprompt=3000, memory_format="guided", name="x"
    )
    before = load_policy(cfg).get_output_embeddings().weight.detach().clone()
    summary = pmd.train(cfg)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "final")
    assert not torch.equal(before, after.get_output_embeddings().weight)
    assert summary["memory"]["insight"] > 0  # random models write JSON, too
    assert summary["memory_events"].get("reflect_parse_failure", 0) == 0


def test_logits_that_are_changed_after_the_head_are_refused(tmp_path):
    """HyperCLOVA X multiplies by the number that Granite divides by."""
    folder = random_model(tmp_path / "model", "hyperclovax", dict(logits_scaling=4.0))
    with pytest.raises(Unsupported, match="changes its logits after the head"):
        load_policy(small_config(tmp_path, f"--model={folder}"))


@pytest.mark.parametrize("name", ("g-opd", "selfci"))
def test_a_mix_of_hidden_states_is_refused_where_logits_are_bounded(name, tmp_path):
    folder = random_model(tmp_path / "model", "gemma2", dict(final_logit_softcapping=30.0))
    cfg = small_config(tmp_path, f"--model={folder}", f"--method={name}")
    policy = load_policy(cfg)
    with pytest.raises(Unsupported, match=f"--method {name} mixes hidden states.* 30.0"):
        method_class(cfg.method)(cfg, None, None, policy)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("granite", dict(logits_scaling=0.25)),
        ("cohere2", dict(logit_scale=4.0, sliding_window=32, num_hidden_layers=4)),
        ("falcon_h1", dict(lm_head_multiplier=4.0, mamba_d_ssm=64, mamba_n_heads=4)),
        ("gemma2", dict(final_logit_softcapping=0.05, initializer_range=0.1, sliding_window=32)),
        ("nanochat", dict(final_logit_softcapping=0.05, initializer_range=0.1)),
    ],
)
def test_changed_logits_give_the_log_probabilities_of_the_model(kind, changes, tmp_path):
    folder = random_model(tmp_path / "model", kind, changes)
    cfg = small_config(tmp_path, f"--model={folder}")
    policy = load_policy(cfg)
    row = Continuation("x", [40, 50, 60], [10, 20, 30])
    found = own_logprobs(policy, [row], cfg)
    with torch.no_grad():
        log_p = policy(torch.tensor([row.prompt_ids + row.ids])).logits[0, 2:-1].log_softmax(-1)
    assert torch.allclose(found, log_p[torch.arange(3), row.ids], atol=1e-5)
    hidden = completion_hidden(policy, [row.prompt_ids], [row]) / logit_scale(policy.config)
    plain = (hidden @ policy.get_output_embeddings().weight.T).log_softmax(-1)
    assert not torch.allclose(found, plain[torch.arange(3), row.ids], atol=1e-2)


def table() -> str:
    lines = ["| architecture | `model_type` |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | `{kind}` |" for name, kind, _ in ARCHITECTURES])


def test_the_table_of_the_docs_is_this_list():
    assert table() in (HERE / "docs" / "running.md").read_text()


def test_the_positions_of_a_model_that_reads_pictures_too(make_config, monkeypatch):
    """Its config.json holds one for each part, and the numbers of text stand in that of text."""
    shape = Gemma3Config(text_config={"max_position_embeddings": 100, "vocab_size": 50})
    found = SimpleNamespace(from_pretrained=lambda name: shape)
    monkeypatch.setattr(check, "AutoConfig", found)
    cfg = make_config(max_prompt=90, max_completion=10)
    check.check_lengths(None, None, cfg, 0, None)
    with pytest.raises(ValueError, match="has 100 positions, and a prompt of 91 tokens"):
        check.check_lengths(None, None, dataclasses.replace(cfg, max_prompt=91), 0, None)
    with pytest.raises(ValueError, match="--top_k 51 is more than the 50 tokens"):
        check.check_lengths(None, None, dataclasses.replace(cfg, top_k=51), 0, None)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
