"""PACED, TRACE, ExpRL, Uni-OPD, ATESD and VPD: what each claims of its rows, weights and gradients.

The oracles here compute from a model's logits, or by hand, and call nothing of a method's own.
"""

import copy
import dataclasses
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import method_of

import pmd
from methods import exprl, trace
from runtime.methods import method_class
from runtime.sampler import Sampler
from tasks import load_task

REWARDS = {"never": 0, "once": 1, "half": 2, "always": 4}  # successes in a group of 4


@pytest.fixture(scope="module")
def task():
    return load_task("nano")


@pytest.fixture
def attempts(policy, tokenizer):
    """A function that samples groups of 4 with this many successes each, whatever they answer."""

    def make(cfg, problems, successes):
        sampler = Sampler(policy, tokenizer, cfg)
        sampler.step = 1
        rollouts = pmd.attempt(sampler, problems, cfg)
        for i, r in enumerate(rollouts):
            r.reward = float(i % 4 < successes[i // 4])
            r.feedback = "" if r.reward else "ti!rol"
        return rollouts

    return make


def gradient(method, rows, step=1):
    """The gradients that `train` hands to the optimizer, one of each mini-batch, and their sums."""
    optimizer = torch.optim.SGD(method.policy.parameters(), lr=0.0)
    optimizer.updates = 0
    learning, method.cfg = method.cfg, dataclasses.replace(method.cfg, lr=0.0)
    gradients, sums = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmd, "MAX_GRAD_NORM", math.inf)
        for part in pmd.mini_batches(rows, method.policy, method.cfg):
            method.policy.zero_grad()
            sums.append(pmd.update(method, optimizer, part, step))
            gradients.append(flat(method.policy))
    method.cfg = learning
    return gradients, sums


def flat(policy):
    zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters())
    return torch.cat([g.flatten().clone() for g in zeros])


