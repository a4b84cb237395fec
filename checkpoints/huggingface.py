"""Pretrained weights in the Hugging Face layout, read into this repository's own classes.

Read: folders (config.json beside model.safetensors, or shards with an index) of CLIP and of LLaMA, Mistral,
Qwen2 and Qwen3 decoders; and CLIP under OpenAI's names in one safetensors file. pretrained.py makes whole
policies of them, and writes them back.
"""

import math
import os
from dataclasses import replace

import torch
from safetensors.torch import save

from checkpoints.policies import read_configs
from checkpoints.weight_files import Source, Tensors, fill
from clip import Clip, ClipConfig
from model import Decoder, ModelConfig
from plumbing.options import BadInput, read_json, write_json, write_whole

FOLDER = "name a folder in the Hugging Face layout"
# A config.json may leave out what equals its class's default, and a nested text_config leaves out much.
COMMON = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
DECODERS = {  # model_type: defaults. Vicuna, TinyLlama and SmolLM2 are of type llama
    "llama": COMMON | {"intermediate_size": 11008},
    "mistral": COMMON | {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": COMMON | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": COMMON | {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
    },
}  # fmt: skip
LARGEST = 2**53  # what a config's number lies below: above it not every whole number is a float
# ModelConfig's field: the key in config.json. Read in both directions.
DECODER_KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
}  # fmt: skip
MAY_LACK = {"head_dim": "head_dim", "max_positions": "max_position_embeddings"}
ROPE_KEYS = {  # of ModelConfig's fields, by the type of rope
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor",
        "rope_length": "original_max_position_embeddings",
    },
}  # fmt: skip
# ClipConfig's field: the key in vision_config or text_config, and the class's default
VISION_KEYS = {
    "image_size": ("image_size", 224), "patch_size": ("patch_size", 32), "width": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12), "num_heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
}  # fmt: skip
TEXT_KEYS = {
    "text_width": ("hidden_size", 512), "text_layers": ("num_hidden_layers", 12),
    "text_heads": ("num_attention_heads", 8), "text_length": ("max_position_embeddings", 77),
    "vocab_size": ("vocab_size", 49408), "text_mlp_width": ("intermediate_size", 2048),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- the configs


def number(config: dict, key: str, where: str, kind=int):
    """The positive number under a key. BadInput: it is missing or something else."""
    value = config.get(key)
    if type(value) not in (int, kind) or not 0 < value < LARGEST:
        words = "a whole number" if kind is int else "a number"
        raise BadInput(f"{where}: {key} is {value!r}; it must be {words} above 0 and below 2**53")
    return value


def entry(config: dict, key: str, where: str, kind=dict):
    """The object (or the list or bool, as `kind` says) under a key, empty or false where there is none.
    BadInput: it is something else."""
    value = config.get(key) or kind()
    if not isinstance(value, kind):
        words = {dict: "an object {..}", list: "a list [..]", bool: "true or false"}[kind]
        raise BadInput(f"{where}: {key} is {value!r}; it must be {words}")
    return value


def decoder_config(config: dict, where: str, **ours) -> ModelConfig:
    """ModelConfig of a decoder's config.json, or of the text_config in LLaVA's. ours: fields that the file
    does not know. BadInput: not supported, or no number where one is needed."""
    kind = str(config.get("model_type"))
    if kind not in DECODERS:
        supported = ", ".join([*DECODERS, "clip", "llava"])
        raise BadInput(f"{where}: model_type {kind} is not supported; those that are: {supported}")
    config = DECODERS[kind] | config
    rope = entry(config, "rope_scaling", where) or entry(config, "rope_parameters", where)
    scaling = str(rope.get("rope_type", rope.get("type", "default")))
    refuse_unsupported(config, where, kind, scaling)
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    sizes = {name: number(config, key, where) for name, key in DECODER_KEYS.items()}
    may_lack = MAY_LACK | ({"sliding_window": "sliding_window"} if kind == "mistral" else {})
    for name, key in may_lack.items():
        if config.get(key) is not None:
            sizes[name] = number(config, key, where)
    heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
    if "head_dim" not in sizes and sizes["dim"] % heads:
        raise BadInput(f"{where}: hidden_size {sizes['dim']} is no multiple of {heads} heads")
    if (head_dim := sizes.get("head_dim", sizes["dim"] // heads)) % 2:
        raise BadInput(f"{where}: head_dim {head_dim} is odd, and RoPE turns pairs of channels")
    if heads % kv_heads:
        words = f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        raise BadInput(f"{where}: {words}; copy the model's own config.json")
    for name, key in ROPE_KEYS[scaling].items():
        sizes[name] = number(rope, key, where, float)
    sizes["rope_theta"] = number(rope if "rope_theta" in rope else config, "rope_theta", where, float)
    sizes["norm_eps"] = number(config, "rms_norm_eps", where, float)
    sizes["tied"] = entry(config, "tie_word_embeddings", where, bool)
    of_family = dict(qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", rope_scaling=scaling)
    try:
        return ModelConfig(**sizes, **of_family, **ours)
    except ValueError as error:
        raise BadInput(f"{where}: {error}; copy the model's own config.json") from error


def refuse_unsupported(config: dict, where: str, kind: str, scaling: str):
    """BadInput for what would make our decoder compute something else than the checkpoint's own code."""
    layer_types = entry(config, "layer_types", where, list)
    if entry(config, "use_sliding_window", where, bool) and config.get("sliding_window", 4096) is not None:
        layers = number(config, "num_hidden_layers", where)
        first = number({"max_window_layers": 28} | config, "max_window_layers", where)
        layer_types = layer_types or ["sliding_attention"] * (layers > first)
    packed = config.get("quantization_config")
    causes = {
        "attention_bias true": entry(config, "attention_bias", where, bool),
        "mlp_bias true": entry(config, "mlp_bias", where, bool),
        f"hidden_act {config['hidden_act']}": config["hidden_act"] != "silu",
        "a sliding window in some layers": kind != "mistral" and "sliding_attention" in layer_types,
        f"layer_types {layer_types}": not {"full_attention", "sliding_attention"}.issuperset(layer_types),
        f"rope type {scaling}": scaling not in ROPE_KEYS,
        f"quantization_config (packed weights, {packed})": packed,
    }
    for cause, holds in causes.items():
        if holds:
            raise BadInput(f"{where}: {cause} is not supported; use a checkpoint without it")


def clip_config(vision: dict, where: str, text: dict | None = None, embed_dim: int = 0) -> ClipConfig:
    """ClipConfig of a vision_config and a text_config in config.json; of the image tower if embed_dim is 0.
    BadInput: not supported, or no number where one is needed."""
    sizes, activations = {}, []
    towers = [(vision, VISION_KEYS), (text or {}, TEXT_KEYS)]
    for given, keys in towers if embed_dim else towers[:1]:
        tower = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | dict(keys.values()) | given
        sizes |= {field: number(tower, key, where) for field, (key, _) in keys.items()}
        activations.append(tower["hidden_act"])
        if tower["hidden_act"] not in ("gelu", "quick_gelu") or tower["layer_norm_eps"] != 1e-5:
            raise BadInput(f"{where}: CLIP needs hidden_act gelu or quick_gelu and layer_norm_eps 1e-5")
    if len(set(activations)) > 1:
        raise BadInput(f"{where}: CLIP's towers need the same hidden_act, not {' and '.join(activations)}")
    try:
        return ClipConfig(**sizes, embed_dim=embed_dim, activation=activations[0])
    except ValueError as error:
        raise BadInput(f"{where}: {error}; copy the model's own config.json") from error


def openai_clip_config(tensors: Tensors) -> ClipConfig:
    """Sizes from the weights themselves; every published OpenAI ViT has heads of 64 and QuickGELU."""

    def layers(prefix):
        return len({n[len(prefix) :].split(".")[0] for n in tensors.file_of if n.startswith(prefix)})

    try:
        width, _, patch_size, _ = tensors.shape("visual.conv1.weight")
        places = tensors.shape("visual.positional_embedding")[0]
        vocab_size, text_width = tensors.shape("token_embedding.weight")
        return ClipConfig(
            image_size=math.isqrt(places - 1) * patch_size, patch_size=patch_size, width=width,
            num_layers=layers("visual.transformer.resblocks."), num_heads=width // 64, text_width=text_width,
            text_layers=layers("transformer.resblocks."), text_heads=text_width // 64,
            text_length=tensors.shape("positional_embedding")[0], vocab_size=vocab_size,
            embed_dim=tensors.shape("visual.proj")[1], activation="quick_gelu",
        )  # fmt: skip
    except KeyError as error:
        raise BadInput(f"{tensors.path}: tensor {error} is missing; this is no OpenAI CLIP ViT") from error
    except (ValueError, IndexError, ArithmeticError) as error:
        raise BadInput(f"{tensors.path}: its shapes ({error}) are not those of an OpenAI CLIP ViT") from error


def hf_config(cfg: ModelConfig, dtype=torch.float32) -> dict:
    """The config.json of a decoder, as transformers reads it."""
    kind = "mistral" if cfg.sliding_window else "llama"
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else kind
    rope = {"rope_type": cfg.rope_scaling, "rope_theta": cfg.rope_theta}
    rope |= {key: getattr(cfg, field) for field, key in ROPE_KEYS[cfg.rope_scaling].items()}
    config = {key: getattr(cfg, field) for field, key in DECODER_KEYS.items()} | {
        "rms_norm_eps": cfg.norm_eps, "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind, "dtype": str(dtype).removeprefix("torch."), "hidden_act": "silu",
        "head_dim": cfg.head_dim or cfg.dim // cfg.num_heads, "tie_word_embeddings": cfg.tied,
        "rope_parameters": rope, "rope_theta": cfg.rope_theta,  # readers before rope_parameters look here
    }  # fmt: skip
    return config | ({"sliding_window": cfg.sliding_window} if cfg.sliding_window else {})


# ------------------------------------------------------------------------------------------------- the names


def renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


HF_CLIP = {
    "patch_embedding.": "embeddings.patch_embedding.",
    "class_embedding": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "token_embedding.": "embeddings.token_embedding.",
    "pre_layernorm": "pre_layrnorm",  # as the published files spell it
    ".layers.": ".encoder.layers.",
    ".fc": ".mlp.fc",
    "vision_model.projection": "visual_projection",
    "text_model.projection": "text_projection",
}
OPENAI_CLIP = {
    "vision_model.": "visual.",
    "text_model.": "",
    "patch_embedding": "conv1",
    "position_embedding": "positional_embedding",
    "pre_layernorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}


def clip_sources(names, path: str) -> dict[str, Source]:
    """Where our Clip's parameters lie in that folder, or in that file under OpenAI's names."""
    if os.path.isfile(path):
        return {name: openai_source(name) for name in names}
    if is_embedded(path):
        return {name: Source(f"clip.{name}") for name in names}
    return {name: Source(renamed(name, HF_CLIP)) for name in names}


def openai_source(name: str) -> Source:
    if name.endswith("projection.weight"):
        return Source("visual.proj" if "vision" in name else "text_projection", transposed=True)
    name = renamed(name, OPENAI_CLIP)
    for third, letter in enumerate("qkv"):
        if f"{letter}_proj." in name:
            return Source(name.replace(f"{letter}_proj.", "in_proj_"), third=third)
    return Source(name)


HEAD = "lm_head.weight"
EMBEDDED = ("clip.", "bridge.", "decoder.")  # the parts of a folder that pretrain.py made


def decoder_sources(names, tensors: Tensors) -> dict[str, Source]:
    """Where our Decoder's parameters lie, whatever stands before their names: model. in a causal language
    model, model.language_model. or language_model.model. where it was part of a larger model."""
    body, head = tensors.prefix("embed_tokens.weight", "model."), tensors.prefix(HEAD, "")
    return {name: Source((head if name == HEAD else body) + name) for name in names}


def with_own_head(cfg: ModelConfig, tensors: Tensors) -> ModelConfig:
    """Not tied where config.json says so but the files hold a head that differs from the embedding, which
    transformers then takes. BadInput: there should be a head of its own, and there is none."""
    sources = decoder_sources([HEAD, "embed_tokens.weight"], tensors)
    head = sources[HEAD].name
    if not tensors.path or (head in tensors.file_of) != cfg.tied:
        return cfg
    if not cfg.tied:
        raise BadInput(
            f"{tensors.path}: tensor {HEAD} is missing and config.json says tie_word_embeddings false: no"
            " language model's head was saved; use a checkpoint that a ..ForCausalLM class saved"
        )
    embedding = sources["embed_tokens.weight"].name
    same = embedding in tensors.file_of and torch.equal(tensors[head], tensors[embedding])
    return cfg if same else replace(cfg, tied=False)


# ------------------------------------------------------------------------------------------------ the models


def load_decoder(folder: str, device="cpu", dtype=torch.float32) -> Decoder:
    """A decoder in the Hugging Face layout, frozen. BadInput: see `fill` and `decoder_config`."""
    where = os.path.join(folder, "config.json")
    cfg, tensors = decoder_config(read_json(where, FOLDER), where), Tensors(folder)
    cfg = with_own_head(cfg, tensors)
    with torch.device("meta"):
        model = Decoder(cfg)
    sources = decoder_sources(model.state_dict(), tensors)
    fill(model, tensors, sources, device, dtype, spare=(tensors.prefix(HEAD, "") + HEAD,))
    return model.eval()


def save_decoder(decoder: Decoder, folder: str, dtype=torch.float32) -> None:
    """Writes a decoder as config.json and model.safetensors, as transformers reads them."""
    names = {name: name if name == HEAD else f"model.{name}" for name in decoder.state_dict()}
    tensors = {names[name]: x.to("cpu", dtype).contiguous() for name, x in decoder.state_dict().items()}
    os.makedirs(folder, exist_ok=True)
    write_whole(os.path.join(folder, "model.safetensors"), save(tensors, metadata={"format": "pt"}))
    write_json(os.path.join(folder, "config.json"), hf_config(decoder.cfg, dtype))


def is_embedded(path: str) -> bool:
    """Is it a folder that pretrain.py made, such as weights, with a whole small model in it?"""
    return os.path.isdir(path) and "clip" in read_json(os.path.join(path, "config.json"), FOLDER)


def read_clip_config(path: str) -> ClipConfig:
    """Sizes of `load_clip`'s CLIP: from the folder's config.json, or from the OpenAI file itself."""
    if os.path.isfile(path):
        return openai_clip_config(Tensors(path))
    where = os.path.join(path, "config.json")
    config = read_json(where, FOLDER)
    if "clip" in config:
        return read_configs(path)[1]
    if config.get("model_type") != "clip":
        raise BadInput(f"{where}: model_type {config.get('model_type')} is no clip: name CLIP's folder")
    vision, text = entry(config, "vision_config", where), entry(config, "text_config", where)
    embed_dim = number({"projection_dim": 512} | config, "projection_dim", where)
    return clip_config(vision, where, text, embed_dim)


def load_clip(path: str, device="cpu", dtype=torch.float32) -> Clip:
    """CLIP from a folder in the Hugging Face layout, a safetensors file with OpenAI's names, or a folder that
    pretrain.py made; frozen."""
    with torch.device("meta"):
        model = Clip(read_clip_config(path))
    sources, spare = clip_sources(model.state_dict(), path), EMBEDDED if is_embedded(path) else ()
    fill(model, Tensors(path), sources, device, dtype, spare)
    return model.eval()
