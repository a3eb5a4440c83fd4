"""Several devices: one process each, under torchrun. Every rank runs train(); they differ in the
data they hold. Rank 0 owns the memory's file and writes the records. One process is a world of one
rank, through the same lines.
"""

import atexit
import contextlib
import functools
import os
import shlex
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from kernels import SOFTCAP
from runtime.logits import softcap_of

# seconds between SIGTERM and SIGKILL of a job with several processes: a step has to end and be
# saved
GRACE = 1800


class Unsupported(ValueError):
    """A model that this code can't train, found out only when it is loaded."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """Every rank's value, on every rank."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def count_ranks(cfg) -> int:
    """Of this job, or of the one that `start_ranks` will start."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", 1))
    return cfg.nproc or max(1, torch.cuda.device_count() if cfg.device in ("", "cuda") else 1)


def start_ranks(cfg):
    """With several GPUs or --nproc, and outside torchrun, starts this program again, once for each;
    inside it, joins.
    """
    count = count_ranks(cfg)
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # a rank may wait for the others' generation
        dist.init_process_group(backend, timeout=timedelta(minutes=60))
        if device_of(cfg).type == "cuda":
            torch.cuda.set_device(device_of(cfg))
        end_with_the_others()
    elif count > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
            f"--shutdown-timeout={GRACE}",
            "--",
            *sys.argv,
        ]
        print("restarting as: " + shlex.join(command), flush=True)
        os.execv(sys.executable, command)


@contextlib.contextmanager
def ranks_around(cfg):
    """Starts the ranks after the checks in its body, or every process would say what is wrong.
    Under torchrun, which has started them, joins first. Gives whether this process will be replaced
    by those of the ranks.
    """
    joined = "RANK" in os.environ
    if joined:
        start_ranks(cfg)
    yield not joined and count_ranks(cfg) > 1
    if not joined:
        start_ranks(cfg)


def a_rank_has_ended() -> bool:
    """Whether another rank of this launcher is gone, as far as /proc tells: then SIGTERM means that
    the job has failed.
    """

    def runs(process):
        try:
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            return (
                parent == str(os.getppid())
                and state not in "ZX"
                and b"\0LOCAL_RANK=" in (process / "environ").read_bytes()
            )
        except OSError:  # it has just ended, or is somebody else's
            return False

    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return (
        count > 1
        and Path("/proc").is_dir()
        and sum(map(runs, Path("/proc").glob("[0-9]*"))) < count
    )


def end_with_the_others():
    """From now on SIGTERM ends this rank at once where another one is gone, though it may wait for
    that one in a collective, where Python runs no handler: else a job that has failed would hold
    its devices for all of GRACE.

    Where all ranks are there, SIGTERM is for the run's own handler alone.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    # written to by the handler in C, whatever Python does
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch():
        while numbers := os.read(read, 1):
            if numbers[0] == signal.SIGTERM and a_rank_has_ended():
                os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def end_ranks(code=0):
    """Ends the process of a rank, where all ranks end, after what is registered for its exit;
    outside torchrun does nothing.

    Not through the interpreter's shutdown: torch's caches of sharded tensors keep gloo's threads
    beyond their group, and one that still frees a tensor then aborts a process whose work is done
    (pytorch/pytorch#179291). A rank that fails does not call this, since NCCL may wait for the
    others. vLLM, once imported, leaves the group itself, and complains otherwise.
    """
    if dist.is_initialized():
        if "vllm" not in sys.modules:
            dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def device_of(cfg):
    """This rank's device."""
    if cfg.device not in ("", "cuda"):
        return torch.device(cfg.device)
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@contextlib.contextmanager
def compute(model, cfg):
    """The context of every forward pass and its loss: the bound of the model's logits, and bfloat16
    autocast over float32 weights, where that is asked for.
    """
    lowered = compute_dtype(model.device, cfg) == torch.bfloat16
    before = SOFTCAP.set(softcap_of(model.config))
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=lowered):
            yield
    finally:
        SOFTCAP.reset(before)


