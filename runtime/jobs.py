"""Ends a program with one sentence, and runs a comparison as a job for each method."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.utils import logging as transformers_logging

from runtime.checkpoint import finished, total_steps
from runtime.errors import RunError
from runtime.files import Stopped, read_lines
from runtime.provenance import HERE
from runtime.ranks import Unsupported, broadcast, end_ranks, rank
from runtime.run import COMPARISON
from runtime.tables import plot_curves, table, title


def quiet_libraries():
    """Silences transformers, and lets a terminal that can't show a character end no run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def explained(cfg=None, when="", checks=False):
    """Ends the program with one sentence, and its exit status, if the body is stopped.

    when: of an interruption. checks: the body checks flags and data, whose ValueErrors are such
    sentences, printed by one rank. A fault of the program is raised as it is: it needs its
    traceback.
    """
    who = "pmd.py" if os.environ.get("RANK", "0") == "0" else f"pmd.py, rank {os.environ['RANK']}"
    try:
        yield
    except Stopped as stopped:
        if rank() == 0:
            print(f"pmd.py: {stopped}", file=sys.stderr)
        end_ranks(stopped.code)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print(f"{who}: interrupted {when}", file=sys.stderr)
        sys.exit(130)
    except (Exception, CheckpointException) as error:
        sentence = failure(error, cfg)
        if isinstance(error, ValueError) and (checks or cfg is None):
            sentence = str(error)
        if not sentence:
            raise
        silent = checks and os.environ.get("LOCAL_RANK", "0") != "0"
        sys.exit(1 if silent else f"{who}: {sentence}")


def failure(error, cfg) -> str:
    """Returns the reason why a run ended, in a sentence, or "" for a fault of the program."""
    no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if no_memory or "DefaultCPUAllocator" in str(error):
        text = " ".join(str(error).split())[:200] or "the machine has no more"
        return (
            f"out of memory: {text}; lower --micro_tokens ({cfg.micro_tokens} now) or, with vLLM, "
            "--gpu_memory_utilization; --resume goes on with other values"
        )
    if isinstance(error, SafetensorError):  # those of a checkpoint are told apart where it is read
        return f"the weights of --model {cfg.model} can't be read: {error}"
    if isinstance(error, (FloatingPointError, OSError, Unsupported, RunError)):
        return str(error)
    if isinstance(error.__cause__, sqlite3.Error):  # the memory has explained it
        return str(error)
    return ""


def at_end(cfg, task) -> bool:
    """Whether --resume finds the run at its end, and prints its results if so."""
    if not cfg.resume:
        return False
    summary = broadcast(finished(cfg, total_steps(task.train, cfg)))
    if summary and rank() == 0:
        print(f"{Path(cfg.out) / cfg.name} is at its end: nothing is left to do")
        print(f"\n{table({cfg.method: summary})}")
    return bool(summary)


def compare(folder, runs, totals, cfg):
    """Trains the methods of a comparison in turn, then makes their figure and table.

    Each is a job of its own, since a process group and an engine of vLLM are those of a process.
    totals: the steps of each run. --resume goes on with the first method that has not finished.
    """
    comparison = str(folder.relative_to(cfg.out))
    program = sys.argv[0] if Path(sys.argv[0]).is_file() else str(HERE / "pmd.py")
    environment = {**os.environ, COMPARISON: comparison}
    summaries = {}
    for run, total in zip(runs, totals, strict=True):
        code = 0
        if not finished(run, total):
            # of a flag given twice the last one counts
            flags = "--compare=", f"--method={run.method}", f"--name={run.name}"
            code = job([sys.executable, program, *sys.argv[1:], *flags], environment)
        summary = finished(run, total)
        if not summary:
            again = f"the same command with --name {comparison} --resume goes on"
            print(f"pmd.py: the comparison stopped in {run.method}; {again}", file=sys.stderr)
            sys.exit(code)
        summaries[run.method] = summary
    curves = {run.method: read_lines(Path(run.out) / run.name / "metrics.jsonl") for run in runs}
    plot_curves(curves, folder / "compare.png", title(next(iter(summaries.values()))))
    print(f"\n{table(summaries)}\n\n{folder / 'compare.png'}")


def job(command, environment) -> int:
    """Runs a command and returns its exit status. Signals to this process are passed on to it.

    The command has a session of its own, so that a terminal's Ctrl-C reaches it once.
    """
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:

        def pass_on(number, frame):
            process.send_signal(number)

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        handlers = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code
