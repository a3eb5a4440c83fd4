"""What is checked before any work is lost: flags, machine, folder, problems, memory, lengths.
Nothing is made here.
"""

import contextlib
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from runtime.chat import chat_of, encode_prompt, plain, turn_ends
from runtime.checkpoint import (
    checkpoint_of,
    checkpoints,
    memory_source,
    refuse_second_writer,
    total_steps,
)
from runtime.files import read_json
from runtime.model import MODELS
from runtime.options import check_numbers
from runtime.plan import fits
from runtime.provenance import refuse_changes, refuse_other_problems
from runtime.ranks import device_of, rank
from runtime.services import make_abstractor, make_embedder
from runtime.store import TIERS, Store
from runtime.vllm_sampler import VLLM_VERSION, fast_sampler, slow_generation, vllm_version
from tasks import load_task, need_sandbox


def check(cfg, method, quiet=False, ranks=0, checked=None, reads=0):
    """Returns (task, tokenizer). Raises ValueError, in one sentence that names the flag, for what
    can't work.

    method: the class of the method; None for eval.py, which trains nothing. quiet: says nothing of
    what is left out. ranks: of the job that is to be started. checked: what this gave for another
    method, with the same flags otherwise: it is not loaded again. reads: tokens of a prompt that is
    longer than --max_prompt, where that is not the teacher's.
    """
    check_numbers(cfg)
    check_words(cfg)
    check_machine(cfg, ranks)
    check_folder(cfg, method, quiet)
    splits = ("train", "dev", "test") if method else ("test",)
    task, tokenizer = checked or load_problems(cfg, quiet, splits)
    check_problems(task, cfg)
    if method:
        check_training(task, tokenizer, cfg)
        check_memory(task, method, cfg)
    check_lengths(task, tokenizer, cfg, reads, method)
    check_fits(cfg if method else replace(cfg, method="eval"), ranks, quiet)
    if device_of(cfg).type == "cuda" and not cfg.sampler and not fast_sampler(cfg) and not quiet:
        held_out = [
            min(len(split), cfg.eval_problems or len(split)) for split in (task.dev, task.test)
        ]
        print(slow_generation(cfg, sum(held_out), ranks, training=method is not None))
    return task, tokenizer


def refuse_launcher():
    """Raises ValueError for a comparison under torchrun."""
    if "RANK" in os.environ:
        raise ValueError(
            "--compare starts the processes of each method itself, on one machine; under torchrun"
            " give its methods one after the other, each as --method METHOD --name NAME/METHOD"
        )


def need_groups(cfg):
    """ValueError where a method that compares the answers of a group has groups of one."""
    if cfg.group_size == 1:
        raise ValueError(
            f"--group_size 1 leaves {cfg.method} nothing to learn from: it compares the answers of"
            " a group; use 2 or more"
        )


def check_words(cfg):
    """The flags whose values are words, as far as the type of the field leaves them open."""
    given = cfg.tiers.split(",")
    if unknown := [tier for tier in given if tier not in TIERS]:
        raise ValueError(
            "--tiers takes experience, insight and behavior, with commas between, not "
            f"{', '.join(map(repr, unknown))}"
        )
    if len(set(given)) < len(given):
        raise ValueError(f"--tiers takes each tier once, not {cfg.tiers}")
    if cfg.task == "livecodebench" and cfg.since >= cfg.until:
        raise ValueError(f"--since {cfg.since} is no day before --until {cfg.until}")
    if cfg.log and not importlib.util.find_spec(cfg.log):
        raise ValueError(f"--log {cfg.log} needs its library: pip install {cfg.log}")
    for name in ("model", "embedder"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} must be given a name")


