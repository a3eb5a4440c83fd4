"""The whole loop on LiveCodeBench, driven by a model that writes programs and reflects by rule;
problems written by hand.

What the training half of the hidden tests says may be seen by the teacher and remembered; the other
half never.
"""

import json
from pathlib import Path

import pytest
import torch
from test_sandbox import reason

import memory as mem
import pmd
import tasks
from runtime import methods
from runtime.chat import encode_prompt
from runtime.sampler import Sample, Sampler
from tasks import load_task, sandbox

pytestmark = pytest.mark.skipif(bool(reason), reason=reason)

STRATEGY = "Read the whole input once and compute the answer with integers only."
LESSON = (
    "An answer that is right for small numbers may be wrong for large ones; check the far end of"
    " the range."
)
BEHAVIOR = "Test the smallest and the largest allowed input by hand before writing the program."


def row(number, name):
    """Doubling, with four hidden tests; of every input and output one can say where it was seen."""
    hidden = [
        {"input": str(n), "output": str(2 * n), "testtype": "functional" if name else "stdin"}
        for n in (number + i for i in (10007, 33011, 51019, 77041))
    ]
    return {
        "question_title": "Double",
        "question_content": f"Number {number}: double it.",
        "question_id": f"double-{number}",
        "contest_date": "2025-03-01T00:00:00",
        "public_test_cases": json.dumps([{"input": "1", "output": "2"}]),
        "starter_code": (
            "class Solution:\n    def double(self, n: int) -> int:\n        " if name else ""
        ),
        "private_test_cases": json.dumps(hidden),
        "metadata": json.dumps({"func_name": "double"} if name else {}),
    }


def program(name, known):
    """Right on the inputs it knows, wrong by one elsewhere; on all inputs if it knows none in
    particular.
    """
    body = f"2 * n + (n not in {sorted(known)})" if known is not None else "2 * n"
    return (
        f"```python\ndef double(n):\n    return {body}\n"
        + ("" if name else "print(double(int(input())))\n")
        + "```"
    )


class Scripted(Sampler):
    """Of each problem: a right program, one that is right on the training tests alone, a wrong one,
    a text without code.
    """

    def answer(self, problems, k, split="train", temperature=1.0, top_p=1.0, texts=None):
        seen = {p.id: {int(i) for i in p.extra["inputs"]} for p in Scripted.training}
        made = []
        for p in problems:
            name = p.extra["fn_name"]
            texts = [
                program(name, None),
                program(name, seen[p.id]),
                program(name, ()),
                "I would double it.",
            ]
            made.append(
                [
                    Sample(
                        encode_prompt(self.tokenizer, p.prompt),
                        [5, 6, self.tokenizer.eos_token_id],
                        torch.full((3,), -1.0),
                        text,
                        True,
                    )
                    for text in texts[:k]
                ]
            )
        Scripted.prompts += [p.prompt for p in problems]
        return made

    def ask(self, prompts):
        Scripted.asked += prompts
        return [
            (
                json.dumps(
                    {"behaviors": [{"name": "behavior_try_the_ends", "instruction": BEHAVIOR}]}
                )
                if p.startswith(mem.FORMS["code"].abstract_role)
                else json.dumps(
                    {
                        "strategies": [{"title": "Integers", "content": STRATEGY}],
                        "lessons": [{"title": "Large numbers", "content": LESSON}],
                    }
                )
            )
            for p in prompts
        ]


