"""tools/reads.py: what it measures is the model's own log-probability, and its verdict can go both
ways.
"""

import dataclasses
import json
import random
import types

import pytest
import torch
from conftest import method_of, words

import pmd
from memory import Memory
from nano.world import OPERATIONS, attempt_text
from runtime import run as records
from runtime.chat import encode_prompt
from runtime.store import Store
from runtime.watch import Pull, lesson_pull
from tasks import load_task
from tools import reads


@dataclasses.dataclass
class Tried:
    id: str
    problem: object
    text: str
    reward: float
    feedback: str = ""


def attempts_at(problem):
    """A failed attempt whose first step is wrong, and the right one: texts, and the wrong claim."""
    pairs = [pair.split("=") for pair in problem.extra["hidden"].split()]
    name, truth = [s for s, _ in pairs], [o for _, o in pairs]
    digits = [int(word) for word in problem.answer.split()[:4]]
    others = [o for o in OPERATIONS if o != truth[0]]
    wrong = random.Random(problem.id).choice(others)
    failed = attempt_text(name, [wrong, *truth[1:]], digits)
    return attempt_text(name, truth, digits), failed, (name[0], wrong)


@pytest.fixture
def make_run(tmp_path, make_config):
    """A run of which 12 problems are remembered, with a lesson and a strategy from each failure."""

    def make(strategy):
        problems = load_task("nano").train[::12][:12]
        cfg = dataclasses.replace(make_config(), dev=0.0)
        claims, tried = {}, []
        for problem in problems:
            right, failed, (syllable, wrong) = attempts_at(problem)
            claims[problem.prompt] = syllable, wrong
            tried.append(Tried(f"1/{problem.id}/0", problem, right, 1.0))
            tried.append(Tried(f"1/{problem.id}/1", problem, failed, 0.0, f"{syllable}!{wrong}"))

        def reflect(prompt):
            syllable, wrong = next(c for text, c in claims.items() if f"{text}\n" in prompt)
            strategies = [{"title": "rule", "content": strategy.format(syllable, wrong)}]
            lessons = [{"title": "trap", "content": f"{syllable}!{wrong}"}]
            return json.dumps({"strategies": strategies, "lessons": lessons})

        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
        memory = Memory(
            folder / "memory.db", words, lambda prompts: list(map(reflect, prompts)), clusters=4
        )
        memory.add_problems(problems)
        memory.record(1, tried)
        memory.reflect(1, problems)
        memory.close()
        return folder

    return make


def test_a_misread_block_is_told_from_one_that_is_read(make_run):
    """Its strategies advertise what failed, and its lessons warn of the same."""
    run = make_run("{}={}")
    text = reads.report("nano", run, 0, "cpu")
    assert "12 of 12 problems" in text
    assert "\nstrategies: MISREAD" in text and "failed completions MORE likely" in text
    assert "\nlessons: read, it tells right completions from failed ones; the model finds" in text
    warned = text.split("lessons, on what they warn of: ")[1].splitlines()[0]
    assert warned == "the model finds failed completions less likely beside it."
    assert "behaviors: 0 problems are too few to say anything." in text


def test_the_numbers_are_the_model_s_own(make_run, policy, tokenizer):
    run = make_run("{}={}")
    cfg = reads.config_of(run, "nano", "cpu")
    store = Store(run / "memory.db", frozen=True)
    problem = load_task("nano").train[0]
    lines = reads.measure(policy, tokenizer, store, [problem], cfg)
    store.close()
    _, failed, (syllable, wrong) = attempts_at(problem)
    (line,) = [x for x in lines if (x["block"], x["verdict"]) == ("lessons", "failed")]
    heading, closing = (
        "Lessons from past failed attempts on this problem:",
        "Correctly solve the original question.",
    )
    beside = f"{problem.prompt}\n{heading}\n- trap: {syllable}!{wrong}\n{closing}"
    for prompt, found in ((problem.prompt, line["without"]), (beside, line["with"])):
        before = encode_prompt(tokenizer, prompt)
        ids = before + tokenizer(failed, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        total = sum(float(logprobs[i - 1, ids[i]]) for i in range(len(before), len(ids)))
        assert found == pytest.approx(total, abs=1e-3)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is no run: it has no config.json"):
        reads.main(["--model", "nano", "--memory", str(tmp_path)])


@pytest.mark.parametrize("device", ["nowhere", "cuda"])
def test_a_device_that_is_not_there_is_refused(make_run, device):
    with pytest.raises(SystemExit, match=f"reads.py: --device {device}"):
        reads.main(["--model", "nano", "--memory", str(make_run("{}={}")), "--device", device])


def test_lessons_that_are_misread_are_noticed(make_run, make_config, policy, tokenizer):
    """The same lessons, shown as strategies, are advice."""
    memory = Memory(make_run("{}={}") / "memory.db", words, None, mode="frozen")
    method = method_of(
        make_config(), policy, policy, memory, tokenizer, task=load_task("nano", dev=0.0)
    )
    method.sampler = types.SimpleNamespace(sleep=lambda: None, wake=lambda: None)
    pull = lesson_pull(method, 1, pmd.teacher_prompts)
    assert pull.problems == 12 and pull.mean < -1 and not pull.warning

    def as_advice(problems, contexts, *rest):
        told = []
        for context in contexts:
            advice = [("rule", text.replace("!", "=")) for _, text in context["lessons"]]
            told.append({"strategies": advice})
        return pmd.teacher_prompts(problems, told, *rest)

    pull = lesson_pull(method, 1, as_advice)
    assert pull.mean > 1 and "likelier in the teacher's eyes" in pull.warning
    method.memory_mode = None  # nothing is remembered
    assert lesson_pull(method, 1, pmd.teacher_prompts) is None
    memory.close()


def test_a_run_warns_once(make_config, monkeypatch, capsys):
    pulls = iter([None, Pull(0.5, 0.2, 9), Pull(0.6, 0.2, 9)])
    monkeypatch.setattr(pmd, "lesson_pull", lambda *method: next(pulls))
    cfg = make_config(eval_every=1, dev=0.0, name="warned")
    pmd.train(cfg)
    assert capsys.readouterr().out.count("WARNING: lessons make failed attempts likelier") == 1
    rows = records.read_rows(records.Path(cfg.out) / "warned" / "metrics.jsonl")
    pulls = [row.get("lesson_pull") for row in rows if row.get("split") == "test"]
    assert pulls == [None, 0.5, 0.6]


def test_a_pull_within_its_error_is_no_warning():
    assert not Pull(0.3, 0.2, 32).warning and not Pull(-3.0, 0.1, 32).warning
    assert "0.30 +- 0.10" in Pull(0.3, 0.1, 32).warning
