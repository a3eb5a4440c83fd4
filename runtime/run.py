"""What a run is made of beside its learning: its folder and records, its progress bar and clock,
checkpoints and resuming. Nothing here changes what is learned. cfg is pmd.Config throughout.
"""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from runtime.checkpoint import (
    batches_per_epoch,
    checkpoint_of,
    checkpoints,
    claim,
    default_name,
    release,
    save_model,
    total_steps,
    trainer_state,
)
from runtime.clock import clock
from runtime.files import (
    RunError,
    Stopped,
    append,
    append_text,
    read_json,
    read_rows,
    reason,
    settle,
    without_log,
    write,
    write_lines,
    writing,
)
from runtime.options import option
from runtime.provenance import VERSION, changes, commit, environment, fingerprint
from runtime.ranks import broadcast, gather, rank, world
from runtime.store import Store, describe
from runtime.tables import plot_curves, table, title
from tasks.problem import SUCCESS


@dataclass
class RunOptions:
    """The run and its records."""

    seed: int = option(0, "of everything random in the run", within="[0, 4294967295]")
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
        "steps between checkpoints; 0 for none but the one of a run that is stopped [ours]",
        within="[0, inf)",
    )
    keep: int = option(
        2, "checkpoints kept, besides the one that was best on dev [ours]", within="[1, inf)"
    )
    max_minutes: float = option(
        0.0,
        "save and stop after the step at hand when so many minutes have passed, as on SIGTERM "
        "and Ctrl-C; --resume goes on; 0 for no limit [ours]",
        within="[0, inf)",
    )
    log: Literal["", "tensorboard", "wandb"] = option(
        "", "send the metrics there too, through its own library [ours]"
    )


COMPARISON = (  # the environment of a run that --compare started: the --name of the comparison
    "PMD_COMPARISON"
)


