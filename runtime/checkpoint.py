"""Claims the folder of a run for one writer, and writes, reads and prunes its checkpoints."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
import warnings
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModelForCausalLM

from runtime.errors import RunError
from runtime.files import (
    read_json,
    read_rows,
    reason,
    settle,
    without_log,
    write,
    write_lines,
    writing,
)
from runtime.lora import STUDENT, TEACHER, is_adapted, read_adapter, save_adapter, without_adapters
from runtime.model import outline
from runtime.ranks import rank, whole, world

# DCP warns in a single process, which is meant
warnings.filterwarnings("ignore", "torch.distributed is disabled")
LOCKS = {}  # by folder: the open file whose lock makes this process its only writer


# --------------------------------------------------------------------------------------------------
# The folder of a run, and its one writer
# --------------------------------------------------------------------------------------------------


def default_name(cfg) -> str:
    """Names a run after its task, method, seed and time. Raises ValueError with --resume."""
    if cfg.resume:
        raise ValueError("--resume continues the run given by --name; name it")
    task = cfg.task.strip("/").replace("/", "-")
    method = "compare" if cfg.compare else Path(cfg.method).stem
    now = f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # microseconds: the jobs of an array start together
    return f"{task}-{method}-{cfg.seed}-{now}"


def claim(folder, resume) -> str:
    """Makes this process the only writer of a run's folder, which it makes if need be.

    Returns "", or a sentence if the folder can't be claimed. The kernel keeps the lock (flock on
    the file `lock`) until the process ends, however it ends. Between nodes it holds if the file
    system passes it on: NFS does (Linux 2.6.12 on), Lustre if it is mounted with -o flock. On a
    file system without locks it prints so, and goes on.
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
        print(
            f"{folder} is on a file system without locks ({reason(error)}): nothing keeps a second"
            " process from it"
        )
        locked = True
    if not locked:
        return taken(folder, file)
    LOCKS[folder.resolve()] = file
    with writing(folder / "lock"):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return ""


def release(folder):
    """Lets another process write the folder."""
    file = LOCKS.pop(folder.resolve(), None)
    if file:
        file.close()


def refuse_second_writer(folder):
    """Looks whether another process writes into a folder now.

    It keeps no lock: `claim` takes it, after the model is loaded.
    Raises ValueError if another process does.
    """
    path = folder / "lock"
    if folder.resolve() in LOCKS or not path.is_file():
        return
    # without locks (OSError) it can't be known
    with open(path, "rb") as file, contextlib.suppress(OSError):
        if not try_lock(file, fcntl.LOCK_SH):
            raise ValueError(taken(folder, file))


def try_lock(file, kind) -> bool:
    """Tries to lock a file for a second, since another process may only be looking at it."""
    for _ in range(20):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def taken(folder, file) -> str:
    """Says which process holds the lock of a folder."""
    file.seek(0)
    holder = file.read().decode(errors="replace") or "another process"
    return (
        f"{folder} is being written by {holder}: wait until that has ended, or use another --name"
    )


def finished(cfg, total) -> dict | None:
    """Returns the summary of a run that has come to its last step, `total`, or else None."""
    folder = Path(cfg.out) / cfg.name
    if not (folder / "final").is_dir():
        return None
    # no summary, or one that was cut by another program: the run is not finished
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if isinstance(summary, dict) and summary.get("steps") == total:
            return summary
    return None


def batches_per_epoch(problems, cfg) -> int:
    return len(problems) // cfg.batch_size


def total_steps(problems, cfg) -> int:
    return cfg.steps or cfg.epochs * batches_per_epoch(problems, cfg)


# --------------------------------------------------------------------------------------------------
# The places that a run begins from
# --------------------------------------------------------------------------------------------------


def step_of(checkpoint) -> int:
    return int(checkpoint.name)


def checkpoints(folder) -> list[Path]:
    """Returns the checkpoints of a run's folder, in the order of their steps."""
    saved = [path for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]
    return sorted(saved, key=step_of)


