"""The study's grid, and its arithmetic on records of which every number can be told in advance."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from conftest import Attempt, Question

from memory import NANO as NANO_FORMS
from memory import parse_items, reflection_prompt
from nano.make import attempt_text
from nano.world import OPERATIONS
from runtime.replies import parse
from runtime.sampler import Sampler
from study import study, tables, variants


def record(name, world, checkpoint=0, scores=(0, 0.2, 0.4), dev=(0, 0, 0), **more):
    rows = [
        {"step": 10 * i, "avg": s, "maj": s, "best": s + 0.1, "tokens": 10.0}
        for i, s in enumerate(scores)
    ]
    steps = [
        {
            "step": 10 * i,
            "reward": s,
            "groups_solved": s,
            "memory": [i, 2 * i, i],
            "right": 0.75,
            "rejected": 0,
        }
        for i, s in enumerate(scores)
        if i
    ]
    return {
        "job": name,
        "world": world,
        "checkpoint": checkpoint,
        "test": rows,
        "solved": "0110",
        "steps": steps,
        "dev": [{**row, "avg": d} for row, d in zip(rows, dev, strict=True)],
        **more,
    }


def records_of(*rows):
    return {row["job"]: row for row in rows}


def test_the_grid_is_the_declared_one():
    main = study.grid("main", dict.fromkeys(study.TUNED, 1e-3))
    assert len(main) == 24 * 7 and len({job.name for job in main}) == len(main)
    assert Counter(job.checkpoint for job in main) == {0: 56, 1: 56, 2: 56}
    assert not set(study.WORLDS) & set(study.TUNING_WORLDS)
    known = {job.name for part in study.PARTS for job in study.grid(part, {})}
    assert len(known) == sum(
        len(study.grid(part, {})) for part in study.PARTS
    )  # no two jobs share a name
    assert all(
        need in known for part in study.PARTS for job in study.grid(part, {}) for need in job.needs
    )
    # no method gets a knob that another does not: only method, rate and lender may differ
    for part in ("main", "groups", "rarity", "epochs"):
        rest = {}
        for job in study.grid(part, {}):
            label = max((m for m in study.METHODS if job.name.split("/")[1].startswith(m)), key=len)
            flags = {
                k: v
                for k, v in job.flags.items()
                if k not in ("method", "lr", "memory_from", "supervise")
            }
            setting = job.world, job.name.split("/")[1].removeprefix(label)
            rest.setdefault(setting, set()).add(json.dumps([job.kind, flags]))
        assert all(len(found) == 1 for found in rest.values())
    with pytest.raises(ValueError, match="there is no part 'all'; there are tuning, main"):
        study.grid("all", {})


def test_the_rate_of_a_method_is_its_best_by_auc():
    rows = [
        record(f"tuning/{m}/{w}@{rate:g}", w, scores=(1, s, s))
        for m in study.TUNED
        for w in study.TUNING_WORLDS
        for rate, s in zip(study.RATES, (0.1, 0.3, 0.2, 0.25), strict=True)
    ]
    assert study.tuned(records_of(*rows)) == dict.fromkeys(study.TUNED, study.RATES[1])
    assert study.tuned(records_of(*rows[:-1])).keys() == set(
        study.TUNED[:-1]
    )  # not before all of its runs are there
    assert study.auc(rows[0]) == pytest.approx(0.1)  # the base's score is not counted


def test_cells():
    cell = tables.Cell(
        records_of(
            record("main/pmd/200", 200, scores=(0, 0.2, 0.6), dev=(0, 0.5, 0.5)),
            record("main/pmd/201", 201, scores=(0, 0.9, 0.8)),
            record("main/pmd-transient/200", 200),
            {"job": "main/pmd/202", "world": 202, "failed": "x"},
        ),
        "main",
        "pmd",
    )
    assert cell.auc() == {200: pytest.approx(0.4), 201: pytest.approx(0.85)}
    assert cell.on_dev() == {200: 0.2, 201: 0}  # the earliest of equals
    assert cell.on_test() == {200: 0.6, 201: 0.9} and cell.after(10) == {200: 0.2, 201: 0.9}
    # 32 rollouts a step: .5 lies three quarters of the way from .2 at step 10 to .6 at step 20,
    # and 5/9 of the way from 0 to .9 at step 10
    assert cell.rollouts_to(0.5) == pytest.approx([17.5 * 32, 10 * 5 / 9 * 32])
    assert list(cell.rollouts_to(0.9)) == [math.inf, 320]


def test_intervals_and_differences():
    values = [0.1, 0.4, 0.2, 0.5]
    mean, low, high = tables.spread(values)
    half = 3.182446 * np.std(values, ddof=1) / 2  # t of 3 degrees of freedom, from a table
    assert (mean, low, high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-6)
    assert tables.text([0.5]) == "0.500"
    row = tables.compared({1: 0.5, 2: 0.7, 3: 0.1}, {1: 0.4, 2: 0.4, 4: 1}, {1: 0, 2: 1})
    assert row[1] == "2 of 2" and row[4] == "+0.100, +0.300"
    assert row[0].startswith("0.200")
    assert tables.spread([0.1, np.nan, 0.3])[0] == pytest.approx(0.2)


def test_coverage_counts_who_solves_exactly():
    solved = {"grpo": "1100", "sdpo": "1010", "pmd": "1000"}
    main = {
        m: tables.Cell(records_of({**record(f"main/{m}/200", 200), "solved": s}), "main", m)
        for m, s in solved.items()
    }
    found = {who: list(share) for who, share in tables.venn(main, list(solved)).items()}
    assert (
        len(found) == 8 and found.pop("GRPO, SDPO, PMD") == [0.25] and found.pop("GRPO") == [0.25]
    )
    assert (
        found.pop("SDPO") == [0.25]
        and found.pop("none") == [0.25]
        and set(map(tuple, found.values())) == {(0.0,)}
    )


def test_equal_compute_gives_the_slower_method_fewer_steps():
    fast, slow = (
        tables.Cell(records_of(record(f"main/{m}/200", 200, scores=(0, 0.4, 0.8))), "main", m)
        for m in ("sdpo", "pmd")
    )
    found = tables.at_equal_compute(
        slow, fast, {200: 2.0}, {200: 1.0}
    )  # twice as slow: steps 5 and 10
    assert found == {200: pytest.approx((0.2 + 0.4) / 2)}


def variant(**flags):
    """The study's PMD with some flags, and nothing else."""
    method = object.__new__(variants.Method)
    method.cfg, method.memory = variants.Config(**flags), None
    return method