def log_p(model, prompt, ids):
    """(C, V): the log-probabilities of every token at each place of a completion."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def chosen(log_probabilities, ids):
    return log_probabilities.gather(1, torch.tensor(ids)[:, None])[:, 0]


def close(found, wanted):
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def answering(rollout, text, tokenizer):
    """The rollout with another completion, which ends."""
    rollout.text = text
    rollout.ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    rollout.rollout_logprobs = None
    return rollout


def right(problem):
    """The one right answer to a problem of nano."""
    words = problem.answer
    for rule in problem.extra["hidden"].split():
        words = words.replace(rule.split("=")[0] + "=*", rule)
    return words


@pytest.mark.parametrize(
    "name, flags",
    [
        ("paced", dict(paced_stages=True)),
        ("trace", {}),
        ("trace-rkl", {}),
        ("exprl", {}),
        ("uni-opd", {}),
        ("atesd-scheduled", dict(atesd_from=1.0)),
        ("atesd", {}),
        ("vpd", dict(vpd_every=1)),
    ],
)
def test_runs_by_name(make_config, name, flags):
    cfg = make_config(method=name, name="run", **flags)
    summary = pmd.train(cfg)
    rows = [json.loads(line) for line in Path(cfg.out, "run", "metrics.jsonl").open()]
    steps = [row for row in rows if "reward" in row]
    assert summary and [row["step"] for row in steps] == [1, 2]
    assert sum(row["updates"] for row in steps) > 0


# -- PACED


def test_paced_weighs_problems_by_their_pass_rate(policy, tokenizer, task, make_config, attempts):
    """Gradients from logits: 0 where s is 0 or 1, else KL(p || q) times s (1 - s) over its mean."""
    cfg = make_config(method="paced", batch_size=4, mini_batch_size=4)
    problems, teacher = task.train[:40:10], copy.deepcopy(policy)
    method = method_of(cfg, policy, teacher, tokenizer=tokenizer)
    rows = method.condition(1, attempts(cfg, problems, [*REWARDS.values()]))
    (found,), _ = gradient(method, rows)
    share = {problems[1].id: 3 / 16, problems[2].id: 1 / 4}
    taught = [r for r in rows if r.problem.id in share and r.teacher_ids]
    assert len(taught) == 3 + 4  # the only success of a group has no sibling to read
    mean = sum(share[r.problem.id] for r in taught) / 7
    policy.zero_grad()
    for r in taught:
        p = log_p(policy, r.prompt_ids, r.ids)
        q = log_p(teacher, r.teacher_ids, r.ids).detach()
        weight = share[r.problem.id] / mean / len(r.ids) / len(rows)
        (weight * (p.exp() * (p - q)).sum()).backward()
    assert found.abs().max() > 0 and close(found, flat(policy))


def test_paced_takes_no_step_without_a_problem_of_the_frontier(
    policy, tokenizer, task, make_config, attempts
):
    cfg = make_config(method="paced", batch_size=2, mini_batch_size=2)
    method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer)
    rollouts = attempts(cfg, task.train[:20:10], [0, 4])
    sdpo = method_of(dataclasses.replace(cfg, method="sdpo"), policy, tokenizer=tokenizer)
    assert all(r.teacher_ids for r in sdpo.condition(1, rollouts))  # which SDPO would supervise
    (found,), (sums,) = gradient(method, method.condition(1, rollouts))
    assert not found.any() and sums["updates_skipped"] == 1


def test_paced_without_exponents_is_sdpo(policy, tokenizer, task, make_config, attempts):
    found = []
    for name, flags in (("paced", dict(paced_a=0.0, paced_b=0.0)), ("sdpo", dict(alpha=1.0))):
        cfg = make_config(method=name, batch_size=4, mini_batch_size=4, **flags)
        method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer)
        rollouts = attempts(cfg, task.train[:40:10], [*REWARDS.values()])
        found += gradient(method, method.condition(1, rollouts))[0]
    assert found[0].any() and torch.equal(*found)


def test_paced_turns_the_divergence_at_half_time(task, make_config):
    cfg = make_config(method="paced", steps=5, paced_stages=True)
    method = method_of(cfg, task=task)
    alphas = []
    for step in range(1, 6):
        method.weigh(step, [])
        alphas.append(method.cfg.alpha)
    assert alphas == [0, 0, 1, 1, 1]
    plain = method_of(make_config(method="paced"), task=task)
    plain.weigh(1, [])
    assert plain.cfg.alpha == 1


# -- TRACE


def answered(method, task, tokenizer, attempts):
    """A group of a problem of three steps: a right answer, one that fails at the second step, and
    two others.
    """
    problem = next(p for p in task.train if len(p.extra["hidden"].split()) == 3)
    rollouts = attempts(method.cfg, [problem], [1])
    second = problem.extra["hidden"].split()[1]
    wrong = second.split("=")[0] + ("=rev" if second.split("=")[1] != "rev" else "=inc")
    answering(rollouts[0], right(problem), tokenizer)
    answering(rollouts[1], right(problem).replace(second, wrong).rsplit(" ", 4)[0], tokenizer)
    return rollouts, wrong


@pytest.mark.parametrize("name", ["trace", "trace-rkl"])
def test_trace_marks_what_matters_and_reinforces_the_rest(
    policy, tokenizer, task, make_config, attempts, name
):
    cfg = make_config(method=name, batch_size=1, mini_batch_size=1)
    method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer, task=task)
    for step, share in ((1, 1.0), (10, 1.0), (25, 0.5), (39, 1 / 30)):
        rollouts, wrong = answered(method, task, tokenizer, attempts)
        at, advantage = (0, 0.75) if name == "trace" else (1, -0.25)
        words = rollouts[at].text.split()
        marked = {wrong} if at else set(rollouts[0].problem.extra["hidden"].split())
        row = method.condition(step, rollouts)[at]
        mask = torch.tensor([float(word in marked) for word in [*words, ""]])
        assert mask.sum() == (1 if at else 3)
        assert torch.allclose(row.weight, 0.5 * share * mask)
        assert torch.allclose(row.advantage, advantage * (1 - share * mask))
        for r in rollouts:
            assert bool(r.teacher_ids) <= ((r.reward > 0.5) == (name == "trace"))
            if r.teacher_ids:
                assert 0 < (r.weight > 0).sum() <= len(r.ids) / 4


def test_trace_joins_a_divergence_and_a_surrogate(policy, tokenizer, task, make_config, attempts):
    """From logits: 0.25 KL(q || p) on half-annealed key tokens, the advantage on all."""
    cfg = make_config(method="trace", batch_size=1, mini_batch_size=1)
    teacher = copy.deepcopy(policy)
    method = method_of(cfg, policy, teacher, tokenizer=tokenizer, task=task)
    rollouts, _ = answered(method, task, tokenizer, attempts)
    rows = method.condition(25, rollouts)
    (found,), sums = gradient(method, rows)
    policy.zero_grad()
    for i, r in enumerate(rows):
        p = log_p(policy, r.prompt_ids, r.ids)
        marked = torch.zeros(len(r.ids))
        if i == 0:
            hidden = r.problem.extra["hidden"].split()
            marked = torch.tensor([float(w in hidden) for w in [*r.text.split(), ""]])
            q = log_p(teacher, r.teacher_ids, r.ids).detach()
            (0.25 * marked * (q.exp() * (q - p)).sum(1)).mean().div(4).backward(retain_graph=True)
        advantage = (0.75 if i == 0 else -0.25) * (1 - 0.5 * marked)
        (-advantage * chosen(p, r.ids)).mean().div(4).backward()
    assert close(found, flat(policy))


@pytest.mark.parametrize("step, flags", [(40, {}), (41, {}), (1, dict(trace_lambda=0.0))])
def test_trace_is_grpo_from_its_last_annealing_step(
    policy, tokenizer, task, make_config, attempts, step, flags
):
    found = []
    for name, own in (("trace", flags), ("grpo", {})):
        cfg = make_config(method=name, batch_size=2, mini_batch_size=2, **own)
        method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer, task=task)
        rows = method.condition(step, attempts(cfg, task.train[:20:10], [1, 2]))
        assert not any(r.teacher_ids for r in rows)
        found += gradient(method, rows)[0]
    assert found[0].any() and torch.equal(*found)


def test_trace_that_is_annealed_ends_with_the_weights_of_grpo(make_config, monkeypatch):
    monkeypatch.setattr(trace, "HOLD", 0)
    monkeypatch.setattr(trace, "FALL", 1)  # over at step 1
    ends = []
    for name in ("trace", "grpo"):
        cfg = make_config(method=name, name=name, batch_size=8, mini_batch_size=8)
        pmd.train(cfg)
        ends.append(Path(cfg.out, name, "final", "model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_trace_copies_the_policy_to_its_teacher_every_ten_steps(policy, make_config):
    teacher = copy.deepcopy(policy)
    method = method_of(make_config(method="trace"), policy, teacher)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1
    before = copy.deepcopy(teacher.state_dict())
    method.follow(9)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    method.follow(10)
    assert all(map(torch.equal, teacher.parameters(), policy.parameters()))


class Pieces:
    """A tokenizer whose ids are places in a list of pieces."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[i] for i in ids if self.pieces[i] != "<end>")

    def batch_decode(self, rows):
        return ["".join(self.pieces[i] for i in ids) for ids in rows]


