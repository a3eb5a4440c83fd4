"""The study of all methods: its grid, what it says of records whose numbers can be told in advance,
and that methods/README.md is what the committed records give.
"""

import json

import pytest

import pmd
from runtime.methods import cards, method_class
from study import methods


def record(name, score):
    rows = [{"step": step, "avg": score} for step in (0, 10, 20)]
    return {"job": name, "test": rows}


def by_name(*rows):
    return {row["job"]: row for row in rows}


def test_every_method_says_what_its_teacher_reads_what_its_loss_is_and_what_it_claims():
    for name, card in cards().items():
        assert list(card) == ["Teacher reads", "Loss", "Claims more than"], name
        claim = card["Claims more than"]
        assert claim.startswith("none, ") or method_class(claim), name
        assert not set("|\n") & set("".join(card.values()))


def test_all_methods_get_the_same():
    """As many runs in the same worlds; only the rate differs."""
    tuning, main = methods.tuning(), methods.main_part(dict.fromkeys(cards(), 1e-3))
    for jobs in (tuning, main, methods.quick()):
        assert len({job.name for job in jobs}) == len(jobs)
        runs = {}
        for job in jobs:
            runs.setdefault(job.method, []).append((job.kind, job.world, job.rate))
        assert set(cards()) - set(methods.UNTRAINED) <= runs.keys() <= set(cards())
        assert all(mine == runs["sdpo"] for mine in runs.values())
    worlds = {job.world for job in tuning}, {job.world for job in main}
    assert worlds[0] == {411, 412} and worlds[1] == set(range(461, 469))
    assert {job.kind for job in main} == {"plain", "feedback"}


def test_the_rate_is_the_best_of_those_whose_runs_ended():
    rows = []
    for rate, score in zip(methods.RATES, (0.2, 0.6, 0.4), strict=True):
        for place in methods.TUNING:
            rows.append(record(methods.Job("tuning", "sdpo", *place, rate).name, score))
    assert methods.tuned(by_name(*rows)) == {"sdpo": methods.RATES[1]}
    rows[2] = {"job": rows[2]["job"], "failed": "x"}
    assert methods.tuned(by_name(*rows)) == {"sdpo": methods.RATES[2]}


def test_a_claim_is_shown_by_paired_differences():
    rows = []
    for i, place in enumerate(methods.MAIN):
        for name, score in (
            ("sdpo", 0.1 * i),
            ("grpo", 0.1 * i - 0.3),
            ("srpo", 0.1 * i + 0.05 + 0.001 * i),
            ("paced", 0.1 * i + (-1) ** i * 0.1),
            ("g-opd", 0.1 * i - 0.05 + 0.001 * i),
            ("caopd", 0.5),
        ):
            rows.append(record(methods.Job("main", name, *place).name, score))
    rows.append({"job": methods.Job("main", "vpd", *methods.MAIN[0]).name, "failed": "x"})
    tried = methods.Job("tuning", "srpo", *methods.TUNING[0], methods.RATES[-1]).name
    rows.append({"job": tried, "failed": "the loss is nan"})  # which takes no claim away
    for row in rows:
        row["cpu"], row["tokens"] = (25.0, 150) if "/srpo/" in row["job"] else (10.0, 100)
    page = methods.report(by_name(*rows), "main")
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert lines.keys() == cards().keys()
    assert "1.50 | 2.50 | claim shown at nano scale: 0.054 [" in lines["srpo"]
    assert "claim shown at nano scale: 0.300 [" in lines["sdpo"]
    assert "runs, claim not shown: 0.000 [" in lines["paced"]
    assert "runs, claim not shown and less than that: -0.046 [" in lines["g-opd"]
    assert "wiring only: its claim is calibration" in lines["caopd"]
    assert "1 runs failed" in lines["vpd"] and "not run" in lines["opsd"]
    assert f"Runs that failed: main/vpd/plain/461 (x); {tried} (the loss is nan)." in page
    plain = [0.1 * i for i, (kind, _) in enumerate(methods.MAIN) if kind == "plain"]
    assert f"| {sum(plain) / 4:.3f} [" in lines["sdpo"]


def test_an_estimate_is_of_the_records_of_a_method():
    jobs = methods.quick()[:1]
    name = jobs[0].method
    assert methods.estimate(jobs, {}, 80) == methods.START + methods.SECONDS
    records = {f"quick/{name}/plain/1": {"cpu": 7.0}, f"x/{name}/plain/2": {"failed": "x"}}
    assert methods.estimate(jobs, records, 80) == 7.0


def test_the_page_is_what_the_committed_records_give():
    out, part = methods.HERE / "field", "main"
    if not (out / "records.jsonl").exists():
        out, part = out / "quick", "quick"
    records = methods.read_records(out / "records.jsonl")
    assert methods.PAGE.read_text() == methods.report(records, part)
    # a full run that fails is named on the page
    assert part == "main" or not [name for name, row in records.items() if "failed" in row]


@pytest.mark.slow  # some runs of six steps
def test_a_quick_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    chosen = {name: cards()[name] for name in ("frozen-memory", "frozen-policy", "sdpo")}
    monkeypatch.setattr(methods, "cards", lambda: chosen)
    monkeypatch.setattr(methods, "TUNING", (("feedback", 412),))
    folder = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", ["methods.py", "--quick", "--workers", "1", *folder])
    methods.main()
    said = capsys.readouterr().out
    assert "quick: 3 runs, 3 of them left, about" in said and "`frozen-memory`" in said
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all("test" in json.loads(line) for line in lines)
    rows = [json.loads(line) for line in lines]
    assert all(row["tokens"] > 0 and row["cpu"] > 0 for row in rows)
    methods.main()
    assert "3 runs, 0 of them left, about 0 minutes" in capsys.readouterr().out
    assert (tmp_path / "out" / "records.jsonl").read_text().splitlines() == lines


def test_help_ends_with_all_methods(capsys):
    with pytest.raises(SystemExit):
        pmd.parse_flags(["--method", "opsd", "--help"])
    said = capsys.readouterr().out
    assert "--opsd_cap" in said
    table = said[said.index("methods, what the teacher reads") :]
    assert {line.split()[0] for line in table.splitlines()[1:]} == set(cards())
