"""Measures whether a model reads its memory: what each block of the teacher's prompt does to the
log-probability of right and of failed completions.

    python tools/reads.py --model nano --memory runs/x
    python tools/reads.py --model runs/x/final --memory runs/x --problems 128

The problems are training problems of the run RUN that have a right and a failed completion in its
memory. Each completion is scored under the plain prompt, and under the prompt with one block of
what RUN's teacher would read at the end of the run: strategies, lessons, behaviors, the solution,
feedback, and all of them. A block that is read raises right completions above failed ones. A
teacher that reads a block the wrong way round pulls its student towards what failed.

The solution is another success, if there is one. Otherwise it is the completion itself, which a
model only has to copy. Numbers are in nats per completion, means over problems, with 95% bootstrap
intervals over problems (on nano over names). Completions are tokenised anew from their text,
without the token that ends a turn.
"""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors import SafetensorError
from tqdm import tqdm

import pmd
from eval import interval, names, some_of
from memory import as_context, reprompt
from runtime.chat import encoder
from runtime.check import check_device, load_problems
from runtime.files import read_json
from runtime.jobs import quiet_libraries
from runtime.model import load_policy
from runtime.rows import Continuation, scored
from runtime.store import Store, nearest
from runtime.tables import aligned
from tasks.references import hidden_rules, reference

BLOCKS = ("strategies", "lessons", "behaviors", "solution", "feedback")
ALL = "all blocks"
WARNED = "lessons, on what they warn of"
ENOUGH = 8  # problems; of fewer nothing is said
COMPLETIONS = 2  # right ones, and as many failed ones, of a problem: the newest


@dataclasses.dataclass
class Completion:
    """Holds a completion of a problem, and the lessons that were written from it, if it failed."""

    text: str
    feedback: str = ""
    warned_by: tuple = ()


