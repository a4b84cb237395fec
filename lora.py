"""Low-rank adapters by hand (Hu et al., arXiv:2106.09685): y = W x + (alpha / r) B A x,
W frozen, B = 0 at the start.

Adapters off is the supervised start; a snapshot of the adapters is a frozen reference for the price of the
adapters alone. No dropout, no hidden state in train()/eval(), and `merge` only when it is called. The base
may be a plain linear layer or one of 4 bits (nf4.py). Files are PEFT's, both ways.
"""

import json
import math
import os
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from checkpoints.nf4 import NF4Linear, frozen_linear, quantise_linears
from plumbing.options import BadInput, write_json, write_whole

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT's prefix; without it PEFT loads nothing and warns once
# Where a decoder stands in the model that PEFT wrapped: a causal LM of transformers, a LLaVA of transformers
# 5 and one of transformers 4, the decoder itself.
PATHS = ("model.", "model.language_model.", "language_model.model.", "")
# PEFT's settings that make of its tensors something else than (alpha / r) B A, with the values that do not
PLAIN = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal"),
} | dict.fromkeys(
    ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern",
     "alpha_pattern", "layer_replication", "target_parameters", "trainable_token_indices",
     "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    (None, False, {}, []),
)  # fmt: skip


def in_dtype(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype)


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update. (..., in) -> (..., out), any float dtype of the base.
    rslora: scaled by alpha / sqrt(r) (arXiv:2312.03732)."""

    def __init__(
        self,
        base: nn.Linear | NF4Linear,
        r: int,
        alpha: float,
        generator: torch.Generator | None = None,
        rslora: bool = False,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        device = (base.codes if isinstance(base, NF4Linear) else base.weight).device
        # kaiming uniform with a = sqrt(5), as the LoRA and PEFT codes start A
        bound = math.sqrt(1 / base.in_features)
        a = torch.rand(r, base.in_features, generator=generator) * 2 * bound - bound
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
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
            return F.linear(x, self.folded, self.base.bias)
        A, B = self.pair()
        if A is None:
            return self.base(x)
        rows = x.reshape(-1, x.shape[-1])
        plain = isinstance(self.base, nn.Linear)
        y = frozen_linear(rows, in_dtype, (self.base.weight,), self.base.bias) if plain else self.base(rows)
        # Added to in place: a sum of its own would read and write wide tensors again.
        y.addmm_((rows @ A.T.to(x.dtype)).to(y.dtype), (B.T * self.scale).to(y.dtype))
        return y.view(*x.shape[:-1], -1)


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def linears(model: nn.Module) -> list[str]:
    """Paths of the layers that could be adapted."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | NF4Linear)]


