"""Estimators against enumeration, and the Hub's rebuild against the published files.

Tables and figures against runs made by hand, and the command line on the embedded model.
"""

import contextlib
import csv
import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import Attempt, Script
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as ev
import pmd
from eval import verdicts
from memory import EXAMPLES, Memory
from runtime import tables
from runtime.sampler import Sample, Sampler
from runtime.services import make_embedder
from runtime.store import Store, memory_file
from runtime.tables import evaluated
from tasks import load_task
from tasks.problem import Problem
from tasks.sciknoweval import SCIKNOWEVAL, defects
from tasks.verdicts import verify
from tools import figures, report, run_files

HERE = Path(__file__).resolve().parent.parent
SHARED = HERE.parent / "shared" / "data" / "sciknoweval"


@functools.cache
def published_task(domain, **options):
    """Reads a domain of the published files, once for all tests."""
    return load_task(f"sciknoweval/{domain}", dev=0, data=str(SHARED), **options)


published = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the published SciKnowEval files are not part of this repository"
)


# -- estimators ----------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from("ABC"), min_size=4, max_size=4), min_size=1, max_size=4))
def test_headroom_is_what_a_perfect_choice_adds(answers):
    rewards = [[float(a == "A") for a in row] for row in answers]
    for row, value in zip(answers, ev.headroom(rewards, answers), strict=True):
        most = max(row.count(a) for a in row)
        vote = np.mean([a == "A" for a in "ABC" if row.count(a) == most])
        assert value == pytest.approx(("A" in row) - vote)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_coverage_by_sets(table):
    solved = {f"m{j}": {f"p{i}": row[j] for i, row in enumerate(table)} for j in range(3)}
    solved["m0"]["only asked of m0"] = True
    sets = {
        name: {p for p, right in of.items() if right and p.startswith("p")}
        for name, of in solved.items()
    }
    for name, (found, alone) in figures.coverage(solved).items():
        others = set().union(*(s for other, s in sets.items() if other != name))
        assert (found.sum(), alone.sum()) == (len(sets[name]), len(sets[name] - others))


def enumerated(scores, groups):
    """Returns the exact bootstrap distribution of the mean.

    It has every way to draw runs and groups, all equally likely.
    """
    scores, names = np.atleast_2d(scores), sorted(set(groups))
    means = []
    for runs in itertools.product(range(len(scores)), repeat=len(scores)):
        for drawn in itertools.product(names, repeat=len(names)):
            means.append(
                np.mean(
                    [
                        scores[r][i]
                        for r in runs
                        for name in drawn
                        for i, g in enumerate(groups)
                        if g == name
                    ]
                )
            )
    return np.array(means)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=2),
    st.sampled_from(["abcde", "aabbc", "abbbc", "aaaab"]),
)
def test_the_bootstrap_is_the_enumerated_one(scores, groups):
    exact, drawn = enumerated(scores, groups), ev.resample(scores, list(groups), draws=4000)
    assert drawn.mean() == pytest.approx(exact.mean(), abs=0.03)
    assert drawn.std() == pytest.approx(exact.std(), abs=0.03)
    for value in np.quantile(exact, [0.1, 0.5, 0.9]):
        assert np.mean(drawn <= value + 1e-9) == pytest.approx(
            np.mean(exact <= value + 1e-9), abs=0.04
        )


def test_intervals_agree_with_scipy_and_widen_with_groups_and_seeds():
    # 60 names, 4 problems of equal score each
    scores = np.repeat(np.random.default_rng(0).binomial(8, 0.4, 60) / 8, 4)
    theirs = scipy.stats.bootstrap(
        (scores,), np.mean, method="percentile", rng=1
    ).confidence_interval
    assert ev.interval(scores) == pytest.approx(tuple(theirs), abs=0.004)
    names = np.repeat(np.arange(60), 4)
    of_names = scipy.stats.bootstrap(
        (scores[::4],), np.mean, method="percentile", rng=1
    ).confidence_interval
    assert ev.interval(scores, names) == pytest.approx(tuple(of_names), abs=0.008)
    width = [
        np.subtract(*ev.interval(s, n))
        for s, n in ((scores, None), (scores, names), ([scores, scores + 0.3], names))
    ]
    # differences low - high: negative, growing
    assert width[0] > 1.7 * width[1] * 0.9 and width[1] > width[2]
    assert ev.interval([0.5]) is None and ev.interval([0.1, 0.9], ["a", "a"]) is None


