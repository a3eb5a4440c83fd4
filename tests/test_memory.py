"""Each rule of the memory against something independent: brute force, snapshots, hand-made cases."""

import json

import numpy as np
import pytest
from conftest import Attempt, Question, Script, letters, words
from hypothesis import given, settings
from hypothesis import strategies as st

import memory as mem

P, Q = Question("p", "Apply zo ki to 3 1 7 4"), Question("q", "Apply zo to 5 6 7 8")


def attempts(texts, rewards, problem=P, step=1):
    return [Attempt(f"{step}/{problem.id}/{i}", problem, t, r)
            for i, (t, r) in enumerate(zip(texts, rewards, strict=True))]


def insight_reply(strategies=(), lessons=()):
    return json.dumps({"strategies": [{"title": "rule", "content": s} for s in strategies],
                       "lessons": [{"title": "trap", "content": s} for s in lessons]})


# -- experience ---------------------------------------------------------------------------------------------------------

def test_gate_refuses_near_duplicates_and_counts_them(make_memory):
    memory = make_memory(embed=letters, response_novelty=0.9)
    memory.record(1, attempts(["abc", "abcabc", "xyz"], [1, 1, 1]))  # equal shares of letters: cosine 1
    assert [i.text for i in memory.living("experience", "p")] == ["abc", "xyz"]
    assert memory.counts() == {"experience_duplicate": 1, "success": 3}


def test_successes_and_failures_have_their_own_caps_and_gate(make_memory):
    memory = make_memory(max_successes=5, max_failures=3)
    memory.record(1, attempts([f"win{i}" for i in range(9)] + [f"loss{i}" for i in range(9)], [1] * 9 + [0] * 9))
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
            redundancy = [max([float(table[k] @ table[o]) for o in [*kept, t] if o != k]) for k in kept]
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
    assert [i.id for tier in ("experience", "insight") for i in memory.living(tier, "q")] == before != []


# -- insight ------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("solved, label", [(0, "low"), (2, "low"), (3, "medium"), (5, "medium"), (6, "high"), (9, "high")])
def test_success_fraction_is_the_confidence_signal(solved, label):
    prompt = mem.reflection_prompt(mem.NANO, "x", ["w"], [], solved, 9)
    assert mem.NANO.confidence.format(label=label) in prompt.splitlines()


def test_insights_accumulate_behind_the_gate_and_are_capped(make_memory):
    replies = iter([insight_reply(["alpha"]), insight_reply(["alpha", "beta"]), insight_reply([f"s{i}" for i in range(14)])])
    memory = make_memory(lambda prompt: next(replies), max_insights=10, insight_novelty=0.9)
    for step in (1, 2, 3):
        memory.record(step, attempts([f"win {step} {'xyz'[step - 1] * 3}"], [1], step=step))
        memory.reflect(step, [P])
        if step < 3:
            assert [i.text for i in memory.living("insight", "p")] == ["alpha", "beta"][:step]
    assert len(memory.living("insight", "p")) == 10


def test_prompts_are_cut_until_the_model_can_read_them_and_that_is_counted(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["alpha"]), fits=lambda prompt: len(prompt.split()) < 50, clusters=1)
    memory.add_problems([P, Q])
    memory.record(1, attempts(["short win", "long " * 15, "longer " * 16], [1, 0, 0]) + attempts(["huge " * 99], [0], Q))
    memory.reflect(1, [P, Q])
    first, = memory.generate.prompts  # nothing of Q's only attempt can be read
    assert "short win" in first and "longer" in first and "long long" not in first
    memory.abstract(1)
    assert len(memory.generate.prompts) == 2 and "rule: alpha" in memory.generate.prompts[1]
    assert memory.counts()["reflection_cut"] == 2 and memory.counts()["abstraction_cut"] == 1


def test_a_kind_without_evidence_is_rejected(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["strategy out of a failure"], ["lesson"]))
    memory.record(1, attempts(["loss"], [0]))
    memory.reflect(1, [P])
    assert [i.kind for i in memory.living("insight")] == ["lesson"] and memory.counts()["insight_rejected"] == 1


GOOD = insight_reply(["zo=rev"])


@pytest.mark.parametrize("reply", [
    GOOD, f"```json\n{GOOD}\n```", GOOD + " I hope this helps {you} 100%!", "Sure: " + GOOD, GOOD[:-1],
    GOOD.replace('"}', '",}')])
