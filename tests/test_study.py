"""The study's grid, its arithmetic on records of which every number can be told in advance, and
what it watches.
"""

import json
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import method_of
from scipy import stats

import pmd
from memory import compose
from runtime.chat import encode_prompt
from runtime.files import read_lines, write_lines
from runtime.methods import method_class
from study import real, study, tables, variants
from tasks import load_task, verify
from tasks.references import hidden_rules

RATES = dict.fromkeys(study.ARMS, 1e-3)


def record(part, arm, world, kind="feedback", checkpoint="0", label="", scores=(0, 0.2, 0.4), **of):
    """A run whose steps cost 1 second and 10 tokens each."""
    test = []
    for i, score in enumerate(scores):
        row = {"step": 10 * i, "avg": score, "maj": score, "best": score}
        test.append(row | {"cpu": 10.0 * i, "tokens": 100 * i})
    teacher = []
    for i in range(1, len(scores)):
        unsolved = {"student": [0.2, 4], "lessons": [0.1 * i, 3], "all": [0.3, 4]}
        teacher.append({"step": 10 * i, "cpu": 10.0 * i, "teacher": {"unsolved": unsolved}})
    job = "/".join(filter(None, [part, arm, label, str(world)]))
    found = {"job": job, "part": part, "arm": arm, "world": world, "kind": kind, "label": label}
    found |= {"checkpoint": checkpoint, "rate": 1e-3, "test": test, "teacher": teacher}
    return found | of


def by_name(rows) -> dict:
    return {row["job"]: row for row in rows}


# -- the grid


def test_the_grid_is_the_declared_one():
    jobs = {part: make(RATES) for part, make in study.PARTS.items()}
    assert {part: len(of) for part, of in jobs.items()} == {
        "tuning": 6 * 6 * 4,
        "main": 48 * 7,
        "scale": 8 * 4 * 2,
        "mastered": 6 * 3 * 4,
    }
    names = [job.name for of in jobs.values() for job in of]
    assert len(set(names)) == len(names)
    worlds = {part: {job.world for job in of} for part, of in jobs.items()}
    assert worlds["main"] == set(range(510, 558)) and worlds["mastered"] == set(range(558, 564))
    assert worlds["tuning"] <= set(range(411, 461)) and worlds["scale"] <= worlds["main"]
    for part, arms in (("tuning", 6), ("main", 7)):
        cells = Counter((job.arm, job.kind, job.checkpoint) for job in jobs[part])
        assert len(cells) == arms * 2 * 3 and len(set(cells.values())) == 1
    kinds = {(job.checkpoint, job.kind) for job in jobs["scale"]}
    passing = {("0.2M", "feedback"), ("0.7M", "feedback"), ("6M", "feedback")}
    assert kinds == passing | {("misreads", "plain")}
    rates = {job.checkpoint: job.flags["lr"] for job in jobs["scale"]}  # 1e-3 times 96 / width
    assert rates == {"0.2M": 2e-3, "0.7M": 1e-3 * 96 / 80, "6M": 1e-3 * 96 / 256, "misreads": 1e-3}


def test_no_arm_gets_a_knob_that_another_does_not():
    """Only the method, its rate, and what the arm is named for may differ."""
    for make in study.PARTS.values():
        flags = {}
        for job in make(RATES):
            rest = {k: v for k, v in job.flags.items() if k != "lr"}
            flags.setdefault((job.world, job.label), set()).add(json.dumps(rest))
        assert all(len(found) == 1 for found in flags.values())
    own = {key for _, flags in study.ARMS.values() for key in flags}
    assert own == {"supervise"}


def test_the_estimate_is_the_declared_one():
    for part, make in study.PARTS.items():
        hours = sum(job.seconds for job in make(RATES)) / 3600
        assert f"{part} {hours:.1f}" in study.__doc__
    total = sum(job.seconds for make in study.PARTS.values() for job in make(RATES)) / 3600
    assert f"together {total:.1f}" in study.__doc__ and total <= 8.5


