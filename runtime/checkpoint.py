"""The folder of a run: who may write it, and its checkpoints."""

import contextlib
import fcntl
import json
import os
import socket
import time
import warnings
from datetime import datetime
from pathlib import Path

from runtime.files import reason, writing
from runtime.ranks import rank, whole, world

warnings.filterwarnings(
    "ignore", "torch.distributed is disabled"
)  # DCP's, where one process is meant


def default_name(cfg):
    return (  # to the microsecond, as jobs of an array start in one second
        f"{cfg.task.strip('/').replace('/', '-')}-{cfg.compare and 'compare' or cfg.method}-{cfg.seed}-"
        f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    )


LOCKS = {}  # by folder: the open file whose lock makes this process its only writer


def claim(folder, resume) -> str:
    """Makes this process the only writer of a run's folder, and the folder if need be; or says in a
    sentence why not.

    By flock on its file `lock`, which the kernel lets go when the process ends, however it ends.
    Between nodes that holds where the file system passes it on: NFS does (Linux 2.6.12 on), Lustre
    if it is mounted with -o flock. One without locks is said, and used.
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
    if file := LOCKS.pop(folder.resolve(), None):
        file.close()


def refuse_second_writer(folder):
    """ValueError where another process writes into `folder` now. Takes no lock: `claim` does, after
    the model is loaded.
    """
    path = folder / "lock"
    if folder.resolve() in LOCKS or not path.is_file():
        return
    with (
        open(path, "rb") as file,
        contextlib.suppress(OSError),
    ):  # without locks nothing can be said
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
    return (
        f"{folder} is being written by {holder}: wait until that has ended, or use another --name"
    )


def finished(cfg, total) -> dict | None:
    """The summary of a run that has come to its last step, `total`; None where there is something
    left to do.
    """
    folder = Path(cfg.out) / cfg.name
    if not (folder / "final").is_dir():
        return None
    with contextlib.suppress(
        OSError, ValueError
    ):  # there is none, or it was cut by something else than us
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if isinstance(summary, dict) and summary.get("steps") == total:
            return summary
    return None


def checkpoints(folder):
    return sorted(
        (p for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()),
        key=lambda p: int(p.name),
    )


def save_model(policy, tokenizer, folder):
    """A Hugging Face folder, written by rank 0; weights are made whole one by one, a tied one
    once.
    """
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
    """What DCP saves, and fills in place: Adam's moments by the weight's name, and the teacher's
    weights where they are its own. No learning rate or the like: those are the flags of the run
    that goes on.

    Not torch's get_optimizer_state_dict: where there is no state yet, it takes a step to make one.
    """
    state = {
        "optimizer": {"state": {name: optimizer.state[p] for name, p in policy.named_parameters()}}
    }
    if teacher is not policy:
        state["teacher"] = dict(teacher.named_parameters())
    return state


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
