"""Every option of train.py, with what it means and what it may be; the presets."""

import os
from dataclasses import dataclass

from checkpoints.chat_tokenizer import TEMPLATES
from oracles.judge import LETTERS
from plumbing.options import BadInput


@dataclass
class Config:
    preset: str = "tiny"  # tiny | smoke (seconds, to see that everything runs) | 7b (the paper's settings)
    out: str = "runs/default"  # run folder; it must not exist, unless --resume
    resume: bool = False  # continue the run in --out from its last checkpoint
    seed: int = 0
    policy: str = "weights"  # folder of the supervised start: pretrain.py's, LLaVA-1.5's, a text decoder's
    clip: str = ""  # text decoder: folder or OpenAI file of the CLIP to put before it
    random_weights: bool = False  # draw the weights of a pretrained layout's folder that holds none
    template: str = "vicuna_v1"  # pretrained: conversation, vicuna_v1 | llama-2 | chatml | plain
    video_tokens: str = "auto"  # pretrained: pooled (K + N, VLM-RLAIF's; LLaVA) | patches (K * N) | qformer
    adapter: str = ""  # folder of a LoRA that PEFT or a run saved: merged into the start
    base: str = "float32"  # float32 | bfloat16 | nf4 (4 bits): how the decoder's frozen weights are held
    num_frames: int = 0  # K: frames of a clip; 0: as many as the policy's config says; pretrained 50
    data: str = ""  # JSONL of questions; empty: the embedded world
    videos: str = ""  # folder that the JSONL's video paths are relative to
    world_dir: str = "world/rl"  # folder of the embedded world's drawn clips
    num_train_clips: int = 500  # embedded world: clips to learn from
    num_eval_clips: int = 250  # embedded world: held-out clips
    eval_data: str = ""  # JSONL of held-out questions; empty: of a share of --data's videos
    eval_videos: str = ""  # folder of its videos; empty: --videos
    eval_share: float = 0.25  # --data: share of the videos held out
    eval_samples: int = 4  # drawn answers a question in the sampled accuracy
    num_steps: int = 100  # optimiser rounds: sample, rank, update; 0: as many as num_epochs make
    num_epochs: int = 0  # passes over the questions, where num_steps is 0
    batch_prompts: int = 48  # P: prompts a step, over all processes
    sample_prompts: int = 0  # prompts sampled at once; 0: all of a step; fewer save KV cache alone
    micro_batch_prompts: int = 48  # prompts of one forward and backward; smaller saves memory alone
    group_size: int = 5  # G: completions a prompt, ranked against each other
    max_new_tokens: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    objective: str = "grpo_rank"  # grpo_rank | grpo: z-scored groups of the summed dual reward
    oracle: str = "rule"  # rule | sum | lexicographic | llm | trained | replay | module:function (README)
    discrete_coef: float = 1.0  # weights of the dual reward's parts (sum, grpo): the right answer,
    continuous_coef: float = 1.0  # the overlap of the spans,
    format_coef: float = 0.1  # the form; more is never paid for form alone
    overlap: str = "iou"  # iou | iop: the dual reward's continuous part
    think: bool = False  # whether the form, and the prompt of LLaVA, ask for a <think> part
    oracle_url: str = ""  # llm: http://HOST:PORT/v1 of an OpenAI-compatible server; key in ORACLE_API_KEY
    oracle_model: str = ""
    oracle_body: str = ""  # JSON merged into every request; null takes a field out
    oracle_frames: int = 0  # llm: pictures of the video that the judge is shown
    oracle_gold: bool = False  # show the judge the gold answer
    oracle_permutations: int = 1  # rankings asked for a group, each with the answers in another order
    oracle_agreement: str = "off"  # off | scale (advantages by Kendall's W) | tie (what they disagree on)
    oracle_concurrency: int = 64  # calls in flight: the default step in one wave
    oracle_timeout: float = 120.0  # s for a whole reply
    oracle_patience: float = 600.0  # s to wait for a judge that died, before the run saves and stops
    oracle_max_calls: int = 0  # budget until the run is started or resumed again; 0: no limit
    oracle_max_tokens: int = 0
    oracle_cache: str = ""  # sqlite file, empty: judge.sqlite in --out; replay: the file to read, or a JSONL
    ranker: str = "weights/ranker"  # trained: folder of the ranker (pretrain.py --stage ranker)
    ranker_margin: float = 0.5  # trained: answers closer than this in log-odds tie
    anchor: bool = False  # the reference answer is ranked along: no positive advantage behind it
    canary: bool = False  # and a known-bad answer too: measures the judge's errors
    swap_prob: float = 0.0  # oracle noise: chance that two neighbours in its order swap
    position_bias: float = 0.0  # oracle noise: chance that the first candidate is put on top
    advantage_form: str = "ideal"  # ideal | printed | inverted: README, "What the paper leaves open"
    gain: str = "divided"  # divided | appendix
    updates_per_rollout: int = 2  # optimiser steps on a rollout; with 1 the clip never binds
    clip_eps: float = 0.2
    norm: str = "sequence"  # sequence | token | constant (by max_new_tokens)
    kl_coef: float = 0.02  # weight of KL(reference || policy), exact over the vocabulary
    entropy_coef: float = 0.0  # weight of the entropy bonus
    lora_r: int = 16
    lora_alpha: float = 32.0
    lr: float = 1e-3  # of the first step; it falls in equal steps towards 0 at num_steps
    max_grad_norm: float = 1.0
    save_every: int = 20  # steps between checkpoints
    max_bad_steps: int = 3  # non-finite losses in a row before the run stops
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto | float32 | bfloat16: of the matrix products (autocast)
    compile: bool = False  # torch.compile for the log-probabilities of the update and the 4-bit base
    checkpointing: bool = False  # keep a layer's input alone for the backward: less memory, slower
    memory_plan: bool = False  # print the memory plan; rehearse the longest step first, print its peaks

    def __post_init__(self):
        if self.group_size < 2:
            raise BadInput(f"--group_size {self.group_size}: a ranking needs at least 2 candidates")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise BadInput(f"--{name} {getattr(self, name)}: choose one of {', '.join(choices)}")
        if self.oracle not in ORACLES and ":" not in self.oracle:
            raise BadInput(f"--oracle {self.oracle}: choose one of {', '.join(ORACLES)}, module:function")
        if self.oracle == "llm" and not (self.oracle_url and self.oracle_model):
            raise BadInput("--oracle llm needs --oracle_url and --oracle_model; give both")
        if self.oracle == "replay" and not os.path.isfile(self.oracle_cache):
            raise BadInput(f"--oracle_cache {self.oracle_cache}: no such file to replay; name one")
        for name in ("permutations", "concurrency", "timeout"):
            if getattr(self, f"oracle_{name}") <= 0:
                raise BadInput(f"--oracle_{name} {getattr(self, f'oracle_{name}')}: give more than 0")
        if self.oracle == "llm" and self.group_size + 2 > len(LETTERS):
            raise BadInput(f"--group_size {self.group_size}: a judge has letters for {len(LETTERS) - 2}")
        if not self.policy:
            raise BadInput(f"--preset {self.preset} brings no weights: name a folder with --policy")
        if self.num_steps <= 0 and self.num_epochs <= 0:
            raise BadInput("--num_steps 0 --num_epochs 0: there is nothing to do; give one of them")
        wraps = self.swap_prob or self.position_bias or self.oracle_permutations > 1 or self.anchor
        if self.objective == "grpo" and (self.oracle not in ("rule", "sum") or wraps or self.canary):
            wrong = "--objective grpo takes the summed reward: --oracle sum, no noise, permutations, anchor"
            raise BadInput(f"{wrong}; choose these, or --objective grpo_rank")
        if self.eval_data and not self.data:
            raise BadInput("--eval_data holds out questions of --data; give both, or neither")
        if bool(self.data) != bool(self.videos):
            raise BadInput(
                "--data and --videos go together: a JSONL file and the folder its paths are relative to"
            )