def test_the_rate_of_an_arm_is_its_best_by_auc():
    rows = []
    for world in study.TUNING:
        for rate, score in zip(study.RATES, (0.1, 0.3, 0.2, 0.25), strict=True):
            rows.append(record("tuning", "pmd", *world, f"{rate:g}", (1, score, score)))
    rates = study.tuned(by_name(rows))
    assert rates["pmd"] == rates["pmd-solved"] == study.RATES[1]
    assert study.tuned(by_name(rows[:-1]))["pmd"] == 1e-3  # not before all of its runs are there
    assert study.auc(rows[0]) == pytest.approx(0.1)  # the base's score is not counted


# -- arithmetic


def test_holm_s_correction():
    assert tables.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert tables.holm([0.9, 0.6]) == [1.0, 1.0]


def test_intervals():
    values = pd.Series([0.1, 0.4, 0.2, 0.5])
    half = 3.182446 * values.std() / 2  # t of 3 degrees of freedom, from a table
    assert tables.ends(values) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-6)
    assert tables.text([0.5]) == "0.500" and tables.text([]) == "-"


def test_equal_compute_gives_the_dearer_method_fewer_steps():
    sdpo = record("main", "sdpo", 500, scores=(0, 0.4, 0.8))
    pmd_ = record("main", "pmd", 500, scores=(0, 0.4, 0.8))
    for row in pmd_["test"]:
        row["cpu"] *= 2
    runs = tables.frame(by_name([sdpo, pmd_]))
    cells = [tables.cell(runs, "main", arm) for arm in ("sdpo", "pmd")]
    # over 20 seconds SDPO goes from 0 to 0.8, PMD from 0 to 0.4, both in a straight line
    found = [tables.at_equal_cost(cell, cells, "cpu")[500] for cell in cells]
    assert found == pytest.approx([0.4, 0.2])
    found = [tables.at_equal_cost(cell, cells, "tokens")[500] for cell in cells]
    assert found == pytest.approx([0.4, 0.4])
    del sdpo["test"][-1]["tokens"]  # records of code that did not count them
    assert tables.at_equal_cost(cells[1], cells, "tokens").empty


@pytest.fixture
def records():
    """PMD is above SDPO in feedback worlds, below it in plain ones, and level with transient."""
    rows, rng = [], random.Random(0)
    for world, kind, checkpoint in study.MAIN[::4]:
        for arm in study.ARMS:
            score = 0.5 + rng.uniform(-0.02, 0.02)
            if arm == "sdpo":
                score += -0.1 if kind == "feedback" else 0.1
            more = {"lender": 0.3} if arm == "frozen-memory" else {}
            scores = (0.03, score, score)
            rows.append(record("main", arm, world, kind, checkpoint, scores=scores, **more))
    for world in study.MASTERED:
        for job in study.mastered(RATES):
            if job.world == world[0]:
                final = 0.9 if "unmastered" in job.label else 0.8 + rng.uniform(0, 0.01)
                scores = (0, 0.6, final)
                rows.append(record("mastered", job.arm, *world, job.label, scores))
    for job in study.scale(RATES):
        place = job.world, job.kind, job.checkpoint, job.label
        rows.append(record("scale", job.arm, *place, (0, 0.3, 0.3)))
    rows.append({"job": "tuning/pmd/0.001/411", "part": "tuning", "failed": "OSError: disk"})
    return by_name(rows)


def planned(records) -> dict:
    return Counter(row["part"] for row in records.values())


