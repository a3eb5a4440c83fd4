"""The policy, the teacher's weights and the optimizer: loaded, copied, averaged."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM

from runtime.clock import clock
from runtime.logits import logit_scale, softcap_of
from runtime.lora import AdapterTeacher, add_adapter, base_of, is_adapted, without_adapters
from runtime.options import option
from runtime.provenance import HERE
from runtime.ranks import (
    Unsupported,
    broadcast,
    compute_dtype,
    device_of,
    is_sharded,
    local,
    rank,
    shard,
    world,
)


@dataclass
class ModelOptions:
    """The model and the machine."""

    model: str = option(
        "nano",
        "a Hugging Face folder or Hub name, Qwen3-8B or OLMo3-Instruct-7B; nano is the"
        " embedded one",
    )
    device: str = option(
        "", "cpu, cuda, ... (default: cuda if there is one; the embedded model stays on cpu)"
    )
    nproc: int = option(
        0,
        "processes on this machine, over which the weights are sharded (default: one per GPU)",
        within="[0, inf)",
    )
    dtype: Literal["", "float32", "bfloat16"] = option(
        "",
        "type of the computation (default: bfloat16 on cuda, float32 on cpu); "
        "weights and optimizer are always float32 [Tab. 11]",
    )
    gradient_checkpointing: bool = option(
        True, "recompute activations in the backward pass: slower, less memory [ours]"
    )
    micro_tokens: int = option(
        32768,
        "maximum padded tokens per forward pass: lower it if memory runs out, the result stays the"
        " same [ours]",
        within="[1, inf)",
    )
    compile_layers: bool = option(
        False,
        "compile each decoder layer with torch.compile: on a GPU an update takes about two thirds"
        " of the time, and the first one a minute more; needs --sampler vllm and one process"
        " [ours]",
    )
    lora_rank: int = option(
        0,
        "train adapters of this rank on a frozen base, instead of all weights, so that 8B fits on"
        " one GPU; needs a higher --lr; 0 trains all weights [deviation 13; OPSD, SGSD and AVSD:"
        " 64]",
        within="[0, inf)",
    )


MODELS = {
    "nano": HERE / "nano",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "OLMo3-Instruct-7B": "allenai/Olmo-3-7B-Instruct",
}


def folder_or_name(model) -> str:
    """The absolute path of a model's folder, for records that are read elsewhere, or its name."""
    is_folder = model not in MODELS and Path(model).is_dir()
    return str(Path(model).absolute()) if is_folder else str(model)


BETA1, WEIGHT_DECAY = 0.9, 0.01  # of AdamW [SDPO]


