"""--sampler vllm against transformers, on vLLM's CPU build; skipped where vllm is not installed
(.ci/run makes a place).

On the embedded model, whose head is tied to its embedding, and on random ones: one whose head is
its own, and an OLMo 3, which vLLM runs by transformers' code. Where counts are compared, a test
says how unlikely a false alarm is, and shows that a difference worth finding is found.
"""

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NANO, method_of
from scipy.stats import chi2_contingency, chisquare, norm
from test_ranks import FLAGS, assert_same, run
from test_templates import CHATML, a_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import memory as mem
import pmd
from runtime import vllm_sampler
from runtime.chat import encode_prompt
from runtime.checkpoint import save_model
from runtime.formats import NEW_BEHAVIORS, ONLY_LESSONS
from runtime.lora import adapted_layers
from runtime.model import MODELS, load_policy, make_optimizer
from runtime.sampler import Sampler
from runtime.vllm_sampler import VLLM, make_sampler, vllm_version
from tasks import load_task

pytestmark = pytest.mark.skipif(vllm_version() is None, reason="vllm is not installed")

LEVEL = 1e-3  # of every test below: the chance of a false alarm


@pytest.fixture(scope="module")
def problems():
    return load_task("nano").train


def random_model(folder, config):
    """Writes a random model with the embedded one's tokenizer; returns the folder."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    for p in policy.parameters():
        p.data.mul_(3)  # logits worth telling apart
    policy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A folder with a model whose head is not its embedding."""
    return random_model(
        tmp_path_factory.mktemp("untied"),
        AutoConfig.from_pretrained(
            NANO,
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=96,
            tie_word_embeddings=False,
        ),
    )


@pytest.fixture(scope="module")
def olmo3(tmp_path_factory):
    """A folder with a model whose window is shorter than a prompt with its completion."""
    nano = AutoConfig.from_pretrained(NANO)
    return random_model(
        tmp_path_factory.mktemp("olmo3"),
        AutoConfig.for_model(
            "olmo3",
            vocab_size=nano.vocab_size,
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=96,
            num_hidden_layers=4,
            sliding_window=16,
            max_position_embeddings=1024,
            eos_token_id=nano.eos_token_id,
            pad_token_id=nano.pad_token_id,
            bos_token_id=None,
        ),
    )


def samplers(cfg):
    """vLLM's sampler and transformers' on one policy."""
    tokenizer, policy = (
        AutoTokenizer.from_pretrained(MODELS.get(cfg.model, cfg.model)),
        load_policy(cfg),
    )
    return make_sampler(policy, tokenizer, cfg), Sampler(policy, tokenizer, cfg)


def told(sampler, problems, steps, updates, cfg):
    """Updates of the policy on its own rollouts, by a teacher that is told every hidden rule.
    Yields the sums.
    """
    policy = sampler.trained
    teacher, optimizer = copy.deepcopy(policy), make_optimizer(policy, cfg)
    for step in steps:
        sampler.step = step
        rollouts = pmd.attempt(sampler, problems, cfg)
        for r in rollouts:
            hint = mem.compose(
                r.problem.prompt,
                strategies=[("rule", rule) for rule in r.problem.extra["hidden"].split()],
            )
            r.teacher_ids = encode_prompt(sampler.tokenizer, hint)
        for _ in range(updates):
            sums = pmd.update(method_of(cfg, policy, teacher), optimizer, rollouts, step)
        sampler.sleep()
        sampler.wake()
        yield sums