def compute_dtype(device, cfg):
    return getattr(torch, cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def shard(model, cfg, twin=None):
    """FSDP2: each rank holds a part of every weight; a layer is whole while it computes. Gradients
    are SUMMED over ranks (losses are divided by global token counts), never in bfloat16. The root
    group holds embedding, last norm and head, so tied embeddings are one weight, and `forward` has
    them whole for the loss. Does nothing in a world of one rank.

    The weights are rank 0's, a layer at a time, so that no other rank ever holds them whole: there
    the model may be on the meta device. twin: a sharded model of the same architecture, whose
    weights they are instead. Raises Unsupported for a model without a list of layers.
    """
    if world() == 1 or is_sharded(model):
        return model
    if not hasattr(model.get_decoder(), "layers"):
        raise Unsupported(
            f"{cfg.model} has no list of layers to share out over {world()} processes; use"
            " --nproc 1"
        )
    device = device_of(cfg)
    bf16 = compute_dtype(device, cfg) == torch.bfloat16
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (world(),))
    for module in (*model.get_decoder().layers, model):
        materialise(module, device, deal=twin is None)
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if twin is not None:
        copy_weights(twin, model)
    model.call = lambda function: function()
    register_fsdp_forward_method(model, "call")
    return model


def materialise(module, device, deal):
    """Puts the weights and buffers of a module on `device`, what is sharded left alone: rank 0's on
    every rank (deal; collective), else empty ones where it is on the meta device. What is one
    tensor under two names stays one.
    """
    made = {}

    def put(tensor):
        new = (
            torch.empty_like(tensor, device=device)
            if tensor.is_meta
            else tensor.detach().to(device)
        )
        if deal:
            dist.broadcast(new, src=0)
        return (
            torch.nn.Parameter(new, tensor.requires_grad)
            if isinstance(tensor, torch.nn.Parameter)
            else new
        )

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in made:
                    # with the old one, or its id could be another's
                    made[id(tensor)] = (tensor, put(tensor))
                tensors[name] = made[id(tensor)][1]


@torch.no_grad()
def copy_weights(source, target):
    """Weights and buffers of a model into another one, which is sharded as it is, or whole;
    collective where it is whole.
    """
    for own, other in zip(target.parameters(), source.parameters(), strict=True):
        if isinstance(own, DTensor):
            own.to_local().copy_(other.to_local())
        else:
            own.copy_(whole(other))
    for own, other in zip(target.buffers(), source.buffers(), strict=True):
        own.copy_(other)


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def forward(model, function):
    """function() as one forward pass of `model`: where that is sharded, its embedding and head are
    whole inside.
    """
    return model.call(function) if is_sharded(model) else function()


def reshard(model):
    """Lets go of the whole weights that a pass without gradient leaves behind; they would be stale
    after a step.
    """
    if is_sharded(model):
        model.reshard()


def whole(tensor):
    """All of a sharded tensor, on every rank; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class OnRankZero:
    """The memory on several ranks: its methods run on rank 0; the others wait, generate with it,
    and get the result.

    Methods not in SHARED are rank 0's own.
    """

    SHARED = (
        "record",
        "reflect",
        "abstract",
        "contexts",
        "inference_contexts",
        "living_of",
        "overlap",
        "forget",
        "truncate_after",
        "add_problems",
    )

    def __init__(self, memory, sampler):
        self.memory, self.sampler = memory, sampler

    @staticmethod
    def generator(sampler):
        """`generate` for rank 0's memory: tells the others first, who wait in `_follow`."""

        def generate(prompts):
            broadcast(("generate", prompts))
            return sampler.ask(prompts)

        return generate

    def __getattr__(self, name):
        if name not in self.SHARED:
            return getattr(self.memory, name)
        return functools.partial(self._lead if rank() == 0 else self._follow, name)

    def _lead(self, name, *args, **kwargs):
        result = getattr(self.memory, name)(*args, **kwargs)
        return broadcast(("done", result))[1]

    def _follow(self, name, *args, **kwargs):
        while True:
            kind, value = broadcast(None)
            if kind == "done":
                return value
            self.sampler.ask(value)


def alone(memory):
    """Gives rank 0 the memory itself, for what the other ranks take no part in."""
    return memory.memory if isinstance(memory, OnRankZero) else memory
