"""Checks and times on one GPU: the loss and its exactness, updates, the plan, the engine.

    python benchmarks/gpu.py [--parts exact,loss,update,engine] [--out table.md]
    python benchmarks/gpu.py --dry                  every part at toy size, on a CPU too

It prints a Markdown table with card, driver, versions and date, row by row. It exits with status 1
if a part failed. Weights are random and have the shapes of Qwen3. It should take ten minutes on an
H100 or H200. docs/gpu.md has its results on an H200.

- exact: the gradients of the loss against float64, for several alphas, with and without top-k.
- loss: milliseconds beside its four matrix products alone (V 151,936, N 8,192), and GiB added.
- update: the second of two updates in a row, with an averaged teacher. It has 16 rollouts, with
  prompts of 512 (student) and 2,560 (teacher) tokens and completions of 3,584. The first update
  compiles, if layers are compiled. MFU counts each product of the model and of the loss once,
  relative to 989 TFLOP/s. HFU counts recomputed products too. The planned memory is beside what
  PyTorch reserved. A case that does not fit by the plan is left out, and its row says so.
- engine: starting vLLM, waking it with new weights, its gap to the trainer, and tokens a second.

The engine has nano's tokenizer and needs no download. On a machine without a network set
HF_HUB_OFFLINE=1.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pmd
from benchmarks import kernels as loss_benchmark
from kernels import distill_loss, oracle
from runtime.model import MODELS, make_optimizer, prepare
from runtime.plan import BUILT_IN, CONTEXT, GIB, load, peak, plan, qwen3
from runtime.vllm_sampler import VLLM, vllm_version

DEVICE = loss_benchmark.DEVICE
PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16
PARTS = ("exact", "loss", "update", "engine")
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, of gradients: see docs/gpu.md
TOY = qwen3(64, 128, 1, 2, True) | dict(vocab_size=3863, num_key_value_heads=2, head_dim=32)
# (architecture, --micro_tokens, recomputation, further flags) of each update
UPDATES = [
    ("Qwen/Qwen3-0.6B", 32768, True, {"compile_layers": True}),
    ("Qwen/Qwen3-1.7B", 32768, True, {"compile_layers": True}),
    ("Qwen/Qwen3-1.7B", 16384, False, {"compile_layers": True}),
    ("Qwen/Qwen3-4B", 32768, True, {"compile_layers": True}),
    ("Qwen/Qwen3-8B", 32768, True, {"lora_rank": 64}),
    ("Qwen/Qwen3-1.7B", 32768, True, {}),
]
TOY_UPDATES = [
    ("toy", 256, True, {}),
    ("toy", 256, False, {"compile_layers": True}),
    ("toy", 256, True, {"lora_rank": 4}),
]


class Table:
    """A table of Markdown that is printed as it grows, and kept for a file."""

    def __init__(self):
        self.lines, self.failed = [], False

    def add(self, *cells):
        self.write(f"| {' | '.join(map(str, cells))} |")

    def head(self, title, *cells):
        self.write(f"\n{title}\n")
        self.add(*cells)
        self.write(f"|{'---|' * len(cells)}")

    def write(self, line):
        self.lines.append(line)
        print(line, flush=True)


def synchronise():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def let_go():
    """Frees what the last case held and compiled, and starts its count of bytes anew."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gib(size) -> str:
    return f"{size / GIB:.1f}"


def machine() -> str:
    """Names the card, its driver, the versions and the day."""
    card, driver = "a CPU", ""
    if DEVICE.type == "cuda":
        card = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            found = subprocess.run(query, capture_output=True, text=True).stdout.split()
            driver = f", driver {found[0]}" if found else ""
    versions = [f"Python {sys.version.split()[0]}"]
    for package in ("torch", "transformers", "triton", "peft"):
        if importlib.util.find_spec(package):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    versions.append(f"vllm {vllm_version() or 'none'}")
    return f"{date.today()}, {card}{driver}, {', '.join(versions)}"


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


