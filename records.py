"""What a run is made of beside its learning: its folder and records, its progress bar and clock, checkpoints and resuming.
Nothing here changes what is learned. cfg is pmd.Config throughout.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from datetime import datetime
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from eval import Answers, json_lines
from memory import SUCCESS, Memory, describe
from ranks import broadcast, gather, rank, whole, world

VERSION = "0.1.0"
HERE = Path(__file__).resolve().parent
COMPARISON = "PMD_COMPARISON"  # the environment of a run that --compare started: the --name of the comparison

matplotlib.use("Agg")  # figures are files; no screen is needed
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP's, where one process is meant


class Clock:
    """Seconds by name, each second counted once: what runs inside stops the clock of what is around it."""

    def __init__(self):
        self.seconds, self.running, self.peak = Counter(), [], 0

    @contextlib.contextmanager
    def __call__(self, name):
        self._turn()
        self.running.append(name)
        try:
            yield
        finally:
            self._turn()
            self.running.pop()

    def _turn(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the next name would pay for this one's kernels
            free, total = torch.cuda.mem_get_info()  # torch's own count would hold what a sleeping vLLM has given back
            self.peak = max(self.peak, total - free)  # where phases end, when torch still keeps what it took in them
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def read(self) -> dict:
        """The seconds since the last reading."""
        found, self.seconds = dict(self.seconds), Counter()
        return found


clock = Clock()


class Stopped(Exception):
    """The run was told to stop, and has saved. name: the --name to go on with. code: the exit status of the program."""

    def __init__(self, what, name, code):
        super().__init__(what)
        self.what, self.name, self.code = what, name, code

    def __str__(self):
        return f"{self.what}; the same command with --name {self.name} --resume goes on"


class RunError(ValueError):
    """What ends a run that is no fault of the program. The message is one sentence, with the file and the cure."""


def reason(error) -> str:
    """Why, in a few words: without a traceback of another process, an error's number or the file that is named anyway."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def writing(path, cure="free some space on the disk; --resume then goes on from the newest checkpoint"):
    """What can't be written inside as a RunError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        raise RunError(f"{path} can't be written ({reason(error)}): {cure}") from error
    except Exception as error:
        if type(error) is not Exception:  # which is what tokenizers raise for a full disk
            raise
        raise RunError(f"{path} can't be written ({reason(error)}): {cure}") from error


@contextlib.contextmanager
def without_log():
    """Without the tracebacks that torch logs as warnings of what it then raises (its state_dict_loader)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def read_json(path, cure) -> dict:
    """The object in a file of JSON; a RunError with `cure` where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} can't be read ({reason(error)}): {cure}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object: {cure}")
    return found


class Run:
    """The folder of a run, its progress bar and its clock. Nothing here changes what is learned."""

    def __init__(self, cfg, task, tokenizer):
        self.cfg, self.task, self.tokenizer, self.started = cfg, task, tokenizer, time.perf_counter()
        self.total, self.spent = total_steps(task.train, cfg), 0.0
        clock.read()
        self.name = cfg.name or broadcast(default_name(cfg))
        self.folder = Path(cfg.out) / self.name
        if refusal := broadcast(claim(self.folder, cfg.resume) if rank() == 0 else ""):
            raise RunError(refusal)
        own = broadcast(checkpoints(self.folder))
        self.saved = own[-1] if own else checkpoint_of(cfg) if cfg.fork_from else None  # what it goes on from
        self.origin = int(checkpoint_of(cfg).name) if cfg.fork_from else 0  # the step it began after
        self.begun = self.evaluated = -1  # the steps that it went on after, and that it was last evaluated at
        self.bar = tqdm(total=self.total, desc=cfg.method, unit="step", dynamic_ncols=True, disable=rank() > 0 or None)
        self.send = lambda row: None
        if rank() == 0:
            self._open()
        self.stop, self.signals, self.learned = "", {}, ""
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
            self.signals = {n: signal.signal(n, self._told) for n in (signal.SIGTERM, signal.SIGINT)}

    def _open(self):
        """What a run writes and says before its first step."""
        cfg, task = self.cfg, self.task
        (self.folder / "evals").mkdir(exist_ok=True)
        write(self.folder / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
        digests = fingerprint(task, self.tokenizer)
        write(self.folder / "problems.json", json.dumps(digests, indent=1))
        append_text(self.folder / "environment.txt", environment())  # a resumed run has several
        print(task.card, end="\n" if task.card else "")
        print(f"{cfg.method} on {task.name} with {cfg.model}, seed {cfg.seed}: {len(task.train)} train, "
              f"{len(task.dev)} dev, {len(task.test)} test problems; {self.total} steps of {cfg.batch_size} x "
              f"{cfg.group_size}; {self.folder}")
        settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
        print("set otherwise than by default: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
        if self.saved:
            print(f"going on from {self.saved}")
        if self.saved and cfg.fork_from:
            other = self.saved.parent.parent / "problems.json"
            changed = changes(read_json(other, "remove it"), digests) if other.is_file() else []
            print(f"other than in {other.parent}: {', '.join(changed)}\n" if changed else "", end="")
        self.send = reporter(cfg, self.folder)

    def _told(self, number, frame):
        """The first signal lets the step at hand end and saves; the next one ends the program at once."""
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
        """By a signal or, with limit, by --max_minutes; on every rank alike, though a signal may reach one a step later."""
        if limit and 0 < self.cfg.max_minutes <= (time.perf_counter() - self.started) / 60:
            self.stop = self.stop or "--max_minutes"
        self.stop = max(gather(self.stop))
        return bool(self.stop)

    def must_evaluate(self, step) -> bool:
        """Whether an evaluation is due after this step, and has not been. A run that was told to stop saves first: this
        evaluation is then made when it goes on. Raises Stopped where there is nothing to save, before the first step; but a
        limit of minutes lets one step be made, or a run with a short one would never come further."""
        if step == self.evaluated or step != self.origin and not self.due(step, self.cfg.eval_every):
            return False
        if self.told_to_stop(limit=step != self.begun):
            if step == self.begun:
                self._stop(step)
            return False
        self.evaluated = step
        return True

    def must_save(self, step) -> bool:
        """Whether a checkpoint is due, or the run was told to stop."""
        return self.told_to_stop() or self.cfg.save_every > 0 and self.due(step, self.cfg.save_every)

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

        The names of the seconds are those of metrics.jsonl: what a phase does besides the model's work, which has its own.
        """
        self.bar.set_postfix_str(name + self.learned)
        try:
            names = {"attempt": "verify", "remember": "memory", "condition": "memory", "distill": "student"}
            with clock(names.get(name, name)):
                yield
        except FloatingPointError as error:
            saved = checkpoints(self.folder)
            where = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint to go back to"
            raise FloatingPointError(f"{error}; {where}") from error
        finally:
            if sys.exc_info()[0]:  # the program's own handlers again, whatever ended the run
                self._unlisten()

    def log(self, step, rollouts, sums, memory):
        """One line of metrics.jsonl; every `log_every` steps a printed line and a readable sample too."""
        if rank():
            return
        n, cfg = len(rollouts), self.cfg
        groups = {r.problem.id for r in rollouts}
        solved = {r.problem.id for r in rollouts if r.reward > SUCCESS}
        metrics = {
            "step": step, "epoch": (step - 1) // batches_per_epoch(self.task.train, cfg),
            "rollouts": step * n, "reward": sum(r.reward for r in rollouts) / n, "groups_solved": len(solved) / len(groups),
            "truncated": sum(not r.finished for r in rollouts) / n,
            "completion_tokens": sum(len(r.ids) for r in rollouts) / n,
            "teacher_active": sum(bool(r.teacher_ids) for r in rollouts) / n,
            "supervised_tokens": sums["tokens"], "updates": sums["updates"], "updates_skipped": sums["updates_skipped"]}
        if sums["tokens"]:
            of = {"divergence": "distilled_tokens", "teacher_entropy": "distilled_tokens", "entropy": "tokens",
                  "clipped": "reinforced_tokens"}
            metrics |= {k: sums[k] / sums[n] for k, n in of.items() if sums[n]}
            metrics |= {k: sums[k] / sums["updates"] for k in ("loss", "grad_norm")}
        if sums["distilled_tokens"] and sums["reinforced_tokens"]:  # rows of both kinds
            metrics["distilled_share"] = sums["distilled_tokens"] / sums["tokens"]
        metrics["sampler_gap"] = sums["sampler_gap"] / max(1, sums["compared"])
        metrics["sampler_gap_max"] = sums["sampler_gap_max"]
        if rates := [r.test_pass_rate for r in rollouts if r.test_pass_rate is not None]:
            metrics["test_pass_rate"] = sum(rates) / len(rates)
        metrics["keywords"] = {w: sum(w in r.text.lower() for r in rollouts) / n for w in ("strategy", "lesson", "behavior")}
        events = memory.counts(step) if memory.mode != "frozen" else {}  # what happened in it is its own run's
        metrics |= {"memory": memory.sizes(), "memory_events": events}
        if proposed := events.get("insight_proposed", 0) + events.get("behavior_proposed", 0):
            metrics["shortcut_rate"] = events.get("shortcut", 0) / proposed
        if (precision := memory_precision(memory, self.task.train)) is not None:
            metrics["memory_precision"] = precision
        metrics["seconds"] = clock.read()
        spent = sum(t for phase, t in metrics["seconds"].items() if phase not in ("evaluate", "save"))
        metrics["share"] = {phase: t / spent for phase, t in metrics["seconds"].items() if phase not in ("evaluate", "save")}
        metrics["tokens_per_second"] = sum(len(r.ids) for r in rollouts) / spent
        metrics["peak_gb"] = (clock.peak if torch.cuda.is_available() else 1024 *
                              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9  # of rank 0, so far
        self.note(metrics)
        self.learned = f", reward {metrics['reward']:.2f}, memory {'/'.join(map(str, metrics['memory'].values()))}"
        self.bar.update()
        if self.due(step, cfg.log_every):
            sizes = "  memory " + "/".join(map(str, metrics["memory"].values())) if any(metrics["memory"].values()) else ""
            self.bar.write(f"step {step:4d}  reward {metrics['reward']:.3f}  teacher active "
                           f"{metrics['teacher_active']:.2f}  divergence {metrics.get('divergence', 0):.4f}{sizes}")
            shown = next((r for r in rollouts if r.teacher_prompt), rollouts[0])
            append(self.folder / "samples.jsonl", {
                "step": step, "problem": shown.problem.id, "student_prompt": shown.problem.prompt,
                "teacher_prompt": shown.teacher_prompt, "completion": shown.text, "reward": shown.reward,
                "insight": [f"{i.kind} {i.title}: {i.text}" for i in memory.living("insight", shown.problem.id)]})

    def note_answers(self, step, split, rows):
        """The samples of an evaluation, and what is estimated from them."""
        cfg = self.cfg
        write_lines(self.folder / "evals" / f"{step}-{split}.jsonl", rows)
        self.note({"step": step, "split": split, "rollouts": step * cfg.batch_size * cfg.group_size, "mcq": cfg.mcq,
                   **Answers.of(rows).estimates(cfg.task)})

    def note(self, row):
        """A line of metrics.jsonl, on disk before the next step, and of what --log names."""
        append(self.folder / "metrics.jsonl", row)
        self.send(row)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, step, method, optimizer):
        """checkpoints/STEP: the weights as a Hugging Face folder; teacher and optimizer in trainer/ (torch's DCP, which any
        number of ranks can read), and memory.db.

        Written aside, flushed to the disk and renamed: a checkpoint is whole or is not there. The sampler's and the data's
        randomness is keyed by seed and step, so there is no other state. Raises Stopped where the run was told to stop.
        """
        folder = self.folder / "checkpoints" / str(step)
        before = checkpoints(self.folder)
        then = f"--resume then goes on from {before[-1]}" if before else "no checkpoint was written before this one"
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
        dcp.save(trainer_state(policy, teacher, optimizer), checkpoint_id=aside / "trainer", no_dist=world() == 1)
        if rank():
            return
        about = {"step": step, "updates": optimizer.updates, "ema": teacher is not policy,
                 "seconds": self.spent + time.perf_counter() - self.started, "method": method.state()}
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
        saved, dev = checkpoints(self.folder), {
            row["step"]: row["avg_at_k"] for row in read_rows(self.folder / "metrics.jsonl") if row.get("split") == "dev"}
        best = max((c for c in saved if int(c.name) in dev), key=lambda c: (dev[int(c.name)], int(c.name)), default=None)
        for old in saved[:-self.cfg.keep]:
            if old != best:
                shutil.rmtree(old)

    def restore(self, method, optimizer) -> int:
        """Back to the newest checkpoint, or to --from's; memory and records return to its step. The next step's number.

        Weights and moments are filled in place, beside one copy of the policy on the host. Raises RunError, with the file
        and the checkpoint to go on from instead, for one that can't be read.
        """
        step = 0
        if self.saved:
            about = self._read_checkpoint(method.policy, method.teacher, optimizer)
            method.load(about.get("method", {}))
            optimizer.updates, step, self.spent = about["updates"], about["step"], about["seconds"]
        if method.memory_mode != "frozen":
            method.memory.truncate_after(step)
        if rank() == 0:
            for aside in (self.folder / "checkpoints").glob("*.partial"):  # of a process that is gone: the lock is ours
                shutil.rmtree(aside)
            self._cut_records(step)
        self.begun, self.evaluated = step, broadcast(self.evaluated)
        self.bar.update(step)
        return step + 1

    def _read_checkpoint(self, policy, teacher, optimizer) -> dict:
        """Fills weights and moments; returns what trainer.json says."""
        cure = self._without(self.saved)
        about = read_json(self.saved / "trainer.json", cure)
        for key, kind in {"step": int, "updates": int, "ema": bool, "seconds": (int, float)}.items():
            if not isinstance(about.get(key), kind):
                raise RunError(f"{self.saved / 'trainer.json'} has no {key} that can be one: {cure}")
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
            raise RunError(f"{self.saved / 'trainer'} can't be read ({reason(error)}): {cure}") from error
        return about

    def _read_weights(self, cure) -> dict:
        """The policy of the checkpoint, on the host."""
        try:
            saved, found = AutoModelForCausalLM.from_pretrained(self.saved, dtype=torch.float32, output_loading_info=True)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise RunError(f"the weights in {self.saved} can't be read ({reason(error)}): {cure}") from error
        if missing := sorted(found["missing_keys"]):
            raise RunError(f"the weights in {self.saved} have no {missing[0]}: {cure}")
        return saved.state_dict()

    def _without(self, checkpoint) -> str:
        """How to go on where a checkpoint can't be read."""
        others = [c for c in checkpoints(checkpoint.parent.parent) if c != checkpoint]
        if checkpoint.parent.parent != self.folder:
            return f"give --from another step; kept there: {', '.join(c.name for c in others) or 'none'}"
        then = f"goes on from {others[-1]}" if others else "starts over"
        return f"remove {checkpoint}, and the same command {then}"

    def take_memory(self, path):
        """Copies the memory of the checkpoint to `path`; a RunError if it is none."""
        source = self.saved / "memory.db"
        shutil.copy(source, path)
        try:
            Memory(path, None, None, mode="frozen").close()
        except (OSError, ValueError) as error:
            raise RunError(f"{source} can't be used as a memory: {self._without(self.saved)}") from error

    def _cut_records(self, step):
        """Leaves the rows of the steps so far. An evaluation at this step counts only with its test split, its last row."""
        keep = -1 if step == self.origin else step  # without a checkpoint of its own it starts over, evaluation included
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
        """final/, the learning curve and, last, summary.json; prints the table and one problem's memory."""
        self._unlisten()
        self.bar.close()
        with writing(self.folder, "free some space on the disk, and the same command with --resume ends it"):
            summary = self._finish(policy, memory)
        if rank():
            return {}
        print("\n" + table({self.cfg.method: summary}))
        if any(memory.sizes().values()):
            kinds = memory.tally("insight") + memory.tally("experience")
            most = max(self.task.train, key=lambda p: [kinds[p.id, k] for k in ("strategy", "lesson", "success", "failure")])
            print("\n" + describe(memory, most.id))
        names = [n for n in ("curve.png", "memory.db", "samples.jsonl", "evals", "final") if (self.folder / n).exists()]
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
                raise RunError(f"{self.folder / 'metrics.jsonl'} has lost the evaluation at step {step}: final/ is written, "
                               "and there is no summary without it")
        pick = {"base": tests[self.origin], "final": tests[self.total],
                "dev_best": tests[max(devs, key=lambda r: r["avg_at_k"])["step"]] if devs else None,
                "test_best": max(tests.values(), key=lambda r: r["avg_at_k"])}
        keys = ("step", "avg_at_k", "k", "n_problems", "interval", "maj_at_k", "best_at_k")
        found = {name: row and {k: row[k] for k in keys} for name, row in pick.items()}
        del found["test_best"]["interval"]  # the best of several looks at the test split has no honest interval
        found["test_best"]["n_checkpoints_searched"] = len(tests)
        events = memory.counts() if memory.mode != "frozen" else {}
        summary = {"method": cfg.method, "task": cfg.task, "model": cfg.model, "seed": cfg.seed, "steps": self.total,
                   "rollouts": self.total * cfg.batch_size * cfg.group_size,
                   "seconds": round(self.spent + time.perf_counter() - self.started, 1), **found,
                   "data": self.task.name, "mcq": cfg.mcq, "abstractor": cfg.abstractor, "embedder": cfg.embedder,
                   "memory": memory.sizes(), "memory_events": events, "version": VERSION, "commit": commit()}
        plot_curves({cfg.method: history}, self.folder / "curve.png", title(summary))
        write(self.folder / "summary.json", json.dumps(summary, indent=1))
        return summary


