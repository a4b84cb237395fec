"""Pretrained checkpoints from paths on disk into this repository's own classes, and merged ones back.

Read: the Hugging Face layout (config.json, model.safetensors or shards with an index) of CLIP and of LLaMA,
Mistral, Qwen2 and Qwen3 decoders; and CLIP under OpenAI's names in a safetensors file. policies.py makes
whole policies of them.

A model is first built on the meta device, where it holds no memory. Every name and shape is compared with the
files' headers; only when all of them agree are the tensors read, one by one. So nothing is ever half-loaded.
"""

import itertools
import json
import math
import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from checkpoints.nf4 import quantise_linear
from clip import Clip, ClipConfig
from lora import DECODER_LINEARS
from model import Decoder, ModelConfig
from plumbing.options import BadInput, write_json, write_whole

DECODERS = ("llama", "mistral", "qwen2", "qwen3")  # model_type; Vicuna, TinyLlama, SmolLM2: llama
SUPPORTED = f"{', '.join(DECODERS)}, clip, llava"
# A config.json leaves out what equals its class's default. LLaVA-1.5's text_config relies on this.
LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6,
}  # fmt: skip
CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
# Constants that older writers stored beside the weights; ours are computed.
CONSTANTS = (
    "position_ids", "rotary_emb.inv_freq", "input_resolution", "context_length", "vocab_size",
)  # fmt: skip


PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Source:
    """Where a parameter lies: a tensor of the files, whole, or a third of its rows, or transposed."""

    name: str
    third: int | None = None  # 0, 1, 2: q, k, v of OpenAI's fused in_proj
    transposed: bool = False  # OpenAI stores projections as (in, out)

    def shape(self, stored: tuple) -> tuple:
        if self.third is not None:
            return (stored[0] / 3, *stored[1:])
        return stored[::-1] if self.transposed else stored

    def take(self, tensor: Tensor) -> Tensor:
        if self.third is not None:
            return tensor.chunk(3)[self.third]
        return tensor.T if self.transposed else tensor


# ------------------------------------------------------------------------------------------------- the files


def read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {error}; name a folder in the Hugging Face layout") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object; copy the file again")
    return value


