"""A run's policy from folders on disk: what pretrain.py wrote, LLaVA-1.5, or a text decoder behind a CLIP.

The last two are in the Hugging Face layout. A text decoder has never been shown anything: between it and
CLIP stands this repository's own Bridge, read from BRIDGE_FILE in the decoder's folder where that
exists, from scratch otherwise. LLaVA brings a projector, and can have a Q-Former in its place.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import lora
from checkpoints import peft_files
from checkpoints.chat_tokenizer import ChatTokenizer
from checkpoints.huggingface import (
    DECODERS,
    Source,
    Tensors,
    clip_config,
    clip_source,
    decoder_config,
    decoder_source,
    fill,
    hf_clip_source,
    hf_config,
    read_clip_config,
    read_json,
    save_decoder,
    save_tensors,
    weight_files,
)
from clip import ClipConfig
from data import Tokenizer
from model import Bridge, ModelConfig, VideoLM
from plumbing.machine import say
from plumbing.options import BadInput, CountOrNone, Options, write_json, write_whole

POLICIES = (
    "a policy is what pretrain.py wrote or, in the Hugging Face layout, LLaVA-1.5 (model_type llava) or a"
    " text decoder with --clip"
)
SUPERVISED = "supervised_policy"  # model_type of what checkpoints/supervised.py writes
FRAMES = 50  # K of a pretrained policy, as VLM-RLAIF was tuned
BRIDGE_FILE = "bridge.safetensors"  # a Bridge beside a pretrained decoder's weights
CLIP_TEXT = (  # what of a CLIP checkpoint is not its image tower, in either layout
    "text_model.", "text_projection", "visual_projection", "logit_scale", "transformer.", "token_embedding.",
    "positional_embedding", "ln_final.", "visual.proj",
)  # fmt: skip


@dataclass
class PolicyOptions(Options):
    """The policy: which weights, and how they are held"""

    policy: str = "weights"  # folder of the supervised start: pretrain.py's, LLaVA-1.5's, a text decoder's
    clip: str = ""  # text decoder: folder or OpenAI file of the CLIP to put before it
    adapter: str = ""  # folder of a LoRA that PEFT or a run saved: merged into the start
    base: Literal["float32", "bfloat16", "nf4"] = "float32"  # how the decoder's frozen weights are held
    num_frames: CountOrNone = 0  # K: frames of a clip; 0: as the policy's config says; pretrained 50
    video_tokens: Literal["auto", "pooled", "patches", "qformer"] = "auto"  # pretrained: K + N, K * N, 32
    template: str = ""  # pretrained: conversation, vicuna_v1 | llama-2 | chatml | plain; empty: vicuna_v1
    think: bool = False  # pretrained: the prompt and the reward's form ask for a <think> part
    random_weights: bool = False  # draw the weights of a pretrained layout's folder that holds none
    seed: int = 0  # of everything that is drawn


def kind_of(folder: str) -> str:
    """config.json's model_type; empty for a folder that pretrain.py wrote, or that is none at all."""
    path = os.path.join(folder, "config.json")
    return (read_json(path).get("model_type") or "") if os.path.exists(path) else ""


def policy_configs(folder: str, *, clip="", num_frames=0, video_tokens="auto"):
    """(ModelConfig, ClipConfig) of what `load_policy` would load, from the config files alone. BadInput: not
    supported."""
    kind, where = kind_of(folder), os.path.join(folder, "config.json")
    if kind in DECODERS and not clip:
        raise BadInput(f"{where}: model_type {kind} is a text decoder: name its CLIP with --clip; {POLICIES}")
    if clip and kind not in DECODERS:
        raise BadInput(f"--clip {clip}: {folder} is no text decoder and has its own; leave --clip out")
    if not kind:
        return read_configs(folder, num_frames)
    config = read_json(where)
    if kind == "llava":
        return llava_configs(config, folder, num_frames or FRAMES, video_tokens)
    if kind not in DECODERS:
        raise BadInput(f"{where}: model_type {kind} is no policy; {POLICIES} ({', '.join(DECODERS)})")
    bridge = "qformer" if video_tokens == "auto" else video_tokens
    ours = dict(bridge=bridge, num_frames=num_frames or FRAMES, framing=framing(clip))
    return decoder_config(config, where, **ours), replace(read_clip_config(clip), embed_dim=0)