def memory_precision(memory, problems):
    """The share of living strategies that the world's hidden truth confirms; None where a task hides none. For
    diagnosis: it reads what neither student nor teacher may see, and is called by nothing but the log."""
    hidden = {p.id: p.extra.get("hidden", "").split() for p in problems}
    if not any(hidden.values()):
        return None
    found = [i.text in hidden[i.problem] for i in memory.living("insight") if i.kind == "strategy" and hidden.get(i.problem)]
    return sum(found) / len(found) if found else None


def score(found) -> str:
    """Writes avg@k, with its interval if it has one."""
    text = f"{found['avg_at_k']:.3f}"
    if not found.get("interval"):
        return text
    low, high = found["interval"]
    return f"{text} [{low:.3f}, {high:.3f}]"


def table(summaries) -> str:
    """Lays out the results of runs, {method: summary}: held-out avg@k with 95% intervals."""
    first = next(iter(summaries.values()))
    final = first["final"]
    prompt = "no memory in the prompt"
    if "frozen-policy" in summaries:
        prompt = "memory in the prompt of frozen-policy alone"
    if first.get("mcq") == "lenient":
        prompt = f"read leniently, {prompt}"
    asked = f"avg@{final['k']} on {final['n_problems']} held-out problems of {first['data']}"
    rows = {"": f"{asked}, {prompt}", "base policy": score(first["base"])}
    for name, summary in summaries.items():
        dev, test = summary["dev_best"], summary["test_best"]
        rows[f"{name}, after training"] = score(summary["final"])
        if dev:
            rows[f"{name}, best on dev"] = f"{score(dev)}  at step {dev['step']}"
        searched = f"selected on test among {test['n_checkpoints_searched']} checkpoints"
        rows[f"{name}, best on test"] = f"{score(test)}  at step {test['step']}, {searched}"
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}s}  {text}" for name, text in rows.items())