def test_the_papers_numbers_are_typed_right():
    """AVG is the mean of the four domains in every row.

    The paper's SDPO row of OLMo is off by half a point, as printed.
    """
    for table, (_, rows) in report.TABLES.items():
        for label, models in rows.items():
            for model, (*four, average) in ((m, n[:5]) for m, n in models.items()):
                off = abs(np.mean(four) - average)
                assert off < 0.56 if (model, label) == (report.OLMO, "SDPO") else off < 0.11, (
                    table,
                    label,
                )


# -- SciKnowEval ---------------------------------------------------------------------------------


def hub_rows(domain, questions):
    """Rows as the Hub has them, between others that don't belong: other levels, other types."""
    for question, options, key in questions:
        item = {
            "question": question,
            "choices": {"text": options, "label": list("ABCD")[: len(options)]},
            "answerKey": key,
            "type": f"mcq-{len(options)}-choices",
            "domain": domain,
            "details": {"level": "L3", "task": "t", "subtask": "s"},
        }
        yield {**item, "details": {**item["details"], "level": "L2"}}
        yield item
        yield {**item, "type": "true_or_false"}


@pytest.fixture
def hub(monkeypatch):
    import datasets

    def give(questions):
        def load(name, split):
            assert (name, split) == ("hicai-zju/SciKnowEval", "test")
            rows = []
            for domain in ("Biology", "Chemistry", "Material", "Physics"):
                rows += hub_rows(domain, questions)
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load)

    return give


def test_the_hubs_items_become_ours(hub):
    hub([(f"Question {i}?", [f"{i}", f"{i + 1}"], "AB"[i % 2]) for i in range(500)])
    task = load_task("sciknoweval/biology", dev=0)
    assert (len(task.train), len(task.test)) == (450, 50)
    for p in task.train + task.test:
        i = int(p.id)
        assert (
            p.prompt == f"Question {i}?\n\nA: {i}\nB: {i + 1}\nPlease reason step by step."
            and p.answer == "AB"[i % 2]
        )
        assert "<reasoning>" in p.system and "(A, B, C, or D)" in p.system
    hub([(f"Question {i}?", ["1", "2"], "A") for i in range(499)])
    with pytest.raises(
        ValueError, match="has 449 train and 50 test items, but 450 and 50 were published"
    ):
        load_task("sciknoweval/biology")


@published
@pytest.mark.parametrize("domain", SCIKNOWEVAL)
def test_the_rebuilt_split_is_the_published_one(domain, hub):
    """The published items, in their order before the split, become the very files again."""
    files = published_task(domain)
    questions = []
    for p in sorted(files.train + files.test, key=lambda p: int(p.id)):
        stem, *rest = re.split(
            r"\n?^[A-D]: ", p.prompt.removesuffix("\nPlease reason step by step."), flags=re.M
        )
        questions.append((stem.removesuffix("\n"), rest, p.answer))
    hub(questions)
    rebuilt = load_task(f"sciknoweval/{domain}", dev=0)
    for split in ("train", "test"):
        ours, theirs = getattr(rebuilt, split), getattr(files, split)
        assert [(p.id, p.prompt, p.answer) for p in ours] == [
            (p.id, p.prompt, p.answer) for p in theirs
        ]
    assert rebuilt.card == files.card


@published
@pytest.mark.parametrize(
    "domain, counts, left",
    [
        ("biology", {"test near-duplicate": 29}, (450, 21)),
        ("chemistry", {}, (1890, 210)),
        (
            "material",
            {"train noisy": 133, "test noisy": 13, "test leaked": 1, "test near-duplicate": 3},
            (708, 77),
        ),
        ("physics", {"train repeated": 6, "test near-duplicate": 49}, (714, 31)),
    ],
)
def test_the_data_card_counts_the_known_defects(domain, counts, left):
    found = re.findall(r"^  (train|test): (\d+) (\w[\w-]*)", published_task(domain).card, re.M)
    assert {f"{split} {kind}": int(n) for split, n, kind in found} == counts
    task = published_task(domain, exclude_flagged=True)
    assert (
        (len(task.train), len(task.test)) == left
        and "without flagged items" in task.name
        and "excluded" in task.card
    )


def test_defects_of_items_made_by_hand():
    def item(i, stem, *options):
        lines = "".join(f"\n{label}: {text}" for label, text in zip("ABCD", options, strict=False))
        return Problem(str(i), f"{stem}\n{lines}\nPlease reason step by step.", "A", "choice")

    train = [
        item(0, "A car of 10 kg?", "1", "2"),
        item(1, "How far?", "1", "1"),
        item(2, "Mass 3?", "1", "2"),
    ]
    test = [
        item(3, "A car of 10 kg?", "1", "2"),
        item(4, "A car of 12.5 kg?", "3", "4"),
        item(5, "A bus of 10 kg?", "1", "2"),
    ]
    flags = [[flag.split(":")[0].split(" ")[0] for flag in split] for split in defects(train, test)]
    assert flags == [["", "repeated", ""], ["leaked", "near-duplicate", ""]]
    train[2] = item(2, "NdValence_composition_average = 3?", "1", "2")
    assert defects(train, test)[0][2].startswith("noisy")