def framing(folder: str) -> str:
    """How a CLIP was shown its pictures. do_pad is LlavaImageProcessor's name for it."""
    path = os.path.join(folder, "preprocessor_config.json")
    return "pad" if os.path.exists(path) and read_json(path).get("do_pad") else "crop"


def load_tokenizer(folder: str, V: int, template: str = "", think: bool = False):
    """The tokenizer of a policy folder. V: rows of its embedding."""
    kind = kind_of(folder)
    if not kind:
        return Tokenizer.load(os.path.join(folder, "tokenizer.json"))
    config = read_json(os.path.join(folder, "config.json"))
    image_id = config.get("image_token_index", config.get("image_token_id", 32000))
    return ChatTokenizer(folder, template or "vicuna_v1", image_id if kind == "llava" else None, V, think)


def load_policy(options: PolicyOptions, device="cpu") -> tuple[VideoLM, Tokenizer | ChatTokenizer]:
    """The frozen policy and its tokenizer, of a folder that pretrain.py made or, in the Hugging Face layout,
    of LLaVA-1.5 or a text decoder with its CLIP.

    An adapter is merged into the decoder, then its weights are held in options.base; without an adapter
    pretrained ones are held so from the start, tensor by tensor. Raises BadInput if a file is missing or
    unsound, or an option does not apply to this policy.
    """
    folder = options.policy
    if kind_of(folder) == SUPERVISED:
        from checkpoints.supervised import load_supervised

        return load_supervised(options, device)
    if kind_of(folder):
        merged_first = options.adapter and options.base == "nf4"
        base = "bfloat16" if merged_first else options.base
        model = load_pretrained(
            folder, device, clip=options.clip, num_frames=options.num_frames, base=base, seed=options.seed,
            video_tokens=options.video_tokens, random_weights=options.random_weights,
        )  # fmt: skip
        tokenizer = load_tokenizer(folder, model.cfg.vocab_size, options.template, options.think)
        model.cfg = replace(model.cfg, video_start=tokenizer.video_start)
    else:
        refuse_pretrained_options(options)
        model, tokenizer = load_model(folder, device, options.num_frames), load_tokenizer(folder, 0)
    if options.adapter:
        peft_files.load_adapter(model.decoder, options.adapter)
        lora.merge(model.decoder)
    freeze_base(model.decoder, options.base)
    return model, tokenizer


def refuse_pretrained_options(options: PolicyOptions):
    """BadInput for an option that only a policy in the Hugging Face layout has."""
    for name in ("clip", "video_tokens", "template", "think", "random_weights"):
        if getattr(options, name) != getattr(PolicyOptions, name):
            raise BadInput(
                f"--{name} {getattr(options, name)}: pretrain.py wrote {options.policy}, and such a policy"
                f" has no choice of it; leave --{name} out"
            )


def freeze_base(decoder: torch.nn.Module, base: str):
    """Freezes a decoder and holds its weights in `base`: float32, bfloat16, or nf4, which is 4 bits for the
    linear layers and bfloat16 for the rest (embedding, head, norms). Before adapters are added."""
    if base == "nf4":
        from checkpoints.nf4 import quantise_linears

        quantise_linears(decoder, lora.DECODER_LINEARS)
    for parameter in decoder.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(torch.float32 if base == "float32" else torch.bfloat16)


def load_pretrained(
    folder: str, device="cpu", *, clip="", base="", random_weights=False, seed=0, **chosen
) -> VideoLM:
    """LLaVA-1.5, or a text decoder with the image tower of `clip`, as a frozen float32 VideoLM. base: how the
    decoder is held (`fill`); chosen: num_frames, video_tokens."""
    cfg, clip_cfg = policy_configs(folder, clip=clip, **chosen)
    with torch.device("meta"):
        model = VideoLM(cfg, clip_cfg)
    names, own = list(model.state_dict()), not cfg.bridge.startswith("llava")  # own: a Bridge

    def weights(path):
        if not random_weights or os.path.isfile(path) or weight_files(path):
            return Tensors(path)
        say(f"{path} holds no weights: --random_weights draws them, seed {seed}; answers will mean nothing")

    where = (device, torch.float32)
    if clip:
        tower = {n: clip_source(n.removeprefix("clip."), clip) for n in names if n.startswith("clip.")}
        fill(model, weights(clip), tower, *where, CLIP_TEXT, seed=seed)
        sources = {n: decoder_source(n.removeprefix("decoder.")) for n in names if n.startswith("decoder.")}
        spare = ("lm_head.weight",) if cfg.tied else ()
        fill(model, weights(folder), sources, *where, spare, base, seed)
    else:
        tensors = weights(folder)
        old = bool(tensors) and any(n.startswith("vision_tower.vision_model.") for n in tensors.file_of)
        sources = {n: llava_source(n, old) for n in names if not (own and n.startswith("bridge."))}
        spare = ("language_model.lm_head.weight",) if cfg.tied else ()
        fill(model, tensors, sources, *where, spare + ("multi_modal_projector.",) * own, base, seed)
    if own:
        model.bridge = load_bridge(os.path.join(folder, BRIDGE_FILE), cfg, clip_cfg, seed).to(device)
    return model.eval()