def test_the_report(records, tmp_path):
    said = tables.report(records, RATES, tmp_path, planned(records))
    text = (tmp_path / "results.md").read_text()
    assert "1 runs failed: tuning/pmd/0.001/411 (OSError: disk)" in text and "figures" in said
    cells = {}
    for line in text.splitlines():
        if line[:3] == "| P" and line[3].isdigit():
            name, verdict, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            cells[name[:2]] = verdict, *rest
    verdicts = {name: row[0] for name, row in cells.items()}
    assert verdicts == {
        "P1": "**won**",
        "P2": "**lost**",
        "P3": "**open**",
        "P4": "**open**",
        "P5": "**open**",
    }
    assert cells["P1"][1].startswith("+0.09") and cells["P1"][4] == "6 of 6"
    assert cells["P3"][4].endswith("of 12")
    assert "| frozen policy, memory in the prompt | 0.300 [0.300, 0.300] | - |" in text
    assert "The declared criterion for leaving them out is met." in text
    assert "| misreads, plain | 0.000 [0.000, 0.000] | 0.300 [0.300, 0.300] |" in text
    assert "| PMD, feedback, unsolved | 0.200 | - | - | - | 0.150 | - | - | 0.300 |" in text
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tables.report(records, RATES, tmp_path, planned(records))
    assert {"curves.png", "teacher.png", "scale.png"} <= first.keys()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_primaries_are_those_of_scipy():
    """In the whole grid, from records in no order, of which some failed."""
    rng, rows, auc = np.random.default_rng(0), [], {}
    for world, kind, checkpoint in study.MAIN:
        for arm in study.ARMS:
            score = 0.5 + 0.05 * (world % 7) + rng.normal(0, 0.03) - 0.04 * (arm == "sdpo")
            score -= 0.1 * (arm == "frozen-memory")
            row = record("main", arm, world, kind, checkpoint, scores=(0.9, score, score + 0.1))
            auc[arm, world] = score + 0.05
            rows.append(row)
    for job in study.scale(RATES):  # of the same worlds, by other checkpoints
        rows.append(record("scale", job.arm, job.world, job.kind, job.checkpoint, job.label))
    rng.shuffle(rows)
    for row in rows:
        if row["job"] in ("main/pmd/512", "main/sdpo/540"):
            del row["test"]
            del auc[row["arm"], row["world"]]
    runs = tables.frame(by_name(rows))
    checkpoints = runs[runs.part == "main"].groupby("world").checkpoint.first()
    cells, p_values = {}, []
    for line in tables.primaries(runs, checkpoints).splitlines()[2:7]:
        name, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        cells[name] = rest
    feedback, plain = range(510, 534), range(534, 558)
    asked = {
        "P1: PMD minus SDPO (feedback)": ("sdpo", [*feedback]),
        "P2: PMD minus SDPO (plain)": ("sdpo", [*plain]),
        "P3: PMD minus PMD, transient memory (feedback and plain)": (
            "pmd-transient",
            [*feedback, *plain],
        ),
        "P4: PMD minus frozen memory (feedback and plain)": ("frozen-memory", [*feedback, *plain]),
        "P5: PMD minus PMD, lessons hidden (plain)": ("pmd-nolessons", [*plain]),
    }
    assert list(cells) == list(asked)
    for (arm, worlds), row in zip(asked.values(), cells.values(), strict=True):
        both = [w for w in worlds if ("pmd", w) in auc and (arm, w) in auc]
        ours, theirs = (np.array([auc[a, w] for w in both]) for a in ("pmd", arm))
        test = stats.ttest_rel(ours, theirs)
        low, high = test.confidence_interval(0.95)
        assert row[1] == f"{(ours - theirs).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        assert row[2] == f"{test.pvalue:.2g}"
        assert row[4] == f"{(ours > theirs).sum()} of {len(both)}"
        assert row[5] == f"{stats.wilcoxon(ours, theirs).pvalue:.2g}"
        seeds = np.array([(w - 510) % 24 % 3 for w in both])
        means = [(ours - theirs)[seeds == seed].mean() for seed in range(3)]
        assert row[6] == ", ".join(f"{mean:+.3f}" for mean in means)
        p_values.append(test.pvalue)
    assert [row[3] for row in cells.values()] == [f"{p:.2g}" for p in tables.holm(p_values)]
    verdicts = [row[0] for row in cells.values()]
    assert verdicts == ["**won**", "**won**", "**open**", "**won**", "**open**"]


