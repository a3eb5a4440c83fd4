"""Methods whose teachers read a reference, pairs or two feedbacks: opsd, sgsd, avsd, unisd, selfci.

Every expectation is computed here from the model's logits, or by autograd of the loss as its paper
writes it.
"""

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import method_of

import kernels
import memory as mem
import pmd
from methods import atesd_scheduled, avsd, opsd
from nano.world import OPERATIONS, attempt_text
from runtime.chat import encode_prompt
from runtime.store import Item
from tasks import Problem, load_task, references, verify

NAMES = ["opsd", "sgsd", "avsd", "avsd-full", "unisd", "selfci"]


@pytest.fixture(scope="module")
def problems():
    return load_task("nano").train


def of_length(problems, length, n):
    """The first problem of each of n names of so many syllables."""
    names = {p.extra["hidden"]: p for p in reversed(problems)}
    return [p for rules, p in names.items() if len(rules.split()) == length][:n]


def rules_of(problem):
    return problem.extra["hidden"].split()


def attempted(policy, tokenizer, problem, wrong=0, number=0):
    """A rollout that names the right operations, or the wrong-th other one at its last step."""
    name, operations = zip(*(rule.split("=") for rule in rules_of(problem)), strict=True)
    others = [o for o in OPERATIONS if o != operations[-1]]
    if wrong:
        operations = [*operations[:-1], others[wrong - 1]]
    digits = [int(word) for word in problem.prompt.split()[-4:]]
    text = attempt_text(list(name), operations, digits)
    verdict = verify(problem, text)
    assert verdict.reward == (not wrong)
    r = pmd.Rollout(
        prompt_ids=encode_prompt(tokenizer, problem.prompt),
        ids=tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id],
        rollout_logprobs=None,
        text=text,
        finished=True,
        id=f"1/{problem.id}/{number}",
        problem=problem,
        reward=verdict.reward,
        feedback=verdict.feedback,
    )
    r.rollout_logprobs = sampled(policy, r.prompt_ids, r.ids).detach()
    return r


def distributions(model, prompt, ids):
    """(C, V): log-probabilities of the model for each token of ids after a prompt."""
    return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def sampled(model, prompt, ids):
    """(C,): of the tokens themselves."""
    return distributions(model, prompt, ids).gather(1, torch.tensor(ids)[:, None])[:, 0]


def told(tokenizer, problem, **context):
    return encode_prompt(tokenizer, mem.compose(problem.prompt, **context))


def where_named(tokenizer, r):
    """The places of the operations in a completion."""
    return [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(r.ids)) if "=" in token]


def views_of(tokenizer, problem):
    """The prompts of the three views, written by hand: whole, first half, last rule."""
    rules = rules_of(problem)
    name, operations = zip(*(rule.split("=") for rule in rules), strict=True)
    digits = [int(word) for word in problem.prompt.split()[-4:]]
    half = (len(rules) + 1) // 2
    return [
        told(tokenizer, problem, solution=attempt_text(list(name), operations, digits)),
        told(
            tokenizer,
            problem,
            beginning=attempt_text(list(name[:half]), operations[:half], digits),
        ),
        told(tokenizer, problem, strategies=[("rule", rules[-1])]),
    ]


def made(make_config, name, policy, tokenizer, *flags, **changes):
    cfg = make_config("--method", name, *flags, **changes)
    return method_of(cfg, policy, copy.deepcopy(policy), tokenizer=tokenizer)


def learned(method, rows, **changes):
    """The gradient that `update` hands to the optimizer, through a learning rate of 0."""
    method.cfg = dataclasses.replace(method.cfg, lr=0.0, mini_batch_size=99, **changes)
    optimizer = torch.optim.SGD(method.policy.parameters(), lr=0.0)
    optimizer.updates = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmd, "MAX_GRAD_NORM", math.inf)
        (batch,) = pmd.mini_batches(rows, method.policy, method.cfg)
        sums = pmd.update(method, optimizer, batch, 1)
    return torch.cat([p.grad.flatten() for p in method.policy.parameters()]), sums


def by_autograd(policy, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


def assert_equal(found, wanted):
    assert wanted.abs().max() > 0
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max()), (
        found - wanted
    ).abs().max() / wanted.abs().max()


