"""A run that is interrupted, killed, torn or forked against the same run left alone."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import small_config

import memory as mem
import pmd
from runtime import checkpoint
from runtime.checkpoint import checkpoints
from runtime.files import Stopped, append, read_lines
from runtime.metrics import tracker

HERE = Path(__file__).resolve().parent.parent


def state(folder):
    """What must not depend on having been interrupted: final weights, memory rows, metrics without
    times.
    """
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        for key in ("seconds", "share", "tokens_per_second", "peak_gb"):
            row.pop(key, None)
    rows, events = [], []
    if (folder / "memory.db").exists():
        with contextlib.closing(sqlite3.connect(folder / "memory.db")) as db:
            rows, events = (
                db.execute(f"SELECT * FROM {t}").fetchall() for t in ("item ORDER BY id", "event")
            )
    return (folder / "final" / "model.safetensors").read_bytes(), rows, events, metrics


@pytest.mark.parametrize("method", ["pmd", "sdpo", "grpo", "srpo"])
def test_resume_equals_never_having_stopped(make_config, method, monkeypatch):
    cfg = make_config(
        method=method,
        steps=4,
        batch_size=8,
        mini_batch_size=8,
        behavior_every=2,
        eval_every=2,
        save_every=2,
        name="whole",
    )
    pmd.train(cfg)
    broken = dataclasses.replace(cfg, name="broken", resume=True)  # starts it, for there is none
    update = pmd.update

    def dies(method, optimizer, rows, step):
        if step == 4:
            raise KeyboardInterrupt
        return update(method, optimizer, rows, step)

    monkeypatch.setattr(pmd, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        pmd.train(broken)
    monkeypatch.setattr(pmd, "update", update)
    pmd.train(broken)
    whole, resumed = state(Path(cfg.out, "whole")), state(Path(cfg.out, "broken"))
    assert whole[1:] == resumed[1:]
    assert whole[0] == resumed[0]
    if method == "pmd":
        assert len(whole[1]) > 10


LATE = dict(
    method="grpo",
    steps=6,
    batch_size=4,
    mini_batch_size=4,
    group_size=2,
    save_every=0,
    eval_every=0,
    log_every=9,
)


@pytest.mark.parametrize("method", ["grpo", "pmd", "frozen-policy"])
def test_nothing_that_saves_logs_or_looks_changes_what_is_learned(make_config, method):
    """GRPO's first update is late: torch's own getter of Adam's state would take a step before
    it.
    """
    flags = LATE | dict(method=method) | ({} if method == "grpo" else dict(group_size=4, steps=3))
    ends = []
    for name, looks in (
        ("blind", {}),
        ("watched", dict(save_every=1, eval_every=1, log_every=1, keep=1)),
    ):
        pmd.train(make_config(**(flags | looks), name=name))
        *found, metrics = state(Path(make_config().out, name))
        ends.append((*found, [row for row in metrics if "split" not in row]))
    assert ends[0] == ends[1]
    if method == "grpo":
        assert [row["updates"] for row in ends[0][3]] == [0, 0, 0, 1, 0, 0]


def test_a_run_that_is_interrupted_before_its_first_update_learns_the_same(make_config):
    whole = make_config(**LATE, name="whole")
    pmd.train(whole)
    cfg = dataclasses.replace(whole, name="r", resume=True, max_minutes=1e-6)
    for step in (1, 2):
        with pytest.raises(Stopped, match=f"stopped after step {step} of 6"):
            pmd.train(cfg)
    pmd.train(dataclasses.replace(cfg, max_minutes=0.0))
    assert state(Path(cfg.out, "whole")) == state(Path(cfg.out, "r"))


def test_a_failing_update_names_the_last_good_checkpoint(make_config, monkeypatch):
    update = pmd.update

    def fails(method, optimizer, rows, step):
        if step == 3:
            raise FloatingPointError("the loss is nan at step 3, on problems x")
        return update(method, optimizer, rows, step)

    monkeypatch.setattr(pmd, "update", fails)
    with pytest.raises(
        FloatingPointError,
        match="nan at step 3, on problems x; the last good checkpoint is .*points/2$",
    ):
        pmd.train(make_config(steps=4, save_every=1, name="r"))


def small(out, **changes):
    flags = dict(
        steps=4, batch_size=8, mini_batch_size=8, behavior_every=2, eval_every=2, save_every=1
    )
    return small_config(out, **(flags | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is left alone, with all of its checkpoints."""
    cfg = small(tmp_path_factory.mktemp("resume"), name="whole", keep=9)
    pmd.train(cfg)
    return cfg


