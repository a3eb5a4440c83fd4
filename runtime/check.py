"""Checks flags, machine, folder, problems, memory and lengths, before any work is lost.

Nothing is made here.
"""

import contextlib
import importlib.util
import os
from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from runtime.chat import can_think, chat_of, encoder, plain, turn_ends
from runtime.checkpoint import (
    checkpoints,
    default_name,
    fork_source,
    memory_source,
    refuse_second_writer,
    starting_point,
    total_steps,
)
from runtime.files import read_json, reason
from runtime.guide import reader_of
from runtime.logits import softcap_of
from runtime.lora import base_of
from runtime.model import MODELS
from runtime.options import check_numbers
from runtime.plan import fits
from runtime.provenance import refuse_other_flags, refuse_other_problems
from runtime.ranks import Unsupported, device_of, rank
from runtime.services import make_abstractor, make_embedder
from runtime.store import TIERS, Store
from runtime.vllm_sampler import VLLM_VERSION, fast_sampler, slow_generation, vllm_version
from tasks import load_task, need_sandbox

# What only a teacher's pass reads, only a memory, and only a memory that is written
OF_TEACHERS = ["alpha", "top_k", "teacher", "ema_rate"]
OF_MEMORIES = ["tiers", "retrieve_k", "query_feedback", "supervise"]
OF_WRITERS = (
    "max_insights behavior_every behaviors_refreshed clusters drop_shortcuts ground_insights"
    " abstractor memory_format"
).split()
MOST_UNKNOWN = 0.2  # of a problem's tokens; nano knows about a third of those of a plain sentence


def check(cfg, method, quiet=False, ranks=0, checked=None, reads=0):
    """Returns (task, tokenizer).

    method: the class of the method; None for eval.py, which trains nothing. quiet: prints nothing.
    ranks: those of the job that is to be started. checked: the result for another method with the
    same flags, which is not loaded again. reads: tokens of a prompt that is longer than
    --max_prompt, if it is not the teacher's.
    Raises ValueError if the run can't work, in one sentence that names the flag.
    """
    check_numbers(cfg)
    check_words(cfg)
    check_machine(cfg, ranks)
    check_compiled(cfg, ranks)
    check_adapters(cfg, ranks, method)
    check_folder(cfg, method, quiet)
    splits = ("train", "dev", "test") if method else ("test",)
    task, tokenizer = checked or load_problems(cfg, quiet, splits)
    check_problems(task, cfg)
    if method:
        check_training(task, tokenizer, cfg)
        check_memory(task, method, cfg)
        for problem in task.train if method.needs else ():
            method.needs(problem)
        if method.remembers:
            check_format(task, tokenizer, cfg)
    check_lengths(task, tokenizer, cfg, reads, method)
    check_fits(cfg if method else replace(cfg, method="eval"), ranks, quiet)
    if device_of(cfg).type == "cuda" and not cfg.sampler and not fast_sampler(cfg) and not quiet:
        sizes = [len(task.dev), len(task.test)]
        held_out = sum(min(size, cfg.eval_problems or size) for size in sizes)
        print(slow_generation(cfg, held_out, ranks, training=method is not None))
    return task, tokenizer


def refuse_launcher():
    """Refuses a comparison under torchrun.

    Raises ValueError if there is a launcher.
    """
    if "RANK" in os.environ:
        raise ValueError(
            "--compare starts the processes of each method itself, on one machine; under torchrun"
            " give its methods one after the other, each as --method METHOD --name NAME/METHOD"
        )


def need_mastered(cfg):
    """Refuses --no_supervise_mastered for a method that can't leave such problems out."""
    if not cfg.supervise_mastered:
        raise ValueError(f"--no_supervise_mastered is not for {cfg.method}; leave it out")


def need_reverse_kl(cfg):
    """Refuses another divergence than the full reverse KL, for a method that has no other."""
    if cfg.alpha != 1 or cfg.top_k:
        raise ValueError(
            f"--method {cfg.method} is exact for the full reverse KL alone: give --alpha 1 and"
            " --top_k 0"
        )