# -- all of them


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_by_name(make_config, name):
    """With one rollout a problem, as the papers have it, where no group is compared."""
    size = 4 if name == "selfci" else 1
    cfg = make_config(
        "--method", name, group_size=size, batch_size=8, mini_batch_size=8, eval_k=1, name="run"
    )
    pmd.train(cfg)
    lines = Path(cfg.out, "run", "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "reward" in row and "updates" in row]
    assert [row["updates"] for row in rows] == [1, 1]
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_change_no_gradient(policy, tokenizer, problems, make_config, name):
    method = made(make_config, name, policy, tokenizer)
    chosen = [p for length in (1, 2, 3) for p in of_length(problems, length, 1)]
    rows = [attempted(policy, tokenizer, p, wrong, wrong) for p in chosen for wrong in (0, 1, 2)]
    if name == "sgsd":
        method.pair_weights = {p.id: torch.tensor([0.5, 0.3, 0.2]) for p in chosen}
        for r in rows:
            r.teachers, r.advantage = views_of(tokenizer, r.problem), 0.0
    else:
        rows = method.condition(1, rows)
    method.weigh(1, rows)
    whole, sums = learned(method, rows)
    parts, _ = learned(method, rows, micro_tokens=60)
    assert whole.abs().max() > 0 and sums["tokens"] > 0
    assert torch.allclose(whole, parts, atol=1e-5 * float(whole.abs().max()))


# -- opsd


def test_a_reference_is_a_right_answer_or_a_refusal(problems):
    assert all(verify(p, references.reference(p)).reward == 1 for p in problems)
    assert {references.reference(p).count("=") for p in problems} == {1, 2, 3}
    bare = dataclasses.replace(problems[0], verifier="choice", id="q7", extra={})
    with pytest.raises(ValueError, match="problem q7 has no reference solution"):
        references.reference(bare)
    assert references.reference(dataclasses.replace(bare, extra={"reference": "So b."})) == "So b."


def test_a_program_has_no_short_answer_to_show():
    """Its `answer` says that tests judge it, which no teacher is shown."""
    extra = {"reference": "a = 1\nprint(a)"}
    program = Problem("x", "print one", "its tests", "code", extra=extra)
    shown = [*avsd.views(program), atesd_scheduled.exposed(program, 0.5)]
    assert "its tests" not in str(shown)
    assert shown[1]["beginning"] + shown[2]["solution"] == shown[0]["solution"]
    assert shown[3] == {"beginning": "a = 1"}
    number = Problem("y", "1 + 1", "2", "last_number", extra=extra)
    assert avsd.views(number)[2] == {"solution": "2"}
    assert atesd_scheduled.exposed(number, 0.5) == {"beginning": "a = 1\nAnswer: 2"}


def test_opsd_learns_where_no_attempt_succeeds(policy, tokenizer, make_config):
    """Its sign: there SDPO and GRPO have no gradient. Its own is that of the forward KL."""
    chosen = of_length(load_task("nano/plain").train, 2, 2)
    rows = [attempted(policy, tokenizer, p, n, n) for p in chosen for n in (1, 2)]
    sdpo = made(make_config, "sdpo", policy, tokenizer).condition(1, copy.deepcopy(rows))
    grpo = made(make_config, "grpo", policy, tokenizer).condition(1, copy.deepcopy(rows))
    assert not any(pmd.has_signal(r) for r in sdpo + grpo)
    method = made(make_config, "opsd", policy, tokenizer)
    assert (method.cfg.alpha, method.cfg.ema_rate) == (0, 0)
    found, sums = learned(method, method.condition(1, rows))
    loss = 0
    for r in rows:
        log_p = distributions(policy, r.prompt_ids, r.ids)
        with torch.no_grad():
            log_q = distributions(policy, views_of(tokenizer, r.problem)[0], r.ids)
        loss = loss + (log_q.exp() * (log_q - log_p)).sum(1).mean() / len(rows)
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_equal(found, by_autograd(policy, loss))


@pytest.mark.parametrize("name", ["opsd", "avsd", "avsd-full"])
def test_the_teacher_is_the_initial_policy(policy, tokenizer, make_config, name):
    method = made(make_config, name, policy, tokenizer)
    before = [p.clone() for p in policy.parameters()]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    method.follow(10)
    pairs = zip(method.teacher.parameters(), before, strict=True)
    assert all(torch.equal(t, p) for t, p in pairs)


def test_the_cap_turns_the_gradient_around_where_teacher_and_student_disagree(
    policy, tokenizer, problems
):
    """Against p sum(u q) - u q, with u = 1 where q (log q - log p) is below the cap."""
    for p in of_length(problems, 1, 4):
        r = attempted(policy, tokenizer, p)
        (at,) = where_named(tokenizer, r)
        with torch.no_grad():
            log_p = distributions(policy, r.prompt_ids, r.ids)
            log_q = distributions(policy, views_of(tokenizer, p)[0], r.ids)
        eye, ids, ones = torch.eye(log_p.shape[1]), torch.tensor(r.ids), torch.ones(len(r.ids))
        signs = []
        for cap in (0.05, 1e9):
            logits = log_p.clone().requires_grad_()
            formula = functools.partial(opsd.capped_forward_kl, cap=cap)
            kernels.chunked_loss(formula, logits, eye, ids, ones, [(log_q, eye)]).loss.backward()
            q = log_q.double().exp()
            entries = q * (log_q.double() - log_p.double())
            u = (entries < cap).double()
            wanted = log_p.double().exp() * (u * q).sum(1, keepdim=True) - u * q
            assert torch.allclose(logits.grad.double(), wanted, atol=1e-6)
            signs.append(logits.grad[at, r.ids[at]].sign().item())
        assert signs == [1, -1]  # a positive gradient lowers the operation that the teacher knows


def test_a_cap_that_nothing_reaches_changes_nothing(policy, tokenizer, problems, make_config):
    grads = []
    for cap in ("0", "1e9", "0.05"):
        method = made(make_config, "opsd", policy, tokenizer, "--opsd_cap", cap)
        rows = [attempted(policy, tokenizer, p, 1) for p in of_length(problems, 2, 2)]
        gradient, sums = learned(method, method.condition(1, rows))
        grads.append((gradient, sums))
    assert_equal(grads[1][0], grads[0][0])
    for key in ("loss", "divergence", "entropy", "teacher_entropy", "sampler_gap"):
        assert grads[1][1][key] == pytest.approx(grads[0][1][key], rel=1e-3, abs=1e-5)
    assert not torch.allclose(grads[2][0], grads[0][0], atol=1e-3)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["opsd", "--opsd_cap", "0.05", "--alpha", "0.5"], "--opsd_cap bounds the entries"),
        (["opsd", "--opsd_cap", "0.05", "--top_k", "5"], "--opsd_cap bounds the entries"),
        (["opsd", "--opsd_cap", "-1"], "--opsd_cap -1.0 must be at least 0"),
        (["avsd-full", "--alpha", "0"], "--method avsd-full.*--alpha 1 and --top_k 0"),
        (["avsd-full", "--top_k", "5"], "--method avsd-full.*--alpha 1 and --top_k 0"),
        (["pi-distill", "--no_supervise_mastered"], "--no_supervise_mastered is not for"),
        (["sgsd", "--sgsd_pairs", "0"], "--sgsd_pairs 0 must be at least 1"),
        (["unisd", "--unisd_every", "0"], "--unisd_every 0 must be at least 1"),
        (["selfci", "--alpha", "0.5"], "--alpha 1 and --top_k 0"),
        (["selfci", "--top_k", "5"], "--alpha 1 and --top_k 0"),
        (["selfci", "--group_size", "1"], "--group_size 1 leaves selfci nothing to learn from"),
    ],
)
def test_what_is_refused(make_config, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        pmd.check(pmd.parse_flags(["--method", *flags]), quiet=True)


# -- sgsd


def test_pairs_are_of_like_rank_and_weighted_by_their_cosines(
    policy, tokenizer, problems, make_config
):
    def item(number, kind, text, cosine):
        side = math.sqrt(1 - cosine**2)
        vector = np.array([cosine, side], np.float32)
        return Item(number, "insight", kind, "p", "rule", text, embedding=vector)

    items = [
        item(1, "strategy", "vo=rev", 0.1),
        item(2, "strategy", "mi=inc", 0.9),
        item(3, "lesson", "vo!inc", 0.3),
        item(4, "strategy", "vo=rev", 0.1),  # the same once more
        item(5, "strategy", "ti=rol", 0.5),
        item(6, "strategy", "ka=dec", 0.2),
    ]
    method = made(make_config, "sgsd", policy, tokenizer, "--sgsd_pairs", "3")
    method.memory = SimpleNamespace(
        living=lambda tier: items,
        question_vectors=lambda problems: np.array([[1.0, 0.0]] * len(problems), np.float32),
    )
    (p,) = of_length(problems, 2, 1)
    (r,) = method.condition(1, [attempted(policy, tokenizer, p)])
    assert r.teachers == [
        told(tokenizer, p, strategies=[("rule", "mi=inc")], lessons=[("rule", "vo!inc")]),
        told(tokenizer, p, strategies=[("rule", "ti=rol")]),
        told(tokenizer, p, strategies=[("rule", "ka=dec")]),
    ]
    assert not r.teacher_ids
    assert pmd.is_trained(r)  # train() asks before weigh whether the sampler needs new weights
    exps = [math.exp(x) for x in ((0.9 + 0.3) / 2, 0.5, 0.2)]
    wanted = torch.tensor([x / sum(exps) for x in exps])
    assert torch.allclose(method.pair_weights[p.id].float(), wanted, atol=1e-6)
    items.clear()
    (r,) = method.condition(2, [r])
    method.weigh(2, [r])
    assert r.teachers == [] and not pmd.is_trained(r)


def test_sgsd_has_the_gradient_of_its_loss(policy, tokenizer, problems, make_config):
    """Of sum_k w_k polarity_k mean_t(log 2 - softplus(-d^2 / 2)), differentiated by autograd."""
    method = made(make_config, "sgsd", policy, tokenizer)
    assert method.cfg.teacher == "live"
    method.teacher = policy
    weights = torch.tensor([0.6, 0.3, 0.1])
    chosen = of_length(problems, 2, 2)
    method.pair_weights = {p.id: weights for p in chosen}
    rows = [attempted(policy, tokenizer, p, wrong, wrong) for p in chosen for wrong in (0, 3)]
    for r in rows:
        _, half, last = views_of(tokenizer, r.problem)
        r.teachers = [last, half, r.prompt_ids]  # the third teacher knows nothing more
        r.advantage = 0.0
    method.weigh(1, rows)
    loss, polarities = 0, []
    for r in rows:
        assert r.advantage[-1] == 0  # EOS is special
        content = torch.tensor([float(i != tokenizer.eos_token_id) for i in r.ids])
        log_p = sampled(policy, r.prompt_ids, r.ids)
        for weight, prompt in zip(weights, r.teachers, strict=True):
            d = sampled(policy, prompt, r.ids).detach() - log_p
            support = (d.detach().clamp(-3, 3) * content).sum() / content.sum()
            polarity = 0.0
            if abs(support) > 0.05:
                polarity = math.copysign(1, support) * (1 if r.reward else -1)
            polarities.append(polarity)
            token_loss = math.log(2) - torch.nn.functional.softplus(-(d**2) / 2)
            loss = loss + weight * polarity * (token_loss * content).mean() / len(rows)
    assert set(polarities) > {0.0, 1.0}
    wanted = by_autograd(policy, loss)  # before an optimizer touches the weights
    assert_equal(learned(method, rows)[0], wanted)


def test_an_empty_completion_is_reinforced_by_nothing(policy, tokenizer, problems, make_config):
    method = made(make_config, "sgsd", policy, tokenizer)
    r = attempted(policy, tokenizer, problems[0])
    r.ids, r.rollout_logprobs = r.ids[-1:], r.rollout_logprobs[-1:]
    r.teachers, method.pair_weights = [r.prompt_ids[:4]], {r.problem.id: torch.ones(1)}
    r.advantage = 0.0
    method.weigh(1, [r])
    assert r.advantage.tolist() == [0.0]


def test_the_support_of_a_teacher_is_clipped(policy, tokenizer, problems, make_config):
    """One token that it likes by far doesn't make up for two that it finds unlikely."""
    method = made(make_config, "sgsd", policy, tokenizer)
    row = attempted(policy, tokenizer, problems[0], 0, 1)
    row.ids, row.reward = row.ids[:3], 1.0
    d = torch.tensor([5.0, -3.0, -1.0])
    pull = method.pull(row, d.clone())
    assert torch.allclose(pull, -torch.sigmoid(-(d**2) / 2) * d)
    row.reward = 0.0
    assert torch.allclose(method.pull(row, d.clone()), -pull)
    assert not method.pull(row, torch.tensor([0.04, 0.06, 0.04])).any()  # too little to say


def test_sgsd_reads_the_special_tokens_once_a_pull(policy, tokenizer, problems, make_config):
    """A tokenizer makes a list of them each time, which takes longer than all else of a token.

    What is read has not a bit of another value than with a look for each token.
    """
    method, reads = made(make_config, "sgsd", policy, tokenizer), []

    class Counted:
        @property
        def all_special_ids(self):
            reads.append(1)
            return tokenizer.all_special_ids

    method.tokenizer = Counted()
    row = attempted(policy, tokenizer, problems[0])
    d = torch.linspace(-1, 2.5, len(row.ids))
    content = torch.tensor([id not in tokenizer.all_special_ids for id in row.ids])
    assert not content.all() and len(row.ids) > 5
    wanted = torch.sigmoid(-((d * content) ** 2) / 2) * d * content
    for reward, sign in ((1.0, 1), (0.0, -1)):
        row.reward = reward
        assert torch.equal(method.pull(row, d.clone()), sign * wanted)
    assert len(reads) == 2


def test_polarity_validates_teachers_on_successes_only(policy, tokenizer, problems, make_config):
    """Its sign, at the operation: a wrong teacher does not lower a success, as it would unchecked.

    On failures any other claim has polarity +1, right or wrong.
    """
    method = made(make_config, "sgsd", policy, tokenizer)
    chosen = of_length(problems, 1, 4)
    method.pair_weights = {p.id: torch.tensor([1.0]) for p in chosen}
    kept = {}
    for p in chosen:
        syllable, right = rules_of(p)[0].split("=")
        wrong = [o for o in OPERATIONS if o != right]
        teachers = {"right": right, "attempted": wrong[0], "other": wrong[1]}
        for label, operation in teachers.items():
            for outcome in (0, 1):
                r = attempted(policy, tokenizer, p, outcome, outcome)
                line = f"{syllable}={operation}"
                r.teachers = [told(tokenizer, p, strategies=[("rule", line)])]
                r.advantage = 0.0
                method.weigh(1, [r])
                (at,) = where_named(tokenizer, r)
                kept.setdefault((label, outcome), []).append(float(r.advantage[at].sign()))
                gain = sampled(policy, r.teachers[0], r.ids) - sampled(policy, r.prompt_ids, r.ids)
                if outcome == 0 and label != "right":
                    assert gain[at] < 0  # unchecked, this teacher would lower the right operation
    assert all(min(kept[label, 0]) > 0 for label in ("right", "attempted", "other"))
    assert all(max(kept[label, 1]) < 0 for label in ("right", "attempted", "other"))


# -- avsd


def test_the_residual_never_flips_the_consensus():
    """|g J| <= |A|, against the definitions in float64; equal teachers are their own target."""
    torch.manual_seed(0)
    log_q = (4 * torch.randn(3, 2000, 7, dtype=torch.float64)).log_softmax(-1)
    log_p = (4 * torch.randn(2000, 7, dtype=torch.float64)).log_softmax(-1)
    mean = sum(log_q) / 3
    consensus = mean - log_p
    jump = (sum(q.exp() for q in log_q) / 3).log() - mean
    share = consensus.abs() / (sum((q - log_p).abs() for q in log_q) / 3)
    gate = share * consensus.abs() / (consensus.abs() + jump)
    target = avsd.target(log_p, log_q)
    assert torch.allclose(target, mean + gate * jump, atol=1e-6)
    assert ((target - mean).abs() <= consensus.abs() + 1e-9).all()
    assert ((target - log_p).sign() * consensus.sign() >= 0).all()
    same = log_q[:1].expand(3, -1, -1)
    assert torch.allclose(avsd.target(log_p, same), log_q[0], atol=1e-7)


def test_avsd_advantages_are_those_of_its_definition(policy, tokenizer, problems, make_config):
    method = made(make_config, "avsd", policy, tokenizer)
    rows = [
        attempted(policy, tokenizer, p, 1) for n in (1, 2, 3) for p in of_length(problems, n, 1)
    ]
    rows = method.condition(1, rows)
    assert all(map(pmd.is_trained, rows))  # train() asks so before it calls weigh
    method.weigh(1, rows)
    for r in rows:
        assert r.teachers == views_of(tokenizer, r.problem) and not r.teacher_ids
        with torch.no_grad():
            p = sampled(policy, r.prompt_ids, r.ids).double()
            q = torch.stack([sampled(policy, prompt, r.ids).double() for prompt in r.teachers])
        a = q.mean(0) - p
        j = q.exp().mean(0).log() - q.mean(0)
        c = a.abs() / ((q - p).abs().mean(0) + 1e-12)
        wanted = a + c * a.abs() / (a.abs() + j + 1e-12) * j
        assert torch.allclose(r.advantage.double(), wanted, atol=2e-4)


def test_a_corrupted_view_draws_an_arithmetic_mean_and_not_avsd(
    policy, tokenizer, problems, make_config
):
    """Its sign, where the student named what one view of three wrongly tells."""
    method = made(make_config, "avsd", policy, tokenizer)
    for p in of_length(problems, 1, 8):
        (r,) = method.condition(1, [attempted(policy, tokenizer, p, 2)])
        (at,) = where_named(tokenizer, r)
        (line,) = tokenizer.convert_ids_to_tokens([r.ids[at]])
        r.teachers[2] = told(tokenizer, p, strategies=[("rule", line)])
        method.weigh(1, [r])
        q = torch.stack([sampled(policy, prompt, r.ids)[at] for prompt in r.teachers])
        arithmetic = q.exp().mean().log() - sampled(policy, r.prompt_ids, r.ids)[at]
        assert arithmetic > 0 > r.advantage[at]


def test_avsd_full_has_the_gradient_of_its_reverse_kl(policy, tokenizer, problems, make_config):
    method = made(make_config, "avsd-full", policy, tokenizer)
    rows = [attempted(policy, tokenizer, p, 1) for p in of_length(problems, 2, 2)]
    rows = method.condition(1, rows)
    method.weigh(1, rows)
    assert all(r.teacher_ids and r.advantage is None for r in rows)
    found, sums = learned(method, rows)
    loss = 0
    for r in rows:
        log_p = distributions(policy, r.prompt_ids, r.ids)
        with torch.no_grad():
            prompts = views_of(tokenizer, r.problem)
            q = torch.stack([distributions(policy, prompt, r.ids) for prompt in prompts])
            a = q.mean(0) - log_p
            j = q.exp().mean(0).clamp(min=1e-38).log() - q.mean(0)
            c = a.abs() / ((q - log_p).abs().mean(0) + 1e-8)
            target = (q.mean(0) + c * a.abs() / (a.abs() + j + 1e-8) * j).log_softmax(-1)
        loss = loss + (log_p.exp() * (log_p - target)).sum(1).mean() / len(rows)
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert_equal(found, by_autograd(policy, loss))


# -- unisd


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_unisd_weighs_by_agreement(policy, tokenizer, problems, make_config, kind):
    """Weights from logits, and the loss: the sum of w D over the sum of w."""
    method = made(make_config, "unisd", policy, tokenizer, "--unisd_agreement", kind)
    chosen = [p for n in (1, 2, 3) for p in of_length(problems, n, 1)]
    rows = [attempted(policy, tokenizer, p, n, n) for p in chosen for n in (0, 1)]
    rows = method.condition(1, rows)
    method.weigh(1, rows)
    variances, divergences = [], []
    with torch.no_grad():
        for r in rows:
            prompts = views_of(tokenizer, r.problem)
            assert r.teachers == prompts and r.teacher_ids == prompts[0]
            q = np.array([sampled(policy, prompt, r.ids).double().numpy() for prompt in prompts])
            if kind == "sequence":
                q = np.repeat(q.mean(1, keepdims=True), len(r.ids), 1)
            variances.append(((q - q.mean(0)) ** 2).mean(0))
            log_p = distributions(policy, r.prompt_ids, r.ids)
            log_q = distributions(policy, prompts[0], r.ids)
            divergences.append((log_q.exp() * (log_q - log_p)).sum(1).numpy())
    v, d = np.concatenate(variances), np.concatenate(divergences)
    if kind == "token":
        w = np.maximum(1 / (1 + np.minimum(v / np.quantile(v, 0.95), 10)), 0.01)
    else:
        w = np.exp(-v)
    assert w.min() < 0.99 * w.max()
    found = torch.cat([r.weight for r in rows]).numpy()
    assert np.allclose(found, w / w.mean(), rtol=2e-3)
    _, sums = learned(method, rows)
    assert sums["loss"] == pytest.approx((w * d).sum() / w.sum(), rel=2e-3)


def test_unisd_bounds_a_variance_and_leaves_a_token_a_least_weight(policy, tokenizer, make_config):
    method = made(make_config, "unisd", policy, tokenizer)
    rare = {"a": torch.zeros(3, 100)}
    rare["a"][0, 7] = 3.0  # the 0.95 quantile is 0: its variance counts as 10 quantiles
    assert float(method.agreement(rare)["a"].min()) == pytest.approx(1 / 11)
    method = made(make_config, "unisd", policy, tokenizer, "--unisd_gamma", "1000")
    weights = method.agreement({"a": torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]])})["a"]
    assert weights.tolist() == pytest.approx([1.0, 0.01])


