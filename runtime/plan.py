"""Computes the bytes per GPU of a run of pmd.py, phase by phase, before anything is loaded.

tools/plan.py prints it.

It follows pmd.py: float32 weights, gradients, AdamW states and EMA teacher, sharded by FSDP2 over
the GPUs of a job (one GPU: whole, computing under autocast); the teacher's pass, then the
student's, the loss of kernels.py, the backward pass, the optimizer; and an engine of vLLM in each
process that sleeps while the trainer works, and while a checkpoint is restored. With --lora_rank
the weights are frozen, in e bytes, and all that is trained is of the adapters.

Symbols: g GPUs; P parameters, of them Pl in one decoder layer and Pr in the root group (embedding,
last norm, head); A parameters that are trained: P, or those of an adapter; V vocabulary, H hidden;
e bytes of a computed number (2 bfloat16, 4 float32), h bytes of a hidden state (e; but 4 under
autocast, whose norms answer in float32); S and T tokens of the student's and teacher's micro-batch,
padding included; N <= S completion tokens. Each
component's formula stands beside it in `plan`. "Kept", "forward" and "backward" bytes per token of
a layer are not formulas: they are counted on fake tensors, which have shapes and no data (`trace`).

Measured on a CPU (tests/test_plan.py): the resident memory of real updates, in one process within 5
% of the plan, and in two, sharded, within 1 % where the peak is in the loss and 17 % below the plan
where it is in the backward pass (gloo keeps less in flight). On one H200: ten updates within 4 % of
torch.cuda.max_memory_reserved (docs/gpu.md). Not measured: several GPUs. Approximate there: FSDP2's
buffers in flight, and the attention kernels' workspace (left out, as the peak is in the MLP).

Two bounds are taken: every micro-batch is full of the student's tokens, as where a teacher reads
hardly more (`at_limits` has every row at its limits instead), and frozen-policy trains like grpo.
"""

import bisect
import copy
import functools
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from kernels import rows_of_chunk
from runtime.lora import SCALE, TARGETS
from runtime.methods import method_of

GIB = 2**30
# Share of PyTorch's own memory that its caching allocator can't use: on one H200 it reserved 0.6 to
# 2.7% more than is computed here, but with --compile_layers or --lora_rank 3 to 7%
FRAGMENTED, MORE_FRAGMENTED = 0.03, 0.065
# A compiled layer keeps two thirds of what it keeps by `trace`, and no copy of its weights in
# bfloat16: fitted to four updates on one H200, in bfloat16 and without adapters
KEPT_COMPILED = 0.66
# CUDA context, NCCL and cuBLAS buffers; and what a sleeping vLLM keeps (CUDA graphs, buffers). On
# one H200 both together, with the 2.2 GiB of Qwen3-0.6B's weights, were 5 of 47 GiB
CONTEXT = 1.5 * GIB
TILES = GIB / 2  # of kernels.py on a GPU: 512 times kernels.TILE logits, of both, in float32
ASLEEP = 1.5 * GIB
# Assumed, not measured:
PREFILL = 2 * GIB  # vLLM's activations, inside its share
MOST_TOKENS = 2**18  # the largest --micro_tokens looked for
# For where the Hub can't be reached: the public config.json files, as far as memory depends on
# them.
QWEN3 = dict(model_type="qwen3", vocab_size=151936, num_key_value_heads=8, head_dim=128)


def qwen3(hidden, intermediate, layers, heads, tied):
    return QWEN3 | dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
    )


BUILT_IN = {
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": qwen3(5120, 17408, 40, 40, False),
    "Qwen/Qwen3-32B": qwen3(5120, 25600, 64, 64, False),
    "allenai/Olmo-3-7B-Instruct": dict(
        model_type="olmo3",
        vocab_size=100278,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        sliding_window=4096,
        eos_token_id=100257,
        pad_token_id=100277,
    ),
}