def need_unbounded_logits(policy, cfg):
    """Refuses a model that bounds its logits, for a method that mixes the states of two teachers.

    A mean of hidden states is a product of distributions only where logits are linear in them.
    Raises Unsupported if the configuration of the policy has a softcap.
    """
    if softcap_of(policy.config):
        raise Unsupported(
            f"--method {cfg.method} mixes hidden states, and {cfg.model} bounds its logits"
            f" (final_logit_softcapping {softcap_of(policy.config)}), so that the mix would not be"
            " the product that the method means; use another --model or --method"
        )


def need_groups(cfg):
    """Refuses groups of one for a method that compares the answers of a group.

    Raises ValueError if --group_size is 1.
    """
    if cfg.group_size == 1:
        raise ValueError(
            f"--group_size 1 leaves {cfg.method} nothing to learn from: it compares the answers of"
            " a group; use 2 or more"
        )


def name_idle_flags(cfg, method, preset):
    """Prints the flags that have a value of their own, and that the method does not read.

    preset: {flag: default} of the task.
    """
    defaults = {f.name: f.default for f in fields(cfg)} | preset
    given = [name for name in idle_flags(cfg, method) if getattr(cfg, name) != defaults[name]]
    if given:
        names = ", ".join(f"--{name} {getattr(cfg, name)}" for name in given)
        print(f"without effect on this {cfg.method}: {names}")


def idle_flags(cfg, method) -> list[str]:
    """Lists the flags that a method does not read."""
    idle = [] if method.teaches else list(OF_TEACHERS)
    if method.teaches and cfg.teacher == "live":
        idle += ["ema_rate"]
    if not method.reprompts:
        idle += ["max_reprompt"]
    if not method.memory_mode:
        idle += [*OF_MEMORIES, "embedder"]
    if not method.remembers:
        idle += OF_WRITERS
    return idle + [name for name in method.idle.split() if name not in idle]


def refuse_idle_flags(cfg, memory):
    """Refuses flags of pmd.py that an evaluation does not read, and that say what it should do.

    memory: that of eval.py's --memory.
    Raises ValueError if one is not at its default.
    """
    idle = ["memory_from", "fork_from", "compare", "max_minutes", "log"]
    kind = "an evaluation"
    if not memory:
        idle, kind = [*idle, "tiers", "retrieve_k"], "an evaluation without --memory"
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.name in idle and value != f.default:
            raise ValueError(
                f"--{f.name} {value} is nothing that {kind} reads; leave it out, or give"
                f" --{f.name} {f.default or repr(f.default)}"
            )


def check_words(cfg):
    """Checks the flags whose values are words, beyond the types of their fields.

    Raises ValueError if a word is none of those that its flag takes.
    """
    given = cfg.tiers.split(",")
    unknown = [tier for tier in given if tier not in TIERS]
    if unknown:
        raise ValueError(
            "--tiers takes experience, insight and behavior, with commas between, not "
            f"{', '.join(map(repr, unknown))}"
        )
    if len(set(given)) < len(given):
        raise ValueError(f"--tiers takes each tier once, not {cfg.tiers}")
    if cfg.supervise == "solved" and given == ["behavior"]:
        raise ValueError(
            "--supervise solved and --tiers behavior leave nothing to learn from: successes,"
            " strategies and feedback are of the other tiers; use --supervise all"
        )
    if cfg.task == "livecodebench" and cfg.since >= cfg.until:
        raise ValueError(f"--since {cfg.since} is no day before --until {cfg.until}")
    if cfg.log and not importlib.util.find_spec(cfg.log):
        raise ValueError(f"--log {cfg.log} needs its library: pip install {cfg.log}")
    for name in ("model", "embedder"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} must be given a name")


def check_machine(cfg, ranks):
    """Checks devices, processes and samplers against this machine.

    Raises ValueError if it lacks one.
    """
    check_device(cfg, ranks)
    gpus = torch.cuda.device_count()
    if gpus < cfg.nproc and device_of(cfg).type == "cuda":
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