def test_unisd_trusts_least_where_a_corrupted_context_disagrees(
    policy, tokenizer, problems, make_config
):
    method = made(make_config, "unisd", policy, tokenizer)
    for p in of_length(problems, 1, 8):
        (r,) = method.condition(1, [attempted(policy, tokenizer, p)])
        syllable, right = rules_of(p)[0].split("=")
        wrong = next(o for o in OPERATIONS if o != right)
        r.teachers[2] = told(tokenizer, p, strategies=[("rule", f"{syllable}={wrong}")])
        method.weigh(1, [r])
        assert [int(r.weight.argmin())] == where_named(tokenizer, r)


def test_without_gamma_unisd_is_plain_distillation(policy, tokenizer, problems, make_config):
    grads = []
    for name, flags in (
        ("unisd", ["--unisd_gamma", "0"]),
        ("opsd", ["--loss_mean", "token"]),
    ):
        method = made(make_config, name, policy, tokenizer, *flags)
        rows = method.condition(1, [attempted(policy, tokenizer, p) for p in problems[::60]])
        method.weigh(1, rows)
        grads.append(learned(method, rows)[0])
    assert grads[0].abs().max() > 0 and torch.equal(*grads)


def test_unisds_teacher_moves_every_tenth_step(policy, tokenizer, make_config):
    method = made(make_config, "unisd", policy, tokenizer)
    before = [p.detach().clone() for p in policy.parameters()]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    for step in range(1, 10):
        method.follow(step)
    assert all(map(torch.equal, method.teacher.parameters(), before))
    method.follow(10)
    for t, p in zip(method.teacher.parameters(), before, strict=True):
        assert torch.allclose(t, p + 0.1, atol=1e-5)


