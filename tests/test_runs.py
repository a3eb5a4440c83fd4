"""What ends a run is one sentence that names file and cure; a run has one writer and keeps to its
problems and flags.
"""

import contextlib
import dataclasses
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Here
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import eval as ev
import pmd
from runtime import check, files, provenance, run
from runtime.check import check_folder
from runtime.checkpoint import (
    LOCKS,
    checkpoints,
    claim,
    default_name,
    refuse_second_writer,
    release,
    run_and_step,
)
from runtime.errors import RunError
from runtime.files import append, read_lines, write_lines
from runtime.jobs import failure
from runtime.methods import method_class, method_of
from runtime.model import MODELS, load_policy
from runtime.options import check_numbers
from runtime.provenance import FORMERLY, FREE, HERE, fingerprint, model_identity, refuse_changes
from runtime.ranks import Unsupported, count_ranks
from runtime.sampler import Sampler
from tasks.problem import Problem, Task

SMALL = (
    "--steps 1 --batch_size 3 --mini_batch_size 3 --group_size 2 --eval_problems 2 --eval_k 1"
    " --eval_every 0 --save_every 1"
).split()


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """pmd.main() with these flags, in this process: (exit status, what it printed, what it said on
    stderr).
    """

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["pmd.py", *SMALL, "--out", str(tmp_path), *flags])
        capsys.readouterr()
        code = 0
        try:
            pmd.main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return (
            (code if isinstance(code, int) else 1),
            said.out,
            said.err + (code if isinstance(code, str) else ""),
        )

    return call


# -- files that can't be written or read


@pytest.fixture
def no_diff(monkeypatch):
    """environment.txt without what this checkout has not committed, which may be long."""
    monkeypatch.setattr(run, "environment", lambda method: "")


@pytest.mark.parametrize(
    "changes, size, said",
    [
        (
            dict(method="grpo", save_every=1),
            30_000,
            "the checkpoint .*checkpoints/1 can't be written .* free some space",
        ),
        (
            dict(method="grpo", save_every=0),
            30_000,
            "r can't be written .* free some space on the disk",
        ),  # final/
        (dict(method="grpo", save_every=0), 1000, "config.json can't be written .*free some space"),
        (
            dict(save_every=0, batch_size=12, mini_batch_size=12),
            20_000,
            "memory.db can't be used .*",
        ),
    ],
)
def test_a_full_disk_is_one_sentence_with_the_file(make_config, changes, size, said, no_diff):
    cfg = make_config(name="r", steps=1, **changes)
    with full_disk(size), pytest.raises((ValueError, OSError), match=said) as caught:
        pmd.train(cfg)
    assert "\n" not in failure(caught.value, cfg) and failure(caught.value, cfg)


def test_after_a_full_disk_the_run_goes_on(make_config, no_diff):
    whole, cfg = (
        make_config(name="whole", method="grpo", save_every=1),
        make_config(name="r", method="grpo", save_every=1),
    )
    pmd.train(whole)
    with full_disk(30_000), pytest.raises(RunError, match="no checkpoint was written before"):
        pmd.train(cfg)
    pmd.train(dataclasses.replace(cfg, resume=True))
    weights = [
        Path(cfg.out, name, "final", "model.safetensors").read_bytes() for name in ("whole", "r")
    ]
    assert weights[0] == weights[1] and not list(Path(cfg.out, "r").rglob("*.partial"))


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


DAMAGE = {  # file: (what is done to it, what is said)
    "checkpoints/2/model.safetensors": (
        cut,
        "checkpoints/2 can't be read .*remove .*checkpoints/2.* goes on from .*/1$",
    ),
    "checkpoints/2/config.json": (
        cut,
        "checkpoints/2 can't be read .*remove .*checkpoints/2.* goes on from .*/1$",
    ),
    "checkpoints/2/trainer.json": (
        cut,
        "2/trainer.json can't be read .*remove .*checkpoints/2.* goes on from .*/1$",
    ),
    "checkpoints/2/trainer/.metadata": (
        cut,
        "2/trainer can't be read .*remove .*checkpoints/2.* goes on from .*/1$",
    ),
    "checkpoints/2/trainer/__0_0.distcp": (
        cut,
        "2/trainer can't be read .*remove .*checkpoints/2.* goes on from .*/1$",
    ),
    "memory.db": (
        lambda path: path.write_bytes(b"not a database " * 100),
        "memory.db can't be used .* takes the copy in",
    ),
    "metrics.jsonl": (
        lambda path: path.write_text("{}\n"),
        "metrics.jsonl, line 1 has no step: mend that line",
    ),
    "samples.jsonl": (
        lambda path: path.write_text("[\n"),
        "samples.jsonl, line 1 is not JSON.*mend that line",
    ),
    "config.json": (
        cut,
        "r/config.json can't be read .*remove it, and the same command writes it anew",
    ),
    "problems.json": (cut, "r/problems.json can't be read .*remove it"),
}