def test_a_difference_that_is_the_same_in_all_worlds_has_a_p():
    values = pd.Series([0.25] * 6)
    assert tables.p_of(tables.t_test, values) < 1e-10
    assert tables.p_of(stats.wilcoxon, values) == pytest.approx(2 / 2**6)
    assert tables.p_of(tables.t_test, values * 0) == tables.p_of(stats.wilcoxon, values * 0) == 1


def test_a_world_whose_budget_failed_is_in_no_comparison_at_equal_compute():
    rows = [record("main", arm, world) for world in (1, 2) for arm in ("sdpo", "pmd", "grpo")]
    del rows[0]["test"]  # SDPO's, in world 1
    runs = tables.frame(by_name(rows))
    sdpo, pmd_, grpo = (tables.cell(runs, "main", arm) for arm in ("sdpo", "pmd", "grpo"))
    for cell in (pmd_, grpo):
        assert list(tables.at_equal_cost(cell, [sdpo, pmd_], "cpu").index) == [2]


@pytest.mark.parametrize(
    "plain, feedback, said",
    [
        ((0.1, 0.11), (0.1, 0.11), "is met. Its interval in plain worlds lies above 0: yes."),
        ((0.1, 0.11), (-0.1, 0.1), "is met. "),
        ((0.1, 0.11), (-0.11, -0.1), "is not met. "),
        ((-0.1, 0.2), (0.1, 0.11), "is not met. Its interval in plain worlds lies above 0: no."),
    ],
)
def test_the_declared_criterion_for_supervise_solved(plain, feedback, said):
    rows = []
    for i in range(6):
        for kind, gaps in (("plain", plain), ("feedback", feedback)):
            for arm, score in (("pmd", 0.5), ("pmd-solved", 0.5 + gaps[i % 2])):
                world = i + 10 * (kind == "plain")
                rows.append(record("main", arm, world, kind, scores=(0, score, score)))
    found = tables.supervise_rule(tables.frame(by_name(rows)))
    assert f"`--supervise solved` as the default {said}" in found


def test_an_arm_of_which_a_run_failed_is_named_in_the_table_of_rates():
    rows = []
    for world in study.TUNING:
        for arm in ("sdpo", "pmd"):
            for rate, score in zip(study.RATES, (0.1, 0.3, 0.2, 0.25), strict=True):
                rows.append(record("tuning", arm, *world, f"{rate:g}", (1, score, score)))
    whole = tables.rates_table(tables.frame(by_name(rows)), study.tuned(by_name(rows)))
    assert "| PMD | 0.100 | **0.300** | 0.200 | 0.250 |" in whole and "failed" not in whole
    del rows[-1]["test"]  # PMD's at the highest rate
    found = tables.rates_table(tables.frame(by_name(rows)), study.tuned(by_name(rows)))
    assert "| PMD | 0.100 | 0.300 | **0.200** | 0.250 (5 of 6 worlds) |" in found
    assert "| SDPO | 0.100 | **0.300** | 0.200 | 0.250 |" in found
    assert "An arm with a failed run has the preset's rate, 0.001." in found


def test_no_other_part_shows_runs_of_a_part_that_is_not_complete(records, tmp_path):
    tables.report(records, RATES, tmp_path, planned(records) | {"main": 336})
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "| 0.9M | - | - | - | - | - | - |" in lines
    assert (tmp_path / "scale.png").exists()


def test_runs_that_all_failed_are_named(tmp_path):
    failed = {"job": "tuning/pmd/0.001/411", "part": "tuning", "failed": "OSError: disk"}
    tables.report(by_name([failed]), RATES, tmp_path, {"tuning": 1, "main": 336})
    text = (tmp_path / "results.md").read_text()
    assert "1 runs failed: tuning/pmd/0.001/411 (OSError: disk)" in text