@pytest.mark.parametrize("name, block", [("trace", "strategies"), ("trace-rkl", "lessons")])
def test_trace_elsewhere_asks_the_policy_for_lines_and_a_kind(
    make_config, monkeypatch, name, block
):
    pieces = "so", " it", "\n", "is", " 7", " now", ".", "\n\n", "Thus", " 2", " is", " right"
    asked, contexts = [], []

    def ask(prompts):
        asked.extend(prompts)
        return ["Line 2 and line 9: it is a Calculation."] * len(prompts)

    def prompts_of(problems, given, tokenizer, cfg):
        contexts.extend(given)
        return [("told", [1, 2])] * len(problems)

    monkeypatch.setattr(pmd, "teacher_prompts", prompts_of)
    method = method_of(make_config(method=name), tokenizer=Pieces(*pieces, "<end>"))
    method.cfg = dataclasses.replace(method.cfg, task="mine")
    method.sampler = SimpleNamespace(ask=ask)
    problem = SimpleNamespace(id="x", prompt="Why?", verifier="number")
    rollouts = [
        SimpleNamespace(id=str(i), problem=problem, reward=reward, ids=list(range(13)))
        for i, reward in enumerate((1.0, 0.0))
    ]
    for r in rollouts:
        r.teacher_ids = []
    row = method.condition(1, rollouts)[name == "trace-rkl"]
    assert len(asked) == 1 and "1. so it\n2. is 7 now.\n3. \n4. Thus 2 is right\n" in asked[0]
    assert contexts == [{block: [("kind", "calculation")]}]
    assert row.teacher_ids and (row.weight > 0).nonzero()[:, 0].tolist() == [3, 4, 5]  # a quarter


# -- ExpRL


def test_exprl_scores_right_steps(tokenizer, task, make_config, attempts):
    cfg = make_config(method="exprl", batch_size=1)
    problem = next(p for p in task.train if len(p.extra["hidden"].split()) == 3)
    words = right(problem).split()
    texts = {  # digits, then three steps of six words
        " ".join([*words[:16], "x"]): 2 / 3,
        " ".join(words[:16]): 2 / 3,
        " ".join([*words[:10], "x", *words[11:]]): 1 / 3,
        " ".join(["x", *words[1:]]): 0.0,
    }
    rollouts = attempts(cfg, [problem], [0])
    for r, text in zip(rollouts, texts, strict=True):
        answering(r, text, tokenizer)
    assert [*exprl.exact(rollouts)] == pytest.approx([*texts.values()])
    method_of(cfg).condition(1, rollouts)
    mean = sum(texts.values()) / 4
    assert [r.advantage for r in rollouts] == pytest.approx([s - mean for s in texts.values()])
    assert not any(r.teacher_ids for r in rollouts)
    grpo = method_of(dataclasses.replace(cfg, method="grpo"))
    assert [r.advantage for r in grpo.condition(1, rollouts)] == [0] * 4  # the group has no success