@pytest.mark.parametrize("at", [2, 4])
def test_a_signal_saves_after_the_step_and_the_rest_is_as_if_nothing_had_happened(
    whole, monkeypatch, at
):
    """An evaluation that is due then is made when the run goes on, at its last step too, and again
    after a kill in it.
    """
    name = f"told{at}"
    cfg = dataclasses.replace(whole, name=name, resume=True, save_every=0)
    record = mem.Memory.record

    def told(self, step, rollouts):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return record(self, step, rollouts)

    monkeypatch.setattr(mem.Memory, "record", told)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    said = f"SIGTERM: stopped after step {at} of 4; the same command with --name {name} --resume"
    with pytest.raises(Stopped, match=said):
        pmd.train(cfg)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    monkeypatch.setattr(mem.Memory, "record", record)
    # although --save_every is 0
    assert [c.name for c in checkpoints(Path(cfg.out, name))] == [str(at)]
    metrics = Path(cfg.out, name, "metrics.jsonl")
    rows = read_lines(metrics)
    assert max(row["step"] for row in rows if "split" in row) == at - 2
    append(metrics, rows[0] | {"step": at, "split": "dev"})  # a kill between dev and test
    pmd.train(cfg)
    assert state(Path(cfg.out, "whole")) == state(Path(cfg.out, name))


def test_the_second_signal_ends_it_at_once(tmp_path, monkeypatch):
    record = mem.Memory.record

    def told_twice(self, step, rollouts):
        # in this thread and at once: two that are sent may arrive as one
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return record(self, step, rollouts)

    monkeypatch.setattr(mem.Memory, "record", told_twice)
    # a shell's background job is born deaf to it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pmd.train(small(tmp_path, name="x"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_time_limit_and_the_exit_status(tmp_path):
    cfg = small(tmp_path, name="late", max_minutes=1e-6)
    with pytest.raises(Stopped, match="--max_minutes: stopped after step 1 of 4") as stopped:
        pmd.train(cfg)
    assert stopped.value.code == 0 and Stopped("", "", 143).code == 143
    # a limit is no part of what was run
    pmd.train(dataclasses.replace(cfg, resume=True, max_minutes=0.0))
    assert (Path(cfg.out, "late", "final")).is_dir()


def test_the_last_ones_and_the_best_on_dev_are_kept(tmp_path):
    cfg = small(tmp_path, name="r", steps=6, eval_every=1, keep=2)
    pmd.train(cfg)
    rows = [
        json.loads(line) for line in Path(cfg.out, "r", "metrics.jsonl").read_text().splitlines()
    ]
    dev = {
        row["step"]: row["avg_at_k"] for row in rows if row.get("split") == "dev" and row["step"]
    }
    saved = {int(c.name) for c in checkpoints(Path(cfg.out, "r"))}
    assert saved >= {5, 6} and len(saved) <= 3 and max(dev[s] for s in saved) == max(dev.values())


