"""Prints the memory per GPU that a run of pmd.py needs, phase by phase, before anything is loaded.

It also says whether the run fits, and which --micro_tokens fit. runtime/plan.py has the formulas.

python tools/plan.py --model Qwen3-8B --gpus 8 --gpu_memory 80
python tools/plan.py --model Qwen3-8B --gpus 1 --gpu_memory 80 --lora_rank 64
python tools/plan.py --what_fits                       the table of docs/running.md
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pmd import Config
from runtime.model import MODELS
from runtime.plan import (
    BUILT_IN,
    GIB,
    MOST_TOKENS,
    PREFILL,
    fits,
    kv_needed,
    kv_room,
    largest,
    load,
    peak,
    plan,
)

# The options of pmd.py that the plan depends on, beside the model and the GPUs.
OPTIONS = (
    "max_prompt max_completion max_reprompt micro_tokens method teacher dtype embedder"
    " tensor_parallel lora_rank"
).split()
POSITIVE = (
    "gpus gpu_memory max_prompt max_completion max_reprompt micro_tokens tensor_parallel"
).split()


def on_off(value) -> str:
    return "on" if value else "off"


def line(name, cells):
    print(f"{name:24}" + "".join(f"{cell:>10}" for cell in cells))


def gib(size) -> str:
    return f"{size / GIB:.2f}" if size else ""


def report(cfg, model, gpus, gpu_memory, utilization):
    """Prints the components of each phase, what vLLM and the host hold, and other settings."""
    phases = plan(cfg, model, gpus, gpu_memory, 0, utilization)
    source = f" ({model.source})" if model.source else ""
    print(
        f"{model.name}, {model.parameters / 1e9:.2f}e9 parameters{source}; {gpus} x"
        f" {gpu_memory:g} GiB; --micro_tokens {cfg.micro_tokens}; gradient checkpointing"
        f" {on_off(cfg.gradient_checkpointing)}"
    )
    if cfg.lora_rank:
        trained = count_trained(cfg, model) / 1e6
        print(f"--lora_rank {cfg.lora_rank}: {trained:.0f}e6 parameters are trained")
    print()
    line("GiB per GPU, computed", phases)
    names = dict.fromkeys(name for components in phases.values() for name in components)
    for name in names:
        sizes = [components.get(name, 0) for components in phases.values()]
        if any(sizes):
            line(name, map(gib, sizes))
    sums = [sum(components.values()) for components in phases.values()]
    line("total", map(gib, sums))
    line("fits", ["yes" if size <= gpu_memory * GIB else "NO" for size in sums])
    if utilization:
        room = kv_room(cfg, model, gpu_memory, utilization)
        sequences = max(0, room // kv_needed(cfg, model))
        print(
            f"\nvLLM awake: model {2 * model.parameters / cfg.tensor_parallel / GIB:.2f} in"
            f" bfloat16, activations {PREFILL / GIB:.2f}, keys and values {room / GIB:.2f}:"
            f" {sequences:.0f} sequences of {cfg.max_prompt + cfg.max_completion} an engine\nvLLM"
            " asleep (level 2): it keeps no weights, and gets them anew when it wakes"
        )
    limits = plan(cfg, model, gpus, gpu_memory, 0, utilization, at_limits=True)
    size, phase = peak(limits)
    print(
        f"with every prompt and completion at its limit at most {size / GIB:.1f} ({phase}): the"
        " teacher's longer rows leave fewer of the student's tokens in a micro-batch"
    )
    report_host(cfg, model, gpus, phases)
    if "backward" in phases:
        print_settings(cfg, model, gpus, gpu_memory, utilization)
    _, sentence = fits(cfg, model, gpus, gpu_memory, utilization)
    print(f"\n{sentence}.")


def print_settings(cfg, model, gpus, gpu_memory, utilization):
    """Prints which --micro_tokens fit, with gradient checkpointing and without it."""
    print(f"\n{'--micro_tokens':>14}{'checkpointing':>15}{'activations':>13}{'most':>8}  fits")
    for on in (False, True):
        run = SimpleNamespace(**vars(cfg) | {"gradient_checkpointing": on})
        most = largest(run, model, gpus, gpu_memory, utilization)
        for tokens in sorted({1, 8192, 16384, 32768, 65536, max(1, most)}):
            phases = plan(run, model, gpus, gpu_memory, tokens, utilization)
            activations, size = phases["backward"]["activations"], peak(phases)[0]
            rows = tokens if tokens > 1 else "one row"
            verdict = "yes" if tokens < most else "NO"
            if tokens == most:
                verdict = "largest"
            numbers = f"{activations / GIB:13.1f}{size / GIB:8.1f}"
            print(f"{rows:>14}{on_off(on):>15}{numbers}  {verdict}")


def report_host(cfg, model, gpus, phases):
    """Prints what the host and the disk hold."""
    deals = " and deals them out" if gpus > 1 else ""
    stored = 2 if cfg.lora_rank and cfg.dtype != "float32" else 4  # bytes of a weight
    print(
        f"the host's memory: {stored * model.parameters / GIB:.0f} in the first process of the job,"
        f" which reads the weights{deals}"
    )
    if "AdamW, float32" in phases["sample"]:
        copies = 3 + ("EMA teacher, float32" in phases["sample"])  # the policy, Adam's two moments
        size = 4 * copies * count_trained(cfg, model) / GIB
        print(
            f"a checkpoint on the disk: {size:.0f}; a run has --keep"
            " of them, the best on dev, and the one that is being written"
        )


def count_trained(cfg, model) -> int:
    return cfg.lora_rank * model.widths or model.parameters


def tokens_cell(tokens) -> str:
    if tokens > 1:
        return f"{tokens / 1024:.0f}k"
    return "one row" if tokens else "no"


def what_fits(cfg, utilization):
    """Prints the table of docs/running.md."""
    cards = [(1, 80), (8, 80), (1, 141), (8, 141)]
    heads = ["model", "completion", *(f"{gpus} x {memory} GB" for gpus, memory in cards)]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for model in map(load, BUILT_IN):
        for completion in (8192, 32768):
            changed = {"gradient_checkpointing": True, "max_completion": completion}
            run = SimpleNamespace(**vars(cfg) | changed)
            tokens = [largest(run, model, *card, utilization) for card in cards]
            cells = [model.name, str(completion), *map(tokens_cell, tokens)]
            print(f"| {' | '.join(cells)} |")
    print(
        "\nComputed by `python tools/plan.py --what_fits`, not run: the largest `--micro_tokens`"
        f" with `--gradient_checkpointing`, {cfg.method},\nprompts of {cfg.max_prompt} and"
        f" {cfg.max_reprompt} tokens, vLLM on {utilization:g} of each GPU; {MOST_TOKENS // 1024}k"
        " is as far as it looks."
    )


def main():
    """Runs the command line."""
    defaults = Config()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="Qwen3-8B", help="a name of pmd.py, a Hub name or a folder"
    )
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of the job (default: 8)")
    parser.add_argument("--gpu_memory", type=float, default=80, help="GiB of one GPU (default: 80)")
    share = "vLLM's share of a GPU's memory (default: 0.5); 0 without vLLM"
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.5, help=share)
    parser.add_argument(
        "--no_gradient_checkpointing",
        dest="gradient_checkpointing",
        action="store_false",
        help="as in pmd.py: activations are kept, not recomputed",
    )
    parser.add_argument("--compile_layers", action="store_true", help="as in pmd.py")
    parser.add_argument(
        "--what_fits", action="store_true", help="only the table of models, lengths and cards"
    )
    choices = {"teacher": ("ema", "live"), "dtype": ("", "float32", "bfloat16")}
    for name in OPTIONS:
        default = getattr(defaults, name)
        told = f"as in pmd.py (default: {'bfloat16' if default == '' else default})"
        parser.add_argument(
            f"--{name}", type=type(default), default=default, choices=choices.get(name), help=told
        )
    args = parser.parse_args()
    if args.lora_rank < 0 or args.lora_rank and args.gpus > 1:
        parser.error(f"--lora_rank {args.lora_rank} must be at least 0, and 0 with several --gpus")
    if args.gpus > 0 and args.gpus % max(1, args.tensor_parallel):
        parser.error(f"--tensor_parallel {args.tensor_parallel} does not divide --gpus {args.gpus}")
    if args.compile_layers and args.gpus > 1:
        parser.error("--compile_layers is for one process: give --gpus 1, or leave it out")
    for name in POSITIVE:
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name} {getattr(args, name)} must be above 0")
    share = args.gpu_memory_utilization
    if not 0 <= share <= 1:
        parser.error(f"--gpu_memory_utilization {share} must be from 0 to 1")
    try:
        if args.what_fits:
            what_fits(args, share)
        else:
            model = load(MODELS.get(args.model, args.model))
            report(args, model, args.gpus, args.gpu_memory, share)
    except ValueError as error:
        sys.exit(f"plan.py: {error}")


if __name__ == "__main__":
    main()
