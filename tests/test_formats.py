"""The forms of a memory's replies: what a grammar lets through parses, and lines are read."""

import json
import time

import pytest
import torch
from conftest import Attempt, Question
from test_templates import CHATML, a_tokenizer

import memory as mem
from pmd import PMD
from runtime import check
from runtime.formats import (
    BOTH,
    DECISIONS,
    LISTS,
    NEW_BEHAVIORS,
    ONLY_LESSONS,
    in_format,
    parse_lines,
    schema_of,
    was_cut,
)
from runtime.guide import Guide
from runtime.replies import decisions, items_under, parse

WORDS = {name: forms for name, forms in mem.FORMS.items() if name != "nano"}


@pytest.fixture(scope="module")
def tokenizer_of_bytes():
    return a_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")


def written(tokenizer, schema, limit, seed) -> tuple[str, bool]:
    """What a model writes that knows nothing: uniform over the ASCII that the grammar allows.

    Returns the text, and whether it ended.
    """
    end, size = tokenizer.eos_token_id, len(tokenizer)
    guide = Guide(tokenizer, size, {end}, [schema, None])
    odd = [i for i in range(size) if i != end and not tokenizer.decode([i]).isascii()]
    generator, ids = torch.Generator().manual_seed(seed), torch.zeros(2, 1, dtype=torch.long)
    for _ in range(limit):
        scores = torch.rand(2, size, generator=generator)
        scores[:, odd] -= 1e4
        guided = guide(ids, scores)
        assert (guided[1] == scores[1]).all()  # a free reply stays free
        ids = torch.cat([ids, guided.argmax(1, keepdim=True)], 1)
        if ids[0, -1] == end:
            return tokenizer.decode(ids[0, 1:-1]), True
    return tokenizer.decode(ids[0, 1:]), False


def rows_in(reply) -> int:
    found = parse(reply)
    insights = [items_under(found, key, "title", "content")[0] for key in ("strategies", "lessons")]
    writes, removes, _ = decisions(found) or ([], [], 0)
    return sum(map(len, insights)) + len(writes) + len(removes)


@pytest.mark.parametrize("request_", LISTS, ids=range(len(LISTS)))
@pytest.mark.parametrize("limit", [160, 1500])
def test_no_guided_reply_is_lost(tokenizer_of_bytes, request_, limit):
    """Also of a model that writes at random, and where the limit cuts the reply."""
    schema = schema_of(f"a question\n{request_}", limit)
    reply, ended = written(tokenizer_of_bytes, schema, limit, seed=0)
    if request_ != DECISIONS or not ended:  # there may be nothing to decide
        assert rows_in(reply) >= 1, reply
    if ended:
        value = json.loads(reply)  # the standard's reader, not ours
        assert value.keys() == LISTS[request_].keys()
        for key, (least, most) in LISTS[request_].items():
            assert least <= len(value[key]) <= most
        assert rows_in(reply) == sum(map(len, value.values()))


def test_the_request_at_its_end_tells_a_prompts_schema():
    for forms in WORDS.values():
        both = mem.reflection_prompt(forms, "q", ["right"], [("wrong", "")], 1, 2)
        lessons = mem.reflection_prompt(forms, "q", [], [("wrong", f"say {BOTH}")], 0, 1)
        cold = mem.abstraction_prompt(forms, [("q", ["- a: b"])], [])
        later = mem.abstraction_prompt(forms, [("q", ["- a: b"])], [("behavior_x", "do")])
        wanted = (BOTH, ONLY_LESSONS, NEW_BEHAVIORS, DECISIONS)
        for prompt, request in zip((both, lessons, cold, later), wanted, strict=True):
            lists = json.loads(schema_of(prompt, 100))["properties"]
            assert lists.keys() == LISTS[request].keys()
    assert schema_of("What is 2 + 2?", 100) is None


def test_lines_ask_for_lines_and_change_no_other_sentence():
    for forms in WORDS.values():
        lined, read = in_format(forms, "lines")
        assert read is parse_lines
        for name, text in vars(forms).items():
            now = getattr(lined, name)
            if isinstance(text, str) and "Reply with this JSON" in text:
                assert now.startswith(text[: text.index("Reply")]) and "{" not in now
            else:
                assert now == text