SMALL_CHANGES = dict(eval_problems=2, eval_k=1, save_every=1, group_size=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("saved")
    pmd.train(pmd.parse_flags([*SMALL, "--steps", "2", "--out", str(out), "--name", "r"]))
    return out / "r"


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_is_named_with_the_way_on(make_config, saved, file, caplog):
    cfg = pmd.parse_flags(
        [*SMALL, "--steps", "3", "--out", make_config().out, "--name", "r", "--resume"]
    )
    folder = Path(cfg.out, "r")
    shutil.copytree(saved, folder)
    damage, said = DAMAGE[file]
    damage(folder / file)
    with pytest.raises(ValueError, match=said) as caught:
        pmd.train(cfg)
    assert "\n" not in str(caught.value) and isinstance(caught.value, RunError)
    assert not [r for r in caplog.records if r.name == "root"]  # torch's warnings show a traceback
    if file.endswith(".metadata"):  # and the way on is one
        shutil.rmtree(folder / "checkpoints" / "2")
        pmd.train(cfg)
        assert (folder / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(step="2"), "has no step that can be one"),
        (dict(updates=None), "has no updates that can be one"),
        (dict(seconds="1"), "has no seconds that can be one"),
        (dict(ema=0), "has no ema that can be one"),
        (dict(step=1), "is of step 1"),
        (dict(step=-2), "is of step -2"),
    ],
)
def test_a_checkpoint_that_says_what_can_t_be_is_named_with_the_way_on(
    make_config, saved, changes, said
):
    cfg = pmd.parse_flags(
        [*SMALL, "--steps", "3", "--out", make_config().out, "--name", "r", "--resume"]
    )
    shutil.copytree(saved, Path(cfg.out, "r"))
    about = Path(cfg.out, "r", "checkpoints", "2", "trainer.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | changes))
    with pytest.raises(
        RunError, match=f"2/trainer.json {said}: remove .*checkpoints/2.* goes on from .*/1$"
    ):
        pmd.train(cfg)


def test_a_damaged_memory_in_a_checkpoint_is_not_taken_for_the_runs(make_config, saved):
    cfg = pmd.parse_flags(
        [*SMALL, "--steps", "3", "--out", make_config().out, "--name", "r", "--resume"]
    )
    shutil.copytree(saved, Path(cfg.out, "r"))
    Path(cfg.out, "r", "memory.db").unlink()
    Path(cfg.out, "r", "checkpoints", "2", "memory.db").write_bytes(b"nonsense " * 100)
    with pytest.raises(
        RunError, match="2/memory.db can't be used as a memory: remove .*checkpoints/2"
    ):
        pmd.train(cfg)
    assert not Path(cfg.out, "r", "memory.db").exists()


def test_a_log_of_a_memory_that_is_gone_is_no_part_of_its_successor(make_config, saved):
    """A process that is killed leaves commits in memory.db-wal, which SQLite would read into any
    file of that name.
    """
    cfg = make_config(**SMALL_CHANGES, name="r", steps=3, resume=True)
    folder = Path(cfg.out, "r")
    shutil.copytree(saved, folder)
    killed = (
        "from runtime.store import Store\n"
        f"store = Store({str(folder / 'memory.db')!r})\n"
        "with store.writing(9):\n"
        "    store.db.execute('UPDATE item SET text = text || hex(randomblob(5000))')\n"
        "import os\nos._exit(1)"
    )
    subprocess.run([sys.executable, "-c", killed], cwd=HERE)
    assert (folder / "memory.db-wal").stat().st_size
    (folder / "memory.db").unlink()
    pmd.train(cfg)
    with contextlib.closing(sqlite3.connect(folder / "memory.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert not db.execute("SELECT 1 FROM item WHERE length(text) > 5000").fetchall()


def test_a_forks_damaged_checkpoint_names_the_others(make_config, saved):
    cfg = pmd.parse_flags(
        [*SMALL, "--steps", "3", "--out", make_config().out, "--name", "f", "--from", "r@2"]
    )
    shutil.copytree(saved, Path(cfg.out, "r"))
    cut(Path(cfg.out, "r", "checkpoints", "2", "trainer.json"))
    with pytest.raises(RunError, match="give --from another step; kept there: 1$"):
        pmd.train(cfg)


def test_what_is_no_fault_of_the_program_is_a_sentence_and_a_fault_is_none(make_config):
    cfg = make_config()
    gpu = torch.OutOfMemoryError("CUDA out of memory.\n Tried")
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for error in (gpu, cpu, MemoryError()):
        assert f"lower --micro_tokens ({cfg.micro_tokens} now)" in failure(error, cfg)
        assert "\n" not in failure(error, cfg)
    assert "--model nano" in failure(SafetensorError("cut"), cfg)
    for error in (FloatingPointError("x"), OSError("x"), RunError("x"), Unsupported("x")):
        assert failure(error, cfg) == "x"
    for error in (
        ValueError("x"),
        KeyError("x"),
        TypeError("x"),
        RuntimeError("x"),
        IndexError("x"),
        AssertionError("x"),
    ):
        assert failure(error, cfg) == ""


def test_a_memory_that_breaks_while_the_run_goes_on_is_a_sentence(command, monkeypatch):
    record = pmd.Memory.record

    def broken(self, step, rollouts):
        self.db.execute("DROP TABLE event")
        return record(self, step, rollouts)

    monkeypatch.setattr(pmd.Memory, "record", broken)
    code, _, said = command("--name", "a")
    assert code == 1
    assert re.match(
        r"pmd.py: .*memory.db can't be used as a memory \(no such table: event\)",
        said.splitlines()[-1],
    )


def test_what_is_no_step_is_no_checkpoint(tmp_path):
    for name in ("1", "10", "²", "abc", "3.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [c.name for c in checkpoints(tmp_path)] == ["1", "10"]


def test_the_command_ends_by_a_sentence_or_by_a_traceback(command, monkeypatch):
    def raises(error):
        def update(*args):
            raise error

        return update

    monkeypatch.setattr(pmd, "update", raises(torch.OutOfMemoryError("CUDA out of memory.")))
    code, _, said = command("--name", "a")
    assert code == 1 and said.splitlines()[-1].startswith(
        "pmd.py: out of memory: CUDA out of memory.; lower --micro_tokens"
    )
    monkeypatch.setattr(pmd, "update", raises(KeyboardInterrupt()))
    code, _, said = command("--name", "b")
    assert code == 130 and said.splitlines()[-1] == "pmd.py: interrupted before it could save"
    monkeypatch.setattr(pmd, "update", raises(KeyError("a fault")))
    with pytest.raises(KeyError):
        command("--name", "c")


def test_a_verifier_that_refuses_ends_the_run_by_its_sentence(make_config, monkeypatch):
    def refuses(*args):
        raise ValueError("the verifier 'mine' gave nan for p3")

    monkeypatch.setattr(ev, "verify_all", refuses)
    with pytest.raises(RunError, match="^the verifier 'mine' gave nan for p3$"):
        pmd.train(make_config(name="r"))


def test_records_hold_any_text(tmp_path):
    rows = [
        {"text": "half \ud83d of it"},
        {"text": '\udcff\0\n"\\ud83d'},
        {"text": "数 \U0001f600"},
    ]
    for row in rows:
        append(tmp_path / "a.jsonl", row)
    write_lines(tmp_path / "b.jsonl", rows)
    assert read_lines(tmp_path / "a.jsonl") == read_lines(tmp_path / "b.jsonl") == rows
    files.write(tmp_path / "c.json", json.dumps(rows, ensure_ascii=False))
    assert json.loads((tmp_path / "c.json").read_text()) == rows


def test_what_a_model_wrote_ends_no_run(make_config, monkeypatch):
    decode = AutoTokenizer.from_pretrained(MODELS["nano"]).__class__.decode
    monkeypatch.setattr(
        AutoTokenizer.from_pretrained(MODELS["nano"]).__class__,
        "decode",
        lambda self, *args, **flags: decode(self, *args, **flags) + " \ud83d",
    )
    cfg = make_config(name="r", method="sdpo", save_every=1)
    pmd.train(cfg)
    rows = read_lines(Path(cfg.out, "r", "samples.jsonl"))
    assert rows and all(row["completion"].endswith("\ud83d") for row in rows)


# -- one writer, the same problems, the same flags


@contextlib.contextmanager
def another_process(folder):
    """Holds the folder of a run; yields its id."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        LOCKS.clear()
        os.write(write, claim(folder, resume=True).encode() or b"held")
        signal.pause()
    try:
        assert os.read(read, 1000) == b"held"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_one_process_writes_and_one_that_is_killed_lets_go(tmp_path):
    folder = tmp_path / "r"
    assert claim(folder, resume=False) == "" and claim(folder, resume=True) == ""  # our own
    assert "r exists; add --resume" in claim(folder, resume=False)
    refuse_second_writer(folder)
    release(folder)
    with another_process(folder) as other:
        said = claim(folder, resume=True)
        assert (
            said.startswith(f"{folder} is being written by process {other} on ")
            and "another --name" in said
        )
        with pytest.raises(ValueError, match=f"written by process {other} on"):
            refuse_second_writer(folder)
    refuse_second_writer(folder)
    assert claim(folder, resume=True) == ""
    release(folder)


def test_a_second_process_is_refused_at_the_start_and_before_it_writes(
    make_config, saved, monkeypatch
):
    cfg = pmd.parse_flags(
        [*SMALL, "--steps", "3", "--out", make_config().out, "--name", "r", "--resume"]
    )
    shutil.copytree(saved, Path(cfg.out, "r"))
    before = (Path(cfg.out, "r", "metrics.jsonl")).read_bytes()
    with another_process(Path(cfg.out, "r")):
        with pytest.raises(ValueError, match="r is being written by process"):
            pmd.check(cfg)
        # it came while the model was loaded
        monkeypatch.setattr(check, "refuse_second_writer", lambda folder: None)
        with pytest.raises(RunError, match="r is being written by process"):
            pmd.train(cfg)
    assert (Path(cfg.out, "r", "metrics.jsonl")).read_bytes() == before


def test_names_of_one_second_differ(make_config):
    assert len({default_name(make_config()) for _ in range(20)}) > 10


def problem(**changes):
    return Problem(
        **(
            dict(
                id="p", prompt="q", answer="1", verifier="steps", system="", extra={"inputs": ["1"]}
            )
            | changes
        )
    )


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_fingerprint_sees_every_change(tokenizer, split):
    plain = Task("t", *([problem(), problem(id="o")] for _ in range(3)))
    same = Task("renamed", *([problem(), problem(id="o")] for _ in range(3)))
    before = fingerprint(plain, tokenizer)
    assert provenance.changes(before, fingerprint(same, tokenizer)) == []
    others = [
        dict(id="x"),
        dict(prompt="x"),
        dict(answer="2"),
        dict(verifier="choice"),
        dict(system="x"),
        dict(extra={"inputs": ["2"]}),
    ]
    for rows in (
        [problem(id="o"), problem()],
        [problem()],
        *([problem(**o), problem(id="o")] for o in others),
    ):
        now = fingerprint(dataclasses.replace(plain, **{split: rows}), tokenizer)
        assert provenance.changes(before, now) == [
            f"the {split if split != 'train' else 'training'} problems"
        ]


def test_another_model_under_the_same_path_is_seen(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(MODELS["nano"], folder)
    before = model_identity(folder)
    (folder / "README.md").write_text("of no account")
    assert model_identity(folder) == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model_identity(folder) != before


def sums(folder, shift=0):
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = [
            {
                "id": f"{split}{i}",
                "prompt": f"Apply zo to {i + shift} 1",
                "answer": str(i),
                "verifier": "last_number",
            }
            for i in range(6)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_other_problems_are_refused_on_resume_and_said_of_a_fork(make_config, tmp_path, capsys):
    sums(tmp_path / "t")
    cfg = make_config(
        task=str(tmp_path / "t"), dev=0.0, steps=1, save_every=1, name="r", method="sdpo"
    )
    pmd.train(cfg)
    pmd.check(dataclasses.replace(cfg, resume=True, steps=2))
    sums(tmp_path / "t", shift=1)
    with pytest.raises(
        ValueError,
        match="the training problems and the test problems changed since .*r was started",
    ):
        pmd.check(dataclasses.replace(cfg, resume=True, steps=2))
    fork = dataclasses.replace(cfg, name="f", fork_from="r@1", steps=2)
    capsys.readouterr()
    pmd.train(fork)
    assert (
        "other than in " in (said := capsys.readouterr().out)
        and "the training problems, the test problems" in said
    )
    (tmp_path / "r" / "problems.json").unlink()  # a run from before there was one
    pmd.check(dataclasses.replace(cfg, resume=True, steps=2))


def test_a_fork_brings_no_memory_of_other_problems(make_config, tmp_path):
    sums(tmp_path / "t")
    cfg = make_config(task=str(tmp_path / "t"), dev=0.0, steps=1, save_every=1, name="r")
    pmd.train(cfg)
    rows = (tmp_path / "t" / "train.jsonl").read_text().replace('"id": "train3"', '"id": "other"')
    (tmp_path / "t" / "train.jsonl").write_text(rows)
    fork = dataclasses.replace(cfg, name="f", fork_from="r@1", steps=2)
    with pytest.raises(ValueError, match="does not know 1 of the training problems, such as other"):
        pmd.check(fork)
    pmd.check(dataclasses.replace(fork, method="sdpo"))


def test_which_flags_may_change_on_resume(make_config, capsys):
    cfg = make_config(name="r", resume=True)
    assert FREE <= {f.name for f in dataclasses.fields(cfg)}
    for field in dataclasses.fields(cfg):
        before = dataclasses.asdict(cfg) | {field.name: "another"}
        if field.name in FREE:
            refuse_changes(before, cfg)
            assert (
                field.name in ("resume", "out", "name")
                or f"--{field.name} ('another' before" in capsys.readouterr().out
            )
        else:
            with pytest.raises(ValueError, match=f"started with other flags: --{field.name} "):
                refuse_changes(before, cfg)


def test_a_field_that_is_new_had_its_default(make_config):
    cfg, before = pmd.Config(name="r"), dataclasses.asdict(pmd.Config(name="r"))
    for name in before.keys() - FORMERLY.keys():
        refuse_changes({k: v for k, v in before.items() if k != name}, cfg)
    changed = dataclasses.replace(cfg, alpha=1.0)
    with pytest.raises(ValueError, match=r"--alpha \(0.5 before, 1.0 now\)"):
        refuse_changes({k: v for k, v in before.items() if k != "alpha"}, changed)
    refuse_changes(before | {"a_field_of_yore": 1}, cfg)


def test_an_evaluation_too_has_one_writer_and_keeps_to_its_problems(tmp_path):
    sums(tmp_path / "t")
    flags = f"--model nano --task {tmp_path / 't'} --dev 0 --n 1 --out {tmp_path} --name e".split()
    ev.main(pmd.parse_flags, flags)
    answers = (tmp_path / "e" / "evals" / "0-test.jsonl").read_bytes()
    with (
        another_process(tmp_path / "e"),
        pytest.raises(SystemExit, match="eval.py: .*e is being written by process"),
    ):
        ev.main(pmd.parse_flags, flags)
    sums(tmp_path / "t", shift=1)
    with pytest.raises(
        SystemExit, match="eval.py: the test problems changed since .*e was started"
    ):
        ev.main(pmd.parse_flags, flags)
    assert (tmp_path / "e" / "evals" / "0-test.jsonl").read_bytes() == answers
    (tmp_path / "e" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="eval.py: .*e/config.json can't be read .*remove it"):
        ev.main(pmd.parse_flags, flags)


# -- beginnings and ends


def test_the_end_names_what_is_there_and_a_finished_run_stays(command, tmp_path):
    code, out, _ = command("--name", "g", "--method", "grpo")
    assert code == 0 and out.splitlines()[-1].endswith("(curve.png, samples.jsonl, evals, final)")
    metrics = (tmp_path / "g" / "metrics.jsonl").stat().st_mtime_ns
    code, out, _ = command("--name", "g", "--method", "grpo", "--resume")
    assert (
        code == 0
        and "is at its end: nothing is left to do" in out
        and "grpo, after training" in out
    )
    assert (tmp_path / "g" / "metrics.jsonl").stat().st_mtime_ns == metrics
    # by something else: it is written anew, from the checkpoint
    cut(tmp_path / "g" / "summary.json")
    assert command("--name", "g", "--method", "grpo", "--resume")[0] == 0
    assert json.loads((tmp_path / "g" / "summary.json").read_text())["steps"] == 1
    code, _, said = command("--name", "p", "--steps", "2")
    assert code == 0
    code, _, said = command("--name", "p", "--steps", "1", "--resume")
    assert code == 1 and "--steps 1 ends at step 1, before" in said and "checkpoints/2" in said


NO_NAMES = [
    "..",
    ".",
    "/",
    "/tmp/x",
    "a/../../b",
    "a\nb",
    "a\0b",
    "x" * 300,
    "a/" + "é" * 120,
    "\udcff",
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_is_a_folder_under_out(make_config, name):
    with pytest.raises(ValueError, match="--name .* is no (name for a )?folder") as caught:
        pmd.check(make_config(name=name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["a b", "übung", "a/b", "a/", "数", "-x", ".hidden"])
def test_a_name_may_be_any_other(make_config, name):
    check_folder(make_config(name=name), pmd.PMD, quiet=True)


def test_where_nothing_can_be_written_is_said_before_the_run(make_config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match="file/r can't be made: .*file is a file; give another --out"
    ):
        pmd.check(make_config(name="r", out=str(tmp_path / "file")))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root all is permitted
    with pytest.raises(ValueError, match="can't be made: .* is not yours to write to"):
        pmd.check(make_config(name="r"))


def test_the_embedded_model_stays_on_one_cpu_process_of_a_gpu_node(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    count = {
        flags: count_ranks(pmd.parse_flags(flags.split()))
        for flags in (
            "",
            "--nproc 2",
            "--device cuda",
            "--task my/folder",
            "--model elsewhere",
            "--model elsewhere --task nano",
        )
    }
    assert list(count.values()) == [1, 2, 8, 1, 8, 8]
    assert (
        pmd.parse_flags([]).device == "cpu"
        and pmd.parse_flags(["--model", "elsewhere", "--task", "nano"]).device == ""
    )


def test_nothing_retrieved_is_a_value_that_works(make_config):
    pmd.train(make_config(method="frozen-policy", name="r", retrieve_k=0, behavior_every=1))


# -- what a second pair of eyes tried

NUMBERS = [f for f in dataclasses.fields(pmd.Config) if f.type in (int, float)]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_a_number_outside_its_meaning_is_a_sentence_whatever_its_length(make_config, field):
    for value in (
        "nan",
        "inf",
        "-inf",
        "-1e9",
        "1e400",
        "1" + "0" * 30,
        "1" + "0" * 400,
        "-1" + "0" * 400,
        "1" * 5000,
    ):
        try:
            value = field.type(value)
        except ValueError:  # argparse refuses it
            continue
        inside = (
            field.type is float
            and field.metadata["within"].endswith("inf)")
            and 0 < value < float("inf")
        )
        if inside:
            continue
        with pytest.raises(ValueError, match=f"^--{field.name} .* must be "):
            check_numbers(make_config(**{field.name: value}))


def test_a_tier_is_given_once(make_config):
    for tiers in ("insight,insight", "experience,insight,behavior,experience"):
        with pytest.raises(ValueError, match=f"--tiers takes each tier once, not {tiers}"):
            pmd.check(make_config(tiers=tiers))
    with pytest.raises(ValueError, match="--supervise solved and --tiers behavior leave nothing"):
        pmd.check(make_config(tiers="behavior", supervise="solved"))


def test_a_fork_goes_on_without_the_checkpoint_that_it_began_with(make_config, tmp_path):
    """The other run goes on, and keeps its last checkpoints only."""
    whole = make_config(name="whole", save_every=1, steps=3)
    pmd.train(whole)
    fork = dataclasses.replace(whole, name="f", fork_from="whole@2", steps=3)
    pmd.train(dataclasses.replace(fork, name="left alone", steps=4))
    pmd.train(fork)
    shutil.rmtree(tmp_path / "whole")
    with pytest.raises(ValueError, match="--from whole@2 is no RUN@STEP"):
        pmd.check(dataclasses.replace(fork, name="another"))
    pmd.train(dataclasses.replace(fork, steps=4, resume=True))
    one, other = (tmp_path / name / "final" / "model.safetensors" for name in ("left alone", "f"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "error, code, last",
    [
        (KeyboardInterrupt(), 130, "pmd.py: interrupted before it began"),
        (MemoryError(), 1, "pmd.py: out of memory: .*"),
        (OSError("no such place"), 1, "pmd.py: no such place"),
        (ValueError("no such flag"), 1, "pmd.py: no such flag"),
    ],
)
def test_the_checks_end_by_a_sentence(command, monkeypatch, error, code, last):
    def raises(*args, **kwargs):
        raise error

    monkeypatch.setattr(check, "load_task", raises)
    found, _, said = command("--name", "a")
    assert found == code and re.fullmatch(last, said.splitlines()[-1])
    monkeypatch.setattr(pmd, "checked_totals", raises)  # of a comparison
    monkeypatch.setattr(pmd, "ProcessPoolExecutor", lambda *args: contextlib.nullcontext(Here))
    found, _, said = command("--name", "a", "--compare", "sdpo,grpo")
    assert found == code and re.fullmatch(last, said.splitlines()[-1])


EVALUATION = "--model nano --n 1 --eval_problems 2 --name e".split()


@pytest.mark.parametrize(
    "error, code, last",
    [
        (
            KeyboardInterrupt(),
            130,
            "eval.py: interrupted; the same command goes on with the problems that are left",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            1,
            "eval.py: out of memory: CUDA out of memory.; lower --micro_.*",
        ),
        (FloatingPointError("no numbers"), 1, "eval.py: no numbers"),
        (SafetensorError("cut"), 1, "eval.py: the weights of --model nano can't be read: cut"),
    ],
)
def test_an_evaluation_ends_by_a_sentence(tmp_path, capsys, monkeypatch, error, code, last):
    def raises(*args):
        raise error

    monkeypatch.setattr(Sampler, "draw", raises)
    with pytest.raises(SystemExit) as end:
        ev.main(pmd.parse_flags, [*EVALUATION, "--out", str(tmp_path)])
    said = end.value.code if code == 1 else capsys.readouterr().err.splitlines()[-1]
    assert (1 if isinstance(end.value.code, str) else end.value.code) == code and re.fullmatch(
        last, said
    )


def test_a_fault_of_the_program_in_an_evaluation_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "draw", lambda *args: {}["a fault"])
    with pytest.raises(KeyError):
        ev.main(pmd.parse_flags, [*EVALUATION, "--out", str(tmp_path)])


TOOLS = [
    ("tools/plan.py", "--gpus=0"),
    ("tools/plan.py", "--gpus=-1"),
    ("tools/plan.py", "--gpu_memory=nan"),
    ("tools/plan.py", "--gpu_memory=-1"),
    ("tools/plan.py", "--gpu_memory_utilization=2"),
    ("tools/plan.py", "--gpu_memory_utilization=nan"),
    ("tools/plan.py", "--max_completion=-5"),
    ("tools/plan.py", "--teacher=x"),
    ("tools/plan.py", "--dtype=x"),
    ("tools/plan.py", "--tensor_parallel=3"),
    ("tools/plan.py", "--compile_layers"),
    ("tools/same.py", "nosuch"),
    ("tools/same.py", "--steps=0"),
    ("tools/same.py", "--methods=x"),
    ("tools/same.py", "--methods="),
    ("study/study.py", "--parts=x"),
    ("study/study.py", "--parts="),
    ("study/study.py", "--workers=0"),
    ("benchmarks/chaos.py", "--kills=-1"),
    ("benchmarks/chaos.py", "--ranks=0"),
]


@pytest.mark.parametrize("script, flag", TOOLS)
def test_the_scripts_refuse_what_means_nothing(monkeypatch, capsys, script, flag):
    commit = ["HEAD"] if script == "tools/same.py" and flag.startswith("-") else []
    monkeypatch.setattr(sys, "argv", [script, *commit, flag])
    monkeypatch.setattr(sys, "path", [str(Path(HERE, script).parent), *sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(HERE, script)), run_name="__main__")
    assert end.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "git, said",
    [
        ("", "same.py: error: there is no git here .* install it"),
        (
            '#!/bin/sh\ncase "$*" in *worktree*) echo "no space left" >&2; exit 128;; esac\n',
            "same.py: git can't make a worktree of HEAD .no space left.: let this user write",
        ),
    ],
    ids=["without", "failing"],
)
def test_a_git_that_fails_is_one_sentence(tmp_path, git, said):
    if git:
        (tmp_path / "git").write_text(git)
        (tmp_path / "git").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "tools/same.py", "HEAD"],
        cwd=HERE,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "Traceback" not in done.stderr
    assert re.search(said, done.stderr.splitlines()[-1])


def test_a_fork_of_any_method_that_borrows_a_memory_is_refused(make_config):
    """A method in a file of one's own may be a frozen-memory under another name."""
    cfg = make_config(method="pmd", name="out", fork_from="borrower@2")
    fork = Path(cfg.out, "borrower")
    (fork / "checkpoints" / "2").mkdir(parents=True)
    config = {"method": "mine.py", "model": cfg.model, "memory_from": "lender"}
    (fork / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--from borrower@2 has the memory of another run"):
        check.check_fork(cfg, method_class("pmd"))
    check.check_fork(cfg, method_class("sdpo"))
    (fork / "config.json").write_text(json.dumps(config | {"memory_from": ""}))
    check.check_fork(cfg, method_class("pmd"))


def test_the_example_of_a_task_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sums.py"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(HERE, "examples", "sums.py")), run_name="__main__")
    assert "required: folder" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_model_that_lacks_a_weight_is_refused(tmp_path, change):
    """transformers would draw it at random, and train on."""
    folder = tmp_path / "model"
    shutil.copytree(MODELS["nano"], folder, ignore=shutil.ignore_patterns("*.py", "worlds"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    whole = weights.pop(name)
    if change == "shape":
        weights[name] = whole[1:].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    cfg = pmd.parse_flags([*SMALL, "--task", "nano", "--model", str(folder)])
    with pytest.raises(Unsupported, match=f"are not those of its config.json: .* {name}; get"):
        load_policy(cfg)


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("tokenizer.json", '{"a": 1}', "the tokenizer of --model .* can't be read"),
        ("tokenizer_config.json", "{", "the tokenizer of --model .* can't be read"),
        ("config.json", '{"hidden_size": 8}', "the config.json of --model .* can't be read"),
        ("config.json", '{"model_type": "x9"}', "the config.json of --model .* can't be read"),
    ],
)
def test_a_damaged_file_of_a_model_is_one_sentence(make_config, tmp_path, file, text, said):
    folder = tmp_path / "model"
    shutil.copytree(MODELS["nano"], folder, ignore=shutil.ignore_patterns("*.py", "worlds"))
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        pmd.check(make_config(model=str(folder)))
    assert "\n" not in str(caught.value)


def test_a_run_may_have_an_at_in_its_place(make_config):
    cfg = make_config()
    place = Path(cfg.out, "a@b", "x")
    place.mkdir(parents=True)
    inside = f"{cfg.out}/a@b/x"
    assert run_and_step(inside, cfg) == (place, "")
    assert run_and_step(f"{inside}@3", cfg) == run_and_step("a@b/x@3", cfg) == (place, "3")
    assert run_and_step(f"{cfg.out}/a@b/y", cfg)[1] == ""
    assert run_and_step("y@z", cfg) == (Path(cfg.out, "y"), "z")


@pytest.mark.parametrize("methods", ["pmd,OWN", "grpo,grpo", "pmd_transient,pmd-transient"])
def test_no_two_runs_of_a_comparison_share_a_folder(tmp_path, methods):
    """The second would be taken for finished, with the numbers of the first."""
    (tmp_path / "pmd.py").write_text("import pmd\n\n\nclass Method(pmd.PMD):\n    pass\n")
    flags = ["--compare", methods.replace("OWN", str(tmp_path / "pmd.py"))]
    with pytest.raises(ValueError, match="--compare takes different methods"):
        pmd.compared(pmd.parse_flags(flags), flags)


def test_a_folder_of_runs_is_continued_as_a_comparison_alone(make_config):
    cfg = make_config(name="both/grpo", steps=1, method="grpo")
    pmd.train(cfg)
    whole = dataclasses.replace(cfg, name="both", resume=True)
    with pytest.raises(ValueError, match="both is no run: it holds grpo; add the --compare"):
        pmd.check(whole, quiet=True)
    (Path(cfg.out) / "both" / "grpo" / "config.json").unlink()  # as a refusal of flags suggests
    pmd.check(dataclasses.replace(cfg, resume=True), quiet=True)


def test_a_run_without_a_checkpoint_says_that_it_starts_over(make_config, capsys):
    cfg = make_config(name="r", steps=1, method="grpo")
    pmd.train(cfg)
    assert "starts over" not in capsys.readouterr().out
    pmd.train(dataclasses.replace(cfg, steps=2, resume=True))
    assert "there is no checkpoint to go on from: it starts over" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--method grpo --tiers insight --alpha 0.2", "this grpo: --alpha 0.2, --tiers insight"),
        ("--method sdpo --behavior_every 3 --alpha 0.2", "this sdpo: --behavior_every 3"),
        ("--teacher live --ema_rate 0.3", "this pmd: --ema_rate 0.3"),
        ("--method grpo", ""),
        (
            "--method frozen-policy --lr 0.5 --loss_mean sum --query_feedback",
            "this frozen-policy: --lr 0.5, --loss_mean sum, --query_feedback True",
        ),
        (
            "--method grpo --embedder x --max_reprompt 99",
            "this grpo: --max_reprompt 99, --embedder x",
        ),
        ("--method sdpo --memory_format lines", "this sdpo: --memory_format lines"),
        ("--method uni-opd --alpha 0.2 --top_k 5", "this uni-opd: --alpha 0.2, --top_k 5"),
        ("--method lightning-opd --ema_rate 0.5", "this lightning-opd: --ema_rate 0.5"),
        ("--method pi-distill --teacher live", "this pi-distill: --teacher live"),
        ("--method pmd-transient --behavior_every 7", "this pmd-transient: --behavior_every 7"),
        ("--alpha 0.2 --tiers insight", ""),
        ("--method grpo --task livecodebench --model x", ""),
    ],
)
def test_flags_without_effect_are_named(capsys, flags, said):
    cfg = pmd.parse_flags(flags.split())
    preset = pmd.preset_of(pmd.kind_of(cfg.model, cfg.task), method_of(cfg))
    check.name_idle_flags(cfg, method_of(cfg), preset)
    assert capsys.readouterr().out == (f"without effect on {said}\n" if said else "")


def test_a_run_that_goes_on_is_not_finished(make_config, monkeypatch):
    """Its old scores are kept, and tables do not take them for those of its end."""
    cfg = make_config(name="longer", steps=1)
    pmd.train(cfg)
    folder = Path(cfg.out, "longer")
    before = (folder / "summary.json").read_bytes()
    more = dataclasses.replace(cfg, steps=2, resume=True)

    def killed(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pmd, "attempt", killed)
        with pytest.raises(RuntimeError, match="killed"):
            pmd.train(more)
    assert not (folder / "summary.json").exists()
    assert (folder / "summary.before.json").read_bytes() == before
    assert (
        pmd.train(more)["steps"] == json.loads((folder / "summary.json").read_text())["steps"] == 2
    )