# -- selfci


def test_selfci_has_the_gradient_of_a_sum_over_two_teachers(
    policy, tokenizer, problems, make_config
):
    """Where a rollout has both; with one of the two it is distilled from that one."""
    method = made(make_config, "selfci", policy, tokenizer)
    a, b = of_length(problems, 2, 2)
    rows = [attempted(policy, tokenizer, p, wrong, wrong) for p in (a, b) for wrong in (0, 1)]
    rows[2] = attempted(policy, tokenizer, b, 2, 0)  # b has no success
    rows = method.condition(1, rows)
    right = rows[0].text
    both = [
        told(tokenizer, a, solution=right),
        told(tokenizer, a, feedback=rows[1].feedback),
    ]
    prompts = [[], both] + [[told(tokenizer, b, feedback=r.feedback)] for r in rows[2:]]
    assert [[r.teacher_ids, *r.teachers] if r.teacher_ids else [] for r in rows] == prompts
    assert [r.weight for r in rows] == [1.0, 2.0, 1.0, 1.0]
    found, _ = learned(method, rows)
    loss = 0
    for r, several in zip(rows, prompts, strict=True):
        log_p = distributions(policy, r.prompt_ids, r.ids)
        for prompt in several:
            log_q = distributions(policy, prompt, r.ids).detach()
            loss = loss + (log_p.exp() * (log_p - log_q)).sum(1).mean() / len(rows)
    assert_equal(found, by_autograd(policy, loss))