def add_adapters(
    model, r, alpha, targets=DECODER_LINEARS, generator=None, rslora=False
) -> list[nn.Parameter]:
    """Freezes `model`, wraps every linear layer whose path or last name is in `targets`, returns
    the trainable parameters."""
    model.requires_grad_(False)
    names = [name for name in linears(model) if name in targets or name.split(".")[-1] in targets]
    if not names:
        raise ValueError(f"no linear layer is named any of {', '.join(targets)}: nothing to adapt")
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoRALinear(getattr(owner, child), r, alpha, generator, rslora))
    return [p for layer in layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def freeze_base(decoder: nn.Module, base: str):
    """Freezes a decoder and holds its weights in `base`: float32, bfloat16, or nf4, which is 4 bits for the
    linear layers and bfloat16 for the rest (embedding, head, norms). Before adapters are added."""
    if base == "nf4":
        quantise_linears(decoder, DECODER_LINEARS)
    for parameter in decoder.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(torch.float32 if base == "float32" else torch.bfloat16)


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
    """Within it, without gradient, every adapted layer is one product instead of three: the small ones cost
    more than their arithmetic. The base weights stay as they are. Products in bfloat16 and bases of fewer
    bits than float32 are left alone: W + B A would round small updates away, or undo what few bits save."""
    with torch.no_grad():
        if model.compute_dtype != torch.float32:
            yield
            return
        for layer in layers(model).values():
            if isinstance(layer.base, NF4Linear) or layer.base.weight.dtype != torch.float32:
                continue
            A, B = layer.pair()
            W = layer.base.weight.detach()  # a Parameter would become one of this layer
            layer.folded = W if A is None else torch.addmm(W, B, A, alpha=layer.scale)
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
    """Folds every adapter into its base weight (computed in float32) and puts the plain linear layer back; in
    place of a 4-bit base one in float32."""
    for name, layer in layers(model).items():
        update, plain = layer.scale * layer.lora_B.float() @ layer.lora_A.float(), layer.base
        if isinstance(plain, NF4Linear):
            plain = nn.Linear(plain.in_features, plain.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.base.dequantised() + update, requires_grad=False)
            plain.bias = layer.base.bias
        else:
            plain.weight.copy_(plain.weight.float() + update)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


def save_adapter(model: nn.Module, folder: str, path: str = PATHS[0]):
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does. `path`: where `model` stands in
    the model that is to read them, one of PATHS; the first is that of AutoModelForCausalLM."""
    os.makedirs(folder, exist_ok=True)
    adapted = layers(model)
    first = next(iter(adapted.values()))
    # PEFT adapts every layer of a last name. A LLaVA's image tower has such layers too, so whole paths there.
    whole = "language_model" in path
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "revision": None,
        "inference_mode": True, "r": first.r, "lora_alpha": first.alpha, "use_rslora": first.rslora,
        "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True, "use_dora": False,
        "fan_in_fan_out": False,
        "target_modules": sorted({path + name if whole else name.split(".")[-1] for name in adapted}),
        "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
        "alpha_pattern": {},
    }  # fmt: skip
    tensors = {}
    for name, layer in adapted.items():
        for part in ("lora_A", "lora_B"):
            tensor = getattr(layer, part).detach().cpu().contiguous()
            tensors[f"{PREFIX}{path}{name}.{part}.weight"] = tensor
    write_json(os.path.join(folder, "adapter_config.json"), config)
    content = save(tensors, metadata={"format": "pt"})
    write_whole(os.path.join(folder, "adapter_model.safetensors"), content)


def read_adapter(folder: str) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors) of an adapter that PEFT or `save_adapter` wrote. BadInput: files
    that are missing or broken, settings that are not plain LoRA. A dropout is of PEFT's training alone
    and is ignored."""
    path = os.path.join(folder, "adapter_config.json")
    pickle, weights = (os.path.join(folder, f"adapter_model.{kind}") for kind in ("bin", "safetensors"))
    if os.path.exists(pickle) and not os.path.exists(weights):
        raise BadInput(f"{pickle}: a pickle, which can run code; let PEFT write it anew as safetensors")
    try:
        with open(path) as file:
            config = json.load(file)
        r, alpha = config["r"], config["lora_alpha"]
        if not (isinstance(r, int) and r > 0 and isinstance(alpha, int | float)):
            raise ValueError(f"r {r}, lora_alpha {alpha}")
        odd = [k for k, plain in PLAIN.items() if k in config and config[k] not in plain]
        path = weights
        tensors = load_file(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadInput(
            f"{path}: {error}; name a folder with an adapter that train.py or PEFT saved"
        ) from error
    if odd:
        raise BadInput(
            f"{folder}: {odd[0]} {config[odd[0]]} is not supported; only plain LoRA and rsLoRA are"
        )
    return config, tensors


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str) -> list[nn.Parameter]:
    """Puts an adapter that `save_adapter` or PEFT wrote on a model without adapters, or into one that has the
    same, and returns the trainable parameters. BadInput if any key, shape or setting differs: an adapter that
    matches nothing must never pass for one that does. Nothing is changed then."""
    path = os.path.join(folder, "adapter_model.safetensors")
    config, stored = read_adapter(folder)
    adapted = layers(model)
    bases = {name: layer.base for name, layer in adapted.items()}
    bases = bases or {name: model.get_submodule(name) for name in linears(model)}
    sizes = {name: (base.out_features, base.in_features) for name, base in bases.items()}
    r, alpha, rslora = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))

    def name_of(key):
        """The model's layer that a tensor belongs to, "" for none."""
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight", key)
        names = (found[1].removeprefix(start) for start in PATHS if found and found[1].startswith(start))
        return next((name for name in names if name in sizes), "")

    names = {key: name_of(key) for key in stored}
    wanted = {(name, part) for name in (adapted or names.values()) for part in "AB"}
    have = {(name, key.removesuffix(".weight")[-1]): key for key, name in names.items()}
    odd = [f"{k} fits no layer" for k, name in names.items() if not name]
    odd += [f"lora_{part} of {name} is missing" for name, part in sorted(wanted - have.keys())]
    if odd or not stored or len(have) < len(stored):
        what = f"the first: {odd[0]}" if odd else "or it holds none"
        raise BadInput(
            f"{path}: its names differ from the model's layers, {what}; use the policy it was made for"
        )
    for (name, part), key in have.items():
        shape = (r, sizes[name][1]) if part == "A" else (sizes[name][0], r)
        if stored[key].shape != shape:
            raise BadInput(
                f"{path}: {key} has shape {tuple(stored[key].shape)}, not {shape}: use its own --policy"
            )
    for layer in adapted.values():
        if (layer.r, layer.alpha, layer.rslora) != (r, alpha, rslora):
            raise BadInput(
                f"{folder}: r {r}, alpha {alpha}, rsLoRA {rslora}; the model has {layer.r}, {layer.alpha},"
                f" {layer.rslora}: use the run's own --lora_r and --lora_alpha"
            )
    if not adapted:
        add_adapters(model, r, alpha, set(names.values()), torch.Generator(), rslora)
    adapted = layers(model)
    for (name, part), key in have.items():
        getattr(adapted[name], f"lora_{part}").copy_(stored[key])
    return [p for layer in adapted.values() for p in (layer.lora_A, layer.lora_B)]