def load_bridge(path: str, cfg: ModelConfig, clip_cfg: ClipConfig, seed: int) -> Bridge:
    """The bridge in that file; without it a new one, the same for the same seed, and a note. Frozen."""
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the global generator
        torch.manual_seed(seed)
        bridge = Bridge(cfg, clip_cfg).requires_grad_(False)
    if os.path.exists(path):
        sources = {name: Source(name) for name in bridge.state_dict()}
        fill(bridge, Tensors(path), sources, "cpu", torch.float32)
        return bridge
    name = "Q-Former" if cfg.bridge == "qformer" else f"projector ({cfg.bridge} video tokens)"
    size = sum(p.numel() for p in bridge.parameters())
    say(
        f"note: the {name} between CLIP and decoder, {size:,} parameters, starts from scratch (seed {seed})"
        " and train.py updates the decoder's LoRA alone: until python pretrain.py --stage bridge has aligned"
        f" it with this decoder, into {path}, noise stands in the video's place"
    )
    return bridge


def save_adapter_of(policy: VideoLM, folder: str):
    """Writes the policy's adapter as PEFT does, under the names of the model that PEFT would wrap."""
    llava = policy.cfg.bridge.startswith("llava")
    peft_files.save_adapter(policy.decoder, folder, "model.language_model." if llava else "model.")


def save_policy(model: VideoLM, folder: str, source: str, tokenizer):
    """Writes a policy, its LoRA merged, in the layout of the folder that it was read from."""
    kind = kind_of(source)
    if not kind:
        return save_model(model, folder, torch.float32)
    own = isinstance(model.bridge, Bridge)
    if kind == "llava":
        save_llava(model, folder, tokenizer.placeholder_id, projector=projector_of(source) if own else {})
    else:
        save_decoder(model.decoder, folder)
    if own:
        save_bridge(model.bridge, folder)


def save_bridge(bridge: Bridge, folder: str):
    tensors = {name: x.detach().cpu().contiguous() for name, x in bridge.state_dict().items()}
    write_whole(os.path.join(folder, BRIDGE_FILE), save(tensors))


# ------------------------------------------------------------------------------------------------- LLaVA-1.5


def llava_configs(config: dict, folder: str, num_frames=FRAMES, video_tokens="auto"):
    """(ModelConfig, ClipConfig). pooled, auto: VLM-RLAIF's K + N video tokens; patches: all K * N."""
    where = os.path.join(folder, "config.json")
    for key, value in {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}.items():
        if config.get(key, value) != value:
            raise BadInput(f"{where}: {key} {config.get(key)} is not supported; {key} must be {value}")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise BadInput(f"{where}: vision_feature_layer {layer} is not supported; one layer, a whole number")
    bridge = {"qformer": "qformer", "patches": "llava"}.get(video_tokens, "llava_pooled")
    ours = dict(bridge=bridge, framing=framing(folder), clip_layer=layer, num_frames=num_frames)
    cfg = decoder_config(config.get("text_config", {}), where, **ours)
    return cfg, clip_config(config.get("vision_config", {}), where)


def llava_source(name: str, old: bool) -> Source:
    """old: vision_tower.vision_model. as in the published files; newer ones leave the second word out."""
    part, _, rest = name.partition(".")
    if part == "decoder":
        return decoder_source(rest, "language_model.")
    if part == "bridge":
        return Source(f"multi_modal_projector.{rest}")
    name = hf_clip_source(rest).name
    return Source("vision_tower." + (name if old else name.removeprefix("vision_model.")))


