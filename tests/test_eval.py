"""Estimators against enumeration, the verifier against the world that made the answers, files
against their errors.
"""

import itertools
import json
import time
from decimal import Context, Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Attempt, Question
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import Answers, avg_at_k, best_at_k, evaluate, headroom, interval, maj_at_k
from nano import make, world
from runtime.tables import plot_curves
from tasks import load_task
from tasks.problem import MAX_FEEDBACK, SUCCESS, Problem, Verdict
from tasks.reading import read_problems
from tasks.sciknoweval import SCIKNOWEVAL
from tasks.verdicts import VERIFIERS, verify, verify_all


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(1, 5),
)
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


@pytest.mark.parametrize(
    "rewards", [[], [[]], [[1, 0], [1]], [[float("nan"), 1.0]], [[2.0, 0.0]], [[-1, 0]]]
)
def test_rewards_that_are_no_table_are_refused(rewards):
    answers = [["a"] * len(row) for row in rewards]
    for estimate in (
        lambda: avg_at_k(rewards),
        lambda: best_at_k(rewards, 1),
        lambda: maj_at_k(rewards, answers),
        lambda: headroom(rewards, answers),
    ):
        with pytest.raises(ValueError, match="reward"):
            estimate()


@pytest.mark.parametrize("k", [0, -1, 3, 1.5, float("nan")])
def test_best_of_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match="2 samples of each problem"):
        best_at_k([[1, 0]], k)


@st.composite
def answered(draw):
    """(rewards, answers) of two problems, five samples each, where samples of one answer may differ
    in reward.
    """
    rows = [
        draw(
            st.lists(
                st.tuples(
                    st.sampled_from(["", "7", "B", "B."]),
                    st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]),
                ),
                min_size=5,
                max_size=5,
            )
        )
        for _ in range(2)
    ]
    return [[reward for _, reward in row] for row in rows], [
        [said for said, _ in row] for row in rows
    ]


@given(answered())
@settings(max_examples=300, deadline=None)
def test_the_estimators_agree_with_reward(data):
    """Against brute force: an answer is drawn among the most frequent ones, then a sample that gave
    it.
    """
    rewards, answers = data
    brute = []
    for row, said in zip(rewards, answers, strict=True):
        most = max(said.count(a) for a in said)
        brute.append(
            np.mean(
                [
                    np.mean([r for r, b in zip(row, said, strict=True) if a == b])
                    for a in set(said)
                    if said.count(a) == most
                ]
            )
        )
    assert maj_at_k(rewards, answers) == pytest.approx(np.mean(brute))
    assert np.all(headroom(rewards, answers) >= -1e-12)
    for k in range(1, 6):
        subsets = [
            [any(r >= SUCCESS for r in subset) for subset in itertools.combinations(row, k)]
            for row in rewards
        ]
        assert best_at_k(rewards, k) == pytest.approx(np.mean(subsets))
    for n in range(5):
        one, said = [[row[n]] for row in rewards], [[row[n]] for row in answers]
        assert maj_at_k(one, said) == pytest.approx(avg_at_k(one))
        assert best_at_k(one) == np.mean([row[0] >= SUCCESS for row in one])
    for same in (0.0, 1.0):
        everyone = [[same] * 5] * 2
        assert avg_at_k(everyone) == maj_at_k(everyone, answers) == best_at_k(everyone) == same
        assert not headroom(everyone, answers).any()


REPLIES = {
    "last_number": (
        "0.5",
        ["1/2", ".5", "0.50", "5e-1", "\\frac{1}{2}", "50%", "2", "2.0", "none", "1,2", "x2"],
    ),
    "choice": ("B", ["B", " B\n", "(B)", "b", "<answer>B", "A", "The answer is B", "not B", ""]),
    "steps": (
        "1 2 zo zo=* 2 1",
        [
            "1 2 zo zo=left 2 1",
            "1 2 zo zo=right 2 1",
            "1  2 zo zo= 2 1",
            "1 2 zo 2 1",
            "1 2 2 1",
            "1 2 zo na=left 2 1",
            "1 2 zo zo=left 1 2",
            "1 2 zo=left zo 2 1",
            "",
        ],
    ),
}


@pytest.mark.parametrize("verifier", REPLIES)
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_what_votes_together_is_rewarded_alike(verifier, data):
    """So that the reward of a majority is that of each of its samples."""
    key, replies = REPLIES[verifier]
    found = [
        verify(Problem("x", "q", key, verifier), data.draw(st.sampled_from(replies)), lenient)
        for lenient in (False, True)
        for _ in range(4)
    ]
    for a, b in itertools.combinations(found[:4], 2):
        assert a.reward == b.reward or a.answer != b.answer
    for a, b in itertools.combinations(found[4:], 2):
        assert a.reward == b.reward or a.answer != b.answer
    for a, b in itertools.product(found, found):  # all that is right votes together
        assert not (a.reward and b.reward) or a.answer == b.answer


