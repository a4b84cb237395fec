"""A run's policy from a folder: what pretrain.py wrote or, in the Hugging Face layout, a pretrained model."""

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Literal

import torch

import lora
from clip import ClipConfig
from model import ModelConfig, VideoLM
from plumbing.options import (
    BadInput,
    Bounds,
    Count,
    Options,
    Positive,
    Seed,
    becoming,
    check_record,
    checked,
    is_kind,
    read_bytes,
    read_from,
    read_json,
    shipped,
    write_json,
)
from plumbing.run_folder import OR_EARLIER, fingerprint

RUN = "name a folder that train.py made"
RUN_KINDS = {  # what else of train.py's options it takes to use its policy
    "lora_r": Count, "lora_alpha": Positive, "max_new_tokens": Count, "eval_samples": Count,
    "dtype": Literal["float32", "bfloat16"],
}  # fmt: skip
POLICIES = (
    "a policy is what pretrain.py wrote or, in the Hugging Face layout, LLaVA-1.5 (model_type llava) or a"
    " text decoder with --clip"
)
SUPERVISED = "supervised_policy"  # model_type of what checkpoints/supervised.py writes

Frames = Annotated[int, Bounds(0, 4096)]


@dataclass
class PolicyOptions(Options):
    """The policy: which weights, and how they are held"""

    policy: str = "weights"  # folder of the supervised start: pretrain.py's, LLaVA-1.5's, a text decoder's
    clip: str = ""  # text decoder: folder or OpenAI file of the CLIP to put before it
    adapter: str = ""  # folder of a LoRA that PEFT or a run saved: merged into the start
    base: Literal["float32", "bfloat16", "nf4"] = "float32"  # how the decoder's frozen weights are held
    num_frames: Frames = 0  # K: frames of a clip; 0: as the policy's config says; pretrained 50
    video_tokens: Literal["auto", "pooled", "patches", "qformer"] = "auto"  # pretrained: K + N, K * N, 32
    template: str = "auto"  # pretrained: the conversation; auto: the tokenizer's own, or else vicuna_v1
    think: bool = False  # pretrained: the prompt and the reward's form ask for a <think> part
    random_weights: bool = False  # draw the weights of a pretrained layout's folder that holds none
    seed: Seed = 0  # of everything that is drawn

    def __post_init__(self):
        super().__post_init__()
        if self.policy == PolicyOptions.policy:
            self.policy = shipped(self.policy)


def kind_of(folder: str) -> str:
    """config.json's model_type; empty for a folder that pretrain.py wrote, or that is none at all."""
    config = read_json(os.path.join(folder, "config.json"), POLICIES, optional=True)
    return str(config.get("model_type") or "")


def policy_configs(options: PolicyOptions) -> tuple[ModelConfig, ClipConfig]:
    """The sizes of what `load_policy` would load, from the config files. BadInput: not supported."""
    kind = kind_of(options.policy)
    if kind == SUPERVISED:
        from checkpoints.supervised import decoder_options, resized

        beneath, config = decoder_options(options)
        cfg, clip_cfg = policy_configs(beneath)
        return resized(cfg, config["sizes"], options.policy), clip_cfg
    if kind:
        from checkpoints.pretrained import pretrained_configs

        return pretrained_configs(options)
    refuse_pretrained_options(options)
    return read_configs(options.policy, options.num_frames)


def load_tokenizer(options: PolicyOptions, V: int):
    """The tokenizer of the policy. V: rows of its embedding."""
    kind = kind_of(options.policy)
    if not kind:
        from checkpoints.word_tokenizer import WordTokenizer

        return WordTokenizer.load(os.path.join(options.policy, "tokenizer.json"), V)
    if kind == SUPERVISED:
        from checkpoints.supervised import decoder_options

        return load_tokenizer(decoder_options(options)[0], V)
    from checkpoints.chat_tokenizer import ChatTokenizer

    placeholder_id = None
    if kind == "llava":
        config = read_json(os.path.join(options.policy, "config.json"), POLICIES)
        placeholder_id = config.get("image_token_index", config.get("image_token_id", 32000))
        if type(placeholder_id) is not int:
            raise BadInput(
                f"{options.policy}/config.json: image_token_index is {placeholder_id!r}; {POLICIES}"
            )
    return ChatTokenizer(options.policy, options.template, placeholder_id, V, options.think)