def plot_curves(curves, path, title):
    """Draws learning curves on test with their intervals, as a PNG.

    curves: {name: rows of a metrics.jsonl}.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, rows in curves.items():
        tests = [row for row in rows if row.get("split") == "test"]
        steps = [row["step"] for row in tests]
        values = [row["avg_at_k"] for row in tests]
        bounds = [row["interval"] or [row["avg_at_k"]] * 2 for row in tests]
        (line,) = axes.plot(steps, values, marker="o", markersize=3, label=name)
        color = line.get_color()
        axes.fill_between(steps, *np.transpose(bounds), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="share of answers that are right", title=title, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def title(summary):
    return f"{summary['data']}\navg@{summary['final']['k']} on held-out problems"


def default_name(cfg):
    return f"{cfg.task.strip('/').replace('/', '-')}-{cfg.compare and 'compare' or cfg.method}-{cfg.seed}-" \
           f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # to the microsecond, as jobs of an array start in one second


# What a resumed run may have otherwise: what only adds steps or output, and knobs of memory, speed and place. `data` is
# where the problems lie; what they are is compared by their digest.
FREE = {"resume", "steps", "epochs", "out", "name", "log_every", "save_every", "keep", "max_minutes", "grace", "log",
        "device", "nproc", "micro_tokens", "gradient_checkpointing", "sampler", "gpu_memory_utilization", "tensor_parallel",
        "max_sampler_gap", "data", "unsafe_exec"}
FORMERLY = {"loss_mean": "token"}  # what was done before there was a field for it, where that is not its default


def refuse_changes(before, cfg, quiet=False):
    """A resumed run keeps its configuration, but for what is FREE; that is noted. before: what config.json holds; a field
    that it lacks was not there yet, and had its default."""
    said = {}
    for f in dataclasses.fields(cfg):
        now, then = getattr(cfg, f.name), before.get(f.name, FORMERLY.get(f.name, f.default))
        if now != then:
            said[f.name] = f"--{f.name} ({then!r} before, {now!r} now)"
    if refused := [text for name, text in said.items() if name not in FREE]:
        raise ValueError(f"the run {cfg.name} was started with other flags: {', '.join(refused)}; use another --name")
    noted = [text for name, text in said.items() if name not in ("resume", "out", "name")]
    if noted and not quiet:
        print(f"changed since the run was started: {', '.join(noted)}")


def fingerprint(task, tokenizer) -> dict:
    """What a run learns from and with: for each split its number of problems and a digest of all that they hold, in order;
    and of the model its revision on the Hub, or a digest of its folder's files (name, size, first and last MiB)."""
    found = {}
    for split in ("train", "dev", "test"):
        digest = hashlib.sha256()
        for p in getattr(task, split):
            row = [p.id, p.prompt, p.answer, p.verifier, p.system, p.extra]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        found[split] = {"problems": len(getattr(task, split)), "sha256": digest.hexdigest()}
    return found | {"model": model_identity(tokenizer.name_or_path)}


