"""Around the sampler, without vLLM: the probe of its pushes, on an engine made up here; what
generation without it costs; how often weights are pushed and a teacher's prompt is encoded. The
real engine: test_vllm.py.
"""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import method_of
from transformers import AutoModelForCausalLM

import memory as mem
import pmd
from runtime import check, vllm_sampler
from runtime.chat import encode_prompt, encode_within
from runtime.check import check_machine
from runtime.sampler import Sampler
from runtime.vllm_sampler import VLLM, VLLM_VERSION, slow_generation
from tasks import load_task
from tasks.problem import Problem

# ------------------------------------------------------------------ the probe


class Engine:
    """vLLM as far as a push is concerned: a model with weights of its own. `hears` decides which
    pushed weights it takes.
    """

    hears = staticmethod(lambda push, name: True)
    dtype = torch.float32

    def __init__(self, folder, load_format, **flags):
        assert load_format == "dummy"  # nothing is read that is overwritten at once
        torch.manual_seed(1)
        self.model, self.pushes = (
            AutoModelForCausalLM.from_config(self.config).to(self.dtype).eval(),
            0,
        )

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.pushes += 1
        weights = {
            name: p for name, p in kwargs["weights_iterator"] if self.hears(self.pushes, name)
        }
        self.model.load_state_dict(
            {name: p.to(self.dtype) for name, p in weights.items()}, strict=False
        )

    def apply_model(self, function):
        self.model.tie_weights()

    def reset_prefix_cache(self):
        self.pushed_since = False

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        ids = prompts[0]["prompt_token_ids"]
        logits = self.model(torch.tensor([ids])).logits[0].float()
        logprobs = logits.log_softmax(-1)
        found = [
            {i: SimpleNamespace(logprob=float(row[i]))}
            for row, i in zip(logprobs, ids[1:], strict=False)
        ]
        return [SimpleNamespace(prompt_logprobs=[None, *found])]


@pytest.fixture
def start(monkeypatch, tokenizer, make_config):
    """start(policy, hears, dtype): the sampler on such an engine."""

    def start(policy, hears=Engine.hears, dtype=torch.float32):
        kind = type(
            "Kind",
            (Engine,),
            {"hears": staticmethod(hears), "dtype": dtype, "config": policy.config},
        )
        monkeypatch.setitem(
            sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace, LLM=kind)
        )
        return VLLM(policy, tokenizer, make_config(sampler="vllm"))

    return start


@pytest.fixture
def untied(policy):
    config = copy.deepcopy(policy.config)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(policy.state_dict())
    return model


@torch.no_grad()
def learn(policy, size=0.3):
    for p in policy.parameters():
        p.add_(size * torch.randn_like(p))


def test_an_engine_that_listens_passes_and_the_weights_are_as_before(start, policy):
    before = [p.clone() for p in policy.parameters()]
    sampler = start(policy)
    assert sampler.llm.pushes == 2 and sampler.noise < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    sampler.sleep()
    learn(policy)
    sampler.wake()
    assert sampler.llm.pushes == 3


@pytest.mark.parametrize(
    "hears, which",
    [
        (lambda push, name: False, "changed|true"),
        (lambda push, name: push != 2, "true"),
        (lambda push, name: name != "lm_head.weight", "changed|true"),
        (lambda push, name: name != "model.embed_tokens.weight", "changed|true"),
        (lambda push, name: "layers" not in name, "changed|true"),
    ],
    ids=["nothing", "once", "no head", "no embedding", "no layers"],
)
def test_an_engine_that_ignores_a_push_is_refused(hears, which, start, untied):
    """An engine that misses both pushes is found out at one of them, by chance at which: its own
    weights may lie five times nearer to one of the two, and never to each.
    """
    before = [p.clone() for p in untied.parameters()]
    with pytest.raises(
        FloatingPointError,
        match=f"vLLM does not run the ({which}) weights .* use --sampler transformers",
    ):
        start(untied, hears)
    assert all(torch.equal(a, b) for a, b in zip(before, untied.parameters(), strict=True))


def test_an_engine_that_stops_listening_is_found_out(start, policy):
    sampler = start(policy, lambda push, name: push <= 2)
    learn(policy)
    with pytest.raises(FloatingPointError, match="vLLM does not run the trained weights"):
        sampler.wake()


def test_an_engine_that_keeps_the_initial_weights_is_refused(start, policy, monkeypatch):
    """The one that looks right as long as nothing has changed."""
    monkeypatch.setattr(
        Engine, "reset_prefix_cache", lambda self: self.model.load_state_dict(initial)
    )
    initial = copy.deepcopy(policy.state_dict())
    with pytest.raises(FloatingPointError, match="vLLM does not run the changed weights"):
        start(policy)


