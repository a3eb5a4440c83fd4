"""The embedded checkpoint can do what a comparison on it needs, and knows nothing it should not."""

import json

import pytest
import torch

import memory as mem
from nano import make
from pmd import AutoModelForCausalLM, encode_prompt

# `python nano/make.py probe` prints the figures. Were siblings used less well than strategies, SDPO would be handicapped.
AT_LEAST = {"execution": 0.95, "strategy": 0.9, "behavior": 0.9, "sibling": 0.9, "reflect_win": 0.9, "reflect_loss": 0.9,
            "contrastive": 0.9, "abstract": 0.5, "weights": 0.95, "weights_beside_lessons": 0.9}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(make.HERE, dtype=torch.float32)


def test_probes(model, tokenizer):
    scores = make.probe(model, tokenizer)
    assert {k: v for k, v in scores.items() if v < AT_LEAST.get(k, 0)} == {}
    assert abs(scores["strategy"] - scores["sibling"]) < 0.08 and abs(scores["behavior"] - scores["sibling"]) < 0.08
    assert 1.8 < scores["entropy"] <= 2.08  # nats over 8 operations it was not told; ln 8 = 2.079


def test_it_does_not_know_the_shipped_world(model, tokenizer):
    """Over operations, the truth is about as likely as any: the secret was drawn after the model was trained."""
    train, _ = make.make_world(0)
    secret = dict(pair.split("=") for row in train for pair in row["hidden"].split())
    ids = tokenizer.get_vocab()
    rows = make.encode(tokenizer, [(make.problem_text([s], [3, 1, 7, 4]), f"3 1 7 4 {s}") for s in secret])
    with torch.no_grad():
        logprobs = model(torch.tensor([r[:-1] for r, _ in rows])).logits[:, -1].log_softmax(-1)
    mean = sum(logprobs[i, ids[f"{s}={o}"]].exp().item() for i, (s, o) in enumerate(secret.items())) / len(secret)
    assert mean < 0.25


def test_size_and_form(model):
    assert sum(p.numel() for p in model.parameters()) < 5e6 and model.config.model_type == "qwen3"
    assert sum(f.stat().st_size for f in make.HERE.rglob("*") if f.is_file()) < 20e6


def test_everything_it_reads_and_writes_is_in_its_vocabulary(tokenizer):
    rng = make.random.Random(3)
    for kind, _ in make.MIX:
        for prompt, reply in (kind(rng) for _ in range(100)):
            ids = encode_prompt(tokenizer, prompt)
            assert tokenizer.unk_token_id not in ids + tokenizer(reply)["input_ids"]
            decoded = tokenizer.decode(tokenizer(reply)["input_ids"])
            if reply.startswith("{"):  # the frame is ordinary vocabulary and survives the way back, to the same parser
                assert mem.parse(decoded).keys() == json.loads(reply).keys()
            else:
                assert decoded == reply
    fixed = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    assert fixed == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"}  # frame and bindings are never special