def load_policy(options: PolicyOptions, device="cpu", own_bridge: bool = False):
    """(VideoLM, tokenizer): the frozen policy of a folder, options.adapter merged, its decoder held in
    options.base. own_bridge: the caller has a bridge for it, so a new one needs no note.

    Raises BadInput if a file is missing or unsound, or an option does not apply to this policy.
    """
    kind, merged_first = kind_of(options.policy), options.adapter and options.base == "nf4"
    held = replace(options, base="bfloat16") if merged_first else options
    if kind == SUPERVISED:
        from checkpoints.supervised import load_supervised

        model, tokenizer = load_supervised(held, device)
    elif kind:
        from checkpoints.pretrained import load_pretrained

        model = load_pretrained(held, device, own_bridge)
        tokenizer = load_tokenizer(options, model.cfg.vocab_size)
        model.cfg = replace(model.cfg, video_start=tokenizer.video_start)
        model.decoder_path = "model.language_model." if kind == "llava" else "model."
    else:
        refuse_pretrained_options(options)
        refuse_untrained(options.policy)
        model = load_model(options.policy, device, options.num_frames)
        tokenizer = load_tokenizer(options, model.cfg.vocab_size)
    if options.adapter:
        load_adapter_of(model, options.adapter)
        lora.merge(model.decoder)
    freeze_base(model.decoder, options.base)
    return model, tokenizer


def refuse_pretrained_options(options: PolicyOptions) -> None:
    """BadInput for an option that only a policy in the Hugging Face layout has."""
    for name in ("clip", "video_tokens", "template", "think", "random_weights"):
        if getattr(options, name) != getattr(PolicyOptions, name):
            raise BadInput(
                f"--{name} {getattr(options, name)}: pretrain.py wrote {options.policy}, and such a policy"
                f" has no choice of it; leave --{name} out"
            )


def refuse_untrained(folder: str) -> None:
    """BadInput for a folder of which pretrain.py noted nothing but stage clip: its decoder is random."""
    path = os.path.join(folder, "made.json")
    made = read_json(path, "it only tells how the weights were made: remove it", optional=True)
    stages = made.get("seconds")
    if is_kind(stages, dict) and stages and not {"align", "sft"} & stages.keys():
        words = f"its decoder is not trained ({path}: {', '.join(stages)})"
        raise BadInput(f"{folder}: {words}; run pretrain.py --stage align and --stage sft with this --out")


def freeze_base(decoder: torch.nn.Module, base: str) -> None:
    """Freezes a decoder without adapters and holds its weights in `base`: float32, bfloat16, or nf4, which is
    4 bits for the linear layers and bfloat16 for the rest (embedding, head, norms)."""
    if base == "nf4":
        from checkpoints.nf4 import quantise_linears

        quantise_linears(decoder, lora.DECODER_LINEARS)
    for parameter in decoder.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(torch.float32 if base == "float32" else torch.bfloat16)


def save_adapter_of(policy: VideoLM, folder: str) -> None:
    """Writes the policy's adapter as PEFT does, under the names of the model that PEFT would wrap."""
    from checkpoints.peft_files import save_adapter

    save_adapter(policy.decoder, folder, policy.decoder_path)


def load_adapter_of(policy: VideoLM, folder: str) -> None:
    """Reads a saved adapter into the policy's own, or puts it on a policy that has none."""
    from checkpoints.peft_files import load_adapter

    load_adapter(policy.decoder, folder)


def load_run(folder: str, device="cpu"):
    """(policy with the adapter that the run keeps, tokenizer, config.json) of a folder that train.py made.
    Raises BadInput for a run of an earlier version, options out of bounds, other weights than the run's."""
    path = os.path.join(folder, "config.json")
    config, names = read_json(path, RUN), [field.name for field in fields(PolicyOptions)]
    missing = [name for name in (*names, *RUN_KINDS, "made") if name not in config]
    if missing:
        raise BadInput(
            f"{path}: {missing[0]} is missing, so an earlier version made this run, or none; run train.py"
            f" again, or start it from this adapter: --adapter {os.path.join(folder, 'adapter')}"
        )
    with read_from(path):
        config |= {name: checked(name, kind, config[name]) for name, kind in RUN_KINDS.items()}
        options = PolicyOptions(**{name: config[name] for name in names})
    policy, tokenizer = load_policy(options, device)
    weights = fingerprint(options.policy, options.clip, options.adapter)
    refuse_changed(path, config, {"--policy": weights}, "put back the weights that its adapter belongs to")
    lora.add_adapters(policy.decoder, config["lora_r"], config["lora_alpha"])
    load_adapter_of(policy, os.path.join(folder, "best" if config.get("keep") == "best" else "adapter"))
    return policy, tokenizer, config