def test_repairable_replies(reply):
    assert mem.parse_items(mem.parse(reply), "strategies", "title", "content") == [("rule", "zo=rev")]


@pytest.mark.parametrize("reply", [
    "", "no json", "[1, 2]", "{", "{}", '{"strategies": "text"}', '{"strategies": [1, null, []]}',
    '{"strategies": [{"title": 3, "content": "x"}]}', '{"strategies": [{"title": "t"}]}',
    '{"strategies": [{"title": " ", "content": ""}], "lessons": {}}', "{" * 5000, '{"a":' * 5000])
def test_malformed_reflections_yield_nothing_and_are_counted(make_memory, reply):
    memory = make_memory(lambda prompt: reply)
    memory.record(1, attempts(["win"], [1]))
    memory.reflect(1, [P])
    assert memory.living("insight") == [] and memory.counts()["reflect_parse_failure"] == 1


def test_huge_replies_are_bounded():
    many = mem.parse(json.dumps({"strategies": [{"title": "t " * 50, "content": "c" * 5000}] * 10_000}))
    items = mem.parse_items(many, "strategies", "title", "content")
    assert 0 < len(items) <= mem.MAX_ITEMS
    assert all(len(t.split()) <= 10 and len(c) <= mem.MAX_CONTENT for t, c in items)


json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8),
                         lambda x: st.lists(x, max_size=3) | st.dictionaries(
                             st.sampled_from(["strategies", "lessons", "title", "content", "x"]), x, max_size=4),
                         max_leaves=12)


@given(st.one_of(st.text(max_size=80), json_like.map(json.dumps), st.text(alphabet='{}[]",:\\ntrue1%<|>', max_size=60)))
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


# -- behavior -----------------------------------------------------------------------------------------------------------

def behaviors(*pairs):
    return json.dumps({"behaviors": [{"name": n, "instruction": i} for n, i in pairs]})


def actions(*rows):
    return json.dumps({"actions": [dict(zip(("action", "name", "instruction"), r, strict=False)) for r in rows]})


def test_cold_start_then_decisions(make_memory):
    replies = iter([behaviors(("behavior_a", "alpha"), ("behavior_b", "beta"), ("no_prefix", "gamma")),
                    actions(("update", "behavior_a", "delta"), ("remove", "behavior_b"), ("new", "behavior_c", "epsilon"),
                            ("explode", "behavior_d", "zeta"), ("remove", "behavior_unknown"))])
    memory = make_memory(lambda prompt: next(replies), clusters=1)
    memory.add_problems([P, Q])
    memory.record(1, attempts(["win"], [1]))
    memory.abstract(1)
    assert {b.title: b.text for b in memory.living("behavior")} == {"behavior_a": "alpha", "behavior_b": "beta"}
    assert "behavior_" not in memory.generate.prompts[0] and memory.generate.prompts[0].endswith(mem.NANO.cold_start)
    memory.abstract(2)
    assert {b.title: b.text for b in memory.living("behavior")} == {"behavior_a": "delta", "behavior_c": "epsilon"}
    assert "behavior_a: alpha" in memory.generate.prompts[1] and memory.generate.prompts[1].endswith(mem.NANO.decide)
    assert {b.title: b.text for b in memory.as_of(1, "behavior")} == {"behavior_a": "alpha", "behavior_b": "beta"}


def test_clusters_are_summarised_by_insight_and_else_by_experience(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["alpha"]) if "Write strategies" in prompt else "{}", clusters=1)
    memory.add_problems([P, Q])
    memory.record(1, attempts(["win p"], [1]) + attempts(["loss q"], [0], Q))
    memory.reflect(1, [P])
    memory.abstract(1)
    prompt = memory.generate.prompts[-1]
    assert "- rule: alpha" in prompt and "win p" not in prompt and f"{mem.NANO.wrong}\nloss q" in prompt


def test_the_teacher_reads_the_bank_of_the_step_before(make_memory):
    memory = make_memory(lambda prompt: behaviors(("behavior_zo", "zo=rev")), clusters=1)
    memory.add_problems([P])
    rollouts = attempts(["win"], [1])
    memory.record(1, rollouts)
    memory.abstract(1)
    assert memory.contexts(rollouts, 1)[0]["behaviors"] == []
    assert memory.contexts(rollouts, 1, refreshed=True)[0]["behaviors"] == [("behavior_zo", "zo=rev")]
    assert memory.contexts(rollouts, 2)[0]["behaviors"] == [("behavior_zo", "zo=rev")]


