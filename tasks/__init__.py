"""Tasks: what a problem is, where problems come from, when an answer is right. One file a
benchmark.

    load_task(name)             -> Task(train, dev, test)
    verify(problem, completion) -> Verdict(reward, feedback): one function for training and
    evaluation alike

A task is a folder with `train.jsonl` and `test.jsonl`, one JSON object a line, or the same rows as
`.parquet`:

    id        text, unique in its file
    prompt    the user message
    answer    what the verifier compares with (for `code`: instead of it, inputs, outputs and
              perhaps fn_name, see judge)
    verifier  a name in VERIFIERS
    system    the system message (optional)

What can't work is refused by line: a key that no reply can match, half a surrogate pair in any
text. All other keys are kept in `Problem.extra`, out of every prompt. `nano` is the embedded task,
whose verifier says which step went wrong, `nano/plain` the same with a silent one, `nano/7` and
`nano/plain/7` other worlds (`python nano/make.py world --seed 7`), `sciknoweval/chemistry` a domain
of SciKnowEval in SDPO's files or from the Hub, `livecodebench` a window of LiveCodeBench in its
official files, `gym/NAME` a task of reasoning-gym, a file's path or a name on the Hub a table with
the usual columns (tasks/table.py), a path any folder of yours.
"""

import random
import sys
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from runtime.options import option
from tasks.gym import load_gym
from tasks.livecodebench import WINDOW, load_livecodebench
from tasks.nano import task_folder
from tasks.problem import Problem, Task, Verdict  # noqa: F401
from tasks.reading import read_problems
from tasks.sandbox import allow_unsafe_exec, sandbox_command
from tasks.sciknoweval import load_sciknoweval
from tasks.table import is_table, load_table_task
from tasks.verdicts import VERIFIERS, verify, verify_all  # noqa: F401

SHALLOW = (
    "Python {}.{} fails programs that recurse some hundreds or thousands of calls deep through"
    " functools.cache. Python 3.11 runs them."
)


@dataclass
class TaskOptions:
    """The problems, and how an answer to one is verified."""

    task: str = option(
        "",
        "nano, nano/plain (the same without feedback), nano/SEED, nano/plain/SEED,"
        " sciknoweval/DOMAIN, livecodebench, gym/NAME of reasoning-gym, a folder with train.jsonl"
        " and test.jsonl, a jsonl, json, csv or parquet file, or OWNER/NAME on the Hub (default:"
        " nano with nano, sciknoweval/chemistry with any other model)",
    )
    data: str = option(
        "",
        "for sciknoweval: the folder with DOMAIN/train.json and test.json, as in SDPO's repository;"
        " for livecodebench: the official file or a folder of such; empty for the Hub (not run)",
    )
    dev: float = option(
        0.1,
        "share of the training problems held out to select checkpoints on; 0 for none [ours]",
        within="[0, 1)",
    )
    max_prompt: int = option(
        2048,
        "maximum tokens of a problem's prompt; longer problems are dropped and listed [Tab. 11]",
        within="[1, inf)",
    )
    exclude_flagged: bool = option(
        False, "sciknoweval: leave out the items that the data card flags [ours]"
    )
    mcq: Literal["sdpo", "lenient"] = option(
        "sdpo",
        "how an answer to multiple choice is read. sdpo: the bare letter [SDPO]. lenient: also `b`,"
        " `(B)`, `\\boxed{B}`; reported apart [ours]",
    )
    protocol: Literal["sdpo", "older", "official"] = option(
        "sdpo",
        "livecodebench: what is trained on. sdpo: half of the hidden tests of the window's problems"
        " [SDPO, C.2]. older: the problems before the window [probably Tab. 10's 924]. official:"
        " the public tests, with prompts in the official form",
    )
    since: str = option(
        WINDOW[0], "livecodebench: the first day of the window that is evaluated [SDPO]"
    )
    until: str = option(WINDOW[1], "livecodebench: the day after the window's last day [SDPO]")
    unsafe_exec: bool = option(
        False, "run generated programs unprotected if no sandbox can be made [ours]"
    )


def load_task(
    name,
    dev=0.1,
    seed=42,
    data="",
    protocol="sdpo",
    since=WINDOW[0],
    until=WINDOW[1],
    exclude_flagged=False,
) -> Task:
    """Loads a task by its name, a file, a folder or a dataset of the Hub: see the option `task`.

    dev: the share of the training split that is held out, by `seed`, to select checkpoints on. The
    seed is that of SDPO's own splits.
    data: for sciknoweval, the folder that holds DOMAIN/train.json and test.json as SDPO publishes
    them, or a copy of the Hub's repository. For livecodebench, the official file or a folder of
    such. Empty for the Hub.
    protocol, since, until: of livecodebench.
    exclude_flagged: of sciknoweval, leaves out what `defects` finds.

    Raises ValueError, in one sentence, if the task or a file can't be used.
    """
    if not 0 <= dev < 1:
        raise ValueError(
            f"dev={dev} is not a share of the training split: it must be at least 0 and below 1"
        )
    if name != "livecodebench" and (protocol, since, until) != ("sdpo", *WINDOW):
        raise ValueError(f"--protocol, --since and --until are for livecodebench, not for {name}")
    if exclude_flagged and not name.startswith("sciknoweval/"):
        raise ValueError(f"--exclude_flagged is for sciknoweval: nothing is flagged in {name}")
    card = ""
    if name == "livecodebench":
        name, train, test = load_livecodebench(data, protocol, since, until)
    elif name.startswith("sciknoweval/"):
        name, train, test, card = load_sciknoweval(name, data, exclude_flagged)
    elif name.startswith("gym/"):
        train, test, card = load_gym(name)
    elif is_table(name):
        train, test, card = load_table_task(name)
    else:
        folder = task_folder(name)
        train = read_problems(folder / "train.jsonl")
        test = read_problems(folder / "test.jsonl")
        shared = {p.prompt for p in train} & {p.prompt for p in test}
        if shared:
            card = (
                f"WARNING: {len(shared)} problems of {name} stand in train.jsonl and in test.jsonl:"
                " scores on them say what was learned by heart; take them out of one"
            )
    chosen = set(random.Random(seed).sample(range(len(train)), round(dev * len(train))))
    held_out = [train[i] for i in sorted(chosen)]
    rest = [p for i, p in enumerate(train) if i not in chosen]
    return Task(name, rest, held_out, test, card)


def need_sandbox(task, unsafe_exec=False, splits=("train", "dev", "test")) -> str:
    """Looks for a sandbox where the answers to a task's problems are programs.

    splits: those whose answers are verified.
    Returns what to tell of it, or "". Raises ValueError, in one sentence, if there is none.
    """
    problems = chain(*(getattr(task, split) for split in splits))
    if not any(p.verifier == "code" for p in problems):
        return ""
    if unsafe_exec:
        allow_unsafe_exec()
    else:
        sandbox_command()
    version = sys.version_info[:2]
    return SHALLOW.format(*version) if version in ((3, 12), (3, 13)) else ""