def check_compiled(cfg, ranks):
    """Checks --compile_layers.

    Raises ValueError for several processes, or if transformers would generate with those layers.
    """
    if cfg.compile_layers and (ranks > 1 or not fast_sampler(cfg)):
        raise ValueError(
            "--compile_layers is for one process with --sampler vllm, since the layers would be"
            " compiled anew for each length that transformers generates at; leave the flag out"
        )


def check_adapters(cfg, ranks, method):
    """Checks --lora_rank.

    Raises ValueError if peft is not installed, or for several processes, or if nothing is trained,
    or if the model is a checkpoint of adapters itself.
    """
    if not cfg.lora_rank:
        return
    if method is None:
        raise ValueError(
            "--lora_rank is for training; final/ of such a run is a whole model, and --model takes"
            " one of its checkpoints, too"
        )
    if base_of(MODELS.get(cfg.model, cfg.model)):
        raise ValueError(
            f"--model {cfg.model} is a checkpoint of adapters, on which --lora_rank can't put"
            " others; give that run's final/, which is a whole model"
        )
    if not importlib.util.find_spec("peft"):
        raise ValueError(f"--lora_rank {cfg.lora_rank} needs its library: pip install peft")
    if ranks > 1:
        raise ValueError(
            f"--lora_rank {cfg.lora_rank} trains in one process, not in {ranks}; give --nproc 1, or"
            " leave --lora_rank out to train all weights"
        )


def check_device(cfg, ranks):
    """Checks --device.

    Raises ValueError if torch has no such device, or if vLLM or several processes would take it.
    """
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {cfg.device}, but torch finds no such device here; leave the flag out to run"
            " on the CPU"
        )
    number = cfg.device.partition(":")[2]
    if number not in ("", "0") and (ranks > 1 or fast_sampler(cfg)):
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


def check_name(cfg):
    """Checks --name and --out as names of folders.

    Raises ValueError if a file system can't hold them, or if --name leads out of --out.
    """
    for flag, text in (("name", cfg.name), ("out", str(cfg.out))):
        if not text.isprintable() or any(len(os.fsencode(part)) > 200 for part in text.split("/")):
            raise ValueError(
                f"--{flag} {text[:60]!r} is no name for a folder: use up to 200 printable"
                " characters"
            )
    name = Path(cfg.name)
    if cfg.name and (name.is_absolute() or ".." in name.parts or not name.parts):
        raise ValueError(
            f"--name {cfg.name!r} is no folder under --out {cfg.out}; give --out the place and"
            " --name the run"
        )


def check_folder(cfg, method, quiet):
    """Checks the place where the run is written, and the run that it goes on from.

    Raises ValueError if the folder can't be written, or is not that of the run that --resume means.
    """
    check_name(cfg)
    folder = Path(cfg.out) / (cfg.name or default_name(cfg))
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not yours to write to" if there.is_dir() else "is a file"
        raise ValueError(f"{folder} can't be made: {there} {why}; give another --out or --name")
    if cfg.name and not cfg.resume and folder.exists():
        raise ValueError(f"{folder} exists; add --resume to continue it or choose another --name")
    if cfg.name and folder.exists() and rank() == 0:
        refuse_second_writer(folder)
    if cfg.resume:
        refuse_other_flags(folder, cfg, quiet)
        refuse_runs_inside(folder)
    if begins_as_fork(cfg):
        check_fork(cfg, method)


def refuse_runs_inside(folder):
    """Raises ValueError if a folder holds runs, as a comparison's does, and is no run itself."""
    inside = sorted(path.parent.name for path in folder.glob("*/problems.json"))
    if inside and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is no run: it holds {', '.join(inside)}; add the --compare that it was made"
            " with, or go on with one of them"
        )


def begins_as_fork(cfg) -> bool:
    """Whether the run goes on from the checkpoint of --from, not from one of its own."""
    return bool(cfg.fork_from) and starting_point(cfg) == fork_source(cfg)