def model_identity(name) -> str:
    if not Path(name).is_dir():
        return getattr(AutoConfig.from_pretrained(name), "_commit_hash", None) or ""
    digest = hashlib.sha256()
    kinds = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
    for path in sorted(p for p in Path(name).iterdir() if p.suffix in kinds):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def changes(before, now) -> list[str]:
    """What differs between two fingerprints, for a reader."""
    parts = {"train": "the training problems", "dev": "the dev problems", "test": "the test problems", "model": "the model"}
    return [text for part, text in parts.items() if before.get(part, now[part]) != now[part]]


def refuse_other_problems(folder, task, tokenizer):
    """ValueError where the run in `folder` was started with other problems or another model under the same name."""
    path = folder / "problems.json"
    if not path.is_file():  # of a run from before there was one
        return
    before = read_json(path, "remove it, and the problems are taken for those that the run was started with")
    if changed := changes(before, fingerprint(task, tokenizer)):
        raise ValueError(f"{' and '.join(changed)} are not those that {folder} was started with: give it the same again, or "
                         "use another --name")


# -- one writer ---------------------------------------------------------------------------------------------------------

LOCKS = {}  # by folder: the open file whose lock makes this process its only writer


def claim(folder, resume) -> str:
    """Makes this process the only writer of a run's folder, and the folder if need be; or says in a sentence why not.

    By flock on its file `lock`, which the kernel lets go when the process ends, however it ends. Between nodes that holds
    where the file system passes it on: NFS does (Linux 2.6.12 on), Lustre if it is mounted with -o flock. One without locks
    is said, and used.
    """
    with writing(folder, "choose another --out"):
        try:
            folder.mkdir(parents=True, exist_ok=resume)
        except FileExistsError:
            return f"{folder} exists; add --resume to continue it or choose another --name"
        release(folder)
        file = open(folder / "lock", "ab+", buffering=0)
    try:
        locked = try_lock(file, fcntl.LOCK_EX)
    except OSError as error:
        print(f"{folder} is on a file system without locks ({reason(error)}): nothing keeps a second process from it")
        locked = True
    if not locked:
        return taken(folder, file)
    LOCKS[folder.resolve()] = file
    with writing(folder / "lock"):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return ""


