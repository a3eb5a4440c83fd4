"""All three tiers on multiple-choice questions, driven by a model that answers, reflects and
abstracts by rule.

`pytest tests/test_sciknoweval.py -s` prints the teacher's prompt. The questions are the published
ones where they are at hand, and else written by hand in the same form.
"""

import json
from pathlib import Path

import pytest
from conftest import Script, method_of, words

import memory as mem
import pmd
from tasks import load_task, sciknoweval
from tasks.problem import Problem
from tasks.sciknoweval import HUB_SYSTEM, SCIKNOWEVAL, SCIKNOWEVAL_HUB
from tasks.verdicts import verify

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "sciknoweval"
SYSTEM = (
    "\nPick the right option. Reply as\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
)
OPTIONS = "A: chloride\nB: nitrate\nC: sulfate\nD: carbonate\nPlease reason step by step."
BY_HAND = [
    Problem(
        str(i), f"Which salt of {metal} is {what} in water?\n\n{OPTIONS}", key, "choice", SYSTEM
    )
    for i, (metal, what, key) in enumerate(
        [
            ("silver", "insoluble", "A"),
            ("barium", "insoluble", "C"),
            ("calcium", "insoluble", "D"),
            ("lead", "best soluble", "B"),
        ]
    )
]
STRATEGY = (
    "Compare the lattice energy with the hydration energy. The smaller of the two decides what"
    " dissolves."
)
LESSON = "A large molar mass does not make a compound insoluble. Look at the ions instead."
NAME = "behavior_name_the_quantity"
SKILL = "Write down which quantity decides the question before computing anything."


CARD = """---
license: mit
task_categories:
- question-answering
language:
- en
configs:
- config_name: v2
  data_files:
  - split: test
    path: "data/v2/sciknoweval_test_v2.jsonl"
---
# SciKnowEval
"""


