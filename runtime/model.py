"""The policy, the teacher's weights and the optimizer: loaded, copied, averaged."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM

from runtime.clock import clock
from runtime.options import option
from runtime.provenance import HERE
from runtime.ranks import Unsupported, broadcast, device_of, is_sharded, local, rank, shard, world


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
        "processes on this machine, each with its part of every weight (default: one per GPU)",
        within="[0, inf)",
    )
    dtype: Literal["", "float32", "bfloat16"] = option(
        "",
        "of the computation (default: bfloat16 on cuda, float32 on cpu); "
        "weights and optimizer are always float32 [Tab. 11]",
    )
    gradient_checkpointing: bool = option(
        True, "recompute activations in the backward pass: slower, less memory [ours]"
    )
    micro_tokens: int = option(
        32768,
        "padded tokens per forward pass: a memory knob that changes no result [ours]",
        within="[1, inf)",
    )


MODELS = {
    "nano": HERE / "nano",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "OLMo3-Instruct-7B": "allenai/Olmo-3-7B-Instruct",
}

BETA1, WEIGHT_DECAY = 0.9, 0.01  # of AdamW [SDPO]


def make_optimizer(policy, cfg):
    """AdamW with its state made at once, as torch makes it at the first step: all zero, step 0,
    sharded as the weights are.

    So a checkpoint before the first update holds what one after it does, and torch has nothing to
    make while a state is saved or restored, which it does by a real step
    (torch.distributed.checkpoint.state_dict, `_init_optim_state`).
    """
    optimizer = torch.optim.AdamW(
        policy.parameters(), betas=(BETA1, cfg.beta2), weight_decay=WEIGHT_DECAY
    )
    for p in policy.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    optimizer.updates = 0  # so far: `update` sets the learning rate by it
    return optimizer


def copy_of(policy, cfg):
    """Another model with the same weights. Of a sharded policy it is sharded too, and never whole
    anywhere.
    """
    return (
        shard(outline(policy.config), cfg, twin=policy)
        if is_sharded(policy)
        else copy.deepcopy(policy)
    )


@torch.no_grad()
def follow(teacher, policy, cfg):
    """teacher += rate * (policy - teacher), unless the teacher is the policy."""
    if teacher is not policy:
        with clock("optimizer"):
            for t, p in zip(teacher.parameters(), policy.parameters(), strict=True):
                local(t).lerp_(local(p), cfg.ema_rate)


def load_policy(cfg):
    """The model with float32 weights, whatever it was stored in: at lr 1e-6 an Adam step moves 2%
    of bfloat16 weights.

    Without dropout, so that sampling and training see one and the same distribution. On several
    ranks only rank 0 reads the weights, on its host, and `shard` deals them out: elsewhere the
    model is on the meta device. Raises Unsupported for an architecture whose logits are not its
    head times its last hidden state, which is what kernels.py takes them for.
    """
    device, policy, about = device_of(cfg), None, None
    if rank() == 0:
        policy = AutoModelForCausalLM.from_pretrained(
            MODELS.get(cfg.model, cfg.model), dtype=torch.float32
        ).eval()
        policy.to(device if world() == 1 else "cpu")
        require_plain_head(policy, cfg)
        about = policy.config, policy.generation_config
    config, generation_config = broadcast(about)
    policy = policy or outline(config)
    policy.generation_config = generation_config  # its EOS ids end a text on every rank
    for module in policy.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if cfg.gradient_checkpointing:
        # transformers has renamed it, and vllm 0.32 wants one from before that
        enable = (
            getattr(policy, "activation_checkpointing_enable", None)
            or policy.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if device.type == "cpu" and sum(p.numel() for p in policy.parameters()) < 20e6:
        torch.set_num_threads(1)  # a tiny model's threads wait for each other more than they work
    return policy


def outline(config):
    """A model of transformers without its weights, on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def require_plain_head(policy, cfg):
    """Raises Unsupported unless the logits are the head times the last hidden state.

    A softcap is read from the configuration too: where weights are random, it does not show.
    """
    softcap = getattr(policy.config.get_text_config(), "final_logit_softcapping", None)
    probe = torch.arange(1, 9, device=policy.device)[None]
    logits = (
        policy.get_decoder()(input_ids=probe).last_hidden_state
        @ policy.get_output_embeddings().weight.T
    )
    same = torch.allclose(policy(input_ids=probe).logits, logits, rtol=1e-3, atol=1e-3)
    if softcap or not same:
        how = f" (final_logit_softcapping {softcap})" if softcap else ""
        raise Unsupported(
            f"{cfg.model} transforms its logits after the head{how}, which the losses here do not"
            " support"
        )