class Run:
    """The folder of a run, its progress bar and its clock. Nothing here changes what is learned."""

    def __init__(self, cfg, task, tokenizer):
        self.cfg, self.task, self.tokenizer, self.started = (
            cfg,
            task,
            tokenizer,
            time.perf_counter(),
        )
        self.total, self.spent = total_steps(task.train, cfg), 0.0
        clock.read()
        self.name = cfg.name or broadcast(default_name(cfg))
        self.folder = Path(cfg.out) / self.name
        if refusal := broadcast(claim(self.folder, cfg.resume) if rank() == 0 else ""):
            raise RunError(refusal)
        own = broadcast(checkpoints(self.folder))
        self.saved = (
            own[-1] if own else checkpoint_of(cfg) if cfg.fork_from else None
        )  # what it goes on from
        self.origin = (
            int(checkpoint_of(cfg).name) if cfg.fork_from else 0
        )  # the step it began after
        self.begun = (
            self.evaluated
        ) = -1  # the steps that it went on after, and that it was last evaluated at
        self.bar = tqdm(
            total=self.total,
            desc=cfg.method,
            unit="step",
            dynamic_ncols=True,
            disable=rank() > 0 or None,
        )
        self.send = lambda row: None
        if rank() == 0:
            self._open()
        self.stop, self.signals, self.learned = "", {}, ""
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
            self.signals = {
                n: signal.signal(n, self._told) for n in (signal.SIGTERM, signal.SIGINT)
            }

    def _open(self):
        """What a run writes and says before its first step."""
        cfg, task = self.cfg, self.task
        (self.folder / "evals").mkdir(exist_ok=True)
        write(self.folder / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
        digests = fingerprint(task, self.tokenizer)
        write(self.folder / "problems.json", json.dumps(digests, indent=1))
        append_text(self.folder / "environment.txt", environment())  # a resumed run has several
        print(task.card, end="\n" if task.card else "")
        print(
            f"{cfg.method} on {task.name} with {cfg.model}, seed {cfg.seed}: {len(task.train)}"
            f" train, {len(task.dev)} dev, {len(task.test)} test problems; {self.total} steps of"
            f" {cfg.batch_size} x {cfg.group_size}; {self.folder}"
        )
        settings = {
            f.name: getattr(cfg, f.name)
            for f in dataclasses.fields(cfg)
            if getattr(cfg, f.name) != f.default
        }
        print(
            "set otherwise than by default: " + ", ".join(f"{k} {v}" for k, v in settings.items())
        )
        if self.saved:
            print(f"going on from {self.saved}")
        if self.saved and cfg.fork_from:
            other = self.saved.parent.parent / "problems.json"
            changed = changes(read_json(other, "remove it"), digests) if other.is_file() else []
            print(
                f"other than in {other.parent}: {', '.join(changed)}\n" if changed else "", end=""
            )
        self.send = reporter(cfg, self.folder)

    def _told(self, number, frame):
        """The first signal lets the step at hand end and saves; the next one ends the program at
        once.
        """
        self.stop = signal.Signals(number).name
        self.bar.write(f"{self.stop}: saving after this step; once more to quit at once")
        self._unlisten()

    def _unlisten(self):
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        self.signals = {}

    def due(self, step, every):
        return bool(every) and step % every == 0 or step == self.total

    def told_to_stop(self, limit=True) -> bool:
        """By a signal or, with limit, by --max_minutes; on every rank alike, though a signal may
        reach one a step later.
        """
        if limit and 0 < self.cfg.max_minutes <= (time.perf_counter() - self.started) / 60:
            self.stop = self.stop or "--max_minutes"
        self.stop = max(gather(self.stop))
        return bool(self.stop)

    def must_evaluate(self, step) -> bool:
        """Whether an evaluation is due after this step, and has not been. A run that was told to
        stop saves first: this evaluation is then made when it goes on. Raises Stopped where there
        is nothing to save, before the first step; but a limit of minutes lets one step be made, or
        a run with a short one would never come further.
        """
        if (
            step == self.evaluated
            or step != self.origin
            and not self.due(step, self.cfg.eval_every)
        ):
            return False
        if self.told_to_stop(limit=step != self.begun):
            if step == self.begun:
                self._stop(step)
            return False
        self.evaluated = step
        return True

    def must_save(self, step) -> bool:
        """Whether a checkpoint is due, or the run was told to stop."""
        return (
            self.told_to_stop() or self.cfg.save_every > 0 and self.due(step, self.cfg.save_every)
        )

    def _stop(self, step):
        self._unlisten()
        self.bar.close()
        release(self.folder)
        code = 128 + getattr(signal, self.stop) if self.stop.startswith("SIG") else 0
        name = os.environ.get(COMPARISON, self.name)
        raise Stopped(f"{self.stop}: stopped after step {step} of {self.total}", name, code)

    @contextlib.contextmanager
    def phase(self, name):
        """Shows the phase on the progress bar, times it, and says where to go back to if it fails.

        The names of the seconds are those of metrics.jsonl: what a phase does besides the model's
        work, which has its own.
        """
        self.bar.set_postfix_str(name + self.learned)
        try:
            names = {
                "attempt": "verify",
                "remember": "memory",
                "condition": "memory",
                "distill": "student",
            }
            with clock(names.get(name, name)):
                yield
        except FloatingPointError as error:
            saved = checkpoints(self.folder)
            where = (
                f"the last good checkpoint is {saved[-1]}"
                if saved
                else "there is no checkpoint to go back to"
            )
            raise FloatingPointError(f"{error}; {where}") from error
        finally:
            if sys.exc_info()[0]:  # the program's own handlers again, whatever ended the run
                self._unlisten()

    def log(self, step, rollouts, sums, memory):
        """One line of metrics.jsonl; every `log_every` steps a printed line and a readable sample
        too.
        """
        if rank():
            return
        n, cfg = len(rollouts), self.cfg
        groups = {r.problem.id for r in rollouts}
        solved = {r.problem.id for r in rollouts if r.reward > SUCCESS}
        metrics = {
            "step": step,
            "epoch": (step - 1) // batches_per_epoch(self.task.train, cfg),
            "rollouts": step * n,
            "reward": sum(r.reward for r in rollouts) / n,
            "groups_solved": len(solved) / len(groups),
            "truncated": sum(not r.finished for r in rollouts) / n,
            "completion_tokens": sum(len(r.ids) for r in rollouts) / n,
            "teacher_active": sum(bool(r.teacher_ids) for r in rollouts) / n,
            "supervised_tokens": sums["tokens"],
            "updates": sums["updates"],
            "updates_skipped": sums["updates_skipped"],
        }
        if sums["tokens"]:
            of = {
                "divergence": "distilled_tokens",
                "teacher_entropy": "distilled_tokens",
                "entropy": "tokens",
                "clipped": "reinforced_tokens",
            }
            metrics |= {k: sums[k] / sums[n] for k, n in of.items() if sums[n]}
            metrics |= {k: sums[k] / sums["updates"] for k in ("loss", "grad_norm")}
        if sums["distilled_tokens"] and sums["reinforced_tokens"]:  # rows of both kinds
            metrics["distilled_share"] = sums["distilled_tokens"] / sums["tokens"]
        metrics["sampler_gap"] = sums["sampler_gap"] / max(1, sums["compared"])
        metrics["sampler_gap_max"] = sums["sampler_gap_max"]
        if rates := [r.test_pass_rate for r in rollouts if r.test_pass_rate is not None]:
            metrics["test_pass_rate"] = sum(rates) / len(rates)
        metrics["keywords"] = {
            w: sum(w in r.text.lower() for r in rollouts) / n
            for w in ("strategy", "lesson", "behavior")
        }
        events = (
            memory.counts(step) if not memory.frozen else {}
        )  # what happened in it is its own run's
        metrics |= {"memory": memory.sizes(), "memory_events": events}
        if proposed := events.get("insight_proposed", 0) + events.get("behavior_proposed", 0):
            metrics["shortcut_rate"] = events.get("shortcut", 0) / proposed
        if (precision := memory_precision(memory, self.task.train)) is not None:
            metrics["memory_precision"] = precision
        metrics["seconds"] = clock.read()
        spent = sum(
            t for phase, t in metrics["seconds"].items() if phase not in ("evaluate", "save")
        )
        metrics["share"] = {
            phase: t / spent
            for phase, t in metrics["seconds"].items()
            if phase not in ("evaluate", "save")
        }
        metrics["tokens_per_second"] = sum(len(r.ids) for r in rollouts) / spent
        metrics["peak_gb"] = (
            clock.peak
            if torch.cuda.is_available()
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ) / 1e9  # of rank 0, so far
        self.note(metrics)
        self.learned = (
            f", reward {metrics['reward']:.2f}, memory"
            f" {'/'.join(map(str, metrics['memory'].values()))}"
        )
        self.bar.update()
        if self.due(step, cfg.log_every):
            sizes = (
                "  memory " + "/".join(map(str, metrics["memory"].values()))
                if any(metrics["memory"].values())
                else ""
            )
            self.bar.write(
                f"step {step:4d}  reward {metrics['reward']:.3f}  teacher active"
                f" {metrics['teacher_active']:.2f}  divergence"
                f" {metrics.get('divergence', 0):.4f}{sizes}"
            )
            shown = next((r for r in rollouts if r.teacher_prompt), rollouts[0])
            append(
                self.folder / "samples.jsonl",
                {
                    "step": step,
                    "problem": shown.problem.id,
                    "student_prompt": shown.problem.prompt,
                    "teacher_prompt": shown.teacher_prompt,
                    "completion": shown.text,
                    "reward": shown.reward,
                    "insight": [
                        f"{i.kind} {i.title}: {i.text}"
                        for i in memory.living("insight", shown.problem.id)
                    ],
                },
            )

    def note_answers(self, step, split, rows, estimates):
        """Keeps the samples of an evaluation, and what is estimated from them."""
        if rank():
            return
        cfg = self.cfg
        write_lines(self.folder / "evals" / f"{step}-{split}.jsonl", rows)
        rollouts = step * cfg.batch_size * cfg.group_size
        self.note({"step": step, "split": split, "rollouts": rollouts, "mcq": cfg.mcq, **estimates})

    def say(self, split, sentence):
        """Prints a sentence about a split, if there is one, above the progress bar."""
        if sentence and rank() == 0:
            self.bar.write(f"{split}: {sentence}")

    def note(self, row):
        """A line of metrics.jsonl, on disk before the next step, and of what --log names."""
        append(self.folder / "metrics.jsonl", row)
        self.send(row)

    # -- checkpoints

    def save(self, step, method, optimizer):
        """checkpoints/STEP: the weights as a Hugging Face folder; teacher and optimizer in trainer/
        (torch's DCP, which any number of ranks can read), and memory.db.

        Written aside, flushed to the disk and renamed: a checkpoint is whole or is not there. The
        sampler's and the data's randomness is keyed by seed and step, so there is no other state.
        Raises Stopped where the run was told to stop.
        """
        folder = self.folder / "checkpoints" / str(step)
        before = checkpoints(self.folder)
        then = (
            f"--resume then goes on from {before[-1]}"
            if before
            else "no checkpoint was written before this one"
        )
        cure = f"free some space on the disk, or lower --keep; {then}"
        with self.phase("save"), writing(f"the checkpoint {folder}", cure):
            self._write_checkpoint(step, folder, method, optimizer)
            gather(None)  # nobody goes on, or stops, before it is there
        if self.stop and (step < self.total or self.evaluated != step):
            self._stop(step)

    def _write_checkpoint(self, step, folder, method, optimizer):
        aside = folder.with_name(f"{step}.partial")
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        policy, teacher, memory = method.policy, method.teacher, method.memory
        save_model(policy, self.tokenizer, aside)
        dcp.save(
            trainer_state(policy, teacher, optimizer),
            checkpoint_id=aside / "trainer",
            no_dist=world() == 1,
        )
        if rank():
            return
        about = {
            "step": step,
            "updates": optimizer.updates,
            "ema": teacher is not policy,
            "seconds": self.spent + time.perf_counter() - self.started,
            "method": method.state(),
        }
        write(aside / "trainer.json", json.dumps(about))
        if memory.path != ":memory:":
            memory.copy_to(aside / "memory.db")
            memory.settle()
        settle(aside)
        aside.rename(folder)
        settle(folder.parent)
        self._prune()

    def _prune(self):
        """Keeps the last `keep` checkpoints, and the one whose step was best on dev."""
        saved, dev = (
            checkpoints(self.folder),
            {
                row["step"]: row["avg_at_k"]
                for row in read_rows(self.folder / "metrics.jsonl")
                if row.get("split") == "dev"
            },
        )
        best = max(
            (c for c in saved if int(c.name) in dev),
            key=lambda c: (dev[int(c.name)], int(c.name)),
            default=None,
        )
        for old in saved[: -self.cfg.keep]:
            if old != best:
                shutil.rmtree(old)

    def restore(self, method, optimizer) -> int:
        """Back to the newest checkpoint, or to --from's; memory and records return to its step. The
        next step's number.

        Weights and moments are filled in place, beside one copy of the policy on the host. Raises
        RunError, with the file and the checkpoint to go on from instead, for one that can't be
        read.
        """
        step = 0
        if self.saved:
            about = self._read_checkpoint(method.policy, method.teacher, optimizer)
            method.load(about.get("method", {}))
            optimizer.updates, step, self.spent = about["updates"], about["step"], about["seconds"]
        if not method.memory.frozen:
            method.memory.truncate_after(step)
        if rank() == 0:
            for aside in (self.folder / "checkpoints").glob(
                "*.partial"
            ):  # of a process that is gone: the lock is ours
                shutil.rmtree(aside)
            self._cut_records(step)
        self.begun, self.evaluated = step, broadcast(self.evaluated)
        self.bar.update(step)
        return step + 1

    def _read_checkpoint(self, policy, teacher, optimizer) -> dict:
        """Fills weights and moments; returns what trainer.json says."""
        cure = self._without(self.saved)
        about = read_json(self.saved / "trainer.json", cure)
        for key, kind in {
            "step": int,
            "updates": int,
            "ema": bool,
            "seconds": (int, float),
        }.items():
            if not isinstance(about.get(key), kind):
                raise RunError(
                    f"{self.saved / 'trainer.json'} has no {key} that can be one: {cure}"
                )
        if about["step"] != int(self.saved.name):
            raise RunError(f"{self.saved / 'trainer.json'} is of step {about['step']}: {cure}")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world() > 1)
        loaded = self._read_weights(cure) if rank() == 0 else {}  # rank 0 deals them out
        set_model_state_dict(policy, loaded, options=options)
        if teacher is not policy and not about["ema"]:
            set_model_state_dict(teacher, loaded, options=options)
        state = trainer_state(policy, teacher if about["ema"] else policy, optimizer)
        try:
            with without_log():
                dcp.load(state, checkpoint_id=self.saved / "trainer", no_dist=world() == 1)
        except (OSError, CheckpointException) as error:
            raise RunError(
                f"{self.saved / 'trainer'} can't be read ({reason(error)}): {cure}"
            ) from error
        return about

    def _read_weights(self, cure) -> dict:
        """The policy of the checkpoint, on the host."""
        try:
            saved, found = AutoModelForCausalLM.from_pretrained(
                self.saved, dtype=torch.float32, output_loading_info=True
            )
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise RunError(
                f"the weights in {self.saved} can't be read ({reason(error)}): {cure}"
            ) from error
        if missing := sorted(found["missing_keys"]):
            raise RunError(f"the weights in {self.saved} have no {missing[0]}: {cure}")
        return saved.state_dict()

    def _without(self, checkpoint) -> str:
        """How to go on where a checkpoint can't be read."""
        others = [c for c in checkpoints(checkpoint.parent.parent) if c != checkpoint]
        if checkpoint.parent.parent != self.folder:
            return (
                "give --from another step; kept there:"
                f" {', '.join(c.name for c in others) or 'none'}"
            )
        then = f"goes on from {others[-1]}" if others else "starts over"
        return f"remove {checkpoint}, and the same command {then}"

    def take_memory(self, path):
        """Copies the memory of the checkpoint to `path`; a RunError if it is none."""
        source = self.saved / "memory.db"
        shutil.copy(source, path)
        try:
            Store(path, frozen=True).close()
        except (OSError, ValueError) as error:
            raise RunError(
                f"{source} can't be used as a memory: {self._without(self.saved)}"
            ) from error

    def _cut_records(self, step):
        """Leaves the rows of the steps so far. An evaluation at this step counts only with its test
        split, its last row.
        """
        keep = (
            -1 if step == self.origin else step
        )  # without a checkpoint of its own it starts over, evaluation included
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if not path.exists():
                continue
            rows = [row for row in read_rows(path) if row["step"] <= keep]
            if any(row["step"] == step and row.get("split") == "test" for row in rows):
                self.evaluated = step
            else:
                rows = [row for row in rows if row["step"] < step or "split" not in row]
            write_lines(path, rows)

    def finish(self, policy, memory) -> dict:
        """final/, the learning curve and, last, summary.json; prints the table and one problem's
        memory.
        """
        self._unlisten()
        self.bar.close()
        with writing(
            self.folder, "free some space on the disk, and the same command with --resume ends it"
        ):
            summary = self._finish(policy, memory)
        if rank():
            return {}
        print("\n" + table({self.cfg.method: summary}))
        if any(memory.sizes().values()):
            kinds = memory.tally("insight") + memory.tally("experience")
            most = max(
                self.task.train,
                key=lambda p: [
                    kinds[p.id, k] for k in ("strategy", "lesson", "success", "failure")
                ],
            )
            print("\n" + describe(memory, most.id, behaviors=self.cfg.retrieve_k))
        names = [
            n
            for n in ("curve.png", "memory.db", "samples.jsonl", "evals", "final")
            if (self.folder / n).exists()
        ]
        print(f"\nall of it: {self.folder}  ({', '.join(names)})")
        memory.close()
        release(self.folder)
        return summary

    def _finish(self, policy, memory) -> dict:
        """Writes what finish() says. summary.json is the last: a run that has one is finished."""
        aside = self.folder / "final.partial"
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        save_model(policy, self.tokenizer, aside)
        if rank():
            return {}
        cfg, history = self.cfg, read_rows(self.folder / "metrics.jsonl")
        shutil.rmtree(self.folder / "final", ignore_errors=True)
        aside.rename(self.folder / "final")
        tests = {row["step"]: row for row in history if row.get("split") == "test"}
        devs = [row for row in history if row.get("split") == "dev"]
        for step in (self.origin, self.total):
            if step not in tests:
                raise RunError(
                    f"{self.folder / 'metrics.jsonl'} has lost the evaluation at step {step}:"
                    " final/ is written, and there is no summary without it"
                )
        pick = {
            "base": tests[self.origin],
            "final": tests[self.total],
            "dev_best": tests[max(devs, key=lambda r: r["avg_at_k"])["step"]] if devs else None,
            "test_best": max(tests.values(), key=lambda r: r["avg_at_k"]),
        }
        keys = ("step", "avg_at_k", "k", "n_problems", "interval", "maj_at_k", "best_at_k")
        found = {name: row and {k: row[k] for k in keys} for name, row in pick.items()}
        del found["test_best"][
            "interval"
        ]  # the best of several looks at the test split has no honest interval
        found["test_best"]["n_checkpoints_searched"] = len(tests)
        events = memory.counts() if not memory.frozen else {}
        summary = {
            "method": cfg.method,
            "task": cfg.task,
            "model": cfg.model,
            "seed": cfg.seed,
            "steps": self.total,
            "rollouts": self.total * cfg.batch_size * cfg.group_size,
            "seconds": round(self.spent + time.perf_counter() - self.started, 1),
            **found,
            "data": self.task.name,
            "mcq": cfg.mcq,
            "abstractor": cfg.abstractor,
            "embedder": cfg.embedder,
            "memory": memory.sizes(),
            "memory_events": events,
            "version": VERSION,
            "commit": commit(),
        }
        plot_curves({cfg.method: history}, self.folder / "curve.png", title(summary))
        write(self.folder / "summary.json", json.dumps(summary, indent=1))
        return summary