def check_fork(cfg, method):
    """Checks the run that --from names.

    Raises ValueError if it has no such checkpoint, no memory of its own, or another model.
    """
    fork = fork_source(cfg)
    folder = fork.parent.parent
    if not fork.is_dir():
        kept = ", ".join(c.name for c in checkpoints(folder)) or "none"
        raise ValueError(
            f"--from {cfg.fork_from} is no RUN@STEP with a checkpoint: there is no {fork}; kept"
            f" there: {kept}"
        )
    forked = read_json(folder / "config.json", "it says which model the checkpoint is of")
    if forked.get("memory_from") and method.remembers:  # of whatever method
        raise ValueError(
            f"--from {cfg.fork_from} has the memory of another run, whose steps are not its own, so"
            f" that --method {cfg.method} can't go on writing it; fork the run that wrote it"
        )
    then = forked.get("lora_rank", 0)
    if then != cfg.lora_rank:
        raise ValueError(
            f"--from {cfg.fork_from} was trained with --lora_rank {then}, and its weights are none"
            f" of --lora_rank {cfg.lora_rank}; give the same"
        )
    model = forked.get("model", "")
    if weights_of(model) != weights_of(cfg.model):
        raise ValueError(
            f"--from {cfg.fork_from} has a teacher from --model {model}, which can't teach a"
            f" student from {cfg.model}; give the same"
        )


def weights_of(model):
    """Returns the place of a model's weights: a folder without symbolic links, or a Hub name."""
    if model in MODELS:
        return MODELS[model]
    return Path(model).resolve() if Path(model).is_dir() else model


def load_problems(cfg, quiet, asked):
    """Returns (task, tokenizer): the problems within --max_prompt, and the model's tokenizer.

    asked: the splits that are looked at.
    Raises ValueError if there is no such task or model, or if no problem is left.
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
    sandboxed = need_sandbox(task, cfg.unsafe_exec, asked)
    tokenizer = load_tokenizer(cfg)
    splits = {split: within_prompt(task, split, tokenizer, cfg, quiet) for split in asked}
    remarks = [task.card, sandboxed]
    unknown = share_unknown(tokenizer, next(filter(None, splits.values()), []))
    if unknown > MOST_UNKNOWN:
        remarks.append(
            f"{cfg.model} does not know {unknown:.0%} of the words of these problems, and can learn"
            " nothing from them; give another --model"
        )
    has_system = any(p.system for problems in splits.values() for p in problems)
    if has_system and not chat_of(tokenizer).takes_system:
        remarks.append(
            f"{cfg.model}'s chat template takes no system message: it is put before the user's, in"
            " the user's message."
        )
    return replace(task, card="\n".join(filter(None, remarks)), **splits), tokenizer


def share_unknown(tokenizer, problems) -> float:
    """Gives the share of tokens of the first hundred problems that are the unknown one."""
    ids = [i for p in problems[:100] for i in tokenizer(p.prompt)["input_ids"]]
    return ids.count(tokenizer.unk_token_id) / max(1, len(ids))


def unreadable(cfg, part, error) -> ValueError:
    return ValueError(
        f"the {part} of --model {cfg.model} can't be read ({reason(error)}); name the folder of a"
        " whole model, such as RUN/final"
    )


def load_tokenizer(cfg):
    """Loads the tokenizer of --model.

    Raises ValueError if it can't be loaded, or if it is not that of a chat model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(MODELS.get(cfg.model, cfg.model))
    except Exception as error:  # of a file that is no JSON, or holds what nobody expects
        if isinstance(error, OSError) and not Path(cfg.model).is_dir():
            raise ValueError(
                f"--model {cfg.model} is neither a Hugging Face folder nor a reachable name on the"
                " Hub"
            ) from error
        raise unreadable(cfg, "tokenizer", error) from error
    for need in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, need) is None:
            raise ValueError(
                f"the tokenizer of {cfg.model} has no {need}; use a chat model, or add it to the"
                " folder's tokenizer_config.json"
            )
    chat_of(tokenizer)  # these two refuse a template that can't be read
    turn_ends(tokenizer)
    if cfg.thinking and not can_think(tokenizer):
        raise ValueError(
            f"--thinking has nothing to switch in the chat template of {cfg.model}; leave it out"
        )
    if tokenizer.pad_token_id is None:
        # it only fills the left of a batch: masks come from lengths
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def within_prompt(task, split, tokenizer, cfg, quiet) -> list:
    """Returns the problems of a split within --max_prompt, and prints the others.

    Raises ValueError if none is left.
    """
    problems, encode = getattr(task, split), encoder(tokenizer, cfg)
    kept, dropped = [], []
    for problem in problems:
        length = len(encode(problem.prompt, problem.system))
        if length <= cfg.max_prompt:
            kept.append(problem)
        else:
            dropped.append(problem.id)
    if dropped and not quiet:
        print(
            f"{split}: {len(dropped)} problems dropped, longer than {cfg.max_prompt} tokens:"
            f" {', '.join(dropped)}"
        )
    if problems and not kept:
        raise ValueError(
            f"no {split} problem of {cfg.task} is left within --max_prompt {cfg.max_prompt} tokens"
        )
    return kept


