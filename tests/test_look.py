"""What is logged to be looked at, and the pages made of it, in a real browser."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import kernels
import pmd
from runtime import run, samples
from runtime.files import read_lines
from runtime.samples import token_texts


def sample_of(cfg):
    pmd.train(cfg)
    return read_lines(Path(cfg.out, cfg.name, "samples.jsonl"))[-1]


# -- the log


def test_a_sample_says_how_far_the_teacher_pulled_each_token(make_config, policy, monkeypatch):
    """Against the definition, over the whole vocabulary, with the weights that began the step."""
    trained = []

    def watched(step, rows, tokenizer):
        trained.extend(rows)
        return samples.sample_of(step, rows, tokenizer)

    monkeypatch.setattr(run, "sample_of", watched)
    cfg = make_config(name="r", steps=1, micro_tokens=200)
    sample = sample_of(cfg)
    (row,) = [r for r in trained if r.id == sample["rollout"]]
    logits = []
    for prompt in (row.prompt_ids, row.teacher_ids):
        with torch.no_grad():
            found = policy(torch.tensor([prompt + row.ids])).logits[0]
        logits.append(found[len(prompt) - 1 : -1])
    wanted = kernels.oracle(*logits, cfg.alpha).tolist()
    assert sample["divergence"] == pytest.approx(wanted, rel=1e-3, abs=2e-6)
    assert max(wanted) > 1e-3 and sample["advantage"] is None
    assert sample["teacher_prompt"] == row.teacher_prompt != ""
    assert "".join(sample["tokens"]).startswith(sample["completion"])


def test_a_sample_says_how_its_row_was_trained(make_config):
    sample = sample_of(make_config(name="r", method="grpo", steps=1))
    assert sample["divergence"] is None and isinstance(sample["advantage"], float)
    sample = sample_of(make_config(name="s", method="avsd", steps=1))
    assert sample["divergence"] is None
    assert len(sample["advantage"]) == len(sample["tokens"])  # one a token
    assert len(sample["further_prompts"]) == 3


def test_the_texts_of_tokens_read_as_their_completion():
    """A tokenizer of bytes: a part of a character is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=letters, vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator(["the answer is right"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = fast("the answer is  right: \u20ac.")["input_ids"]
    texts = token_texts(fast, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "the answer is  right: \ufffd\ufffd\ufffd."
    assert token_texts(fast, []) == [] and token_texts(fast, ids[:1]) == [texts[0]]
