"""What a run is made of beside its learning: its folder and records, its progress bar and clock, checkpoints and resuming.
Nothing here changes what is learned. cfg is pmd.Config throughout.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from eval import Answers, json_lines
from memory import SUCCESS, describe
from ranks import a_rank_has_ended, broadcast, gather, rank, whole, world
from report import plot_curves, table

VERSION = "0.1.0"
HERE = Path(__file__).resolve().parent

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
    """The run was told to stop, and has saved; `code` is the exit status of the program."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class Run:
    """The folder of a run, its progress bar and its clock. Nothing here changes what is learned."""

    def __init__(self, cfg, task, tokenizer):
        self.cfg, self.task, self.tokenizer, self.started = cfg, task, tokenizer, time.perf_counter()
        self.total, self.spent = total_steps(task.train, cfg), 0.0
        clock.read()
        self.folder = Path(cfg.out) / (cfg.name or broadcast(default_name(cfg)))
        own = broadcast(checkpoints(self.folder))
        self.saved = own[-1] if own else checkpoint_of(cfg) if cfg.fork_from else None  # what it goes on from
        self.origin = int(checkpoint_of(cfg).name) if cfg.fork_from else 0  # the step it began after
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
        (self.folder / "evals").mkdir(parents=True, exist_ok=True)
        write(self.folder / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
        with open(self.folder / "environment.txt", "a", encoding="utf-8") as file:  # a resumed run has several
            file.write(environment())
        print(task.card, end="\n" if task.card else "")
        print(f"{cfg.method} on {task.name} with {cfg.model}, seed {cfg.seed}: {len(task.train)} train, "
              f"{len(task.dev)} dev, {len(task.test)} test problems; {self.total} steps of {cfg.batch_size} x "
              f"{cfg.group_size}; {self.folder}")
        settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
        print("set otherwise than by default: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
        if self.saved:
            print(f"going on from {self.saved}")
        self.send = reporter(cfg, self.folder)

    def _told(self, number, frame):
        """The first signal lets the step at hand end and saves; the next one ends the program at once."""
        if a_rank_has_ended():  # the launcher takes the job down: there is nothing to wait for
            os._exit(128 + number)
        self.stop = signal.Signals(number).name
        self.bar.write(f"{self.stop}: saving after this step; once more to quit at once")
        self._unlisten()

    def _unlisten(self):
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        self.signals = {}

    def due(self, step, every):
        return bool(every) and step % every == 0 or step == self.total

    def must_save(self, step):
        """Whether a checkpoint is due, or the run was told to stop."""
        if 0 < self.cfg.max_minutes <= (time.perf_counter() - self.started) / 60:
            self.stop = self.stop or "--max_minutes"
        self.stop = max(gather(self.stop))  # a signal may reach one rank a step later than another
        return bool(self.stop) or self.cfg.save_every > 0 and self.due(step, self.cfg.save_every)

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
            metrics |= {k: sums[k] / sums["tokens"] for k in ("divergence", "entropy", "teacher_entropy",
                                                              "clipped") if k in sums}
            metrics |= {k: sums[k] / sums["updates"] for k in ("loss", "grad_norm")}
        metrics |= {"sampler_gap": sums["sampler_gap"] / sums["compared"], "sampler_gap_max": sums["sampler_gap_max"]}
        if rates := [r.test_pass_rate for r in rollouts if r.test_pass_rate is not None]:
            metrics["test_pass_rate"] = sum(rates) / len(rates)
        metrics["keywords"] = {w: sum(w in r.text.lower() for r in rollouts) / n for w in ("strategy", "lesson", "behavior")}
        events = memory.counts(step)
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

    def save(self, step, policy, teacher, optimizer, memory):
        """checkpoints/STEP: the weights as a Hugging Face folder; teacher and optimizer in trainer/ (torch's DCP, which any
        number of ranks can read), and memory.db.

        Written aside, flushed to the disk and renamed: a checkpoint is whole or is not there. The sampler's and the data's
        randomness is keyed by seed and step, so there is no other state. Raises Stopped where the run was told to stop.
        """
        with self.phase("save"):
            folder, aside = self.folder / "checkpoints" / str(step), self.folder / "checkpoints" / f"{step}.partial"
            if rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
            save_model(policy, self.tokenizer, aside)
            dcp.save(trainer_state(policy, teacher, optimizer), checkpoint_id=aside / "trainer", no_dist=world() == 1)
            if rank() == 0:
                write(aside / "trainer.json", json.dumps({
                    "step": step, "updates": optimizer.updates, "ema": teacher is not policy,
                    "seconds": self.spent + time.perf_counter() - self.started}))
                if memory.path != ":memory:":
                    memory.copy_to(aside / "memory.db")
                    memory.settle()
                settle(aside)
                aside.rename(folder)
                settle(folder.parent)
                self._prune()
            gather(None)  # nobody goes on, or stops, before it is there
        if self.stop and step < self.total:
            self._unlisten()
            self.bar.close()
            code = 128 + getattr(signal, self.stop) if self.stop.startswith("SIG") else 0
            raise Stopped(f"{self.stop}: stopped after step {step} of {self.total}; the same command with "
                          f"--name {self.folder.name} --resume goes on", code)

    def _prune(self):
        """Keeps the last `keep` checkpoints, and the one whose step was best on dev."""
        saved, dev = checkpoints(self.folder), {
            row["step"]: row["avg_at_k"] for row in read_lines(self.folder / "metrics.jsonl") if row.get("split") == "dev"}
        best = max((c for c in saved if int(c.name) in dev), key=lambda c: (dev[int(c.name)], int(c.name)), default=None)
        for old in saved[:-self.cfg.keep]:
            if old != best:
                shutil.rmtree(old)

    def restore(self, policy, teacher, optimizer, memory) -> int:
        """Back to the newest checkpoint, or to --from's; memory and records return to its step. The next step's number."""
        step = 0
        if self.saved:
            about = json.loads((self.saved / "trainer.json").read_text())
            loaded = {}
            if rank() == 0:  # which deals the weights out
                loaded = AutoModelForCausalLM.from_pretrained(self.saved, dtype=torch.float32).state_dict()
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world() > 1)
            set_model_state_dict(policy, loaded, options=options)
            if teacher is not policy and not about["ema"]:
                set_model_state_dict(teacher, loaded, options=options)
            state = trainer_state(policy, teacher if about["ema"] else policy, optimizer)
            dcp.load(state, checkpoint_id=self.saved / "trainer", no_dist=world() == 1)
            flags = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            set_optimizer_state_dict(policy, optimizer, state["optimizer"])
            for group, own in zip(optimizer.param_groups, flags, strict=True):  # this run's flags, not the saved ones
                group.update(own)
            optimizer.updates, step, self.spent = about["updates"], about["step"], about["seconds"]
        if self.cfg.method != "frozen-memory":
            memory.truncate_after(step)
        keep = -1 if step == self.origin else step  # without a checkpoint of its own it starts over, evaluation included
        for name in ("metrics.jsonl", "samples.jsonl") if rank() == 0 else ():
            if (self.folder / name).exists():
                rows = read_lines(self.folder / name)
                write_lines(self.folder / name, (row for row in rows if row["step"] <= keep))
        self.bar.update(step)
        return step + 1

    def finish(self, policy, memory) -> dict:
        """final/, summary.json and the learning curve; prints the table and one problem's memory."""
        self._unlisten()
        self.bar.close()
        aside = self.folder / "final.partial"
        save_model(policy, self.tokenizer, aside)
        if rank():
            return {}
        cfg, history = self.cfg, read_lines(self.folder / "metrics.jsonl")
        shutil.rmtree(self.folder / "final", ignore_errors=True)
        aside.rename(self.folder / "final")
        tests = {row["step"]: row for row in history if row.get("split") == "test"}
        devs = [row for row in history if row.get("split") == "dev"]
        pick = {"base": tests[self.origin], "final": tests[self.total],
                "dev_best": tests[max(devs, key=lambda r: r["avg_at_k"])["step"]] if devs else None,
                "test_best": max(tests.values(), key=lambda r: r["avg_at_k"])}
        keys = ("step", "avg_at_k", "k", "n_problems", "interval", "maj_at_k", "best_at_k")
        found = {name: row and {k: row[k] for k in keys} for name, row in pick.items()}
        del found["test_best"]["interval"]  # the best of several looks at the test split has no honest interval
        found["test_best"]["n_checkpoints_searched"] = len(tests)
        summary = {"method": cfg.method, "task": cfg.task, "model": cfg.model, "seed": cfg.seed, "steps": self.total,
                   "rollouts": self.total * cfg.batch_size * cfg.group_size,
                   "seconds": round(self.spent + time.perf_counter() - self.started, 1), **found,
                   "data": self.task.name, "mcq": cfg.mcq, "abstractor": cfg.abstractor, "embedder": cfg.embedder,
                   "memory": memory.sizes(), "memory_events": memory.counts(), "version": VERSION, "commit": commit()}
        write(self.folder / "summary.json", json.dumps(summary, indent=1))
        plot_curves({cfg.method: history}, self.folder / "curve.png", title(summary))
        print("\n" + table({cfg.method: summary}))
        if any(memory.sizes().values()):
            kinds = memory.tally("insight") + memory.tally("experience")
            most = max(self.task.train, key=lambda p: [kinds[p.id, k] for k in ("strategy", "lesson", "success", "failure")])
            print("\n" + describe(memory, most.id))
        print(f"\nall of it: {self.folder}  (curve.png, memory.db, samples.jsonl, evals/, final/)")
        memory.close()
        return summary


def memory_precision(memory, problems):
    """The share of living strategies that the world's hidden truth confirms; None where a task hides none. For
    diagnosis: it reads what neither student nor teacher may see, and is called by nothing but the log."""
    hidden = {p.id: p.extra.get("hidden", "").split() for p in problems}
    if not any(hidden.values()):
        return None
    found = [i.text in hidden[i.problem] for i in memory.living("insight") if i.kind == "strategy" and hidden.get(i.problem)]
    return sum(found) / len(found) if found else None


def title(summary):
    return f"{summary['data']}\navg@{summary['final']['k']} on held-out problems"


def default_name(cfg):
    return f"{cfg.task.strip('/').replace('/', '-')}-{cfg.compare and 'compare' or cfg.method}-{cfg.seed}-" \
           f"{time.strftime('%Y%m%d-%H%M%S')}"


def refuse_changes(before, cfg, quiet=False):
    """A resumed run keeps its configuration, but for what only adds steps or output; that is noted."""
    free = {"resume", "steps", "epochs", "out", "name", "device", "nproc", "log_every", "save_every", "micro_tokens", "keep",
            "max_minutes", "log"}
    now = dataclasses.asdict(cfg)
    said = {k: f"--{k} ({before.get(k)!r} before, {now[k]!r} now)" for k in now if before.get(k) != now[k]}
    if refused := [text for k, text in said.items() if k not in free]:
        raise ValueError(f"the run {cfg.name} was started with other flags: {', '.join(refused)}; use another --name")
    noted = [text for k, text in said.items() if k not in ("resume", "out", "name")]
    if noted and not quiet:
        print(f"changed since the run was started: {', '.join(noted)}")


def checkpoints(folder):
    return sorted((p for p in (folder / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


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
    """What DCP saves and fills: the optimizer's state, and the teacher's weights where they are its own."""
    state = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
    return state | ({"teacher": dict(teacher.named_parameters())} if teacher is not policy else {})


def git(*args):
    try:
        return subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
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


def append(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write(path, text):
    """Writes aside and renames: whoever reads the file finds the old text or the new one."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def write_lines(path, rows):
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path):
    """The rows of a file of JSON lines; a last line without its end was cut by a kill, and is none."""
    return [row for _, row in json_lines(path, cut=True)]


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
    return folder / "checkpoints" / (step or "?")


def batches_per_epoch(problems, cfg):
    return len(problems) // cfg.batch_size


def total_steps(problems, cfg):
    return cfg.steps or cfg.epochs * batches_per_epoch(problems, cfg)
