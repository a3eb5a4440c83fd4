"""Computes the numbers of a training step, a row of metrics.jsonl: see docs/metrics.md."""

import dataclasses
import hashlib
import resource
from pathlib import Path

import torch

from runtime.checkpoint import batches_per_epoch
from runtime.clock import clock
from tasks.problem import SUCCESS
from tasks.references import hidden_rules

KEYWORDS = ("strategy", "lesson", "behavior")  # counted in completions (Fig. 5)
# A mean of an update's sums: the name of the sum, and the count that it is divided by.
MEANS = {
    "divergence": "distilled_tokens",
    "teacher_entropy": "distilled_tokens",
    "entropy": "tokens",
    "clipped": "reinforced_tokens",
    "loss": "updates",
    "grad_norm": "updates",
}


FORWARD = ("sample", "reflect", "student", "teacher")  # the clocks whose tokens a method pays for


def step_metrics(step, rollouts, sums, passed, memory, problems, cfg) -> dict:
    """Returns the row of a step.

    sums: of pmd.update. passed: of clock.passed, over all ranks. problems: those of the training
    set.
    """
    metrics = {
        "step": step,
        "epoch": (step - 1) // batches_per_epoch(problems, cfg),
        "rollouts": step * len(rollouts),
    }
    metrics |= attempt_metrics(rollouts) | update_metrics(sums)
    metrics["forward_tokens"] = {name: passed[name] for name in FORWARD if passed[name]}
    metrics |= memory_metrics(memory, step, problems)
    return metrics | time_metrics(sum(len(r.ids) for r in rollouts))


def attempt_metrics(rollouts) -> dict:
    """Returns the metrics of a batch of rollouts."""
    n = len(rollouts)
    problems = {r.problem.id for r in rollouts}
    solved = {r.problem.id for r in rollouts if r.reward >= SUCCESS}
    metrics = {
        "reward": sum(r.reward for r in rollouts) / n,
        "groups_solved": len(solved) / len(problems),
        "truncated": sum(not r.finished for r in rollouts) / n,
        "completion_tokens": sum(len(r.ids) for r in rollouts) / n,
        "teacher_active": sum(bool(r.teacher_prompt) for r in rollouts) / n,
    }
    rates = [r.test_pass_rate for r in rollouts if r.test_pass_rate is not None]
    if rates:
        metrics["test_pass_rate"] = sum(rates) / len(rates)
    texts = [r.text.lower() for r in rollouts]
    counts = {word: sum(word in text for text in texts) for word in KEYWORDS}
    return metrics | {"keywords": {word: count / n for word, count in counts.items()}}


def update_metrics(sums) -> dict:
    """Returns the metrics of the updates of a step, given the sums over their tokens."""
    metrics = {
        "supervised_tokens": sums["tokens"],
        "updates": sums["updates"],
        "updates_skipped": sums["updates_skipped"],
    }
    for name, count in MEANS.items():
        if sums[count]:
            metrics[name] = sums[name] / sums[count]
    if sums["distilled_tokens"] and sums["reinforced_tokens"]:  # rows of both kinds
        metrics["distilled_share"] = sums["distilled_tokens"] / sums["tokens"]
    metrics["sampler_gap"] = sums["sampler_gap"] / max(1, sums["compared"])
    metrics["sampler_gap_max"] = sums["sampler_gap_max"]
    return metrics


def memory_metrics(memory, step, problems) -> dict:
    """Returns the metrics of a memory at the end of a step."""
    # the events in a frozen memory are those of the run that wrote it
    events = {} if memory.frozen else memory.counts(step)
    metrics = {"memory": memory.sizes(), "memory_events": events}
    proposed = events.get("insight_proposed", 0) + events.get("behavior_proposed", 0)
    if proposed:
        metrics["shortcut_rate"] = events.get("shortcut", 0) / proposed
    precision = memory_precision(memory, problems)
    if precision is not None:
        metrics["memory_precision"] = precision
    return metrics


def time_metrics(tokens) -> dict:
    """Returns the seconds of a step by phase, its tokens a second, and the peak of memory so far.

    Evaluations and checkpoints are left out of the shares and of the tokens a second.
    """
    seconds = clock.read()
    phases = {name: t for name, t in seconds.items() if name not in ("evaluate", "save")}
    spent = sum(phases.values())
    peak = clock.peak  # of rank 0
    if not torch.cuda.is_available():
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "share": {name: t / spent for name, t in phases.items()},
        "tokens_per_second": tokens / spent,
        "peak_gb": peak / 1e9,
    }


def memory_precision(memory, problems) -> float | None:
    """Returns the share of living strategies that the world's hidden truth confirms.

    None for a task that hides none. It serves diagnosis alone: neither student nor teacher may read
    the hidden truth, and only the log calls this.
    """
    hidden = {p.id: hidden_rules(p) for p in problems}
    if not any(hidden.values()):
        return None
    strategies = [i for i in memory.living("insight") if i.kind == "strategy"]
    confirmed = [i.text in hidden[i.problem] for i in strategies if hidden.get(i.problem)]
    return sum(confirmed) / len(confirmed) if confirmed else None


def reporter(cfg, folder):
    """Returns send(row), which sends the numbers of a row to the library that --log names.

    Nested numbers are named outer/inner, after `train` or the split of an evaluation.
    """
    if not cfg.log:
        return lambda row: None

    def numbers(row, prefix):
        for key, value in row.items():
            if isinstance(value, dict):
                yield from numbers(value, f"{prefix}{key}/")
            elif isinstance(value, (int, float)) and key != "step":
                yield f"{prefix}{key}", value

    def named(row):
        return dict(numbers(row, f"{row.get('split', 'train')}/"))

    if cfg.log in ("wandb", "trackio"):
        session = tracker(cfg, folder)
        return lambda row: session.log(named(row), step=row["step"])
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(row):
        for name, value in named(row).items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    return send


def tracker(cfg, folder):
    """Opens the run in wandb or trackio, or goes on with it.

    Two runs have two ids, also under one name in two places or in two comparisons. The methods of a
    comparison are a group.
    """
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    run_id = f"{cfg.name or folder.name}-{place}".replace("/", "-")
    group = str(Path(cfg.name).parent) if "/" in cfg.name else None
    config = dataclasses.asdict(cfg)
    if cfg.log == "trackio":
        import trackio

        return trackio.init(project="pmd", name=run_id, group=group, config=config, resume="allow")
    import wandb

    options = {"id": run_id, "resume": "allow", "group": group, "dir": folder}
    return wandb.init(project="pmd", name=cfg.name or folder.name, config=config, **options)