def test_retrieval_is_the_top_k_by_cosine():
    rng = np.random.default_rng(0)
    items = [mem.Item(i, "behavior", "behavior", "", f"b{i}", "", embedding=v.astype(np.float32))
             for i, v in enumerate(rng.normal(size=(40, 8)))]
    queries = rng.normal(size=(2, 8))
    for query, found in zip(queries, mem.nearest(queries, items, 3), strict=True):
        ranked = sorted(items, key=lambda i: -sum(float(a) * float(b) for a, b in zip(i.embedding, query, strict=True)))
        assert [i.id for i in found] == [i.id for i in ranked[:3]]


# -- compose ------------------------------------------------------------------------------------------------------------

def test_blocks_are_in_the_papers_order_and_absent_when_empty():
    text = mem.compose("PROBLEM", [("s", "S")], [("l", "L")], [("behavior_b", "B")], "SOLUTION", "FEEDBACK")
    marks = ["PROBLEM", mem.STRATEGIES, "- s: S", mem.LESSONS, "- l: L", mem.BEHAVIORS, "1. behavior_b: B",
             mem.SOLUTION, "SOLUTION", mem.FEEDBACK, "FEEDBACK", mem.CLOSING]
    assert text.splitlines() == marks
    assert mem.compose("PROBLEM") == "PROBLEM"
    assert mem.compose("P", feedback="f").splitlines() == ["P", mem.FEEDBACK, "f", mem.CLOSING]


def test_the_solution_is_not_the_rollouts_own_and_is_the_most_recent(make_memory):
    memory = make_memory()
    rollouts = attempts(["first win", "second way"], [1, 1])
    memory.record(1, rollouts)
    assert [c["solution"] for c in memory.contexts(rollouts, 1)] == ["second way", "first win"]
    alone = attempts(["only win"], [1], Q)
    memory.record(1, alone)
    assert memory.contexts(alone, 1)[0]["solution"] == ""


def test_thoughts_are_not_demonstrated():
    assert "secret" not in mem.compose("P", solution="<think>secret\n</think>answer") and "answer" in mem.compose(
        "P", solution="<think>secret\n</think>answer")


def test_tiers_hide_blocks(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["alpha"]) if "Write strategies" in prompt else
                         behaviors(("behavior_x", "beta")), clusters=1)
    memory.add_problems([P])
    memory.record(1, attempts(["win"], [1]))
    memory.reflect(1, [P])
    memory.abstract(1)
    other = attempts(["loss"], [0], step=2)
    seen = {tiers: {k for k, v in memory.contexts(other, 2, tiers)[0].items() if v} for tiers in (
        ("experience",), ("insight",), ("behavior",), ("experience", "insight", "behavior"))}
    assert list(seen.values()) == [{"solution"}, {"strategies"}, {"behaviors"}, {"solution", "strategies", "behaviors"}]


@given(st.integers(1, 60))
def test_the_budget_cuts_in_the_stated_order_and_the_solution_last(budget):
    context = {"strategies": [("s", "one"), ("s", "two")], "lessons": [("l", "three")],
               "behaviors": [("b", "four"), ("b", "five")], "solution": "SOLVED", "feedback": "FED"}
    text = mem.compose_within(budget, lambda t: len(t.split()), "PROBLEM", **context)
    assert text.startswith("PROBLEM") and (len(text.split()) <= budget or text == "PROBLEM")
    kept = [any(w in text for w in block) for block in (("four",), ("three",), ("one",), ("FED",), ("SOLVED",))]
    assert kept == sorted(kept)  # what gives way first is never kept while a later one is gone


@given(st.lists(st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "</s>", "<|im_", "start|>", "<", " ", "a", "%s", "{0}"]), max_size=12))
def test_control_tokens_are_broken(pieces):
    control = ["<|im_start|>", "<|im_end|>", "</s>"]
    text = mem.neutralise("".join(pieces), control)
    assert not any(t in text for t in control)
    assert text.replace(" ", "") == "".join(pieces).replace(" ", "")


# -- grounding ----------------------------------------------------------------------------------------------------------