@pytest.mark.parametrize(
    "reply, wanted",
    [
        (
            "Strategy: units - convert them first.\nLesson: signs: minus twice is plus.",
            {
                "strategies": [("units", "convert them first.")],
                "lessons": [("signs", "minus twice is plus.")],
            },
        ),
        ("1. **Strategy:** Add the tens first.", {"strategies": [("Add the tens first.",) * 2]}),
        ("- Lesson 2: count again - then write.", {"lessons": [("count again", "then write.")]}),
        ("<think>Lesson: no - none.</think>\nLesson: yes - one.", {"lessons": [("yes", "one.")]}),
        ("Lesson: a - one.\nLesson: b - cut off by the li", {"lessons": [("a", "one.")]}),
        ("Lesson: a - without a stop", {"lessons": [("a", "without a stop")]}),
        (
            "### Strategy: Units\n\nCheck the units.",
            {"strategies": [("Units", "Check the units.")]},
        ),
        ("**Lesson: Signs**\n- Look twice.\nGood luck!", {"lessons": [("Signs", "Look twice.")]}),
        ("Lesson: a\nOne.\nLesson: b\nCut off by the li", {"lessons": [("a", "One.")]}),
        ("Lesson: Add the tens.\nThat is all.", {"lessons": [("Add the tens.",) * 2]}),
        ("Strategy: add the tens first", {"strategies": [("add the tens first",) * 2]}),
        ("Strategy：Units：Check them.", {"strategies": [("Units", "Check them.")]}),
        ("Lesson 2： 单位 - 先检查。", {"lessons": [("单位", "先检查。")]}),
        *(
            (
                f"{begin}\nStrategy: bad - thought only.\n{end}\nStrategy: Units - Check units.",
                {"strategies": [("Units", "Check units.")]},
            )
            for begin, end in (
                ("[THINK]", "[/THINK]"),
                ("<reasoning>", "</reasoning>"),
                ("", "</Think>"),
            )
        ),
        ("I would add them.", {}),
        ("", {}),
    ],
)
def test_lines_are_read(reply, wanted):
    found = parse_lines(reply)
    for key in ("strategies", "lessons"):
        items, odd = items_under(found, key, "title", "content")
        assert items == wanted.get(key, []) and not odd
    assert (found is None) == (not wanted)


def test_a_title_without_content_is_counted_and_not_stored():
    found = parse_lines("### Strategy: Units\n### Lesson: Signs\nStrategy: tens - Add them first.")
    assert items_under(found, "strategies", "title", "content") == (
        [("tens", "Add them first.")],
        1,
    )
    assert items_under(found, "lessons", "title", "content") == ([], 1)
    found = parse_lines("New: behavior_units\nRemove: behavior_a\nUpdate: behavior_b\nDo it.")
    writes, removes, odd = decisions(found)
    assert (writes, removes, odd) == ([("behavior_b", "Do it.")], ["behavior_a"], 1)


@pytest.mark.parametrize(
    "reply, cut",
    [
        ("Lesson: a - one.\nLesson: b - cut off by the li", True),
        ("Lesson: a - one.\nLesson: b - two.", False),
        ("Lesson: a - without a stop", False),
        ("Lesson: a\nOne.\nLesson: b\nCut off by the li", True),
        ("Lesson: a\nOne.\nLesson: b\nTwo.", False),
        ("Update: behavior_b - Better.\nRemove: behavior_c", False),
        ('{"lessons": [{"title": "a", "content": "b."}, {"title": "c", "cont', True),
        ('{"lessons": [{"title": "a", "content": "b."}]}', False),
    ],
)
def test_a_reply_that_lost_its_last_item_is_told(reply, cut):
    assert was_cut(reply) == cut


def test_behaviors_in_lines_become_decisions():
    reply = (
        "Behavior: behavior_units - Convert first.\nNew: Check signs - Look twice.\n"
        "Update: behavior_b - Better now.\nRemove: behavior_c."
    )
    writes, removes, odd = decisions(parse_lines(reply))
    assert writes == [
        ("behavior_units", "Convert first."),
        ("behavior_check_signs", "Look twice."),
        ("behavior_b", "Better now."),
    ]
    assert removes == ["behavior_c"] and not odd


@pytest.mark.parametrize(
    "line", ["Remove: behavior_c", "Remove: `behavior_c`", "**Remove: Behavior_c**"]
)
def test_the_last_line_may_remove_a_behavior(line):
    reply = f"**Update: behavior_b** - *Do this first.*\n{line}"
    writes, removes, odd = decisions(parse_lines(reply))
    assert writes == [("behavior_b", "Do this first.")] and removes == ["behavior_c"] and not odd


def test_lines_are_read_in_linear_time():
    start = time.monotonic()
    assert parse_lines("strategy" + " " * 1_000_000 + "x") is None
    assert time.monotonic() - start < 2


def test_a_memory_of_lines_learns(make_memory):
    memory = make_memory(
        lambda prompt: "Lesson: carry - Carry the one." if "Lesson:" in prompt else "nothing",
        forms="question",
        format="lines",
    )
    problem = Question("a", "What is 7 + 5?")
    memory.add_problems([problem])
    memory.record(1, [Attempt("1/a/0", problem, "It is 11.")])
    memory.reflect(1, [problem])
    assert [(i.kind, i.title) for i in memory.living("insight", "a")] == [("lesson", "carry")]
    assert memory.counts().get("reflect_parse_failure", 0) == 0


def test_what_can_not_be_asked_is_refused_before_the_run(make_config):
    for format in ("lines", "guided"):
        with pytest.raises(ValueError, match=f"{format} is for .* reads its own sentences"):
            cfg = make_config(memory_format=format)
            check.check(cfg, PMD, True, 1)