def test_a_success_is_the_same_for_memory_and_estimators(make_memory):
    """A reward of 0.5 is one, as in SDPO's code."""
    memory, rewards = make_memory(), [0.0, 0.49, 0.5, 1.0]
    for i, reward in enumerate(rewards):
        memory.record(1, [Attempt(str(i), Question(str(i), "x"), f"text {i}", reward)])
    kinds = [memory.living("experience", str(i))[0].kind for i in range(4)]
    assert kinds == ["failure", "failure", "success", "success"]
    assert [best_at_k([[reward]]) for reward in rewards] == [0, 0, 1, 1]


def test_the_interval_of_nano_is_over_names():
    """Ten problems about each of six names, which are all solved or none."""
    ids = [f"{name}-{i}" for name in "abcdef" for i in range(10)]
    rewards = np.repeat([[1.0], [0.0]] * 3, 10, axis=0)
    answers = Answers(ids, rewards, [[""]] * 60, np.ones((60, 1)))
    low, high = answers.estimates("nano")["interval"]
    assert answers.estimates("nano/plain")["interval"] == (low, high)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 6), rel=0.2)
    low, high = answers.estimates("other")["interval"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 60), rel=0.2)


def test_the_estimates_of_one_problem():
    """Two of three samples are right and agree: a perfect choice adds nothing to their vote."""
    answers = Answers(["a-1"], np.array([[1.0, 1.0, 0.0]]), [["x", "x", "y"]], np.ones((1, 3)))
    found = answers.estimates("nano")
    assert found["avg_at_k"] == pytest.approx(2 / 3) and found["interval"] is None
    assert (found["best_at_k"], found["maj_at_k"], found["headroom"]) == (1, 1, 0)


def test_an_evaluation_samples_as_its_flags_say(make_config):
    asked = []
    sampler = SimpleNamespace(answer=lambda *args: asked.append(args) or [])
    cfg = make_config(eval_k=3, eval_temperature=0.7, eval_top_p=0.8)
    assert evaluate(sampler, [], cfg, "dev", ["text"]) == []
    assert asked == [([], 3, "dev", 0.7, 0.8, ["text"])]


def test_interval_is_the_normal_one_where_that_is_right():
    values = np.random.default_rng(0).binomial(8, 0.4, 400) / 8
    low, high = interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_curves_are_drawn(tmp_path):
    rows = [
        {"step": 0, "split": "test", "avg_at_k": 0.1, "interval": [0.05, 0.2]},
        {"step": 1, "reward": 0.0},
        {"step": 10, "split": "test", "avg_at_k": 0.6, "interval": interval([0.6])},
    ]
    plot_curves({"pmd": rows}, tmp_path / "c.png", "t")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    for name in (r"$\frac$", "_mine", "one $", r"a\$b$"):  # formulas that are none
        plot_curves({name: rows}, tmp_path / "d.png", name)
        assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "d.png").unlink()


# -- the embedded world


def problem(row):
    known = {k: row[k] for k in ("id", "prompt", "answer", "verifier")}
    return Problem(**known)


def test_verdicts_on_every_problem_of_a_world():
    train, test = world.make_world(5)
    for row in train + test:
        name, digits = (
            row["prompt"].split(" to ")[0].split()[1:],
            list(map(int, row["prompt"].split()[-4:])),
        )
        truth = [pair.split("=")[1] for pair in row["hidden"].split()]
        right = world.attempt_text(name, truth, digits)
        assert verify(problem(row), right).reward == 1
        for i, op in itertools.product(range(len(name)), world.OPERATIONS):
            other = [*truth[:i], op, *truth[i + 1 :]]
            digits_agree = world.attempt_text(name, other, digits).split() != right.split() and [
                w for w in world.attempt_text(name, other, digits).split() if "=" not in w
            ] == [w for w in right.split() if "=" not in w]
            assert verify(problem(row), world.attempt_text(name, other, digits)).reward == (
                op == truth[i] or digits_agree
            )


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_no_other_text_passes(text):
    row = {
        "id": "x",
        "prompt": "Apply zo to 1 2 3 4",
        "answer": "1 2 3 4 zo zo=* 4 3 2 1",
        "verifier": "steps",
    }
    words = text.split()
    passes = (
        len(words) == 10
        and words[:5] == "1 2 3 4 zo".split()
        and words[6:] == "4 3 2 1".split()
        and words[5].startswith("zo=")
    )
    assert verify(problem(row), text).reward == float(passes)
    assert verify(problem(row), row["answer"]).reward == 1