def run_and_step(text, cfg) -> tuple[Path, str]:
    """Splits RUN[@STEP] into a folder and a step, or "". RUN: a folder, or a name under --out.

    An @ may stand in RUN, too.
    """
    run, at, step = text.rpartition("@")
    for name, number in ((text, ""), (run, step)):
        for folder in (Path(name), Path(cfg.out) / name):
            if name and folder.is_dir():
                return folder, number
    if not at or "/" in step:
        run, step = text, ""
    return Path(cfg.out) / run, step


def memory_source(cfg) -> tuple[Path, str]:
    """Returns the file and the step of --memory_from."""
    folder, step = run_and_step(cfg.memory_from, cfg)
    return folder / "memory.db", step


def fork_source(cfg) -> Path:
    """Returns the checkpoint of --from, which may not exist."""
    folder, step = run_and_step(cfg.fork_from, cfg)
    return folder / "checkpoints" / (step if step.isdecimal() else "?")


def starting_point(cfg) -> Path | None:
    """Returns the checkpoint that a run goes on from: its newest one, or else that of --from.

    A run with a checkpoint of its own needs the other run no more, which may have dropped the
    checkpoint of --from since.
    """
    if cfg.resume:
        saved = checkpoints(Path(cfg.out) / cfg.name)
        if saved:
            return saved[-1]
    return fork_source(cfg) if cfg.fork_from else None


# --------------------------------------------------------------------------------------------------
# Writing a checkpoint
# --------------------------------------------------------------------------------------------------