@pytest.fixture
def hub(tmp_path):
    """A folder in the Hub's layout: its card's front matter, its columns, four domains at three
    levels, every type.
    """
    rows = []
    for i in range(40):
        for domain in ("Biology", "Chemistry", "Material", "Physics"):
            for level, kind in (
                ("L2", "mcq-4-choices"),
                ("L3", f"mcq-{2 + 2 * (i % 2)}-choices"),
                ("L3", "true_or_false"),
                ("L4", "open-ended-qa"),
                ("L3", "filling"),
            ):
                labels = list("ABCD")[: int(kind[4])] if kind.startswith("mcq") else []
                rows.append(
                    {
                        "question": f"{domain} {level} {kind} {i}?",
                        "answer": "" if labels else "free text",
                        "choices": {
                            "text": [f"{label} of {i}" for label in labels],
                            "label": labels,
                        },
                        "answerKey": "AB"[i // 2 % 2] if labels else "",
                        "type": kind,
                        "domain": domain,
                        "details": {"level": level, "task": "t", "subtask": "s"},
                        "prompt": {"default": "Answer."},
                    }
                )
    folder = tmp_path / "SciKnowEval"
    (folder / "data/v2").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "data/v2/sciknoweval_test_v2.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    return folder


@pytest.mark.parametrize("domain", SCIKNOWEVAL)
def test_a_domain_from_a_folder_like_the_hubs(hub, monkeypatch, domain):
    """Through `datasets` itself, as the Hub's name without --data and as --data of a copy: no
    configuration is named.
    """
    assert SCIKNOWEVAL_HUB == "hicai-zju/SciKnowEval"
    hub = hub.rename(hub.parent / f"{domain}_hub")  # `datasets` caches by the folder's name
    monkeypatch.setattr(sciknoweval, "SCIKNOWEVAL_HUB", str(hub))
    monkeypatch.setitem(SCIKNOWEVAL, domain, (36, 4))
    task, copy = (
        load_task(f"sciknoweval/{domain}", dev=0),
        load_task(f"sciknoweval/{domain}", dev=0, data=str(hub)),
    )
    assert task == copy and sorted(int(p.id) for p in task.train + task.test) == list(range(40))
    for p in task.train + task.test:
        i = int(p.id)
        labels = "ABCD" if i % 2 else "AB"
        options = "\n".join(f"{label}: {label} of {i}" for label in labels)
        question = f"{domain.capitalize()} L3 mcq-{len(labels)}-choices {i}?"
        assert (
            p.prompt == f"{question}\n\n{options}\nPlease reason step by step."
            and p.answer == "AB"[i // 2 % 2]
        )
        assert verify(p, answer(p.answer)).reward == 1 and p.system == HUB_SYSTEM
    import datasets

    split = datasets.Dataset.from_dict({"idx": range(40)}).train_test_split(test_size=0.1, seed=42)
    assert [int(p.id) for p in task.test] == split["test"]["idx"]
    assert "NOT to the letter the items" in task.card


def test_the_hubs_domains_in_other_spellings(hub, monkeypatch):
    monkeypatch.setitem(SCIKNOWEVAL, "material", (36, 4))
    data = hub / "data/v2/sciknoweval_test_v2.jsonl"
    for name in ("Materials", "material"):
        data.write_text(data.read_text().replace('"domain": "Material"', f'"domain": "{name}"'))
        assert len(load_task("sciknoweval/material", dev=0, data=str(hub)).train) == 36


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "",
            "",
            "sciknoweval/physics has 36 train and 4 test items, but 720 and 80 were published",
        ),
        (
            '"domain": "Physics"',
            '"domain": "History"',
            "has 0 multiple-choice items of level L3 in physics: too few",
        ),
        ('"answerKey"', '"key"', "has no column answerKey"),
        (
            '"answerKey": "A"',
            '"answerKey": "E"',
            "item [0-9]+ of physics .*: the answer key 'E' is none of the options A, B",
        ),
        ('{"question": ', "no JSON ", "needs --data, .* which can't be loaded: "),
    ],
)
def test_a_hub_that_is_another_is_one_sentence(hub, old, new, message):
    data = hub / "data/v2/sciknoweval_test_v2.jsonl"
    data.write_text(data.read_text().replace(old, new) if old else data.read_text())
    with pytest.raises(ValueError, match=message) as caught:
        load_task("sciknoweval/physics", data=str(hub))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"details": None}, "has 0 multiple-choice items of level L3"),
        ({"details": "L3"}, "has 0 multiple-choice items"),
        ({"details": {"task": "t"}}, "has 0 multiple-choice items"),
        ({"question": None}, "item [0-9]+ of physics .*: it has to have a question"),
        ({"choices": None}, "item [0-9]+ of physics .*: .* as many texts as labels"),
        (
            {"choices": {"label": ["A", "B"], "text": ["one"]}},
            "item [0-9]+ of physics .*: .* as many texts as labels",
        ),
        (
            {"choices": {"label": ["A", "B"], "text": ["one", None]}},
            "item [0-9]+ of physics .*: .* as many texts as labels",
        ),
        (
            {"choices": [{"label": "A", "text": "one"}]},
            "item [0-9]+ of physics .*: .* as many texts as labels",
        ),
    ],
)
def test_a_hub_with_other_columns_is_one_sentence(hub, change, message):
    data = hub / "data/v2/sciknoweval_test_v2.jsonl"
    rows = [json.loads(line) | change for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message) as caught:
        load_task("sciknoweval/physics", data=str(hub))
    assert "\n" not in str(caught.value)


def test_a_hub_without_rows_says_what_it_can(hub):
    (hub / "data/v2/sciknoweval_test_v2.jsonl").write_text("")
    with pytest.raises(ValueError, match="can't be loaded: [A-Z]"):
        load_task("sciknoweval/physics", data=str(hub))


def test_without_a_network_the_hub_is_one_sentence():
    with pytest.raises(
        ValueError,
        match="sciknoweval/physics needs --data, .*hicai-zju/SciKnowEval, which can't be loaded",
    ):
        load_task("sciknoweval/physics")