class Track(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it: those alive, `now`, and the most, `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key, size):
        self.alive.discard(key)
        self.now -= size


class PerToken(NamedTuple):
    """Bytes per token of a module."""

    kept: float  # between forward and backward, the output included
    backward: float  # the most during backward, what was kept included
    forward: float  # the most in a forward pass without gradient


def traced(module, hidden) -> PerToken:
    """Measures a forward and a backward pass of a module."""
    with torch.no_grad(), Track() as forward:
        module(hidden)
    with Track() as track:
        out = module(hidden.requires_grad_())
        kept, track.peak = track.now, 0
        out.backward(torch.empty_like(out))
    return PerToken(*(size / hidden.shape[1] for size in (kept, track.peak, forward.peak)))


class Adapted(torch.nn.Module):
    """Computes as a layer with an adapter does under peft, which makes none of fake tensors."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * SCALE


def adapt(model, rank):
    """Freezes a model and gives its layers adapters, in place."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        place, _, own = name.rpartition(".")
        if own in TARGETS:
            setattr(model.get_submodule(place), own, Adapted(layer, rank))


@dataclass(eq=False)  # an object of its own, so that its traces can be kept
class Model:
    """An architecture, without weights."""

    name: str
    source: str  # a remark on where its numbers come from
    config: object
    parameters: int  # P
    layer: int  # Pl
    head: int  # V H
    tied: bool
    widths: int  # the inputs and outputs of all layers that an adapter takes
    largest: int  # parameters of the largest of them

    @functools.cache  # noqa: B019 (the few models of a program live as long as it does)
    def trace(self, sharded, e, rank=0) -> tuple[PerToken, PerToken]:
        """Measures a decoder layer and the last norm, on one row. rank: of its adapters.

        It is so long that the weights' own bytes vanish in it.
        """
        config, length = copy.deepcopy(self.config), 2**20
        config.num_hidden_layers = 1
        config.layer_types = kinds(config)[:1]
        # FSDP2 casts a layer's weights and inputs to bfloat16, and a frozen base is in bfloat16;
        # autocast alone leaves both in float32
        dtype = torch.bfloat16 if (sharded or rank) and e == 2 else torch.float32
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=e == 2):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if rank:
                adapt(model, rank)
            decoder = model.get_decoder()
            row = torch.empty(1, length, config.hidden_size, dtype=dtype)
            angle = torch.empty(1, length, head_dim(config), dtype=dtype)
            inputs = {"position_embeddings": (angle, angle), "attention_mask": None}
            layer = functools.partial(decoder.layers[0], **inputs)
            return traced(layer, row), traced(decoder.norm, row.detach())


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kinds(config) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def load(name) -> Model:
    """Counts the parameters of a model, a Hub name or a folder, on the meta device.

    Raises ValueError if it can't be read and has no built-in numbers either.
    """
    source = ""
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        if str(name) not in BUILT_IN:
            raise ValueError(
                f"{name} is neither a Hugging Face folder nor a reachable name on the Hub, nor one"
                f" of those with built-in numbers: {', '.join(BUILT_IN)}"
            ) from error
        config = AutoConfig.for_model(**BUILT_IN[str(name)])
        source = "the Hub can't be reached: built-in numbers"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = model.get_output_embeddings().weight
    adapted = [m.weight for n, m in model.named_modules() if n.rpartition(".")[2] in TARGETS]
    return Model(
        name=Path(name).name,
        source=source,
        config=config,
        parameters=size_of(model),
        layer=max(size_of(layer) for layer in model.get_decoder().layers),
        head=head.numel(),
        tied=head is model.get_input_embeddings().weight,
        widths=sum(sum(weight.shape) for weight in adapted),
        largest=max((weight.numel() for weight in adapted), default=0),
    )


def size_of(module) -> int:
    return sum(p.numel() for p in module.parameters())


def plan(
    cfg,
    model,
    gpus,
    gpu_memory,
    micro_tokens=0,
    utilization=0.5,
    context=CONTEXT,
    at_limits=False,
) -> dict[str, dict[str, float]]:
    """{phase: {component: bytes}} on the fullest GPU, at the moment of a phase when most is held.

    cfg: pmd.Config, or anything with its fields max_prompt, max_completion, max_reprompt,
    micro_tokens, method, teacher, dtype, embedder, gradient_checkpointing, compile_layers,
    tensor_parallel, lora_rank. gpus: of the whole job. gpu_memory: GiB of one. micro_tokens:
    instead of cfg's. utilization: vLLM's share of a GPU; 0 for the transformers sampler. context:
    bytes beside PyTorch's own, 0 on a CPU. at_limits: every prompt and completion is as long as it
    may be, so that the longer rows of the teacher decide how many are in a micro-batch.
    """
    z = sizes(cfg, model, gpus, micro_tokens or cfg.micro_tokens, context > 0, at_limits)
    share = utilization * gpu_memory * GIB
    state = held(cfg, z, share)
    without_gradients = {k: size for k, size in state.items() if not k.startswith("gradients")}
    phases = {"sample": without_gradients | generation(z, share)}
    if cfg.method != "eval":  # of eval.py, which trains nothing
        # a checkpoint is filled in, a weight at a time, while the engine sleeps
        phases["restore"] = without_gradients | {"whole weight": 4 * z.VH * z.sharded}
        phases |= {name: state | parts for name, parts in update(z).items()}
    for components in phases.values():
        ours = sum(size for name, size in components.items() if not name.startswith("vLLM"))
        share_lost = MORE_FRAGMENTED if cfg.compile_layers or cfg.lora_rank else FRAGMENTED
        components["context, fragments"] = context and context + share_lost * ours
    return phases


def sizes(cfg, model, gpus, micro_tokens, on_gpu=True, at_limits=False) -> SimpleNamespace:
    """The quantities that the formulas share, by the symbols of this file's docstring."""
    z = SimpleNamespace(g=gpus, sharded=gpus > 1, config=model.config, tied=model.tied)
    z.checkpointed = cfg.gradient_checkpointing
    z.P, z.Pl, z.VH = model.parameters, model.layer, model.head
    z.H, z.L, z.V = (
        model.config.hidden_size,
        model.config.num_hidden_layers,
        model.config.vocab_size,
    )
    z.Pr = z.P - z.L * z.Pl
    z.e = 4 if cfg.dtype == "float32" else 2
    z.rank = cfg.lora_rank
    z.A = z.rank * model.widths or z.P
    z.trained_head = 0 if z.rank else z.VH
    z.merged = model.largest if z.rank else 0
    z.h = z.e if z.sharded or z.rank else 4
    z.cast = 0 if z.sharded else z.e % 4  # bytes of autocast's copy of a trained number
    z.layer, z.norm = model.trace(z.sharded, z.e, z.rank)
    z.copied = z.cast * z.A
    if cfg.compile_layers:
        z.copied = z.cast * (0 if z.rank else z.Pr)
        z.layer = z.layer._replace(kept=KEPT_COMPILED * z.layer.kept)
    trained = None if cfg.method == "eval" else method_of(cfg)
    z.distills = trained is not None and trained.teaches
    z.embeds = trained is None or trained.memory_mode is not None
    # a second model; a live teacher is the policy
    z.averaged = z.distills and cfg.teacher == "ema" and "teacher" not in trained.idle.split()
    z.row = cfg.max_prompt + cfg.max_completion
    z.teacher_row = cfg.max_reprompt + cfg.max_completion
    z.m = micro_tokens
    # a row longer than --micro_tokens is a micro-batch of its own
    z.S = max(micro_tokens, z.row)
    z.T = max(micro_tokens, z.teacher_row)
    z.N = z.S  # completion tokens: at most all of them
    z.on_gpu = on_gpu
    z.chunk = rows_of_chunk(2 * 4 * z.V, "cuda" if on_gpu else "cpu")
    if at_limits:
        rows = max(1, micro_tokens // max(z.row, z.distills * z.teacher_row))
        z.S, z.T, z.N = rows * z.row, rows * z.teacher_row, rows * cfg.max_completion
    return z


def held(cfg, z, share) -> dict[str, float]:
    """What a process holds from step to step. share: bytes of vLLM's share of a GPU."""
    state = {"weights, float32": 4 * z.A / z.g}
    if z.rank:
        state["frozen weights"] = z.e * z.P
    if cfg.method != "eval":
        state |= {"gradients, float32": 4 * z.A / z.g, "AdamW, float32": 8 * z.A / z.g}
    if z.averaged:
        state["EMA teacher, float32"] = 4 * z.A / z.g
    if cfg.embedder != "hashing" and z.embeds:
        # Qwen3-Embedding-0.6B as float32; its activations are left out
        state["embedder, first GPU"] = 4 * 0.6e9
    if share:
        state["vLLM, asleep"] = ASLEEP
    else:
        state["sampler's copy, float32"] = 4 * z.P * z.sharded
    return state


def generation(z, share) -> dict[str, float]:
    """What generation takes beside that."""
    if share:
        # a weight of the base with what the adapter adds, while it is pushed: three in float32
        return {"vLLM, awake": share, "a merged weight": (12 + z.e) * z.merged}
    # keys and values of m tokens; logits, several times as float32 and float64
    logits = 40 * z.V * (z.m // z.row or 1)
    return {
        "keys and values, logits": kv_bytes(z.config, 1) * 2 * z.m + logits,
        "autocast's weights": z.e % 4 * z.A,
    }


def masks(z, tokens, length, layers) -> float:
    """The masks of windows that are shorter than a row.

    A window takes one of length^2 bytes. SDPA makes e x rows x length^2 of it in a layer.
    """
    sliding = kinds(z.config).count("sliding_attention")
    if not sliding or z.config.sliding_window >= length:
        return 0
    return length**2 + z.e * tokens * length * min(layers, sliding)


def update(z) -> dict[str, dict[str, float]]:
    """What each phase of an update takes beside what is held.

    FSDP2: one layer is whole, and the next one twice (as gathered, and copied out). In the backward
    pass there is also a layer's gradient, and in float32 the two being reduced. The root group is
    whole to the end of the backward pass, the student's and the teacher's. Autocast instead: a copy
    of every weight it met outside compiled layers, the teacher's until the loss is there.
    """
    root = z.e * z.Pr if z.sharded else 0
    roots = {"whole root": (1 + z.averaged) * root}
    back = roots | {
        "whole layers": (4 * z.e + 8) * z.Pl if z.sharded else 0,
        "autocast's weights": z.copied,
    }
    # Between the passes, of each layer its input, or all it keeps; the embedding's output; the last
    # norm.
    if z.checkpointed:
        kept = z.S * (z.h * z.H + z.norm.kept + z.L * z.h * z.H)
        again = z.S * z.layer.backward + masks(z, z.S, z.row, 1)
    else:
        kept = z.S * (z.h * z.H + z.norm.kept + z.L * z.layer.kept) + masks(z, z.S, z.row, z.L)
        again = z.S * (z.layer.backward - z.layer.kept)
    logits = 2 * min(z.N, z.chunk) * z.V
    chunk = z.e * logits + min(TILES, 4 * logits) if z.on_gpu else 4 * logits
    return {
        "teacher": {
            "whole root": root,
            "whole layers": 3 * z.e * z.Pl if z.sharded else 0,
            "autocast's weights": z.copied,
            "activations": z.T * z.layer.forward + masks(z, z.T, z.teacher_row, 1),
        },
        # hidden states twice (picked from the rows, then where the weight is not 0), their gradient
        # in float32; logits of both; the head's gradient in float32, a chunk's part of it in e
        # bytes on a CPU, under autocast beside a copy of the head
        "loss": roots
        | {
            "autocast's weights": (1 + z.averaged) * z.copied,
            "activations": kept,
            "loss chunk": chunk,
            "hidden states": (2 * (1 + z.distills) * z.h + 4) * z.N * z.H,
            "head's gradient": (4 + z.e * (not z.on_gpu) + z.cast) * z.trained_head,
        },
        # backward begins: the saved gradients, beside them scaled, in the type of what they are of
        "scale": back
        | {
            "activations": kept,
            "hidden states": (4 + z.h) * z.N * z.H,
            "head's gradient": (4 + (z.e if z.sharded else 4)) * z.trained_head,
        },
        # the top layer; the head's gradient waits for the embedding's where they share a group or
        # are one weight
        "backward": back
        | {
            "activations": kept + again,
            "head's gradient": (z.sharded or z.tied) * z.e * z.trained_head,
        },
        # it ends: the root group's gradient in e bytes and, to be reduced, in float32; or the
        # embedding's and tied head's
        "root": roots
        | {"head's gradient": (z.e + 4) * z.Pr if z.sharded else (1 + z.tied) * 4 * z.trained_head},
        # the root of all second moments at once, where AdamW is not one kernel
        "optimizer": {"AdamW's temporaries": 4 * z.A / z.g * (not z.on_gpu)},
    }


def peak(phases) -> tuple[float, str]:
    """Returns the most bytes, and the phase that takes them."""
    return max((sum(components.values()), phase) for phase, components in phases.items())


def kv_bytes(config, length) -> float:
    """Returns the bytes of keys and values of one sequence in bfloat16.

    Sliding layers hold their window only.
    """
    tokens = 0
    for kind in kinds(config):
        window = config.sliding_window if kind == "sliding_attention" else length
        tokens += min(length, window)
    return 2 * 2 * config.num_key_value_heads * head_dim(config) * tokens


def kv_room(cfg, model, gpu_memory, utilization) -> float:
    """Returns the bytes that vLLM has for keys and values: its share, less PREFILL and the model.

    The model is in bfloat16 (2 P), whole on each GPU or split over those of an engine.
    """
    return utilization * gpu_memory * GIB - 2 * model.parameters / cfg.tensor_parallel - PREFILL


def kv_needed(cfg, model) -> float:
    """Returns the bytes of keys and values of one sequence on one of an engine's GPUs.

    The GPUs share its heads.
    """
    sharers = min(cfg.tensor_parallel, model.config.num_key_value_heads)
    return kv_bytes(model.config, cfg.max_prompt + cfg.max_completion) / sharers


def starved(cfg, model, gpu_memory, utilization) -> bool:
    """Whether vLLM's share has no room for one sequence."""
    return utilization > 0 and kv_room(cfg, model, gpu_memory, utilization) < kv_needed(cfg, model)


def largest(cfg, model, gpus, gpu_memory, utilization=0.5) -> int:
    """Returns the largest --micro_tokens that fits, in steps of 512.

    It is 1 if single rows fit but no step does, and 0 if nothing fits.
    """

    def too_much(tokens):
        size, _ = peak(plan(cfg, model, gpus, gpu_memory, tokens or 1, utilization))
        return size > gpu_memory * GIB

    steps = bisect.bisect_left(range(0, MOST_TOKENS + 1, 512), True, key=too_much) - 1
    if steps < 0 or starved(cfg, model, gpu_memory, utilization):
        return 0
    return max(1, 512 * steps)


def fits(cfg, model, gpus, gpu_memory, utilization=0.5) -> tuple[bool, str]:
    """Returns whether a run fits, and a sentence: its size, or the excess and the mildest cure.

    cfg, gpus, gpu_memory, utilization: as in `plan`. model: a Hub name, a folder or a Model.
    Raises ValueError as `load` does.
    """
    model = model if isinstance(model, Model) else load(model)
    size, phase = peak(plan(cfg, model, gpus, gpu_memory, 0, utilization))
    where = f"{gpus} x {gpu_memory:g} GiB"
    takes = f"{size / GIB:.1f} GiB of each ({phase}, computed)"
    is_starved = starved(cfg, model, gpu_memory, utilization)
    if size <= gpu_memory * GIB and not is_starved:
        return True, f"{model.name} fits on {where}: it takes at most {takes}"
    if is_starved:
        takes += f", and vLLM's share of {utilization:g} can't hold the model and one sequence"
    cure = mildest_cure(cfg, model, gpus, gpu_memory, utilization)
    return False, f"{model.name} does not fit on {where}: it would take {takes}; use {cure}"


def mildest_cure(cfg, model, gpus, gpu_memory, utilization) -> str:
    """Returns the flags, or the number of GPUs, with which a run fits: the first that do.

    Tried in turn are fewer tokens, another share for vLLM, a split engine and more GPUs, each
    without and with recomputation.
    """
    settings = [("", gpus, utilization, {})]
    if utilization:
        shares = sorted((u / 100 for u in range(5, 95, 5)), key=lambda u: abs(u - utilization))
        settings += [(f"--gpu_memory_utilization {u} ", gpus, u, {}) for u in shares]
        for t in (2, 4, 8):
            if cfg.tensor_parallel < t <= gpus and gpus % t == 0:
                changed = {"tensor_parallel": t}
                settings.append((f"--tensor_parallel {t} ", gpus, utilization, changed))
    for n in (2, 4, 8, 16, 32, 64):
        if n > gpus:
            settings.append((f"{n} such GPUs and ", n, utilization, {}))
    savings = [("", {})]
    if not cfg.gradient_checkpointing:
        savings.append(("--gradient_checkpointing ", {"gradient_checkpointing": True}))
    for words, n, share, changed in settings:
        for more, saved in savings:
            run = SimpleNamespace(**vars(cfg) | changed | saved)
            tokens = largest(run, model, n, gpu_memory, share)
            if tokens:
                return f"{words}{more}--micro_tokens {min(tokens, cfg.micro_tokens)}"
    return "a smaller model"