def check_machine(cfg, ranks):
    """Devices, processes and samplers, as far as this machine has them."""
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {cfg.device}, but torch finds no such device here; leave the flag out to run"
            " on the CPU"
        )
    if (number := cfg.device.partition(":")[2]) not in ("", "0") and (
        ranks > 1 or fast_sampler(cfg)
    ):
        raise ValueError(
            f"--device {cfg.device} is not for vLLM or several processes, which take GPUs from the"
            " first one they see on; give --device cuda where the environment says"
            f" CUDA_VISIBLE_DEVICES={number}"
        )
    if cfg.device not in ("", "cpu", "cuda"):
        try:
            torch.zeros(1, device=cfg.device).item()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise ValueError(
                f"--device {cfg.device} can't be used here ({str(error).splitlines()[0]}); leave"
                " the flag out, or give cpu or cuda"
            ) from error
    if (gpus := torch.cuda.device_count()) < cfg.nproc and device_of(cfg).type == "cuda":
        raise ValueError(
            f"--nproc {cfg.nproc} is more than the {gpus} GPUs of this machine, and each process"
            " needs its own"
        )
    if fast_sampler(cfg) and (vllm_version() or "").partition("+")[0] != VLLM_VERSION:
        raise ValueError(
            f"--sampler vllm was written for vllm {VLLM_VERSION}, and {vllm_version() or 'none'} is"
            " installed; see requirements-gpu.txt, or use --sampler transformers"
        )
    if ranks % cfg.tensor_parallel:
        raise ValueError(
            f"--tensor_parallel {cfg.tensor_parallel} does not divide the {ranks} processes"
        )
    if ranks > cfg.batch_size:
        raise ValueError(
            f"{ranks} processes are more than the {cfg.batch_size} problems of a batch; raise"
            " --batch_size or lower --nproc"
        )


def check_name(cfg):
    """--name and --out as names of folders."""
    for flag, text in (("name", cfg.name), ("out", str(cfg.out))):
        if not text.isprintable() or any(len(os.fsencode(part)) > 200 for part in text.split("/")):
            raise ValueError(
                f"--{flag} {text[:60]!r} is no name for a folder: use up to 200 printable"
                " characters"
            )
    if cfg.name and (
        Path(cfg.name).is_absolute() or ".." in Path(cfg.name).parts or not Path(cfg.name).parts
    ):
        raise ValueError(
            f"--name {cfg.name!r} is no folder under --out {cfg.out}; give --out the place and"
            " --name the run"
        )


def check_folder(cfg, method, quiet):
    """Where the run is written, and what it goes on from: nothing is made here."""
    check_name(cfg)
    folder = Path(cfg.out) / cfg.name
    if cfg.resume and not cfg.name:
        raise ValueError("--resume continues the run given by --name; name it")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not yours to write to" if there.is_dir() else "is a file"
        raise ValueError(f"{folder} can't be made: {there} {why}; give another --out or --name")
    if cfg.name and not cfg.resume and folder.exists():
        raise ValueError(f"{folder} exists; add --resume to continue it or choose another --name")
    if cfg.name and folder.exists() and rank() == 0:
        refuse_second_writer(folder)
    if cfg.resume and (folder / "config.json").exists():
        cure = "remove it, and the same command writes it anew without comparing its flags"
        refuse_changes(read_json(folder / "config.json", cure), cfg, quiet)
    if not cfg.fork_from:
        return
    if cfg.resume and checkpoints(folder):
        # a fork that has a checkpoint of its own needs the other run no more, which may have
        # dropped that one since
        return
    if not (fork := checkpoint_of(cfg)).is_dir():
        kept = ", ".join(c.name for c in checkpoints(fork.parent.parent)) or "none"
        raise ValueError(
            f"--from {cfg.fork_from} is no RUN@STEP with a checkpoint: there is no {fork}; kept"
            f" there: {kept}"
        )
    forked = read_json(
        fork.parent.parent / "config.json", "it says which model the checkpoint is of"
    )
    if forked.get("method") == "frozen-memory" and method.remembers:
        raise ValueError(
            f"--from {cfg.fork_from} has the memory of another run, whose steps are not its own, so"
            f" that --method {cfg.method} can't go on writing it; fork the run that wrote it"
        )
    other = forked.get("model", "")
    if (
        len(
            {
                MODELS.get(name, Path(name).resolve() if Path(name).is_dir() else name)
                for name in (other, cfg.model)
            }
        )
        > 1
    ):
        raise ValueError(
            f"--from {cfg.fork_from} has a teacher from --model {other}, which can't teach a"
            f" student from {cfg.model}; give the same"
        )