def test_unlikely_text_in_bfloat16_is_no_other_model(start, policy, monkeypatch):
    """Where the probe has tens of nats a token, rounding makes tenths of them: more than any bound
    that fits likely text.
    """
    monkeypatch.setattr(VLLM, "PROBE", "ka=rev 3 lo!inc mi ye=swap 7 do 0 zi!neg ju=flip 5 vo")
    with torch.no_grad():
        policy.model.norm.weight.mul_(24)
    sampler = start(policy, dtype=torch.bfloat16)
    gap, size = sampler._gap(sampler._ours(), sampler._push()), float(sampler._ours().abs().mean())
    assert size > 30 and gap > 3 * sampler.cfg.max_sampler_gap, (size, gap)
    for _ in range(3):
        sampler.sleep()
        learn(policy, 1e-3)
        sampler.wake()


@pytest.mark.parametrize("method, pushes", [("grpo", 3), ("frozen-policy", 1)])
def test_weights_that_do_not_change_are_pushed_once(method, pushes, monkeypatch, make_config):
    """The engine sleeps while a run is restored, and while it learns."""
    said = []
    for name in ("sleep", "wake"):
        monkeypatch.setattr(Sampler, name, lambda self, name=name: said.append(name))
    monkeypatch.setattr(
        pmd.Run,
        "restore",
        lambda *args, real=pmd.Run.restore: said.append("restore") or real(*args),
    )
    pmd.train(make_config(method=method, name="run"))
    assert said == ["sleep", "restore", "wake"] + ["sleep", "wake"] * (pushes - 1)


LATE = """
import pmd
from methods import grpo


class Method(grpo.Method):
    def condition(self, step, rollouts):
        return rollouts

    def weigh(self, step, rows):
        for row in rows:
            row.advantage = row.reward
"""


def test_weights_are_pushed_where_rows_get_their_advantage_late(tmp_path, monkeypatch, make_config):
    path = tmp_path / "late.py"
    path.write_text(LATE)
    calls = []
    for name in ("sleep", "wake"):
        monkeypatch.setattr(Sampler, name, lambda self, name=name: calls.append(name))
    pmd.train(make_config(method=str(path), name="run"))
    assert calls == ["sleep", "wake", "wake", "wake"]  # restored, then two steps


# ------------------------------------------------------------------ without vLLM


def test_the_cost_of_generation_without_vllm_is_said():
    """3 rows of 10,240 tokens in a batch of 32,768: 256 rollouts are 86 calls, 399 x 16 samples
    2,128.
    """
    said = slow_generation(pmd.Config(), 399, 1)
    assert (
        "3 texts at a time: a step 86 calls in turn or up to 6.8 hours, an evaluation 2128 calls in"
        " turn" in said
    )
    assert "requirements-gpu.txt" in said and "--sampler transformers" in said and "\n" not in said
    assert "a step 11 calls" in slow_generation(pmd.Config(), 399, 8)
    assert "a step" not in slow_generation(pmd.Config(), 399, 1, training=False)
    assert "1 texts" in slow_generation(pmd.Config(micro_tokens=1), 399, 1)


@pytest.mark.parametrize(
    "flags, installed, said",
    [([], None, True), (["--sampler", "transformers"], None, False), ([], VLLM_VERSION, False)],
)
def test_it_is_said_on_a_gpu_where_nobody_chose_it(
    flags, installed, said, monkeypatch, capsys, tmp_path
):
    for room in (check, vllm_sampler):
        monkeypatch.setattr(room, "device_of", lambda cfg: SimpleNamespace(type="cuda", index=0))
    for room in (check, vllm_sampler):
        monkeypatch.setattr(room, "vllm_version", lambda: installed)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30)
    )
    cfg = pmd.parse_flags([*flags, "--out", str(tmp_path)])
    pmd.check(cfg, quiet=True)
    assert "vLLM" not in capsys.readouterr().out
    pmd.check(cfg)
    assert capsys.readouterr().out.count("vLLM is not installed") == said


