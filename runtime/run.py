"""Keeps a run's folder: its records, its progress bar, and when it saves, stops and ends.

Nothing here changes what is learned. checkpoint.py writes and reads checkpoints, metrics.py
computes the numbers of a step. cfg is pmd.Config throughout.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from runtime.checkpoint import (
    checkpoints,
    claim,
    cure_without,
    cut_records,
    default_name,
    finished,
    fork_source,
    prune,
    read_checkpoint,
    release,
    save_model,
    starting_point,
    total_steps,
    write_checkpoint,
)
from runtime.clock import clock
from runtime.errors import RunError
from runtime.files import (
    Stopped,
    append,
    append_text,
    read_json,
    read_rows,
    write,
    write_lines,
    writing,
)
from runtime.metrics import reporter, step_metrics
from runtime.options import option
from runtime.provenance import VERSION, changes, commit, environment, write_origin
from runtime.ranks import broadcast, gather, rank
from runtime.rows import add
from runtime.samples import sample_of
from runtime.store import describe
from runtime.tables import model_card, plot_curves, table, title

# The environment of a run that --compare started: the --name of the comparison.
COMPARISON = "PMD_COMPARISON"
# The phases whose seconds in metrics.jsonl have another name: what they do besides a model's work.
CLOCKS = {"attempt": "verify", "remember": "memory", "condition": "memory", "distill": "student"}
KEPT = ("step", "avg_at_k", "k", "n_problems", "interval", "maj_at_k", "best_at_k")  # in summaries


@dataclass
class RunOptions:
    """The run and its records."""

    seed: int = option(0, "seed of everything random in the run", within="[0, 4294967295]")
    name: str = option("", "the run's folder under --out (default: task-method-seed-date-time)")
    out: str = option("runs", "where runs are written")
    resume: bool = option(
        False, "continue the run --name from its last checkpoint; start it if there is none"
    )
    fork_from: str = option(
        "",
        "start from RUN@STEP, a kept checkpoint: policy, teacher, optimizer and memory together",
        "--from",
    )
    log_every: int = option(
        10, "steps between printed lines and samples in samples.jsonl [ours]", within="[1, inf)"
    )
    save_every: int = option(
        50,
        "steps between checkpoints; with 0 there is one only if the run is stopped [ours]",
        within="[0, inf)",
    )
    keep: int = option(
        2,
        "newest checkpoints kept, beside the saved one that was best on dev [ours]",
        within="[1, inf)",
    )
    max_minutes: float = option(
        0.0,
        "after so many minutes finish the step, save and stop, as on SIGTERM and Ctrl-C; --resume "
        "continues; 0 for no limit [ours]",
        within="[0, inf)",
    )
    log: Literal["", "tensorboard", "wandb", "trackio"] = option(
        "", "also send the metrics to this library, which must be installed [ours]"
    )


class Run:
    """Keeps the folder of a run, its records, its progress bar and its checkpoints."""

    def __init__(self, cfg, task, tokenizer):
        self.cfg, self.task, self.tokenizer = cfg, task, tokenizer
        self.started = time.perf_counter()
        self.spent = 0.0  # seconds of earlier processes
        self.total = total_steps(task.train, cfg)
        clock.read()  # the seconds so far are not those of a step
        clock.passed()
        self.name = cfg.name or broadcast(default_name(cfg))
        self.folder = Path(cfg.out) / self.name
        refusal = broadcast(claim(self.folder, cfg.resume) if rank() == 0 else "")
        if refusal:
            raise RunError(refusal)
        self.saved = broadcast(starting_point(cfg))
        self.origin = int(fork_source(cfg).name) if cfg.fork_from else 0  # it began after this step
        self.begun = -1  # the step after which this process went on
        self.evaluated = -1  # the step of the last evaluation
        bar = {"total": self.total, "desc": cfg.method, "unit": "step", "dynamic_ncols": True}
        self.bar = tqdm(**bar, disable=rank() > 0 or None)
        self.learned = ""  # the last reward, for the bar
        self.warned = False  # of lessons that are misread, once
        self.send = lambda row: None
        if rank() == 0:
            self._open()
        self.stop = ""  # the reason to stop: a signal, or --max_minutes
        self.handlers = {}  # of signals, before this run
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._on_signal)

    def _open(self):
        """Writes and prints the beginning of a run."""
        cfg, task = self.cfg, self.task
        (self.folder / "evals").mkdir(exist_ok=True)
        summary = self.folder / "summary.json"
        if summary.is_file() and not finished(cfg, self.total):  # of fewer steps
            summary.rename(self.folder / "summary.before.json")
        digests = write_origin(self.folder, cfg, task, self.tokenizer)
        # a resumed run has several
        append_text(self.folder / "environment.txt", environment(cfg.method))
        sizes = f"{len(task.train)} train, {len(task.dev)} dev, {len(task.test)} test problems"
        steps = f"{self.total} steps of {cfg.batch_size} x {cfg.group_size}"
        lines = [task.card] if task.card else []
        lines += [
            f"{cfg.method} on {task.name} with {cfg.model}, seed {cfg.seed}: {sizes}; {steps};"
            f" {self.folder}"
        ]
        settings = []
        for f in dataclasses.fields(cfg):
            value = getattr(cfg, f.name)
            if value != f.default:
                settings.append(f"{f.name} {value}")
        lines += [f"set otherwise than by default: {', '.join(settings)}"]
        if self.saved:
            lines += [f"going on from {self.saved}"]
        elif (self.folder / "metrics.jsonl").is_file():
            lines += ["there is no checkpoint to go on from: it starts over"]
        if self.saved and cfg.fork_from:
            other = self.saved.parent.parent / "problems.json"
            changed = changes(read_json(other, "remove it"), digests) if other.is_file() else []
            if changed:
                lines += [f"other than in {other.parent}: {', '.join(changed)}"]
        print("\n".join(lines))
        self.send = reporter(cfg, self.folder)

    # -- stopping, and what is due

    def _on_signal(self, number, frame):
        """Has the run save and stop after the step at hand. The next signal ends it at once."""
        self.stop = signal.Signals(number).name
        self.bar.write(f"{self.stop}: saving after this step; once more to quit at once")
        self._restore_handlers()

    def _restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def due(self, step, every) -> bool:
        return bool(every) and step % every == 0 or step == self.total

    def told_to_stop(self, limit=True) -> bool:
        """Whether a signal came or, with limit, --max_minutes have passed: on every rank alike.

        A signal may reach one rank a step later than another.
        """
        minutes = (time.perf_counter() - self.started) / 60
        if limit and 0 < self.cfg.max_minutes <= minutes:
            self.stop = self.stop or "--max_minutes"
        self.stop = max(gather(self.stop))
        return bool(self.stop)

    def must_evaluate(self, step) -> bool:
        """Whether an evaluation is due after this step, and has not been made.

        A run that was told to stop saves first, and evaluates when it goes on. A limit of minutes
        lets one step be made: a run with a short one would never come further.
        Raises Stopped if a signal came before the first step: there is nothing to save.
        """
        due = step == self.origin or self.due(step, self.cfg.eval_every)
        if step == self.evaluated or not due:
            return False
        if self.told_to_stop(limit=step != self.begun):
            if step == self.begun:
                self._stop(step)
            return False
        self.evaluated = step
        return True

    def must_save(self, step) -> bool:
        """Whether a checkpoint is due, or the run was told to stop."""
        every = self.cfg.save_every
        return self.told_to_stop() or every > 0 and self.due(step, every)

    def _stop(self, step):
        self._restore_handlers()
        self.bar.close()
        release(self.folder)
        code = 128 + getattr(signal, self.stop) if self.stop.startswith("SIG") else 0
        name = os.environ.get(COMPARISON, self.name)
        raise Stopped(f"{self.stop}: stopped after step {step} of {self.total}", name, code)

    # -- records

    @contextlib.contextmanager
    def phase(self, name):
        """Shows a phase on the progress bar and times it.

        A FloatingPointError inside gets the checkpoint to go back to.
        """
        self.bar.set_postfix_str(name + self.learned)
        try:
            with clock(CLOCKS.get(name, name)):
                yield
        except FloatingPointError as error:
            where = "there is no checkpoint to go back to"
            saved = checkpoints(self.folder)
            if saved:
                where = f"the last good checkpoint is {saved[-1]}"
            raise FloatingPointError(f"{error}; {where}") from error
        finally:
            if sys.exc_info()[0]:  # the program's own handlers again, whatever ended the run
                self._restore_handlers()

    def log(self, step, rollouts, rows, sums, memory):
        """Writes a line of metrics.jsonl, and every `log_every` steps prints one with a sample.

        rows: what phase 4 trained on, mostly the rollouts themselves.
        """
        cfg = self.cfg
        sample = {}
        if self.due(step, cfg.log_every):  # on every rank: one of them holds its divergences
            sample = sample_of(step, rows or rollouts, self.tokenizer)
        passed = functools.reduce(add, gather(clock.passed()))
        if rank():
            return
        metrics = step_metrics(step, rollouts, sums, passed, memory, self.task.train, cfg)
        self.note(metrics)
        sizes = "/".join(map(str, metrics["memory"].values()))
        self.learned = f", reward {metrics['reward']:.2f}, memory {sizes}"
        self.bar.update()
        if not sample:
            return
        line = (
            f"step {step:4d}  reward {metrics['reward']:.3f}  teacher active"
            f" {metrics['teacher_active']:.2f}  divergence {metrics.get('divergence', 0):.4f}"
        )
        if any(metrics["memory"].values()):
            line += f"  memory {sizes}"
        self.bar.write(line)
        insight = memory.living("insight", sample["problem"])
        sample["insight"] = [f"{i.kind} {i.title}: {i.text}" for i in insight]
        append(self.folder / "samples.jsonl", sample)

    def note_answers(self, step, split, rows, estimates, pull=None):
        """Writes the samples of an evaluation, and the estimates from them.

        pull: what lessons do to failed attempts, see runtime/watch.py.
        """
        if rank():
            return
        if pull:
            estimates = {**estimates, "lesson_pull": pull.mean}
            if pull.warning and not self.warned:
                self.bar.write(pull.warning)
                self.warned = True
        cfg = self.cfg
        write_lines(self.folder / "evals" / f"{step}-{split}.jsonl", rows)
        rollouts = step * cfg.batch_size * cfg.group_size
        self.note({"step": step, "split": split, "rollouts": rollouts, "mcq": cfg.mcq, **estimates})

    def say(self, split, sentence):
        """Prints a sentence about a split, if there is one, above the progress bar."""
        if sentence and rank() == 0:
            self.bar.write(f"{split}: {sentence}")

    def note(self, row):
        """Writes a line of metrics.jsonl, on disk before the next step, and sends it to --log."""
        append(self.folder / "metrics.jsonl", row)
        self.send(row)

    # -- checkpoints

    def seconds(self) -> float:
        """Returns the seconds of the run so far, those of earlier processes included."""
        return self.spent + time.perf_counter() - self.started

    def save(self, step, method, optimizer):
        """Writes checkpoints/STEP, and removes older ones: see --keep.

        The randomness of sampler and data is keyed by seed and step, and needs no state.
        Raises Stopped if the run was told to stop.
        """
        folder = self.folder / "checkpoints" / str(step)
        before = checkpoints(self.folder)
        then = "no checkpoint was written before this one"
        if before:
            then = f"--resume then goes on from {before[-1]}"
        cure = f"free some space on the disk, or lower --keep; {then}"
        record = {
            "step": step,
            "updates": optimizer.updates,
            "ema": method.teacher is not method.policy,
            "seconds": self.seconds(),
            "method": method.state(),
        }
        with self.phase("save"), writing(f"the checkpoint {folder}", cure):
            write_checkpoint(folder, method, optimizer, self.tokenizer, record)
            if rank() == 0:
                prune(self.folder, self.cfg.keep)
            gather(None)  # nobody goes on, or stops, before it is there
        if self.stop and (step < self.total or self.evaluated != step):
            self._stop(step)

    def restore(self, method, optimizer) -> int:
        """Goes back to the checkpoint that the run begins from; returns the next step's number.

        Memory and records return to its step.
        Raises RunError if it can't be read, with the checkpoint to go on from instead.
        """
        step = 0
        if self.saved:
            cure = cure_without(self.saved, self.folder)
            record = read_checkpoint(self.saved, method, optimizer, cure)
            method.load(record.get("method", {}))
            step = record["step"]
            optimizer.updates = record["updates"]
            self.spent = record["seconds"]
        if method.memory_mode != "frozen":  # known on every rank; the memory itself is rank 0's
            method.memory.truncate_after(step)
        evaluated = False
        if rank() == 0:
            # those of a process that is gone, since the lock is ours
            for partial in (self.folder / "checkpoints").glob("*.partial"):
                shutil.rmtree(partial)
            evaluated = cut_records(self.folder, step, self.origin)
        if broadcast(evaluated):
            self.evaluated = step
        self.begun = step
        self.bar.update(step)
        return step + 1

    # -- the end

    def finish(self, policy, memory) -> dict:
        """Writes final/, the learning curve and, last, summary.json; prints the results.

        They are the table, and the memory of one problem. Returns the summary.
        """
        self._restore_handlers()
        self.bar.close()
        cure = "free some space on the disk, and the same command with --resume ends it"
        with writing(self.folder, cure):
            summary = self._write_end(policy, memory)
        if rank():
            return {}
        print("\n" + table({self.cfg.method: summary}))
        if any(memory.sizes().values()):
            problem = self._richest_problem(memory)
            print("\n" + describe(memory, problem.id, behaviors=self.cfg.retrieve_k))
        names = ("curve.png", "memory.db", "samples.jsonl", "evals", "final")
        written = [name for name in names if (self.folder / name).exists()]
        print(f"\nall of it: {self.folder}  ({', '.join(written)})")
        memory.close()
        release(self.folder)
        return summary

    def _richest_problem(self, memory):
        """Returns the training problem with most strategies, then lessons, then experience."""
        counts = memory.tally("insight") + memory.tally("experience")
        kinds = ("strategy", "lesson", "success", "failure")
        return max(self.task.train, key=lambda p: [counts[p.id, kind] for kind in kinds])

    def _write_end(self, policy, memory) -> dict:
        """Writes the files of `finish`. A run with a summary.json is finished: it is the last."""
        partial = self.folder / "final.partial"
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        save_model(policy, self.tokenizer, partial)
        if rank():
            return {}
        history = read_rows(self.folder / "metrics.jsonl")
        shutil.rmtree(self.folder / "final", ignore_errors=True)
        partial.rename(self.folder / "final")
        summary = self._summary(history, memory)
        plot_curves({self.cfg.method: history}, self.folder / "curve.png", title(summary))
        write(self.folder / "final" / "README.md", model_card(summary))
        write(self.folder / "summary.json", json.dumps(summary, indent=1))
        return summary

    def _summary(self, history, memory) -> dict:
        """Makes the summary of the rows of metrics.jsonl.

        Raises RunError if the first or the last evaluation on test is not among them.
        """
        cfg = self.cfg
        tests = {row["step"]: row for row in history if row.get("split") == "test"}
        devs = [row for row in history if row.get("split") == "dev"]
        for step in (self.origin, self.total):
            if step not in tests:
                raise RunError(
                    f"{self.folder / 'metrics.jsonl'} has lost the evaluation at step {step}:"
                    " final/ is written, and there is no summary without it"
                )

        def score(row):
            return row["avg_at_k"]

        chosen = {"base": tests[self.origin], "final": tests[self.total], "dev_best": None}
        if devs:
            chosen["dev_best"] = tests[max(devs, key=score)["step"]]
        chosen["test_best"] = max(tests.values(), key=score)
        results = {name: row and {key: row[key] for key in KEPT} for name, row in chosen.items()}
        # the best of several looks at the test split has no honest interval
        del results["test_best"]["interval"]
        results["test_best"]["n_checkpoints_searched"] = len(tests)
        return {
            "method": cfg.method,
            "task": cfg.task,
            "model": cfg.model,
            "seed": cfg.seed,
            "steps": self.total,
            "rollouts": self.total * cfg.batch_size * cfg.group_size,
            "seconds": round(self.seconds(), 1),
            **results,
            "data": self.task.name,
            "mcq": cfg.mcq,
            "abstractor": cfg.abstractor,
            "embedder": cfg.embedder,
            "memory": memory.sizes(),
            "memory_events": {} if memory.frozen else memory.counts(),
            "version": VERSION,
            "commit": commit(),
        }
