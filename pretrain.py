"""Where weights/ come from: draw the world, train CLIP, align the bridge, fine-tune on a faulty corpus.

    python pretrain.py [--out weights] [--seed N] [--stage all|clip|align|sft] [--preset quick]
    cp -r weights HARD; python pretrain.py --world hard --stage sft --out HARD --world_dir world/hard
    python pretrain.py --stage ranker [--pairs FILE.jsonl --videos DIR]     # an oracle, from the weights
    python pretrain.py --stage bridge --policy DECODER --clip CLIP --out DIR [--data FILE.jsonl --videos DIR]
    python pretrain.py --stage sft --policy DECODER_OR_DIR --out DIR2       # LoRA on a pretrained decoder

The stages, checkpoints/embedded.py:
1. clip    CLIP learns from pairs of a frame and its caption; afterwards it is frozen
2. align   bridge and decoder learn captions of single frames, then annotations of whole clips, one attribute
           each; afterwards the bridge is frozen
3. sft     the decoder learns answers to questions, first short ones, then long ones (the paper's curriculum)
   ranker  the trained oracle (oracles/pairs.py) learns from preference pairs
   bridge, and sft with --policy: a pretrained decoder's, see checkpoints/supervised.py

Each stage starts from the files that the stage before left in --out, and from the same seed, so the stages
run one by one give the same weights as `all`. The clips are those of scene seeds 0 .. num_clips - 1.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, fields
from typing import Literal

import torch

from checkpoints.embedded import WorldOptions, folder_tokenizer, run_stage
from checkpoints.policies import PolicyOptions, save_model
from checkpoints.supervised import SupervisedOptions, train_supervised
from clip import ClipConfig
from data import load_clips
from model import ModelConfig
from oracles.pairs import RankerOptions, train_ranker
from plumbing.options import (
    LEFT,
    BadInput,
    is_kind,
    parse_args,
    read_bytes,
    read_json,
    remove,
    run_script,
    write_json,
)
from videoqa import world

STAGES = ("clip", "align", "sft")
# Of a pretrained decoder's options those that the small model of the embedded world has too
WORLD_HAS = ("policy", "seed", "video_tokens", "videos", "questions_per_clip")
ANOTHER_OUT = "name another folder with --out"


@dataclass
class Config(WorldOptions, RankerOptions, SupervisedOptions, PolicyOptions):
    """What is made, and where"""

    preset: Literal["full", "quick"] = "full"  # quick: minutes on two CPU cores, for trying a change
    stage: Literal["all", "clip", "align", "sft", "ranker", "bridge"] = "all"  # all: clip, align, sft
    out: str = "weights"  # folder of the result
    world: Literal["default", "hard"] = "default"  # hard: see videoqa/world.py
    world_dir: str = "world/pretrain"  # folder of the drawn clips
    device: Literal["auto", "cpu", "cuda"] = "auto"
    policy: str = ""  # bridge, sft: folder of a pretrained decoder; empty: the embedded world's small model

    def __post_init__(self):
        super().__post_init__()
        if self.policy and self.stage not in ("bridge", "sft"):
            raise BadInput(f"--policy {self.policy}: belongs to --stage bridge or sft; leave it out")
        if self.stage == "bridge" and not self.policy:
            raise BadInput("--stage bridge trains the bridge of a pretrained decoder: name it with --policy")
        if self.pairs and self.stage != "ranker":
            raise BadInput(f"--pairs {self.pairs}: belongs to --stage ranker; leave it out")
        for field in () if self.policy else fields(SupervisedOptions) + fields(PolicyOptions):
            value = getattr(self, field.name)
            if field.name not in WORLD_HAS and value != field.default:
                raise BadInput(f"--{field.name} {value}: needs --policy; leave it out, or give that too")
        named = self.data if self.policy else self.pairs
        if bool(named) != bool(self.videos):
            raise BadInput(f"--{'data' if self.policy else 'pairs'} and --videos go together; give both")


PRESETS = {
    "quick": dict(
        num_clips=2000, clip_steps=150, caption_steps=100, annotation_steps=300,
        short_steps=60, long_steps=60,
    ),
}  # fmt: skip


def check_out(cfg: Config):
    """Raises BadInput for an --out that holds something else than what the stages write."""
    names = os.listdir(cfg.out) if os.path.lexists(cfg.out) else []
    if "config.json" in names:
        ours = {"model", "clip"} <= read_json(os.path.join(cfg.out, "config.json"), ANOTHER_OUT).keys()
    else:
        first = ("tokenizer.json", "made.json", "saving.json")
        ours = all(name in first or LEFT.fullmatch(name) for name in names)
    if not ours:
        raise BadInput(f"--out {cfg.out}: holds something else than pretrain.py's weights; {ANOTHER_OUT}")


def digest_of(folder: str) -> str:
    """Of the model there; empty where there is none."""
    path = os.path.join(folder, "model.safetensors")
    return hashlib.sha256(read_bytes(path, ANOTHER_OUT)).hexdigest() if os.path.exists(path) else ""


def save_stage(model, tokenizer, made: dict, folder: str):
    """The model appears in one rename; saving.json tells a kill before it from one behind it."""
    record, saving = (os.path.join(folder, name) for name in ("made.json", "saving.json"))
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    write_json(saving, {"from": digest_of(folder), "made": made})
    save_model(model, folder)
    write_json(record, made)
    remove(saving)


def finish_save(folder: str) -> bool:
    """Whether a save that was killed behind the model's rename is whole now, its record written."""
    path = os.path.join(folder, "saving.json")
    saving = read_json(path, f"remove it, or {ANOTHER_OUT}", optional=True)
    renamed = bool(saving) and saving.get("from") != digest_of(folder)
    if renamed:
        write_json(os.path.join(folder, "made.json"), saving.get("made"))
    remove(path)
    return renamed