def test_options_of_other_tasks_are_refused():
    for options, message in (
        (dict(protocol="older"), "--since and --until are for livecodebench, not for nano"),
        (dict(exclude_flagged=True), "--exclude_flagged is for sciknoweval: nothing is flagged"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task("nano", **options)
    a, b = load_task("nano", seed=1), load_task("nano")
    assert {p.id for p in a.dev} != {p.id for p in b.dev} and a.test == b.test


def test_lenient_verdicts_reach_the_batch(make_config):
    problem = Problem("1", "p", "B", "choice")
    for mcq, reward in (("sdpo", 0), ("lenient", 1)):
        ((_, _, verdict),) = verdicts(
            [problem], [[Sample([1], [2], None, "(B)", True)]], make_config(mcq=mcq)
        )
        assert verdict.reward == reward
    with pytest.raises(ValueError, match="--mcq lenient is for multiple choice, which nano is not"):
        pmd.check(make_config(mcq="lenient"))


# -- runs made by hand ---------------------------------------------------------------------------

RATES = {"grpo": 0.5, "sdpo": 0.6, "pmd": 0.8}


@pytest.fixture
def make_run(tmp_path):
    def make(
        name,
        method="pmd",
        task="sciknoweval/biology",
        model="Qwen/Qwen3-8B",
        seed=0,
        dev=(0.1, 0.4, 0.3),
        test=((0, 0, 0, 1), (1, 1, 0, 1), (1, 0, 0, 1)),
        **config,
    ):
        """Writes a run that was evaluated at steps 0, 5 and 10.

        test: at each of these, the share of the 2 samples of each problem that are right.
        """
        folder = tmp_path / name
        (folder / "evals").mkdir(parents=True)
        cfg = {
            **vars(pmd.Config()),
            "method": method,
            "task": task,
            "model": model,
            "seed": seed,
            **config,
        }
        (folder / "config.json").write_text(json.dumps(cfg))
        rows = []
        for step, on_dev, rates in zip((0, 5, 10), dev, test, strict=True):
            samples = [
                {
                    "problem": f"p{i}",
                    "sample": j,
                    "answer": "A" if j < 2 * r else "B",
                    "reward": float(j < 2 * r),
                    "tokens": 10 * (i + 1) + j,
                    "text": "",
                }
                for i, r in enumerate(rates)
                for j in range(2)
            ]
            (folder / "evals" / f"{step}-test.jsonl").write_text(
                "".join(json.dumps(s) + "\n" for s in samples)
            )
            rows += [{"step": step, "split": "dev", "avg_at_k": on_dev}]
            rows += [{"step": step, "split": "test", "avg_at_k": float(np.mean(rates))}]
            for s in range(step + 1, step + 6 if step < 10 else 0):
                rows.append(
                    {
                        "step": s,
                        "peak_gb": s / 4,
                        "seconds": {"attempt": s, "distill": 1.0, "evaluate": 100.0},
                        "keywords": {"strategy": s / 10},
                        "memory": {"insight": 7 * s},
                    }
                )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(folder)

    return make


def line(text, *words):
    found = [row for row in text.split("\n") if all(w in row for w in words)]
    return re.split(r"\s{2,}", found[0].strip()) if found else None


def test_a_table_has_three_checkpoints_and_the_papers_number(make_run):
    text = report.compare(
        [make_run("a"), make_run("b", "sdpo", test=((0, 0, 0, 1), (0, 0, 0, 1), (1, 1, 1, 1)))]
    )
    table = text.split("Table 2")[1].split("Table 3")[0]
    cells = line(table, "Qwen3-8B", "PMD")
    assert cells[:4] == ["Biology", "Qwen3-8B", "PMD", "4 x 2"] and cells[-1] == "68.5"
    assert cells[4].startswith("50.0 [0.0, 100.0]") and cells[5].startswith("75.0 [25.0, 100.0] @5")
    assert cells[6] == "75.0 (of 3)"  # selected on test: no interval
    assert line(table, "Base") == [
        "Biology",
        "Qwen3-8B",
        "Base",
        "4 x 2",
        "25.0 [0.0, 75.0]",
        "32.4",
    ]
    assert line(table, "SDPO")[4:] == [
        "100.0 [100.0, 100.0]",
        "25.0 [0.0, 75.0] @5",
        "100.0 (of 3)",
        "63.6",
    ]
    assert line(text.split("Table 5")[1], "PMD")[3:] == [
        "50.0",
        "26",
        "26",
        "41",
        "10",
        "68.5 481 474 711 296",
    ]
    assert line(text.split("Table 7")[1], "PMD")[3:] == [
        "6.5",
        "4.25, 8.75",
        "1.00",
        "2.5",
        "53.6 54.9",
    ]
    assert "Table 6: not reproduced" in text
    gaps = line(text.split("paired by problem")[1], "SDPO - PMD") or line(
        text.split("paired by problem")[1], "PMD - SDPO"
    )
    assert gaps[3] == "4" and gaps[4] in ("50.0 [0.0, 100.0]", "-50.0 [-100.0, 0.0]")


def test_seeds_share_a_row_and_the_same_seed_twice_does_not(make_run):
    one, two = (
        make_run("one", test=((0,) * 4, (0,) * 4, (1, 1, 0, 0))),
        make_run("two", seed=1, test=((0,) * 4,) * 3),
    )
    cells = line(report.compare([one, two]).split("Table 2")[1], "PMD")
    assert cells[3] == "4 x 2 x 2 seeds" and cells[4].startswith("25.0 [0.0, ")
    exact = enumerated([(1, 1, 0, 0), (0, 0, 0, 0)], "abcd")
    assert cells[4] == f"25.0 [0.0, {100 * np.percentile(exact, 97.5):.1f}]"
    again = make_run("again", test=((0,) * 4, (0,) * 4, (1, 1, 0, 0)))
    table = report.compare([one, again]).split("Table 2")[1].split("Table 3")[0]
    assert line(table, "PMD [one]") and line(table, "PMD [again]") and "seeds" not in table


def test_the_average_takes_all_four_domains(make_run):
    runs = [
        make_run(d, task=f"sciknoweval/{d}", test=((0,) * 4, (0,) * 4, (1,) * n + (0,) * (4 - n)))
        for n, d in enumerate(("biology", "chemistry", "physics", "material"), 1)
    ]
    cells = line(report.compare(runs).split("Table 2")[1], "AVG", "PMD")
    assert cells[3] == "4 domains" and cells[4].startswith("62.5 [") and cells[-1] == "77.2"
    low, high = map(float, re.findall(r"\d+\.\d", cells[4])[1:])
    per_domain = [np.array([1] * n + [0] * (4 - n)) for n in range(1, 5)]
    # of the mean of four independent means
    half = 1.96 * np.sqrt(sum(s.var() / 4 for s in per_domain)) / 4
    assert high - low == pytest.approx(200 * half, rel=0.15)
    assert "AVG" not in report.compare(runs[:3])


def test_variants_have_rows_of_their_own(make_run):
    text = report.compare(
        [
            make_run("a"),
            make_run("b", tiers="experience,insight"),
            make_run("c", mcq="lenient"),
            make_run("d", task="livecodebench", protocol="official"),
            make_run("e", "frozen-policy"),
            make_run("f", exclude_flagged=True),
            make_run("g", "frozen-policy", tiers="experience"),
            make_run("h", "srpo"),
        ]
    )
    two, four = (
        text.split("Table 2")[1].split("Table 3")[0],
        text.split("Table 4")[1].split("Not in")[0],
    )
    assert (
        line(two, "PMD", "68.5")
        and not line(two, "(experience,insight)")
        and not line(two, "lenient")
    )
    # no number of the paper's is like it
    assert line(two, "livecodebench (official, 2025-02-01 to 2025-05-01)")[-1] == "-"
    assert line(two, "sciknoweval/biology without flagged items")[-1] == "-"
    assert (
        line(four, "PMD (experience,insight)")[-1] == "67.1"
        and line(four, "frozen policy  ")[-1] == "45.6"
    )
    assert line(four, "Evolving memory + frozen policy (experience)")[-1] == "42.3"
    assert line(text.split("Table 3")[1], "frozen policy")[-1] == "34.3"
    assert line(text.split("Not in the paper's tables")[1], "PMD, lenient")
    assert line(text.split("Not in the paper's tables")[1], "srpo")[-1] == "75.0 (of 3)"
    assert line(two, "Base", "32.4") and "dev-selected is in part selected on test" in " ".join(
        text.split()
    )


def test_a_base_policy_read_leniently_is_none_of_the_papers(make_run):
    text = report.compare([make_run("c", mcq="lenient")])
    assert "Base" not in text.split("Table 2")[1].split("Table 3")[0]
    assert line(text.split("Not in the paper's tables")[1], "Base, lenient")
    text = report.compare([make_run("d", mcq="lenient", seed=1), make_run("e", "sdpo")])
    assert line(text.split("Table 2")[1], "Base", "32.4") and "Base, lenient" not in text


def test_the_table_of_an_evaluation_says_lenient():
    found = {
        "avg_at_k": 0.5,
        "k": 4,
        "n_problems": 9,
        "interval": None,
        "maj_at_k": 0.5,
        "best_at_k": 1,
        "headroom": 0.5,
        "tokens": 3,
    }
    assert evaluated("t", {**found, "mcq": "lenient"}).split("\n")[2].startswith("t, lenient  9 ")
    assert "lenient" not in evaluated("t", {**found, "mcq": "sdpo"})


DEV = '{"step": 0, "split": "dev", "avg_at_k": 0}\n'
ANSWER = '{"problem": "p%d", "answer": "A", "reward": 1, "tokens": 1}\n'


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("metrics.jsonl", DEV + '{"split": "test"}\n', "metrics.jsonl, line 2 has no step"),
        (
            "metrics.jsonl",
            DEV + '{"split": "test", "step": 0}\n',
            "metrics.jsonl, line 2 has no avg_at_k",
        ),
        (
            "metrics.jsonl",
            DEV + '{"step": 1, "seconds": {}, "memory": {}}\n',
            "metrics.jsonl, line 2 has no keywords",
        ),
        ("metrics.jsonl", DEV, "has no evaluation on test yet"),
        ("metrics.jsonl", DEV + '{"step": \n', "metrics.jsonl, line 2 is not JSON"),
        ("config.json", '{"task": "nano",\n', "config.json, line 2 is not JSON"),
        ("config.json", '{"task": "nano"}', "config.json has no model"),
        (
            "evals/10-test.jsonl",
            ANSWER % 0 + ANSWER % 0 + ANSWER % 1,
            "10-test.jsonl is not whole: .* 1 or 2 samples each",
        ),
        ("evals/10-test.jsonl", "", "10-test.jsonl is not whole: its problems have no samples"),
        ("evals/10-test.jsonl", '{"problem": "p0"}\n', "10-test.jsonl, line 1 has no reward"),
        ("evals/10-test.jsonl", "[1]\n", "10-test.jsonl, line 1 is not a JSON object"),
        ("evals/10-test.jsonl", None, "not exist"),
    ],
)
def test_broken_runs_are_named(make_run, name, text, message):
    run = Path(make_run("broken"))
    (run / name).unlink() if text is None else (run / name).write_text(text)
    with pytest.raises(SystemExit, match=message) as caught:
        ev.main(pmd.parse_flags, ["compare", str(run)])
    assert "\n" not in str(caught.value)


