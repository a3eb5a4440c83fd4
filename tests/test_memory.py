"""Each rule of the memory against something independent: brute force, snapshots, hand-made
cases.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Attempt, Question, Script, letters, words
from hypothesis import given, settings
from hypothesis import strategies as st

import memory as mem
from nano.grounded import GroundedMemory
from runtime.chat import neutralise
from runtime.formats import BEHAVIOR, ITEM, is_echo
from runtime.replies import MAX_CONTENT, MAX_ITEMS, parse, strip_thoughts, was_cut
from runtime.services import unit_rows
from runtime.store import Item, describe, nearest
from tools import show_memory

P, Q = Question("p", "Apply zo ki to 3 1 7 4"), Question("q", "Apply zo to 5 6 7 8")


def attempts(texts, rewards, problem=P, step=1):
    return [
        Attempt(f"{step}/{problem.id}/{i}", problem, t, r)
        for i, (t, r) in enumerate(zip(texts, rewards, strict=True))
    ]


def insight_reply(strategies=(), lessons=()):
    return json.dumps(
        {
            "strategies": [{"title": "rule", "content": s} for s in strategies],
            "lessons": [{"title": "trap", "content": s} for s in lessons],
        }
    )


# -- experience


def test_gate_refuses_near_duplicates_and_counts_them(make_memory):
    memory = make_memory(embed=letters, response_novelty=0.9)
    # equal shares of letters: cosine 1
    memory.record(1, attempts(["abc", "abcabc", "xyz"], [1, 1, 1]))
    assert [i.text for i in memory.living("experience", "p")] == ["abc", "xyz"]
    assert memory.counts() == {"experience_duplicate": 1, "success": 3}


def test_attempts_may_be_more_alike_than_insights(make_memory):
    """At a cosine of 0.9 both of two attempts stay, and one of two insights."""

    def embed(texts):
        return np.array([[0.9, 0.19**0.5] if "second" in t else [1, 0] for t in texts], np.float32)

    memory = make_memory(lambda prompt: insight_reply(["first rule.", "second rule."]), embed=embed)
    memory.record(1, attempts(["first", "second"], [1, 1]))
    memory.reflect(1, [P])
    assert len(memory.living("experience")) == 2 and len(memory.living("insight")) == 1


def test_successes_and_failures_have_their_own_caps_and_gate(make_memory):
    memory = make_memory(max_successes=5, max_failures=3)
    memory.record(
        1,
        attempts([f"win{i}" for i in range(9)] + [f"loss{i}" for i in range(9)], [1] * 9 + [0] * 9),
    )
    kinds = [i.kind for i in memory.living("experience", "p")]
    assert kinds.count("success") == 5 and kinds.count("failure") == 3
    memory = make_memory()
    memory.record(1, attempts(["same", "same"], [1, 0]))
    assert len(memory.living("experience", "p")) == 2


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=25, unique=True), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_eviction_equals_brute_force(seeds, cap):
    table = {f"t{s}": np.random.default_rng(s).normal(size=4).astype(np.float32) for s in seeds}
    table = {t: v / np.linalg.norm(v) for t, v in table.items()}

    def embed(texts):
        return np.stack([table.get(t, np.eye(4, dtype=np.float32)[0]) for t in texts])

    memory = mem.Memory(":memory:", embed, Script(), max_successes=cap, response_novelty=0.8)
    memory.record(1, attempts(list(table), [1] * len(table)))
    kept = []
    for t in table:
        cosines = [float(table[t] @ table[k]) for k in kept]
        if any(c > 0.8 for c in cosines):
            continue
        if len(kept) == cap:
            redundancy = [
                max([float(table[k] @ table[o]) for o in [*kept, t] if o != k]) for k in kept
            ]
            kept.pop(int(np.argmax(redundancy)))
        kept.append(t)
    assert [i.text for i in memory.living("experience", "p")] == kept


def test_other_problems_are_untouched(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["zo=rev"]))
    memory.record(1, attempts(["one"], [1]) + attempts(["two"], [1], Q))
    memory.reflect(1, [P, Q])
    before = [i.id for tier in ("experience", "insight") for i in memory.living(tier, "q")]
    memory.record(2, attempts(["three", "four"], [1, 0], step=2))
    memory.reflect(2, [P])
    assert (
        [i.id for tier in ("experience", "insight") for i in memory.living(tier, "q")]
        == before
        != []
    )


# -- insight


def test_the_three_prompt_forms_read_the_accumulated_experience(make_memory):
    memory = make_memory()
    memory.record(1, attempts(["early win"], [1]))
    memory.reflect(1, [P])
    memory.record(2, attempts(["late loss"], [0], step=2))
    memory.reflect(2, [P])
    memory.record(3, attempts(["a loss"], [0], Q, step=3))
    memory.reflect(3, [Q])
    first, second, third = memory.generate.prompts
    assert first.endswith(mem.NANO.strategies_only) and "early win" in first
    assert second.endswith(mem.NANO.contrastive) and "early win" in second and "late loss" in second
    assert third.endswith(mem.NANO.lessons_only) and "win" not in third


@pytest.mark.parametrize(
    "solved, label",
    [(0, "low"), (2, "low"), (3, "medium"), (5, "medium"), (6, "high"), (9, "high")],
)
def test_success_fraction_is_the_confidence_signal(solved, label):
    prompt = mem.reflection_prompt(mem.NANO, "x", ["w"], [], solved, 9)
    assert mem.NANO.confidence.format(label=label) in prompt.splitlines()


def test_insights_accumulate_behind_the_gate_and_are_capped(make_memory):
    replies = iter(
        [
            insight_reply(["alpha"]),
            insight_reply(["alpha", "beta"]),
            insight_reply([f"s{i}" for i in range(14)]),
        ]
    )
    memory = make_memory(lambda prompt: next(replies), max_insights=10, insight_novelty=0.9)
    for step in (1, 2, 3):
        memory.record(step, attempts([f"win {step} {'xyz'[step - 1] * 3}"], [1], step=step))
        memory.reflect(step, [P])
        if step < 3:
            assert [i.text for i in memory.living("insight", "p")] == ["alpha", "beta"][:step]
    assert len(memory.living("insight", "p")) == 10


def test_prompts_are_cut_until_the_model_can_read_them_and_that_is_counted(make_memory):
    memory = make_memory(
        lambda prompt: insight_reply(["alpha"]),
        fits=lambda prompt: len(prompt.split()) < 50,
        clusters=1,
    )
    memory.add_problems([P, Q])
    memory.record(
        1,
        attempts(["short win", "long " * 15, "longer " * 16], [1, 0, 0])
        + attempts(["huge " * 99], [0], Q),
    )
    memory.reflect(1, [P, Q])
    (first,) = memory.generate.prompts  # nothing of Q's only attempt can be read
    assert "short win" in first and "longer" in first and "long long" not in first
    memory.abstract(1)
    assert len(memory.generate.prompts) == 2 and "rule: alpha" in memory.generate.prompts[1]
    assert memory.counts()["reflection_cut"] == 2 and memory.counts()["abstraction_cut"] == 1


def test_a_behavior_comes_from_the_problems_that_its_prompt_showed(make_memory):
    def rule(prompt):
        if "strategies" in prompt:
            return insight_reply(["alpha"])
        return json.dumps({"behaviors": [{"name": "behavior_a", "instruction": "do alpha"}]})

    memory = make_memory(
        rule, fits=lambda prompt: not (P.prompt in prompt and Q.prompt in prompt), clusters=1
    )
    memory.add_problems([P, Q])
    for problem in (P, Q):
        memory.record(1, attempts(["a win"], [1], problem))
    memory.reflect(1, [P, Q])
    memory.abstract(1)
    prompt, (behavior,) = memory.generate.prompts[-1], memory.living("behavior")
    assert behavior.sources == [p.id for p in (P, Q) if p.prompt in prompt]
    assert len(behavior.sources) == 1


def test_a_kind_without_evidence_is_rejected(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["strategy out of a failure"], ["lesson"]))
    memory.record(1, attempts(["loss"], [0]))
    memory.reflect(1, [P])
    assert [i.kind for i in memory.living("insight")] == ["lesson"] and memory.counts()[
        "insight_rejected"
    ] == 1


def test_the_words_of_the_form_are_no_insight_and_no_behavior(make_memory):
    """SmolLM2-135M gives the form back as it is, or with a capital."""
    asked = mem.QUESTION.lessons_only, mem.QUESTION.cold_start
    lessons, behaviors = (json.loads(form[form.index("{") :]) for form in asked)
    lessons["lessons"][0]["content"] = lessons["lessons"][0]["content"].capitalize()
    behaviors["behaviors"][0]["name"] = "behavior_x"
    replies = iter((lessons, json.loads(insight_reply(["Balance the charges."])), behaviors))
    memory = make_memory(lambda prompt: json.dumps(next(replies)), clusters=1)
    memory.add_problems([P])
    memory.record(1, attempts(["loss"], [0]))
    memory.reflect(1, [P])
    assert memory.living("insight") == [] and memory.counts()["insight_rejected"] == 1
    memory.record(2, attempts(["win"], [1], step=2))
    memory.reflect(2, [P])
    memory.abstract(2)
    assert len(memory.living("insight")) == 1 and memory.living("behavior") == []
    assert memory.counts()["behavior_rejected"] == 1


GOOD = insight_reply(["zo=rev"])


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        GOOD + " I hope this helps {you} 100%!",
        "Sure: " + GOOD,
        GOOD[:-1],
        GOOD.replace('"}', '",}'),
    ],
)
def test_repairable_replies(reply):
    assert mem.parse_items(parse(reply), "strategies", "title", "content") == [("rule", "zo=rev")]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no json",
        "[1, 2]",
        "{",
        "{}",
        '{"strategies": "text"}',
        '{"strategies": [1, null, []]}',
        '{"strategies": [{"title": 3, "content": "x"}]}',
        '{"strategies": [{"title": "t"}]}',
        '{"strategies": [{"title": " ", "content": ""}], "lessons": {}}',
        "{" * 5000,
        '{"a":' * 5000,
    ],
)
def test_malformed_reflections_yield_nothing_and_are_counted(make_memory, reply):
    memory = make_memory(lambda prompt: reply)
    memory.record(1, attempts(["win"], [1]))
    memory.reflect(1, [P])
    assert memory.living("insight") == [] and memory.counts()["reflect_parse_failure"] == 1


RIGHT = {
    "strategies": [("Units", "Check the units first.")],
    "lessons": [("Signs", "Mind the sign of each term.")],
}
BOTH = json.dumps(
    {key: [{"title": title, "content": content}] for key, ((title, content),) in RIGHT.items()}
)
ONE, OTHER = (
    json.dumps({key: [{"title": title, "content": content}]})
    for key, ((title, content),) in RIGHT.items()
)
DRAFT = '{"strategies": [{"title": "Draft", "content": "Not so."}], "lessons": []}'
FENCED = "```python\nx = {1: [2], 'strategies': 3}\n```\n```json\n%s\n```\nDone {so far}."


def insights_of(reply):
    found = parse(reply)
    return {
        key: mem.parse_items(found, key, "title", "content") for key in ("strategies", "lessons")
    }


@pytest.mark.parametrize(
    "reply",
    [
        BOTH,
        r"As \frac{a}{b} and \{x\} show: " + BOTH,
        "The sets {1, 2}, {x: y} and [0, 1) matter. " + BOTH,
        FENCED % BOTH,
        '{"analysis": "the two {differ} in one sign", "steps": [1, 2]}\n' + BOTH,
        ONE + "\n" + OTHER,
        ONE + OTHER,
        f"<think>The sets {{1, 2}} and {{x: y}} matter.</think>\n{BOTH}",
        f"<think>{DRAFT} no</think>{BOTH}",
        f"Hm, {DRAFT}, or {{x: </think>{BOTH}",
        "<think>\nan open thought { [\n" + BOTH,
        '<think>{"strategies": [{"title": "Draft", "content": "cut</think>\n' + BOTH,
        f"<think>a</think>{ONE}<think>b {DRAFT}</think>{OTHER}",
        f"[{ONE}, {OTHER}]",
        f"[{BOTH}]",
        f'{{"output": {BOTH}}}',
        f'{{"result": [{{"x": {BOTH}}}]}}',
        BOTH.replace('"', "'"),
        BOTH.replace("}]", ",}, ]"),
        BOTH.replace('"strategies"', '"Strategies"')
        .replace('"title"', '"Title"')
        .replace('"lessons"', '"LESSONS"'),
        BOTH.replace('"title"', '"sure": True, "none": None, "title"'),
        BOTH.replace('"strategies"', "strategies"),
        BOTH.replace('"strategies": [', '"strategies": ').replace('first."}]', 'first."}'),
        "Strategies: [see below\n" + BOTH,
        '{"strategies": [...], "lessons": [...]}\n' + BOTH,
        BOTH[:-1],
        BOTH[:-2],
        BOTH[:-3],
        BOTH.replace("}]", "]", 1),
        BOTH.replace("}]", "}", 1),
        BOTH.replace('"title"', '\n  // a comment\n  "title"'),
        str(json.loads(BOTH)),
        *(
            f"{begins}{DRAFT}{ends}\n{BOTH}"
            for begins, ends in (
                ("<thinking>", "</thinking>"),
                ("<thought>", "</thought>"),
                ("<reasoning>", "</reasoning>"),
                ("<THINK >", "</THINK >"),
                ("<seed:think>", "</seed:think>"),
                ("[THINK]", "[/THINK]"),
                ("◁think▷", "◁/think▷"),
                ("<scratchpad>", "</scratchpad>"),
                ("<|begin_of_thought|>", "<|end_of_thought|>"),
                ("<|START_THINKING|>", "<|END_THINKING|>"),
                ("", "[/THINK]"),
            )
        ),
        '[THINK]{"strategies": [{"title": "Draft", "content": "cut[/THINK]' + BOTH,
        BOTH.replace('": [', '" = ['),
        json.dumps(BOTH),
        json.dumps({"answer": json.dumps(json.loads(BOTH), indent=1)}),
        BOTH.replace('"', '\\"'),
    ],
)
def test_the_json_is_found_wherever_it_stands(reply):
    assert insights_of(reply) == RIGHT


def test_a_tag_within_an_item_is_no_thought():
    pieces = ["</think>", "[THINK]", "a </think> b <think> c", "<reasoning> x </reasoning>"]
    for title, content, lesson in itertools.product(pieces, repeat=3):
        reply = json.dumps(
            {
                "strategies": [{"title": title, "content": content}],
                "lessons": [{"title": "t", "content": lesson}],
            }
        )
        assert insights_of(reply) == {"strategies": [(title, content)], "lessons": [("t", lesson)]}


def test_a_schema_that_is_echoed_before_the_answer_is_rejected_alone(make_memory):
    echo = mem.QUESTION.contrastive[mem.QUESTION.contrastive.index("{") :]
    memory = make_memory(lambda prompt: f"I reply with {echo}\n{BOTH}")
    memory.record(1, attempts(["win", "loss"], [1, 0]))
    memory.reflect(1, [P])
    assert {(i.title, i.text) for i in memory.living("insight")} == {
        *RIGHT["strategies"],
        *RIGHT["lessons"],
    }
    assert memory.counts()["insight_rejected"] == 2


def test_a_placeholder_is_an_echo_also_with_other_numbers():
    """SmolLM2-135M under --memory_format guided wrote the last of these."""
    asked = re.findall(r'"(?:title|content|instruction)": "([^"]+)"', ITEM + BEHAVIOR)
    assert len(asked) == 3
    for text in (*asked, "Two to four sentences.", "at most 1: one to 2 sentences", "One sentence"):
        assert is_echo(text), text
    for text in ("Add the two numbers.", "two plus two", "vo=rev", "17", ""):
        assert not is_echo(text), text


def test_an_escaped_reply_keeps_its_texts():
    """JSON in a string of JSON: quotes, line breaks and LaTeX come out as in the JSON itself."""
    content = 'Say "x".\n- and \\frac{a}{b}, \\nu\tthen'
    reply = json.dumps({"strategies": [{"title": "T", "content": content}]})
    (row,) = parse(json.dumps(reply))["strategies"]
    assert row == {"title": "T", "content": content}


def test_quotes_in_a_text_need_no_backslash():
    content = 'Use the "golden" rule, and [that] is "it".'
    reply = json.dumps(
        {"strategies": [{"title": "T", "content": "HERE"}, {"title": "U", "content": "D."}]}
    )
    assert insights_of(reply.replace("HERE", content))["strategies"] == [
        ("T", content),
        ("U", "D."),
    ]


@pytest.mark.parametrize(
    "reply",
    [
        "{" * 20_000,
        '{"a":' * 5000,
        "[" * 20_000,
        '{"a":["' * 3000,
        "<think>" * 3000,
        '"strategies":[' * 1500,
        '"strategies":[{' * 1400,
        '"strategies":[' + '{"a":["' * 2500,
        '"strategies":[{"title":"' + 'a"' * 9000,
        '"strategies":[{"a":' + '"a", ' * 4000 + "}]",
        '"strategies": [{' + '\\"' * 9000 + "}]",
        '"strategies"' + " " * 20_000,
        ('"strategies": [{' + " " * 60 + '"' + " " * 60) * 150,
    ],
)
def test_hostile_replies_take_no_time(reply):
    start = time.process_time()
    assert insights_of(reply) == {"strategies": [], "lessons": []}
    assert time.process_time() - start < 1


def test_thoughts_are_stripped_in_linear_time():
    start = time.process_time()
    for text in ("<think>" * 40_000, "a</think>" + "<think>" * 40_000, "<think></think>" * 40_000):
        strip_thoughts(text)
    assert time.process_time() - start < 1
    assert strip_thoughts("b <think>a</think> c <think> d") == "b  c <think> d"
    assert strip_thoughts("<think>a<think>b</think>c</think> d") == "d"


@pytest.mark.parametrize(
    "begin, end",
    [
        ("<think>", "</think>"),
        ("<Think>", "</Think>"),
        ("<thinking>", "</thinking>"),
        ("<thought>", "</thought>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
    ],
)
def test_thoughts_of_every_form_are_stripped(begin, end):
    assert strip_thoughts(f"{begin}wrong road{end}Answer B") == "Answer B"
    assert strip_thoughts(f"wrong road{end} Answer B") == "Answer B"  # the prompt began it
    assert strip_thoughts(f"a {begin}b{end} c {begin}d{end} e") == "a  c  e"
    assert strip_thoughts(f"Answer {begin}B") == f"Answer {begin}B"
    start = time.process_time()
    for text in (begin * 40_000, "a" + end + begin * 40_000, (begin + end) * 40_000, end * 40_000):
        strip_thoughts(text)
    assert time.process_time() - start < 2


def test_what_a_task_asks_for_is_no_thought():
    """SciKnowEval wants its reasons in tags: a solution without them would teach a letter alone."""
    solution = "<reasoning>\nIons.\n</reasoning>\n<answer>\nB\n</answer>"
    assert strip_thoughts(f"<think>hm</think>\n{solution}") == solution
    assert solution in mem.compose("Why?", solution=solution)


# A formula as a model writes it into JSON, with too few backslashes
FORMULAS = [
    r"\nu = c/\lambda",
    r"\theta",
    r"2\times 3",
    r"\frac{1}{2}",
    r"\rho",
    r"\beta",
    r"\bar{x}",
    r"\boxed{B}",
    r"\forall",
    r"\rightarrow",
    r"\right)",
    r"\tau",
    r"\tan x",
    r"x \to 0",
    r"\text{mol}",
    r"\nabla",
    r"a \neq b",
    r"\not=",
    r"\notin",
    r"\upsilon",
    r"\uparrow",
    r"\underline{x}",
    r"\unit",
    r"\alpha",
    r"\Delta\tau",
    r"\(x\)",
    r"\{a, b\}",
    r"5\,\%",
    r"x\_1",
    r"\begin{array}",
    r"\bmod",
    r"\rangle",
    r"\triangle",
    r"\tfrac12",
    r"\ne 0",
    r"\therefore",
    r"\norm{x}",
    r"\nicefrac{1}{2}",
    r"\num{5}",
    r"\textcolor{red}{x}",
    r"\textdegree",
    r"\textmu",
    r"\nleqq",
    r"\ngeqq",
    r"\nsubset",
    r"\ntriangleleft",
    r"\negthinspace",
    r"\tensor{T}",
    r"\tiny",
    r"\noindent",
]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("end", ['"}]}', '",}]'])
def test_latex_keeps_its_letters_in_good_json_and_in_broken(formula, end):
    # as written, and escaped as JSON wants it
    for said in (formula, formula.replace("\\", "\\\\")):
        reply = '{"strategies": [{"title": "F", "content": "Use ' + said + " here." + end
        assert insights_of(reply)["strategies"] == [("F", f"Use {formula} here.")]


@pytest.mark.parametrize(
    "said, meant",
    [
        (r"First.\nNext sentence", "First.\nNext sentence"),
        (r"a\tb", "a\tb"),
        (r"a\tword\tnumber", "a\tword\tnumber"),
        (r"one\nnot two", "one\nnot two"),
        (r"one\n\nu", "one\n\\nu"),
        (r"x\r\ny", "x\r\ny"),
        (r"\"quoted\"", '"quoted"'),
        (r"1\/2", "1/2"),
        (r"\\frac", r"\frac"),
        (r"\\\\", r"\\"),
        (r"caf\u00e9s \ud83d\ude00", "cafés 😀"),
        (r"- a\n- b", "- a\n- b"),
        (r"x\b y\f", "x\b y\f"),
        (r"a\n1", "a\n1"),
    ],
)
def test_what_json_says_stays(said, meant):
    (row,) = parse('{"strategies": [{"title": "T", "content": "' + said + '"}]}')["strategies"]
    assert row["content"] == meant


CUT_ME = json.dumps(
    {
        "strategies": [
            {
                "title": 'The "rule"',
                "content": "Balance, then count: {a} and [b].\nTwo\\three. Caf\u00e9.",
            },
            {"title": "Units", "content": "Check }] the units. All of them, \\frac{a}{b} too."},
        ],
        "lessons": [{"title": "Signs", "content": "Mind 'the' sign \" of, each term."}],
    }
)


@pytest.mark.parametrize(
    "reply",
    [
        CUT_ME,
        json.dumps(json.loads(CUT_ME), indent=1),
        str(json.loads(CUT_ME)),
        CUT_ME.replace("}, {", ",}, {"),
        "<think>{</think> {x}: " + CUT_ME,
        CUT_ME[:-1] + "} So much for {this}.",
    ],
)
def test_no_half_item_is_stored_wherever_the_reply_ends(reply):
    whole = insights_of(reply)
    assert [len(items) for items in whole.values()] == [2, 1] and not was_cut(reply)
    first, last = reply.index("content"), reply.index(" term.") + 6  # of what the lists hold
    between = range(reply.index("too.") + 4, reply.index("Signs"))  # one list ends, the next begins
    seen = 0
    for end in range(len(reply)):
        found = insights_of(reply[:end])
        assert all(found[key] == whole[key][: len(found[key])] for key in found)
        kept = len(found["strategies"]) + len(found["lessons"])
        assert kept >= seen  # what is whole stays
        seen = kept
        if first <= end <= last and end not in between:
            assert was_cut(reply[:end])
    assert seen == 3


QUOTING = (
    '{"strategies": [{"title": "T", "content": "Avoid the so called "golden" rule, and ("it"),'
    ' too."}'
)


def test_a_quotation_that_the_limit_cut_is_no_end_of_a_text():
    """Quotes in a text need no backslash, so that a reply may end at one that only opens or closes
    a quotation.
    """
    whole = ("T", 'Avoid the so called "golden" rule, and ("it"), too.')
    for end in range(len(QUOTING) + 1):
        for closing in ("", ","):
            assert insights_of(QUOTING[:end] + closing)["strategies"] in ([], [whole])
    assert insights_of(QUOTING)["strategies"] == [whole]


def test_a_reply_that_its_limit_cut_is_counted_and_its_whole_items_stay(make_memory):
    reply = insight_reply(["One rule.", "Another rule that is"])
    bank = behaviors(("behavior_a", "Do this."), ("behavior_b", "Never do"))
    memory = make_memory(
        lambda prompt: (
            reply[: reply.index(" is") + 3]
            if "Write strategies" in prompt
            else bank[: bank.index("Never do") + 8]
        ),
        clusters=1,
    )
    memory.add_problems([P])
    memory.record(1, attempts(["win"], [1]))
    memory.reflect(1, [P])
    memory.abstract(1)
    assert [i.text for i in memory.living("insight")] == ["One rule."]
    assert [i.text for i in memory.living("behavior")] == ["Do this."]
    counts = memory.counts()
    assert (
        counts["reflection_truncated"] == counts["abstraction_truncated"] == 1
        and "reflect_parse_failure" not in counts
    )
    whole = make_memory(lambda prompt: insight_reply(["One rule."]))
    whole.record(1, attempts(["win"], [1]))
    whole.reflect(1, [P])
    assert "reflection_truncated" not in whole.counts()
    lines = make_memory(
        lambda prompt: "Strategy: a - One rule.\nStrategy: b - Another that",
        forms="question",
        format="lines",
    )
    lines.record(1, attempts(["win"], [1]))
    lines.reflect(1, [P])
    assert lines.counts()["reflection_truncated"] == 1 == len(lines.living("insight"))


@pytest.mark.parametrize(
    "found, texts, rejected",
    [
        (
            {"strategies": {"title": "t", "content": "alpha"}},
            ["alpha"],
            0,
        ),  # one object where a list is wanted
        (
            {
                "strategies": {"title": "t", "content": "alpha"},
                "lessons": {"title": "t", "content": "beta"},
            },
            ["alpha", "beta"],
            0,
        ),
        (
            {"strategies": ["alpha", "beta"], "lessons": [{"title": "t", "content": "gamma"}]},
            ["gamma"],
            2,
        ),
        ({"strategies": "alpha", "lessons": [{"title": "t", "content": "gamma"}]}, ["gamma"], 1),
        (
            {
                "strategies": [{"title": "t"}, {"title": "t", "content": "alpha"}, None],
                "lessons": {},
            },
            ["alpha"],
            2,
        ),
        ({"strategies": {"1": {"title": "t", "content": "alpha"}}}, [], 1),
        (
            {"strategies": [{"title": "t", "content": f"{'x' * n}"} for n in range(1, 21)]},
            ["x" * n for n in range(1, 11)],
            4,
        ),
    ],
)
def test_a_reflection_in_another_shape_is_taken_or_counted(make_memory, found, texts, rejected):
    memory = make_memory(lambda prompt: json.dumps(found), max_insights=10)
    memory.record(1, attempts(["win", "loss"], [1, 0]))
    memory.reflect(1, [P])
    living = [i.text for i in memory.living("insight")]
    assert living == texts if len(texts) < 10 else len(living) == 10
    assert memory.counts().get("insight_rejected", 0) == rejected
    assert memory.counts().get("reflect_parse_failure", 0) == (not texts)


def test_an_item_is_one_line_of_ten_words_and_four_sentences():
    title = "one two three four five six seven eight nine ten eleven"
    content = "A b.\nC d! E f? Use 0.5 g, e.g. of x. G h. I j."
    found = {"lessons": [{"title": title, "content": content}]}
    assert mem.parse_items(found, "lessons", "title", "content") == [
        ("one two three four five six seven eight nine ten", "A b. C d! E f? Use 0.5 g, e.g. of x.")
    ]


@pytest.mark.parametrize(
    "content, kept",
    [
        (
            "A b. C d. E f. Check units, e.g. Newton or Pa. G h.",
            "A b. C d. E f. Check units, e.g. Newton or Pa.",
        ),
        ("Use it, i.e. Ohm's law. C d.", "Use it, i.e. Ohm's law. C d."),
        (
            "One. " + "Two " * 400 + "end. " + "Three " * 400 + "end.",
            "One. " + "Two " * 400 + "end.",
        ),
    ],
)
def test_a_content_is_cut_between_sentences(content, kept):
    assert mem.parse_items(
        {"lessons": [{"title": "t", "content": content}]}, "lessons", "title", "content"
    ) == [("t", kept)]


def test_an_insight_cannot_pass_for_a_heading(make_memory):
    memory = make_memory(lambda prompt: insight_reply([f"first\n{mem.SOLUTION}\nsecond"]))
    rollouts = attempts(["win"], [1])
    memory.record(1, rollouts)
    memory.reflect(1, [P])
    lines = mem.compose("PROBLEM", **memory.contexts(rollouts, 1)[0]).splitlines()
    assert mem.SOLUTION not in lines and len(lines) == 4


@pytest.mark.parametrize("forms", [mem.QUESTION, mem.CODE])
def test_the_forms_in_words(forms):
    wins, losses = ["WON"], [("LOST", "SAID")]
    for successes, failures, form, keys in (
        (wins, losses, forms.contrastive, {"strategies", "lessons"}),
        (wins, [], forms.strategies_only, {"strategies"}),
        ([], losses, forms.lessons_only, {"lessons"}),
    ):
        prompt = mem.reflection_prompt(forms, "PROBLEM", successes, failures, 3, 8)
        marks = [
            forms.role,
            "3 of 8",
            "PROBLEM",
            *successes,
            *(text for pair in failures for text in pair),
            form,
        ]
        assert [prompt.index(m) for m in marks] == sorted(prompt.index(m) for m in marks)
        # the reply it asks for is what the parser takes
        shown = json.loads(form[form.index("{") :])
        assert {k for k, v in shown.items() if v} == keys and set(shown) == {
            "strategies",
            "lessons",
        }
        for key in keys:
            assert mem.parse_items(shown, key, "title", "content") == [
                ("at most ten words", "two to four sentences")
            ]
        for forbidden in (
            "attempts",
            "this particular",
            "tests" if forms is mem.CODE else "options",
        ):
            assert forbidden in form
    assert (
        "three to eight" in forms.cold_start
        and json.loads(forms.cold_start[forms.cold_start.index("{") :])["behaviors"]
    )
    assert (
        json.loads(forms.decide[forms.decide.index("{") :])["actions"][0]["action"]
        == "new, update or remove"
    )


def test_huge_replies_are_bounded():
    many = parse(json.dumps({"strategies": [{"title": "t " * 50, "content": "c" * 5000}] * 10_000}))
    items = mem.parse_items(many, "strategies", "title", "content")
    assert 0 < len(items) <= MAX_ITEMS
    assert all(len(t.split()) <= 10 and len(c) <= MAX_CONTENT for t, c in items)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(
            st.sampled_from(["strategies", "lessons", "title", "content", "x"]), x, max_size=4
        )
    ),
    max_leaves=12,
)


@given(
    st.one_of(
        st.text(max_size=80),
        json_like.map(json.dumps),
        st.text(alphabet='{}[]",:\\ntrue1%<|>', max_size=60),
    )
)
@settings(max_examples=80, deadline=None)
def test_no_reply_raises_or_leaks(reply):
    memory = mem.Memory(":memory:", letters, Script(lambda prompt: reply))
    memory.record(1, attempts(["win", "loss"], [1, 0]))
    memory.reflect(1, [P])
    for item in memory.living("insight"):
        assert item.problem == "p" and item.title.strip() and item.text.strip()
    memory.add_problems([P])
    memory.abstract(1)


def test_text_that_sqlite_refuses_is_cleaned(make_memory):
    memory = make_memory()
    memory.record(1, [Attempt("1/p/0", P, "nul \0 and \ud800 alone {0} %s", 0, "\udfff")])
    assert memory.living("experience", "p")[0].text == "nul  and � alone {0} %s"


# -- behavior


def behaviors(*pairs):
    return json.dumps({"behaviors": [{"name": n, "instruction": i} for n, i in pairs]})


def actions(*rows):
    return json.dumps(
        {"actions": [dict(zip(("action", "name", "instruction"), r, strict=False)) for r in rows]}
    )


def test_cold_start_then_decisions(make_memory):
    replies = iter(
        [
            behaviors(("behavior_a", "alpha"), ("behavior_b", "beta"), ("no_prefix", "gamma")),
            actions(
                ("update", "behavior_a", "delta"),
                ("remove", "behavior_b"),
                ("new", "behavior_c", "epsilon"),
                ("explode", "behavior_d", "zeta"),
                ("remove", "behavior_unknown"),
            ),
        ]
    )
    memory = make_memory(lambda prompt: next(replies), clusters=1)
    memory.add_problems([P, Q])
    memory.record(1, attempts(["win"], [1]))
    memory.abstract(1)
    assert {b.title: b.text for b in memory.living("behavior")} == {
        "behavior_a": "alpha",
        "behavior_b": "beta",
    }
    assert "behavior_" not in memory.generate.prompts[0] and memory.generate.prompts[0].endswith(
        mem.NANO.cold_start
    )
    memory.abstract(2)
    assert {b.title: b.text for b in memory.living("behavior")} == {
        "behavior_a": "delta",
        "behavior_c": "epsilon",
    }
    assert "behavior_a: alpha" in memory.generate.prompts[1] and memory.generate.prompts[
        1
    ].endswith(mem.NANO.decide)
    assert {b.title: b.text for b in memory.as_of(1, "behavior")} == {
        "behavior_a": "alpha",
        "behavior_b": "beta",
    }


def bank_of(memory):
    return {b.title: b.text for b in memory.living("behavior")}


@pytest.fixture
def make_bank(make_memory):
    """A memory whose bank has been filled, and whose next refresh replies as it is told."""

    def make(pairs, *replies, problems=1, **knobs):
        replies = iter(
            [behaviors(*pairs), *(r if isinstance(r, str) else json.dumps(r) for r in replies)]
        )
        memory = make_memory(lambda prompt: next(replies), letters, clusters=problems, **knobs)
        questions = [Question(f"p{i}", "abc"[i] * 9) for i in range(problems)]
        memory.add_problems(questions[:problems])
        memory.record(1, [Attempt(f"1/{q.id}/0", q, "win", 1.0) for q in questions[:1]])
        memory.abstract(1)
        assert bank_of(memory) == dict(pairs)
        for q in questions[1:problems]:
            memory.record(2, [Attempt(f"2/{q.id}/0", q, "win", 1.0)])
        return memory

    return make


ABC = (("behavior_a", "aaa"), ("behavior_b", "bbb"), ("behavior_c", "ccc"))


@pytest.mark.parametrize(
    "rows, left, counted",
    [
        # an update that the gate refuses leaves the old one, whether near another's text or equal
        # to it
        ([("update", "behavior_a", "bbbb")], dict(ABC), {"duplicate": 1}),
        ([("update", "behavior_a", "bbb")], dict(ABC), {"duplicate": 1}),
        ([("update", "behavior_a", "aaa")], dict(ABC), {"duplicate": 1}),  # nothing to do
        (
            [("update", "behavior_a", "aaaa")],
            dict(ABC) | {"behavior_a": "aaaa"},
            {"updated": 1},
        ),  # near its own old text only
        ([("new", "behavior_a", "bbbb")], dict(ABC), {"duplicate": 1}),  # the name is the key
        ([("update", "behavior_a", "x")], dict(ABC) | {"behavior_a": "x"}, {"updated": 1}),
        # two of one name: the last that the gate takes
        (
            [("update", "behavior_a", "x"), ("update", "behavior_a", "y")],
            dict(ABC) | {"behavior_a": "y"},
            {"updated": 2},
        ),
        (
            [("update", "behavior_a", "x"), ("update", "behavior_a", "bbb")],
            dict(ABC) | {"behavior_a": "x"},
            {"updated": 1, "duplicate": 1},
        ),
        (
            [("update", "behavior_a", "bbb"), ("update", "behavior_a", "x")],
            dict(ABC) | {"behavior_a": "x"},
            {"updated": 1, "duplicate": 1},
        ),
        (
            [("update", "behavior_a", "x"), ("update", "behavior_b", "x")],
            dict(ABC) | {"behavior_a": "x"},
            {"updated": 1, "duplicate": 1},
        ),
        (
            [("update", "behavior_a", "bbb"), ("update", "behavior_b", "aaa")],
            dict(ABC),
            {"duplicate": 2},
        ),  # exchanged
        # removals come first: what is to take the place of others is not refused for being like
        # them
        (
            [("remove", "behavior_b"), ("update", "behavior_a", "bbbb")],
            {"behavior_a": "bbbb", "behavior_c": "ccc"},
            {"updated": 1},
        ),
        (
            [("new", "behavior_d", "aaaa"), ("remove", "behavior_a")],
            dict(ABC[1:]) | {"behavior_d": "aaaa"},
            {},
        ),
        (
            [("update", "behavior_a", "x"), ("remove", "behavior_a")],
            dict(ABC[1:]) | {"behavior_a": "x"},
            {},
        ),
        (
            [("remove", "behavior_a"), ("update", "behavior_a", "x")],
            dict(ABC[1:]) | {"behavior_a": "x"},
            {},
        ),
        ([("remove", "behavior_a"), ("remove", "behavior_a")], dict(ABC[1:]), {}),
        ([("remove", "behavior_z")], dict(ABC), {"rejected": 1}),
        ([("update", "behavior_z", "x")], dict(ABC) | {"behavior_z": "x"}, {}),
    ],
)  # of an unknown name: a new one
def test_nothing_is_lost_by_an_update(make_bank, rows, left, counted):
    memory = make_bank(ABC, actions(*rows))
    memory.abstract(2)
    assert bank_of(memory) == left and memory.sizes()["behavior"] == len(left)
    kinds = {kind: f"behavior_{kind}" for kind in ("duplicate", "updated", "rejected", "evicted")}
    assert {
        k: memory.counts(2)[kind] for k, kind in kinds.items() if kind in memory.counts(2)
    } == counted
    assert {b.title: b.text for b in memory.as_of(1, "behavior")} == dict(ABC)


def test_an_update_of_a_full_bank_evicts_nobody(make_bank):
    memory = make_bank(
        ABC,
        actions(("update", "behavior_a", "x")),
        actions(("update", "behavior_b", "ccc")),
        actions(("new", "behavior_d", "y")),
        max_behaviors=3,
    )
    memory.abstract(2)
    assert bank_of(memory) == dict(ABC) | {
        "behavior_a": "x"
    } and "behavior_evicted" not in memory.counts(2)
    memory.abstract(3)
    assert (
        bank_of(memory) == dict(ABC) | {"behavior_a": "x"}
        and memory.counts(3)["behavior_duplicate"] == 1
    )
    memory.abstract(4)
    assert (
        len(bank_of(memory)) == 3
        and "behavior_d" in bank_of(memory)
        and memory.counts(4)["behavior_evicted"] == 1
    )


def test_two_clusters_that_decide_about_one_name(make_bank):
    memory = make_bank(
        ABC,
        actions(("update", "behavior_a", "x")),
        actions(("update", "behavior_a", "bbb"), ("remove", "behavior_b")),
        problems=2,
    )
    memory.abstract(2)
    assert (
        bank_of(memory) == {"behavior_a": "bbb", "behavior_c": "ccc"}
        and memory.counts(2)["abstraction"] == 2
    )


def decision(action, name="behavior_x", instruction="xxx"):
    return {"action": action, "name": name, "instruction": instruction}


WRITTEN, REMOVED = dict(ABC) | {"behavior_x": "xxx"}, dict(ABC[1:])


@pytest.mark.parametrize(
    "reply, left",
    [
        *(
            ({"actions": [decision(word)]}, WRITTEN)
            for word in (
                "new",
                "New",
                "NEW",
                " new ",
                "new.",
                "add",
                "Add",
                "create",
                "insert",
                "update",
                "Update",
                "modify",
                "Modify",
                "rewrite",
                "revise",
                "edit",
                "change",
                "refine",
                "replace",
                "created",
                "Revised",
                "edited",
                "'new'",
                "add_behavior",
                "create new",
                "ADD_NEW",
                "Update existing",
                "merge",
                "upsert",
                "updates",
            )
        ),
        *(
            ({"actions": [decision(word, "behavior_a")]}, REMOVED)
            for word in (
                "remove",
                "Remove",
                "REMOVE",
                " remove\n",
                "removed",
                "delete",
                "Delete",
                "drop",
                "discard",
                "retire",
                "dropped",
                "retired",
                "remove_behavior",
                "deletes",
                "prune",
                "eliminate",
            )
        ),
        *(
            (
                {
                    "actions": [
                        {word: "remove", "name": "behavior_a", "instruction": "It is wrong."}
                    ]
                },
                REMOVED,
            )
            for word in ("decision", "operation", "op", "Type")
        ),
        ({"actions": [{"type": "behavior", "name": "behavior_x", "instruction": "xxx"}]}, WRITTEN),
        ({"actions": [{"action": "Delete", "name": " behavior_a "}]}, REMOVED),
        (
            {"behaviors": [{"name": "behavior_x", "instruction": "xxx"}]},
            WRITTEN,
        ),  # under the other prompt's key
        ({"behaviors": [decision("remove", "behavior_a")]}, REMOVED),
        ({"actions": [{"name": "behavior_x", "instruction": "xxx"}]}, WRITTEN),
        ({"actions": decision("new")}, WRITTEN),
        ({"behaviors": decision("add")}, WRITTEN),
        (
            {"actions": [decision("remove", "behavior_a")], "behaviors": [decision("new")]},
            REMOVED | {"behavior_x": "xxx"},
        ),
    ],
)
def test_a_decision_in_other_words_is_taken(make_bank, reply, left):
    memory = make_bank(ABC, reply)
    memory.abstract(2)
    assert bank_of(memory) == left and not memory.counts(2).keys() & {
        "behavior_rejected",
        "abstract_parse_failure",
    }


def test_an_empty_bank_takes_decisions_too(make_memory):
    memory = make_memory(
        lambda prompt: actions(("Add", "behavior_a", "alpha"), ("remove", "behavior_z")), clusters=1
    )
    memory.add_problems([P])
    memory.record(1, attempts(["win"], [1]))
    memory.abstract(1)
    assert bank_of(memory) == {"behavior_a": "alpha"} and memory.counts(1)["behavior_rejected"] == 1


NO_ACTIONS = (
    "do not remove",
    "no update",
    "keep; do not change",
    "update or remove",
    "explode",
    "",
    "new, update or remove",
    7,
    None,
    ["new"],
    {"new": 1},
    "keep",
)
NO_ROWS = (
    "add behavior_x: xxx",
    3,
    None,
    [],
    {},
    {"action": "remove"},
    {"action": "remove", "name": ["behavior_a"]},
    {"action": "new"},
    {"action": "new", "name": "behavior_x"},
    decision("new", "no_prefix"),
)


@pytest.mark.parametrize(
    "reply, rejected",
    [
        *(({"actions": [decision(action)]}, 1) for action in NO_ACTIONS),
        *(({"actions": [row]}, 1) for row in NO_ROWS),
        ({"actions": "none"}, 1),
        ({"actions": {"new": [decision("new")]}}, 1),
        ({"actions": [decision("new", "n")] * 20}, 20),
        ({"new": [decision("new")]}, 0),
        (decision("new"), 0),
        ({"decisions": []}, 0),
        ({}, 0),
        ("no JSON", 0),
        ("[1, 2]", 0),
    ],
)
def test_what_is_no_decision_is_counted(make_bank, reply, rejected):
    memory = make_bank(ABC, reply)
    memory.abstract(2)
    counts = memory.counts(2)
    assert bank_of(memory) == dict(ABC) and counts.get("behavior_rejected", 0) == rejected
    assert counts.get("abstract_parse_failure", 0) == (not rejected)


@pytest.mark.parametrize("reply", [{"actions": []}, {"behaviors": []}])
def test_nothing_to_decide_is_no_failure(make_bank, reply):
    memory = make_bank(ABC, reply)
    memory.abstract(2)
    assert bank_of(memory) == dict(ABC) and set(memory.counts(2)) == {"abstraction"}


def test_clusters_are_summarised_by_insight_and_else_by_experience(make_memory):
    memory = make_memory(
        lambda prompt: insight_reply(["alpha"]) if "Write strategies" in prompt else "{}",
        clusters=1,
    )
    memory.add_problems([P, Q])
    memory.record(1, attempts(["win p"], [1]) + attempts(["loss q"], [0], Q))
    memory.reflect(1, [P])
    memory.abstract(1)
    prompt = memory.generate.prompts[-1]
    assert (
        "- rule: alpha" in prompt
        and "win p" not in prompt
        and f"{mem.NANO.wrong}\nloss q" in prompt
    )


def test_the_teacher_reads_the_bank_of_the_step_before(make_memory):
    memory = make_memory(lambda prompt: behaviors(("behavior_zo", "zo=rev")), clusters=1)
    memory.add_problems([P])
    rollouts = attempts(["win"], [1])
    memory.record(1, rollouts)
    memory.abstract(1)
    assert memory.contexts(rollouts, 1)[0]["behaviors"] == []
    assert memory.contexts(rollouts, 1, refreshed=True)[0]["behaviors"] == [
        ("behavior_zo", "zo=rev")
    ]
    assert memory.contexts(rollouts, 2)[0]["behaviors"] == [("behavior_zo", "zo=rev")]


def test_retrieval_is_the_top_k_by_cosine():
    rng = np.random.default_rng(0)
    items = [
        Item(i, "behavior", "behavior", "", f"b{i}", "", embedding=v.astype(np.float32))
        for i, v in enumerate(rng.normal(size=(40, 8)))
    ]
    queries = rng.normal(size=(2, 8))
    for query, found in zip(queries, nearest(queries, items, 3), strict=True):
        ranked = sorted(
            items,
            key=lambda i: (
                -sum(float(a) * float(b) for a, b in zip(i.embedding, query, strict=True))
            ),
        )
        assert [i.id for i in found] == [i.id for i in ranked[:3]]


def test_a_cluster_too_large_for_its_prompt_shows_others_each_time(make_memory):
    problems = [Question(f"q{i}", f"same words {i}") for i in range(12)]
    memory = make_memory(lambda prompt: "{}", clusters=1, cluster_problems=4)
    memory.add_problems(problems)
    memory.record(1, [Attempt(f"1/{p.id}", p, f"attempt at {p.id}") for p in problems])
    for step in range(1, 31):
        memory.abstract(step)
    shown = [
        {p.id for p in problems if f"attempt at {p.id}\n" in prompt}
        for prompt in memory.generate.prompts
    ]
    assert all(len(s) == 4 for s in shown) and set().union(*shown) == {p.id for p in problems}


def test_transient_clusters_hold_this_steps_problems_only(make_memory):
    problems = [Question(f"q{i}", f"word{i % 2} " * 5 + str(i)) for i in range(8)]
    memory = make_memory(
        lambda prompt: behaviors((f"behavior_{len(prompt)}", prompt[-300:])),
        mode="transient",
        clusters=8,
        cluster_problems=2,
    )
    memory.add_problems(problems)
    for step, batch in ((1, problems[:4]), (2, problems[4:])):
        memory.generate.prompts.clear()
        memory.record(step, [Attempt(f"{step}/{p.id}", p, f"attempt at {p.id}!") for p in batch])
        memory.abstract(step)
        prompts = memory.generate.prompts
        seen = [{p.id for p in problems if f"attempt at {p.id}!" in prompt} for prompt in prompts]
        # alike with alike
        assert sorted(map(sorted, seen)) == [
            [p.id for p in batch[0::2]],
            [p.id for p in batch[1::2]],
        ]
        rollouts = attempts(["x"], [0], batch[0], step)
        assert memory.contexts(rollouts, step, refreshed=True)[0]["behaviors"]
        memory.forget(step)
        assert memory.sizes() == {
            "experience": 0,
            "insight": 0,
            "behavior": 0,
        } and not memory.living("behavior")


@pytest.mark.parametrize("grounded", [False, True])
def test_a_transient_step_is_as_if_the_run_began_with_it(make_memory, grounded):
    """Nothing of a first step, where all was solved and three tiers were written, is read or
    counted in the second.
    """

    def rule(prompt):
        return (
            insight_reply(["zo=rev"], ["zo!rev"])
            if "Write behaviors" not in prompt
            else behaviors(("behavior_zo", "zo=rev"), ("behavior_ki", "ki=inc"))
        )

    second = attempts([LOSS, "other"], [0, 0], step=2) + attempts([LOSS], [0], Q, step=2)
    seen = []
    for first in (True, False):
        memory = make_memory(rule, mode="transient", ground_insights=grounded, clusters=2)
        memory.add_problems([P, Q])
        if first:
            won = attempts([WIN, "another"], [1, 1]) + attempts([WIN], [1], Q)
            memory.record(1, won)
            memory.reflect(1, [P, Q])
            memory.abstract(1)
            assert (
                all(memory.sizes().values())
                and memory.contexts(won, 1, refreshed=True)[0]["behaviors"]
            )
            memory.forget(1)
        memory.generate.prompts.clear()
        memory.record(2, second)
        memory.reflect(2, [P, Q])
        memory.abstract(2)
        contexts = [memory.contexts(second, 2, refreshed=refreshed) for refreshed in (True, False)]
        seen.append(
            (
                memory.generate.prompts,
                contexts,
                memory.inference_contexts([Question("new", "Apply zo")]),
                memory.counts(2),
                memory.sizes(),
                memory.tally("insight"),
                memory.tally("experience"),
            )
        )
    assert seen[0] == seen[1] and len(seen[0][0]) > 2


@pytest.mark.parametrize(
    "mode, said", [("transient", "low (0 of 4"), ("evolving", "medium (4 of 8")]
)
def test_the_success_fraction_is_of_what_the_memory_spans(make_memory, mode, said):
    memory = make_memory(mode=mode, forms="question")
    for step, reward in ((1, 1.0), (2, 0.0)):
        memory.record(
            step, attempts([f"{step} {word}" for word in "abcd"], [reward] * 4, step=step)
        )
        memory.reflect(step, [P])
        if mode == "transient":
            memory.forget(step)
    assert said in memory.generate.prompts[-1] and "high (4 of 4" in memory.generate.prompts[0]


def test_a_memory_that_becomes_transient_forgets_what_it_was_forked_with(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["alpha"]))
    memory.record(1, attempts(["win"], [1]))
    memory.reflect(1, [P])
    memory.record(2, attempts(["more"], [1], step=2))
    memory.mode = "transient"  # another run's flag, on a copy of the file
    memory.truncate_after(1)
    assert not any(memory.sizes().values()) and not any(
        memory.contexts(attempts(["x"], [0], step=2), 2)[0].values()
    )


def test_a_frozen_memory_is_read_whole_at_every_step(make_memory):
    """Its steps and rollouts are the lender's: a behavior that it wrote in step 8 is read in step
    1, one that it removed in step 9 never, and its rollout 1/p/0 is not the reader's of that id.
    """
    replies = iter(
        [
            behaviors(("behavior_old", "alpha"), ("behavior_zo", "zo=rev")),
            actions(("remove", "behavior_old")),
        ]
    )
    lender = make_memory(
        lambda prompt: next(replies) if "behaviors" in prompt else insight_reply(["beta"]),
        clusters=1,
        ground_insights=False,
    )
    lender.add_problems([P])
    for step in range(1, 10):
        lender.record(step, attempts([f"win {step} {'xyz'[step % 3] * 9}"], [1], step=step))
    lender.reflect(9, [P])
    lender.abstract(8), lender.abstract(9)
    lender.close()
    with contextlib.closing(GroundedMemory(lender.path, words, None, mode="frozen")) as memory:
        for step in (1, 2, 8, 9, 10, 99):
            rollouts = [Attempt(f"{s}/p/0", P, "mine", 0.0) for s in range(1, 10)]
            for refreshed in (False, True):
                contexts = memory.contexts(rollouts, step, refreshed=refreshed)
                assert all(c["behaviors"] == [("behavior_zo", "zo=rev")] for c in contexts)
                assert all(
                    c["strategies"] == [("rule", "beta")] and c["solution"] == "win 9 xxxxxxxxx"
                    for c in contexts
                )


def test_another_model_may_write_the_behaviors(tmp_path):
    policy, other = (
        Script(lambda prompt: insight_reply(["alpha"])),
        Script(lambda prompt: behaviors(("behavior_x", "beta"))),
    )
    with contextlib.closing(
        mem.Memory(tmp_path / "m.db", words, policy, other, clusters=1)
    ) as memory:
        memory.add_problems([P])
        memory.record(1, attempts(["win"], [1]))
        memory.reflect(1, [P])
        memory.abstract(1)
        assert len(policy.prompts) == len(other.prompts) == 1
        assert [
            (i.tier, i.policy_step) for t in ("insight", "behavior") for i in memory.living(t)
        ] == [("insight", 0), ("behavior", None)]


def test_feedback_in_the_query_is_optional(make_memory):
    for on, expected in ((False, "behavior_question"), (True, "behavior_feedback")):
        reply = behaviors(("behavior_question", "apples pears"), ("behavior_feedback", "a b c d"))
        memory = make_memory(
            lambda prompt, reply=reply: reply, clusters=1, retrieve_k=1, query_feedback=on
        )
        q = Question("q", "apples pears")
        memory.add_problems([q])
        memory.record(1, attempts(["win"], [1], q))
        memory.abstract(1)
        found = memory.contexts([Attempt("2", q, "x", 0.0, "a b c d " * 9)], 2)
        assert [name for name, _ in found[0]["behaviors"]] == [expected]


# -- shortcuts

LABELLED = [  # by hand, before the patterns were tried on them
    ("Balance charges before atoms. Redox equations close only then.", []),
    ("The molar mass sums the atomic masses of all atoms; hydrogens count too.", []),
    ("A correct unit keeps the answer in grams per mole.", []),
    ("Vitamin C is an antioxidant and dissolves in water.", []),
    ("Group A streptococci are beta-haemolytic.", []),
    ("Compare band gaps: a wide gap means an insulator.", []),
    ("Prefer a heap when only the smallest element is needed.", []),
    ("Read all input before parsing it; lines may be empty.", []),
    ("Reaction rates rise with temperature because more collisions pass the barrier.", []),
    ("Hepatitis B is transmitted by blood.", []),
    ("The previous attempt ignored the sign.", ["attempts"]),
    ("In the failed attempts the unit was dropped.", ["attempts"]),
    ("All correct responses computed the mass first.", ["attempts"]),
    ("The model should have counted the rings.", ["attempts"]),
    ("The student confuses mass and weight.", ["attempts"]),
    ("Option B is the one with the largest ring.", ["options"]),
    ("The answer is C because of the nitrogen.", ["options"]),
    ("Compare (A) with (D) first.", ["options"]),
    ("The second option has the wrong charge.", ["options"]),
    ("B is correct when the ring is aromatic.", ["options"]),
    ("Use process of elimination when unsure.", ["tactics"]),
    ("Rule out implausible choices first.", ["tactics"]),
    ("An educated guess beats leaving it empty.", ["tactics"]),
    ("The longest answer tends to be right.", ["tactics"]),
    ("Distractors often repeat words of the stem.", ["tactics"]),
    ("Hardcode the outputs of the samples.", ["tactics"]),
    ("In this question the molecule has two rings.", ["problem"]),
    ("The given compound contains sulfur.", ["problem"]),
    ("For this particular reaction the yield is low.", ["problem"]),
    ("The above example shows a cycle.", ["problem"]),
    (
        "In this problem, choice (B) was picked in the wrong attempt by guessing.",
        ["attempts", "options", "tactics", "problem"],
    ),
]


@pytest.mark.parametrize("text, families", LABELLED)
def test_shortcut_families(text, families):
    assert mem.shortcuts(text) == families


def test_shortcuts_are_measured_and_dropped_on_request(make_memory):
    reply = insight_reply(
        ["Balance the charges.", "Option B is larger."], ["In this question the unit was lost."]
    )
    for drop, kept in ((False, 3), (True, 1)):
        memory = make_memory(lambda prompt: reply, drop_shortcuts=drop)
        memory.record(1, attempts(["win", "loss"], [1, 0]))
        memory.reflect(1, [P])
        counts = memory.counts(1)
        assert (
            len(memory.living("insight")) == kept
            and counts["insight_proposed"] == 3
            and counts["shortcut"] == 2
        )
        assert (
            counts["shortcut_options"] == counts["shortcut_problem"] == 1
            and "shortcut_tactics" not in counts
        )
        assert counts.get("insight_rejected", 0) == 3 - kept
    assert [i.shortcuts for i in memory.living("insight")] == [""]


# -- embedders


def times_seven(texts):
    return letters(texts) * 7


EMBEDDERS = {
    "float16": lambda texts: letters(texts).astype(np.float16),
    "float64": lambda texts: letters(texts).astype(np.float64),
    "no unit rows": times_seven,
    "float16, no unit rows": lambda texts: times_seven(texts).astype(np.float16),
    "lists": lambda texts: letters(texts).tolist(),
    "a tuple of arrays": lambda texts: tuple(letters(texts)),
    "bfloat16's rows in float32": (
        lambda texts: torch.tensor(letters(texts)).bfloat16().float().numpy()
    ),
    "a bfloat16 tensor": lambda texts: torch.tensor(letters(texts)).bfloat16(),
    "a list of bfloat16 tensors": lambda texts: list(torch.tensor(letters(texts)).bfloat16()),
    "a tensor with a gradient": lambda texts: torch.tensor(letters(texts), requires_grad=True),
    "not contiguous": lambda texts: np.asfortranarray(np.repeat(letters(texts), 2, axis=1))[:, ::2],
}


def lived(memory):
    """All that embeddings decide: which items live, which clusters there are, what is retrieved."""
    memory.add_problems([P, Q, Question("r", "zzzz yyyy")])
    rollouts = attempts(["abc", "abcabc", "xyz"], [1, 1, 0]) + attempts(["mno", "nom"], [1, 1], Q)
    memory.record(1, rollouts)
    memory.reflect(1, [P, Q])
    memory.abstract(1)
    items = [
        (i.text, i.evidence)
        for tier in ("experience", "insight", "behavior")
        for i in memory.living(tier)
    ]
    held_out = memory.inference_contexts([Question("new", "mmmno")])
    clusters = memory.db.execute("SELECT cluster FROM problem ORDER BY id").fetchall()
    return (
        items,
        clusters,
        memory.contexts(rollouts, 2),
        held_out,
        describe(memory, "p"),
        memory.counts(),
    )


@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_embedders_type_and_length_change_nothing(make_memory, name):
    def rule(prompt):
        if "Write behaviors" in prompt:
            return behaviors(("behavior_m", "mno"), ("behavior_z", "zy"))
        return insight_reply(["jjj kkk", "kkkjjj"], ["www"])

    expected, memory = (
        lived(make_memory(rule, letters, clusters=2)),
        make_memory(rule, EMBEDDERS[name], clusters=2),
    )
    assert lived(memory) == expected
    rows = memory.db.execute(
        "SELECT embedding FROM item UNION ALL SELECT embedding FROM problem"
    ).fetchall()
    table = np.stack([np.frombuffer(row, np.float32) for (row,) in rows])
    assert table.shape[1] == 26 and np.allclose(np.linalg.norm(table, axis=1), 1, atol=1e-6)


def test_rows_of_unit_length_stay_to_the_bit_and_zeros_stay_zeros():
    rows = letters(["abc", "def", "xyz"])
    assert unit_rows(rows).tobytes() == rows.tobytes()
    once = unit_rows(EMBEDDERS["bfloat16's rows in float32"](["abc", "aab"]))
    assert unit_rows(once).tobytes() == once.tobytes()
    assert np.array_equal(
        unit_rows(np.array([[0, 0], [3, 4]], np.float16)),
        np.array([[0, 0], [0.6, 0.8]], np.float32),
    )


@pytest.mark.parametrize(
    "vectors, said",
    [
        (lambda texts: [[np.nan, 1.0]] * len(texts), "not finite"),
        (lambda texts: [[1e39, np.inf]] * len(texts), "not finite"),
        (lambda texts: None, "no table"),
        (lambda texts: [1.0] * len(texts), "shape"),
        (lambda texts: [["a"]] * len(texts), "no table"),
        (lambda texts: [[1.0], [1.0, 2.0]], "no table"),
        (lambda texts: [[1.0, 0.0]] * 3, "3 rows for 1 texts"),
    ],
)
def test_what_is_no_embedding_is_said_in_a_sentence(make_memory, vectors, said):
    with pytest.raises(ValueError, match=f"the embedder gave .*{said}.*name another --embedder"):
        make_memory(embed=vectors)


def no_direction(texts):
    return np.zeros((len(texts), 4), np.float32)


def test_no_cosine_is_above_one(make_memory):
    """Where novelty is 1.0 only equal texts are refused, however the product of two equal unit
    vectors is rounded.
    """
    vectors = np.random.default_rng(0).normal(size=(50, 300))

    def embed(texts):
        return unit_rows(
            vectors[[int(text) % 50 for text in texts]] if texts != [" "] else vectors[:1]
        )

    memory = make_memory(embed=embed, response_novelty=1.0, max_failures=100)
    memory.record(1, attempts(map(str, range(100)), [0] * 100))
    assert memory.sizes()["experience"] == 100 and "experience_duplicate" not in memory.counts()


def test_a_smaller_cap_holds_from_the_next_newcomer_on(make_memory):
    """As in a fork with other flags: the gate is the run's own, not that of the run which filled
    the memory.
    """
    memory = make_memory(max_failures=5)
    memory.record(1, attempts(["a b", "a c", "d", "e", "f"], [0] * 5))
    memory.caps["failure"] = 3
    memory.record(2, attempts(["g"], [0], step=2))
    left = {i.text for i in memory.living("experience")}
    # which a c is like
    assert len(left) == memory.sizes()["experience"] == 3 and "g" in left and "a b" not in left
    assert memory.counts(2)["experience_evicted"] == 3


def test_equal_texts_are_duplicates_in_every_tier_whatever_the_embedder_says(make_memory):
    def rule(prompt):
        if "Write strategies" in prompt:
            return json.dumps(
                {
                    "strategies": [{"title": title, "content": "12"} for title in ("one", "two")],
                    "lessons": [
                        {"title": "one", "content": "13"},
                        {"title": "one", "content": "14"},
                    ],
                }
            )
        return behaviors(("behavior_a", "15"), ("behavior_b", "15"), ("behavior_c", "16"))

    memory = make_memory(rule, no_direction, clusters=1, response_novelty=1.0, insight_novelty=1.0)
    memory.add_problems([P])
    memory.record(
        1, attempts(["", " ", "\n", "7", "7", "8"], [0] * 6) + attempts(["", "7"], [1, 1])
    )
    memory.record(2, attempts(["7", " 8 ", "9"], [0] * 3, step=2))
    living = sorted((i.kind, i.text) for i in memory.living("experience"))
    assert living == [
        ("failure", "7"),
        ("failure", "8"),
        ("failure", "9"),
        ("success", ""),
        ("success", "7"),
    ]
    assert memory.counts()["experience_duplicate"] == 5
    memory.reflect(2, [P])
    assert [i.text for i in memory.living("insight")] == ["12", "13", "14"] and memory.counts()[
        "insight_duplicate"
    ] == 1
    memory.abstract(2)
    assert [b.title for b in memory.living("behavior")] == ["behavior_a", "behavior_c"]
    assert memory.counts()["behavior_duplicate"] == 1


# -- compose


def test_blocks_are_in_the_papers_order_and_absent_when_empty():
    text = mem.compose(
        "PROBLEM", [("s", "S")], [("l", "L")], [("behavior_b", "B")], "SOLUTION", "FEEDBACK"
    )
    marks = [
        "PROBLEM",
        mem.STRATEGIES,
        "- s: S",
        mem.LESSONS,
        "- l: L",
        mem.BEHAVIORS,
        "1. behavior_b: B",
        mem.SOLUTION,
        "SOLUTION",
        mem.FEEDBACK,
        "FEEDBACK",
        mem.CLOSING,
    ]
    assert text.splitlines() == marks
    assert mem.compose("PROBLEM") == "PROBLEM"
    assert mem.compose("P", feedback="f").splitlines() == ["P", mem.FEEDBACK, "f", mem.CLOSING]


def test_the_solution_is_not_the_rollouts_own_and_is_the_most_recent(make_memory):
    memory = make_memory()
    rollouts = attempts(["first win", "second way"], [1, 1])
    memory.record(1, rollouts)
    assert [c["solution"] for c in memory.contexts(rollouts, 1)] == ["second way", "first win"]
    memory.record(2, attempts(["third road"], [1], step=2))
    shown = [c["solution"] for c in memory.contexts(rollouts, 2)]
    assert shown == ["third road", "third road"]  # and not the first that is another's
    alone = attempts(["only win"], [1], Q)
    memory.record(1, alone)
    assert memory.contexts(alone, 1)[0]["solution"] == ""


def test_thoughts_are_not_demonstrated():
    assert "secret" not in mem.compose(
        "P", solution="<think>secret\n</think>answer"
    ) and "answer" in mem.compose("P", solution="<think>secret\n</think>answer")


def test_tiers_hide_blocks(make_memory):
    memory = make_memory(
        lambda prompt: (
            insight_reply(["alpha"])
            if "Write strategies" in prompt
            else behaviors(("behavior_x", "beta"))
        ),
        clusters=1,
    )
    memory.add_problems([P])
    memory.record(1, attempts(["win"], [1]))
    memory.reflect(1, [P])
    memory.abstract(1)
    other = attempts(["loss"], [0], step=2)
    other[
        0
        # of the same block as the solution: Table 4's modes without experience hide both
    ].feedback = "No."
    seen = {
        tiers: {k for k, v in memory.contexts(other, 2, tiers)[0].items() if v}
        for tiers in (
            ("experience",),
            ("insight",),
            ("behavior",),
            ("experience", "insight", "behavior"),
        )
    }
    experience = {"solution", "feedback"}
    assert list(seen.values()) == [
        experience,
        {"strategies"},
        {"behaviors"},
        experience | {"strategies", "behaviors"},
    ]


@given(st.integers(1, 60))
def test_the_budget_cuts_in_the_stated_order_and_the_solution_last(budget):
    context = {
        "strategies": [("s", "one"), ("s", "two")],
        "lessons": [("l", "three")],
        "behaviors": [("b", "four"), ("b", "five")],
        "solution": "SOLVED",
        "feedback": "FED",
    }
    text = mem.compose_within(budget, lambda t: len(t.split()), "PROBLEM", **context)
    assert text.startswith("PROBLEM") and (len(text.split()) <= budget or text == "PROBLEM")
    words = {"behaviors": "four", "lessons": "three", "strategies": "one"}
    words |= {"feedback": "FED", "solution": "SOLVED"}
    kept = []
    for block, word in words.items():
        alone = mem.compose("PROBLEM", **{block: context[block]})
        if block not in mem.TEXTS or len(alone.split()) <= budget:
            kept.append(word in text)
        else:  # and nothing gives way for what does not fit even alone
            assert word not in text
    assert kept == sorted(kept)  # what gives way first is never kept while a later one is gone


def test_a_solution_that_does_not_fit_alone_costs_no_other_block():
    context = {"strategies": [("s", "one"), ("s", "far too long " * 40)], "solution": "digit " * 80}
    text = mem.compose_within(40, lambda t: len(t.split()), "PROBLEM", **context)
    assert text == mem.compose("PROBLEM", strategies=[("s", "one")])
    assert context["solution"]  # the caller's own is left as it was


@given(
    st.lists(
        st.sampled_from(
            ["<|im_start|>", "<|im_end|>", "</s>", "<|im_", "start|>", "<", " ", "a", "%s", "{0}"]
        ),
        max_size=12,
    )
)
def test_control_tokens_are_broken(pieces):
    control = ["<|im_start|>", "<|im_end|>", "</s>"]
    text = neutralise("".join(pieces), control)
    assert not any(t in text for t in control)
    assert text.replace(" ", "") == "".join(pieces).replace(" ", "")


@pytest.mark.parametrize(
    "control, text, broken",
    [
        (["[INST]"], "a [INST] b [inst]", "a [ INST] b [ inst]"),
        (["### Assistant:"], "###  assistant: x", "# ##  assistant: x"),
        (["<|im_end|>"], "\uff1c|IM_end\uff5c\uff1e", "\uff1c |IM_end\uff5c\uff1e"),
        (["ab|", "|cd"], "ab|cd", "a b| cd"),
        (["# User"], "# User # Used", "# U ser # Used"),
        (["#", " ", "\n\n", "a b"], "# a b\n\n", "# a b\n\n"),
        ([], "x", "x"),
        (["<|x|>"], "<|x|><|x|>", "< |x|>< |x|>"),
        (["<|K|>"], "<|\u212a|> \ufb01", "< |\u212a|> \ufb01"),
    ],
)
def test_control_tokens_are_found_in_every_dress(control, text, broken):
    assert neutralise(text, control) == broken


# -- grounding

WIN, LOSS = (
    "3 1 7 4 zo zo=rev 4 7 1 3 ki ki=inc 5 8 2 4",
    "3 1 7 4 zo zo=rev 4 7 1 3 ki ki=dec 3 6 0 2",
)


def test_grounded_reflection_reads_one_attempt_at_a_time_until_an_insight_came_from_it(make_memory):
    answered = iter(
        ["garbage", insight_reply([], ["zo!rev ki!dec"]), insight_reply(["zo=rev", "ki=inc"])]
    )
    memory = make_memory(lambda prompt: next(answered), ground_insights=True)
    memory.record(1, attempts([WIN, LOSS], [1, 0]))
    memory.reflect(1, [P])
    assert [(WIN in p, LOSS in p) for p in memory.generate.prompts] == [
        (True, False),
        (False, True),
    ]
    memory.reflect(2, [P])  # the win again: the first reply gave nothing
    assert len(memory.generate.prompts) == 3 and WIN in memory.generate.prompts[2]
    memory.reflect(3, [P])
    assert len(memory.generate.prompts) == 3
    assert {i.text for i in memory.living("insight")} == {"zo=rev", "ki=inc", "zo!rev ki!dec"}


def test_an_insight_must_be_contained_in_its_evidence(make_memory):
    memory = make_memory(
        lambda prompt: insight_reply(["zo=rev", "ki=swap", "no key term"]), ground_insights=True
    )
    memory.record(1, attempts([WIN], [1]))
    memory.reflect(1, [P])
    assert [i.text for i in memory.living("insight")] == ["zo=rev"] and memory.counts()[
        "insight_rejected"
    ] == 2


def test_a_failure_made_of_living_strategies_ends_them_and_others_do_not(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["zo=rev", "ki=inc"]), ground_insights=True)
    memory.record(1, attempts([WIN], [1]))
    memory.reflect(1, [P])
    memory.record(2, attempts([LOSS], [0], step=2))  # ki=dec may be to blame
    assert len(memory.living("insight")) == 2
    memory.record(3, attempts([WIN.replace("5 8", "9 9")], [0], step=3))
    assert memory.living("insight") == [] and len(memory.as_of(2, "insight")) == 2
    assert memory.counts()["insight_contradicted"] == 2


def test_a_success_ends_the_lesson_it_contradicts(make_memory):
    memory = make_memory(lambda prompt: insight_reply([], ["zo!rev ki!dec"]), ground_insights=True)
    memory.record(1, attempts([LOSS], [0]))
    memory.reflect(1, [P])
    memory.record(2, attempts([WIN], [1], step=2))
    assert len(memory.living("insight")) == 1
    memory.record(3, attempts([LOSS], [1], step=3))
    assert memory.living("insight") == []


def test_a_behavior_needs_two_supporting_problems(make_memory):
    def rule(prompt):
        if prompt.endswith(mem.NANO.cold_start):
            return behaviors(("behavior_zo", "zo=rev"), ("behavior_ki", "ki=inc"))
        return insight_reply(["zo=rev", "ki=inc"])

    memory = make_memory(rule, ground_insights=True, clusters=1)
    memory.add_problems([P, Q])
    memory.record(1, attempts([WIN], [1]) + attempts(["5 6 7 8 zo zo=rev 8 7 6 5"], [1], Q))
    memory.reflect(1, [P, Q])
    memory.abstract(1)
    bank = memory.living("behavior")
    assert [(b.title, b.sources) for b in bank] == [("behavior_zo", ["p", "q"])]
    assert memory.counts()["behavior_rejected"] == 1


def test_plain_text_is_grounded_by_half_of_its_longer_words(make_memory):
    # one of four
    replies = iter(
        [
            insight_reply(
                [
                    # balance electron before oxygen
                    "Balance electrons before oxygens with these others.",
                    "Balance the neutrons slowly, carefully.",
                ]
            )
        ]
    )
    memory = make_memory(lambda prompt: next(replies), forms="question", ground_insights=True)
    memory.record(1, attempts(["First balance every electron, then count."], [1]))
    memory.reflect(1, [P])
    assert [i.text[:17] for i in memory.living("insight")] == ["Balance electrons"]
    memory.record(2, attempts(["balance before electrons"], [0], step=2))  # not all of its words
    assert memory.sizes()["insight"] == 1
    # all, but right
    memory.record(3, attempts(["Balance oxygens before the electrons: Na"], [1], step=3))
    assert memory.sizes()["insight"] == 1
    memory.record(4, attempts(["Balance oxygens before the electrons: Cl"], [0], step=4))
    assert memory.sizes()["insight"] == 0 and memory.counts()["insight_contradicted"] == 1


def test_support_is_counted_for_what_was_born_before_and_changes_nothing(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["zo=rev"]), ground_insights=True)
    rollouts = attempts([WIN], [1])
    memory.record(1, rollouts)
    memory.reflect(1, [P])
    memory.contexts(rollouts, 1)
    assert not any(kind.startswith("support") for kind in memory.counts())
    before = memory.living("insight")[0]
    memory.contexts(attempts(["a", "b", "c"], [1, 0, 0], step=2), 2)
    assert memory.counts(2) == {"support_failure": 2, "support_success": 1}
    subjects = {row[0] for row in memory.db.execute("SELECT subject FROM event WHERE step = 2")}
    assert subjects == {f"#{before.id}"} and [i.id for i in memory.living("insight")] == [before.id]
    memory.truncate_after(1)
    assert not any(kind.startswith("support") for kind in memory.counts())


# -- time and the file


def test_every_past_state_can_be_read_and_returned_to(make_memory):
    rng = np.random.default_rng(0)
    bank = iter(range(10_000))
    memory = make_memory(
        lambda prompt: (
            insight_reply([f"s{next(bank)}"], [f"l{next(bank)}"])
            if "JSON" in prompt and "behaviors" not in prompt
            else behaviors((f"behavior_{next(bank)}", f"i{next(bank)}"))
        ),
        max_successes=2,
        max_failures=2,
        max_insights=3,
        max_behaviors=2,
        clusters=2,
    )
    memory.add_problems([P, Q])

    def state():
        return (
            [
                (i.id, i.text)
                for t in ("experience", "insight", "behavior")
                for i in memory.living(t)
            ],
            memory.counts(),
            memory.sizes(),
        )

    states = {0: state()}
    for step in range(1, 9):
        memory.record(
            step,
            attempts(
                [f"w{rng.integers(99)}", f"w{rng.integers(99)}"], rng.integers(0, 2, 2), step=step
            )
            + attempts([f"w{rng.integers(99)}"], [1], Q, step),
        )
        memory.reflect(step, [P, Q])
        memory.abstract(step)
        states[step] = state()
    for step in range(8, -1, -1):
        past = [
            (i.id, i.text)
            for tier in ("experience", "insight", "behavior")
            for i in memory.as_of(step, tier)
        ]
        assert past == states[step][0]
    for step in (5, 5, 2, 0):
        memory.truncate_after(step)
        assert state() == states[step]


def test_what_has_ended_keeps_no_embedding_and_comes_back_with_it(make_memory):
    """Attempts and insights need theirs for the gate alone; a behavior's is asked for a step after
    it ended (Eq. 4). To go back and on again ends in the very same file.
    """

    def run(memory, first, last):
        for step in range(first, last + 1):
            rng = np.random.default_rng(step)
            texts = [" ".join(f"w{w}" for w in rng.integers(0, 40, 3)) for _ in range(3)]
            memory.record(
                step,
                attempts(texts, rng.integers(0, 2, 3), step=step)
                + attempts(texts[:1], [1], Q, step),
            )
            memory.reflect(step, [P, Q])
            memory.abstract(step)

    def rule(prompt):
        n = sum(map(ord, prompt)) % 9973
        return (
            behaviors((f"behavior_{n % 7}", f"i{n}"))
            if "behaviors" in prompt
            else insight_reply([f"s{n}"], [f"l{n}"])
        )

    def rows(memory, what="*", where="TRUE"):
        return memory.db.execute(f"SELECT {what} FROM item WHERE {where} ORDER BY id").fetchall()

    limits = dict(max_successes=2, max_failures=2, max_insights=2, max_behaviors=2, clusters=2)
    whole, broken = make_memory(rule, **limits), make_memory(rule, **limits)
    for memory in (whole, broken):
        memory.add_problems([P, Q])
    run(whole, 1, 9)
    kept = {
        (tier, ended is None, embedding is None)
        for tier, ended, embedding in rows(whole, "tier, ended, embedding")
    }
    assert kept == {
        ("experience", True, False),
        ("experience", False, True),
        ("insight", True, False),
        ("insight", False, True),
        ("behavior", True, False),
        ("behavior", False, False),
    }
    assert all(
        b.embedding is not None for step in range(1, 9) for b in whole.as_of(step, "behavior")
    )
    run(broken, 1, 8)
    for step in (5, 2):
        revived = len(
            rows(broken, where=f"ended > {step} AND born <= {step} AND tier != 'behavior'")
        )
        broken.truncate_after(step)
        assert revived and all(
            i.embedding is not None
            for tier in ("experience", "insight")
            for i in broken.living(tier)
        )
        run(broken, step + 1, 9)
        assert (
            rows(broken) == rows(whole)
            and broken.counts() == whole.counts()
            and broken.sizes() == whole.sizes()
        )


def test_a_memory_without_an_embedder_goes_back_too(make_memory, tmp_path):
    memory = make_memory(max_successes=1)
    for step in (1, 2, 3):
        memory.record(step, attempts([f"win {step}"], [1], step=step))
    memory.copy_to(tmp_path / "copy.db")
    with contextlib.closing(mem.Memory(tmp_path / "copy.db", None, None)) as copy:  # RUN@2
        copy.truncate_after(2)
    assert rows_of(tmp_path / "copy.db") == [("win 2", 2)]


def test_provenance(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["alpha"]))
    memory.record(4, attempts(["win"], [1], step=4))
    memory.reflect(4, [P])
    experience, insight = memory.living("experience")[0], memory.living("insight")[0]
    assert experience.sources == ["4/p/0"] and insight.sources == [experience.id]
    assert insight.born == 4 and insight.policy_step == 3 and insight.ended is None


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "x.db").write_text("not a database, " * 100)
    with pytest.raises(
        ValueError, match="x.db can't be used as a memory .*name another file, or remove it"
    ):
        mem.Memory(tmp_path / "x.db", words, Script())
    mem.Memory(tmp_path / "y.db", words, Script(), embedder="one").close()
    with pytest.raises(ValueError, match="'one'.*'two'"):
        mem.Memory(tmp_path / "y.db", words, Script(), embedder="two")
    with pytest.raises(
        ValueError, match="y.db holds embeddings of 4096 dimensions, 'one' gives 26"
    ):
        mem.Memory(tmp_path / "y.db", letters, Script(), embedder="one")
    with contextlib.closing(sqlite3.connect(tmp_path / "y.db")) as db, db:
        db.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
    with pytest.raises(ValueError, match="y.db has memory schema 1, this code reads 2"):
        mem.Memory(tmp_path / "y.db", words, Script())
    with contextlib.closing(sqlite3.connect(tmp_path / "z.db")) as db, db:
        db.execute("CREATE TABLE diary (day TEXT)")
    with pytest.raises(ValueError, match="z.db can't be used as a memory .*made by something else"):
        mem.Memory(tmp_path / "z.db", words, Script())
    with pytest.raises(ValueError, match="there is no memory .*none.db"):
        mem.Memory(tmp_path / "none.db", None, None, mode="frozen")


def as_nobody(call, folder):
    """call() in a child without privileges; the text of what it raised.

    folder: it may come there, through whatever folders pytest made.
    """
    for path in [folder, *folder.parents][:5]:
        if path != Path("/"):
            path.chmod(path.stat().st_mode | 0o555)
    parent, child = multiprocessing.Pipe()

    def run():
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            call()
            child.send("nothing was raised")
        except Exception as error:
            child.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    said = parent.recv()
    process.join()
    return said


def rows_of(path):
    with contextlib.closing(mem.Memory(path, None, None, mode="frozen")) as memory:
        return [(i.text, i.born) for i in memory.living("experience")]


def test_a_locked_file_and_a_read_only_folder_say_so(make_memory, tmp_path):
    memory = make_memory()
    memory.record(1, attempts(["first"], [1]))
    memory.db.execute("PRAGMA busy_timeout = 50")
    with contextlib.closing(sqlite3.connect(memory.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            OSError, match="0.db can't be used as a memory .*another process is writing it"
        ):
            memory.record(2, attempts(["second"], [1], step=2))
        other.rollback()
    assert memory.sizes()["experience"] == 1 and memory.counts() == {"success": 1}
    memory.record(2, attempts(["third"], [1], step=2))
    memory.close()
    assert rows_of(memory.path) == [("first", 1), ("third", 2)]
    shut = tmp_path / "shut"
    shut.mkdir()
    shutil.copy(memory.path, shut / "m.db")
    shut.chmod(0o555), (shut / "m.db").chmod(0o444)
    assert "m.db can't be used as a memory" in (
        said := as_nobody(lambda: mem.Memory(shut / "m.db", words, Script()), tmp_path)
    ), said
    assert "make" in said and said.startswith("OSError")
    refusal = as_nobody(lambda: mem.Memory(shut / "new.db", words, Script()), tmp_path)
    assert refusal.startswith("OSError")
    # reading needs no writable folder
    assert as_nobody(lambda: rows_of(shut / "m.db"), tmp_path) == "nothing was raised"


def test_a_full_disk_says_so_and_what_was_committed_is_safe(make_memory, tmp_path):
    memory = make_memory()
    memory.record(1, attempts(["first"], [1]))
    (pages,) = memory.db.execute("PRAGMA page_count").fetchone()
    memory.db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(OSError, match="full.*free some space"):
        memory.record(2, attempts([f"{i}" * 5000 for i in range(8)], [1] * 8, step=2))
    assert memory.sizes()["experience"] == 1 and memory.counts() == {"success": 1}
    memory.db.execute("PRAGMA max_page_count = 1000000")
    memory.record(2, attempts(["later"], [1], step=2))
    memory.close()
    assert rows_of(memory.path) == [("first", 1), ("later", 2)]

    def with_a_quota():
        full = mem.Memory(memory.path, words, Script())
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(memory.path) + 50_000,) * 2)
        full.record(3, attempts([f"{i}" * 50_000 for i in range(5)], [1] * 5, step=3))

    os.chmod(memory.path, 0o666), os.chmod(os.path.dirname(memory.path), 0o777)
    assert "all that was committed before is safe" in as_nobody(with_a_quota, tmp_path)
    assert rows_of(memory.path) == [("first", 1), ("later", 2)]


def steps_forever(path, told):
    memory = mem.Memory(path, letters, Script(lambda prompt: insight_reply([f"s{len(prompt)}"])))
    first = 1 + max([0, *(i.born for i in memory.living("experience"))])
    for step in range(first, 10_000):
        text = f"{'abcdefghijklmnopqrstuvwxyz'[step % 26] * 3} {step}"
        memory.record(step, attempts([text], [1], Question(f"p{step % 7}", ""), step))
        told.send(step)


def test_kill_9_loses_nothing_that_was_committed(tmp_path):
    path, rng, last = tmp_path / "m.db", random.Random(0), 0
    for _ in range(6):
        parent, child = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=steps_forever, args=(path, child)
        )
        process.start()
        last = parent.recv()  # it has begun
        time.sleep(rng.random() / 10)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while parent.poll():
            last = parent.recv()
        with contextlib.closing(mem.Memory(path, letters, Script())) as memory:
            memory.truncate_after(last)  # the kill may have come between a commit and its message
            assert memory.counts()["success"] == last
            born = sorted({born for (born,) in memory.db.execute("SELECT born FROM item")})
            assert born and born[-1] <= last
    assert last > 6


def test_a_torn_log_recovers_to_a_committed_step(tmp_path):
    memory = mem.Memory(tmp_path / "m.db", words, Script())
    for step in range(1, 9):
        memory.record(step, attempts([f"attempt {step}"], [1], step=step))
    log, rng = (tmp_path / "m.db-wal").read_bytes(), random.Random(0)
    assert len(log) > 10_000
    found = set()
    for i in range(25):
        torn = tmp_path / f"{i}.db"
        shutil.copy(tmp_path / "m.db", torn)
        torn.with_name(torn.name + "-wal").write_bytes(log[: rng.randrange(len(log))])
        with contextlib.closing(mem.Memory(torn, words, Script())) as again:
            texts = [i.text for i in again.living("experience")]
            steps = again.counts().get("success", 0)
            assert texts == [f"attempt {s}" for s in range(1, steps + 1)][-5:]
            again.record(9, attempts(["goes on"], [1], step=9))
            found.add(steps)
    assert len(found) > 3
    memory.db.close()


def test_reading_a_run_that_is_still_going(make_memory):
    memory = make_memory()
    memory.record(1, attempts(["win"], [1]))
    assert rows_of(memory.path) == [("win", 1)]  # the commit is in the log only
    memory.record(2, attempts(["more"], [1], step=2))
    assert rows_of(memory.path) == [("win", 1), ("more", 2)]


def test_a_method_that_raises_has_changed_nothing(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["alpha"]))
    memory.add_problems([P])
    memory.record(1, attempts(["win"], [1]))
    before = (memory.counts(), memory.sizes(), list(memory.db.execute("SELECT * FROM item")))

    def broken(texts):
        raise RuntimeError("no embedding today")

    memory.embed = broken
    for call in (
        lambda: memory.record(2, attempts(["x"], [1], step=2)),
        lambda: memory.reflect(2, [P]),
    ):
        with pytest.raises(RuntimeError):
            call()
        assert (
            memory.counts(),
            memory.sizes(),
            list(memory.db.execute("SELECT * FROM item")),
        ) == before


# -- looking at it


def test_show_and_stats(make_memory, capsys, tmp_path):
    memory = make_memory(
        lambda prompt: (
            insight_reply(["alpha \x1b[31mred"])
            if "strategies" in prompt
            else behaviors(("behavior_x", "beta"))
        ),
        clusters=1,
    )
    memory.add_problems([P, Q])
    for step, (problem, text) in enumerate(
        ((P, "first win"), (Q, "a win of q"), (P, "quite another")), 1
    ):
        memory.record(step, attempts([text], [1], problem, step))
        memory.reflect(step, [problem])
    memory.abstract(4)
    memory.close()

    def printed(*args):
        show_memory.main([*map(str, args)])
        return capsys.readouterr().out

    everything = printed("show", memory.path)
    assert all(
        w in everything
        for w in ("first win", "a win of q", "alpha", "behavior_x: beta", "experience: 3 items")
    )
    assert "\x1b" not in everything
    assert (
        "a win of q" not in (one := printed("show", memory.path, "--problem", "p"))
        and "quite another" in one
    )
    assert "quite another" not in printed("show", memory.path, "--problem", "p", "--step", 2)
    assert "behavior: 0 items" in printed("show", memory.path, "--tier", "behavior", "--step", 3)
    found = printed("show", memory.path, "--grep", "OF Q")
    assert "a win of q" in found and "first win" not in found
    table = printed("stats", memory.path, "--png", tmp_path / "m.png").splitlines()
    assert [
        line.split() for line in table[1:6]
    ] == [  # step, success, failure, strategy, lesson, behavior, shortcut
        [*"0000000"],
        [*"1101000"],
        [*"2202000"],
        [*"3302000"],
        [*"4302010"],
    ]
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"
    for args, said in (
        (("show", tmp_path / "no.db"), "no memory"),
        (("show", memory.path, "--problem", "zzz"), "'zzz'"),
    ):
        with pytest.raises(SystemExit, match=said):
            show_memory.main([*map(str, args)])


def test_it_is_readable(make_memory):
    memory = make_memory(
        lambda prompt: (
            insight_reply(["alpha"])
            if "strategies" in prompt
            else behaviors(("behavior_x", "beta"))
        ),
        clusters=1,
    )
    memory.add_problems([P])
    memory.record(1, attempts(["the win"], [1]))
    memory.reflect(1, [P])
    memory.abstract(1)
    shown = describe(memory, "p")
    assert all(w in shown for w in ("the win", "alpha", "behavior_x: beta", "solved in 1 of 1")), (
        shown
    )
    assert memory.sizes() == {"experience": 1, "insight": 1, "behavior": 1}


@pytest.mark.parametrize("key", ["schema", "embedder", "dimension", "caps"])
def test_a_file_that_does_not_say_what_it_is_is_no_memory(tmp_path, key):
    path = tmp_path / "m.db"
    mem.Memory(path, words, None, embedder="words").close()
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM meta WHERE key = ?", (key,))
    db.close()
    for mode in ("frozen", "evolving"):
        with pytest.raises(
            ValueError,
            match=f"m.db is no memory of this code: it does not say its {key}; name another",
        ):
            mem.Memory(path, words, None, embedder="words", mode=mode)


@pytest.mark.parametrize("step", ["-1", "1" + "0" * 30, "1" + "0" * 400])
def test_a_step_that_no_run_has_is_a_sentence(tmp_path, capsys, step):
    with pytest.raises(SystemExit) as end:
        show_memory.main(["show", str(tmp_path / "m.db"), "--step", step])
    assert end.value.code == 2 and "is no step of a run" in capsys.readouterr().err