def relative_error(alpha, top_k, inputs) -> float:
    """The larger relative error of the gradients of hidden states and head, against float64."""
    names = "student_hidden", "student_head"
    leaves = [inputs[name] for name in names]
    ours = torch.autograd.grad(distill_loss(**inputs, alpha=alpha, top_k=top_k).loss, leaves)
    exact = [inputs[name].detach().double().requires_grad_() for name in names]
    teacher = inputs["teacher_hidden"].double() @ inputs["teacher_head"].double().T
    terms = oracle(exact[0] @ exact[1].T, teacher, alpha, top_k)
    theirs = torch.autograd.grad((inputs["weights"] * terms).sum(), exact)
    pairs = zip(ours, theirs, strict=True)
    return max(float((own.double() - other).norm() / other.norm()) for own, other in pairs)


def exact(table, dry):
    table.head("Exactness", "type", "alpha", "top-k", "relative error of the gradients", "bound")
    vocabularies = (503,) if dry else (5003, 32768)
    for dtype, bound in ERRORS.items():
        for vocabulary in vocabularies:
            rows = 64 if dry else 7000  # several chunks, and enough to be compiled
            inputs = loss_benchmark.make(rows, 64, vocabulary, dtype)
            for alpha in (0, 0.1, 0.5, 0.9, 1):
                for top_k in (None, 20):
                    if top_k and dtype == torch.bfloat16:
                        continue  # rounded logits have another top-k
                    error = relative_error(alpha, top_k, inputs)
                    table.failed |= not error < bound
                    kind = f"{loss_benchmark.name_of(dtype)}, V {vocabulary}"
                    table.add(kind, alpha, top_k or "-", f"{error:.1e}", bound)


def ours(alpha, top_k=None):
    def step(inputs):
        distill_loss(**inputs, alpha=alpha, top_k=top_k).loss.backward()

    return step


def loss(table, dry):
    table.head("The loss", "shape", "contender", "ms", "over the floor", "peak GiB")
    loss_benchmark.CHUNK = 2048  # of the floor
    contenders = {
        "floor": loss_benchmark.floor,
        "JSD": ours(0.5),
        "reverse KL": ours(1),
        "top-100": ours(0.5, 100),
    }
    rows, vocabulary = (256, 1024) if dry else (8192, 151936)
    for hidden in (64,) if dry else (4096, 1024):
        inputs = loss_benchmark.make(rows, hidden, vocabulary, torch.bfloat16)
        times = loss_benchmark.take_turns(contenders, inputs, 2 if dry else 5)
        for name, seconds in times.items():
            over = loss_benchmark.ratio(seconds, times["floor"])
            added = added_memory(contenders[name], inputs)
            milliseconds = f"{1000 * statistics.median(seconds):.1f}"
            table.add(f"N {rows}, H {hidden}, V {vocabulary}", name, milliseconds, over, added)


def added_memory(contender, inputs) -> str:
    """The most that a step adds, in GiB."""
    inputs["student_hidden"].grad = inputs["student_head"].grad = None
    if DEVICE.type != "cuda":
        return "-"
    let_go()
    before = torch.cuda.memory_allocated()
    contender(inputs)
    synchronise()
    return gib(torch.cuda.max_memory_allocated() - before)


# --------------------------------------------------------------------------------------------------
# The update and the plan
# --------------------------------------------------------------------------------------------------


def random_policy(cfg):
    """Makes a model of the shape that cfg.model names, with random weights, on the device."""
    architecture = AutoConfig.for_model(**BUILT_IN.get(cfg.model, TOY))
    dtype = torch.float32
    if cfg.lora_rank:
        dtype = getattr(torch, cfg.dtype)
    torch.manual_seed(0)
    with DEVICE:
        policy = AutoModelForCausalLM.from_config(architecture, dtype=dtype).eval()
    prepare(policy, cfg)
    return policy


