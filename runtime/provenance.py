"""What a run was started with: its flags, problems, model, code and packages."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from runtime.files import read_json

VERSION = "0.1.0"
HERE = Path(__file__).resolve().parent.parent
# What a resumed run may have otherwise: what only adds steps or output, and knobs of memory, speed
# and place. `data` is where the problems lie; what they are is compared by their digest.
FREE = {
    "resume",
    "steps",
    "epochs",
    "out",
    "name",
    "log_every",
    "save_every",
    "keep",
    "max_minutes",
    "log",
    "device",
    "nproc",
    "micro_tokens",
    "gradient_checkpointing",
    "sampler",
    "gpu_memory_utilization",
    "tensor_parallel",
    "max_sampler_gap",
    "data",
    "unsafe_exec",
}
FORMERLY = {
    "loss_mean": "token"
}  # what was done before there was a field for it, where that is not its default


def refuse_changes(before, cfg, quiet=False):
    """A resumed run keeps its configuration, but for what is FREE; that is noted. before: what
    config.json holds; a field that it lacks was not there yet, and had its default.
    """
    said = {}
    for f in dataclasses.fields(cfg):
        now, then = getattr(cfg, f.name), before.get(f.name, FORMERLY.get(f.name, f.default))
        if now != then:
            said[f.name] = f"--{f.name} ({then!r} before, {now!r} now)"
    if refused := [text for name, text in said.items() if name not in FREE]:
        raise ValueError(
            f"the run {cfg.name} was started with other flags: {', '.join(refused)}; use another"
            " --name"
        )
    noted = [text for name, text in said.items() if name not in ("resume", "out", "name")]
    if noted and not quiet:
        print(f"changed since the run was started: {', '.join(noted)}")


def fingerprint(task, tokenizer) -> dict:
    """What a run learns from and with: for each split its number of problems and a digest of all
    that they hold, in order; and of the model its revision on the Hub, or a digest of its folder's
    files (name, size, first and last MiB).
    """
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
    parts = {
        "train": "the training problems",
        "dev": "the dev problems",
        "test": "the test problems",
        "model": "the model",
    }
    return [text for part, text in parts.items() if before.get(part, now[part]) != now[part]]


def refuse_other_problems(folder, task, tokenizer):
    """ValueError where the run in `folder` was started with other problems or another model under
    the same name.
    """
    path = folder / "problems.json"
    if not path.is_file():  # of a run from before there was one
        return
    before = read_json(
        path, "remove it, and the problems are taken for those that the run was started with"
    )
    if changed := changes(before, fingerprint(task, tokenizer)):
        raise ValueError(
            f"{' and '.join(changed)} are not those that {folder} was started with: give it the"
            " same again, or use another --name"
        )


def git(*args):
    try:
        return subprocess.run(
            ["git", *args],
            cwd=HERE,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit():
    """The commit this code is at, with a + if the tree was changed since; empty outside a git
    checkout.
    """
    return git("rev-parse", "HEAD") + (
        "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


def environment():
    names = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")
    lines = [
        f"pmd {VERSION}",
        f"commit {commit()}",
        f"python {platform.python_version()} on {platform.platform()}",
        *(f"{n} {importlib.metadata.version(n)}" for n in names),
        f"devices: {torch.cuda.device_count()} cuda",
        f"command: {' '.join(sys.argv)}",
    ]
    return "\n".join(lines) + "\n\n" + git("diff", "HEAD") + "\n"