def test_a_run_that_is_being_written_is_compared(make_run):
    """A kill, or a step that is being logged, leaves a line without its end."""
    whole, cut = Path(make_run("whole")), Path(make_run("cut"))
    path = cut / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 11, "seco')
    theirs = report.compare([str(whole)]).replace(str(whole), "")
    assert report.compare([str(cut)]).replace(str(cut), "") == theirs


def rewritten(path, change, where=lambda row: True):
    """Changes the rows of a file for which `where` is true."""
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows = [row | change if where(row) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_that_were_cut_are_named(make_run):
    """Also where the cut leaves each problem its samples: metrics.jsonl knows how many there were."""
    run = Path(make_run("run"))
    rewritten(run / "metrics.jsonl", {"n_problems": 4, "k": 2}, lambda row: "split" in row)
    assert " 4 x 2 " in report.compare([str(run)])
    path = run / "evals" / "10-test.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for some, held in ((lines[:-2], "3 problems with 2"), (lines[::2], "4 problems with 1")):
        path.write_text("".join(some))
        said = f"10-test.jsonl has {held} samples each, where metrics.jsonl says 4 with 2"
        with pytest.raises(SystemExit, match=said):
            ev.main(pmd.parse_flags, ["compare", str(run)])


ODD = [
    ("metrics.jsonl", {"seconds": 5}, "its seconds: it has to be an object of numbers"),
    ("metrics.jsonl", {"seconds": {"attempt": "x"}}, "seconds: it has to be an object of numbers"),
    ("metrics.jsonl", {"avg_at_k": None}, "has null as its avg_at_k: it has to be a number"),
    ("metrics.jsonl", {"keywords": []}, "its keywords: it has to be an object of numbers"),
    ("metrics.jsonl", {"peak_gb": "1"}, 'has "1" as its peak_gb: it has to be a number'),
    ("metrics.jsonl", {"step": "1"}, 'has "1" as its step: it has to be a whole number'),
    ("metrics.jsonl", {"split": ["x"]}, "its split: it has to be a text"),
    ("config.json", {"model": None}, "has null as its model: it has to be a text"),
    ("config.json", {"tiers": None}, "has null as its tiers: it has to be a text"),
    ("config.json", {"memory_from": 5}, "has 5 as its memory_from"),
    ("config.json", {"task": ["nano"]}, "as its task: it has to be a text"),
    ("config.json", {"task": "livecodebench", "since": 5}, "has 5 as its since"),
    ("evals/10-test.jsonl", {"reward": "1"}, 'has "1" as its reward: it has to be a number'),
    ("evals/10-test.jsonl", {"problem": []}, "as its problem: it has to be a text"),
    ("evals/10-test.jsonl", {"answer": ["A"]}, "as its answer: it has to be a text"),
    ("evals/10-test.jsonl", {"tokens": None}, "as its tokens: it has to be a number"),
]


@pytest.mark.parametrize("name, change, message", ODD)
def test_values_of_another_type_are_named(make_run, name, change, message):
    run = Path(make_run("odd"))
    rewritten(run / name, change)
    for command in ("compare", "figures"):
        with pytest.raises(SystemExit, match=f"{Path(name).name}.*{message}") as caught:
            ev.main(pmd.parse_flags, [command, str(run)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"task": "\xe9"}', "config.json can't be read .*UTF-8"),
        (b"[" * 100_000, "config.json can't be read .*Recursion"),
        (b"5", "config.json holds no JSON object: name the folder of a run"),
    ],
    ids=["latin-1", "deep", "number"],
)
def test_a_config_that_is_none_is_named(make_run, data, message):
    run = Path(make_run("odd"))
    (run / "config.json").write_bytes(data)
    with pytest.raises(SystemExit, match=message):
        ev.main(pmd.parse_flags, ["compare", str(run)])


