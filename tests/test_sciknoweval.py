"""All three tiers on multiple-choice questions, driven by a model that answers, reflects and abstracts by rule.

`pytest tests/test_sciknoweval.py -s` prints the teacher's prompt. The questions are the published ones where they are
at hand, and else written by hand in the same form.
"""

import json
from pathlib import Path

import pytest
from conftest import Script, words

import memory as mem
import pmd
from eval import Problem, load_task, verify

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "sciknoweval"
SYSTEM = "\nPick the right option. Reply as\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
OPTIONS = "A: chloride\nB: nitrate\nC: sulfate\nD: carbonate\nPlease reason step by step."
BY_HAND = [Problem(str(i), f"Which salt of {metal} is {what} in water?\n\n{OPTIONS}", key, "choice", SYSTEM)
           for i, (metal, what, key) in enumerate([("silver", "insoluble", "A"), ("barium", "insoluble", "C"),
                                                   ("calcium", "insoluble", "D"), ("lead", "best soluble", "B")])]
STRATEGY = "Compare the lattice energy with the hydration energy. The smaller of the two decides what dissolves."
LESSON = "A large molar mass does not make a compound insoluble. Look at the ions instead."
NAME = "behavior_name_the_quantity"
SKILL = "Write down which quantity decides the question before computing anything."


def answer(letter):
    return f"<reasoning>\nBecause of the ions, {letter}.\n</reasoning>\n<answer>\n{letter}\n</answer>"


def scripted(prompt):
    """Replies to the six kinds of prompts as a good model would, wrapped as models wrap them."""
    if prompt.startswith(mem.QUESTION.abstract_role):
        if mem.QUESTION.known in prompt:
            return json.dumps({"actions": [{"action": "update", "name": NAME, "instruction": SKILL}]})
        return json.dumps({"behaviors": [{"name": NAME, "instruction": "Name the quantity first."}]})
    insight = {"strategies": [{"title": "Lattice against hydration", "content": STRATEGY}] if mem.QUESTION.correct in prompt
               else [], "lessons": [{"title": "Mass misleads", "content": LESSON}] if mem.QUESTION.wrong in prompt else []}
    return f"Here is what I found:\n```json\n{json.dumps(insight, indent=1)}\n```\nI hope it helps."


@pytest.fixture
def problems():
    return load_task("sciknoweval/chemistry", data=str(SHARED)).train[:6] if SHARED.is_dir() else BY_HAND


def attempts(problems, step):
    """Of each problem three wrong answers and, on every second one, a right one."""
    rollouts = []
    for n, p in enumerate(problems):
        wrong = [letter for letter in "ABCD" if letter != p.answer]
        for g, letter in enumerate([*wrong, p.answer if n % 2 == 0 else wrong[0]]):
            verdict = verify(p, answer(letter))
            assert verdict.reward == float(letter == p.answer) and verdict.feedback == ""
            rollouts.append(pmd.Rollout([1], [2], None, answer(letter), True, f"{step}/{p.id}/{g}", p, verdict.reward))
    return rollouts


def test_three_tiers_and_the_teachers_prompt(problems, tokenizer, make_config):
    memory = mem.Memory(":memory:", words, Script(scripted), forms="question", clusters=2)
    memory.add_problems(problems)
    for step in (1, 2, 3):
        rollouts = attempts(problems, step)
        memory.record(step, rollouts)
        memory.reflect(step, problems)
        memory.abstract(step)
    contrastive = [p for p in memory.generate.prompts if mem.QUESTION.correct in p and mem.QUESTION.wrong in p]
    lessons = [p for p in memory.generate.prompts if mem.QUESTION.lessons_only in p]
    assert contrastive and lessons and all("Rules for every item:" in p for p in contrastive + lessons)
    assert "1 of 4 answers were correct" in contrastive[0] and "0 of 4" in lessons[0]
    assert memory.sizes()["behavior"] == 1 and memory.living("behavior")[0].text == SKILL
    assert "reflect_parse_failure" not in memory.counts()

    pmd.condition(rollouts, memory, tokenizer, 3, make_config(method="pmd"))
    first = problems[0]
    prompt = rollouts[0].teacher_prompt  # of a wrong answer to a problem that was also answered rightly
    print("\n" + prompt)
    behavior = memory.as_of(2, "behavior")[0]
    assert prompt == "\n".join([
        first.prompt,
        "Relevant strategies from correct solutions to this problem:", f"- Lattice against hydration: {STRATEGY}",
        "Lessons from past failed attempts on this problem:", f"- Mass misleads: {LESSON}",
        mem.BEHAVIORS, f"1. {NAME}: {behavior.text}",
        "Correct solution:", answer(first.answer),
        "Correctly solve the original question."])
    unsolved = rollouts[4].teacher_prompt
    assert "Correct solution:" not in unsolved and "Lessons from past" in unsolved and "strategies from" not in unsolved