def memory_precision(memory, problems):
    """The share of living strategies that the world's hidden truth confirms; None where a task
    hides none. For diagnosis: it reads what neither student nor teacher may see, and is called by
    nothing but the log.
    """
    hidden = {p.id: p.extra.get("hidden", "").split() for p in problems}
    if not any(hidden.values()):
        return None
    found = [
        i.text in hidden[i.problem]
        for i in memory.living("insight")
        if i.kind == "strategy" and hidden.get(i.problem)
    ]
    return sum(found) / len(found) if found else None


def reporter(cfg, folder):
    """send(row) for `--log`: numbers of the rows of metrics.jsonl, nested ones as outer/inner, to
    the library it names.
    """
    if not cfg.log:
        return lambda row: None

    def numbers(row, prefix=""):
        for key, value in row.items():
            if isinstance(value, dict):
                yield from numbers(value, f"{prefix}{key}/")
            elif isinstance(value, (int, float)) and key != "step":
                yield f"{prefix}{key}", value

    if cfg.log == "wandb":
        import wandb

        session = wandb.init(
            project="pmd",
            name=folder.name,
            dir=folder,
            config=dataclasses.asdict(cfg),
            id=folder.name,
            resume="allow",
        )
        return lambda row: session.log(
            dict(numbers(row, f"{row.get('split', 'train')}/")), step=row["step"]
        )
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(row):
        for name, value in numbers(row, f"{row.get('split', 'train')}/"):
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    return send