def test_worlds_share_what_they_should_and_hide_what_they_should():
    worlds = [world.make_world(s) for s in range(4)]
    assert json.dumps(worlds[0]) == json.dumps(world.make_world(0))
    secrets = []
    for train, test in worlds:
        inputs = [{r["prompt"] for r in split} for split in (train, test)]
        assert len(inputs[0]) == len(inputs[1]) == 160 and not inputs[0] & inputs[1]
        names = [{r["prompt"].split(" to ")[0] for r in split} for split in (train, test)]
        # the test asks of known names about new digits
        assert names[0] == names[1] and len(names[0]) == 40
        secret = dict(p.split("=") for r in train for p in r["hidden"].split())
        assert len(secret) == 24 and all(r["hidden"] not in r["prompt"] for r in train)
        # every syllable is shared
        assert all(sum(s in n.split() for n in names[0]) >= 2 for s in secret)
        chance = np.mean([8.0 ** -len(r["hidden"].split()) for r in test])
        assert 0.02 < chance < 0.10
        secrets.append(secret)
    assert len({json.dumps(s, sort_keys=True) for s in secrets}) == 4


def test_the_shipped_world_is_the_one_its_seed_makes():
    for split, rows in zip(("train", "test"), world.make_world(0), strict=True):
        shipped = (make.HERE / "worlds" / "0" / f"{split}.jsonl").read_text().splitlines()
        assert shipped == [json.dumps(row) for row in rows]


# -- files

ROW = {"id": "1", "prompt": "p", "answer": "7", "verifier": "last_number"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        (json.dumps({"id": "2", "prompt": "p"}), "line 2: answer and verifier must be given"),
        (json.dumps({**ROW, "id": 7}), "line 2: id must be given, as text"),
        (json.dumps({**ROW, "id": "2", "verifier": "magic"}), "line 2: no verifier 'magic'"),
        (
            json.dumps({**ROW, "id": "2", "answer": "seven"}),
            "line 2: the answer 'seven' is no number",
        ),
        (json.dumps({**ROW, "id": "2", "system": 5}), "line 2: system must be given, as text"),
        (json.dumps(ROW), "line 2 repeats the id '1' of line 1"),
        (json.dumps({**ROW, "id": "2"})[:-9], "line 2 is not JSON"),
        (json.dumps({**ROW, "id": " "}), "line 2: id must be given"),
        (json.dumps({**ROW, "answer": "\n"}), "line 2: answer must be given"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"id": "\udcff"}', "line 2 is not JSON: 'utf-8' codec can't decode"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_bytes(
        (json.dumps(ROW) + "\n" + line + "\n").encode(errors="surrogateescape")
    )
    with pytest.raises(ValueError, match=f"t.jsonl, {message}") as caught:
        read_problems(tmp_path / "t.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "verifier, answer",
    [
        *(
            ("choice", a)
            for a in (
                " B",
                "B ",
                "\nB",
                "B\n",
                "\u00a0B",
                "\u3000B",
                "</answer>",
                "B</answer>",
                "<answer>B",
            )
        ),
        *(
            ("last_number", a)
            for a in (
                "seven",
                "about 7",
                "7 kg",
                "7kg",
                "50%",
                "$5",
                "12,34",
                "1.234.567",
                "2^10",
                "10:30",
                "nan",
                "inf",
                "1e999999999",
                "1e401",
                "5/0",
                "3-4",
                " 7",
                "7 ",
                "-",
                ".",
                "--7",
                "x2",
                "1,2",
                "9" * 500,
            )
        ),
    ],
)
def test_a_key_that_no_reply_can_match_is_refused(tmp_path, verifier, answer):
    rows = [ROW, {**ROW, "id": "2", "verifier": verifier, "answer": answer}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match="t.jsonl, line 2: the answer .* (is no number|can't be matched)"
    ) as caught:
        read_problems(tmp_path / "t.jsonl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "verifier, answer",
    [
        *(("choice", a) for a in ("B", "b", "Paris", "the answer", "A\nB", "\uff22")),
        *(
            ("last_number", a)
            for a in (
                "7",
                "-7",
                "+7",
                "\u22127",
                "007",
                ".5",
                "-.5",
                "5.",
                "1,234",
                "1,234,567.5",
                "1e3",
                "1.5E-3",
                "3/4",
                "-3/4",
                "1 3/4",
                "10^6",
                "1{,}234",
                "\uff11\uff12",
                "123456789012345678901234567890",
            )
        ),
        *(("steps", a) for a in ("1 2 zo zo=* 2 1", "a", " a  b ", "a=b")),
    ],
)
def test_a_key_that_is_read_can_be_matched_strictly_and_leniently(tmp_path, verifier, answer):
    (tmp_path / "t.jsonl").write_text(
        json.dumps({**ROW, "verifier": verifier, "answer": answer}) + "\n"
    )
    (problem,) = read_problems(tmp_path / "t.jsonl")
    ideal = f"<answer>{answer}</answer>" if verifier == "choice" else answer
    assert verify(problem, ideal).reward == verify(problem, ideal, lenient=True).reward == 1


