"""Measures the losses of kernels.py beside their products, Liger-Kernel, TRL and naive losses.

    python benchmarks/kernels.py [--quick] [--peers FOLDER]

Every contender computes the loss and the gradients of hidden states and head. Ours also compute
entropies and log-probabilities, the others do not. The floor is the four matrix products alone, in
chunks of 512 into memory that is reused. Contenders take turns, so that a ratio compares neighbours
in time. On a CPU it uses one thread and CPU time, which a busy machine disturbs little. On a GPU it
uses wall time between synchronisations. It prints medians, and [smallest, largest] ratios.

Liger-Kernel and TRL need a folder beside this repository's requirements, made by
`pip install --no-deps --target FOLDER liger-kernel==0.8.5 trl==1.16.0 accelerate psutil`. Whole,
Liger-Kernel would bring Triton, which its chunked losses do not use.

On an idle machine with AVX2 float32's shapes and slopes took 12 minutes, the memory 7, the table 8.
The memory needs 18 GB. bfloat16 is left out where its products take over four times float32's time,
as on a CPU without instructions for it.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

# this file's folder would put this file in place of ours
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from kernels import chunked_loss, distill_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK = 512


def clock():
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def make(rows, hidden, vocabulary, dtype):
    """Arguments of distill_loss: logits of standard deviation about 1."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).div_(hidden**0.25).to(DEVICE, dtype)

    return {
        "student_hidden": draw(rows, hidden).requires_grad_(),
        "student_head": draw(vocabulary, hidden).requires_grad_(),
        "teacher_hidden": draw(rows, hidden),
        "teacher_head": draw(vocabulary, hidden),
        "weights": torch.full((rows,), 1 / rows, device=DEVICE),
        "token_ids": torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE),
    }


# --------------------------------------------------------------------------------------- contenders


@torch.no_grad()
def floor(inputs):
    student, head, teacher, teacher_head = list(inputs.values())[:4]
    logits, teacher_logits = (head.new_empty(min(CHUNK, len(student)), len(head)) for _ in range(2))
    to_hidden, to_head = torch.empty_like(student), torch.zeros_like(head)
    for start in range(0, len(student), CHUNK):
        rows = slice(start, start + CHUNK)
        torch.mm(student[rows], head.T, out=logits)
        torch.mm(teacher[rows], teacher_head.T, out=teacher_logits)
        torch.mm(logits, head, out=to_hidden[rows])
        to_head.addmm_(logits.T, student[rows])


def ours(alpha, top_k=None):
    return lambda inputs: distill_loss(
        **inputs, alpha=alpha, top_k=top_k, chunk_size=CHUNK
    ).loss.backward()


def by_formula(alpha):
    """Computes what `ours` does by autograd on the formula of `divergence` within each tile."""

    def formula(log_p, log_q, token_ids):
        return divergence(log_p, log_q, alpha)

    def step(inputs):
        hidden, head, *teacher = list(inputs.values())[:4]
        ids, weights = inputs["token_ids"], inputs["weights"]
        chunked_loss(formula, hidden, head, ids, weights, [teacher], CHUNK).loss.backward()

    return step


def full_logits(inputs):
    student, head, teacher, teacher_head = list(inputs.values())[:4]
    with torch.no_grad():
        teacher_logits = teacher @ teacher_head.T
    return student @ head.T, teacher_logits


def divergence(log_p, log_q, alpha):
    if alpha == 1:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(1 - alpha), log_q + math.log(alpha))
    return (
        (1 - alpha) * log_p.exp() * (log_p - log_m) + alpha * log_q.exp() * (log_q - log_m)
    ).sum(-1)


def naive(alpha, entropies=False):
    """The least that autograd on full logits can do."""

    def step(inputs):
        log_p, log_q = (logits.float().log_softmax(-1) for logits in full_logits(inputs))
        if entropies:  # and log-probabilities: the work that ours does
            with torch.no_grad():
                (
                    [-(x.exp() * x).sum(-1) for x in (log_p, log_q)],
                    log_p.gather(-1, inputs["token_ids"][:, None]),
                )
        (inputs["weights"] * divergence(log_p, log_q, alpha)).sum().backward()

    return step


def sdpo_top_k(inputs, top_k=100):
    """Computes SDPO's approximation on full logits.

    It is the JSD over the student's 100 most likely tokens and a tail of 1 minus their sum.
    """
    log_p, log_q = (logits.float().log_softmax(-1) for logits in full_logits(inputs))
    index = log_p.topk(top_k, dim=-1).indices

    def with_tail(
        log_probs,
    ):  # gathered from log_softmax: cheaper here than logits less their logsumexp
        top = log_probs.gather(-1, index)
        mass = top.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([top, torch.log(-torch.expm1(mass))], -1)

    (inputs["weights"] * divergence(with_tail(log_p), with_tail(log_q), 0.5)).sum().backward()