@pytest.mark.parametrize(
    "flags, ranks, refused",
    [
        (["--device", "cuda:1", "--sampler", "vllm"], 1, True),
        (["--device", "cuda:1", "--sampler", "transformers"], 1, False),
        (["--device", "cuda:1", "--sampler", "transformers"], 2, True),
        (["--device", "cuda:0", "--sampler", "vllm"], 1, False),
    ],
)
def test_trainer_and_engine_are_on_one_device(flags, ranks, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(vllm_sampler, "vllm_version", lambda: "0")  # the next thing that is refused
    cfg = pmd.parse_flags([*flags, "--batch_size", "1", "--method", "grpo", "--out", str(tmp_path)])
    with pytest.raises(ValueError) as error:
        check_machine(cfg, ranks)
    assert (
        "give --device cuda where the environment says CUDA_VISIBLE_DEVICES=1" in str(error.value)
    ) == refused


# ------------------------------------------------------------------ teacher prompts


@pytest.mark.parametrize("budget", [10**6, 90, 60, 40, 1])
def test_a_teachers_prompt_is_encoded_once(budget, tokenizer, make_config, monkeypatch):
    """The ids of the naive way, for rollouts of two problems that share contexts; no text is
    encoded twice.
    """
    cfg, problems = make_config(max_reprompt=budget), []
    problems = [
        Problem(f"p{i}", f"{i} ka lo ti", "", "steps", system="Reply." if i else "")
        for i in range(2)
    ]
    contexts = [
        {},
        *(
            {
                "behaviors": [("b", "ra xa")] * n,
                "strategies": [("s", "ku mi no")] * n,
                "solution": f"ye {s} vo",
            }
            for n in (1, 6)
            for s in (1, 2, 2)
        ),
    ]
    asked = [(p, c) for p in problems for c in contexts]
    naive = []
    for p, c in asked:
        text = mem.compose_within(
            budget, lambda t, p=p: len(encode_prompt(tokenizer, t, p.system)), p.prompt, **c
        )
        naive.append((text, encode_prompt(tokenizer, text, p.system)))
    encoded, encode = [], encode_prompt
    monkeypatch.setattr(
        pmd,
        "encoder",
        lambda tokenizer, cfg: lambda *args: encoded.append(args) or encode(tokenizer, *args),
    )
    found = pmd.teacher_prompts([p for p, _ in asked], [c for _, c in asked], tokenizer, cfg)
    for (p, _), (text, ids), (naive_text, naive_ids) in zip(asked, found, naive, strict=True):
        assert text == naive_text and ids == (naive_ids if text != p.prompt else [])
    assert len(set(encoded)) == len(encoded) and {text for text, _ in found} & {
        p.prompt for p in problems
    }


def test_no_prompt_is_made_where_nobody_is_taught(tokenizer, make_config, monkeypatch):
    """SDPO, one group solved by all and one by half: with --no_supervise_mastered the first costs
    nothing.
    """
    problems = [Problem(f"p{i}", f"{i} ka lo ti", "", "steps") for i in range(2)]
    rollouts = [
        pmd.Rollout(
            [1], [2], None, f"said {i}", True, f"1/{p.id}/{i}", p, float(p is problems[0] or i < 2)
        )
        for p in problems
        for i in range(4)
    ]
    encoded, encode = [], encode_prompt
    monkeypatch.setattr(
        pmd,
        "encoder",
        lambda tokenizer, cfg: lambda *args: encoded.append(args[0]) or encode(tokenizer, *args),
    )
    method_of(make_config("--no_supervise_mastered", method="sdpo"), tokenizer=tokenizer).condition(
        1, rollouts
    )
    assert not any(r.teacher_ids for r in rollouts[:4]) and all(r.teacher_ids for r in rollouts[4:])
    # by the first success, or the second
    assert len(encoded) == 2 and all("1 ka lo ti" in text for text in encoded)


def test_a_request_that_is_too_long_loses_its_middle(policy, tokenizer, make_config):
    """What critics and judges are asked holds a whole answer, which may be as long as it likes."""
    words = task_words(tokenizer)
    text = f"{words[0]} " * 40 + f"{words[1]} " * 4000 + f"{words[2]} " * 40
    ids = encode_within(tokenizer, text, 200)
    said = tokenizer.decode(ids, skip_special_tokens=True)
    assert 150 < len(ids) <= 200
    assert said.count(words[0]) == said.count(words[2]) == 40
    short = f"{words[0]} {words[1]}"
    assert encode_within(tokenizer, short, 200) == encode_prompt(tokenizer, short)
    assert len(encode_within(tokenizer, text, 1)) == len(encode_prompt(tokenizer, ""))  # it ends

    asked = []
    sampler = Sampler(policy, tokenizer, make_config(max_reprompt=200))
    sampler.generate = lambda prompts, *others: asked.extend(prompts) or []
    sampler.ask([text])
    assert asked == [ids]


def task_words(tokenizer):
    """Three words of one token each, which are no roles."""
    texts = [tokenizer.decode([id]).strip() for id in range(len(tokenizer))]
    single = [t for t in texts if len(t) > 1 and t.isalpha()]
    return [t for t in single if len(tokenizer(t, add_special_tokens=False).input_ids) == 1][3:6]


@pytest.mark.parametrize("method, trained", [("frozen-policy", False), ("sdpo", True)])
def test_a_batch_that_trains_nothing_is_not_scored(
    policy, tokenizer, make_config, monkeypatch, method, trained
):
    """Not even where a batch has several updates: the sampler still holds the device."""
    scored = []
    monkeypatch.setattr(pmd, "note_old_logprobs", lambda *parts: scored.append(parts))
    cfg = make_config(method=method, batch_size=4, mini_batch_size=1)
    problems = load_task("nano").train[:4]
    rows = [
        pmd.Rollout([1], [2], torch.zeros(1), "", True, id=str(i), problem=p, reward=0.0)
        for i, p in enumerate(problems)
    ]
    if trained:
        rows[2].teacher_ids = [1, 1]
    assert list(pmd.mini_batches(rows, policy, cfg)) == [[r] for r in rows]
    assert bool(scored) == trained