def shape_of(name, folder):
    """Reads the shape for the plan, from the Hub's name or a folder that is made."""
    if name in BUILT_IN:
        return load(name)
    AutoConfig.for_model(**TOY).save_pretrained(folder)
    return load(folder)


def flops(model, rollouts, cfg, of_student=3) -> float:
    """Counts the products of an update: student, teacher, loss.

    of_student: times that the student's forward products are made, or as many: 3 with those of the
        gradients of its states and weights, 4 where they are recomputed. A frozen base has one
        fewer, and the loss no gradient of the head. Adapters are not counted.
    """
    if cfg.lora_rank:
        of_student -= 1
    config = model.config
    body = model.parameters - (2 - model.tied) * model.head
    total = 0.0
    for passes, prompt in ((of_student, cfg.max_prompt), (1, cfg.max_reprompt)):
        length = prompt + cfg.max_completion
        width = config.num_attention_heads * config.head_dim
        attention = 2 * length**2 * width * config.num_hidden_layers  # causal
        total += passes * (2 * body * length + attention)
    total += (6 if cfg.lora_rank else 8) * cfg.max_completion * model.head
    return rollouts * total


def rollouts_of(cfg, count, vocabulary):
    """Rollouts whose prompts and completions are at their limits."""
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randint(10, vocabulary, (length,), generator=generator).tolist()

    rows = []
    for i in range(count):
        sample = draw(cfg.max_prompt), draw(cfg.max_completion), None, "", True
        rows.append(pmd.Rollout(*sample, str(i), None, 0.0, teacher_ids=draw(cfg.max_reprompt)))
    return rows


def one_update(cfg, model, count):
    """Makes two updates. Returns cells: seconds, tokens a second, MFU, HFU, memory."""
    policy = random_policy(cfg)
    method = pmd.PMD(cfg, None, None, policy)
    optimizer = make_optimizer(policy, cfg)
    rows = rollouts_of(cfg, count, model.config.vocab_size)
    for r in rows:
        r.rollout_logprobs = torch.full((len(r.ids),), -12.0)
    times = []
    for step in (1, 2):
        synchronise()
        start = time.perf_counter()
        pmd.update(method, optimizer, rows, step)
        method.follow(step)
        synchronise()
        times.append(time.perf_counter() - start)
    used = "-"
    if DEVICE.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        used = f"{gib(allocated)} / {gib(reserved)}"
    first, seconds = times
    mfu = f"{flops(model, count, cfg) / seconds / PEAK:.3f}"
    recomputed = 1 if cfg.gradient_checkpointing else 0
    hfu = f"{flops(model, count, cfg, 3 + recomputed) / seconds / PEAK:.3f}"
    tokens = f"{count * cfg.max_completion / seconds:.0f}"
    return f"{first:.1f}", f"{seconds:.2f}", tokens, mfu, hfu, used


def update(table, dry):
    table.head(
        "The update, and the plan of what PyTorch reserves",
        "model",
        "flags",
        "first, s",
        "s",
        "completion tokens/s",
        "MFU",
        "HFU",
        "allocated / reserved GiB",
        "planned",
    )
    card = float("inf")
    if DEVICE.type == "cuda":
        card = torch.cuda.get_device_properties(DEVICE).total_memory
    for name, micro_tokens, recomputes, flags in TOY_UPDATES if dry else UPDATES:
        cfg = pmd.Config(
            model=name,
            device=DEVICE.type,
            dtype="bfloat16",
            embedder="hashing",
            max_prompt=16 if dry else 512,
            max_reprompt=48 if dry else 2560,
            max_completion=32 if dry else 3584,
            micro_tokens=micro_tokens,
            gradient_checkpointing=recomputes,
            max_sampler_gap=1e9,
            **flags,
        )
        said = [f"--micro_tokens {micro_tokens}"]
        said += [] if recomputes else ["--no_gradient_checkpointing"]
        said += [f"--{flag} {value}" for flag, value in flags.items()]
        if flags.get("lora_rank") and not importlib.util.find_spec("peft"):
            table.add(name, " ".join(said), "not run: peft is not installed", *"------")
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = shape_of(name, folder)
        phases = plan(cfg, model, 1, 0, utilization=0, at_limits=True)
        del phases["sample"]
        planned = peak(phases)[0] - CONTEXT
        if planned > card - CONTEXT:
            row = ("not run: it does not fit", *"-----")
        else:
            let_go()
            row = one_update(cfg, model, 4 if dry else 16)
        table.add(Path(name).name, " ".join(said), *row, gib(planned))