def load_problems(cfg, quiet, asked):
    """(task, tokenizer): the problems whose prompts are within --max_prompt, and the model's
    tokenizer. asked: the splits that are looked at.
    """
    task = load_task(
        cfg.task,
        cfg.dev,
        data=cfg.data,
        protocol=cfg.protocol,
        since=cfg.since,
        until=cfg.until,
        exclude_flagged=cfg.exclude_flagged,
    )
    need_sandbox(task, cfg.unsafe_exec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(MODELS.get(cfg.model, cfg.model))
    except OSError as error:
        raise ValueError(
            f"--model {cfg.model} is neither a Hugging Face folder nor a reachable name on the Hub"
        ) from error
    for what in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, what) is None:
            raise ValueError(
                f"the tokenizer of {cfg.model} has no {what}; use a chat model, or add it to the"
                " folder's tokenizer_config.json"
            )
    chat = chat_of(tokenizer)
    turn_ends(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = (
            tokenizer.eos_token_id
        )  # only fills the left of a batch; masks come from lengths
    splits = {}
    for split in asked:
        problems = getattr(task, split)
        fits = [
            len(encode_prompt(tokenizer, p.prompt, p.system)) <= cfg.max_prompt for p in problems
        ]
        splits[split] = [p for p, fit in zip(problems, fits, strict=True) if fit]
        dropped = [p.id for p, fit in zip(problems, fits, strict=True) if not fit]
        if dropped and not quiet:
            print(
                f"{split}: {len(dropped)} problems dropped, longer than {cfg.max_prompt} tokens:"
                f" {', '.join(dropped)}"
            )
        if problems and not splits[split]:
            raise ValueError(
                f"no {split} problem of {cfg.task} is left within --max_prompt {cfg.max_prompt}"
                " tokens"
            )
    if not chat.takes_system and any(p.system for problems in splits.values() for p in problems):
        own = (
            f"{cfg.model}'s chat template takes no system message: it is put before the user's, in"
            " the user's message."
        )
        task = replace(task, card="\n".join(filter(None, [task.card, own])))
    return replace(task, **splits), tokenizer


def check_problems(task, cfg):
    """Flags against the problems."""
    if cfg.mcq == "lenient" and task.test[0].verifier != "choice":
        raise ValueError(f"--mcq lenient is for multiple choice, which {cfg.task} is not")


def check_training(task, tokenizer, cfg):
    """Flags against the training problems, and those against what the run was started with."""
    if len(task.train) < cfg.batch_size:
        raise ValueError(
            f"--batch_size {cfg.batch_size} is more than the {len(task.train)} training problems of"
            f" {cfg.task}"
        )
    folder = Path(cfg.out) / cfg.name
    if cfg.resume:
        refuse_other_problems(folder, task, tokenizer)
    saved = checkpoints(folder)[-1:] if cfg.resume else []
    if cfg.fork_from and not saved:
        saved = [checkpoint_of(cfg)]
    if saved and (total := total_steps(task.train, cfg)) < int(saved[0].name):
        raise ValueError(
            f"--{'steps' if cfg.steps else 'epochs'} {cfg.steps or cfg.epochs} ends at step"
            f" {total}, before {saved[0]}, which this run goes on from; raise it"
        )


def check_memory(task, method, cfg):
    """The memory that is read or gone on with, its embedder, and who writes behaviors."""
    resumed = (
        cfg.resume and (Path(cfg.out) / cfg.name / "memory.db").exists()
    )  # a run has a copy of what it was lent
    if cfg.memory_from and not resumed:
        check_lender(cfg, task)
    if (
        cfg.fork_from
        and not resumed
        and method.remembers
        and (checkpoint_of(cfg) / "memory.db").is_file()
    ):
        source = checkpoint_of(cfg) / "memory.db"
        with contextlib.closing(Store(source, embedder=cfg.embedder, frozen=True)) as lent:
            known = lent.prompts()
        unknown = [p.id for p in task.train if p.id not in known]
        if unknown:
            raise ValueError(
                f"--from {cfg.fork_from} has a memory that does not know {len(unknown)} of the"
                f" training problems, such as {unknown[0]}; give the same --task, or start without"
                " --from"
            )
        if others := known_otherwise(task.train, known):
            raise ValueError(
                f"--from {cfg.fork_from} has the memory of another task: {len(others)} training"
                f" problems have other texts in it, such as {others[0]!r}; give the same --task, or"
                " start without --from"
            )
    if method.memory_mode and rank() == 0:  # whose memory it is
        make_embedder(cfg)
    if method.remembers:
        make_abstractor(cfg, check=True)


def check_lengths(task, tokenizer, cfg, reads, method):
    """Prompts and replies against the model's positions, and --top_k against its vocabulary."""
    shape = AutoConfig.from_pretrained(MODELS.get(cfg.model, cfg.model))
    vocabulary = getattr(shape.get_text_config(), "vocab_size", None)
    if vocabulary and cfg.top_k > vocabulary:
        raise ValueError(
            f"--top_k {cfg.top_k} is more than the {vocabulary} tokens of {cfg.model}; 0 takes all"
            " of them"
        )
    taught = method is not None and method.reprompts
    if taught and cfg.max_reprompt < cfg.max_prompt:
        longest = max(len(encode_prompt(tokenizer, p.prompt, p.system)) for p in task.train)
        if longest > cfg.max_reprompt:
            raise ValueError(
                f"--max_reprompt {cfg.max_reprompt} is less than the {longest} tokens of the"
                " longest training problem, which the teacher reads too; raise it, or lower"
                " --max_prompt"
            )
    positions = getattr(shape, "max_position_embeddings", None)
    reads, writes = max(cfg.max_prompt, reads), cfg.max_completion
    if taught:
        reads = max(reads, cfg.max_reprompt)
        writes = max(writes, cfg.memory_completion if method.remembers else 0)
    if positions and reads + writes > positions:
        cure = (
            f"--max_reprompt {positions - writes}"
            if cfg.max_prompt + writes <= positions
            else "a lower --max_completion"
        )
        raise ValueError(
            f"{cfg.model} has {positions} positions, and a prompt of {reads} tokens with a reply of"
            f" {writes} needs more; give {cure}"
        )


def check_fits(cfg, ranks, quiet):
    """Whether the model fits on the GPUs, by runtime/plan.py."""
    if device_of(cfg).type != "cuda":
        return
    card = torch.cuda.get_device_properties(device_of(cfg)).total_memory / 2**30
    share = cfg.gpu_memory_utilization if fast_sampler(cfg) else 0
    try:
        fine, sentence = fits(cfg, MODELS.get(cfg.model, cfg.model), ranks, card, share)
    except (
        Exception
    ) as error:  # of an architecture whose layers it can't trace, which may train all the same
        fine, sentence = True, ""
        if not quiet:
            print(
                f"whether {cfg.model} fits could not be computed: {type(error).__name__}: {error}"
            )
    if not fine:
        raise ValueError(sentence)


def known_otherwise(problems, prompts) -> list[str]:
    """The ids of the problems that a memory's prompts ({id: text}) have with another text: ids may
    be mere numbers.
    """
    return [p.id for p in problems if plain(prompts[p.id]) != plain(p.prompt)]


def check_lender(cfg, task):
    """ValueError where --memory_from is not a memory of this task that holds something at its
    step.
    """
    source, step = memory_source(cfg)
    if not source.is_file() or step and not step.isdecimal():
        raise ValueError(
            f"--memory_from {cfg.memory_from} is neither RUN nor RUN@STEP: there is no {source}, or"
            " the step is no number"
        )
    with contextlib.closing(Store(source, embedder=cfg.embedder, frozen=True)) as lent:
        prompts, last = lent.prompts(), lent.last_step()
        empty = not lent.holds(int(step or 10**9))
    shared = [p for p in task.train if p.id in prompts]
    if not shared:
        raise ValueError(
            f"{source} is the memory of another task: it knows none of the problems of {cfg.task}"
        )
    if others := known_otherwise(shared, prompts):
        raise ValueError(
            f"{source} is the memory of another task: {len(others)} of its problems have ids of"
            f" {cfg.task} with other texts, such as {others[0]!r}"
        )
    if int(step or 0) > last:
        raise ValueError(
            f"--memory_from {cfg.memory_from}: {source} has come to step {last} only; name that or"
            " an earlier one"
        )
    if empty:
        raise ValueError(
            f"--memory_from {cfg.memory_from}: {source} holds nothing at the end of step"
            f" {step or last}; name another step or run"
        )
