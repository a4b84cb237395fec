"""Policies in the Hugging Face layout: LLaVA-1.5, or a text decoder behind a CLIP; merged runs back again.

A text decoder has never been shown anything: between it and CLIP stands this repository's own Bridge, read
from BRIDGE_FILE in the decoder's folder where that exists, from scratch otherwise. LLaVA brings a projector,
and can have a Q-Former in its place.
"""

import os
import shutil
from dataclasses import replace

import torch
from safetensors.torch import save_file

from checkpoints import huggingface as hf
from checkpoints.chat_tokenizer import stored_ends
from checkpoints.policies import POLICIES
from checkpoints.weight_files import Source, Tensors, fill, has_weights, read_own, write_own
from clip import ClipConfig
from model import Bridge, ModelConfig, VideoLM
from plumbing.machine import say
from plumbing.options import BadInput, read_json, write_json

FRAMES = 50  # K of a pretrained policy, as VLM-RLAIF was tuned
BRIDGE_FILE = "bridge.safetensors"  # a Bridge beside a pretrained decoder's weights
OLD_BRIDGE_FILE = "video_adapter.safetensors"  # its name before
CLIP_TEXT = (  # the parts of a CLIP checkpoint that are not its image tower, in either layout
    "text_model.", "text_projection", "visual_projection", "logit_scale", "transformer.", "token_embedding.",
    "positional_embedding", "ln_final.", "visual.proj",
)  # fmt: skip
LLAVA_VISION = {  # what LLaVA's config takes where it has no vision_config at all: CLIP ViT-L/14-336
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
COPIED = (".json", ".jinja", ".model", ".txt")  # a policy's files beside its weights


def pretrained_configs(options) -> tuple[ModelConfig, ClipConfig]:
    """The sizes of what `load_pretrained` would load, from the config files. BadInput: not supported."""
    folder, num_frames = options.policy, options.num_frames or FRAMES
    where = os.path.join(folder, "config.json")
    config = read_json(where, hf.FOLDER)
    kind = str(config.get("model_type"))
    if kind == "llava":
        if options.clip:
            words = "is no text decoder and has its own; leave --clip out"
            raise BadInput(f"--clip {options.clip}: {folder} {words}")
        return llava_configs(config, where, num_frames, options.video_tokens)
    if kind not in hf.DECODERS:
        raise BadInput(f"{where}: model_type {kind} is no policy; {POLICIES} ({', '.join(hf.DECODERS)})")
    if not options.clip:
        raise BadInput(f"{where}: model_type {kind} is a text decoder: name its CLIP with --clip; {POLICIES}")
    bridge = "qformer" if options.video_tokens == "auto" else options.video_tokens
    ours = dict(bridge=bridge, num_frames=num_frames, framing=framing(options.clip))
    return hf.decoder_config(config, where, **ours), replace(hf.read_clip_config(options.clip), embed_dim=0)


def llava_configs(config: dict, where: str, num_frames: int, video_tokens: str):
    """(ModelConfig, ClipConfig). pooled, auto: VLM-RLAIF's K + N video tokens; patches: all K * N."""
    supported = {
        "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default",
        "multimodal_projector_bias": True, "quantization_config": None,
    }  # fmt: skip
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise BadInput(f"{where}: {key} {config.get(key)} is not supported; {key} must be {value}")
    layer = config.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise BadInput(f"{where}: vision_feature_layer {layer} is not supported; one layer, a whole number")
    text = {"model_type": "llama"} | hf.entry(config, "text_config", where)
    vision = hf.entry(config, "vision_config", where) or LLAVA_VISION
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise BadInput(f"{where}: an image tower {vision['model_type']} is not supported; CLIP's is")
    text["tie_word_embeddings"] = any(hf.entry(c, "tie_word_embeddings", where, bool) for c in (config, text))
    bridge = {"qformer": "qformer", "patches": "llava"}.get(video_tokens, "llava_pooled")
    ours = dict(bridge=bridge, framing=framing(os.path.dirname(where)), clip_layer=layer)
    clip = hf.clip_config(vision, where)
    if not clip.has_layer(layer):
        raise BadInput(f"{where}: vision_feature_layer {layer}, and the image tower has {clip.num_layers}")
    return hf.decoder_config(text, where, num_frames=num_frames, **ours), clip


def framing(folder: str) -> str:
    """How CLIP was shown its pictures in training. do_pad is LlavaImageProcessor's name for it."""
    path = os.path.join(folder, "preprocessor_config.json")
    config = read_json(path, hf.FOLDER, optional=True)
    return "pad" if hf.entry(config, "do_pad", path, bool) else "crop"


def load_pretrained(options, device="cpu", own_bridge: bool = False) -> VideoLM:
    """LLaVA-1.5, or a text decoder with the image tower of options.clip, as a frozen VideoLM: float32, but
    the decoder held in options.base (`fill`). options: PolicyOptions. BadInput: see `fill`."""
    cfg, clip_cfg = pretrained_configs(options)
    tensors = open_weights(options.policy, options)
    cfg = hf.with_own_head(cfg, tensors)
    with torch.device("meta"):
        model = VideoLM(cfg, clip_cfg)
    has_bridge, seed = isinstance(model.bridge, Bridge), options.seed
    in_decoder, in_clip = (part.state_dict() for part in (model.decoder, model.clip))
    places = hf.decoder_sources(in_decoder, tensors)
    sources = {f"decoder.{name}": place for name, place in places.items()}
    spare = (tensors.prefix(hf.HEAD, "") + hf.HEAD,)
    if options.clip:
        clip_tensors, others = open_weights(options.clip, options), CLIP_TEXT + hf.EMBEDDED
        places = hf.clip_sources(in_clip, options.clip)
        fill(model.clip, clip_tensors, places, device, torch.float32, others, seed=seed)
    else:
        before = tensors.prefix("embeddings.patch_embedding.weight", "vision_tower.")
        for name in in_clip:  # published files say vision_tower.vision_model., newer ones only the first word
            theirs = hf.renamed(name, hf.HF_CLIP).removeprefix("vision_model.")
            sources[f"clip.{name}"] = Source(before + theirs)
        projector = tensors.prefix("linear_1.weight", "multi_modal_projector.")
        if has_bridge:
            spare += (projector,)
        else:
            sources |= {f"bridge.{name}": Source(projector + name) for name in model.bridge.state_dict()}
    fill(model, tensors, sources, device, torch.float32, spare, options.base, seed)
    if has_bridge:
        model.bridge = load_bridge(options.policy, cfg, clip_cfg, seed, not own_bridge).to(device)
    return model.eval()


def open_weights(path: str, options) -> Tensors:
    """Empty, and a note, where there are none and --random_weights is given."""
    if not options.random_weights or os.path.isfile(path) or has_weights(path):
        return Tensors(path)
    words = f"--random_weights draws them, seed {options.seed}; answers will mean nothing"
    say(f"{path} holds no weights: {words}")
    return Tensors("")


def load_bridge(folder: str, cfg: ModelConfig, clip_cfg: ClipConfig, seed: int, note: bool) -> Bridge:
    """The folder's bridge, frozen. Where it has none, a new one drawn from the seed, with a note if asked."""
    path, old = os.path.join(folder, BRIDGE_FILE), os.path.join(folder, OLD_BRIDGE_FILE)
    if os.path.exists(old) and not os.path.exists(path):
        raise BadInput(f"{old}: an earlier version's name for the bridge; rename the file to {BRIDGE_FILE}")
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the global generator
        torch.manual_seed(seed)
        bridge = Bridge(cfg, clip_cfg).requires_grad_(False)
    if os.path.exists(path):
        return read_own(lambda: bridge, path)
    if not note:
        return bridge
    name = "Q-Former" if cfg.bridge == "qformer" else f"projector ({cfg.bridge} video tokens)"
    size = sum(p.numel() for p in bridge.parameters())
    say(
        f"note: the {name} between CLIP and decoder, {size:,} parameters, starts from scratch (seed {seed})"
        " and train.py updates the decoder's LoRA alone: until python pretrain.py --stage bridge --out FOLDER"
        " has aligned it with this decoder, and --policy names that FOLDER, noise stands in the video's place"
    )
    return bridge


def save_pretrained(model: VideoLM, source: str, folder: str, end_ids) -> None:
    """Writes a policy, its LoRA merged, into a new folder like the one that it was read from: the same files,
    names, shards and dtypes, with the decoder's weights replaced, and the bridge beside them if it is ours.
    end_ids: the ids that end an answer (`know_ends`). Raises BadInput for a source without weights."""
    if not has_weights(source):
        raise BadInput(f"{source}: holds no weights (--random_weights drew them); there is nothing to merge")
    tensors = Tensors(source)
    os.makedirs(folder)
    state = model.decoder.state_dict()
    changed = {place.name: state[name] for name, place in hf.decoder_sources(state, tensors).items()}
    for file in sorted(tensors.handles):
        content = {name: tensors[name] for name, of in tensors.file_of.items() if of == file}
        for name in content.keys() & changed.keys():
            content[name] = changed[name].to("cpu", content[name].dtype).contiguous()
        written = os.path.join(folder, os.path.basename(file))
        save_file(content, written, metadata={"format": "pt"})
        shutil.copymode(file, written)  # safetensors lets nobody else read it
    for name in sorted(os.listdir(source)):
        if name.endswith(COPIED) and os.path.isfile(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), folder)
    if isinstance(model.bridge, Bridge):
        write_own(model.bridge, os.path.join(folder, BRIDGE_FILE))
    know_ends(folder, end_ids)


def know_ends(folder: str, end_ids) -> None:
    """Adds end ids to generation_config.json, where neither it nor, in its absence, config.json has them, so
    that the model ends its turns wherever it is served."""
    path = os.path.join(folder, "generation_config.json")
    if os.path.exists(path):
        generation = read_json(path, hf.FOLDER)
    else:
        defaults = read_json(os.path.join(folder, "config.json"), hf.FOLDER)
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: defaults[key] for key in keys if defaults.get(key) is not None}
    known = stored_ends(generation, path)
    if not set(end_ids) <= set(known):
        write_json(path, generation | {"eos_token_id": [*known, *(i for i in end_ids if i not in known)]})