def test_a_part_is_shown_when_all_its_runs_are_made(records, tmp_path):
    """No comparison can be looked at, and stopped, before its runs are made."""
    tables.report(records, RATES, tmp_path, planned(records) | {"main": 336})
    text = (tmp_path / "results.md").read_text()
    assert "Part main has 84 of its 336 runs: not shown yet." in text
    assert "P1" not in text and "won" not in text and "## Mastered problems" in text
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    "finals, means, unmet, said",
    [
        ((0.1, 0.11), (0.0, 0.01), "token", "is met"),  # it is of `sequence` alone
        ((0.1, 0.11), (0.0, 0.01), "sequence", "is not met"),
        ((0.1, 0.11), (-0.019, -0.018), "token", "is met"),  # within the margin
        ((0.1, 0.11), (-0.021, -0.0201), "token", "is not met"),
        ((-0.1, 0.3), (0.0, 0.01), "token", "is not met"),  # above 0 in the mean, not by interval
    ],
)
def test_the_declared_criterion_for_mastered_problems(finals, means, unmet, said):
    """unmet: of the two means over tokens, the one under which leaving them out loses."""
    rows = []
    for number, (world, *_) in enumerate(study.MASTERED):
        for job in study.mastered(RATES):
            final, mean = 0.5, 0.4
            if job.world == world and "unmastered" in job.label:
                final, mean = 0.5 + finals[number % 2], 0.4 + means[number % 2]
                if job.label.startswith(unmet):
                    final -= 0.5
            if job.world == world:
                scores = (0, 2 * mean - final, final)  # whose mean is `mean`
                rows.append(record("mastered", job.arm, world, label=job.label, scores=scores))
    assert f"leaving them out {said}." in tables.mastered(tables.frame(by_name(rows)))


def test_mastered_problems_stay_supervised_if_one_teacher_loses(records, tmp_path):
    for row in records.values():
        if row["part"] == "mastered" and row["arm"] == "sdpo" and "unmastered" in row["label"]:
            row["test"][-1]["avg"] = 0.7
    runs = tables.frame(records)
    assert "leaving them out is not met" in tables.mastered(runs)


def test_a_report_without_records(tmp_path):
    tables.report({}, RATES, tmp_path, {part: 3 for part in study.PARTS})
    assert "There are no records yet" in (tmp_path / "results.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.md"]


PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from study.study import run_all

def work(job, out, short):
    while True:
        (out / "beat").write_text(str(time.time()))
        time.sleep(0.05)

if __name__ == "__main__":
    run_all(work, [0], {{}}, None, Path({out!r}), 1, {{}})