def test_keys_of_a_verifier_of_ones_own_are_its_own_affair(tmp_path, monkeypatch):
    """Also where it replaces one of ours."""
    for name in ("mine", "choice"):
        monkeypatch.setitem(VERIFIERS, name, lambda problem, completion: Verdict(0.0, ""))
        (tmp_path / "t.jsonl").write_text(
            json.dumps({**ROW, "verifier": name, "answer": " B"}) + "\n"
        )
        assert read_problems(tmp_path / "t.jsonl")[0].answer == " B"


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "half \ud83d"},
        {"prompt": "half \ud83d"},
        {"answer": "\ude00"},
        {"system": "\ud83d"},
        {"verifier": "\ud83d"},
        {"note": "\ud83d"},
        {"note": ["a", {"b": "\ud83d"}]},
        {"note": {"\ud83d": 1}},
        {"\ud83d": 1},
        {"verifier": "code", "inputs": ["\ud83d"], "outputs": ["1"]},
        {"verifier": "code", "inputs": ["1"], "outputs": ["\ud83d"]},
        {"id": "a\0"},
        {"prompt": "a\0"},
        {"answer": "\0"},
        {"system": "\0"},
    ],
)
def test_text_that_no_file_can_hold_is_refused_by_line(tmp_path, changes):
    (tmp_path / "t.jsonl").write_text(
        json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "id": "2", **changes}) + "\n"
    )
    with pytest.raises(
        ValueError, match="t.jsonl, line 3: .* holds (half a surrogate pair|the character NUL)"
    ) as caught:
        read_problems(tmp_path / "t.jsonl")
    str(caught.value).encode()


def test_whole_characters_are_none_of_that(tmp_path):
    """JSON's escapes for them are two halves."""
    (tmp_path / "t.jsonl").write_text(
        json.dumps({**ROW, "prompt": "\U0001f600", "note": "a\0"}) + "\n"
    )
    assert "\\ud83d\\ude00" in (tmp_path / "t.jsonl").read_text()
    assert read_problems(tmp_path / "t.jsonl")[0].prompt == "\U0001f600"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    (tmp_path / "t.jsonl").write_bytes(
        (json.dumps(ROW) + "\n" + json.dumps({**ROW, "id": "2"}) + "\n").encode(encoding)
    )
    with pytest.raises(
        ValueError,
        match="t.jsonl is not in UTF-8 but, it seems, in UTF-16 or UTF-32; save it as UTF-8",
    ):
        read_problems(tmp_path / "t.jsonl")


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08\x00", b"PK\x03\x04"])
def test_a_compressed_file_is_named(tmp_path, start):
    (tmp_path / "train.jsonl").write_bytes(start + b"\0" * 9)
    with pytest.raises(ValueError, match="train.jsonl is compressed; unpack it"):
        read_problems(tmp_path / "train.jsonl")


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
    row = {
        "idx": 3,
        "answer": "B",
        "prompt": "Which?\u2028\n\nA: this\nB: that\nPlease reason step by step.",
        "system": "S",
    }
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
    with pytest.raises(
        ValueError, match="test.json, line 1: the answer key 'C' is none of the options A, B"
    ):
        load_task("sciknoweval/physics", data=str(tmp_path))
    (tmp_path / "physics/test.json").write_text("\n\n" + sciknoweval(answer="C"))
    # blank lines are lines
    with pytest.raises(ValueError, match="test.json, line 3: the answer key 'C'"):
        load_task("sciknoweval/physics", data=str(tmp_path))
    (tmp_path / "physics/test.json").write_text(sciknoweval() + sciknoweval(idx=5)[:-9])
    with pytest.raises(ValueError, match="test.json, line 2 is not JSON"):
        load_task("sciknoweval/physics", data=str(tmp_path))
    half = {"prompt": "Half \ud83d?\n\nA: this\nB: that"}  # `datasets` names no line for it
    (tmp_path / "physics/test.json").write_text(
        sciknoweval() + "\n" + json.dumps(json.loads(sciknoweval(idx=5)) | half)
    )
    with pytest.raises(ValueError, match="test.json, line 3: 'prompt' holds half a surrogate pair"):
        load_task("sciknoweval/physics", data=str(tmp_path))
    for key in ("idx", "prompt", "answer", "system"):
        (tmp_path / "physics/test.json").write_text(sciknoweval(**{key: None}))
        with pytest.raises(ValueError, match=f"test.json, line 1: {key} must be given"):
            load_task("sciknoweval/physics", data=str(tmp_path))
    with pytest.raises(ValueError, match="needs --data.*nowhere/physics is none"):
        load_task("sciknoweval/physics", data="nowhere")


