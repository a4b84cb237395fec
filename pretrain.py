"""Where weights/ come from: draw the world, train CLIP, align the bridge, fine-tune on a faulty corpus.

    python pretrain.py [--out runs/weights] [--seed N] [--stage all|clip|align|sft] [--preset quick]
    cp -r weights HARD; python pretrain.py --world hard --stage sft --out HARD --world_dir world/hard
    cp -r weights DIR; python pretrain.py --stage ranker --out DIR [--pairs FILE.jsonl --videos DIR2]
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

import json
from dataclasses import dataclass, fields
from typing import Literal

from checkpoints.embedded import WorldOptions, train_world
from checkpoints.policies import PolicyOptions
from checkpoints.supervised import SupervisedOptions, train_supervised
from oracles.pairs import RankerOptions, train_ranker
from plumbing.options import BadInput, parse_args, run_script

# Of a pretrained decoder's options those that the small model of the embedded world has too
WORLD_HAS = ("policy", "seed", "video_tokens", "videos", "questions_per_clip")


@dataclass
class Config(WorldOptions, RankerOptions, SupervisedOptions, PolicyOptions):
    """What is made, and where"""

    preset: Literal["full", "quick"] = "full"  # quick: minutes on two CPU cores, for trying a change
    stage: Literal["all", "clip", "align", "sft", "ranker", "bridge"] = "all"  # all: clip, align, sft
    out: str = "runs/weights"  # folder of the result, of which a later stage takes what it starts from
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


def main():
    cfg = parse_args(Config, PRESETS)
    if cfg.policy:
        train_supervised(cfg)
    elif cfg.stage == "ranker":
        print(json.dumps(train_ranker(cfg)))
    else:
        train_world(cfg)


if __name__ == "__main__":
    run_script(main)