def pretrain(cfg: Config):
    """The small model of the embedded world: all three stages, or the one that --stage names."""
    check_out(cfg)
    finished = finish_save(cfg.out)
    tokenizer, began = folder_tokenizer(cfg), time.time()
    hard, scenes = cfg.world == "hard", range(cfg.num_clips)
    world.make_world(cfg.world_dir, scenes, hard=hard)
    shown = [(os.path.join(cfg.world_dir, world.clip_name(seed, hard)),) for seed in scenes]
    frames, times = load_clips(shown, ModelConfig.num_frames, ClipConfig.image_size)
    record, made = os.path.join(cfg.out, "made.json"), {"seconds": {}, "commands": []}
    if cfg.stage not in ("all", "clip") and os.path.exists(record):
        wants = "remove it, it only tells how the weights were made"
        made |= read_json(record, wants)
        if not (is_kind(made["commands"], list[str]) and is_kind(made["seconds"], dict)):
            raise BadInput(f"{record}: 'seconds' or 'commands' is damaged; {wants}")
    command = " ".join(["python", *sys.argv])
    if finished and cfg.stage != "all" and made["commands"][-1:] == [command]:
        print(f"{cfg.out}: {cfg.stage} was killed as it ended; nothing is left to be trained")
        return
    made |= {"seed": cfg.seed, "faults": cfg.faults, "torch": torch.__version__, "cpus": os.cpu_count()}
    made["commands"].append(command)
    made["seconds"].setdefault("world", round(time.time() - began, 1))
    for stage in STAGES if cfg.stage == "all" else [cfg.stage]:
        began = time.time()
        model = run_stage(stage, cfg, tokenizer, frames, times)
        made["seconds"][stage] = round(time.time() - began, 1)
        save_stage(model, tokenizer, made, cfg.out)
    print(json.dumps(made))


def main():
    cfg = parse_args(Config, PRESETS)
    if cfg.policy:
        train_supervised(cfg)
    elif cfg.stage == "ranker":
        print(json.dumps(train_ranker(cfg)))
    else:
        pretrain(cfg)


if __name__ == "__main__":
    run_script(main)
