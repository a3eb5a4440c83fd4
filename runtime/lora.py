"""Trains low-rank adapters (LoRA, arXiv 2106.09685) on a frozen base, by peft.

A layer's output becomes W x + s B (A x). W is frozen. A (rank, in) and B (out, rank) are trained in
float32. B starts at 0, so that a run starts at the base. The student and its teacher have an
adapter each on one base. All else sees a model of transformers: its decoder, its head, `generate`.
"""

import copy
import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from runtime.errors import RunError
from runtime.files import reason
from runtime.ranks import Unsupported

# As OPSD's scripts have it, rank 64 and alpha 128 on attention and MLP (siyan-zhao/OPSD,
# scripts/run_opsd.sh): s = alpha / rank = 2, which stays with other ranks
SCALE = 2
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
STUDENT, TEACHER = "student", "teacher"  # the names of the adapters
FILE = "adapter_model.safetensors"  # of peft


def add_adapter(policy, cfg):
    """Freezes a model and adds the adapter that is trained. Its A depends on cfg.seed alone.

    Raises Unsupported if the model has none of the layers of TARGETS.
    """
    from peft import LoraConfig  # seconds to import, and a run without --lora_rank does without

    config = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=SCALE * cfg.lora_rank,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    try:
        policy.add_adapter(config, STUDENT)
    except ValueError as error:
        raise Unsupported(
            f"{cfg.model} has none of the layers that --lora_rank adapts ({', '.join(TARGETS)});"
            " leave the flag out"
        ) from error
    generator = torch.Generator().manual_seed(cfg.seed)
    for layer in adapted_layers(policy):
        # float32 adapters read bfloat16 states under autocast, which casts the weights instead
        layer.cast_input_dtype_enabled = False
        a, b = layer.lora_A[STUDENT], layer.lora_B[STUDENT]
        bound = a.in_features**-0.5  # of peft's initialisation
        values = torch.empty(a.weight.shape).uniform_(-bound, bound, generator=generator)
        a.weight.data = values.to(a.weight.device)
        b.weight.data = b.weight.data.float().zero_()


def is_adapted(model) -> bool:
    return hasattr(model, "peft_config")


def adapted_layers(model) -> list:
    """Returns peft's layers of a model, in its order."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def adapter(model, name):
    """Yields the name and the tensor of each weight of an adapter, as peft names it in a file."""
    for full, parameter in model.named_parameters():
        if f".lora_A.{name}." in full or f".lora_B.{name}." in full:
            yield full.replace(f".{name}.", "."), parameter


class AdapterTeacher:
    """Is the policy's frozen base under an adapter of its own, which starts as the student's.

    It has what a teacher's model is asked for. A pass of it has no gradient.
    """

    def __init__(self, policy):
        self.policy = policy
        config = copy.copy(policy.peft_config[STUDENT])
        with warnings.catch_warnings(action="ignore"):  # that there is an adapter already
            policy.add_adapter(config, TEACHER)
        switch(policy, STUDENT)
        mine = zip(self.parameters(), adapter(policy, STUDENT), strict=True)
        for own, (_, other) in mine:
            own.data = other.detach().clone()

    @property
    def device(self):
        return self.policy.device

    @property
    def config(self):
        return self.policy.config

    def get_decoder(self):
        return self._decode

    @torch.no_grad()
    def _decode(self, **inputs):
        switch(self.policy, TEACHER)
        try:
            return self.policy.get_decoder()(**inputs)
        finally:
            switch(self.policy, STUDENT)

    def get_output_embeddings(self):
        return self.policy.get_output_embeddings()

    def named_parameters(self):
        return adapter(self.policy, TEACHER)

    def parameters(self):
        return (parameter for _, parameter in self.named_parameters())


def switch(policy, name):
    """Has the model compute with an adapter. Only the student's is ever trained."""
    for layer in adapted_layers(policy):
        layer.set_adapter(name, inference_mode=name != STUDENT)


def merged(model):
    """Yields the name and the tensor of each weight of the model without adapters: W + s B A, in
    the dtype of W. One is made at a time. A tied one comes once, under its first name.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        place, adapted, kind = name.rpartition(".base_layer.")
        if adapted and kind == "weight":
            layer = model.get_submodule(place)
            added = layer.get_delta_weight(layer.active_adapters[0])
            parameter = (parameter.float() + added).to(parameter.dtype)
        yield name.replace(".base_layer.", "."), parameter


@torch.no_grad()
def without_adapters(model, outline):
    """Makes a model without adapters on the host, with the weights of `merged`.

    outline: the model on the meta device.
    """
    weights = {name: tensor.cpu() for name, tensor in merged(model)}
    outline.load_state_dict(weights, strict=False, assign=True)
    outline.tie_weights()
    for name, buffer in model.named_buffers():
        place, _, kind = name.rpartition(".")
        setattr(outline.get_submodule(place), kind, buffer.cpu())
    outline.generation_config = model.generation_config
    return outline


def save_adapter(policy, folder):
    """Writes the student's adapter as a folder of peft.

    transformers' from_pretrained finds the base by the name that it holds, and loads both.
    """
    policy.save_pretrained(folder)


def base_of(folder) -> str:
    """Returns the name of the base of a folder of `save_adapter`; "" of any other folder or name.

    A checkpoint has a config.json, too, for which transformers would take it for a whole model.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return ""
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]


@torch.no_grad()
def read_adapter(folder, policy, names, cure):
    """Fills the adapters of these names, in place, from a folder of `save_adapter`.

    Raises RunError if the file can't be read, or lacks a weight. cure: how to go on without it.
    """
    path = folder / FILE
    try:
        saved = load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise RunError(f"{path} can't be read ({reason(error)}): {cure}") from error
    for name in names:
        for key, parameter in adapter(policy, name):
            tensor = saved.get(f"base_model.model.{key}")
            if tensor is None or tensor.shape != parameter.shape:
                raise RunError(f"{path} has no {key} of shape {tuple(parameter.shape)}: {cure}")
            parameter.copy_(tensor)
