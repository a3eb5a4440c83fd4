"""The battery that every file of methods/ passes: three steps, a run that resumes equals one that
never stopped, micro-batches of one row equal those of many, two ranks equal one, and flags that a
method is said not to read change nothing.

The two ranks run all methods in one job, because its start takes longer than their steps. Bounds
and their reasons are those of test_ranks.py.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small_config
from test_ranks import assert_same, records
from test_resume import state

import pmd
from methods import atesd, trace
from nano.world import write_world
from runtime import check, rows
from runtime import run as run_module
from runtime.methods import method_class

HERE = Path(__file__).resolve().parent.parent
NAMES = sorted(p.stem.replace("_", "-") for p in (HERE / "methods").glob("[a-z]*.py"))
SMALL = dict(
    steps=3,
    lr=3e-5,
    batch_size=4,
    mini_batch_size=2,
    group_size=4,
    behavior_every=1,
    eval_problems=2,
    eval_k=1,
    save_every=2,
    log_every=9,
)
OFTEN = {  # what a method does now and then, it does here within three steps
    "sd-zero": dict(sd_zero_stage1=1),
    "skill-sd": dict(teacher_every=2),
    "unisd": dict(unisd_every=2),
    "vpd": dict(vpd_every=2),
    "paced": dict(paced_stages=True),
    "pi-play": dict(plus_steps=2),
}
# Where a gradient is rounding alone, each of the six updates moves a weight by up to the rate. At
# nano's own rate of 1e-3 such weights move the entropy of the third step by 1e-3 of it.
LARGEST = 6 * SMALL["lr"]
SELDOM = SMALL["lr"] / 10  # by which at most a hundredth of the weights is apart
LENDER = "frozen-policy"  # whose memory frozen-memory reads

pytestmark = pytest.mark.slow  # minutes for all of them


def config(out, name, run):
    """A run's Config. Its world has short names, so that groups hold successes and failures."""
    if not (out / "world").exists():
        write_world(0, out / "world", names=((1, 8), (2, 2)))
    changes = SMALL | OFTEN.get(name, {}) | {"task": str(out / "world")}
    if name == "frozen-memory":
        changes["memory_from"] = LENDER
    return small_config(out, method=name, name=run, **changes)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atesd, "PERIOD", 2)
        patch.setattr(trace, "SYNC", 2)
        patch.setattr(run_module, "plot_curves", lambda *args: None)  # half a second of each run
        yield tmp_path_factory.mktemp("battery")


@pytest.fixture(scope="module")
def whole(out):
    """Trains a method once, without a stop, on one rank; gives its folder."""

    def run(name):
        if not (out / name).exists():
            cfg = config(out, name, name)
            if cfg.memory_from:
                run(LENDER)
            pmd.train(cfg)
        return out / name

    return run


@pytest.fixture(scope="module")
def two_ranks(out, whole):
    """The folder of the runs of all methods on two ranks, and the job's process."""
    whole(LENDER)
    runs = [["--method", name, "--name", f"{name}-ranks"] for name in NAMES]
    for flags, name in zip(runs, NAMES, strict=True):
        for flag, value in dataclasses.asdict(config(out, name, "")).items():
            if flag in (*SMALL, *OFTEN.get(name, {}), "task", "memory_from", "out") and value:
                flags += [f"--{flag}", str(value)]
    program = out / "ranks.py"
    program.write_text(
        f"import json, sys\nsys.path.insert(0, {str(HERE)!r})\nimport pmd\n"
        "from methods import atesd, trace\natesd.PERIOD = trace.SYNC = 2\n"
        "from runtime import run\nrun.plot_curves = lambda *args: None\n"
        "from runtime.ranks import end_ranks, start_ranks\n"
        "runs = json.loads(sys.argv[1])\nstart_ranks(pmd.parse_flags(runs[0]))\n"
        "for flags in runs:\n    pmd.train(pmd.parse_flags(flags))\nend_ranks()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, program, json.dumps(runs)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_of_every_method(whole, name):
    steps = [row for row in records(whole(name))[0] if "split" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    if name != "frozen-policy":  # which trains nothing
        assert sum(row["updates"] for row in steps) > 0


@pytest.mark.parametrize("name", NAMES)
def test_resume_equals_never_having_stopped(out, whole, name):
    """From the checkpoint after the second step, as if it had been killed in the third."""
    folder = shutil.copytree(whole(name), out / f"{name}-resumed")
    for later in ("checkpoints/3", "final"):
        shutil.rmtree(folder / later)
    (folder / "summary.json").unlink()
    pmd.train(dataclasses.replace(config(out, name, folder.name), resume=True))
    assert state(folder) == state(whole(name))


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_of_one_row_change_nothing(out, whole, name, monkeypatch):
    one = whole(name)  # and the lender of a frozen memory
    cfg = config(out, name, f"{name}-micro")
    monkeypatch.setattr(
        rows, "by_tokens", lambda lengths, budget: [[i] for i in range(len(lengths))]
    )
    pmd.train(cfg)
    assert_same(one, out / cfg.name, LARGEST, SELDOM)


OTHERWISE = dict(  # another value of what a method may not read
    alpha=0.25,
    top_k=3,
    ema_rate=0.5,
    tiers="insight",
    retrieve_k=1,
    query_feedback=True,
    supervise="solved",
    max_insights=1,
    behavior_every=2,
    behaviors_refreshed=True,
    clusters=2,
    drop_shortcuts=True,
    ground_insights=False,
)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_is_said_not_to_read_changes_nothing(out, whole, name):
    cfg = config(out, name, f"{name}-idle")
    idle = check.idle_flags(cfg, method_class(name))
    changes = {flag: OTHERWISE[flag] for flag in idle if flag in OTHERWISE}
    if "teacher" in idle:
        changes["teacher"] = "live" if cfg.teacher == "ema" else "ema"
    if not changes:
        pytest.skip("it reads all of them")
    pmd.train(dataclasses.replace(cfg, **changes))
    assert state(out / cfg.name) == state(whole(name))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one(out, whole, two_ranks, name):
    assert (out / f"{name}-ranks" / "summary.json").exists(), two_ranks.stderr[-4000:]
    assert_same(whole(name), out / f"{name}-ranks", LARGEST, SELDOM)