SHARED = make.HERE.parent.parent / "shared" / "data" / "sciknoweval"


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the published SciKnowEval files are not part of this repository"
)
@pytest.mark.parametrize(
    "domain, sizes",
    [
        ("biology", (450, 50)),
        ("chemistry", (1890, 210)),
        ("material", (841, 94)),
        ("physics", (720, 80)),
    ],
)
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


@pytest.mark.parametrize(
    "text, right",
    [
        ("<reasoning>x</reasoning>\n<answer>\nB\n</answer>", 1),
        ("B", 1),
        ("<answer>B", 1),
        ("B</answer>", 1),
        (" B\n", 1),
        ("<answer>A</answer> no, <answer>B</answer> I think", 1),
        ("<answer>B</answer><answer>A</answer>", 0),
        ("b", 0),
        ("B.", 0),
        ("(B)", 0),
        ("**B**", 0),
        ("B: 1.4", 0),
        ("\\boxed{B}", 0),
        ("", 0),
        ("The answer is B", 0),
    ],
)
def test_multiple_choice_follows_the_published_rule(text, right):
    assert verify(Problem("1", "p", "B", "choice"), text).reward == right


@pytest.mark.parametrize(
    "text, right",
    [
        ("3 + 4 = 7", 1),
        ("**7**.", 1),
        ("7.0", 1),
        ("7 of 9", 0),
        ("", 0),
        ("17", 0),
        ("-7", 0),
        ("so 7", 1),
        ("0x7", 1),
    ],
)
def test_last_number(text, right):
    assert verify(Problem("1", "p", "7", "last_number"), text).reward == right


# -- verdicts


@pytest.fixture
def judged(monkeypatch):
    """What verify makes of a verdict of a verifier of one's own."""

    def judge(verdict=None, rule=None):
        monkeypatch.setitem(VERIFIERS, "mine", rule or (lambda problem, completion: verdict))
        return verify(Problem("train3", "q", "7", "mine"), "text")

    return judge


NOT_NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    np.float32("nan"),
    -0.1,
    1.5,
    2,
    np.int64(-1),
    None,
    "1",
    "",
    [1.0],
    (1,),
    np.array([1.0, 0.0]),
    {"reward": 1},
    1j,
    Decimal(1),
    10**400,
    -Fraction(10**400, 3),
    object(),
]


@pytest.mark.parametrize("reward", NOT_NUMBERS)
def test_a_reward_that_is_none_is_one_sentence(judged, reward):
    for verdict, what in (
        (Verdict(reward, "7"), "reward"),
        (Verdict(1.0, "7", "", reward), "test_pass_rate"),
    ):
        if what == "test_pass_rate" and reward is None:
            continue
        with pytest.raises(
            ValueError, match=f"^the verifier mine returned the {what} .*for problem 'train3'$"
        ) as caught:
            judged(verdict)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "reward",
    [
        0,
        1,
        0.25,
        True,
        False,
        np.float32(0.25),
        np.float64(1),
        np.int64(1),
        np.bool_(True),
        Fraction(1, 2),
        -0.0,
    ],
)
def test_numbers_of_libraries_become_pythons(judged, reward):
    found = judged(Verdict(reward, "7", "", reward))
    assert type(found.reward) is type(found.test_pass_rate) is float and found.reward == float(
        reward
    )
    assert json.loads(json.dumps(found.reward)) == found.reward


@pytest.mark.parametrize(
    "verdict, what",
    [
        (None, "None, where it has to return a Verdict"),
        (1.0, "1.0, where"),
        ((1.0, "7"), "where it has to return a Verdict"),
        (Verdict(1.0, None), "the answer None"),
        (Verdict(1.0, ["7"]), "the answer"),
        (Verdict(1.0, {}), "the answer"),
        (Verdict(1.0, b"7"), "the answer"),
        (Verdict(1.0, "\ud83d"), "the answer .*half a surrogate pair"),
        (Verdict(1.0, "7", None), "the feedback None"),
        (Verdict(1.0, "7", 5), "the feedback 5"),
        (Verdict(1.0, "7", ["a\nb"] * 10**5), "the feedback"),
        (Verdict(1.0, "7", "half \ud83d"), "the feedback .*half a surrogate"),
        (Verdict(1.0, "7", "", None, None), "the status None"),
        (Verdict, "<class 'tasks.problem.Verdict'>, where"),
    ],
)
def test_a_verdict_that_is_none_is_one_sentence(judged, verdict, what):
    with pytest.raises(
        ValueError, match=f"^the verifier mine returned .*{what}.* for problem 'train3'$"
    ) as caught:
        judged(verdict)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_verifier_that_fails_is_one_sentence(judged):
    for error in (
        KeyError("a"),
        ZeroDivisionError("by zero"),
        ValueError("two\nlines"),
        RecursionError(),
        ValueError("no number in \x1b]0;owned\x07\x1b[2J" + "7" * 10**4),
    ):

        def rule(problem, completion, error=error):
            raise error

        with pytest.raises(
            ValueError,
            match=rf"^the verifier mine failed on problem 'train3': {type(error).__name__} in "
            r"test_eval.py, line \d+: ",
        ) as caught:
            judged(rule=rule)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
        assert caught.value.__cause__ is error


