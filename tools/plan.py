"""What fits: bytes per GPU of a run of pmd.py, phase by phase, computed before anything is loaded
(runtime/plan.py).

python tools/plan.py --model Qwen3-8B --gpus 8 --gpu_memory 80
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


def report(cfg, model, gpus, gpu_memory, utilization):
    phases = plan(cfg, model, gpus, gpu_memory, 0, utilization)
    print(
        f"{model.name}, {model.parameters / 1e9:.2f}e9"
        f" parameters{model.source and f' ({model.source})'}; {gpus} x {gpu_memory:g} GiB;"
        f" --micro_tokens {cfg.micro_tokens}; gradient checkpointing"
        f" {'on' if cfg.gradient_checkpointing else 'off'}\n\n{'GiB per GPU, computed':24}"
        + "".join(f"{phase:>10}" for phase in phases)
    )
    for name in dict.fromkeys(name for components in phases.values() for name in components):
        sizes = [components.get(name, 0) for components in phases.values()]
        if any(sizes):
            print(f"{name:24}" + "".join(f"{s / GIB:10.2f}" if s else " " * 10 for s in sizes))
    sums = [sum(components.values()) for components in phases.values()]
    print(f"{'total':24}" + "".join(f"{s / GIB:10.2f}" for s in sums))
    print(f"{'fits':24}" + "".join(f"{'yes' if s <= gpu_memory * GIB else 'NO':>10}" for s in sums))
    if utilization:
        room = kv_room(cfg, model, gpu_memory, utilization)
        sequences = max(0, room // kv_needed(cfg, model))
        print(
            f"\nvLLM awake: model {2 * model.parameters / cfg.tensor_parallel / GIB:.2f} in"
            f" bfloat16, activations {PREFILL / GIB:.2f}, keys and values {room / GIB:.2f}:"
            f" {sequences:.0f} sequences of {cfg.max_prompt + cfg.max_completion} an engine\nvLLM"
            " asleep (level 2): it keeps no weights, and gets them anew when it wakes"
        )
    print(
        f"the host's memory: {4 * model.parameters / GIB:.0f} in the first process of the job,"
        " which reads the weights" + (" and deals them out" if gpus > 1 else "")
    )
    if "AdamW, float32" in phases["sample"]:
        copies = 3 + ("EMA teacher, float32" in phases["sample"])  # the policy, Adam's two moments
        print(
            f"a checkpoint on the disk: {4 * copies * model.parameters / GIB:.0f}; a run has --keep"
            " of them, the best on dev, and the one that is being written"
        )
    print(f"\n{'--micro_tokens':>14}{'checkpointing':>15}{'activations':>13}{'most':>8}  fits")
    for on in (False, True):
        run = SimpleNamespace(**vars(cfg) | {"gradient_checkpointing": on})
        most = largest(run, model, gpus, gpu_memory, utilization)
        for m in sorted({1, 8192, 16384, 32768, 65536, max(1, most)}):
            of_m = plan(run, model, gpus, gpu_memory, m, utilization)
            print(
                f"{m if m > 1 else 'one row':>14}{'on' if on else 'off':>15}{of_m['backward']['activations'] / GIB:13.1f}{peak(of_m)[0] / GIB:8.1f}"
                f"  {'largest' if m == most else 'yes' if m < most else 'NO'}"
            )
    print(f"\n{fits(cfg, model, gpus, gpu_memory, utilization)[1]}.")


def what_fits(cfg, utilization):
    """The table of docs/running.md."""
    cards = [(1, 80), (8, 80), (1, 141), (8, 141)]
    print(
        "| model | completion | "
        + " | ".join(f"{g} x {c} GB" for g, c in cards)
        + " |\n|---|---|"
        + "---|" * len(cards)
    )
    for model in map(load, BUILT_IN):
        for completion in (8192, 32768):
            run = SimpleNamespace(
                **vars(cfg) | {"gradient_checkpointing": True, "max_completion": completion}
            )
            found = [largest(run, model, g, c, utilization) for g, c in cards]
            cells = ["no" if not m else "one row" if m == 1 else f"{m / 1024:.0f}k" for m in found]
            print(f"| {model.name} | {completion} | " + " | ".join(cells) + " |")
    print(
        "\nComputed by `python tools/plan.py --what_fits`, not run: the largest `--micro_tokens`"
        f" with `--gradient_checkpointing`, {cfg.method},\nprompts of {cfg.max_prompt} and"
        f" {cfg.max_reprompt} tokens, vLLM on {utilization:g} of each GPU; {MOST_TOKENS // 1024}k"
        " is as far as it looks."
    )


def main():
    defaults = Config()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="Qwen3-8B", help="a name of pmd.py, a Hub name or a folder"
    )
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu_memory", type=float, default=80, help="GiB of one GPU")
    parser.add_argument(
        "--gpu_memory_utilization", type=float, default=0.5, help="vLLM's share; 0 without vLLM"
    )
    parser.add_argument(
        "--no_gradient_checkpointing", dest="gradient_checkpointing", action="store_false"
    )
    parser.add_argument(
        "--what_fits", action="store_true", help="only the table of models, lengths and cards"
    )
    for name in (
        "max_prompt",
        "max_completion",
        "max_reprompt",
        "micro_tokens",
        "method",
        "teacher",
        "dtype",
        "embedder",
        "tensor_parallel",
    ):
        parser.add_argument(
            f"--{name}", type=type(getattr(defaults, name)), default=getattr(defaults, name)
        )
    args = parser.parse_args()
    for name in (
        "gpus",
        "gpu_memory",
        "max_prompt",
        "max_completion",
        "max_reprompt",
        "micro_tokens",
        "tensor_parallel",
    ):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name} {getattr(args, name)} must be above 0")
    if not 0 <= args.gpu_memory_utilization <= 1:
        parser.error(f"--gpu_memory_utilization {args.gpu_memory_utilization} must be from 0 to 1")
    try:
        if args.what_fits:
            what_fits(args, args.gpu_memory_utilization)
        else:
            report(
                args,
                load(MODELS.get(args.model, args.model)),
                args.gpus,
                args.gpu_memory,
                args.gpu_memory_utilization,
            )
    except ValueError as error:
        sys.exit(f"plan.py: {error}")


if __name__ == "__main__":
    main()