def make_optimizer(policy, cfg):
    """AdamW with its state made at once, as torch makes it at the first step: all zero, step 0,
    sharded as the weights are. It has the weights that are trained alone.

    So a checkpoint before the first update holds what one after it does, and torch has nothing to
    make while a state is saved or restored, which it does by a real step
    (torch.distributed.checkpoint.state_dict, `_init_optim_state`).
    """
    weights = trained(policy)
    fused = is_fused(policy.device)  # one pass over weights and states
    optimizer = torch.optim.AdamW(
        weights, betas=(BETA1, cfg.beta2), weight_decay=WEIGHT_DECAY, fused=fused
    )
    for p in weights:
        optimizer.state[p] = {
            # where torch wants it: beside a weight, or on the host
            "step": torch.zeros((), device=p.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    optimizer.updates = 0  # so far: `update` sets the learning rate by it
    return optimizer


def is_fused(device) -> bool:
    """Whether AdamW runs as one kernel. On a CPU it would round otherwise than it did so far."""
    return device.type == "cuda"


def compile_layers(model):
    """Compiles each decoder layer for all lengths, in place. Weights and their names stay."""
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True)


def trained(policy) -> list:
    """The weights that an optimizer moves: all, or those of the student's adapter."""
    return [p for p in policy.parameters() if p.requires_grad]


def copy_of(policy, cfg):
    """Another model with the same weights. Of a sharded policy it is sharded too, and never whole
    anywhere. Of an adapted one it has the same base, under another adapter.
    """
    if is_adapted(policy):
        return AdapterTeacher(policy)
    if is_sharded(policy):
        return shard(outline(policy.config), cfg, twin=policy)
    twin = copy.deepcopy(policy)  # which leaves out what was compiled
    if cfg.compile_layers:
        compile_layers(twin)
    return twin


@torch.no_grad()
def follow(teacher, policy, rate):
    """teacher += rate * (policy - teacher), unless the teacher is the policy. Of adapters A and B
    follow each by itself.
    """
    if teacher is not policy:
        with clock("optimizer"):
            for t, p in zip(teacher.parameters(), trained(policy), strict=True):
                local(t).lerp_(local(p), rate)


def load_policy(cfg):
    """The model with float32 weights, whatever it was stored in: at lr 1e-6 an Adam step moves 2%
    of bfloat16 weights. With --lora_rank they are frozen, in the dtype of the computation, and an
    adapter is trained beside them.

    Without dropout, so that sampling and training see one and the same distribution. On several
    ranks only rank 0 reads the weights, on its host, and `shard` deals them out: elsewhere the
    model is on the meta device. Raises Unsupported for an architecture whose logits are not its
    head times its last hidden state and a scale, which is what kernels.py takes them for.
    """
    device, policy, about = device_of(cfg), None, None
    if rank() == 0:
        policy = read_policy(MODELS.get(cfg.model, cfg.model), device, cfg)
        policy.to(device if world() == 1 else "cpu")
        require_plain_head(policy, cfg)
        about = policy.config, policy.generation_config
    config, generation_config = broadcast(about)
    policy = policy or outline(config)
    policy.generation_config = generation_config  # its EOS ids end a text on every rank
    prepare(policy, cfg)
    if device.type == "cpu" and sum(p.numel() for p in policy.parameters()) < 20e6:
        torch.set_num_threads(1)  # a tiny model's threads wait for each other more than they work
    return policy


def prepare(policy, cfg):
    """Switches dropout off, and on what the flags ask for: adapters, recomputation, compilation."""
    for module in policy.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if cfg.lora_rank:
        add_adapter(policy, cfg)
    if cfg.gradient_checkpointing:
        # transformers has renamed it, and vllm 0.32 wants one from before that
        enable = (
            getattr(policy, "activation_checkpointing_enable", None)
            or policy.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if cfg.compile_layers:
        compile_layers(policy)


def read_policy(name, device, cfg):
    """Reads a model on the host. Of a checkpoint of --lora_rank the adapter is merged.

    Raises Unsupported if a weight is missing or of another shape, which transformers would draw at
    random.
    """
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    dtype = compute_dtype(device, cfg) if cfg.lora_rank else torch.float32
    base = base_of(name)
    policy, loading = AutoModelForCausalLM.from_pretrained(base or name, dtype=dtype, **options)
    absent, others = loading["missing_keys"], [key for key, *_ in loading["mismatched_keys"]]
    if absent or others:
        first = sorted([*absent, *others])[0]
        raise Unsupported(
            f"the weights of --model {cfg.model} are not those of its config.json: {len(absent)}"
            f" are missing and {len(others)} of another shape, such as {first}; get the folder"
            " anew, or give another --model"
        )
    policy.eval()
    if base:
        policy.load_adapter(str(name))
        policy = without_adapters(policy, outline(policy.config)).eval()
    return policy


def outline(config):
    """A model of transformers without its weights, on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def require_plain_head(policy, cfg):
    """Raises Unsupported unless the logits are the head times the last hidden state, with the scale
    and within the bound that the configuration names.
    """
    probe = torch.arange(1, 9, device=policy.device)[None]
    hidden = policy.get_decoder()(input_ids=probe).last_hidden_state
    # the product as the model has it, or bfloat16 would round it otherwise
    logits = torch.nn.functional.linear(hidden, policy.get_output_embeddings().weight)
    logits = logits * logit_scale(policy.config)
    if cap := softcap_of(policy.config):
        logits = cap * (logits / cap).tanh()
    if not torch.allclose(policy(input_ids=probe).logits, logits, rtol=1e-3, atol=1e-3):
        raise Unsupported(
            f"{cfg.model} changes its logits after the head in a way that the losses do not know"
        )