def test_the_flags_of_every_run_are_of_the_types_that_are_read():
    assert run_files.need(vars(pmd.Config()), run_files.CONFIG, "") == vars(pmd.Config())


def test_the_last_words_of_a_run_say_of_what_they_speak():
    """Window, count and protocol; and whether a memory was in the prompt."""
    row = {
        "avg_at_k": 0.5,
        "interval": [0.4, 0.6],
        "k": 4,
        "n_problems": 131,
        "step": 5,
        "n_checkpoints_searched": 2,
    }
    data = "livecodebench (sdpo, 2025-02-01 to 2025-05-01, 131 problems)"
    summary = {
        "data": data,
        "base": row,
        "final": row,
        "dev_best": None,
        "test_best": {**row, "interval": None},
    }
    said = f"avg@4 on 131 held-out problems of {data}, no memory in the prompt"
    assert said in tables.table({"pmd": summary}).split("\n")[0]
    assert "memory in the prompt of frozen-policy alone" in tables.table(
        {"pmd": summary, "frozen-policy": summary}
    )
    assert (
        f"{data}, read leniently, no memory in"
        in tables.table({"pmd": {**summary, "mcq": "lenient"}}).split("\n")[0]
    )


def test_no_run_at_all():
    with pytest.raises(
        SystemExit, match="nowhere is no run: it has no config.json and metrics.jsonl"
    ):
        ev.main(pmd.parse_flags, ["compare", "nowhere"])