def check_problems(task, cfg):
    """Checks flags against the problems.

    Raises ValueError if --mcq is for other problems.
    """
    if cfg.mcq == "lenient" and task.test[0].verifier != "choice":
        raise ValueError(f"--mcq lenient is for multiple choice, which {cfg.task} is not")


def check_training(task, tokenizer, cfg):
    """Checks the training problems against the flags and the run that is gone on with.

    Raises ValueError if there are too few, if a resumed run had others, or if no step is left.
    """
    if not task.train:
        raise ValueError(f"--dev {cfg.dev} leaves no training problem of {cfg.task}; lower it")
    if len(task.train) < cfg.batch_size:
        raise ValueError(
            f"--batch_size {cfg.batch_size} is more than the {len(task.train)} training problems of"
            f" {cfg.task}"
        )
    if cfg.resume:
        refuse_other_problems(Path(cfg.out) / cfg.name, task, tokenizer)
    saved = starting_point(cfg)
    total = total_steps(task.train, cfg)
    if saved and total < int(saved.name):
        raise ValueError(
            f"--{'steps' if cfg.steps else 'epochs'} {cfg.steps or cfg.epochs} ends at step"
            f" {total}, before {saved}, which this run goes on from; raise it"
        )


def check_memory(task, method, cfg):
    """Checks the memory that is read or gone on with, its embedder, and the writer of behaviors.

    Raises ValueError if one of them is of no use.
    """
    path, known = Path(cfg.out) / cfg.name / "memory.db", {}
    has_memory = cfg.resume and path.exists()
    if has_memory and method.remembers:
        with contextlib.suppress(ValueError, OSError):  # open_memory knows a cure for a damaged one
            known = prompts_in(path, cfg)
        check_prompts(known, f"{path} is", "put the run's own back", task)
    if not has_memory:  # a run keeps a copy of the memory that it began with
        if cfg.memory_from:
            check_lender(cfg, task)
        if begins_as_fork(cfg) and method.remembers:
            known = prompts_in(fork_source(cfg) / "memory.db", cfg)
            cure = "give the same --task, or start without --from"
            check_prompts(known, f"--from {cfg.fork_from} has", cure, task)
    if method.memory_mode and rank() == 0:  # whose memory it is
        make_embedder(cfg)
    if method.remembers:
        make_abstractor(cfg, check=True)


def check_format(task, tokenizer, cfg):
    """Checks --memory_format against the model.

    Raises ValueError if the model can't be asked in that form.
    """
    if cfg.memory_format != "json" and task.train[0].verifier == "steps":
        raise ValueError(
            f"--memory_format {cfg.memory_format} is for models that read plain language, and nano"
            " reads its own sentences; leave the flag out"
        )
    if cfg.memory_format == "guided":
        try:
            reader_of(tokenizer, len(tokenizer))
        except ValueError as error:
            raise ValueError(
                f"--memory_format guided can't follow the tokenizer of {cfg.model}"
                f" ({str(error)[:100]}); use json or lines"
            ) from error


def prompts_in(path, cfg) -> dict[str, str]:
    """Returns {id: text} of the problems in a memory; nothing where there is no file."""
    if not path.is_file():
        return {}
    with contextlib.closing(Store(path, embedder=cfg.embedder, frozen=True)) as memory:
        return memory.prompts()