def test_answers_that_are_numbers_become_texts(judged):
    assert [judged(Verdict(1.0, a)).answer for a in (7, 7.5, np.int64(7), True, 10**400)] == [
        "7",
        "7.5",
        "7",
        "True",
        "1" + "0" * 400,
    ]


def test_feedback_is_cut_where_it_is_made(judged):
    long = judged(Verdict(0.0, "7", "x" * 400_000)).feedback
    assert long == "x" * MAX_FEEDBACK + "\n[cut here: 400000 characters]"
    assert judged(Verdict(0.0, "7", "x" * MAX_FEEDBACK)).feedback == "x" * MAX_FEEDBACK
    # what a program printed stops no run
    assert judged(Verdict(0.0, "7", "a\0b")).feedback == "a\ufffdb"


def test_the_verdicts_of_a_batch_are_checked(judged, monkeypatch):
    judged(Verdict(1.0, "7"))
    monkeypatch.setitem(
        VERIFIERS, "mine", lambda problem, completion: Verdict(float(completion), completion)
    )
    problems = [Problem(str(i), "q", "7", "mine") for i in range(3)]
    assert [v.reward for v in verify_all(problems, ["0", "1", "0.5"])] == [0, 1, 0.5]
    with pytest.raises(ValueError, match="verifier mine returned the reward nan.* problem '1'"):
        verify_all(problems, ["0", "nan", "1"])


# -- numbers

READ = [
    (line.split(" -> ")[0], line.split(" -> ")[1])
    for line in r"""
The total is 1,234. -> 1234
1,234,567.5 -> 1234567.5
**1,234** -> 1234
$1,000.00 -> 1000
\boxed{$9{,}500} -> 9500
1{,}234 -> 1234
1\,234 -> 1234
1'234 -> 1234
1_000 -> 1000
so it is .5 -> 0.5
-.5 -> -0.5
5. -> 5
The answer is 7. -> 7
7.00 -> 7
007 -> 7
+5 -> 5
-7 -> -7
f(-4) -> -4
x=-4 -> -4
x = - 4 -> -4
3-4 -> 4
10-3 -> 3
10 - 3 = 7 -> 7
x-4 -> 4
5 - 3/4 -> 0.75
1e5 -> 100000
1.5e-3 -> 0.0015
1E5 -> 100000
1e+5 -> 100000
1.3x10^6 -> 1300000
1.3 \times 10^{6} -> 1300000
10^{-3} -> 0.001
50% -> 50
7\% -> 7
7kg -> 7
3rd -> 3
7 m/s^2 -> 7
3/4 -> 0.75
-3/4 -> -0.75
3 / 4 -> 0.75
3×4 -> 4
\frac{3}{4} -> 0.75
-\dfrac{3}{4} -> -0.75
\frac12 -> 0.5
1 3/4 -> 1.75
1\frac{3}{4} -> 1.75
1/3 -> 1/3
\boxed{12} -> 12
\text{7} -> 7
0x1F -> 31
1 234 -> 234
7 and H2O -> 7
7 in v1.2.3 -> 7
7 for x2 -> 7
7 in cm^2 -> 7
No.5 -> 5
1..5 -> 5
It is 7! -> 7
\boxed{72\text{ cm}^2} -> 72
\(72\,\mathrm{m}^2\) -> 72
72 m$^2$ -> 72
72 m<sup>2</sup> -> 72
5 \text{ m/s}^2 -> 5
5 \mathrm{kg \cdot m}^{2} -> 5
5 \text{s}^{-1} -> 5
25 (m/s)^2 -> 25
5 \text{ (m/s)}^2 -> 5
5 \tfrac{\text{m}}{\text{s}^2} -> 5
7 of H$_2$O -> 7
7 of \mathrm{CO}_2 -> 7
7 of x<sub>2</sub> -> 7
\frac{-3}{4} -> -0.75
\frac{3}{-4} -> -0.75
\frac 3 4 -> 0.75
\frac{3}4 -> 0.75
\frac3{4} -> 0.75
3∕4 -> 0.75
1.6 \times 10 ^ { -3 } -> 0.0016
1.6 \times 10^ {-3} -> 0.0016
1.6 \times {10}^{-3} -> 0.0016
5∙10^3 -> 5000
5 • 10^3 -> 5000
1~000 -> 1000
12\!345 -> 12345
-$7 -> -7
is −£7 -> -7
is -₹7 -> -7
\textcolor{red}{7} -> 7
\color{blue}{-7} -> -7
\underline{7} -> 7
is -\$7 -> -7
$3$-$7$ -> 7
10-$7 -> 7
x = -\,7 -> -7
\text{Answer: }-7 -> -7
\boxed{-\text{7}} -> -7
\mathbf{-7} -> -7
3\times10^8$ m/s -> 300000000
6\times10^{23} -> 600000000000000000000000
1.5\cdot10^{-3} -> 0.0015
5 of 2\times3 -> 3
5 of 2\cdot3 -> 3
\approx42 -> 42
x\geq42 -> 42
x\leq42 -> 42
x\ge42 -> 42
\to42 -> 42
\implies42 -> 42
\Rightarrow42 -> 42
\quad42 -> 42
\Large12 -> 12
\mathbf12 -> 12
\displaystyle12 -> 12
\approx-4 -> -4
x\leq-4 -> -4
\implies-4.5 -> -4.5
\Large-.5 -> -0.5
\approx\frac12 -> 0.5
\alpha-4 -> 4
12 \tag{3} -> 12
12 \tag*{3} -> 12
12\label{eq:3} -> 12
12\hspace{3pt} -> 12
12 \\[3pt] -> 12
9.8 m s-2 -> 9.8
9.8 ms-2 -> 9.8
9.8 m·s-2 -> 9.8
9.8\,\mathrm{m s-2} -> 9.8
5 mol L-1 -> 5
5 kg m-1 s-2 -> 5
6.6e-4 J s-1 -> 0.00066
7 cm**2 -> 7
7 m^-1 -> 7
from 3 m-4 m -> 4
7\Omega^2 -> 7
90^\circ -> 90
0b101 -> 5
0o17 -> 15
is **7** -> 7
-0 -> 0
inf -> ""
nan -> ""
no digits -> ""
""".strip().split("\n")
]