def test_a_run_that_is_not_finished_is_named(make_run, tmp_path, capsys):
    whole, stopped = make_run("whole"), make_run("stopped", "sdpo")
    Path(whole, "summary.json").write_text("{}")
    for command in (["compare"], ["figures", "--out", str(tmp_path / "f")]):
        ev.main(pmd.parse_flags, [*command, whole, stopped])
        said = capsys.readouterr().out
        assert f"{stopped} is not finished: its final step here is 10" in said
        assert f"{whole} is not" not in said
    with pytest.raises(SystemExit):  # it writes nothing
        ev.main(pmd.parse_flags, ["compare", whole, "--out", "x"])


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--memory_from x", "--memory_from x is nothing that an evaluation without --memory reads"),
        ("--tiers insight", "--tiers insight is nothing that an evaluation without --memory"),
        ("--compare pmd,grpo", "--compare pmd,grpo is nothing that"),
        ("--from x@3", "--fork_from x@3 is nothing that"),
        ("--max_minutes 3", "--max_minutes 3.0 is nothing that .* give --max_minutes 0.0"),
        ("--memory x --max_minutes 3", "--max_minutes 3.0 is nothing that an evaluation reads"),
    ],
)
def test_an_evaluation_refuses_what_it_does_not_read(tmp_path, flags, said):
    with pytest.raises(SystemExit, match=f"eval.py: {said}"):
        flags = ["--model", "nano", "--out", str(tmp_path), *flags.split()]
        ev.main(pmd.parse_flags, flags)
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_an_evaluation_that_lacks_something_is_named(tmp_path):
    flags = ["--model", "nano", "--eval_problems", "2", "--n", "1", "--out", str(tmp_path)]
    path = tmp_path / "x" / "evals" / "0-test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 3}\n')
    with pytest.raises(SystemExit, match="0-test.jsonl, line 1 has no problem: mend that line"):
        ev.main(pmd.parse_flags, [*flags, "--name", "x"])