def check_prompts(known, whose, cure, task):
    """Checks the problems of the memory that a run goes on writing: its own, or that of --from.

    known: see prompts_in; nothing is in it where the run was killed before its problems came in.
    whose, cure: the beginning and the end of what is said.
    Raises ValueError if it is the memory of other problems.
    """
    if not known:
        return
    unknown = [p.id for p in task.train if p.id not in known]
    if unknown:
        raise ValueError(
            f"{whose} a memory that does not know {len(unknown)} of the training problems, such as"
            f" {unknown[0]}; {cure}"
        )
    others = known_otherwise(task.train, known)
    if others:
        raise ValueError(
            f"{whose} the memory of another task: {len(others)} training problems have other texts"
            f" in it, such as {others[0]!r}; {cure}"
        )


def check_lengths(task, tokenizer, cfg, reads, method):
    """Checks prompts and replies against the model's positions, and --top_k against its vocabulary.

    Raises ValueError if there are too few of either.
    """
    try:
        # of a model that reads pictures, too, the part that reads text
        shape = AutoConfig.from_pretrained(MODELS.get(cfg.model, cfg.model)).get_text_config()
    except (OSError, ValueError) as error:
        raise unreadable(cfg, "config.json", error) from error
    vocabulary = getattr(shape, "vocab_size", None)
    if vocabulary and cfg.top_k > vocabulary:
        raise ValueError(
            f"--top_k {cfg.top_k} is more than the {vocabulary} tokens of {cfg.model}; 0 takes all"
            " of them"
        )
    taught = method is not None and method.reprompts
    if taught and cfg.max_reprompt < cfg.max_prompt:
        encode = encoder(tokenizer, cfg)
        longest = max(len(encode(p.prompt, p.system)) for p in task.train)
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
        if method.remembers or method.asks:
            writes = max(writes, cfg.memory_completion)
    if positions and reads + writes > positions:
        cure = "a lower --max_completion"
        if cfg.max_prompt + writes <= positions:
            cure = f"--max_reprompt {positions - writes}"
        raise ValueError(
            f"{cfg.model} has {positions} positions, and a prompt of {reads} tokens with a reply of"
            f" {writes} needs more; give {cure}"
        )


def check_fits(cfg, ranks, quiet):
    """Checks whether the model fits on the GPUs, by runtime/plan.py.

    Raises ValueError if it does not.
    """
    if device_of(cfg).type != "cuda":
        return
    card = torch.cuda.get_device_properties(device_of(cfg)).total_memory / 2**30
    share = cfg.gpu_memory_utilization if fast_sampler(cfg) else 0
    try:
        fine, sentence = fits(cfg, MODELS.get(cfg.model, cfg.model), ranks, card, share)
    except Exception as error:
        # the layers of some architectures can't be traced, and may train all the same
        fine, sentence = True, ""
        if not quiet:
            print(
                f"whether {cfg.model} fits could not be computed: {type(error).__name__}: {error}"
            )
    if not fine:
        raise ValueError(sentence)


def known_otherwise(problems, prompts) -> list[str]:
    """Returns the ids of problems that a memory has with another text.

    Ids may be mere numbers, which other tasks have, too. prompts: {id: text} of the memory.
    """
    return [p.id for p in problems if plain(prompts[p.id]) != plain(p.prompt)]


def check_lender(cfg, task):
    """Checks the memory that --memory_from names.

    Raises ValueError if it is not of this task, or holds nothing at its step.
    """
    source, step = memory_source(cfg)
    if not source.is_file() or step and not step.isdecimal():
        raise ValueError(
            f"--memory_from {cfg.memory_from} is neither RUN nor RUN@STEP: there is no {source}, or"
            " the step is no number"
        )
    with contextlib.closing(Store(source, embedder=cfg.embedder, frozen=True)) as lent:
        prompts, last = lent.prompts(), lent.last_step()
        steps = min(int(step or last), last)  # more may be asked for: see below
        empty = not lent.holds(steps)
    shared = [p for p in task.train if p.id in prompts]
    if not shared:
        raise ValueError(
            f"{source} is the memory of another task: it knows none of the problems of {cfg.task}"
        )
    others = known_otherwise(shared, prompts)
    if others:
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
