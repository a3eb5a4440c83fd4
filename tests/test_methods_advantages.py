"""Methods that reinforce with other advantages, or distil from an extrapolated teacher: the exact
statement that each of them makes. Oracles take whole logits, one row at a time.
"""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Attempt, Question, method_of
from safetensors.torch import load_file

import memory as mem
import pmd
from methods import pi_distill, pi_play
from runtime.chat import encode_prompt
from runtime.sampler import Sampler
from runtime.store import Item
from tasks import load_task, references
from tasks.nano import verify_steps

ADDED = ["advantage-plus", "pi-opsd", "pi-play", "skill-sd", "sod"]
NAMES = [*ADDED, "pi-distill", "g-opd", "lightning-opd"]


@pytest.fixture(scope="module")
def problems():
    return load_task("nano").train


@pytest.fixture
def make_method(policy, tokenizer, make_config, problems):
    """A method with a teacher whose weights are not the policy's."""

    def make(name, **changes):
        cfg = make_config(method=name, mini_batch_size=99, **changes)
        teacher = copy.deepcopy(policy)
        if cfg.teacher == "ema":
            with torch.no_grad():
                rng = torch.Generator().manual_seed(0)
                for p in teacher.parameters():
                    p.add_(0.01 * torch.randn(p.shape, generator=rng))
        task = dataclasses.replace(load_task("nano"), train=problems[:3])
        method = method_of(cfg, policy, teacher, tokenizer=tokenizer, task=task)
        method.sampler = Sampler(policy, tokenizer, cfg)
        method.sampler.step = 1
        return method

    return make