def test_exprl_gives_no_failure_the_whole(tokenizer, task, make_config, attempts):
    cfg = make_config(method="exprl", batch_size=1)
    rollouts = attempts(cfg, task.train[-1:], [1])
    for r, more in zip(rollouts, ("", " 3", "", ""), strict=True):
        answering(r, right(task.train[-1]) + more, tokenizer)
    method_of(cfg).condition(1, rollouts)
    assert rollouts[0].advantage > 0 > rollouts[1].advantage


def test_exprl_elsewhere_asks_the_policy_to_judge(make_config):
    problem = SimpleNamespace(
        id="p7", prompt="Why?", verifier="number", extra={"reference": "As 1 = 1."}
    )
    rollouts = [
        SimpleNamespace(id=str(i), problem=problem, reward=r, text=f"Since {i}.")
        for i, r in enumerate((0.0, 0.0, 0.0, 1.0))
    ]
    asked = []

    def ask(prompts):
        asked.extend(prompts)
        return ["<think>Steps 1 and 2 agree.</think>\n4", "I give 2 points, not 5", "none of 10"]

    method = method_of(make_config(method="exprl"))
    method.cfg = dataclasses.replace(method.cfg, task="mine")
    method.sampler = SimpleNamespace(ask=ask)
    method.condition(1, rollouts)
    scores = [0.75, 0.25, 0.0, 1.0]
    assert [r.advantage for r in rollouts] == [score - 0.5 for score in scores]
    assert len(asked) == 3 and "As 1 = 1." in asked[0] and "Since 0." in asked[0]


NEED = "atesd atesd-scheduled avsd avsd-full caopd exprl lightning-opd opsd pi-distill pi-opsd"


@pytest.mark.parametrize("name", [*NEED.split(), "pi-play", "rcsd", "unisd"])
def test_a_task_without_references_is_refused_before_the_run(tmp_path, make_config, name):
    row = {"prompt": "Apply vo to 1 2 3 4", "answer": "2", "verifier": "last_number"}
    row |= {"reference": "1 2", "construction": "3 4"}
    kept = ("construction" if name == "pi-play" else "reference",)
    bare = {key: value for key, value in row.items() if key not in kept}
    for split, last in (("train", bare), ("test", row)):
        rows = [row | {"id": f"{split}-1"}, last | {"id": f"{split}-bare"}]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = make_config(method=name, task=str(tmp_path), batch_size=2)
    with pytest.raises(ValueError, match="problem train-bare has no"):
        pmd.check(cfg)
    (tmp_path / "train.jsonl").write_text(json.dumps(row | {"id": "train-1"}))
    pmd.check(dataclasses.replace(cfg, batch_size=1))


# -- Uni-OPD


def differences(policy, teacher, rows, prompts):
    """{row id: (C,) log q - log p of the sampled tokens}, from logits."""
    with torch.no_grad():
        return {
            r.id: chosen(log_p(teacher, prompts[r.id], r.ids), r.ids)
            - chosen(log_p(policy, r.prompt_ids, r.ids), r.ids)
            for r in rows
            if prompts[r.id]
        }


@pytest.mark.parametrize("returns", ["mean", "extreme"])
@pytest.mark.parametrize("shift", ["successes", "failures", "both"])
def test_uni_opd_orders_every_mixed_group_as_the_verifier_does(
    policy, tokenizer, task, make_config, attempts, shift, returns
):
    cfg = make_config(
        method="uni-opd",
        batch_size=4,
        uni_opd_shift=shift,
        uni_opd_returns=returns,
        uni_opd_margin=0.3,
        uni_opd_balance=False,
    )
    method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer)
    rows = method.condition(1, attempts(cfg, task.train[:40:10], [0, 1, 2, 3]))
    prompts = {r.id: list(r.teacher_ids) for r in rows}
    method.weigh(1, rows)
    assert not any(r.teacher_ids for r in rows)
    wanted = differences(policy, method.teacher, rows, prompts)
    for n, group in enumerate(rows[i : i + 4] for i in range(0, 16, 4)):
        d = [wanted.get(r.id, torch.zeros(len(r.ids))) for r in group]
        returns_of = [float(values.mean()) for values in d]
        up = down = 0.0
        if n:
            high, low = returns_of[:n], returns_of[n:]
            gap = sum(high) / n - sum(low) / (4 - n) if returns == "mean" else min(high) - max(low)
            missing = max(0.0, 0.3 - gap)
            up = missing * {"successes": 1, "failures": 0, "both": 0.5}[shift]
            down = missing - up
            after = [float(r.advantage.mean()) for r in group]
            high, low = after[:n], after[n:]
            if returns == "mean":
                assert sum(high) / n >= sum(low) / (4 - n) + 0.3 - 1e-5
            else:
                assert min(high) >= max(low) + 0.3 - 1e-5
        for i, (r, values) in enumerate(zip(group, d, strict=True)):
            shifted = values + up if i < n else values - down
            assert torch.allclose(r.advantage, shifted, atol=1e-5)