def test_a_folder_lends_its_memory_under_its_own_name(tmp_path):
    """A lender is named by its folder in tables: see report.names_of."""
    (tmp_path / "memory.db").touch()
    assert memory_file(str(tmp_path)) == str(tmp_path / "memory.db")
    assert memory_file("x/memory.db") == "x/memory.db" and memory_file("") == ""


def test_figures_and_their_data(make_run, tmp_path, capsys):
    other = make_run("b", "sdpo", test=((0,) * 4, (0,) * 4, (0, 0, 1, 0)))
    ev.main(pmd.parse_flags, ["figures", make_run("a"), other, "--out", str(tmp_path / "f")])
    assert (
        "Figure 2, memory in the prompt of other models: nothing to draw" in capsys.readouterr().out
    )
    for n in (3, 4, 5, 6):
        assert (tmp_path / f"f/figure{n}.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "f/figure4.csv") as file:
        rows = [(r["panel"], r["series"], float(r["value"])) for r in csv.DictReader(file)]
    assert sorted(v for p, s, v in rows if s == "PMD") == [0.5, 0.5]  # p0 and p3, which sdpo misses
    assert sorted(v for p, s, v in rows if s == "SDPO") == [0.25, 0.25]
    with open(tmp_path / "f/figure6.csv") as file:
        rows = [r for r in csv.DictReader(file) if r["series"] == "Qwen3-8B on Biology: PMD"]
    assert [(int(r["x"]), float(r["value"])) for r in rows] == [(s, 7.0 * s) for s in range(1, 11)]


@pytest.mark.parametrize("name", [r"$\frac$", "_mine"])
def test_figures_draw_names_that_are_no_formulas(make_run, tmp_path, name):
    run = make_run("a", method=name, task=name, model=f"x/{name}")
    said = figures.draw_figures([run], tmp_path / "f")
    assert said.count("nothing to draw") == 1  # no memory was in a prompt
    for n in (3, 4, 5, 6):
        assert (tmp_path / f"f/figure{n}.png").is_file()


def test_figures_show_all_of_their_data(tmp_path, monkeypatch):
    """No series is cut off because an earlier one was lower, nor lost because a panel lacks it."""
    monkeypatch.setattr(figures.plt, "close", lambda figure: None)
    for bars in (False, True):
        rows = [("one", x, "low", 0.1, np.nan, np.nan) for x in (1, 2)]
        rows += [("one", 1, "high", 0.8, 0.5, 0.9), ("two", 2, "elsewhere", 3, np.nan, np.nan)]
        figures.draw(tmp_path / "drawn", "title", rows, bars)
        figure = figures.plt.gcf()
        tops = [axes.get_ylim()[1] for axes in figure.axes]
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert tops[0] >= 0.9 and tops[1] >= 3 and labels == ["low", "high", "elsewhere"]
    monkeypatch.undo()
    figures.plt.close("all")


# -- the command line ----------------------------------------------------------------------------


def test_an_evaluation_resumes_where_it_stopped(tmp_path, capsys):
    flags = [
        "--model",
        "nano",
        "--eval_problems",
        "4",
        "--n",
        "3",
        "--batch_size",
        "2",
        "--out",
        str(tmp_path),
    ]
    ev.main(pmd.parse_flags, [*flags, "--name", "whole"])
    assert re.search(r"avg@3 +maj@3 +best@3", capsys.readouterr().out)
    path = tmp_path / "whole/evals/0-test.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    assert len(rows) == 12 and set(rows[0]) == {
        "problem",
        "sample",
        "answer",
        "reward",
        "tokens",
        "text",
    }
    problems = {p.id: p for p in load_task("nano").test}
    assert all(verify(problems[r["problem"]], r["text"]).reward == r["reward"] for r in rows)
    text = path.read_text()
    for cut in (
        len(text.splitlines(keepends=True)[0]) * 8,
        0,
        text.index("\n", len(text) // 2) + 1,
    ):
        path.write_text(text[:cut])
        ev.main(pmd.parse_flags, [*flags, "--name", "whole"])
        assert sorted(path.read_text().splitlines()) == sorted(text.splitlines())
    with pytest.raises(SystemExit, match=r"--eval_k \(3 before, 2 now\)"):
        ev.main(pmd.parse_flags, [*flags[:5], "2", *flags[6:], "--name", "whole"])


def test_memory_in_the_prompt(tmp_path, make_config, monkeypatch):
    (tmp_path / "lender").mkdir()
    insight = {
        "strategies": [{"title": "Reverse", "content": "What was last comes first."}],
        "lessons": [],
    }
    memory = Memory(
        tmp_path / "lender/memory.db",
        make_embedder(make_config()),
        Script(lambda prompt: json.dumps(insight)),
        embedder="hashing",
        forms="question",
    )
    train = load_task("nano").train
    memory.add_problems(train)
    memory.record(1, [Attempt(f"1/{p.id}/0", p, "1 2", 1.0) for p in train])
    memory.reflect(1, train)
    memory.close()
    asked = []
    answer = Sampler.answer
    monkeypatch.setattr(
        Sampler,
        "answer",
        lambda self, problems, *rest: asked.extend(rest[-1]) or answer(self, problems, *rest),
    )
    flags = [
        "--model",
        "nano",
        "--eval_problems",
        "4",
        "--n",
        "2",
        "--out",
        str(tmp_path),
        "--name",
        "lent",
    ]
    ev.main(pmd.parse_flags, [*flags, "--memory", str(tmp_path / "lender/memory.db")])
    assert len(asked) == 4 and all("What was last comes first." in text for text in asked)
    text = report.compare([str(tmp_path / "lent")])
    assert line(
        text.split("Not in the paper's tables")[1], "Base, memory of lender in the prompt, top-3"
    )

    # Table 4's row of a frozen policy that reads experience alone:
    # the nearest problem with its latest success
    (tmp_path / "lender/config.json").write_text(
        (tmp_path / "lent/config.json")
        .read_text()
        .replace('"method": "eval"', '"method": "frozen-policy"')
    )
    ev.main(
        pmd.parse_flags,
        [
            *flags[:-1],
            "solved",
            "--memory",
            str(tmp_path / "lender/memory.db"),
            "--tiers",
            "experience",
        ],
    )
    assert all(
        EXAMPLES in text and "\n1 2\n" in text and "What was last" not in text for text in asked[4:]
    )
    four = report.compare([str(tmp_path / "solved")]).split("Table 4")[1].split("Not in")[0]
    assert line(four, "Evolving memory + frozen policy (experience)")[3] == "4 x 2"
    ev.main(
        pmd.parse_flags,
        ["figures", str(tmp_path / "lent"), str(tmp_path / "solved"), "--out", str(tmp_path / "f")],
    )
    with open(tmp_path / "f/figure2.csv") as file:
        shown = [row["series"] for row in csv.DictReader(file)]
    # a series, whatever the row's name
    assert shown[1] == "Base, memory of lender in the prompt, top-3 (experience)"

    # the run goes on, and the same command does not take the old answers for new ones
    with contextlib.closing(Store(tmp_path / "lender/memory.db")) as grown:
        with grown.writing(2):
            grown.db.execute("UPDATE item SET ended = 2 WHERE tier = 'insight'")
    with pytest.raises(SystemExit, match="the memory changed since .*lent was started"):
        ev.main(pmd.parse_flags, [*flags, "--memory", str(tmp_path / "lender/memory.db")])
    with pytest.raises(
        SystemExit,
        match="nano has 1024 positions, and a prompt of 1000 tokens .*; give --max_reprompt 992",
    ):
        ev.main(
            pmd.parse_flags,
            [
                *flags[:-1],
                "long",
                "--memory",
                str(tmp_path / "lender/memory.db"),
                "--max_reprompt",
                "1000",
            ],
        )
    assert not (tmp_path / "long").exists()
    with pytest.raises(SystemExit, match="there is no memory nowhere.db"):
        ev.main(pmd.parse_flags, [*flags[:-1], "other", "--memory", "nowhere.db"])
    with pytest.raises(SystemExit, match="eval.py: there is no task 'chess'"):
        ev.main(pmd.parse_flags, ["--model", "nano", "--task", "chess"])


def test_a_name_of_the_hub_is_no_path(tmp_path, monkeypatch):
    """Where `compare` is called in the folder of a run, whose metrics.jsonl stands above the name."""
    config = vars(pmd.parse_flags(["--model", "Qwen/Qwen3-8B"])) | {"method": "eval"}
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert report.names_of(config) == ("Qwen3-8B", "Base", "Base")


def test_the_folder_of_a_model_is_recorded_for_other_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "nano"):
        (tmp_path / name).mkdir()
    assert pmd.parse_flags(["--model", "mine"]).model == str(tmp_path / "mine")
    assert [pmd.parse_flags(["--model", m]).model for m in ("nano", "a/b")] == ["nano", "a/b"]