def logprobs(model, prompt_ids, ids):
    """(C, V), without gradient."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)


def of_tokens(model, prompt_ids, ids):
    return logprobs(model, prompt_ids, ids).gather(1, torch.tensor(ids)[:, None])[:, 0]


def with_rewards(rollouts, rewards):
    for r, reward in zip(rollouts, rewards, strict=True):
        r.reward = float(reward)
    return rollouts


REWARDS = [1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]  # three groups of four; the second has no success
MEANS = [0.25] * 4 + [0.0] * 4 + [0.75] * 4


def gradient_of(method, rows):
    """The gradient and the sums of one update of the rows, through a learning rate of 0."""
    (batch,) = pmd.mini_batches(rows, method.policy, method.cfg)
    optimizer = torch.optim.SGD(method.policy.parameters(), lr=0.0)
    optimizer.updates, cfg = 0, method.cfg
    method.cfg = dataclasses.replace(cfg, lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmd, "MAX_GRAD_NORM", math.inf)
        sums = pmd.update(method, optimizer, batch, 1)
    method.cfg = cfg
    return torch.cat([p.grad.flatten().clone() for p in method.policy.parameters()]), sums


def trained(method, rollouts, step=1):
    """The rows of phase 4."""
    rows = method.condition(step, rollouts)
    method.weigh(step, rows)
    return rows


# -- all of them


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_by_name(make_config, name):
    size = 1 if name == "lightning-opd" else 4
    cfg = make_config(method=name, name="run", group_size=size, eval_problems=1, eval_k=1)
    summary = pmd.train(cfg)
    rows = Path(cfg.out, "run", "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, rows) if "reward" in row]
    assert summary["steps"] == len(steps) == 2
    assert all(row["updates"] + row["updates_skipped"] >= 1 for row in steps)
    assert any(row["updates"] and math.isfinite(row["loss"]) for row in steps)


@pytest.mark.parametrize("name", ADDED)
def test_without_lambda_each_is_grpo(make_method, problems, name):
    """Bit for bit, its gradient and what is logged."""
    found = []
    for method in (make_method(name, plus_lambda=0.0), make_method("grpo")):
        rollouts = with_rewards(method.attempt(1, problems[:3]), REWARDS)
        found.append(gradient_of(method, trained(method, rollouts)))
    (gradient, sums), (wanted, others) = found
    assert torch.equal(gradient, wanted) and gradient.abs().max() > 0
    assert sums == others and sums["reinforced_tokens"] == sums["tokens"]


def test_without_lambda_a_run_is_grpos(make_config, tmp_path):
    """Bit for bit, its weights and metrics."""
    ends = []
    for method, changes in (("grpo", {}), ("advantage-plus", dict(plus_lambda=0.0))):
        small = dict(group_size=8, mini_batch_size=1, eval_problems=1, eval_k=1)
        pmd.train(make_config(method=method, name=method, **small, **changes))
        rows = [json.loads(row) for row in (tmp_path / method / "metrics.jsonl").open()]
        learned = ("loss", "grad_norm", "reward", "entropy", "clipped", "updates")
        found = [{k: row.get(k) for k in learned} for row in rows if "reward" in row]
        ends.append((found, load_file(tmp_path / method / "final" / "model.safetensors")))
    (metrics, weights), (others, other_weights) = ends
    assert sum(row["updates"] for row in metrics) >= 2 and metrics == others
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)


# -- A + lambda d


def shown_by_hand(name, r, rollouts):
    """What the teacher of a rollout reads, as text; the plain prompt if nothing."""
    hidden = r.problem.extra["hidden"].split()
    if name == "pi-play":
        return mem.compose(r.problem.prompt, strategies=[("rule", pair) for pair in hidden])
    if name == "pi-opsd":
        solution = r.problem.answer
        for pair in hidden:
            solution = solution.replace(f"{pair.split('=')[0]}=*", pair)
        return mem.compose(r.problem.prompt, solution=solution)
    siblings = [
        s.text for s in rollouts if s is not r and s.problem is r.problem and s.reward == 1.0
    ]
    return mem.compose(
        r.problem.prompt,
        solution=siblings[0] if siblings else "",
        feedback="" if siblings else r.feedback,
    )


@pytest.mark.parametrize("name", ["advantage-plus", "pi-opsd", "pi-play"])
def test_the_advantage_is_that_of_the_definition(make_method, problems, tokenizer, name):
    method = make_method(name, plus_lambda=0.3, plus_steps=4 if name == "pi-play" else 0)
    rollouts = with_rewards(method.attempt(1, problems[:1] + problems[70:72]), REWARDS)
    rows = trained(method, rollouts, step=2)
    assert rows == rollouts and not any(r.teacher_ids or r.teachers for r in rows)
    strength = 0.3 * 0.75 if name == "pi-play" else 0.3
    taught = 0
    for r, reward, mean in zip(rows, REWARDS, MEANS, strict=True):
        prompt = shown_by_hand(name, r, rollouts)
        d = 0.0
        if prompt != r.problem.prompt:
            taught += 1
            q = of_tokens(method.teacher, encode_prompt(tokenizer, prompt), r.ids)
            d = q - of_tokens(method.policy, r.prompt_ids, r.ids)
        wanted = torch.as_tensor(reward - mean + strength * d)
        assert torch.allclose(torch.as_tensor(r.advantage), wanted, atol=1e-4)
    assert taught == 12 if name != "advantage-plus" else taught >= 7


def test_without_rewards_the_gradient_is_that_of_the_sampled_reverse_kl(make_method, problems):
    """Lambda times E[(log p - log q) grad log p], from plain logits and plain autograd."""
    method = make_method("pi-opsd", plus_lambda=0.7, teacher="ema")
    rollouts = with_rewards(method.attempt(1, problems[:1] + problems[70:72]), [0] * 12)
    found, _ = gradient_of(method, trained(method, rollouts))
    method.policy.zero_grad()
    for r in rollouts:
        prompt = encode_prompt(method.tokenizer, shown_by_hand("pi-opsd", r, rollouts))
        logits = method.policy(torch.tensor([r.prompt_ids + r.ids])).logits[0]
        log_p = logits[len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        now = log_p.gather(1, torch.tensor(r.ids)[:, None])[:, 0]
        cost = now.detach() - of_tokens(method.teacher, prompt, r.ids)
        (0.7 * (cost * now).mean() / len(rollouts)).backward()
    wanted = torch.cat([p.grad.flatten() for p in method.policy.parameters()])
    assert wanted.abs().max() > 0
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max())


def test_lambda_falls_on_a_line_and_then_there_is_no_teacher(make_method, problems, monkeypatch):
    method = make_method("pi-play", plus_lambda=0.4, plus_steps=4)
    assert [method.strength(s) for s in (1, 2, 3, 4, 5, 6)] == pytest.approx(
        [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]
    )
    assert make_method("pi-play").cfg.plus_steps == 50
    monkeypatch.setattr(pmd, "teacher_prompts", None)  # nobody is asked
    rows = trained(method, with_rewards(method.attempt(5, problems[:3]), REWARDS), step=5)
    assert [r.advantage for r in rows] == [r - mean for r, mean in zip(REWARDS, MEANS, strict=True)]


def test_a_reference_solves_its_problem(problems):
    for problem in problems:
        assert verify_steps(problem, references.reference(problem)).reward == 1.0
        assert "*" not in references.reference(problem)


def test_what_a_task_does_not_hold_is_said_with_the_problem_named(make_method, problems):
    bare = dataclasses.replace(problems[0], extra={})
    choice = dataclasses.replace(problems[0], verifier="choice", answer="B", extra={})
    for problem in (bare, choice):
        with pytest.raises(ValueError, match=f"{problem.id} has no reference solution.*reference"):
            references.reference(problem)
        with pytest.raises(ValueError, match=f"{problem.id} has no construction path.*construct"):
            pi_play.construction(problem)
    own = dataclasses.replace(choice, extra={"reference": "Because B.", "construction": "From A."})
    assert references.reference(own) == "Because B."
    for value in (7, ["Because B."], {"text": "Because B."}):
        odd = dataclasses.replace(choice, extra={"reference": value})
        with pytest.raises(ValueError, match=f"{problem.id} has the reference .* no text"):
            references.reference(odd)
    assert pi_play.construction(own) == [("construction", "From A.")]


@pytest.mark.parametrize("name", ["advantage-plus", "sod", "skill-sd", "pi-distill", "g-opd"])
def test_a_group_of_one_is_refused_where_answers_are_compared(make_config, name):
    with pytest.raises(ValueError, match="--group_size 1"):
        pmd.check(make_config(method=name, group_size=1), quiet=True)


# -- Skill-SD


class Bank:
    """A memory that holds two skills of one problem: strategies of a step, a lesson of the next."""

    def __init__(self, id):
        self.items = [
            Item(1, "insight", "strategy", id, "rule", "vo=rev", evidence="[1]", born=1),
            Item(2, "insight", "lesson", id, "trap", "mi!inc", evidence="[2]", born=2),
            Item(3, "insight", "strategy", id, "rule", "mi=neg", evidence="[1]", born=1),
        ]

    def living_of(self, tier, ids):
        assert tier == "insight"
        return {i.problem: self.items for i in self.items if i.problem in ids}

    def record(self, step, rollouts):
        pass

    reflect = record


SKILLS = [
    {"strategies": [("rule", "vo=rev"), ("rule", "mi=neg")], "lessons": []},
    {"strategies": [], "lessons": [("trap", "mi!inc")]},
]


def test_a_bandit_picks_the_skill(make_method, problems):
    """By the bound of UCB1, with a virtual trial half won; it concentrates on the one that helps."""
    method = make_method("skill-sd", ucb=0.5)
    method.load({})
    method.memory = Bank(problems[0].id)
    rollouts = method.attempt(1, problems[:1])
    times, gains, picked = [1, 1], [0.5, 0.5], []
    for step in range(1, 60):
        # the group's answers after it was taught: half are right with skill 0, else none
        if picked:
            rate = 0.5 if picked[-1] == 0 else 0.0
            with_rewards(rollouts, [1, 1, 0, 0] if rate else [0] * 4)
            times[picked[-1]] += 1
            gains[picked[-1]] += rate
        method.remember(step, problems[:1], rollouts)
        contexts = method.contexts(step, rollouts)
        assert all(context == contexts[0] for context in contexts)
        bounds = [
            g / n + 0.5 * math.sqrt(2 * math.log(sum(times)) / n)
            for n, g in zip(times, gains, strict=True)
        ]
        picked.append(int(np.argmax(bounds)))
        assert contexts[0] == SKILLS[picked[-1]]
    assert picked[:2] == [0, 1] and picked.count(0) > 2 * picked.count(1) > 2
    again = make_method("skill-sd", ucb=0.5)
    again.load(json.loads(json.dumps(method.state())))
    again.memory = method.memory
    assert again.state() == method.state()
    for one in (method, again):
        one.remember(60, problems[:1], rollouts)
    assert again.contexts(60, rollouts) == method.contexts(60, rollouts)
    assert again.state() == method.state() and sum(n for n, _ in again.trials.values()) == 59 + 2


def skilled_visits(make_method, make_memory, rate_of, visits, ground_insights=False):
    """Visits a problem again and again, with the real memory: yields what its teacher reads.

    Each visit's attempts are new, one of them right at first, and their reflection is new, too.
    rate_of: {text of a strategy: success rate of the group that was taught with it}, else 1/4.
    """
    names = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in "aeiou"]

    def reply(prompt):
        seen = [name for name in names if f"{name}=rev" in prompt]
        items = {"strategies": [], "lessons": []}
        if "Correct attempt:" in prompt:
            items["strategies"] = [{"title": "rule", "content": f"{seen[-1]}=rev"}]
        if "Wrong attempt:" in prompt:
            items["lessons"] = [{"title": "trap", "content": f"{seen[-1]}!rev"}]
        return json.dumps(items)

    method = make_method("skill-sd")
    method.load({})
    method.memory = make_memory(reply, ground_insights=ground_insights, max_insights=99)
    problem, context = Question("p", "Apply a name to 1 2 3 4"), {}
    for visit in range(1, visits + 1):
        taught = [text for _, text in context.get("strategies", [])]
        rate = max([rate_of.get(text, 0.25) for text in taught], default=0.25)
        rollouts = []
        for i in range(4):
            text = f"{names[visit]}=rev {i if i < 4 * rate else 9 - i}"
            reward = float(i < 4 * rate)
            rollouts.append(Attempt(f"{visit}/p/{i}", problem, text, reward, ""))
        method.remember(visit, [problem], rollouts)
        (context,) = {id(c): c for c in method.contexts(visit, rollouts)}.values()
        yield names[visit], context, method


@pytest.mark.parametrize("ground_insights", [False, True])
def test_what_reflection_wrote_in_a_step_is_one_skill(make_method, make_memory, ground_insights):
    """Strategies of the success and lessons of the failures are read together."""
    ((name, context, method),) = skilled_visits(make_method, make_memory, {}, 1, ground_insights)
    strategies, lessons = context["strategies"], context["lessons"]
    assert strategies == [("rule", f"{name}=rev")] and lessons == [("trap", f"{name}!rev")]


def test_a_skill_that_helped_comes_again_within_a_few_visits(make_method, make_memory):
    """Although the memory grows at every visit. Where no skill helps more, new ones are tried."""
    names = [name for name, *_ in skilled_visits(make_method, make_memory, {}, 3)]
    for rate, least, most in ((1.0, 12, 18), (0.75, 12, 18), (0.25, 0, 2)):
        good = f"{names[-1]}=rev"
        shown = []
        for _, context, _ in skilled_visits(make_method, make_memory, {good: rate}, 20):
            shown.append(context["strategies"][0][1])
        assert len(set(shown)) > 1 and least <= shown.count(good) <= most


def test_a_skill_goes_on_with_what_is_left_of_it(make_method, make_memory):
    """And the record of a skill of which nothing lives is not read."""
    *_, (name, context, method) = skilled_visits(make_method, make_memory, {}, 2)
    memory, before = method.memory, method.choose("p", method.memory.living("insight", "p"))
    skill = method.shown["p"]
    strategy, lesson = (i for i in memory.living("insight", "p") if f"p {i.born}" == skill)
    with memory.writing(3):
        memory.end(3, "insight", [lesson.id])
    assert method.choose("p", memory.living("insight", "p")) == before | {"lessons": []}
    assert method.shown["p"] == skill
    with memory.writing(3):
        memory.end(3, "insight", [strategy.id])
    method.trials[skill] = [1, 99.0]
    method.choose("p", memory.living("insight", "p"))
    assert method.shown["p"] != skill


def test_a_problem_without_a_skill_has_no_teacher(make_method, problems):
    method = make_method("skill-sd", plus_lambda=0.1)
    method.load({})
    method.memory = Bank("another")
    rows = trained(method, with_rewards(method.attempt(1, problems[:3]), REWARDS))
    assert method.shown == {} and all(r.teacher_prompt == "" for r in rows)
    assert [r.advantage for r in rows] == [r - m for r, m in zip(REWARDS, MEANS, strict=True)]


def test_its_teacher_is_a_copy_now_and_then(make_method):
    method = make_method("skill-sd", teacher_every=3)
    before = copy.deepcopy(method.teacher.state_dict())
    for step in (1, 2):
        method.follow(step)
    assert all(torch.equal(before[k], v) for k, v in method.teacher.state_dict().items())
    method.follow(3)
    policy = method.policy.state_dict()
    assert all(torch.equal(policy[k], v) for k, v in method.teacher.state_dict().items())


# -- SOD


def test_the_weight_of_a_turn_is_the_product_over_turns(make_method, problems):
    """As the authors' code has it, term by term; at most 1.2, and 1 in the first turn."""
    method = make_method("sod")
    assert (method.cfg.plus_lambda, method.cfg.sod_delta) == (1.0, 0.2)
    problem = next(p for p in problems if len(p.extra["hidden"].split()) == 3)
    row = method.attempt(1, [problem])[0]
    row.ids = method.tokenizer.encode(references.reference(problem))
    turns = method.turns(row)
    assert turns.tolist() == [0] * 10 + [1] * 6 + [2] * 6  # the digits, then six words a step
    for sizes in ([0.5, 2.0, 0.1], [0.2, 0.19, 3.0], [0.0, 1.0, 0.0]):
        signs = torch.tensor([(-1.0) ** i for i in range(22)])
        d = torch.tensor(sizes)[turns] * signs
        product, weights = 1.0, [1.0]
        for before, now in zip(sizes, sizes[1:], strict=False):
            product *= (before + 1e-6) / (now + 1e-6)
            weights.append(min(product, 1.2))
        wanted = torch.tensor(weights)[turns] * d
        assert torch.allclose(method.shaped(row, d), wanted, rtol=1e-4, atol=1e-7)