def test_uni_opd_leaves_a_group_with_its_margin_alone(
    policy, tokenizer, task, make_config, attempts
):
    """Then the advantage is d alone, whose gradient is that of sampled reverse KL."""
    policy = copy.deepcopy(policy).double()  # its two distributions are close: float32 cancels
    cfg = make_config(
        method="uni-opd", batch_size=1, mini_batch_size=1, uni_opd_margin=0.0, uni_opd_balance=False
    )
    method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer)
    rows = attempts(cfg, task.train[:1], [0])
    prompt = tokenizer(task.train[1].prompt).input_ids
    scores = differences(policy, method.teacher, rows, {r.id: prompt for r in rows})
    best = {r.id for r in sorted(rows, key=lambda r: float(scores[r.id].mean()))[2:]}
    for r in rows:
        r.reward, r.teacher_ids = float(r.id in best), list(prompt)
    method.weigh(1, rows)
    (found,), _ = gradient(method, rows)
    policy.zero_grad()
    for r in rows:
        assert torch.allclose(r.advantage, scores[r.id], atol=1e-5)
        p = chosen(log_p(policy, r.prompt_ids, r.ids), r.ids)
        (-scores[r.id] * p).mean().div(4).backward()
    assert close(found, flat(policy))


def test_uni_opd_thins_mixed_groups(policy, tokenizer, task, make_config, attempts):
    cfg = make_config(method="uni-opd", batch_size=4)
    method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer)
    rows = method.condition(1, attempts(cfg, task.train[:40:10], [*REWARDS.values()]))
    method.weigh(1, rows)
    trained = [r.advantage is not None for r in rows]
    assert trained == [True] * 4 + [True, True, False, False] + [True] * 4 + [True] * 4


# -- ATESD


def three_steps(task):
    return next(p for p in task.train if len(p.extra["hidden"].split()) == 3)


def test_atesd_shows_the_first_part_of_a_reference(task, tokenizer, policy, make_config):
    problem = three_steps(task)
    words = right(problem).split()
    contexts = []
    for exposure in (0.0, 0.3, 0.5, 1.0):
        cfg = make_config(method="atesd-scheduled", atesd_from=exposure, atesd_to=exposure)
        method = method_of(cfg, task=task)
        contexts += method.contexts(2, [SimpleNamespace(problem=problem)])
    assert contexts == [
        {"beginning": ""},
        {"beginning": " ".join(words[:10])},
        {"beginning": " ".join(words[:16])},
        {"solution": " ".join(words)},
    ]
    lines = "First.\nSecond.\nThird.\nFourth."
    other = dataclasses.replace(problem, verifier="number", answer="7", extra={"reference": lines})
    contexts = []
    for exposure in (0.1, 0.6, 1.0):
        method.cfg = dataclasses.replace(cfg, atesd_from=exposure, atesd_to=exposure)
        contexts += method.contexts(1, [SimpleNamespace(problem=other)])
    assert contexts == [
        {"beginning": "Answer: 7"},
        {"beginning": "First.\nSecond.\nAnswer: 7"},
        {"solution": lines},
    ]


def test_atesd_scheduled_goes_in_a_line(task, make_config):
    cfg = make_config(method="atesd-scheduled", steps=5, atesd_from=0.2, atesd_to=1.0)
    method = method_of(cfg, task=task)
    assert [method.exposure(s) for s in range(1, 6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_atesd_of_full_exposure_is_opsd(policy, tokenizer, task, make_config, attempts):
    found = []
    for name, flags in (("atesd-scheduled", dict(atesd_from=1.0, atesd_to=1.0)), ("opsd", {})):
        cfg = make_config(method=name, batch_size=2, mini_batch_size=2, **flags)
        method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer, task=task)
        rows = method.condition(1, attempts(cfg, task.train[:20:10], [0, 1]))
        found += gradient(method, rows)[0]
    assert (cfg.alpha, cfg.ema_rate) == (0, 0)
    assert found[0].any() and torch.equal(*found)


def test_atesd_teaches_more_the_more_it_shows(policy, tokenizer, task, make_config, attempts):
    """The forward KL of a token, from logits, grows with exposure; without any, none is taught."""
    problems = [p for p in task.train if len(p.extra["hidden"].split()) == 3][::12]
    means = []
    for exposure in (0.0, 1 / 3, 2 / 3, 1.0):
        cfg = make_config(
            method="atesd-scheduled",
            batch_size=len(problems),
            atesd_from=exposure,
            atesd_to=exposure,
        )
        method = method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer, task=task)
        rows = method.condition(1, attempts(cfg, problems, [0] * len(problems)))
        divergences = []
        for r in rows[::2]:
            prompt = r.teacher_ids or r.prompt_ids
            with torch.no_grad():
                q, p = log_p(policy, prompt, r.ids), log_p(policy, r.prompt_ids, r.ids)
            divergences.append((q.exp() * (q - p)).sum(1))
        means.append(float(torch.cat(divergences).mean()))
    assert means[0] == 0 and means[1] > 0.05
    assert means[1] < means[2] < means[3]