def test_a_feedback_that_does_not_fit_is_no_second_teacher(
    policy, tokenizer, problems, make_config
):
    """Then the sibling's is the only one, and its divergence counts once."""
    method = made(make_config, "selfci", policy, tokenizer)
    (p,) = of_length(problems, 2, 1)
    group = [attempted(policy, tokenizer, p, wrong, wrong) for wrong in (0, 1, 2)]
    group[1].feedback = "vo!rev " * 60
    lengths = [len(told(tokenizer, p, **c)) for c in ({"solution": group[0].text}, {})]
    room = max(lengths) + 20
    assert room < len(told(tokenizer, p, feedback=group[1].feedback))
    method.cfg = dataclasses.replace(method.cfg, max_reprompt=room)
    _, long, short = method.condition(1, group)
    sibling = told(tokenizer, p, solution=group[0].text)
    assert (long.teacher_ids, long.teachers, long.weight) == (sibling, [], 1.0)
    second = told(tokenizer, p, feedback=short.feedback)
    assert (short.teacher_ids, short.teachers, short.weight) == (sibling, [second], 2.0)
    log_p = distributions(policy, long.prompt_ids, long.ids)
    log_q = distributions(policy, sibling, long.ids).detach()
    loss = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    wanted = by_autograd(policy, loss)
    assert_equal(learned(method, [long])[0], wanted)