def weight_files(folder: str) -> list[str]:
    """What could be a model's weights there, read or refused; adapters' files are not."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [n for n in names if n.startswith("model") and ".safetensors" in n or n.endswith(PICKLES)]


class Tensors:
    """The tensors of a safetensors file or of a folder with one file or shards, by name; read when asked."""

    def __init__(self, path: str):
        self.file_of, self.handles = {}, {}
        index = os.path.join(path, "model.safetensors.index.json")
        self.path = path  # the file that names all tensors
        if os.path.isfile(path):
            self.open(path)
        elif os.path.exists(index):
            self.path = index
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise BadInput(f"{index}: weight_map is no table of file names; copy the file again")
            for file in sorted(set(weight_map.values())):
                self.open(os.path.join(path, os.path.basename(file)))
            for name, file in weight_map.items():
                if self.file_of.get(name) != os.path.join(path, os.path.basename(file)):
                    raise BadInput(f"{index}: {name} is not in {file}; copy index and shards again, together")
        else:
            self.refuse_pickles(path)
            self.path = os.path.join(path, "model.safetensors")
            if not os.path.exists(self.path):
                raise BadInput(f"{self.path}: no such file; copy the weights there, or give --random_weights")
            self.open(self.path)

    def refuse_pickles(self, folder: str):
        pickles = sorted(name for name in weight_files(folder) if name.endswith(PICKLES))
        if pickles and not os.path.exists(os.path.join(folder, "model.safetensors")):
            raise BadInput(
                f"{os.path.join(folder, pickles[0])}: a pickle, which can run code; trust it? convert it:"
                " safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
            )

    def open(self, file: str):
        if file.endswith(PICKLES):
            self.refuse_pickles(os.path.dirname(file))
            raise BadInput(f"{file}: a pickle, which can run code; convert it to safetensors")
        try:
            self.handles[file] = safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file}: {error}; missing, cut short or damaged: copy it again") from error
        for name in self.handles[file].keys():
            self.file_of[name] = file

    def shape(self, name: str) -> tuple:
        return tuple(self.handles[self.file_of[name]].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self.handles[self.file_of[name]].get_tensor(name)


def fill(model, tensors, sources: dict[str, Source], device, dtype, spare=(), base="", seed=0):
    """Reads the parameters named in `sources` of a model on the meta device, floating to `dtype`; without
    `tensors` (None) draws them (`drawn`). base: in what a VideoLM's decoder is held instead, float32 |
    bfloat16 | nf4; a layer is quantised as soon as it is there. A projector is held in 16 bits beside the
    last two.

    BadInput names the file and the tensor that is missing, extra (but CONSTANTS, and what begins as one of
    `spare` does) or misshapen; all of this before the first tensor is read.
    """
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if name in sources}
    if tensors is not None:
        check_tensors(shapes, tensors, sources, spare)
    generator = torch.Generator(device).manual_seed(seed)
    for path, names in itertools.groupby(shapes, key=lambda name: name.rpartition(".")[0]):
        module, decoder = model.get_submodule(path), bool(base) and path.startswith("decoder.")
        few = bool(base) and base != "float32" and path.startswith(("decoder.", "bridge."))
        kind = torch.bfloat16 if few else dtype
        for name in names:
            if tensors is None:
                read = drawn(name, shapes[name], generator, kind)
            else:
                read = sources[name].take(tensors[sources[name].name]).to(device, kind).contiguous()
            setattr(module, name.rpartition(".")[2], nn.Parameter(read, requires_grad=False))
            del read  # or it would outlive its layer's quantisation, until the next one is read
        owner, _, last = path.rpartition(".")
        if decoder and base == "nf4" and last in DECODER_LINEARS:
            setattr(model.get_submodule(owner), last, quantise_linear(module))


def check_tensors(shapes: dict[str, tuple], tensors: Tensors, sources: dict[str, Source], spare: tuple):
    for name, wanted in shapes.items():
        source = sources[name]
        if source.name not in tensors.file_of:
            raise BadInput(f"{tensors.path}: tensor {source.name} is missing; use files that belong together")
        stored = tensors.shape(source.name)
        if source.shape(stored) != wanted:
            raise BadInput(
                f"{tensors.file_of[source.name]}: tensor {source.name} has shape {stored}, its config.json"
                f" wants {wanted} for it: use files that belong together"
            )
    used = {source.name for source in sources.values()}
    for name, file in tensors.file_of.items():
        if name not in used and not name.startswith(spare) and not name.endswith(CONSTANTS):
            raise BadInput(f"{file}: tensor {name} is extra, config.json has no place for it")


def drawn(name: str, shape: tuple, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A parameter as published models start: gains 1, biases 0, all else normal with deviation 0.02. On the
    generator's device, whose draws are its own."""
    if len(shape) == 1 and name.endswith((".weight", ".bias")):
        return torch.full(shape, float(name.endswith(".weight")), device=generator.device, dtype=dtype)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).mul_(0.02)


# ----------------------------------------------------------------------------------------------- the configs