@pytest.mark.parametrize(
    "text, number",
    READ
    + [
        ("1\u2009234", "1234"),
        ("1\u00a0234\u00a0567", "1234567"),
        ("1\u202f234", "1234"),
        ("\u22127", "-7"),
        ("\u20137", "-7"),
        ("\u20117", "-7"),
        ("\uff0d7", "-7"),
        ("that is it \u2014 7", "7"),
        ("3\u20134", "4"),
        ("\uff11\uff12", "12"),
        ("\u0663\u0664", "34"),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", "1234.5"),
        ("1.3 \u00d7 10\u2076", "1300000"),
        ("\u7b54\u6848\u662f-7\u4e2a", "-7"),
        ("12 cm\u00b2", "12"),
    ],
)
def test_numbers_are_read_whole(text, number):
    """One text for one number: it is also what votes."""
    number = number.strip('"')
    for key in ("234", "5", "7", "1234", "-7", "0.75", number or "1"):
        found = verify(Problem("x", "q", key, "last_number"), text)
        assert found.answer == number and found.reward == float(key == number), (key, found)


@pytest.mark.parametrize(
    "text",
    [
        "12,34",
        "0,5",
        "1.234.567",
        "12,345,67",
        "1,234.567.8",
        "192.168.0.1",
        "2024-05-01",
        "01/05/2024",
        "10:30",
        "555-12-34",
        "2^10",
        "2**10",
        "5\u00b2",
        "\u00bd",
        "3\u00bd",
        "2\u03c0",
        "2\\pi",
        "\u221a2",
        "2\\sqrt{2}",
        "\\frac{\\pi}{2}",
        "\\frac{x}{2}",
        "x/2",
        "9 \u00b1 5",
        "9\u00b15",
        "9 \\pm 5",
        "9 +/- 5",
        "2 ^ 10",
        "2 ** 10",
        "101_2",
        "101_{2}",
        "(3+4)^2",
        "{10}^{2}",
        "\\frac{3}{x}",
        "-\\frac{-1}{2}",
        "\\sqrt[3]{9}",
        "9.\\overline{3}",
        "9.\\dot{3}",
        "3$^2$",
        "5/0",
        "1e999999999",
        "1e-999999999",
        "1e" + "9" * 5000,
        "9" * 5000,
        "1,2,34",
        "5\\sqrt2",
        "5\\sqrt 2",
        "5 sqrt2",
        "5*sqrt(2)",
        "sqrt2",
        "\\sqrt2",
        "\\sqrt[3]9",
        "\\frac{3\\pi}4",
        "\\frac{\\sqrt{3}}2",
        "\\frac\\pi2",
        "\\frac x2",
        "\\frac3x",
        "\\frac3\\pi",
        "\\pi2",
        "2\\,\\pi",
        "2 pi",
        "2*pi",
        "2\\cdot\\pi",
        "2\\pi r",
        "3\\pi/4",
        "2e^3",
        "2 e^{-x}",
        "3\\times e^2",
        "9.\\overline3",
        "9.\\dot3",
        "0.\\bar{3}",
        "\\binom52",
        "\\binom{5}{2}",
        "\\ln2",
        "3 ln 2",
        "\\log_2 4",
        "\\sin30",
        "sin(30)",
    ],
)
def test_what_can_t_be_read_whole_is_wrong_and_no_piece_of_it_is_right(text):
    start = time.process_time()
    for key in (
        "1",
        "2",
        "4",
        "5",
        "10",
        "30",
        "34",
        "0.5",
        "3",
        "67",
        "567",
        "234567",
        "1024",
        "25",
        "12",
        "2024",
        "9",
    ):
        found = verify(Problem("x", "q", key, "last_number"), f"The answer is 7, no, {text}")
        assert found.reward == 0 and found.answer not in ("", "7")
    assert time.process_time() - start < 0.5