def test_the_weight_falls_at_a_wrong_step(make_method, problems):
    """Right, then wrong, then right: the teacher reads the solution."""
    method = make_method("sod", teacher="live")
    method.teacher = method.policy
    problem = next(p for p in problems if len(p.extra["hidden"].split()) == 3)
    solution = references.reference(problem)
    middle = problem.extra["hidden"].split()[1]
    other = "inc" if not middle.endswith("inc") else "dec"
    row = method.attempt(1, [problem])[0]
    row.ids = method.tokenizer.encode(solution.replace(middle, f"{middle.split('=')[0]}={other}"))
    told = encode_prompt(method.tokenizer, mem.compose(problem.prompt, solution=solution))
    d = of_tokens(method.policy, told, row.ids) - of_tokens(method.policy, row.prompt_ids, row.ids)
    shaped = method.shaped(row, d)
    assert torch.equal(shaped[:10], d[:10])
    weight = shaped[11] / d[11]  # of the wrong operation
    assert d[11] < -2 and 0 < weight < 0.7
    assert torch.allclose(shaped[10:16], weight * d[10:16])


def test_elsewhere_a_turn_is_a_line(make_method, problems):
    method = make_method("sod")
    row = method.attempt(1, problems[:1])[0]
    row.problem = dataclasses.replace(row.problem, verifier="choice")

    class Letters:
        def decode(self, ids):
            return chr(ids[0])

    method.tokenizer, row.ids = Letters(), [ord(c) for c in "ab\nc\n\nd"]
    assert method.turns(row).tolist() == [0, 0, 0, 1, 1, 2, 3]