def peers(folder):
    """Returns {name: contender} of the JSDs that are installed.

    Liger-Kernel's is the fused one, compiled as is its default. That of TRL's SDPO trainer is on
    full logits in their dtype. It is the formula of SDPO's own code, operation by operation.
    """
    sys.path.append(folder or "")
    found = {}
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(
            weight_hard_loss=0, weight_soft_loss=1, beta=0.5, compiled=True, chunk_size=CHUNK
        )
        found["Liger-Kernel JSD"] = lambda inputs: liger(
            *list(inputs.values())[:4], inputs["token_ids"]
        ).backward()
    except ImportError as error:
        print(f"Liger-Kernel: not measured, see --help: {error}")
    try:
        from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

        def trl(inputs):
            per_token = compute_full_logit_self_distillation_loss(
                *full_logits(inputs), distillation_alpha=0.5
            )
            (inputs["weights"] * per_token).sum().backward()

        found["TRL SDPO JSD"] = trl
    except ImportError as error:
        print(f"TRL: not measured, see --help: {error}")
    return found


# ---------------------------------------------------------------------------------------- measuring


def run(contender, inputs):
    inputs["student_hidden"].grad = inputs["student_head"].grad = None
    begin = clock()
    contender(inputs)
    return clock() - begin


def take_turns(contenders, inputs, rounds):
    """{name: [seconds]} after one round that is not counted, in which things compile."""
    times = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, contender in contenders.items():
            seconds = run(contender, inputs)
            if i:
                times[name].append(seconds)
    return times


def ratio(above, below):
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def against_all(dtype, rounds, theirs):
    contenders = {
        "floor": floor,
        "reverse KL": ours(1),
        "JSD": ours(0.5),
        "reverse KL by a formula": by_formula(1),
        "JSD by a formula": by_formula(0.5),
        **theirs,
        "naive reverse KL": naive(1),
        "naive JSD": naive(0.5),
        "naive JSD, entropies": naive(0.5, True),
        "SDPO top-100 JSD": sdpo_top_k,
    }
    times = take_turns(contenders, make(2048, 512, 32768, dtype), rounds)
    print(
        f"\n{name_of(dtype)}, N 2048, H 512, V 32768, {rounds} rounds"
        "          over the floor         over our JSD"
    )
    for name, seconds in times.items():
        print(
            f"  {name:23} {statistics.median(seconds):7.2f} s          "
            f"{ratio(seconds, times['floor']):22} {ratio(seconds, times['JSD'])}"
        )


def against_the_floor(dtype, shapes):
    print(f"\n{name_of(dtype)}, over the floor of the same shape   reverse KL          JSD")
    for shape in shapes:
        times = take_turns(
            {"floor": floor, "reverse KL": ours(1), "JSD": ours(0.5)}, make(*shape, dtype), 2
        )
        print(
            "  N {:5} H {:5} V {:6}  ".format(*shape),
            f"floor {statistics.median(times['floor']):6.2f} s ",
            ratio(times["reverse KL"], times["floor"]),
            "",
            ratio(times["JSD"], times["floor"]),
            flush=True,
        )


def slopes(dtype):
    """Exponent of the cost in each size, by least squares on the logarithms of medians of three."""
    base = (2048, 512, 32768)
    print(f"\n{name_of(dtype)}, JSD: slope of log time over log size, around N, H, V = {base}")
    for axis, name in enumerate("NHV"):
        sizes, seconds = [], []
        for factor in (0.5, 1, 2):
            shape = [int(size * factor) if i == axis else size for i, size in enumerate(base)]
            sizes.append(math.log(shape[axis]))
            seconds.append(
                math.log(
                    statistics.median(take_turns({"JSD": ours(0.5)}, make(*shape, dtype), 3)["JSD"])
                )
            )
        print(f"  {name}: {statistics.linear_regression(sizes, seconds).slope:.2f}", flush=True)


def memory(name, rows, folder):
    """Prints the most memory, in bytes, that one step adds to its inputs.

    The gradients that the step leaves are included. Run it in a process of its own.
    """
    contender = {
        "JSD": ours(0.5),
        "JSD, top-k 100": ours(0.5, 100),
        "naive JSD": naive(0.5),
        "SDPO top-100 JSD": sdpo_top_k,
    }.get(name) or peers(folder)[name]
    dtype = torch.float32
    if not name.startswith(("naive", "SDPO", "TRL")):
        run(contender, make(1024, 512, 32768, dtype))  # compiles
    inputs = make(rows, 512, 32768, dtype)
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here

        def peak(field="VmHWM"):
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            return int(status[field].split()[0]) * 1024

        before = peak("VmRSS")
    run(contender, inputs)
    print(json.dumps(peak() - before))


