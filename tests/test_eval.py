"""Estimators against enumeration, the verifier against the world that made the answers, files against their errors."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import SCIKNOWEVAL, Problem, avg_at_k, best_at_k, interval, load_task, maj_at_k, read_problems, verify
from nano import make
from report import plot_curves


@given(st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
def test_best_at_k_is_the_mean_over_all_subsets(rewards, k):
    brute = np.mean([[max(subset) for subset in itertools.combinations(row, k)] for row in rewards])
    assert best_at_k(rewards, k) == pytest.approx(brute)
    assert avg_at_k(rewards) == pytest.approx(best_at_k(rewards, 1))


@given(st.lists(st.sampled_from("ABC"), min_size=4, max_size=4), st.sampled_from("ABC"))
def test_maj_at_k_is_the_mean_over_tie_breaks(answers, gold):
    rewards = [[float(a == gold) for a in answers]]
    most = max(answers.count(a) for a in answers)
    winners = [a for a in "ABC" if answers.count(a) == most]
    assert maj_at_k(rewards, [answers]) == pytest.approx(np.mean([w == gold for w in winners]))


def test_interval_is_the_normal_one_where_that_is_right():
    values = np.random.default_rng(0).binomial(8, 0.4, 400) / 8
    low, high = interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_curves_are_drawn(tmp_path):
    rows = [{"step": 0, "split": "test", "avg_at_k": 0.1, "interval": [0.05, 0.2]}, {"step": 1, "reward": 0.0},
            {"step": 10, "split": "test", "avg_at_k": 0.6, "interval": interval([0.6])}]
    plot_curves({"pmd": rows}, tmp_path / "c.png", "t")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


# -- the embedded world -------------------------------------------------------------------------------------------------

def problem(row):
    known = {k: row[k] for k in ("id", "prompt", "answer", "verifier")}
    return Problem(**known)


def test_verdicts_on_every_problem_of_a_world():
    train, test = make.make_world(5)
    for row in train + test:
        name, digits = row["prompt"].split(" to ")[0].split()[1:], list(map(int, row["prompt"].split()[-4:]))
        truth = [pair.split("=")[1] for pair in row["hidden"].split()]
        right = make.attempt_text(name, truth, digits)
        assert verify(problem(row), right).reward == 1
        for i, op in itertools.product(range(len(name)), make.OPERATIONS):
            other = [*truth[:i], op, *truth[i + 1:]]
            digits_agree = make.attempt_text(name, other, digits).split() != right.split() and [
                w for w in make.attempt_text(name, other, digits).split() if "=" not in w] == [
                w for w in right.split() if "=" not in w]
            assert verify(problem(row), make.attempt_text(name, other, digits)).reward == (op == truth[i] or digits_agree)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_no_other_text_passes(text):
    row = {"id": "x", "prompt": "Apply zo to 1 2 3 4", "answer": "1 2 3 4 zo zo=* 4 3 2 1", "verifier": "steps"}
    words = text.split()
    passes = len(words) == 10 and words[:5] == "1 2 3 4 zo".split() and words[6:] == "4 3 2 1".split() \
        and words[5].startswith("zo=")
    assert verify(problem(row), text).reward == float(passes)
    assert verify(problem(row), row["answer"]).reward == 1


def test_worlds_share_what_they_should_and_hide_what_they_should():
    worlds = [make.make_world(s) for s in range(4)]
    assert json.dumps(worlds[0]) == json.dumps(make.make_world(0))
    secrets = []
    for train, test in worlds:
        inputs = [{r["prompt"] for r in split} for split in (train, test)]
        assert len(inputs[0]) == len(inputs[1]) == 160 and not inputs[0] & inputs[1]
        names = [{r["prompt"].split(" to ")[0] for r in split} for split in (train, test)]
        assert names[0] == names[1] and len(names[0]) == 40  # the test asks of known names about new digits
        secret = dict(p.split("=") for r in train for p in r["hidden"].split())
        assert len(secret) == 24 and all(r["hidden"] not in r["prompt"] for r in train)
        assert all(sum(s in n.split() for n in names[0]) >= 2 for s in secret)  # every syllable is shared
        chance = np.mean([8.0 ** -len(r["hidden"].split()) for r in test])
        assert 0.02 < chance < 0.10
        secrets.append(secret)
    assert len({json.dumps(s, sort_keys=True) for s in secrets}) == 4


def test_the_shipped_world_is_the_one_its_seed_makes():
    for split, rows in zip(("train", "test"), make.make_world(0), strict=True):
        shipped = (make.HERE / "worlds" / "0" / f"{split}.jsonl").read_text().splitlines()
        assert shipped == [json.dumps(row) for row in rows]


# -- files --------------------------------------------------------------------------------------------------------------

ROW = {"id": "1", "prompt": "p", "answer": "7", "verifier": "last_number"}


@pytest.mark.parametrize("line, message", [
    ("{not json", "line 2 is not JSON"), ("[1]", "line 2 is not a JSON object"),
    (json.dumps({"id": "2", "prompt": "p"}), "line 2: answer and verifier must be given"),
    (json.dumps({**ROW, "id": 7}), "line 2: id must be given, as text"),
    (json.dumps({**ROW, "id": "2", "verifier": "magic"}), "line 2: no verifier 'magic'"),
    (json.dumps({**ROW, "id": "2", "answer": "seven"}), "line 2: the answer 'seven' is no number"),
    (json.dumps({**ROW, "id": "2", "system": 5}), "line 2: system must be given, as text"),
    (json.dumps(ROW), "line 2 repeats the id '1' of line 1"), (json.dumps({**ROW, "id": "2"})[:-9], "line 2 is not JSON"),
    ("[" * 100_000, "line 2 is not JSON"), ('{"id": "\udcff"}', "line 2 is not JSON: 'utf-8' codec can't decode")])
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_bytes((json.dumps(ROW) + "\n" + line + "\n").encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"t.jsonl, {message}") as caught:
        read_problems(tmp_path / "t.jsonl")
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files_and_unknown_tasks(tmp_path):
    with pytest.raises(ValueError, match="no task 'chess'"):
        load_task("chess")
    with pytest.raises(ValueError, match="make.py world --seed 987"):
        load_task("nano/987")
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(ValueError, match="test.jsonl does not exist"):
        load_task(str(tmp_path))
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="test.jsonl holds no problem"):
        load_task(str(tmp_path))
    with pytest.raises(ValueError, match="dev=1.5"):
        load_task("nano", dev=1.5)


def sciknoweval(**changes):
    row = {"idx": 3, "answer": "B", "prompt": "Which?\u2028\n\nA: this\nB: that\nPlease reason step by step.", "system": "S"}
    return json.dumps({**row, **changes}, ensure_ascii=False) + "\n"


def test_sciknoweval_files(tmp_path, monkeypatch):
    monkeypatch.setitem(SCIKNOWEVAL, "physics", (2, 1))
    (tmp_path / "physics").mkdir()
    (tmp_path / "physics/train.json").write_text(sciknoweval() + sciknoweval(idx=4, answer="A"))
    (tmp_path / "physics/test.json").write_text(sciknoweval(idx=5))
    task = load_task("sciknoweval/physics", dev=0, data=str(tmp_path))
    assert [(p.id, p.answer, p.system) for p in task.train] == [("3", "B", "S"), ("4", "A", "S")]
    assert task.test[0].verifier == "choice"
    (tmp_path / "physics/test.json").write_text(sciknoweval(answer="C"))
    with pytest.raises(ValueError, match="test.json, line 1: the answer key 'C' is none of the options A, B"):
        load_task("sciknoweval/physics", data=str(tmp_path))
    (tmp_path / "physics/test.json").write_text("\n\n" + sciknoweval(answer="C"))
    with pytest.raises(ValueError, match="test.json, line 3: the answer key 'C'"):  # blank lines are lines
        load_task("sciknoweval/physics", data=str(tmp_path))
    (tmp_path / "physics/test.json").write_text(sciknoweval() + sciknoweval(idx=5)[:-9])
    with pytest.raises(ValueError, match="test.json, line 2 is not JSON"):
        load_task("sciknoweval/physics", data=str(tmp_path))
    for key in ("idx", "prompt", "answer", "system"):
        (tmp_path / "physics/test.json").write_text(sciknoweval(**{key: None}))
        with pytest.raises(ValueError, match=f"test.json, line 1: {key} must be given"):
            load_task("sciknoweval/physics", data=str(tmp_path))
    with pytest.raises(ValueError, match="needs --data.*nowhere/physics is none"):
        load_task("sciknoweval/physics", data="nowhere")


SHARED = make.HERE.parent.parent / "shared" / "data" / "sciknoweval"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published SciKnowEval files are not part of this repository")
@pytest.mark.parametrize("domain, sizes", [("biology", (450, 50)), ("chemistry", (1890, 210)), ("material", (841, 94)),
                                           ("physics", (720, 80))])
def test_the_published_splits(domain, sizes):
    task = load_task(f"sciknoweval/{domain}", dev=0, data=str(SHARED))
    assert (len(task.train), len(task.test)) == sizes
    for p in task.train + task.test:
        assert verify(p, f"<reasoning>r</reasoning>\n<answer>\n{p.answer}\n</answer>").reward == 1
        assert verify(p, "<answer>Z</answer>").reward == 0


def test_dev_is_held_out_of_train():
    task, whole = load_task("nano"), load_task("nano", dev=0)
    assert len(task.dev) == 16 and len(task.train) == 144 and whole.dev == []
    assert {p.id for p in task.dev} | {p.id for p in task.train} == {p.id for p in whole.train}
    assert not {p.id for p in task.dev} & {p.id for p in task.train}
    assert task.dev == load_task("nano").dev and task.test == whole.test


@pytest.mark.parametrize("text, right", [
    ("<reasoning>x</reasoning>\n<answer>\nB\n</answer>", 1), ("B", 1), ("<answer>B", 1), ("B</answer>", 1), (" B\n", 1),
    ("<answer>A</answer> no, <answer>B</answer> I think", 1), ("<answer>B</answer><answer>A</answer>", 0), ("b", 0),
    ("B.", 0), ("(B)", 0), ("**B**", 0), ("B: 1.4", 0), ("\\boxed{B}", 0), ("", 0), ("The answer is B", 0)])
def test_multiple_choice_follows_the_published_rule(text, right):
    assert verify(Problem("1", "p", "B", "choice"), text).reward == right


@pytest.mark.parametrize("text, right", [
    ("3 + 4 = 7", 1), ("**7**.", 1), ("7.0", 1), ("7 of 9", 0), ("", 0), ("17", 0), ("-7", 0), ("so 7", 1), ("0x7", 1)])
def test_last_number(text, right):
    assert verify(Problem("1", "p", "7", "last_number"), text).reward == right


def test_parquet_files_are_read_like_json_lines(tmp_path):
    """Written by pyarrow; rows of different keys, which Parquet fills with nulls."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": "a", "prompt": "1 + 1", "answer": "2", "verifier": "last_number"},
            {"id": "b", "prompt": "2 + 2", "answer": "4", "verifier": "last_number", "level": 3}]
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([r | {"level": r.get("level")} for r in rows]),
                                    tmp_path / f"{split}.parquet")
    task = load_task(str(tmp_path), dev=0)
    assert [p.id for p in task.train] == ["a", "b"] and [p.extra for p in task.test] == [{}, {"level": 3}]
    (tmp_path / "test.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match="test.parquet can't be read as Parquet"):
        load_task(str(tmp_path))