def test_of_equal_ones_the_checkpoint_that_the_summary_names_is_kept(tmp_path):
    for step in range(1, 6):
        (tmp_path / "checkpoints" / f"{step}").mkdir(parents=True)
    scores = (0.2, 0.7, 0.7, 0.7, 0.5)
    rows = [
        {"step": step, "split": "dev", "avg_at_k": score} for step, score in enumerate(scores, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    checkpoint.prune(tmp_path, 1)
    assert [c.name for c in checkpoints(tmp_path)] == ["2", "5"]


def test_a_checkpoint_that_is_half_removed_is_none(tmp_path, monkeypatch):
    """A kill while an old one is removed leaves it under another name."""
    for step in ("1", "2"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("")

    def killed(folder, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, 1)
    assert [c.name for c in checkpoints(tmp_path)] == ["2"]
    assert (tmp_path / "checkpoints" / "1.partial").is_dir()  # which a resumed run removes


def test_what_a_kill_leaves_half_written_is_no_checkpoint_and_no_row(whole, monkeypatch):
    cfg = dataclasses.replace(whole, name="killed", resume=True)
    save = checkpoint.dcp.save

    def torn(state, checkpoint_id, **kwargs):
        if "3.partial" in str(checkpoint_id):
            checkpoint_id.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(state, checkpoint_id=checkpoint_id, **kwargs)

    monkeypatch.setattr(checkpoint.dcp, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        pmd.train(cfg)
    monkeypatch.setattr(checkpoint.dcp, "save", save)
    folder = Path(cfg.out, cfg.name)
    assert [c.name for c in checkpoints(folder)] == ["1", "2"] and (
        folder / "checkpoints" / "3.partial"
    ).is_dir()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward": 0.')
    pmd.train(cfg)
    assert state(folder) == state(Path(cfg.out, "whole"))
    assert not list(folder.rglob("*.partial"))


def test_a_memory_that_is_gone_comes_back_from_the_checkpoint(whole):
    cfg = dataclasses.replace(whole, name="forgetful", steps=2, eval_every=0)
    pmd.train(cfg)
    folder = Path(cfg.out, cfg.name)
    (folder / "memory.db").unlink()
    more = dataclasses.replace(cfg, resume=True, steps=4)
    pmd.train(more)
    assert state(folder)[:3] == state(Path(cfg.out, "whole"))[:3]


def test_a_fork_goes_on_from_a_kept_step_policy_and_memory_together(whole):
    fork = dataclasses.replace(whole, name="fork", fork_from="whole@2")
    pmd.train(fork)
    before, after = state(Path(fork.out, "whole")), state(Path(fork.out, "fork"))
    assert before[:3] == after[:3]
    steps = [row for row in before[3] if row["step"] > 2]
    assert [row for row in after[3] if row["step"] > 2] == steps
    # its base is measured anew
    assert {row["split"] for row in after[3] if row["step"] == 2} == {"dev", "test"}
    other = dataclasses.replace(
        fork, name="other", method="sdpo", lr=1e-4, teacher="live", resume=True
    )
    assert pmd.train(other)["base"]["step"] == 2
    pmd.train(other)  # a fork resumes as itself
    for wrong in ("whole@77", "whole", "none@2"):
        with pytest.raises(
            ValueError,
            match="--from .* is no RUN@STEP with a checkpoint.*kept there: (none|1, 2, 3, 4)",
        ):
            pmd.check(dataclasses.replace(fork, name="f", fork_from=wrong))
    with pytest.raises(
        ValueError, match="a teacher from --model nano, which can't teach a student from x"
    ):
        pmd.check(dataclasses.replace(fork, name="f", model="x"))
    assert pmd.parse_flags(["--from", "whole@2"]).fork_from == "whole@2"


def test_a_run_can_be_rerun_from_its_own_records(make_config, tmp_path):
    flags = [
        "--steps",
        "2",
        "--batch_size",
        "4",
        "--mini_batch_size",
        "4",
        "--group_size",
        "4",
        "--eval_problems",
        "3",
        "--eval_k",
        "2",
        "--save_every",
        "0",
        "--seed",
        "3",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(
        [sys.executable, "pmd.py", *flags, "--name", "first"],
        cwd=HERE,
        check=True,
        capture_output=True,
    )
    records = (tmp_path / "first" / "environment.txt").read_text()
    assert all(
        f"{name} " in records
        for name in ("pmd", "commit", "python", "torch", "transformers", "scikit-learn")
    )
    (command,) = [
        line.removeprefix("command: ")
        for line in records.splitlines()
        if line.startswith("command: ")
    ]
    cfg = pmd.parse_flags(shlex.split(command)[1:])
    assert dataclasses.asdict(cfg) == json.loads((tmp_path / "first" / "config.json").read_text())
    pmd.train(dataclasses.replace(cfg, name="second"))
    assert state(tmp_path / "first") == state(tmp_path / "second")


def test_safe_changes_are_noted(tmp_path, capsys):
    cfg = small(tmp_path, name="r", steps=2)
    pmd.train(cfg)
    pmd.train(dataclasses.replace(cfg, resume=True, steps=3, keep=5))
    said = capsys.readouterr().out
    assert (
        "changed since the run was started: --keep (2 before, 5 now), --steps (2 before, 3 now)"
        in said
    )
    assert "going on from" in said


def test_no_two_runs_have_one_id_in_a_tracker(tmp_path, monkeypatch):
    """Neither under one name in two places, nor of one method in two comparisons."""
    opened = []
    for library in ("wandb", "trackio"):
        fake = types.ModuleType(library)
        fake.init = lambda **kwargs: opened.append(kwargs)
        monkeypatch.setitem(sys.modules, library, fake)
    for out in ("a", "b"):
        for name in ("first/pmd", "second/pmd", "pmd"):
            cfg = small(tmp_path / out, name=name, log="wandb")
            tracker(cfg, tmp_path / out / name)
            tracker(cfg, tmp_path / out / name)  # when it goes on
    ids = [kwargs["id"] for kwargs in opened]
    assert ids[::2] == ids[1::2] and len(set(ids)) == 6
    assert [kwargs["group"] for kwargs in opened[:6:2]] == ["first", "second", None]
    tracker(small(tmp_path, name="first/pmd", log="trackio"), tmp_path / "first" / "pmd")
    assert opened[-1]["name"].startswith("first-pmd-") and opened[-1]["group"] == "first"


def test_metrics_also_go_where_log_says(tmp_path, monkeypatch):
    sent = []
    session = types.SimpleNamespace(log=lambda row, step: sent.append((step, row)))
    started = {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: started.update(kwargs) or session
    monkeypatch.setitem(sys.modules, "wandb", fake)
    there = importlib.util.find_spec
    found = {"wandb": fake, "tensorboard": None}
    look = lambda name, *rest: found[name] if name in found else there(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", look)
    pmd.train(small(tmp_path, name="r", steps=2, log="wandb"))
    assert started["name"] == "r" and started["id"].startswith("r-")
    assert started["resume"] == "allow" and started["config"]["steps"] == 2
    assert [step for step, _ in sent] == [0, 0, 1, 2, 2, 2]
    row = next(row for step, row in sent if "train/reward" in row)
    assert {"train/reward", "train/memory/insight", "train/seconds/sample"} <= set(row)
    assert any("test/avg_at_k" in row for _, row in sent)
    assert all(isinstance(value, (int, float)) for _, row in sent for value in row.values())
    with pytest.raises(
        ValueError, match="--log tensorboard needs its library: pip install tensorboard"
    ):
        pmd.check(small(tmp_path, log="tensorboard"))