# -- G-OPD


def extrapolated(make_method, problems, name, **changes):
    method = make_method(name, **changes)
    rollouts = with_rewards(method.attempt(1, problems[:1] + problems[70:72]), REWARDS)
    rows = trained(method, rollouts)
    assert sum(bool(r.teacher_ids) for r in rows) >= 7
    return method, rows


def test_at_1_it_is_distillation_by_reverse_kl(make_method, problems):
    """Bit for bit."""
    grads = []
    for name, changes in (
        ("sdpo", dict(alpha=1.0)),
        ("g-opd", dict(extrapolation=1.0)),
        ("g-opd", dict(extrapolation=1.25)),
    ):
        method, rows = extrapolated(make_method, problems, name, **changes)
        assert method.cfg.alpha == 1.0
        grads.append(gradient_of(method, rows))
    (sdpo, sums), (same, same_sums), (other, _) = grads
    assert torch.equal(sdpo, same) and sums == same_sums and sdpo.abs().max() > 0
    assert not torch.allclose(sdpo, other, rtol=0.1)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.25, 3.0])
def test_the_target_is_extrapolated(make_method, problems, factor):
    method, rows = extrapolated(make_method, problems, "g-opd", extrapolation=factor)
    taught = [r for r in rows if r.teacher_ids]
    with torch.no_grad():
        hidden = method.teacher_hidden(taught)
        found = (hidden @ method.teacher.get_output_embeddings().weight.T).log_softmax(-1)
    wanted = []
    for r in taught:
        b = logprobs(method.teacher, r.prompt_ids, r.ids)
        q = logprobs(method.teacher, r.teacher_ids, r.ids)
        wanted.append((b + factor * (q - b)).log_softmax(-1))
    assert torch.allclose(found, torch.cat(wanted), atol=2e-3, rtol=1e-4)