def write_checkpoint(folder, method, optimizer, tokenizer, record):
    """Writes the weights as a Hugging Face folder, trainer/ by torch's DCP, and memory.db.

    It is written elsewhere, flushed to the disk and renamed: a checkpoint is whole or is not there.
    Any number of ranks can read trainer/. Of an adapted policy it holds the adapters alone.
    record: the values of trainer.json.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    if is_adapted(method.policy):
        save_adapter(method.policy, partial)
        method.policy.config.save_pretrained(partial)  # for eval.py and vLLM
        tokenizer.save_pretrained(partial)
    else:
        save_model(method.policy, tokenizer, partial)
    state = trainer_state(method.policy, method.teacher, optimizer)
    dcp.save(state, checkpoint_id=partial / "trainer", no_dist=world() == 1)
    if rank():
        return
    write(partial / "trainer.json", json.dumps(record))
    memory = method.memory
    if memory.path != ":memory:":
        memory.copy_to(partial / "memory.db")
        memory.settle()
    settle(partial)
    partial.rename(folder)
    settle(folder.parent)


def save_model(policy, tokenizer, folder):
    """Writes a Hugging Face folder, on rank 0.

    Sharded weights are made whole one by one, a tied one once. An adapter is merged, and kept in
    the folder `adapter`.
    """
    if is_adapted(policy):
        save_adapter(policy, folder / "adapter")
        policy = without_adapters(policy, outline(policy.config))
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


def trainer_state(policy, teacher, optimizer) -> dict:
    """Returns the tensors that DCP saves, and fills in place.

    They are Adam's moments by the weight's name, and the weights of an averaged teacher. Learning
    rate and the like are flags of the run that goes on. torch's get_optimizer_state_dict is of no
    use: without a state it takes a step to make one.
    """
    weights = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    moments = {name: optimizer.state[p] for name, p in weights}
    state = {"optimizer": {"state": moments}}
    if teacher is not policy:
        state["teacher"] = dict(teacher.named_parameters())
    return state


def prune(run_folder, keep):
    """Removes all checkpoints but the last `keep`, and that of them all that was best on dev."""
    saved = checkpoints(run_folder)
    rows = read_rows(run_folder / "metrics.jsonl")
    dev = {row["step"]: row["avg_at_k"] for row in rows if row.get("split") == "dev"}

    def merit(checkpoint):
        step = step_of(checkpoint)
        return dev[step], -step  # of equal ones the earliest, as in the summary

    evaluated = [checkpoint for checkpoint in saved if step_of(checkpoint) in dev]
    best = max(evaluated, key=merit, default=None)
    for checkpoint in saved[:-keep]:
        if checkpoint != best:
            # a kill leaves what is no checkpoint: see Run.restore
            shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.partial")))


# --------------------------------------------------------------------------------------------------
# Reading a checkpoint
# --------------------------------------------------------------------------------------------------

RECORD = {"step": int, "updates": int, "ema": bool, "seconds": (int, float)}  # of trainer.json


def read_checkpoint(folder, method, optimizer, cure) -> dict:
    """Fills the weights and the moments of a run in place; returns the values of trainer.json.

    The host holds one copy of the policy besides. cure: how to go on without the checkpoint.
    Raises RunError, with the file and the cure, if it can't be read.
    """
    policy, teacher = method.policy, method.teacher
    record = read_record(folder, cure)
    starts = teacher is not policy and not record["ema"]  # an average that starts here
    if is_adapted(policy):
        read_adapter(folder, policy, [STUDENT, TEACHER] if starts else [STUDENT], cure)
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world() > 1)
        weights = read_weights(folder, cure) if rank() == 0 else {}  # rank 0 deals them out
        for model in [policy, teacher] if starts else [policy]:
            set_model_state_dict(model, weights, options=options)
    averaged = teacher if record["ema"] else policy
    state = trainer_state(policy, averaged, optimizer)
    path = folder / "trainer"
    try:
        with without_log():
            dcp.load(state, checkpoint_id=path, no_dist=world() == 1)
    except (OSError, CheckpointException) as error:
        raise RunError(f"{path} can't be read ({reason(error)}): {cure}") from error
    return record


def read_record(folder, cure) -> dict:
    """Reads trainer.json.

    Raises RunError if a value is missing, or if it is of another step.
    """
    path = folder / "trainer.json"
    record = read_json(path, cure)
    for key, kind in RECORD.items():
        if not isinstance(record.get(key), kind):
            raise RunError(f"{path} has no {key} that can be one: {cure}")
    if record["step"] != step_of(folder):
        raise RunError(f"{path} is of step {record['step']}: {cure}")
    return record


def read_weights(folder, cure) -> dict:
    """Reads the weights of a checkpoint's policy, on the host.

    Raises RunError if a file can't be read, or if a weight is missing.
    """
    options = {"dtype": torch.float32, "output_loading_info": True}
    try:
        policy, loading = AutoModelForCausalLM.from_pretrained(folder, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = reason(error)
        raise RunError(f"the weights in {folder} can't be read ({why}): {cure}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise RunError(f"the weights in {folder} have no {missing[0]}: {cure}")
    return policy.state_dict()


def cure_without(checkpoint, run_folder) -> str:
    """Says how a run goes on if a checkpoint can't be read."""
    home = checkpoint.parent.parent
    others = [other for other in checkpoints(home) if other != checkpoint]
    if home != run_folder:
        names = ", ".join(other.name for other in others) or "none"
        return f"give --from another step; kept there: {names}"
    then = f"goes on from {others[-1]}" if others else "starts over"
    return f"remove {checkpoint}, and the same command {then}"


def cut_records(run_folder, step, origin) -> bool:
    """Cuts the records of a run after a step; returns whether that step has been evaluated.

    An evaluation counts if its row for test is there, which is written last. A run that starts over
    at its origin evaluates again.
    """
    last = -1 if step == origin else step
    evaluated = False
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = run_folder / name
        if not path.exists():
            continue
        rows = [row for row in read_rows(path) if row["step"] <= last]
        if any(row["step"] == step and row.get("split") == "test" for row in rows):
            evaluated = True
        else:
            rows = [row for row in rows if row["step"] < step or "split" not in row]
        write_lines(path, rows)
    return evaluated