"""


@pytest.mark.slow
def test_workers_end_with_the_program(tmp_path):
    """A killed study leaves no worker behind that writes into the runs of its next start."""
    path, beat = tmp_path / "program.py", tmp_path / "beat"
    path.write_text(PROGRAM.format(here=str(study.HERE.parent), out=str(tmp_path)))
    program = subprocess.Popen([sys.executable, path], stderr=subprocess.DEVNULL)
    while not beat.exists():
        assert program.poll() is None
        time.sleep(0.1)
    program.kill()
    program.wait()
    time.sleep(2)
    last = beat.read_text()
    time.sleep(1)
    assert beat.read_text() == last


def test_a_record_is_what_its_run_left(tmp_path):
    """Tokens and CPU seconds of an evaluation are those of all steps up to and with its own."""
    lines = []
    for step in range(21):
        if step:
            tokens = {"sample": 3, "teacher": step}
            lines.append({"step": step, "forward_tokens": tokens, "memory": {"insight": step}})
        if step % 10 == 0:
            scores = {"avg_at_k": step / 100, "maj_at_k": 0.5, "best_at_k": 0.75}
            lines += [{"step": step, "split": split, **scores} for split in ("dev", "test")]
    looks = [{"step": step, "cpu": 1.5 * step, "teacher": {}} for step in (10, 20)]
    for name, rows in (("metrics", lines), ("watched", looks)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    found = study.harvest(tmp_path)
    costs = [(row["step"], row["avg"], row["cpu"], row["tokens"]) for row in found["test"]]
    assert costs == [(0, 0.0, 0.0, 0), (10, 0.1, 15.0, 30 + 55), (20, 0.2, 30.0, 60 + 210)]
    assert [(row["step"], row["insight"]) for row in found["memory"]] == [(10, 10), (20, 20)]
    assert found["teacher"] == looks


# -- what is watched


@pytest.fixture
def method(make_config, policy, tokenizer):
    """SDPO, watched, at a solved and an unsolved problem."""
    kind = variants.watched(method_class("sdpo"))
    method = kind.__new__(kind)
    parts = method_of(make_config(), policy, policy, tokenizer=tokenizer, task=load_task("nano"))
    vars(method).update(vars(parts))
    method.solved, method.read = set(), {}
    return method


def test_the_quality_of_a_teacher_is_what_its_readers_believe(method, policy, tokenizer):
    solved, unsolved = method.task.train[0], method.task.train[100]
    rollouts = []
    for problem, reward in ((solved, 1.0), (solved, 0.0), (unsolved, 0.0)):
        id = f"1/{problem.id}/{len(rollouts)}"
        rollouts.append(pmd.Rollout([1], [5], None, "", True, id, problem, reward))
        rollouts[-1].teacher_ids = [1]
    told = [("rule", rule) for rule in hidden_rules(unsolved)]
    method.rollouts, method.solved = rollouts, {solved.id}
    method.read = {rollouts[2].id: {"strategies": told, "lessons": []}}
    method.read[rollouts[0].id] = {"solution": "read of a success, and not looked at"}
    found = method.look()
    assert found["solved"].keys() == {"student", "weights", "all"}  # of the failed rollout
    readers = found["unsolved"]
    assert readers.keys() == {"student", "weights", "strategies", "all"}
    assert readers["weights"] == [0.0, 1]  # teacher and student are one model here
    assert readers["strategies"] == readers["all"]
    # by transformers' own logits, word after word
    vocabulary, means = tokenizer.get_vocab(), []
    right = unsolved.answer.split()
    rules = hidden_rules(unsolved)
    for rule in rules:
        right[right.index(rule.split("=")[0] + "=*")] = rule
    for prompt in (unsolved.prompt, compose(unsolved.prompt, strategies=told)):
        before = encode_prompt(tokenizer, prompt)
        ids = before + tokenizer(" ".join(right), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            probabilities = policy(torch.tensor([ids])).logits[0].softmax(-1)
        steps = []
        for rule in rules:
            token = vocabulary[rule]
            steps.append(float(probabilities[ids.index(token, len(before)) - 1, token]))
        means.append(np.mean(steps))
    assert readers["student"][0] == pytest.approx(means[0], abs=1e-4)
    assert readers["strategies"][0] == pytest.approx(means[1] - means[0], abs=1e-4)
    assert readers["strategies"][0] > 0.5


def test_lessons_that_no_teacher_reads(make_config):
    kind = variants.watched(method_class("pmd"), lessons=False)
    method = kind.__new__(kind)
    method.recall = lambda *args: [{"lessons": [("trap", "vo!rev")], "solution": "x"}]
    method.cfg = make_config()
    problem = load_task("nano").train[0]
    rollout = pmd.Rollout([1], [5], None, "", True, "1/p/0", problem, 0.0)
    assert method.contexts(1, [rollout]) == [{"lessons": [], "solution": "x"}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "pmd"])
def test_watching_changes_nothing(name, make_config, monkeypatch):
    monkeypatch.setattr(variants, "EVERY", 1)
    rows = {}
    for label in ("plain", "watched"):
        method = name if label == "plain" else str(study.HERE / "arms" / f"{name}.py")
        cfg = make_config(method=method, name=label)
        pmd.train(cfg)
        folder = study.Path(cfg.out) / label
        rows[label] = read_lines(folder / "metrics.jsonl")
        for row in rows[label]:
            for key in ("seconds", "share", "tokens_per_second", "peak_gb"):
                row.pop(key, None)
    assert rows["plain"] == rows["watched"]
    looks = read_lines(folder / "watched.jsonl")
    assert [look["step"] for look in looks] == [1, 2]
    assert 0 < looks[0]["cpu"] < looks[1]["cpu"]
    readers = set(looks[1]["teacher"]["unsolved"])
    assert readers == {"student"} if name == "grpo" else {"student", "weights", "all"} <= readers


def test_the_seconds_of_a_run_are_those_of_its_steps_without_watching(tmp_path, monkeypatch):
    now = [0.0]

    def work(seconds):
        now[0] += seconds

    class Base:
        attempt = weigh = follow = lambda self, *args: work(1)

    monkeypatch.setattr(variants.time, "process_time", lambda: now[0])
    kind = variants.watched(Base)
    method = kind.__new__(kind)
    method.folder, method.spent = tmp_path, 0.0
    method.look = lambda: work(100)
    for step in range(1, 21):
        method.attempt(step, [])
        method.weigh(step, [])
        method.follow(step)
        work(1000)  # evaluation
    looks = read_lines(tmp_path / "watched.jsonl")
    assert [(look["step"], look["cpu"]) for look in looks] == [(10, 30.0), (20, 60.0)]


def test_an_arm_is_the_method_that_its_name_says():
    """Watched, and nothing else changed but for lessons."""
    for arm, (file, _) in study.ARMS.items():
        kind = method_class(str(study.HERE / "arms" / f"{file}.py"))
        watched, base = kind.__bases__
        name = "pmd" if arm in ("pmd-nolessons", "pmd-solved") else arm
        assert watched is variants.Watched and base is method_class(name)
        assert kind.lessons == (arm != "pmd-nolessons")


def test_a_quick_look_leaves_the_worlds_of_the_study_alone(monkeypatch):
    declared = {world for world, *_ in study.TUNING + study.MAIN + study.MASTERED}
    for name in ("TUNING", "MAIN", "MASTERED", "RATES", "CHECKPOINTS", "SIZES"):
        monkeypatch.setattr(study, name, getattr(study, name))
    assert study.shortened() == {"steps": 10, "eval_problems": 20}
    jobs = [job for make in study.PARTS.values() for job in make(RATES)]
    assert jobs and not declared & {job.world for job in jobs}
    monkeypatch.undo()  # as in a worker, which has not been shortened
    assert {pickle.loads(pickle.dumps(job)).model for job in jobs} == {"nano"}


def test_a_block_is_set_beside_the_weights_where_both_are_of_the_same_problems():
    looks = [
        {"weights": [-0.2, 4], "lessons": [-0.1, 4]},
        {"weights": [-0.2, 4], "lessons": [0.9, 3]},  # one problem has no lesson
        {"weights": [-0.3, 2], "lessons": [-0.6, 2]},
        {"student": [0.5, 2]},
    ]
    teacher = [{"step": 10, "teacher": {"unsolved": look}} for look in looks]
    runs = pd.DataFrame({"teacher": [teacher, teacher[3:]]}, index=[7, 8])
    found = tables.beside_weights(runs, "unsolved", "lessons")
    assert found.to_dict() == {7: pytest.approx((0.1 - 0.3) / 2)}
    assert tables.beside_weights(runs, "solved", "lessons").empty


# -- the run on real text


def test_a_task_of_the_real_run_is_written_with_keys_that_its_verifier_takes(tmp_path):
    for name in ("chain_sum", "word_sorting"):
        folder = tmp_path / name
        rows = real.problems_of(name, 8)
        real.write_task(folder, rows[:5], rows[5:])
        task = load_task(str(folder), dev=0)
        assert (len(task.train), len(task.test)) == (5, 3)
        problems = task.train + task.test
        assert len({p.prompt for p in problems}) == 8 and rows == real.problems_of(name, 8)
        assert all(verify(p, p.answer).reward == 1 for p in problems)
        assert not any(verify(p, "none").reward for p in problems)


def test_the_task_of_the_real_run_follows_its_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "RESULTS", tmp_path)
    fit = {"keys": 9, "problems": real.LOOKED_AT, "right": 0.3, "mixed": 0.4}
    rows = {
        "few keys": fit | {"keys": 3, "mixed": 0.9},
        "too easy": fit | {"right": 0.7, "mixed": 0.9},
        "too hard": fit | {"right": 0.09, "mixed": 0.9},
        "too long": fit | {"problems": 30, "mixed": 0.9},
        "good": fit,
        "worse": fit | {"mixed": 0.3},
    }
    write_lines(tmp_path / "tasks.jsonl", [{"task": name} | row for name, row in rows.items()])
    assert real.chosen() == "good"
    write_lines(tmp_path / "tasks.jsonl", [{"task": "too easy"} | rows["too easy"]])
    with pytest.raises(SystemExit, match="no task fits"):
        real.chosen()


def test_a_real_run_is_kept_without_the_places_of_a_machine(tmp_path, monkeypatch):
    """And what is kept is not trained again."""
    monkeypatch.setattr(real, "RESULTS", tmp_path / "real")
    folder = tmp_path / "work" / "grpo"
    folder.mkdir(parents=True)
    places = {"model": "/home/me/smollm2", "task": "/home/me/test", "out": "/home/me"}
    (folder / "config.json").write_text(json.dumps(places | {"lr": 1e-5}))
    for file in ("samples.jsonl", "metrics.jsonl"):
        write_lines(folder / file, [{"step": 0}])
    real.keep(tmp_path / "work", "grpo")
    kept = json.loads((real.RESULTS / "grpo" / "config.json").read_text())
    assert kept == {"model": "smollm2", "task": "test", "out": "me", "lr": 1e-5}
    monkeypatch.setattr(real.subprocess, "run", None)
    real.run("m", "t", tmp_path / "work", "grpo", "1e-5", "grpo", 60, 20)
    with pytest.raises(TypeError):  # another one would be trained
        real.run("m", "t", tmp_path / "work", "sdpo", "1e-5", "sdpo", 60, 20)


def test_the_page_of_the_real_run_is_made_of_its_records(tmp_path, monkeypatch):
    """The rate is that with the best mean after the start."""
    monkeypatch.setattr(real, "RESULTS", tmp_path)
    (tmp_path / "tasks.jsonl").write_text((real.HERE / "real" / "tasks.jsonl").read_text())

    def row(split, step, avg):
        return {"split": split, "step": step, "avg_at_k": avg, "interval": [avg, avg], "k": 4}

    for method in real.METHODS:
        for i, rate in enumerate(real.RATES):
            folder = tmp_path / real.name_of(method, rate)
            folder.mkdir(parents=True)
            rows = [row("test", 0, 0.9 - i), row("test", 10, 0.1 * i), row("test", 20, 0.2)]
            write_lines(folder / "metrics.jsonl", [*rows, row("dev", 20, 1.0 - i)])
        assert real.tuned(method) == real.RATES[-1]
        folder = tmp_path / method
        folder.mkdir()
        steps = range(0, real.STEPS + 1, real.EVERY)
        rows = [row("test", step, step / 100) for step in steps]
        write_lines(
            folder / "metrics.jsonl",
            [*rows, {"step": 1, "seconds": {"sample": 90.0, "evaluate": 50.0, "reflect": 30.0}}],
        )
        (folder / "config.json").write_text('{"lr": 3e-5}')
    page = Path(real.report()).read_text()
    assert (
        "| `sdpo` | 3e-05 | 0.000 [0.000, 0.000] | 0.200 [" in page
        and "0.600 [0.600, 0.600] | 2 |" in page
    )
    assert f"| `pmd` | {' | '.join(f'{0.1 + 0.05 * i:.3f}' for i in range(3))} |" in page
    assert (tmp_path / "curve.png").is_file()