def test_the_first_gradient_is_that_many_times_as_large(make_method, problems):
    """While the student is the plain teacher, KL(p || p (q/p)^L) pulls L times as hard."""
    grads = []
    for factor in (1.0, 1.25, 3.0):
        method, rows = extrapolated(make_method, problems, "g-opd", extrapolation=factor)
        method.teacher = method.policy
        grads.append(gradient_of(method, rows)[0])
    for factor, gradient in ((1.25, grads[1]), (3.0, grads[2])):
        assert torch.allclose(
            gradient, factor * grads[0], rtol=1e-2, atol=1e-4 * gradient.abs().max()
        )


# -- pi-Distill


def distilled(make_method, problems, **changes):
    method = make_method("pi-distill", **changes)
    method.teacher = method.policy
    rollouts = with_rewards(method.attempt(1, problems[:1] + problems[70:72]), REWARDS)
    return method, rollouts, trained(method, rollouts)


def test_rollouts_are_sampled_with_the_privileged_prompt(make_method, problems, tokenizer):
    method, rollouts, _ = distilled(make_method, problems, pi_shown=1.0)
    for r in rollouts:
        prompt = encode_prompt(tokenizer, shown_by_hand("pi-opsd", r, rollouts))
        assert r.prompt_ids == prompt and r.problem in problems
        sampled = of_tokens(method.policy, prompt, r.ids)
        assert torch.allclose(sampled, r.rollout_logprobs, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_both_rows_have_the_penalised_advantage(make_method, problems, tokenizer, share):
    method, rollouts, rows = distilled(make_method, problems, pi_share=share, pi_beta=0.4)
    plain_prompts = [encode_prompt(tokenizer, r.problem.prompt) for r in rollouts]
    p = [of_tokens(method.policy, x, r.ids) for x, r in zip(plain_prompts, rollouts, strict=True)]
    q = [of_tokens(method.policy, r.prompt_ids, r.ids) for r in rollouts]
    gains = [
        reward - 0.4 * (b - a).mean().item() for reward, a, b in zip(REWARDS, p, q, strict=True)
    ]
    told = {r.id: r for r in rows if not r.id.endswith("/plain")}
    plain = {r.id: r for r in rows if r.id.endswith("/plain")}
    assert (len(told), len(plain)) == (12 * (share > 0), 12 * (share < 1))
    kinds = (share > 0) + (share < 1)
    for i, r in enumerate(rollouts):
        group = gains[i // 4 * 4 : i // 4 * 4 + 4]
        advantage = gains[i] - sum(group) / 4
        if share > 0:
            assert told[r.id].advantage == pytest.approx(kinds * share * advantage, abs=1e-4)
            assert told[r.id].rollout_logprobs is not None
        if share < 1:
            row = plain[f"{r.id}/plain"]
            ratio = (p[i] - q[i]).exp().clamp(max=2)
            wanted = kinds * (1 - share) * advantage * ratio
            assert torch.allclose(row.advantage, wanted, atol=1e-4)
            assert row.prompt_ids == plain_prompts[i] and row.rollout_logprobs is None
            assert row.ids == r.ids


def test_the_gradient_is_the_mean_of_both_objectives(make_method, problems):
    """J = a J_T + (1 - a) J_S, although the mean is taken over twice as many rows."""
    grads = {}
    for share in (0.0, 0.3, 1.0):
        method, _, rows = distilled(make_method, problems, pi_share=share)
        grads[share], sums = gradient_of(method, rows)
        assert sums["compared"] == sum(len(r.ids) for r in rows if r.rollout_logprobs is not None)
    assert grads[0.0].abs().max() > 0 and not torch.allclose(grads[0.0], grads[1.0], rtol=0.1)
    wanted = 0.3 * grads[1.0] + 0.7 * grads[0.0]
    assert torch.allclose(grads[0.3], wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max())


def test_it_learns_what_the_plain_prompt_never_gets_right(make_method, problems, tokenizer):
    """Its sign, on attempts that the verifier judged: GRPO has no gradient on such problems, and
    one step of pi-Distill's makes their right answers likelier without the information.
    """
    hard = [p for p in problems if len(p.extra["hidden"].split()) == 3][:16:2]
    grpo = make_method("grpo")
    failed = grpo.attempt(1, hard)
    assert not any(r.reward for r in failed)
    (batch,) = pmd.mini_batches(trained(grpo, failed), grpo.policy, grpo.cfg)
    assert pmd.update(grpo, None, batch, 1)["updates_skipped"] == 1
    method = make_method("pi-distill", pi_share=0.5, pi_shown=0.67)
    method.teacher = method.policy
    rows = trained(method, method.attempt(1, hard))
    assert any(r.reward for r in rows)

    def likelihood():
        pairs = [
            (encode_prompt(tokenizer, p.prompt), tokenizer(references.reference(p)).input_ids)
            for p in hard
        ]
        return sum(float(of_tokens(method.policy, *pair).sum()) for pair in pairs)

    before = likelihood()
    gradient, _ = gradient_of(method, rows)
    sizes = [p.numel() for p in method.policy.parameters()]
    with torch.no_grad():
        for p, part in zip(method.policy.parameters(), gradient.split(sizes), strict=True):
            p.sub_(0.1 / float(gradient.norm()) * part.view_as(p))
    assert likelihood() > before


def test_what_the_privileged_prompt_shows(problems):
    by_length = {len(p.extra["hidden"].split()): p for p in problems}
    for length, problem in by_length.items():
        words = references.reference(problem).split()
        assert pi_distill.privileged(problem, 1.0) == {"solution": " ".join(words)}
        for told in range(length):
            shown = pi_distill.privileged(problem, (told + 0.01) / length)
            assert shown == {"beginning": " ".join(words[: 4 + 6 * told]) if told else ""}
    lines = dataclasses.replace(
        problems[0], verifier="choice", extra={"reference": "One.\nTwo.\n\nThree."}
    )
    assert pi_distill.privileged(lines, 0.7) == {"beginning": "One.\nTwo.\n\n"}
    assert pi_distill.privileged(lines, 0.0) == {"beginning": ""}


# -- Lightning OPD


def test_it_refuses_to_leave_out_what_is_mastered(make_config):
    cfg = make_config(method="lightning-opd", group_size=1, supervise_mastered=False)
    with pytest.raises(ValueError, match="--no_supervise_mastered is not for lightning-opd"):
        pmd.check(cfg)


def test_it_samples_and_asks_its_teacher_once(make_config, monkeypatch):
    calls = []
    attempt, scored = pmd.attempt, pmd.scored

    def counted(sampler, problems, cfg):
        calls.append(("attempt", len(problems)))
        return attempt(sampler, problems, cfg)

    def also_counted(model, rows, prompt_of, cfg):
        calls.append(("scored", len(rows)))
        return scored(model, rows, prompt_of, cfg)

    monkeypatch.setattr(pmd, "attempt", counted)
    monkeypatch.setattr(pmd, "scored", also_counted)
    cfg = make_config(
        method="lightning-opd", group_size=1, batch_size=4, eval_problems=1, eval_k=1, name="run"
    )
    pmd.train(cfg)
    everything = len(load_task("nano").train)
    assert calls[:2] == [("attempt", everything), ("scored", everything)]
    assert calls[2:] == [("scored", 4)] * 2
    rows = [json.loads(row) for row in Path(cfg.out, "run", "metrics.jsonl").open()]
    assert [row["updates"] for row in rows if "reward" in row] == [2, 2]


def test_the_teacher_stays_the_policy_that_began(make_method, problems, tokenizer):
    method = make_method("lightning-opd", group_size=4)
    method.task = dataclasses.replace(method.task, train=problems[:1] + problems[70:72])
    first = method.attempt(1, method.task.train)
    before = copy.deepcopy(method.policy)
    trained(method, first)
    with torch.no_grad():
        for p in method.policy.parameters():
            p.mul_(1.02)
    method.sampler.step = 2
    rows = trained(method, method.attempt(2, method.task.train[1:]), step=2)
    assert [r.ids for r in rows] == [r.ids for r in first[4:]]
    for r in rows:
        prompt = encode_prompt(tokenizer, shown_by_hand("pi-opsd", r, rows))
        q = of_tokens(before, prompt, r.ids)
        p = of_tokens(method.policy, r.prompt_ids, r.ids)
        assert torch.allclose(r.advantage, q - p, atol=1e-4) and r.rollout_logprobs is None
    _, sums = gradient_of(method, rows)
    assert sums["compared"] == 0  # the sampler's drift is not watched, for there is no sampler


def test_at_the_first_step_it_is_on_policy(make_method, problems):
    """There its gradient is that of pi-OPSD without rewards and with lambda 1."""
    lightning = make_method("lightning-opd", group_size=4)
    rows = lightning.attempt(1, lightning.task.train)
    found, _ = gradient_of(lightning, trained(lightning, rows))
    live = make_method("pi-opsd", plus_lambda=1.0)
    live.teacher = live.policy
    rollouts = with_rewards(live.attempt(1, live.task.train), [0] * 12)
    assert [r.ids for r in rollouts] == [r.ids for r in rows]
    wanted, _ = gradient_of(live, trained(live, rollouts))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max())


def test_a_checkpoint_holds_rollouts_and_scores(make_method, problems, monkeypatch):
    method = make_method("lightning-opd", group_size=2)
    trained(method, method.attempt(1, problems[:3]))
    again = make_method("lightning-opd", group_size=2)
    again.load(json.loads(json.dumps(method.state())))
    monkeypatch.setattr(pmd, "attempt", None)
    rows, others = (trained(m, m.attempt(2, problems[1:3]), step=2) for m in (method, again))
    assert [r.text for r in rows] == [r.text for r in others] and len(rows) == 4
    assert all(torch.equal(a.advantage, b.advantage) for a, b in zip(rows, others, strict=True))
    assert again.state() == method.state()


def test_rollouts_of_a_fork_from_another_task_are_not_taken_up(make_method, problems):
    method = make_method("lightning-opd", group_size=2)
    trained(method, method.attempt(1, method.task.train))
    saved = json.loads(json.dumps(method.state()))
    fork = make_method("lightning-opd", group_size=2)
    others = [dataclasses.replace(p, prompt=f"{p.prompt} 1") for p in fork.task.train]
    fork.task = dataclasses.replace(fork.task, train=others)
    fork.load(saved)
    assert not fork.rollouts


def test_a_reference_that_does_not_fit_is_not_followed(make_method, problems):
    """Else such rows would be drawn to the initial policy."""
    method = make_method("lightning-opd", group_size=2)
    rollouts = method.attempt(1, method.task.train)
    long = rollouts[0].problem.id
    method.contexts = lambda step, rows: [
        {"solution": "1 " * (2000 if r.problem.id == long else 1)} for r in rows
    ]
    rows = trained(method, rollouts)
    pulled = [bool(torch.as_tensor(r.advantage).any()) for r in rows]
    assert pulled == [r.problem.id != long for r in rows] and pulled.count(False) == 2