def test_wrong_reflections_are_a_share_and_keyed():
    reply = json.dumps(
        {
            "strategies": [{"title": "rule", "content": "vo=rev"}] * 10,
            "lessons": [{"title": "trap", "content": "vo!inc"}],
        }
    )
    prompts = [str(i) for i in range(100)]
    assert variant().mistaken(1, prompts, [reply] * 100) == [reply] * 100
    changed = variant(wrong=0.3).mistaken(1, prompts, [reply] * 100)
    assert changed == variant(wrong=0.3).mistaken(1, prompts, [reply] * 100)
    assert changed != variant(wrong=0.3).mistaken(2, prompts, [reply] * 100)
    contents = [item["content"] for text in changed for item in json.loads(text)["strategies"]]
    assert 0.25 < sum(c != "vo=rev" for c in contents) / len(contents) < 0.35
    assert all(c.split("=")[1] in OPERATIONS for c in contents)
    assert all(
        json.loads(text)["lessons"] == [{"title": "trap", "content": "vo!inc"}] for text in changed
    )


def test_the_embedded_model_s_own_reflections_are_made_wrong(policy, tokenizer, make_config):
    won = attempt_text(("lo", "mi"), ("rev", "inc"), (1, 2, 3, 4))
    prompt = reflection_prompt(NANO_FORMS, "Apply lo mi to 1 2 3 4", [won], [], 1, 4)
    replies = Sampler(policy, tokenizer, make_config()).ask([prompt])
    claims = {}
    for share in (0.0, 1.0):
        (reply,) = variant(wrong=share).mistaken(0, [prompt], replies)
        items = parse_items(parse(reply), "strategies", "title", "content")
        claims[share] = dict(content.strip().split("=") for _, content in items)
    assert claims[0.0] == {"lo": "rev", "mi": "inc"} and claims[1.0].keys() == claims[0.0].keys()
    assert all(claims[1.0][s] != claims[0.0][s] for s in ("lo", "mi"))
    assert all(claims[1.0][s] in OPERATIONS for s in ("lo", "mi"))