def release(folder):
    if file := LOCKS.pop(folder.resolve(), None):
        file.close()


def refuse_second_writer(folder):
    """ValueError where another process writes into `folder` now. Takes no lock: `claim` does, after the model is loaded."""
    path = folder / "lock"
    if folder.resolve() in LOCKS or not path.is_file():
        return
    with open(path, "rb") as file, contextlib.suppress(OSError):  # without locks nothing can be said
        if not try_lock(file, fcntl.LOCK_SH):
            raise ValueError(taken(folder, file))


def try_lock(file, kind) -> bool:
    """For a second, in which another may only have looked."""
    for _ in range(20):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def taken(folder, file):
    file.seek(0)
    holder = file.read().decode(errors="replace") or "another process"
    return f"{folder} is being written by {holder}: wait until that has ended, or use another --name"


def finished(cfg, total) -> dict | None:
    """The summary of a run that has come to its last step, `total`; None where there is something left to do."""
    folder = Path(cfg.out) / cfg.name
    if not (folder / "final").is_dir():
        return None
    with contextlib.suppress(OSError, ValueError):  # there is none, or it was cut by something else than us
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if isinstance(summary, dict) and summary.get("steps") == total:
            return summary
    return None


def checkpoints(folder):
    return sorted((p for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()), key=lambda p: int(p.name))