def projector_of(folder: str) -> dict[str, torch.Tensor]:
    stored = Tensors(folder)
    return {name: stored[name] for name in stored.file_of if name.startswith("multi_modal_projector.")}


def hf_llava_config(model: VideoLM, placeholder_id: int, dtype=torch.float32) -> dict:
    clip = model.clip_cfg
    vision = {
        "model_type": "clip_vision_model",
        "image_size": clip.image_size,
        "patch_size": clip.patch_size,
        "hidden_size": clip.width,
        "intermediate_size": 4 * clip.width,
        "num_hidden_layers": clip.num_layers,
        "num_attention_heads": clip.num_heads,
        "hidden_act": clip.activation,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": placeholder_id,
        "image_seq_length": (clip.image_size // clip.patch_size) ** 2,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": model.cfg.tied,
        "vision_feature_layer": model.cfg.clip_layer,
        "vision_feature_select_strategy": "default",
        "vision_config": vision,
        "text_config": hf_config(model.cfg, dtype),
    }


def save_llava(model: VideoLM, folder: str, placeholder_id: int, dtype=torch.float32, projector=None):
    """Writes a LLaVA, its LoRA merged, in the layout of LLaVA-1.5. projector: its tensors by their names in
    the files, where the model has a Bridge in its place."""
    own = isinstance(model.bridge, Bridge)
    state = {n: x for n, x in model.state_dict().items() if not (own and n.startswith("bridge."))}
    tensors = {llava_source(name, old=True).name: x for name, x in state.items()} | (projector or {})
    save_tensors(tensors, folder, dtype)
    write_json(os.path.join(folder, "config.json"), hf_llava_config(model, placeholder_id, dtype))


# ---- the files that pretrain.py writes


def save_model(model: VideoLM, folder: str, dtype=torch.bfloat16):
    """Writes config.json and model.safetensors."""
    os.makedirs(folder, exist_ok=True)
    write_json(
        os.path.join(folder, "config.json"), {"model": asdict(model.cfg), "clip": asdict(model.clip_cfg)}
    )
    tensors = {name: x.detach().to("cpu", dtype).contiguous() for name, x in model.state_dict().items()}
    write_whole(os.path.join(folder, "model.safetensors"), save(tensors))


def read_configs(folder: str, num_frames: int = 0) -> tuple[ModelConfig, ClipConfig]:
    """The sizes of a folder that `save_model` wrote. num_frames: K, where it is to be another. BadInput: a
    file is missing or odd."""
    config, path = os.path.join(folder, "config.json"), os.path.join(folder, "model.safetensors")
    for file in (config, path):
        if not os.path.exists(file):
            names = os.listdir(folder) if os.path.isdir(folder) else []
            pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
            why = f"; {pickles[0]} is a pickle, which can run code: convert it" if pickles else ""
            raise BadInput(f"{file}: no such file{why}; {POLICIES}")
    try:
        with open(config) as file:
            sizes = json.load(file)
        cfg = ModelConfig(**sizes["model"])
        return replace(cfg, num_frames=num_frames or cfg.num_frames), ClipConfig(**sizes["clip"])
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{config}: not what save_model wrote ({error}); {POLICIES}") from error


def load_model(folder: str, device="cpu", num_frames: int = 0) -> VideoLM:
    """The model of a folder that `save_model` wrote, float32, frozen. BadInput: a file is missing or odd."""
    path, configs = os.path.join(folder, "model.safetensors"), read_configs(folder, num_frames)
    try:
        model, stored = VideoLM(*configs), load_file(path)
    except (ValueError, SafetensorError) as error:
        raise BadInput(
            f"{folder}: not what save_model wrote ({error}); make it anew with pretrain.py"
        ) from error
    shapes, wanted = ({k: tuple(x.shape) for k, x in d.items()} for d in (stored, model.state_dict()))
    odd = sorted(k for k in shapes.keys() | wanted.keys() if shapes.get(k) != wanted.get(k))
    if odd:
        raise BadInput(
            f"{path}: {odd[0]} is {shapes.get(odd[0])}, config.json wants {wanted.get(odd[0])}"
            f" (and {len(odd) - 1} more): use files that belong together"
        )
    model.load_state_dict(stored)
    return model.to(device).float().eval().requires_grad_(False)