ORACLES = ("rule", "sum", "lexicographic", "llm", "trained", "replay")
CHOICES = {
    "preset": ("tiny", "smoke", "7b"),
    "template": tuple(TEMPLATES),
    "video_tokens": ("auto", "pooled", "patches", "qformer"),
    "base": ("float32", "bfloat16", "nf4"),
    "objective": ("grpo_rank", "grpo"),
    "overlap": ("iou", "iop"),
    "oracle_agreement": ("off", "scale", "tie"),
    "advantage_form": ("ideal", "printed", "inverted"),
    "gain": ("divided", "appendix"),
    "norm": ("sequence", "token", "constant"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
}
PRESETS = {
    "tiny": {},
    "smoke": dict(num_train_clips=24, num_eval_clips=16, num_steps=3, batch_prompts=8, micro_batch_prompts=4),
    # Oracle-RLAIF as far as it is published: 5 answers, r 64, alpha 16, all linear layers, 50 frames, 4
    # epochs, 64 prompts a rollout. The rest is VLM-RLAIF's: NF4, answer length, learning rate, two passes,
    # clip, KL weight.
    "7b": dict(
        policy="", base="nf4", num_frames=50, num_steps=0, num_epochs=4, batch_prompts=64, sample_prompts=2,
        micro_batch_prompts=1, group_size=5, eval_samples=1, max_new_tokens=896, lora_r=64, lora_alpha=16.0,
        lr=3e-5, updates_per_rollout=2, clip_eps=0.2, kl_coef=0.1, max_grad_norm=1.0, dtype="bfloat16",
        checkpointing=True, memory_plan=True, save_every=5,
    ),
}  # fmt: skip