def test_a_sibling_that_does_not_fit_leaves_selfci_the_feedback(
    policy, tokenizer, problems, make_config
):
    method = made(make_config, "selfci", policy, tokenizer)
    (p,) = of_length(problems, 2, 1)
    right, wrong = [attempted(policy, tokenizer, p, n, n) for n in (0, 1)]
    right.text += " 1" * 200
    second = told(tokenizer, p, feedback=wrong.feedback)
    method.cfg = dataclasses.replace(method.cfg, max_reprompt=len(second) + 20)
    _, row = method.condition(1, [right, wrong])
    assert (row.teacher_ids, row.teachers, row.weight) == (second, [], 1.0)


def test_the_product_knows_what_each_teacher_knows_alone(policy, tokenizer, problems, make_config):
    """Its sign: two strategies, each about one of two syllables."""
    method = made(make_config, "selfci", policy, tokenizer)
    head = policy.get_output_embeddings().weight
    for p in of_length(problems, 2, 4):
        r = attempted(policy, tokenizer, p)
        r.teacher_ids, other = (
            told(tokenizer, p, strategies=[("rule", rule)]) for rule in rules_of(p)
        )
        r.teachers = [other]
        with torch.no_grad():
            product = (method.teacher_hidden([r]) @ head.T).log_softmax(-1)
            q = [distributions(policy, prompt, r.ids) for prompt in (r.teacher_ids, other)]
        assert torch.allclose(product, ((q[0] + q[1]) / 2).log_softmax(-1), atol=1e-4)
        for i, at in enumerate(where_named(tokenizer, r)):
            told_it, not_told = (float(x[at, r.ids[at]].exp()) for x in (q[i], q[1 - i]))
            assert told_it > 0.8 and not_told < 0.3
            assert product[at].argmax() == r.ids[at]


def test_where_the_verifier_is_silent_selfci_is_sdpo(policy, tokenizer, make_config):
    grads = []
    for name in ("selfci", "sdpo"):
        method = made(make_config, name, policy, tokenizer, "--alpha", "1")
        chosen = of_length(load_task("nano/plain").train, 2, 2)
        rows = [attempted(policy, tokenizer, p, n, n) for p in chosen for n in (0, 1)]
        rows = method.condition(1, rows)
        assert [bool(r.teacher_ids) for r in rows] == [False, True] * 2
        grads.append(learned(method, rows)[0])
    assert grads[0].abs().max() > 0 and torch.equal(*grads)