@given(
    st.integers(-(10**40), 10**40),
    st.integers(0, 8),
    st.sampled_from(["{}", "It is {}.", "**{}**", "\\boxed{{{}}}", "({})"]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_decimal_is_read_exactly(digits, places, sentence, grouped):
    """Against Fraction: the number itself is right, its neighbour in the last place is not."""
    number = Fraction(digits, 10**places)
    text = f"{Decimal(digits).scaleb(places * -1, Context(prec=60)):{',' if grouped else ''}f}"
    assert Fraction(text.replace(",", "")) == number
    said = sentence.format(text)
    keys = [f"{Decimal(d).scaleb(places * -1, Context(prec=60)):f}" for d in (digits, digits + 1)]
    assert [verify(Problem("x", "q", key, "last_number"), said).reward for key in keys] == [1, 0]


@given(st.fractions(), st.fractions())
@settings(deadline=None)
def test_equal_numbers_have_one_text_and_others_another(a, b):
    texts = [
        verify(Problem("x", "q", "1", "last_number"), f"{x.numerator}/{x.denominator}").answer
        for x in (a, b)
    ]
    assert (texts[0] == texts[1]) == (a == b) and Fraction(texts[0]) == a


@pytest.mark.parametrize(
    "part",
    [
        "9",
        "1-",
        "1/",
        "= ",
        "x",
        "1 ",
        "1^",
        "1e",
        "a_",
        "\u00b2",
        "\\frac{1",
        "1,234",
        "a}",
        "1)",
        " ^",
        "{1",
        "-$",
        "\\text{1",
        "\\frac{{1}",
        "\\frac{3",
        "\\tag{",
        "\\sqrt[",
        "\\a",
        "1 m s-2 ",
        "m-1 ",
        "1 m",
        "\\pi",
        "-",
        "=",
        " ",
    ],
)
@pytest.mark.parametrize("start, end", [("", ""), ("", "1"), ("=", ""), ("\\frac", "")])
def test_reading_numbers_takes_linear_time(part, start, end):
    """Against itself at a quarter of the length: a machine's speed does not matter, its load little."""

    def seconds(length):
        text = start + part * length + end
        began = time.process_time()
        verify(Problem("x", "q", "1", "last_number"), text)
        return time.process_time() - began

    short, long = (min(seconds(length) for _ in range(3)) for length in (5_000, 20_000))
    assert long < 8 * short + 0.02  # linear: 4 times, quadratic: 16 times


def test_a_reply_of_white_space_is_judged_in_linear_time():
    started = time.process_time()
    for text in (" " * 50_000, "1" + "\n" * 50_000 + "x"):
        assert verify(Problem("x", "q", "vo=* 7", "steps"), text).reward == 0
    assert time.process_time() - started < 1
    assert verify(Problem("x", "q", "vo=* 7", "steps"), "vo=a 7 \n Confidence: 0.50").reward == 1


def test_parquet_files_are_read_like_json_lines(tmp_path):
    """Written by pyarrow; rows of different keys, which Parquet fills with nulls."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"id": "a", "prompt": "1 + 1", "answer": "2", "verifier": "last_number"},
        {"id": "b", "prompt": "2 + 2", "answer": "4", "verifier": "last_number", "level": 3},
    ]
    for split in ("train", "test"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([r | {"level": r.get("level")} for r in rows]),
            tmp_path / f"{split}.parquet",
        )
    task = load_task(str(tmp_path), dev=0)
    assert [p.id for p in task.train] == ["a", "b"] and [p.extra for p in task.test] == [
        {},
        {"level": 3},
    ]
    (tmp_path / "test.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match="test.parquet can't be read as Parquet"):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    "verifier, answer, said",
    [
        ("last_number", "7", "It is 7 \ud83d"),
        ("steps", "a b", "a \ud83d"),
        ("choice", "B", "\ud83d<answer>B</answer>"),
    ],
)
def test_half_a_surrogate_pair_in_what_a_model_wrote_is_no_fault_of_the_verifier(
    verifier, answer, said
):
    verdict = verify(Problem("x", "q", answer, verifier), said)
    assert verdict.reward == (verifier != "steps") and (verdict.answer + verdict.feedback).encode()