def save_model(policy, tokenizer, folder):
    """A Hugging Face folder, written by rank 0; weights are made whole one by one, a tied one once."""
    if world() == 1:
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    state = {id(p): p for p in policy.parameters()}
    for key, tensor in state.items():
        full = whole(tensor)
        state[key] = full.cpu() if rank() == 0 else None
    if rank() == 0:
        names = {name: state[id(p)] for name, p in policy.named_parameters(remove_duplicate=False)}
        policy.save_pretrained(folder, state_dict=names)
        tokenizer.save_pretrained(folder)


def trainer_state(policy, teacher, optimizer):
    """What DCP saves, and fills in place: Adam's moments by the weight's name, and the teacher's weights where they are its
    own. No learning rate or the like: those are the flags of the run that goes on.

    Not torch's get_optimizer_state_dict: where there is no state yet, it takes a step to make one.
    """
    state = {"optimizer": {"state": {name: optimizer.state[p] for name, p in policy.named_parameters()}}}
    if teacher is not policy:
        state["teacher"] = dict(teacher.named_parameters())
    return state


def git(*args):
    try:
        return subprocess.run(["git", *args], cwd=HERE, capture_output=True, encoding="utf-8", errors="replace",
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit():
    """The commit this code is at, with a + if the tree was changed since; empty outside a git checkout."""
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def environment():
    names = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")
    lines = [f"pmd {VERSION}", f"commit {commit()}", f"python {platform.python_version()} on {platform.platform()}",
             *(f"{n} {importlib.metadata.version(n)}" for n in names),
             f"devices: {torch.cuda.device_count()} cuda", f"command: {' '.join(sys.argv)}"]
    return "\n".join(lines) + "\n\n" + git("diff", "HEAD") + "\n"


# Text that UTF-8 can't hold, half of a surrogate pair, is written as the escape that JSON has for it, \ud83d, and read back
# as what it was.

def append(path, row):
    append_text(path, json.dumps(row, ensure_ascii=False) + "\n")


def append_text(path, text):
    with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write(path, text):
    """Writes aside and renames: whoever reads the file finds the old text or the new one."""
    aside = path.with_name(path.name + ".partial")
    with writing(path):
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        aside.rename(path)


def write_lines(path, rows):
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path):
    """The rows of a file of JSON lines; a last line without its end was cut by a kill, and is none."""
    return [row for _, row in json_lines(path, cut=True)]