def test_the_memory_reads_wrong_replies_while_it_remembers(make_memory):
    """And no longer: what generates for the memory is as before."""
    reply = json.dumps({"strategies": [{"title": "rule", "content": "vo=rev"}], "lessons": []})
    memory = make_memory(lambda prompt: reply)
    method = variant(wrong=1.0, behavior_every=9)
    generate, method.memory = memory.generate, memory
    problem = Question("p", "Apply vo to 1 2 3 4")
    memory.add_problems([problem])
    method.remember(1, [problem], [Attempt("1/p/0", problem, "1 2 3 4 vo vo=rev 4 3 2 1", 1.0)])
    (strategy,) = memory.living("insight")
    assert strategy.text.startswith("vo=") and strategy.text != "vo=rev"
    assert memory.generate is generate


def test_lessons_that_no_teacher_reads():
    problem = Question("p", "Apply vo to 1 2 3 4")
    rollout = Attempt("1/p/0", problem, "1 2 3 4 vo vo=rev 4 3 2 1")
    method = variant(lessons=False)
    method.recall = lambda *args: [{"lessons": [("trap", "vo!rev")], "solution": "x"}]
    assert method.contexts(1, [rollout]) == [{"lessons": [], "solution": "x"}]
    method.cfg = variants.Config()
    assert method.contexts(1, [rollout])[0]["lessons"]


def test_a_rate_that_falls_over_the_second_half():
    method = variant(steps=160, lr=0.8, falls=True)
    method.lr = method.cfg.lr
    rates = {}
    for step in (1, 80, 81, 120, 121, 160):
        method.weigh(step, [])
        rates[step] = method.cfg.lr
    falling = {120: 0.41, 121: 0.4, 160: 0.01}
    assert rates == pytest.approx({1: 0.8, 80: 0.8, 81: 0.8, **falling})


def test_worlds_of_other_kinds():
    for kind, names, shares in (("rare", 40, True), ("common", 16, True), ("apart", 16, False)):
        train, test = study.write_world.__globals__["make_world"](7, **study.WORLD_KINDS[kind])
        assert len(train) == len(test) == 160 and not {r["id"] for r in train} & {
            r["id"] for r in test
        }
        of = {tuple(row["id"].split("-")[:-1]) for row in train}
        used = Counter(s for name in of for s in name)
        assert len(of) == names and (max(used.values()) > 1) == shares