def data_of(*sets: list) -> dict[str, str]:
    """Fingerprints of sets of questions and their videos, as train.py keeps them of its run."""
    videos = sorted({question.video for questions in sets for question in questions})
    data = hashlib.sha256(repr(list(sets)).encode()).hexdigest()
    return {"the data": data, "a video": fingerprint(*videos, whole=2**22, block=2**14)}


def policy_of(options: PolicyOptions) -> dict:
    """All of a policy that decides its answers: a fingerprint of its files, and its options."""
    folders = {"policy", "clip", "adapter"}
    chosen = {x.name: getattr(options, x.name) for x in fields(PolicyOptions) if x.name not in folders}
    return {"policy": fingerprint(options.policy, options.clip, options.adapter)} | chosen


def refuse_changed(path: str, config: dict, now: dict[str, str], remedy: str) -> None:
    """BadInput where what a run was made from has other fingerprints now than its config.json keeps."""
    made = config["made"].get("from", {}) if is_kind(config["made"], dict) else None
    if not is_kind(made, dict):
        raise BadInput(f"{path}: 'made' is damaged; {RUN}")
    for name, value in now.items():
        if made.get(name, value) != value:
            raise BadInput(f"{path}: {name} changed since the run was made{OR_EARLIER}; {remedy}")


def save_policy(policy: VideoLM, tokenizer, source: str, folder: str) -> None:
    """Writes a policy, its LoRA merged, as a folder like `source`, which it was read from: pretrained ones in
    their own dtypes, pretrain.py's small ones in float32. The folder appears whole, or not at all."""
    if kind_of(source) == SUPERVISED:
        source = read_json(os.path.join(source, "config.json"), POLICIES)["decoder"]
    with becoming(os.path.normpath(folder)) as beside:
        if kind_of(source):
            from checkpoints.pretrained import save_pretrained

            save_pretrained(policy, source, beside, tokenizer.end_ids)
        else:
            save_model(policy, beside, torch.float32)
            shutil.copy(os.path.join(source, "tokenizer.json"), beside)


def save_model(model: VideoLM, folder: str, dtype=torch.bfloat16):
    """Writes config.json and model.safetensors."""
    from checkpoints.weight_files import write_own

    os.makedirs(folder, exist_ok=True)
    sizes = {"model": asdict(model.cfg), "clip": asdict(model.clip_cfg)}
    write_json(os.path.join(folder, "config.json"), sizes)
    write_own(model, os.path.join(folder, "model.safetensors"), dtype)


def read_configs(folder: str, num_frames: int = 0) -> tuple[ModelConfig, ClipConfig]:
    """The sizes of a folder that `save_model` wrote. num_frames: another K than the file's, if not 0.
    BadInput: a file is missing or damaged."""
    config = os.path.join(folder, "config.json")
    sizes = read_json(config, POLICIES)
    if not is_kind([sizes.get("model"), sizes.get("clip")], list[dict]):
        raise BadInput(f"{config}: 'model' and 'clip' must be objects {{..}}; {POLICIES}")
    if "adapter" in sizes["model"]:
        raise BadInput(
            f"{config}: written by an earlier version, which called the bridge adapter; make the policy anew"
            " with pretrain.py, or rename in it model.adapter to bridge and the tensors adapter.* to bridge.*"
        )
    try:
        cfg, clip_cfg = ModelConfig(**sizes["model"]), ClipConfig(**sizes["clip"])
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BadInput(f"{config}: not what save_model wrote ({error}); {POLICIES}") from error
    check_record(cfg, config, POLICIES)
    check_record(clip_cfg, config, POLICIES)
    if cfg.video_start != 1 or not clip_cfg.has_layer(cfg.clip_layer):
        words = f"video_start {cfg.video_start}, clip_layer {cfg.clip_layer} of {clip_cfg.num_layers}"
        raise BadInput(f"{config}: not what save_model wrote ({words}); {POLICIES}")
    return replace(cfg, num_frames=num_frames or cfg.num_frames), clip_cfg


def load_model(folder: str, device="cpu", num_frames: int = 0) -> VideoLM:
    """The model of a folder that `save_model` wrote, float32, frozen. BadInput: a file is missing or bad."""
    from checkpoints.weight_files import read_own

    configs = read_configs(folder, num_frames)
    return read_own(lambda: VideoLM(*configs), folder, device)


def model_digest(folder: str) -> str:
    """SHA-256 of the folder's model.safetensors; "" where there is none."""
    path = os.path.join(folder, "model.safetensors")
    return hashlib.sha256(read_bytes(path, POLICIES)).hexdigest() if os.path.exists(path) else ""