@pytest.fixture
def config(make_config, tmp_path):
    rows = [row(100 * n, n % 2) for n in range(1, 5)]
    (tmp_path / "lcb.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    # the texts are scripted, so their log-probabilities are none
    return make_config(
        "--task",
        "livecodebench",
        "--data",
        str(tmp_path / "lcb.jsonl"),
        dev=0.0,
        steps=1,
        batch_size=4,
        mini_batch_size=1,
        eval_problems=0,
        eval_k=2,
        max_prompt=800,
        max_reprompt=928,
        behavior_every=1,
        behaviors_refreshed=True,
        ground_insights=False,
        clusters=1,
        name="run",
        max_sampler_gap=100.0,
    )


def test_one_step_on_programs(config, monkeypatch):
    Scripted.training, Scripted.prompts, Scripted.asked = (
        load_task("livecodebench", dev=0, data=config.data).train,
        [],
        [],
    )
    monkeypatch.setattr(pmd, "make_sampler", Scripted)
    conditioned = []

    class Watched(pmd.PMD):
        def condition(self, step, rollouts):
            conditioned.extend(rollouts)
            return super().condition(step, rollouts)

    monkeypatch.setattr(methods, "method_class", lambda name: Watched)
    summary = pmd.train(config)

    wanted = {p.id: (set(p.extra["inputs"]), set(p.extra["outputs"])) for p in Scripted.training}
    test = load_task("livecodebench", data=config.data).test
    whole = {p.id: set(p.extra["inputs"]) | set(p.extra["outputs"]) for p in test}
    hidden = set().union(*(whole[i] - inputs - outputs for i, (inputs, outputs) in wanted.items()))
    assert len(hidden) == 16  # of four problems two tests each, two numbers each

    by_kind = {kind: conditioned[kind::4] for kind in range(4)}
    assert [[r.reward for r in by_kind[k]] for k in range(4)] == [
        [1] * 4,
        [1] * 4,
        [0] * 4,
        [0] * 4,
    ]
    assert [{r.test_pass_rate for r in by_kind[k]} for k in range(4)] == [{1}, {1}, {0}, {0}]
    assert all("Incorrect Format" in r.feedback for r in by_kind[3])
    for r in by_kind[2]:
        inputs, outputs = wanted[r.problem.id]
        assert "Wrong Answer" in r.feedback
        assert any(i in r.feedback for i in inputs) and any(o in r.feedback for o in outputs)
        # blocks in the printed order: insight, behavior, solution, feedback
        prompt = r.teacher_prompt
        assert prompt.startswith(r.problem.prompt) and prompt.endswith(
            "Correctly solve the original question."
        )
        places = [
            prompt.index(text)
            for text in (
                STRATEGY,
                LESSON,
                BEHAVIOR,
                mem.SOLUTION,
                program(r.problem.extra["fn_name"], None).strip("`")[:20],
                mem.FEEDBACK,
                "Wrong Answer",
            )
        ]
        assert places == sorted(places)

    said = (
        [r.teacher_prompt for r in conditioned] + [r.feedback for r in conditioned] + Scripted.asked
    )
    assert not [n for n in hidden if any(n in text for text in said)]
    reflections = [
        p for p in Scripted.asked if mem.FORMS["code"].correct in p and mem.FORMS["code"].wrong in p
    ]
    assert len(reflections) == 4 and all("Wrong Answer" in p for p in reflections)
    # the student sees no memory
    assert all(p in {q.prompt for q in Scripted.training} for p in Scripted.prompts)

    folder = Path(config.out) / "run"
    memory = mem.Memory(folder / "memory.db", None, None, mode="frozen")
    assert {i.text for i in memory.living("insight")} == {STRATEGY, LESSON} and summary["memory"][
        "behavior"
    ] == 1
    rows = [
        json.loads(line) for line in (folder / "evals" / "1-test.jsonl").read_text().splitlines()
    ]
    # of which one knew half by heart
    assert [(r["reward"], r["test_pass_rate"]) for r in rows] == [(1, 1), (0, 0.5)] * 4
    assert summary["data"] == "livecodebench (sdpo, 2025-02-01 to 2025-05-01, 4 of 131 problems)"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["test_pass_rate"] for r in steps if "split" not in r] == [0.5]


def test_without_a_sandbox_nothing_starts(config, monkeypatch, capsys):
    def missing():
        raise ValueError("generated code runs only in a sandbox, which needs bwrap")

    for room in (tasks, sandbox):
        monkeypatch.setattr(room, "sandbox_command", missing)
    monkeypatch.setattr(sandbox, "unsafe_exec", False)
    with pytest.raises(ValueError, match="needs bwrap"):
        pmd.check(config)
    pmd.check(pmd.replace(config, unsafe_exec=True))
    assert (
        "WITHOUT a sandbox" in capsys.readouterr().err and not (Path(config.out) / "run").exists()
    )