def decoder_config(config: dict, where: str, **ours) -> ModelConfig:
    """ModelConfig of a decoder's config.json, or of the text_config in LLaVA's. BadInput: not supported."""
    kind = config.get("model_type")
    if kind not in DECODERS:
        raise BadInput(f"{where}: model_type {kind} is not supported; those that are: {SUPPORTED}")
    config = (LLAMA_DEFAULTS if kind == "llama" else {}) | config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "use_sliding_window": config.get("use_sliding_window", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope_scaling": scaling not in ("default", "linear", "llama3"),
    }
    for key, bad in refused.items():
        if bad:
            value = config.get(key, rope)
            raise BadInput(f"{where}: {key} {value} is not supported; use a checkpoint without it")
    try:
        if scaling == "llama3":
            ours |= {
                "rope_low": rope["low_freq_factor"],
                "rope_high": rope["high_freq_factor"],
                "rope_length": rope["original_max_position_embeddings"],
            }
        return ModelConfig(
            vocab_size=config["vocab_size"],
            dim=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            ffn_dim=config["intermediate_size"],
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            norm_eps=config["rms_norm_eps"],
            head_dim=config.get("head_dim") or 0,
            tied=config.get("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            sliding_window=(config.get("sliding_window") or 0) if kind == "mistral" else 0,
            rope_scaling=scaling,
            rope_factor=rope.get("factor", 1.0),
            **ours,
        )
    except KeyError as error:
        raise BadInput(f"{where}: {error} is missing; copy the file again") from error


def clip_config(vision: dict, where: str, text: dict | None = None, embed_dim: int = 0) -> ClipConfig:
    """ClipConfig of the vision_config and text_config in config.json; without text the image tower alone."""
    vision, text = CLIP_DEFAULTS | vision, CLIP_DEFAULTS | (text or {})
    activations = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
    if vision["hidden_act"] not in activations or vision["layer_norm_eps"] != 1e-5:
        raise BadInput(f"{where}: CLIP needs hidden_act gelu or quick_gelu and layer_norm_eps 1e-5")
    if embed_dim and (text["hidden_act"], text["layer_norm_eps"]) != (vision["hidden_act"], 1e-5):
        raise BadInput(f"{where}: CLIP's two towers need the same hidden_act and layer_norm_eps 1e-5")
    try:
        sizes = {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "num_layers": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
        }
        if embed_dim:
            sizes |= {
                "text_width": text["hidden_size"],
                "text_layers": text["num_hidden_layers"],
                "text_heads": text["num_attention_heads"],
                "text_length": text["max_position_embeddings"],
                "vocab_size": text["vocab_size"],
            }
    except KeyError as error:
        raise BadInput(f"{where}: {error} is missing from CLIP's sizes; copy the file again") from error
    return ClipConfig(**sizes, embed_dim=embed_dim, activation=vision["hidden_act"])


def openai_clip_config(tensors: Tensors) -> ClipConfig:
    """Sizes from the weights alone; every published OpenAI ViT has heads of 64 and QuickGELU."""

    def layers(prefix):
        found = {n[len(prefix) :].split(".")[0] for n in tensors.file_of if n.startswith(prefix)}
        return len(found)

    try:
        width, _, patch_size, _ = tensors.shape("visual.conv1.weight")
        places, text_width = (
            tensors.shape("visual.positional_embedding")[0],
            tensors.shape("ln_final.weight")[0],
        )
        return ClipConfig(
            image_size=math.isqrt(places - 1) * patch_size,
            patch_size=patch_size,
            width=width,
            num_layers=layers("visual.transformer.resblocks."),
            num_heads=width // 64,
            text_width=text_width,
            text_layers=layers("transformer.resblocks."),
            text_heads=text_width // 64,
            text_length=tensors.shape("positional_embedding")[0],
            vocab_size=tensors.shape("token_embedding.weight")[0],
            embed_dim=tensors.shape("visual.proj")[1],
            activation="quick_gelu",
        )
    except KeyError as error:
        raise BadInput(f"{tensors.path}: tensor {error} is missing; this is no OpenAI CLIP ViT") from error


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


def hf_clip_source(name: str) -> Source:
    return Source(renamed(name, HF_CLIP))


def openai_clip_source(name: str) -> Source:
    if name.endswith("projection.weight"):
        return Source("visual.proj" if "vision" in name else "text_projection", transposed=True)
    name = renamed(name, OPENAI_CLIP)
    for third, letter in enumerate("qkv"):
        if f"{letter}_proj." in name:
            return Source(name.replace(f"{letter}_proj.", "in_proj_"), third=third)
    return Source(name)


def clip_source(name: str, path: str) -> Source:
    return openai_clip_source(name) if os.path.isfile(path) else hf_clip_source(name)


def decoder_source(name: str, prefix: str = "") -> Source:
    return Source(prefix + (name if name.startswith("lm_head") else f"model.{name}"))


# ------------------------------------------------------------------------------------------------ the models


def load_decoder(folder: str, device="cpu", dtype=torch.float32) -> Decoder:
    """A decoder in the Hugging Face layout, frozen. BadInput: see `fill` and `decoder_config`."""
    where = os.path.join(folder, "config.json")
    cfg = decoder_config(read_json(where), where)
    tensors = Tensors(folder)
    with torch.device("meta"):
        model = Decoder(cfg)
    sources = {name: decoder_source(name) for name in model.state_dict()}
    fill(model, tensors, sources, device, dtype, spare=("lm_head.weight",) if cfg.tied else ())
    return model.eval()


def read_clip_config(path: str) -> ClipConfig:
    """Sizes of `load_clip`'s CLIP: from the folder's config.json, or from the OpenAI file itself."""
    if os.path.isfile(path):
        return openai_clip_config(Tensors(path))
    where = os.path.join(path, "config.json")
    config = read_json(where)
    if config.get("model_type") != "clip":
        raise BadInput(f"{where}: model_type {config.get('model_type')} is no clip: name CLIP's folder")
    text, embed_dim = config.get("text_config", {}), config.get("projection_dim", 512)
    return clip_config(config.get("vision_config", {}), where, text, embed_dim)


def load_clip(path: str, device="cpu", dtype=torch.float32) -> Clip:
    """CLIP from a folder in the Hugging Face layout or a safetensors file with OpenAI's names, frozen."""
    with torch.device("meta"):
        model = Clip(read_clip_config(path))
    sources = {name: clip_source(name, path) for name in model.state_dict()}
    fill(model, Tensors(path), sources, device, dtype)
    return model.eval()


# ------------------------------------------------------------------------------------------------ back again


def hf_config(cfg: ModelConfig, dtype=torch.float32) -> dict:
    """The config.json of a decoder, as transformers reads it."""
    kind = (
        "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "mistral" if cfg.sliding_window else "llama"
    )
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    rope = {"rope_type": cfg.rope_scaling, "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling != "default":
        rope["factor"] = cfg.rope_factor
    if cfg.rope_scaling == "llama3":
        rope |= {"low_freq_factor": cfg.rope_low, "high_freq_factor": cfg.rope_high}
        rope["original_max_position_embeddings"] = cfg.rope_length
    config = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim or cfg.dim // cfg.num_heads,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": cfg.tied,
        "rope_parameters": rope,
        "rope_theta": cfg.rope_theta,  # readers before rope_parameters look here
    }
    if cfg.sliding_window:
        config["sliding_window"] = cfg.sliding_window
    return config


def save_decoder(decoder: Decoder, folder: str, dtype=torch.float32, shard_bytes: int = 4 * 2**30):
    """Writes a decoder without adapters (`lora.merge` first) in the Hugging Face layout."""
    tensors = {decoder_source(name).name: x for name, x in decoder.state_dict().items()}
    save_tensors(tensors, folder, dtype, shard_bytes)
    write_json(os.path.join(folder, "config.json"), hf_config(decoder.cfg, dtype))


def save_tensors(tensors: dict[str, Tensor], folder: str, dtype: torch.dtype, shard_bytes: int = 4 * 2**30):
    """model.safetensors, or shards of at most `shard_bytes` (or one tensor) and an index; files whole."""
    if any("lora_" in name for name in tensors):
        raise ValueError("the decoder has adapters: merge them first")
    shards, room = [[]], shard_bytes
    for name, x in tensors.items():
        size = x.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    os.makedirs(folder, exist_ok=True)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        content = save(
            {n: tensors[n].to("cpu", dtype).contiguous() for n in shard}, metadata={"format": "pt"}
        )
        write_whole(os.path.join(folder, file), content)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(x.numel() for x in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)