def memories(theirs, folder):
    sizes = (2048, 8192)
    print("\nfloat32, H 512, V 32768: peak memory that a step adds, MB       N 2048    N 8192")
    for name in ("JSD", "JSD, top-k 100", *theirs, "naive JSD", "SDPO top-100 JSD"):
        row = []
        for rows in sizes:
            command = [sys.executable, __file__, "--memory_of", name, str(rows), "--peers", folder]
            child = subprocess.run(command, capture_output=True, text=True)
            row.append(
                f"{int(child.stdout.split()[-1]) / 1e6:8.0f}"
                if child.returncode == 0
                else "  failed"
            )
        print(f"  {name:55}", "  ".join(row), flush=True)
    print(
        "  ours by arithmetic: head's gradient 67, two chunks of logits 134 (later the scaled\n"
        "  gradient, 67), hidden states' gradient as accumulated and scaled: 8 and 34"
    )


def computed():
    """Qwen3-8B by arithmetic, not measured."""
    hidden, vocabulary, body, tokens = 4096, 151936, 6.95e9, 32768
    flop = 8 * tokens * hidden * vocabulary
    model = (6 + 2) * body * tokens  # student forward and backward, teacher forward
    print(
        f"\nComputed, not measured: Qwen3-8B (H {hidden}, V {vocabulary}), bfloat16, N {tokens} "
        f"tokens, exact divergence\n  four products {flop / 1e12:.0f} TFLOP; the model, "
        f"{body / 1e9:.2f}e9 weights without head and embedding,\n  student forward and backward, "
        f"teacher forward: {model / 1e12:.0f} TFLOP; the loss adds {flop / model:.0%}\n"
        f"  full bfloat16 logits of both {4 * tokens * vocabulary / 1e9:.0f} GB, which nobody "
        f"holds; head's float32 gradient {4 * hidden * vocabulary / 1e9:.1f} GB"
    )
    print(
        "  card   chunk  logits of a chunk  moved by the loss  floor: products  memory   "
        "model's floor  loss / model"
    )
    for card, flops, bandwidth in (("H100", 989e12, 3.35e12), ("H200", 989e12, 4.8e12)):
        for chunk in (512, 1024, 2048, 4096):
            # Each chunk: both heads, the head again, its gradient in float32 read and written,
            # and a product that is added to the gradient.
            per_chunk = hidden * vocabulary * (3 * 2 + 8 + 4)
            # Each logit: written twice, read twice by the tile (statistics, gradient), written,
            # and read by two products.
            moved = tokens / chunk * per_chunk + tokens * vocabulary * (
                2 * 2 + 2 * 2 * 2 + 2 + 2 * 2
            )
            slowest = max(flop / flops, moved / bandwidth)
            print(
                f"  {card}  {chunk:6}  {4 * chunk * vocabulary / 1e9:14.2f} GB "
                f"{moved / 1e12:15.2f} TB{1e3 * flop / flops:14.0f} ms "
                f"{1e3 * moved / bandwidth:6.0f} ms {1e3 * model / flops:12.0f} ms"
                f"{slowest / (model / flops):12.0%}"
            )


def dtypes():
    """bfloat16, unless its products crawl here, and float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(64, 512, 8192, dtype)
        seconds[dtype] = min(run(floor, inputs) for _ in range(3))
    slower = seconds[torch.bfloat16] / seconds[torch.float32]
    if slower > 4:
        print(f"bfloat16: not measured, its products take {slower:.0f} times float32's time here")
        return [torch.float32]
    return [torch.bfloat16, torch.float32]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one shape a dtype, fewer rounds, no slopes"
    )
    parser.add_argument("--peers", default="", metavar="FOLDER", help="holds liger_kernel and trl")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        return memory(args.memory_of[0], int(args.memory_of[1]), args.peers)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, one thread, CPU time"
    print(f"{device}; torch {torch.__version__}; chunks of {CHUNK} rows")
    theirs, measured = peers(args.peers), dtypes()
    if not args.quick:
        shapes = [
            (512, 512, 32768),
            (2048, 1024, 32768),
            (512, 512, 151936),
            (512, 1024, 151936),
            (8192, 512, 32768),
        ]
        for dtype in measured:
            against_the_floor(dtype, shapes)
        slopes(torch.float32)
    computed()
    memories(theirs, args.peers)
    for dtype in measured:
        against_all(dtype, 3 if args.quick else 5, theirs)


if __name__ == "__main__":
    main()
