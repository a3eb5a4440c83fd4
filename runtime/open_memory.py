"""Opens the memory of a run: a new one, the run's own, a lender's, or that of a checkpoint."""

import contextlib
import shutil
from dataclasses import replace

from runtime.chat import chat_of, encode_prompt, neutralise
from runtime.checkpoint import cure_without, memory_source
from runtime.errors import RunError
from runtime.ranks import OnRankZero, rank, world
from runtime.services import make_abstractor, make_embedder
from runtime.store import Store

# memory.FORMS by a task's verifier; "question" for all others
FORMS_OF = {"steps": "nano", "code": "code"}


def open_memory(run, method):
    """Opens the memory of a run. On several ranks it is rank 0's, behind OnRankZero.

    run: a runtime.run.Run. method: a pmd.PMD.
    """
    sampler = method.sampler
    if world() == 1:
        return memory_of(run, method, sampler.ask)
    memory = memory_of(run, method, OnRankZero.generator(sampler)) if rank() == 0 else None
    return OnRankZero(memory, sampler)


def memory_of(run, method, generate):
    """Opens the memory of a run in this process. generate: asks the policy; see memory.Memory."""
    cfg, problems = method.cfg, method.task.train
    if not method.memory_mode:  # nothing is remembered, so nothing is embedded
        embed = make_embedder(replace(cfg, embedder="hashing"))
        return method.memory_class()(":memory:", embed, None)
    path = run.folder / "memory.db"
    if not path.exists():
        take_memory(path, run, method)

    def fits(prompt):
        return len(encode_prompt(method.tokenizer, prompt)) <= cfg.max_reprompt

    try:
        memory = method.memory_class()(
            path,
            make_embedder(cfg),
            generate,
            guarded(make_abstractor(cfg), method.tokenizer),
            forms=FORMS_OF.get(problems[0].verifier, "question"),
            format=cfg.memory_format,
            embedder=cfg.embedder,
            mode=method.memory_mode,
            drop_shortcuts=cfg.drop_shortcuts,
            query_feedback=cfg.query_feedback,
            max_insights=cfg.max_insights,
            clusters=cfg.clusters,
            retrieve_k=cfg.retrieve_k,
            seed=cfg.seed,
            fits=fits,
        )
    except ValueError as error:
        copy = f"; the same command then takes the copy in {run.saved}" if run.saved else ""
        raise RunError(f"{error}{copy}") from error
    if method.remembers:
        memory.add_problems(problems)
    return memory


def guarded(abstractor, tokenizer):
    """Breaks control tokens and turn markers in what another model is asked, as in all prompts.

    They are those of the policy's template, which the completions in the prompt may hold.
    """
    if not abstractor:
        return None
    markers = chat_of(tokenizer).markers
    return lambda prompts: abstractor([neutralise(prompt, markers) for prompt in prompts])


def take_memory(path, run, method):
    """Copies the memory that a run begins with to `path`: a lender's, or that of a checkpoint.

    The run keeps its copy when the other is gone.
    Raises RunError if a checkpoint's file is no memory.
    """
    partial = path.with_name("memory.partial")
    for log in ("memory.db-wal", "memory.db-shm"):  # of a file that is gone, not of its successor
        path.with_name(log).unlink(missing_ok=True)
    if method.memory_mode == "frozen":
        source, step = memory_source(method.cfg)
        partial.unlink(missing_ok=True)
        with contextlib.closing(Store(source, frozen=True)) as lent:
            lent.copy_to(partial)
        with contextlib.closing(Store(partial)) as copied:
            copied.truncate_after(int(step or 10**9))
        partial.rename(path)
    elif run.saved and (run.saved / "memory.db").exists():
        # the run is a fork, or has lost its file
        source = run.saved / "memory.db"
        shutil.copy(source, partial)
        try:
            Store(partial, frozen=True).close()
        except (OSError, ValueError) as error:
            cure = cure_without(run.saved, run.folder)
            raise RunError(f"{source} can't be used as a memory: {cure}") from error
        partial.rename(path)
