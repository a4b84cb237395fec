"""Adapters in PEFT's files, both ways: adapter_config.json and adapter_model.safetensors."""

import os
import re

import torch
from safetensors.torch import save
from torch import Tensor, nn

import lora
from plumbing.options import BadInput, read_json, read_tensors, refuse_pickles, write_json, write_whole

SAVED = "name a folder with an adapter that train.py or PEFT saved"
PREFIX = "base_model.model."  # PEFT's prefix; without it PEFT loads nothing and warns once
# Where a decoder stands in the model that PEFT wrapped: a causal LM of transformers, a LLaVA of transformers
# 5 and one of transformers 4, the decoder itself.
PATHS = ("model.", "model.language_model.", "language_model.model.", "")
# PEFT's settings that we support only at these values; with others the update is not (alpha / r) B A.
PLAIN = {
    "peft_type": ("LORA",), "use_rslora": (True, False, None), "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
} | dict.fromkeys(
    ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern",
     "alpha_pattern", "layer_replication", "target_parameters", "trainable_token_indices",
     "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    (None, False, {}, []),
)  # fmt: skip


def save_adapter(model: nn.Module, folder: str, path: str = PATHS[0]):
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does. `path`: where `model` stands in
    the model that is to read them, one of PATHS; the first is that of AutoModelForCausalLM."""
    os.makedirs(folder, exist_ok=True)
    adapted = lora.layers(model)
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
    write_whole(os.path.join(folder, "adapter_model.safetensors"), save(tensors, {"format": "pt"}))


def read_adapter(folder: str) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors) of an adapter that PEFT or `save_adapter` wrote; r and lora_alpha are 8
    where PEFT leaves them out. A dropout matters to PEFT's training only and is ignored. BadInput: files that
    are missing or broken, settings that are not plain LoRA."""
    refuse_pickles(folder, "adapter_model.safetensors")
    config_path = os.path.join(folder, "adapter_config.json")
    path = os.path.join(folder, "adapter_model.safetensors")
    config = {"r": 8, "lora_alpha": 8} | read_json(config_path, SAVED)
    r, alpha = config["r"], config["lora_alpha"]
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        words = "both must be numbers above 0, lora_alpha below a million"
        raise BadInput(f"{config_path}: r is {r!r}, lora_alpha is {alpha!r}; {words}")
    for name, plain in PLAIN.items():
        if name in config and config[name] not in plain:
            words = f"{name} {config[name]!r} is not supported; only plain LoRA and rsLoRA are"
            raise BadInput(f"{config_path}: {words}")
    return config, read_tensors(path, SAVED)[0]


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str) -> None:
    """Puts an adapter that `save_adapter` or PEFT wrote on a model without adapters, or into one that has the
    same. BadInput if any key, shape or setting differs: an adapter that matches nothing must never pass for
    one that does. Nothing is changed then."""
    path = os.path.join(folder, "adapter_model.safetensors")
    config, stored = read_adapter(folder)
    adapted = lora.layers(model)
    bases = {name: layer.base for name, layer in adapted.items()}
    bases = bases or {name: model.get_submodule(name) for name in lora.linears(model)}
    r, alpha, rslora = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))

    def layer_of(key):
        """The model's layer that a tensor belongs to, "" for none."""
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight", key)
        names = (found[1].removeprefix(start) for start in PATHS if found and found[1].startswith(start))
        return next((name for name in names if name in bases), "")

    layers = {key: layer_of(key) for key in stored}
    wanted = {(name, part) for name in (adapted or layers.values()) for part in "AB"}
    key_of = {(name, key.removesuffix(".weight")[-1]): key for key, name in layers.items()}
    problems = [f"{key} fits no layer" for key, name in layers.items() if not name]
    problems += [f"lora_{part} of {name} is missing" for name, part in sorted(wanted - key_of.keys())]
    if problems or not stored or len(key_of) < len(stored):
        what = f"the first: {problems[0]}" if problems else "or it holds none"
        words = f"its names differ from the model's layers, {what}"
        raise BadInput(f"{path}: {words}; use the policy it was made for")
    for (name, part), key in key_of.items():
        shape = (r, bases[name].in_features) if part == "A" else (bases[name].out_features, r)
        if stored[key].shape != shape:
            found = tuple(stored[key].shape)
            raise BadInput(f"{path}: {key} has shape {found}, not {shape}: use its own --policy")
        if stored[key].float().abs().max() >= 1e12:  # alpha B A, a sum of r products, is finite in float32
            raise BadInput(f"{path}: {key} is not below 1e12; use a sound copy of this file")
    for layer in adapted.values():
        if (layer.r, layer.alpha, layer.rslora) != (r, alpha, rslora):
            raise BadInput(
                f"{folder}: r {r}, alpha {alpha}, rsLoRA {rslora}; the model has {layer.r}, {layer.alpha},"
                f" {layer.rslora}: use the run's own --lora_r and --lora_alpha"
            )
    if not adapted:
        lora.add_adapters(model, r, alpha, set(layers.values()), torch.Generator(), rslora)
    adapted = lora.layers(model)
    for (name, part), key in key_of.items():
        getattr(adapted[name], f"lora_{part}").copy_(stored[key])