@pytest.mark.parametrize("ahead", [True, False])
def test_the_report_says_who_is_ahead_first(tmp_path, monkeypatch, ahead):
    if not ahead:  # the figures of the other half are enough
        monkeypatch.setattr(tables, "figures", lambda *args: None)
    top, low = (0, 0.5, 0.9), (0, 0.2, 0.7)
    rows = []
    for w, c in ((200, 0), (201, 0), (208, 1), (216, 2)):
        gain = (w % 3) / 50
        for m in study.METHODS:
            scores = top if (m == "pmd") == ahead else low
            rows.append(
                record(f"main/{m}/{w}", w, c, [s and s + gain * (m == "pmd") for s in scores])
            )
        rows += [record(f"tiers/pmd-{t}/{w}", w, c) for t in study.TIERS[:-1]]
    rows.append({"job": "main/pmd/223", "world": 223, "checkpoint": 2, "failed": "OSError: disk"})
    times = {
        row["job"]: {"step_seconds": 2.0 if "pmd" in row["job"] else 1.0, "cpu": 9.0}
        for row in rows
    }
    said = tables.report(records_of(*rows), times, {}, tmp_path, study)
    text = (tmp_path / "results.md").read_text()
    first = text.splitlines()[2]
    assert first.startswith(
        "**PMD minus SDPO in AUC, the primary comparison: " + ("0.2" if ahead else "-0.2")
    )
    assert "PMD ahead in " + ("4" if ahead else "0") + " of 4 worlds" in first
    assert f"is {'' if ahead else 'NOT '}the paper's" in first  # ties fall to the paper's order
    assert (
        "1 runs failed: main/pmd/223: OSError: disk" in text
        and "| **primary** PMD - SDPO |" in text
    )
    assert "| PMD | 2.00 [2.00, 2.00] | 1.00 [1.00, 1.00] |" in text and "results.md" in said
    for name in ("curves", "differences", "memory") if ahead else ():
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_knobs_are_paired_with_main_in_the_same_worlds(tmp_path):
    rows = [
        record(f"main/{m}/{w}", w, scores=(0, 0.4, 0.4 + (m == "pmd") * 0.2))
        for m in study.COMPARED
        for w in range(200, 204)
    ]
    rows += [
        record(f"groups/{m}-{g}/{w}", w, scores=(0, g / 10, g / 10))
        for m in ("pmd", "sdpo")
        for g in (2, 8)
        for w in (200, 201)
    ]
    rows += [
        record(f"rates/{m}-{rate:g}/{w}", w, scores=(0, 0.1, 0.1 + (m == "sdpo") * 0.1))
        for m in ("pmd", "sdpo")
        for rate in study.RATES[1:]
        for w in (200, 201)
    ]
    rows += [
        record(f"wrong/pmd-{share:g}-ungrounded/{w}", w, scores=(0, score, score))
        for w in (200, 201)
        for share, score in ((0, 0.5), (0.5, 0.25))
    ]
    rows += [
        record(f"transfer/{size}-reads-{m}/{w}", w, scores=(s, s, s))
        for size in study.SIZES
        for w in (200, 201)
        for m, s in (("nothing", 0.0), ("frozen-policy", 0.5), ("pmd", 0.75))
    ]
    rows += [
        record(f"{part}/sdpo-{arm}/{w}", w, scores=(0, *[0.1] * 15, score), dev=[0] * 17)
        for w in (200, 201)
        for part, arm, score in (
            ("epochs", "160", 0.25),
            ("late", "falls", 0.75),
            ("late", "unsolved", 0.5),
        )
    ]
    tables.report(
        records_of(*rows), {}, {"pmd": study.RATES[0], "sdpo": study.RATES[1]}, tmp_path, study
    )
    text = (tmp_path / "results.md").read_text()
    cells = {}  # {title: rows}
    for block in text.split("### ")[1:]:
        lines = [line.split("|")[1:-1] for line in block.splitlines() if "|" in line]
        cells[block.splitlines()[0]] = [[cell.strip() for cell in line] for line in lines]
    by_group = {row[0]: row for row in cells["Group size"]}
    assert [by_group[g][3] for g in "248"] == [
        "0.200 [0.200, 0.200]",
        "0.500 [0.500, 0.500]",
        "0.800 [0.800, 0.800]",
    ]
    assert by_group["4"][6] == "0.100 [0.100, 0.100]" and by_group["8"][6] == "0.000 [0.000, 0.000]"
    rates = {row[0]: row for row in cells["Learning rate"]}
    assert (
        rates["0.0003"][3] == "0.500 [0.500, 0.500]"
        and rates["0.0006"][2] == "0.400 [0.400, 0.400]"
    )  # their own: main
    assert (
        rates["0.001"][2] == "0.150 [0.150, 0.150]" and rates["0.0006"][3] == "0.100 [0.100, 0.100]"
    )
    late = cells["Twice the steps: not AUC, but the score"]
    assert [row[2] for row in late if row[0].startswith("after 160")] == [
        f"{score} [{score}, {score}]" for score in ("0.250", "0.750", "0.500")
    ]
    assert [row[:4] for row in late if row[0] == "SDPO"] == [
        ["SDPO", said, f"{more} [{more}, {more}]", "2 of 2"]
        for said, more in zip(tables.LATE.values(), ("0.500", "0.250"), strict=True)
    ]
    wrong = cells["How wrong may insights be?"]
    same, none = "0.500 [0.500, 0.500]", "0.000 [0.000, 0.000]"
    assert [
        "grounded",
        "0",
        "0.250 [0.250, 0.250]",
        same,
        "0.400 [0.400, 0.400]",
        none,
        none,
        "0.100 [0.100, 0.100]",
        none,
    ] in wrong
    fell = "-0.250 [-0.250, -0.250]"
    assert [
        "ungrounded",
        "0.5",
        "0.250 [0.250, 0.250]",
        "0.250 [0.250, 0.250]",
        "-",
        fell,
        "-",
        "-0.150 [-0.150, -0.150]",
        "-",
    ] in wrong
    assert text.count("| 0.000 [0.000, 0.000] | 0.500 [0.500, 0.500] | 0.750 [0.750, 0.750] |") == 3
    for name in ("transfer", "harm", "knobs"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
