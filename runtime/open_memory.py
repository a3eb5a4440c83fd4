"""Opens the memory of a run: a new one, the run's own, a lender's, or that of a checkpoint."""

import contextlib
from dataclasses import replace

from runtime.chat import encode_prompt
from runtime.checkpoint import memory_source
from runtime.files import RunError
from runtime.ranks import OnRankZero, rank, world
from runtime.services import make_abstractor, make_embedder
from runtime.store import Store

FORMS_OF = {
    "steps": "nano",
    "code": "code",
}  # memory.FORMS by a task's verifier; "question" for all others


def open_memory(run, method):
    """The memory of a run; on several ranks, rank 0's behind OnRankZero. run: see runtime/run.py.
    method: a pmd.PMD.
    """
    sampler = method.sampler
    if world() == 1:
        return memory_of(run, method, sampler.ask)
    memory = memory_of(run, method, OnRankZero.generator(sampler)) if rank() == 0 else None
    return OnRankZero(memory, sampler)


def memory_of(run, method, generate):
    cfg, problems = method.cfg, method.task.train
    if not method.memory_mode:  # nothing is remembered, so nothing is embedded
        return method.memory_class()(
            ":memory:", make_embedder(replace(cfg, embedder="hashing")), None
        )
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
            make_abstractor(cfg),
            forms=FORMS_OF.get(problems[0].verifier, "question"),
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


def take_memory(path, run, method):
    """Puts a copy of the memory that a run begins with at `path`: a lender's, or that of a
    checkpoint; or nothing.

    A copy, for the run resumes when the other is gone.
    """
    aside = path.with_name("memory.partial")
    if method.memory_mode == "frozen":
        source, step = memory_source(method.cfg)
        aside.unlink(missing_ok=True)
        with contextlib.closing(Store(source, frozen=True)) as lent:
            lent.copy_to(aside)
        with contextlib.closing(Store(aside)) as copied:
            copied.truncate_after(int(step or 10**9))
        aside.rename(path)
    elif (
        run.saved and (run.saved / "memory.db").exists()
    ):  # of a fork, or of a run that lost its file
        run.take_memory(aside)
        aside.rename(path)