def test_atesd_decides_for_five_steps_and_learns_from_what_they_earned(
    policy, tokenizer, task, make_config
):
    cfg = make_config(method="atesd", steps=80)
    method = method_class("atesd")(cfg, task, tokenizer, policy)
    exposures = [method.exposure(step) for step in range(1, 11)]
    assert len(set(exposures[:5])) == len(set(exposures[5:])) == 1 and exposures[0] != exposures[5]
    assert all(0 < exposure < 1 for exposure in exposures)
    for drop, rises in ((1.0, True), (-1.0, False)):
        tried = copy.deepcopy(method)
        decision = tried.memo["decisions"][-1]
        decision["earned"] = drop

        def likelihood(of=tried, decision=decision):
            shape, _ = of.controller(decision["inputs"])
            drawn = torch.tensor(decision["exposure"])
            return float(torch.distributions.Beta(*shape).log_prob(drawn).detach())

        before = likelihood()
        tried.exposure(11)
        assert (likelihood() > before) == rises and likelihood() != before


def test_atesd_earns_drops_and_the_likelihood_of_the_reference(
    policy, tokenizer, task, make_config, attempts
):
    cfg = make_config(method="atesd", batch_size=2, mini_batch_size=2, steps=80)
    method = method_class("atesd")(cfg, task, tokenizer, policy)
    rows = method.condition(1, attempts(cfg, task.train[:20:10], [0, 1]))
    method.weigh(1, rows)
    scores = []
    for r in rows[::4]:
        ids = tokenizer(right(r.problem), add_special_tokens=False).input_ids
        scores.append(chosen(log_p(policy, r.teacher_ids, ids), ids).detach())
    assert method.memo["logprob"] == pytest.approx(float(torch.cat(scores).mean()), rel=1e-4)
    # the first step of a decision earns no drop, and a step that teaches nobody is no end of a gap
    for step, values in ((1, [3.0, 1.0]), (2, [0.5]), (3, []), (4, [1.0]), (5, [0.2, 0.4])):
        lived(method, step, values, logprob=-2.0)
    drops = [0, 2 - 0.5, 0, 0, 1 - 0.3]
    weights = [0.9**i for i in range(5)]
    mean = sum(w * -2.0 for w in weights) / sum(weights)
    reward = sum(w * drop for w, drop in zip(weights, drops, strict=True)) + 0.1 * mean
    assert method.memo["decisions"][-1]["earned"] == pytest.approx(reward, rel=1e-3)


def lived(method, step, divergences, logprob):
    """Lets a method see divergences of tokens and a log-probability of references in a step."""
    method.exposure(step)
    row = SimpleNamespace(divergence=torch.tensor(divergences) if divergences else None)
    method.rows, method.memo["logprob"] = [row], logprob
    method.follow(step)


def test_atesd_probes_the_prompts_that_teach(policy, tokenizer, task, make_config, attempts):
    """With mastered problems left out, their references are not scored, under no prompt at all."""
    cfg = make_config(
        method="atesd", batch_size=2, mini_batch_size=2, steps=80, supervise_mastered=False
    )
    method = method_class("atesd")(cfg, task, tokenizer, policy)
    rows = method.condition(1, attempts(cfg, task.train[:20:10], [4, 1]))
    method.weigh(1, rows)
    taught = rows[4]
    ids = tokenizer(right(taught.problem), add_special_tokens=False).input_ids
    logprobs = chosen(log_p(policy, taught.teacher_ids, ids), ids).detach()
    assert not rows[0].teacher_ids
    assert method.memo["logprob"] == pytest.approx(float(logprobs.mean()), rel=1e-4)
    method.weigh(1, method.condition(1, attempts(cfg, task.train[:20:10], [4, 4])))  # nobody


def test_atesds_controller_leaves_exposures_that_do_not_help(policy, tokenizer, task, make_config):
    """The sign: where no exposure below 1/2 closes the gap, the mean leaves the low half.

    A random exposure, which a controller that never learns draws, leaves a larger gap.
    """
    means, gaps, of_random = [], [], []
    for seed in range(8):
        cfg = make_config(method="atesd", steps=80, seed=seed)
        learning = method_class("atesd")(cfg, task, tokenizer, policy)
        gaps.append(gap_after(learning, 80))
        shape, _ = learning.controller([1.0, 1.0, learning.memo["divergence"]])
        means.append(float((shape[0] / shape.sum()).detach()))
        still = method_class("atesd")(cfg, task, tokenizer, policy)
        still.learn = lambda decisions: None
        of_random.append(gap_after(still, 80))
    assert statistics.mean(means) > 0.6
    assert statistics.mean(gaps) < 0.8 * statistics.mean(of_random)