@pytest.mark.parametrize("name", ["nano", "untied", "olmo3"])
def test_everything_the_engine_claims(name, request, problems, make_config):
    """One engine, several properties: an engine takes ten seconds to make."""
    cfg = make_config(
        model=name if name == "nano" else str(request.getfixturevalue(name)),
        task="nano",
        sampler="vllm",
    )
    sampler, _ = samplers(cfg)
    policy = sampler.trained
    assert isinstance(sampler, VLLM) and policy.config.tie_word_embeddings == (name == "nano")

    # its log-probabilities are the trainer's, now and after updates
    for sums in told(sampler, problems[:4], range(1, 4), 1, cfg):
        assert sums["sampler_gap_max"] < 1e-3

    # completions end with EOS, or at the limit, and are keyed: the same whatever else is asked with
    # them
    alone, together = sampler.answer(problems[:1], 2), sampler.answer(problems[:4], 2)
    assert [s.ids for s in alone[0]] == [s.ids for s in together[0]]
    for group in together:
        for s in group:
            assert s.finished == (s.ids[-1] in sampler.eos) and len(s.ids) <= cfg.max_completion
            assert len(s.ids) == len(s.rollout_logprobs)

    # more prompts than one batch holds: none may be cut in two, or its draws would change
    prompts = torch.randint(20, 100, (250, 60), generator=torch.Generator().manual_seed(0)).tolist()
    many = sampler.generate(prompts, [("many", i) for i in range(250)], 8, 1.0, 1.0)
    (last,) = sampler.generate(prompts[-1:], [("many", 249)], 8, 1.0, 1.0)
    assert last.ids == many[-1].ids and len({tuple(s.ids) for s in many}) > 100

    # the first token follows the model's own distribution at the temperature asked for
    # nano repeats the digits and the syllable, and has to guess
    prompt = alone[0][0].prompt_ids + alone[0][0].ids[:5]
    with torch.no_grad():
        p = (policy(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1).numpy()
    drawn = sampler.generate([prompt] * 3000, [("first", i) for i in range(3000)], 1, 0.7, 1.0)
    counts = np.bincount([s.ids[0] for s in drawn], minlength=len(p))
    common = p * 3000 > 5
    observed, expected = (
        np.append(counts[common], counts[~common].sum()),
        np.append(p[common], p[~common].sum()) * 3000,
    )
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > LEVEL
    for s in drawn[:20]:  # and the log-probability it reports is that of this distribution
        assert float(s.rollout_logprobs[0]) == pytest.approx(np.log(p[s.ids[0]]), abs=1e-4)

    # a push that is ignored is found out, whenever it happens
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    real, sampler.llm.collective_rpc = sampler.llm.collective_rpc, lambda *args, **kwargs: None
    with pytest.raises(FloatingPointError, match="vLLM does not run the trained weights"):
        sampler.wake()
    sampler.llm.collective_rpc = real
    sampler.wake()

    # so is a head that stays behind, which an unchanged copy would not show
    if name == "nano":
        sampler._tie = lambda model: None
        with pytest.raises(FloatingPointError, match="vLLM does not run the changed weights"):
            sampler.verify()


def test_adapters_are_pushed_merged(problems, make_config, monkeypatch):
    """Before and after updates. An engine that is given the base alone is found out at the start,
    where an adapter adds 0.
    """
    pytest.importorskip("peft")
    cfg = make_config(model="nano", task="nano", sampler="vllm", lora_rank=8, lr=3e-3)
    sampler, _ = samplers(cfg)
    for sums in told(sampler, problems[:4], range(1, 4), 1, cfg):
        assert sums["sampler_gap_max"] < 1e-3
    assert all(layer.lora_B["student"].weight.any() for layer in adapted_layers(sampler.trained))

    def base_alone(model):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                yield name.replace(".base_layer.", "."), parameter

    monkeypatch.setattr(vllm_sampler, "merged", base_alone)
    with pytest.raises(FloatingPointError, match="vLLM does not run the changed weights"):
        sampler.verify()


def test_rounding_is_no_other_model(untied, make_config):
    """A start, and a push, in bfloat16, where a thousandth of the usual bound would be too
    little.
    """
    cfg = make_config(
        model=str(untied), task="nano", sampler="vllm", dtype="bfloat16", max_sampler_gap=1e-4
    )
    sampler, _ = samplers(cfg)
    assert sampler._gap(sampler._ours(), sampler._push()) > 3 * cfg.max_sampler_gap
    sampler.sleep()
    sampler.wake()


def two_proportions(a, b, n):
    """z of the difference of two counts out of n each. For the same problems on both sides it errs
    on the safe side.
    """
    p = (a + b) / (2 * n)
    return (a - b) / (2 * n * p * (1 - p)) ** 0.5


def test_the_engine_follows_a_schema(tmp_path_factory, make_config):
    """A model that writes at random, over a tokenizer that llguidance can read."""
    tokenizer = a_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    shape = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=96,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("bytes")
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    changes = dict(sampler="vllm", memory_format="guided", memory_completion=400)
    cfg = make_config(model=str(folder), max_reprompt=1500, **changes)
    engine, plain = samplers(cfg)
    prompts = [f"{n}\n{request}" for n, request in enumerate((ONLY_LESSONS, NEW_BEHAVIORS))]
    for sampler in (engine, plain):
        for reply, key in zip(sampler.ask(prompts), ("lessons", "behaviors"), strict=True):
            assert reply.startswith(f'{{"{key}": [{{"'), reply


def test_completions_are_distributed_as_transformers_are(problems, make_config):
    """Whole completions at T = 1, before and after updates: chi-square over those that are common,
    the others together.
    """
    cfg = make_config(model="nano", task="nano", sampler="vllm", group_size=2, max_sampler_gap=0.5)
    fast, slow = samplers(cfg)
    few, n = [problems[0], problems[60]], 1000  # of one syllable and of two

    def drawn(sampler, problem, temperature=1.0):
        prompt = encode_prompt(sampler.tokenizer, problem.prompt)
        keys = [(type(sampler).__name__, problem.id, i) for i in range(n)]
        return Counter(
            s.text
            for s in sampler.generate([prompt] * n, keys, cfg.max_completion, temperature, 1.0)
        )

    def p_value(one, other):
        both = one + other
        rows = [(one[t], other[t]) for t, count in both.items() if count >= 20]
        rest = n - np.sum(rows, axis=0)
        return chi2_contingency([*rows, rest] if rest.sum() >= 20 else rows).pvalue, len(rows)

    def compare():
        for problem in few:
            p, kinds = p_value(drawn(fast, problem), drawn(slow, problem))
            assert p > LEVEL / 4 and kinds >= 3, (problem.id, p, kinds)

    compare()
    before = drawn(slow, few[1])
    for _ in told(fast, problems[::2], range(1, 5), 1, cfg):
        pass
    compare()
    assert (
        p_value(drawn(fast, few[1]), before)[0] < 1e-9
    )  # weights of four updates ago would have been noticed
    # so would another temperature
    assert p_value(drawn(fast, few[1]), drawn(slow, few[1], 1.3))[0] < 1e-6


@pytest.fixture(scope="module")
def solver(problems, tmp_path_factory):
    """A folder with the embedded model after a few updates: it solves about a third of the
    problems.
    """
    torch.set_num_threads(1)
    cfg = dataclasses.replace(pmd.parse_flags([]), sampler="transformers", group_size=2)
    sampler, _ = samplers(cfg)
    for _ in told(sampler, problems[::2], range(1, 5), 1, cfg):
        pass
    folder = tmp_path_factory.mktemp("solver")
    save_model(sampler.trained, sampler.tokenizer, folder)
    return folder


def test_runs_of_both_samplers_agree(solver, make_config):
    """The whole loop, memory included: successes of the rollouts and of the last evaluation, over
    the same problems. Each run learns from its own rollouts; the small rate keeps their weights,
    and so their chances, alike.
    """
    counts, n = {}, {}
    for sampler in ("vllm", "transformers"):
        cfg = make_config(
            model=str(solver),
            task="nano",
            sampler=sampler,
            name=sampler,
            steps=4,
            lr=1e-4,
            batch_size=24,
            mini_batch_size=24,
            group_size=8,
            eval_problems=160,
            eval_k=4,
            eval_temperature=1.0,
            behavior_every=2,
        )
        summary, folder = pmd.train(cfg), Path(cfg.out, sampler)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "reward" in row]
        assert all(row["updates"] == 1 and row["sampler_gap_max"] < 1e-3 for row in steps)
        assert min(summary["memory"].values()) > 0
        AutoModelForCausalLM.from_pretrained(folder / "final")
        evals = [
            json.loads(line)["reward"]
            for line in (folder / "evals" / "4-test.jsonl").read_text().splitlines()
        ]
        counts[sampler] = np.array([sum(row["reward"] for row in steps) * 24 * 8, sum(evals)])
        n[sampler] = np.array([4 * 24 * 8, len(evals)])
    assert (n["vllm"] == n["transformers"]).all()
    share = counts["transformers"] / n["vllm"]
    z = two_proportions(counts["vllm"], counts["transformers"], n["vllm"])
    assert ((0.1 < share) & (share < 0.9)).all(), share
    assert (np.abs(z) < norm.isf(LEVEL / 4)).all(), (counts, z)
    # ten points less would have been noticed
    assert (
        two_proportions(counts["transformers"] - n["vllm"] // 10, counts["transformers"], n["vllm"])
        < -norm.isf(LEVEL / 4)
    ).all()


@pytest.mark.parametrize("name", ["untied", "olmo3"])
def test_a_run_on_vllm_resumes(name, request, make_config):
    """Restoring makes a model of transformers beside the engine, which for OLMo 3 uses the same
    code.
    """
    cfg = make_config(
        model=str(request.getfixturevalue(name)),
        task="nano",
        sampler="vllm",
        memory_completion=16,
        name="run",
        save_every=1,
    )
    pmd.train(cfg)
    pmd.train(dataclasses.replace(cfg, resume=True, steps=3))
    rows = [
        json.loads(line) for line in Path(cfg.out, "run", "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of runs, with one of a single rank in it."""
    out = tmp_path_factory.mktemp("ranks")
    pmd.train(pmd.parse_flags([*FLAGS, "--sampler", "vllm", "--out", str(out), "--name", "one"]))
    return out


@pytest.mark.parametrize("share", [1, 2], ids=["an engine each", "an engine over both"])
def test_two_ranks_change_nothing(one, share):
    """Prompts spread over engines and gathered in order, weights made whole from their shards: the
    texts, and so the memory, are those of one rank, as keyed sampling promises up to ties of
    float32. Nor does a job stumble over what a killed one left in shared memory, or leave anything
    there itself.
    """
    left = [Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{r}") for r in range(2)]
    for segment in left:
        segment.touch()
    done = run(one, f"two{share}", 2, "--sampler", "vllm", "--tensor_parallel", str(share))
    assert done.returncode == 0, done.stderr
    assert_same(one / "one", one / f"two{share}")
    assert not any(segment.exists() for segment in left)


def test_a_comparison_on_two_ranks_runs_all_its_methods(tmp_path):
    """An engine that ends takes the process group of its process with it."""
    # four engines, two at a time
    done = run(
        tmp_path,
        "both",
        2,
        "--sampler",
        "vllm",
        "--compare",
        "sdpo,pmd",
        "--steps",
        "1",
        "--eval_every",
        "0",
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    for method in ("sdpo", "pmd"):
        rows = [
            json.loads(line)
            for line in (tmp_path / "both" / method / "metrics.jsonl").read_text().splitlines()
        ]
        assert [row["step"] for row in rows if "reward" in row] == [1]
        assert (
            json.loads((tmp_path / "both" / method / "summary.json").read_text())["method"]
            == method
        )
    assert (tmp_path / "both" / "compare.png").exists() and "pmd, after training" in done.stdout
