"""Writes down and compares what a run was started with: flags, problems, model, code, packages."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from runtime.files import read_json, write

VERSION = "0.1.0"
HERE = Path(__file__).resolve().parent.parent
# A resumed run may change these flags: they add steps or output, or concern memory, speed and
# place. `data` is the place of the problems. Their contents are compared by digest.
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
    "compile_layers",
    "sampler",
    "gpu_memory_utilization",
    "tensor_parallel",
    "max_sampler_gap",
    "data",
    "unsafe_exec",
}
# The value of a field before the field was added, if that is not its default.
FORMERLY = {"loss_mean": "token"}


def write_origin(folder, cfg, task, tokenizer, memory=None) -> dict:
    """Writes a run's flags and the digests of its problems; returns the digests."""
    digests = fingerprint(task, tokenizer, memory)
    write(folder / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
    write(folder / "problems.json", json.dumps(digests, indent=1))
    return digests


def refuse_other_flags(folder, cfg, quiet=False):
    """Compares the flags of a resumed run with its config.json, if there is one.

    Raises ValueError if a flag has changed that may not.
    """
    path = folder / "config.json"
    if path.exists():
        cure = "remove it, and the same command writes it anew without comparing its flags"
        refuse_changes(read_json(path, cure), cfg, quiet)


def refuse_changes(before, cfg, quiet=False):
    """Compares flags with those of a config.json, and prints those that have changed and may.

    before: the contents of the file. A field that it lacks was added to the code later, and counts
    as its default.
    Raises ValueError if a flag has changed that may not.
    """
    changed = {}
    for f in dataclasses.fields(cfg):
        now = getattr(cfg, f.name)
        then = before.get(f.name, FORMERLY.get(f.name, f.default))
        if now != then:
            changed[f.name] = f"--{f.name} ({then!r} before, {now!r} now)"
    refused = [text for name, text in changed.items() if name not in FREE]
    if refused:
        raise ValueError(
            f"the run {cfg.name} was started with other flags: {', '.join(refused)}; use another"
            " --name"
        )
    noted = [text for name, text in changed.items() if name not in ("resume", "out", "name")]
    if noted and not quiet:
        print(f"changed since the run was started: {', '.join(noted)}")


def fingerprint(task, tokenizer, memory=None) -> dict:
    """Returns digests of a run's problems and the identity of its model.

    A split has the number of its problems and a digest of their contents, in order. A model has its
    revision on the Hub, or a digest of its folder's files (name, size, first and last MiB). memory:
    that of an evaluation, which the run that it belongs to may still write.
    """
    digests = {}
    for split in ("train", "dev", "test"):
        digest = hashlib.sha256()
        for p in getattr(task, split):
            row = [p.id, p.prompt, p.answer, p.verifier, p.system, p.extra]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        digests[split] = {"problems": len(getattr(task, split)), "sha256": digest.hexdigest()}
    if memory:
        digests["memory"] = {"last step": memory.last_step(), "items": memory.sizes()}
    return digests | {"model": model_identity(tokenizer.name_or_path)}


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
    """Names what differs between two fingerprints."""
    parts = {
        "train": "the training problems",
        "dev": "the dev problems",
        "test": "the test problems",
        "model": "the model",
        "memory": "the memory",
    }
    both = [part for part in parts if part in before and part in now]
    return [parts[part] for part in both if before[part] != now[part]]


def refuse_other_problems(folder, task, tokenizer, memory=None):
    """Compares the problems, the model and the memory of a resumed run with its problems.json.

    Raises ValueError if they are other ones, under the same names.
    """
    path = folder / "problems.json"
    if not path.is_file():
        return
    cure = "remove it, and the problems are taken for those that the run was started with"
    changed = changes(read_json(path, cure), fingerprint(task, tokenizer, memory))
    if changed:
        raise ValueError(
            f"{' and '.join(changed)} changed since {folder} was started: give it the same again,"
            " or use another --name"
        )


def git(*args) -> str:
    """Returns the output of a git command in the checkout; "" if it fails."""
    text = {"encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, check=True, **text)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """Returns the commit of this code, with a + if files were changed since; "" without git."""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def environment(method="") -> str:
    """Describes the code, the packages and the devices of a run.

    Uncommitted changes are written out, and so is the file of a method outside methods/.
    """
    packages = ["torch", "transformers", "tokenizers", "numpy", "scikit-learn"]
    if importlib.util.find_spec("peft"):  # of --lora_rank
        packages.append("peft")
    lines = [f"pmd {VERSION}", f"commit {commit()}"]
    lines += [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package} {importlib.metadata.version(package)}" for package in packages]
    lines += [f"devices: {torch.cuda.device_count()} cuda", f"command: {' '.join(sys.argv)}"]
    lines += ["", git("diff", "HEAD"), ""]
    if method.endswith(".py"):
        lines += [f"--method {method}", Path(method).read_text(encoding="utf-8"), ""]
    return "\n".join(lines)