def gap_after(method, steps) -> float:
    gap = 2.0
    for step in range(1, steps + 1):
        exposure = method.exposure(step)
        lived(method, step, [gap * exposure], logprob=-1.0)  # more exposure shows more of the gap
        if exposure > 0.5:
            gap *= 0.97
    return gap


def test_atesd_goes_on_from_its_state(policy, tokenizer, task, make_config):
    cfg = make_config(method="atesd", steps=80)
    method, again = (method_class("atesd")(cfg, task, tokenizer, policy) for _ in range(2))
    for step in range(1, 14):
        lived(method, step, [1 / step], logprob=-1.0)
    again.load(json.loads(json.dumps(method.state())))
    assert any(map(any, method.memo["weights"]))
    assert [again.exposure(s) for s in (14, 15, 16)] == [method.exposure(s) for s in (14, 15, 16)]
    assert again.state() == method.state()
    again.load({})  # of a checkpoint of another method
    assert again.exposure(18) == again.exposure(19)


# -- VPD


def test_vpd_without_e_steps_is_sdpo(policy, tokenizer, task, make_config, attempts):
    found = []
    shared = dict(alpha=1.0, teacher="live", loss_mean="sum")
    for name, flags in (("vpd", dict(vpd_every=0)), ("sdpo", shared)):
        cfg = make_config(method=name, batch_size=2, mini_batch_size=2, **flags)
        method = method_of(cfg, policy, policy, tokenizer=tokenizer)
        rows = method.condition(5, attempts(cfg, task.train[:20:10], [1, 2]))
        method.weigh(5, rows)
        assert len(rows) == 8
        found += gradient(method, rows)[0]
    assert found[0].any() and torch.equal(*found)


def returns(policy, rows, twins, beta=0.1):
    """R of each twin, with the gradient of the teacher's prompt alone."""
    table = []
    for r, twin in zip(rows, twins, strict=True):
        q = chosen(log_p(policy, twin.prompt_ids, twin.ids), twin.ids)
        p = chosen(log_p(policy, r.prompt_ids, r.ids), r.ids).detach()
        table.append(beta * (q - p).sum())
    return torch.stack(table)


def conditioned(policy, tokenizer, task, make_config, attempts, successes, **flags):
    shared = dict(batch_size=len(successes), mini_batch_size=len(successes), vpd_every=1)
    cfg = make_config(method="vpd", **shared | flags)
    method = method_of(cfg, policy, policy, tokenizer=tokenizer)
    rows = method.condition(1, attempts(cfg, task.train[: 10 * len(successes) : 10], successes))
    taught, twins = [r for r in rows if r.teacher_ids], rows[4 * len(successes) :]
    assert len(twins) == len(taught) > 0
    for r, twin in zip(taught, twins, strict=True):
        assert (twin.prompt_ids, twin.ids) == (r.teacher_ids, r.ids)
        assert twin.teacher_ids == [] and twin.rollout_logprobs is None
    assert len({r.id for r in rows}) == len(rows)
    return method, rows, taught, twins


@pytest.mark.parametrize("problems", [2, 1])  # an update
def test_vpd_trains_the_teachers_prompt_by_bco(
    policy, tokenizer, task, make_config, attempts, problems
):
    """The gradient of an E-step is that of BCO's loss, differentiated from logits.

    Both steps take their mean over an update's rollouts, as an update without an E-step does. With
    several updates a batch, too, although the two problems have three and four supervised rollouts.
    """
    policy = copy.deepcopy(policy).double()  # a difference of two gradients is taken below
    method, rows, taught, twins = conditioned(
        policy, tokenizer, task, make_config, attempts, [1, 2], mini_batch_size=problems
    )
    method.weigh(1, rows)
    both, _ = gradient(method, rows)
    for twin in twins:
        twin.advantage = None
    first, _ = gradient(method, rows)
    for r in rows:
        r.weight = 1.0
    alone, _ = gradient(method, rows[:8])
    assert len(both) == len(first) == len(alone) == 2 // problems
    ids = [id for id in dict.fromkeys(r.problem.id for r in rows)]
    wins = torch.tensor([r.reward > 0.5 for r in twins])
    for number in range(len(both)):
        assert first[number].any() and close(first[number], alone[number])
        here = ids[number * problems : (number + 1) * problems]
        mine = torch.tensor([r.problem.id in here for r in twins])
        policy.zero_grad()
        table = returns(policy, taught, twins)
        threshold = (table[wins].mean() + table[~wins].mean()).detach() / 2
        assert method.threshold == pytest.approx(float(threshold), rel=1e-3)
        sign = wins.float() * 2 - 1
        losses = -torch.nn.functional.logsigmoid(sign * (table - threshold))
        (losses[mine].sum() / (4 * problems)).backward()
        found = both[number] - first[number]
        assert found.any() and close(found, flat(policy))