def answer(letter):
    return (
        f"<reasoning>\nBecause of the ions, {letter}.\n</reasoning>\n<answer>\n{letter}\n</answer>"
    )


def scripted(prompt):
    """Replies to the six kinds of prompts as a good model would, wrapped as models wrap them."""
    if prompt.startswith(mem.QUESTION.abstract_role):
        if mem.QUESTION.known in prompt:
            return json.dumps(
                {"actions": [{"action": "update", "name": NAME, "instruction": SKILL}]}
            )
        return json.dumps(
            {"behaviors": [{"name": NAME, "instruction": "Name the quantity first."}]}
        )
    insight = {
        "strategies": (
            [{"title": "Lattice against hydration", "content": STRATEGY}]
            if mem.QUESTION.correct in prompt
            else []
        ),
        "lessons": (
            [{"title": "Mass misleads", "content": LESSON}] if mem.QUESTION.wrong in prompt else []
        ),
    }
    return f"Here is what I found:\n```json\n{json.dumps(insight, indent=1)}\n```\nI hope it helps."


@pytest.fixture
def problems():
    return (
        load_task("sciknoweval/chemistry", data=str(SHARED)).train[:6]
        if SHARED.is_dir()
        else BY_HAND
    )


def attempts(problems, step):
    """Of each problem three wrong answers and, on every second one, a right one."""
    rollouts = []
    for n, p in enumerate(problems):
        wrong = [letter for letter in "ABCD" if letter != p.answer]
        for g, letter in enumerate([*wrong, p.answer if n % 2 == 0 else wrong[0]]):
            verdict = verify(p, answer(letter))
            assert verdict.reward == float(letter == p.answer) and verdict.feedback == ""
            rollouts.append(
                pmd.Rollout(
                    [1], [2], None, answer(letter), True, f"{step}/{p.id}/{g}", p, verdict.reward
                )
            )
    return rollouts


def test_three_tiers_and_the_teachers_prompt(problems, tokenizer, make_config):
    memory = mem.Memory(":memory:", words, Script(scripted), forms="question", clusters=2)
    memory.add_problems(problems)
    for step in (1, 2, 3):
        rollouts = attempts(problems, step)
        memory.record(step, rollouts)
        memory.reflect(step, problems)
        memory.abstract(step)
    contrastive = [
        p for p in memory.generate.prompts if mem.QUESTION.correct in p and mem.QUESTION.wrong in p
    ]
    lessons = [p for p in memory.generate.prompts if mem.QUESTION.lessons_only in p]
    assert (
        contrastive and lessons and all("Rules for every item:" in p for p in contrastive + lessons)
    )
    assert "1 of 4 answers were correct" in contrastive[0] and "0 of 4" in lessons[0]
    assert memory.sizes()["behavior"] == 1 and memory.living("behavior")[0].text == SKILL
    assert "reflect_parse_failure" not in memory.counts()

    method_of(make_config(method="pmd"), memory=memory, tokenizer=tokenizer).condition(3, rollouts)
    first = problems[0]
    # of a wrong answer to a problem that was also answered rightly
    prompt = rollouts[0].teacher_prompt
    print("\n" + prompt)
    behavior = memory.as_of(2, "behavior")[0]
    assert prompt == "\n".join(
        [
            first.prompt,
            "Relevant strategies from correct solutions to this problem:",
            f"- Lattice against hydration: {STRATEGY}",
            "Lessons from past failed attempts on this problem:",
            f"- Mass misleads: {LESSON}",
            mem.BEHAVIORS,
            f"1. {NAME}: {behavior.text}",
            "Correct solution:",
            answer(first.answer),
            "Correctly solve the original question.",
        ]
    )
    unsolved = rollouts[4].teacher_prompt
    assert (
        "Correct solution:" not in unsolved
        and "Lessons from past" in unsolved
        and "strategies from" not in unsolved
    )