WIN, LOSS = "3 1 7 4 zo zo=rev 4 7 1 3 ki ki=inc 5 8 2 4", "3 1 7 4 zo zo=rev 4 7 1 3 ki ki=dec 3 6 0 2"


def test_grounded_reflection_reads_one_attempt_at_a_time_until_an_insight_came_from_it(make_memory):
    answered = iter(["garbage", insight_reply([], ["zo!rev ki!dec"]), insight_reply(["zo=rev", "ki=inc"])])
    memory = make_memory(lambda prompt: next(answered), ground_insights=True)
    memory.record(1, attempts([WIN, LOSS], [1, 0]))
    memory.reflect(1, [P])
    assert [(WIN in p, LOSS in p) for p in memory.generate.prompts] == [(True, False), (False, True)]
    memory.reflect(2, [P])  # the win again: the first reply gave nothing
    assert len(memory.generate.prompts) == 3 and WIN in memory.generate.prompts[2]
    memory.reflect(3, [P])
    assert len(memory.generate.prompts) == 3
    assert {i.text for i in memory.living("insight")} == {"zo=rev", "ki=inc", "zo!rev ki!dec"}


def test_an_insight_must_be_contained_in_its_evidence(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["zo=rev", "ki=swap", "no key term"]), ground_insights=True)
    memory.record(1, attempts([WIN], [1]))
    memory.reflect(1, [P])
    assert [i.text for i in memory.living("insight")] == ["zo=rev"] and memory.counts()["insight_rejected"] == 2


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


# -- time and the file --------------------------------------------------------------------------------------------------

def test_every_past_state_can_be_read_and_returned_to(make_memory):
    rng = np.random.default_rng(0)
    bank = iter(range(10_000))
    memory = make_memory(lambda prompt: insight_reply([f"s{next(bank)}"], [f"l{next(bank)}"]) if "JSON" in prompt
                         and "behaviors" not in prompt else behaviors((f"behavior_{next(bank)}", f"i{next(bank)}")),
                         max_successes=2, max_failures=2, max_insights=3, max_behaviors=2, clusters=2)
    memory.add_problems([P, Q])

    def state():
        return [(i.id, i.text) for t in ("experience", "insight", "behavior") for i in memory.living(t)], memory.counts()

    states = {0: state()}
    for step in range(1, 9):
        memory.record(step, attempts([f"w{rng.integers(99)}", f"w{rng.integers(99)}"], rng.integers(0, 2, 2), step=step)
                      + attempts([f"w{rng.integers(99)}"], [1], Q, step))
        memory.reflect(step, [P, Q])
        memory.abstract(step)
        states[step] = state()
    for step in range(8, -1, -1):
        past = [(i.id, i.text) for tier in ("experience", "insight", "behavior") for i in memory.as_of(step, tier)]
        assert past == states[step][0]
    for step in (5, 5, 2, 0):
        memory.truncate_after(step)
        assert state() == states[step]


def test_provenance(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["alpha"]))
    memory.record(4, attempts(["win"], [1], step=4))
    memory.reflect(4, [P])
    experience, insight = memory.living("experience")[0], memory.living("insight")[0]
    assert experience.sources == ["4/p/0"] and insight.sources == [experience.id]
    assert insight.born == 4 and insight.policy_step == 3 and insight.ended is None


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "x.db").write_text("not a database, " * 100)
    with pytest.raises(ValueError, match="x.db can't be used as a memory"):
        mem.Memory(tmp_path / "x.db", words, Script())
    mem.Memory(tmp_path / "y.db", words, Script(), embedder="one").close()
    with pytest.raises(ValueError, match="'one'.*'two'"):
        mem.Memory(tmp_path / "y.db", words, Script(), embedder="two")


def test_it_is_readable(make_memory):
    memory = make_memory(lambda prompt: insight_reply(["alpha"]) if "strategies" in prompt else
                         behaviors(("behavior_x", "beta")), clusters=1)
    memory.add_problems([P])
    memory.record(1, attempts(["the win"], [1]))
    memory.reflect(1, [P])
    memory.abstract(1)
    shown = mem.describe(memory, "p")
    assert all(w in shown for w in ("the win", "alpha", "behavior_x: beta", "solved in 1 of 1")), shown
    assert memory.sizes() == {"experience": 1, "insight": 1, "behavior": 1}