def read_rows(path):
    """The rows of a run's own metrics.jsonl or samples.jsonl, each of a step; a RunError where one is not."""
    try:
        rows = list(json_lines(path, cut=True))
    except ValueError as error:
        raise RunError(f"{error}: mend that line, or take it out; the same command then goes on") from error
    for n, row in rows:
        if not isinstance(row.get("step"), int):
            raise RunError(f"{path}, line {n} has no step: mend that line, or take it out; the same command then goes on")
    return [row for _, row in rows]


def settle(folder):
    """Has the disk hold a folder and its files, so that a rename after it can't come to stand before them."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def reporter(cfg, folder):
    """send(row) for `--log`: numbers of the rows of metrics.jsonl, nested ones as outer/inner, to the library it names."""
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
        session = wandb.init(project="pmd", name=folder.name, dir=folder, config=dataclasses.asdict(cfg), id=folder.name,
                             resume="allow")
        return lambda row: session.log(dict(numbers(row, f"{row.get('split', 'train')}/")), step=row["step"])
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(row):
        for name, value in numbers(row, f"{row.get('split', 'train')}/"):
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    return send


def run_and_step(text, cfg):
    """(folder, step or "") of RUN[@STEP]; RUN is a folder, or a name under --out."""
    run, _, step = text.partition("@")
    return Path(run) if Path(run).is_dir() else Path(cfg.out) / run, step


def memory_source(cfg):
    folder, step = run_and_step(cfg.memory_from, cfg)
    return folder / "memory.db", step


def checkpoint_of(cfg):
    folder, step = run_and_step(cfg.fork_from, cfg)
    return folder / "checkpoints" / (step if step.isdecimal() else "?")


def batches_per_epoch(problems, cfg):
    return len(problems) // cfg.batch_size


def total_steps(problems, cfg):
    return cfg.steps or cfg.epochs * batches_per_epoch(problems, cfg)