def config_of(run, model, device):
    """Makes the options of the run RUN for another model.

    Raises ValueError if RUN is no run.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"--memory {run} is no run: it has no config.json")
    known = {f.name for f in dataclasses.fields(pmd.Config)}
    values = {k: v for k, v in read_json(path, "name another run").items() if k in known}
    cfg = pmd.Config(**values)
    return dataclasses.replace(
        cfg,
        model=model,
        device=device,
        gradient_checkpointing=False,
        nproc=1,
        sampler="transformers",  # nothing is sampled
    )


def attempts_of(store, problem) -> tuple[list, list]:
    """Reads a problem's right and failed completions, the newest first, those that ended included.

    Of a problem of nano that was never solved, the right one is made from its hidden operations.
    """
    warned_by = {}
    for lesson in store.living("insight", problem.id):
        if lesson.kind == "lesson":
            for source in lesson.sources:
                warned_by[source] = (*warned_by.get(source, ()), lesson.id)
    right, failed = [], []
    rows = store.query(
        "SELECT id, kind, text, feedback FROM item WHERE tier = 'experience' AND problem = ?"
        " ORDER BY id DESC",
        problem.id,
    )
    for id, kind, text, feedback in rows:
        completion = Completion(text, feedback or "", warned_by.get(id, ()))
        (right if kind == "success" else failed).append(completion)
    if hidden_rules(problem) and not right:
        right.append(Completion(reference(problem)))
    return right, failed


def blocks_of(insights, behaviors, completion, right, failed) -> dict:
    """Makes the contexts to compare for a completion: {block: arguments of memory.compose}."""
    others = [other.text for other in right if other.text != completion.text]
    heard = [other.feedback for other in [completion, *failed] if other.feedback]
    everything = as_context(insights, behaviors)
    everything["solution"] = [*others, right[0].text][0]
    everything["feedback"] = [*heard, ""][0]
    contexts = {block: {block: everything[block]} for block in BLOCKS if everything[block]}
    if completion.warned_by and "lessons" in contexts:
        contexts[WARNED] = contexts["lessons"]
    return contexts | {ALL: everything}


def rows_of(store, problem, tokenizer, cfg) -> list[Continuation]:
    """Lays out a problem's completions under each of the prompts.

    A row's id: problem, right or failed, number, block.
    """
    right, failed = attempts_of(store, problem)
    if not right or not failed:
        return []
    insights = store.living("insight", problem.id)
    bank = store.living("behavior")
    (behaviors,) = nearest(store.question_vectors([problem]), bank, cfg.retrieve_k)
    rows = []
    for verdict, completions in (("right", right), ("failed", failed)):
        for number, completion in enumerate(completions[:COMPLETIONS]):
            ids = tokenizer(completion.text, add_special_tokens=False)["input_ids"]
            contexts = blocks_of(insights, behaviors, completion, right, failed)
            for block, context in {"": {}, **contexts}.items():
                text = reprompt(problem, context, tokenizer, cfg)
                prompt_ids = encoder(tokenizer, cfg)(text, problem.system)
                key = problem.id, verdict, number, block
                rows.append(Continuation(key, ids[: cfg.max_completion], prompt_ids))
    return [row for row in rows if row.ids]


def measure(policy, tokenizer, store, problems, cfg) -> list[dict]:
    """Scores completions: {"problem", "block", "verdict", "without", "with"}, in nats.

    Means over the completions of a problem. verdict: right or failed.
    """
    changes = {}
    for problem in tqdm(problems, unit="problem", dynamic_ncols=True, disable=None):
        rows = rows_of(store, problem, tokenizer, cfg)
        found = scored(policy, rows, lambda row: row.prompt_ids, cfg) if rows else {}
        totals = {id: float(logprobs.sum()) for id, (logprobs, _) in found.items()}
        for (id, verdict, number, block), total in totals.items():
            if block:
                plain = totals[id, verdict, number, ""]
                changes.setdefault((id, block, verdict), []).append((plain, total))
    lines = []
    for (id, block, verdict), pairs in changes.items():
        plain, total = np.mean(pairs, axis=0)
        line = {"problem": id, "block": block, "verdict": verdict}
        lines.append(line | {"without": plain, "with": total})
    return lines


def summed_up(lines, task) -> tuple[list[dict], list[str]]:
    """Makes the rows of the table, and a sentence for each block.

    A problem counts for a block where it has a right and a failed completion beside that block. For
    the failed completions that lessons warn of, it needs only those.
    """
    rows, sentences = [], []
    for block in (*BLOCKS, WARNED, ALL):
        values = {}
        for line in lines:
            if line["block"] == block:
                pair = line["without"], line["with"]
                values.setdefault(line["problem"], {})[line["verdict"]] = pair
        wanted = {"failed"} if block == WARNED else {"right", "failed"}
        problems = [id for id, found in values.items() if wanted <= found.keys()]
        row, changes = {"block": block, "problems": f"{len(problems)}"}, {}
        groups = names(task, problems)
        for verdict in ("right", "failed"):
            if verdict not in wanted or not problems:
                row |= {f"{verdict}: without, with": "", f"{verdict}: change": ""}
                continue
            pairs = np.array([values[id][verdict] for id in problems])
            changes[verdict] = pairs[:, 1] - pairs[:, 0]
            plain, total = pairs.mean(axis=0)
            row[f"{verdict}: without, with"] = f"{plain:.2f}, {total:.2f}"
            row[f"{verdict}: change"] = written(changes[verdict], groups)
        difference = ""
        if len(changes) == 2:
            difference = written(changes["right"] - changes["failed"], groups)
        rows.append(row | {"right - failed": difference})
        sentences.append(f"{block}: {meaning(block, changes, groups)}.")
    return rows, sentences


def written(changes, groups) -> str:
    """Writes a mean change with its interval."""
    ends = interval(changes, groups)
    text = f"{np.mean(changes):+.2f}"
    return f"{text} [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else text


def meaning(block, changes, groups) -> str:
    """Says in one sentence what a block does to its reader."""
    n = len(changes.get("failed", ()))
    if n < ENOUGH or interval(changes["failed"], groups) is None:
        return f"{n} problems are too few to say anything"
    low, high = interval(changes["failed"], groups)
    failed = "the model leaves failed completions where they were"
    if low > 0:
        failed = "the model finds failed completions MORE likely beside it"
    if high < 0:
        failed = "the model finds failed completions less likely beside it"
    if block == WARNED:
        return failed
    low, high = interval(changes["right"] - changes["failed"], groups)
    if low > 0:
        return f"read, it tells right completions from failed ones; {failed}"
    if high < 0:
        return f"MISREAD, it favours failed completions over right ones; {failed}"
    return f"not read, it favours neither; {failed}"


def report(model, run, limit, device) -> str:
    """Measures a model on a run's memory; returns the table and the sentences.

    Raises ValueError if the run, its memory or its problems can't be used.
    """
    run = run.parent if run.name == "memory.db" else run
    cfg = config_of(run, model, device)
    check_device(cfg, 1)
    task, tokenizer = load_problems(cfg, True, ("train",))
    with contextlib.closing(Store(run / "memory.db", frozen=True)) as store:
        remembered = set(store.prompts())
        problems = []
        for problem in task.train:
            if problem.id in remembered and all(attempts_of(store, problem)):
                problems.append(problem)
        if not problems:
            raise ValueError(
                f"the memory of {run} holds no training problem with a right and a failed"
                " completion; name a run that has solved some of its problems, not all at once"
            )
        asked = some_of(problems, limit)
        policy = load_policy(cfg)
        lines = measure(policy, tokenizer, store, asked, cfg)
    rows, sentences = summed_up(lines, cfg.task)
    head = (
        f"{model} reads the memory of {run}: {len(asked)} of {len(problems)} problems with right"
        " and failed completions; nats a completion"
    )
    return "\n".join([head, "", aligned(rows), "", *sentences])


def main(argv=None):
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/reads.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = "a Hugging Face folder or name, or nano, the embedded model"
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument("--memory", required=True, type=Path, metavar="RUN", help="a run's folder")
    limit = "at most so many problems, drawn once (default: 64); 0 for all"
    parser.add_argument("--problems", type=int, default=64, help=limit)
    parser.add_argument(
        "--device", default="", help="cpu, cuda, ... (default: cuda if there is one)"
    )
    args = parser.parse_args(argv)
    if args.problems < 0:
        parser.error(f"--problems {args.problems} must be at least 0")
    quiet_libraries()
    try:
        print(report(args.model, args.memory, args.problems, args.device))
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"reads.py: {error}")


if __name__ == "__main__":
    main()
