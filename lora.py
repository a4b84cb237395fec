"""Low-rank adapters by hand (Hu et al., arXiv:2106.09685): y = W x + (alpha / r) B A x,
W frozen, B = 0 at the start.

Adapters off is the supervised start; a snapshot of the adapters is a frozen reference for the price of the
adapters alone. No dropout, no hidden state in train()/eval(), and `merge` only when it is called.
"""

import math
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cli import BadInput, write_json, write_whole

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT's prefix; without it PEFT loads nothing and warns once


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update. (..., in) -> (..., out), any float dtype of the base."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.scale = r, alpha, alpha / r
        out_features, in_features = base.weight.shape
        bound = math.sqrt(
            1 / in_features
        )  # kaiming uniform with a = sqrt(5), as the LoRA and PEFT codes start A
        a = torch.rand(r, in_features, generator=generator) * 2 * bound - bound
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=base.weight.device))
        self.register_buffer("reference_A", None, persistent=False)
        self.register_buffer("reference_B", None, persistent=False)
        self.use = "policy"  # policy | reference | off
        self.folded = None  # within folded(): W + (alpha / r) B A, (out, in)

    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        """The A and B in use; None when it is the start itself."""
        if self.use == "policy":
            return self.lora_A, self.lora_B
        return (None, None) if self.use == "off" else (self.reference_A, self.reference_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.folded is not None:
            return F.linear(x, self.folded)
        y, (A, B) = self.base(x), self.pair()
        return y if A is None else y + (x @ A.T.to(x.dtype)) @ (B.T * self.scale).to(x.dtype)


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_adapters(model, r, alpha, targets=DECODER_LINEARS, generator=None) -> list[nn.Parameter]:
    """Freezes `model`, wraps every linear layer whose last name is in `targets`,
    returns the trainable parameters."""
    model.requires_grad_(False)
    linears = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in targets
    ]
    if not linears:
        raise ValueError(f"no linear layer is named any of {', '.join(targets)}: nothing to adapt")
    for name in linears:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoRALinear(getattr(owner, child), r, alpha, generator))
    return [p for layer in layers(model).values() for p in (layer.lora_A, layer.lora_B)]


@contextmanager
def using(model: nn.Module, which: str):
    """Within it the model is the "policy", the frozen "reference" or the start itself ("off")."""
    adapted = layers(model).values()
    before = [layer.use for layer in adapted]
    for layer in adapted:
        layer.use = which
    try:
        yield
    finally:
        for layer, use in zip(adapted, before, strict=True):
            layer.use = use


@contextmanager
def folded(model: nn.Module):
    """Within it, without gradient, every adapted layer is one product instead of three: for sampling, where
    the small ones cost more than their arithmetic. The base weights stay as they are."""
    with torch.no_grad():
        for layer in layers(model).values():
            A, B = layer.pair()
            layer.folded = layer.base.weight if A is None else layer.base.weight + layer.scale * (B @ A)
        try:
            yield
        finally:
            for layer in layers(model).values():
                layer.folded = None


def freeze_reference(model: nn.Module):
    """From now on "reference" is the policy as it is here (the paper does this at every epoch's start)."""
    for layer in layers(model).values():
        layer.reference_A, layer.reference_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()


@torch.no_grad()
def merge(model: nn.Module):
    """Folds every adapter into its base weight (computed in float32) and puts the plain linear layer back."""
    for name, layer in layers(model).items():
        weight = layer.base.weight
        weight.copy_(weight.float() + layer.scale * layer.lora_B.float() @ layer.lora_A.float())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers(model).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    return tensors


def save_adapter(model: nn.Module, folder: str):
    """Writes adapter_model.safetensors and adapter_config.json (PEFT's layout)."""
    os.makedirs(folder, exist_ok=True)
    first = next(iter(layers(model).values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-1] for name in layers(model)}),
        "base_model_name_or_path": None,
    }
    write_json(os.path.join(folder, "adapter_config.json"), config)
    write_whole(os.path.join(folder, "adapter_model.safetensors"), save(adapter_tensors(model)))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str):
    """Loads what `save_adapter` wrote into a model that has adapters. BadInput if any key or shape differs:
    an adapter that matches nothing must never pass for one that does."""
    path = os.path.join(folder, "adapter_model.safetensors")
    try:
        stored, wanted = load_file(path), adapter_tensors(model)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: {error}; name a folder with an adapter that train.py saved") from error
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())
        raise BadInput(f"{path}: {len(odd)} names differ from the model's adapters, the first is {odd[0]}")
    for key, tensor in stored.items():
        if tensor.shape != wanted[key].shape:
            raise BadInput(
                f"{path}: {key} has shape {tuple(tensor.shape)}, the model's is {tuple(wanted[key].shape)}"
                ": use the run's own --lora_r and --policy"
            )
    for name, layer in layers(model).items():
        layer.lora_A.copy_(stored[f"{PREFIX}{name}.lora_A.weight"])
        layer.lora_B.copy_(stored[f"{PREFIX}{name}.lora_B.weight"])