@pytest.mark.parametrize("every", [0, 1])
def test_vpd_weighs_the_divergence_alone(policy, tokenizer, task, make_config, attempts, every):
    found = {}
    for weight in (1.0, 0.5, 0.1):
        method, rows, *_ = conditioned(
            policy, tokenizer, task, make_config, attempts, [1, 2], vpd_kl=weight
        )
        method.cfg = dataclasses.replace(method.cfg, vpd_every=every)
        rows = rows if every else rows[:8]
        method.weigh(1, rows)
        (found[weight],), _ = gradient(method, rows)
    divergence = 2 * (found[1.0] - found[0.5])
    others = found[1.0] - divergence  # the E-step
    assert divergence.any() and close(found[0.1], 0.1 * divergence + others)
    assert (others.norm() > 1e-3 * divergence.norm()) == bool(every)


def test_vpd_parts_successes_from_failures_where_sdpo_does_not(
    policy, tokenizer, task, make_config, attempts
):
    """Its sign, with the rows of both steps in the same updates, as they are run."""
    ends, start = {}, copy.deepcopy(policy.state_dict())
    for every in (0, 1):
        policy.load_state_dict(start)
        method, rows, taught, twins = conditioned(
            policy, tokenizer, task, make_config, attempts, [1, 2]
        )
        wins = torch.tensor([r.reward > 0.5 for r in twins])
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        optimizer.updates = 0
        method.cfg = dataclasses.replace(method.cfg, lr=0.5, vpd_every=every)
        for r in rows:
            r.rollout_logprobs = None  # the same rollouts come again: they have no ratio
        gaps = []
        for _ in range(4):
            with torch.no_grad():
                table = returns(policy, taught, twins)
            gaps.append(float(table[wins].mean() - table[~wins].mean()))
            part = rows if every else rows[:8]
            method.weigh(1, part)
            (part,) = pmd.mini_batches(part, policy, method.cfg)
            pmd.update(method, optimizer, part, 1)
        ends[every] = gaps
    policy.load_state_dict(start)
    sdpo, vpd = ends[0], ends[1]
    assert sdpo[0] == pytest.approx(vpd[0])
    assert vpd[0] < vpd[1] < vpd[2] < vpd[3]
    assert sdpo[3] - sdpo[0] < 0.25 * (vpd[3] - vpd[0])


def test_vpd_parts_successes_from_failures(policy, tokenizer, task, make_config, attempts):
    method, rows, taught, twins = conditioned(
        policy, tokenizer, task, make_config, attempts, [1, 2]
    )
    wins = torch.tensor([r.reward > 0.5 for r in twins])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    optimizer.updates = 0
    method.cfg = dataclasses.replace(method.cfg, lr=0.5)
    gaps = []
    for _ in range(3):
        with torch.no_grad():
            table = returns(policy, taught, twins)
        gaps.append(float(table[wins].mean() - table[~wins].mean()))
        method.weigh(1, rows)
        (part,) = pmd.mini_batches(twins, policy, method.cfg)
        pmd.update(method, optimizer, part, 1)
    assert gaps[0] < gaps[1] < gaps[2]


def test_vpd_comes_every_so_many_batches_and_keeps_its_threshold(
    policy, tokenizer, task, make_config, attempts
):
    method, rows, *_ = conditioned(policy, tokenizer, task, make_config, attempts, [0])
    method.weigh(1, rows)
    assert method.threshold is None and method.state() == {"threshold": None}
    assert all(r.advantage < 0 for r in rows if r.advantage is not None)
    twins = rows[4:]
    for wanted, (high, low) in ((0.5, (2.0, -1.0)), (0.55, (3.0, -1.0))):
        twins[0].reward = 1.0
        gained = {r.id: torch.tensor(low) for r in twins} | {twins[0].id: torch.tensor(high)}
        method.move_threshold(twins, gained)
        assert method.threshold == pytest.approx(wanted)
    again = method_of(method.cfg)
    again.load(json.loads(json.dumps(method.state())))
    assert again.threshold == method.threshold
    method.cfg = dataclasses.replace(method.cfg, vpd_every=5)
    sizes = [
        len(method.condition(s, attempts(method.cfg, task.train[:1], [1]))) for s in (4, 5, 6, 10)
    ]
    assert sizes == [4, 8 - 1, 4, 8 - 1]  # the only success reads nothing