# --------------------------------------------------------------------------------------------------
# The engine
# --------------------------------------------------------------------------------------------------


def engine(table, dry):
    table.head("The engine", "what", "measured")
    if vllm_version() is None:
        table.add("vLLM", "not run: it is not installed")
        return
    let_go()
    tokenizer = AutoTokenizer.from_pretrained(MODELS["nano"])
    name = "toy" if dry else "Qwen/Qwen3-0.6B"
    # at one place, which is part of the key of vLLM's cache, so that a second start finds it
    place = contextlib.nullcontext(Path(tempfile.gettempdir()) / "pmd-benchmark-qwen3")
    with tempfile.TemporaryDirectory() if dry else place as folder:
        architecture = BUILT_IN.get(name, TOY)
        # without its name vLLM would run transformers' code
        config = AutoConfig.for_model(**architecture, architectures=["Qwen3ForCausalLM"])
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        cfg = pmd.Config(
            model=folder,
            device=DEVICE.type,
            sampler="vllm",
            gpu_memory_utilization=0.3,
            max_reprompt=128 if dry else 2048,
            max_completion=32 if dry else 512,
            memory_completion=32,
        )
        policy = random_policy(pmd.replace(cfg, model=name))
        start = time.perf_counter()
        sampler = VLLM(policy, tokenizer, cfg)
        table.add("start, with two checked pushes", f"{time.perf_counter() - start:.1f} s")
        time_engine(table, sampler, 8 if dry else 256, cfg.max_completion)


def time_engine(table, sampler, count, length):
    """Adds rows: sleeping, waking with other weights, the gap then, tokens a second."""
    for what, phase in (("sleep", sampler.sleep), ("wake with new weights", sampler.wake)):
        with torch.no_grad():
            next(sampler.trained.parameters()).mul_(1.01)
        start = time.perf_counter()
        phase()
        synchronise()
        table.add(what, f"{time.perf_counter() - start:.2f} s")
    gap = sampler._gap(sampler._ours(), sampler._push())
    table.add("gap to the trainer on the probe", f"{gap:.4f} nats a token")
    prompts = [list(range(20, 60))] * count
    keys = [("gpu", i) for i in range(count)]
    start = time.perf_counter()
    samples = sampler.generate(prompts, keys, length, 1.0, 1.0)
    rate = sum(len(s.ids) for s in samples) / (time.perf_counter() - start)
    table.add(f"{count} completions of up to {length} tokens", f"{rate:.0f} tokens/s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="toy sizes: does every part run?")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, in this order")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts takes {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if not args.dry and DEVICE.type != "cuda":
        parser.error("torch finds no GPU here; --dry runs every part at toy size")
    table = Table()
    table.write(machine())
    for part in args.parts.split(","):
        start = time.perf_counter()
        try:
            globals()[part](table, args.dry)
        except Exception as error:  # the other parts are worth their minutes all the same
            table.failed = True
            table.write(f"\n{part} FAILED: {type(error).__name__}: {error}")
        table.write(f"\n({part}: {time.perf_counter() - start:.0f} s)")
    if args.out:
        args.out.write_text("\n".join(table.lines) + "\n")
    sys.exit(table.failed)


if __name__ == "__main__":
    main()
