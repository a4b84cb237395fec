"""Seconds of one whole step here and in TRL's GRPOTrainer (experiments/step.py); and of its parts, loading,
CLIP and sampling, beside the libraries that they would come from.

    pip install -r requirements-dev.txt
    python -m experiments.bench  # float32, then bfloat16, against TRL
    python -m experiments.bench --dtype float32 --peer none  # this code alone
    python -m experiments.bench --what load  # a checkpoint, against load_file and a plain read
    python -m experiments.bench --what clip --size full  # image tower, against CLIPVisionModel with sdpa
    python -m experiments.bench --what decoder --size smollm  # sampling, against generate
    python -m experiments.bench --what loss --size 49k  # the walk, against a whole (B, T, V) table
    python -m experiments.bench --what draw --size 49k  # against torch.multinomial
    python -m experiments.bench --what growth  # time and memory as one size grows, with exponents
    python -m experiments.bench --what gpu  # all that only a GPU can show, in one table (experiments/gpu.py)

Two sides take turns in one process, with the same number of threads; the median counts. The last line is
JSON.
"""

import json
import math
import platform
import re
import tempfile
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

import lora
import train
from checkpoints.huggingface import hf_config, load_decoder, save_decoder
from checkpoints.memory import Live
from checkpoints.policies import freeze_base
from clip import ClipConfig, ImageTower
from data import Prompts
from experiments import gpu
from experiments.step import MODEL, STEP, G, P, S, Stopwatch, T, compare, text_policy
from grpo_rank import (
    Objective,
    policy_loss,
    rank_advantages,
    rollout_loss,
    sampling_logprobs,
    token_stats,
)
from model import Bridge, Decoder, ModelConfig
from plumbing.machine import pick_device, processor
from plumbing.options import BadInput, Count, Options, parse_args, run_script, write_json
from rollout import Completions, draw, generate, reference_states

DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16",), "both": ("float32", "bfloat16")}
PACKAGES = {"trl": ("torch", "trl", "transformers", "peft"), "none": ("torch",)}
PACKAGES |= {"load": ("torch", "safetensors"), "clip": ("torch", "transformers")}
PACKAGES["decoder"] = PACKAGES["clip"]
PACKAGES |= dict.fromkeys(("loss", "draw", "growth", "gpu"), PACKAGES["none"])
SIZES = {  # by --what and --size
    "step": {"small": MODEL},
    "load": {  # 67 MB and 1.1 GB in float32
        "small": ModelConfig(8192, 512, 4, 8, 8, 1376), "full": ModelConfig(32000, 2048, 4, 32, 32, 5632),
    },
    "clip": {  # full: CLIP ViT-L/14-336
        "small": ClipConfig(112, 14, 256, 4, 4, embed_dim=0, activation="quick_gelu"),
        "full": ClipConfig(336, 14, 1024, 24, 16, embed_dim=0, activation="quick_gelu"),
    },
    "decoder": {  # 4.9 M, 124 M, 135 M, 1.1 G parameters
        "small": MODEL, "125m": ModelConfig(32000, 768, 12, 12, 12, 2560),
        "smollm": ModelConfig(49152, 576, 30, 9, 3, 1536),
        "1b": ModelConfig(32000, 2048, 22, 32, 4, 5632, tied=False),
    },
    "loss": {"small": 512, "49k": 49152, "152k": 151936},  # V
    "draw": {"small": 512, "49k": 49152, "152k": 151936},
    "growth": {"small": MODEL}, "gpu": gpu.SIZES,
}  # fmt: skip
FRAMES, ROWS = 8, 2560
GROWTH = {  # the sizes that one letter takes while the others stay (`growing`)
    "P": (2, 4, 8), "G": (4, 8, 16), "T": (16, 32, 64), "S": (512, 1024, 2048, 4096),
    "V": (2048, 8192, 32768), "K": (8, 16, 32),
}  # fmt: skip
NO_END = torch.empty(0, dtype=torch.int64)


@dataclass
class Config(Options):
    """What is measured, and how"""

    what: Literal["step", "load", "clip", "decoder", "loss", "draw", "growth", "gpu"] = "step"
    size: str = ""  # small, the default | full (load, clip, gpu) | 125m | smollm | 1b (decoder) | 49k | 152k
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the CPU, for gpu a GPU; loading needs the CPU
    dtype: Literal["float32", "bfloat16", "both"] = "both"  # in a step bfloat16 is autocast on both sides
    repeats: Count = 10  # timed steps a side
    warmup: Count = 2  # steps a side before them
    peer: Literal["trl", "none"] = "trl"
    json: str = ""  # file that also gets the result

    def __post_init__(self):
        super().__post_init__()
        self.size = self.size or next(iter(SIZES[self.what]))
        if self.device == "auto":
            self.device = "cuda" if self.what == "gpu" else "cpu"
        if self.size not in SIZES[self.what]:
            of = "; ".join(f"--what {what} --size {'|'.join(sizes)}" for what, sizes in SIZES.items())
            raise BadInput(f"--what {self.what} --size {self.size}: choose one of {of}")
        if self.device == "cuda" and self.what == "load":
            raise BadInput(f"--device cuda: --what {self.what} is measured on the CPU; leave --device out")


# ------------------------------------------------------------------------------------------ parts of a step


def take_turns(cfg: Config, dtype: str, parts: dict) -> dict:
    """parts: a name's pair of functions, ours and theirs. They run in turn; prints and returns medians."""
    ours, theirs = Stopwatch(), Stopwatch()
    for _ in range(cfg.warmup + cfg.repeats):
        for part, pair in parts.items():
            for watch, function in zip((ours, theirs), pair, strict=True):
                with watch(part):
                    function()
    result = {"dtype": dtype, "ours": ours.medians(cfg.warmup), "theirs": theirs.medians(cfg.warmup)}
    result["ratio"] = {part: round(s / result["theirs"][part], 4) for part, s in result["ours"].items()}
    print(f"\n{cfg.what} {cfg.size}, {dtype}, medians of {cfg.repeats}")
    for part, ratio in result["ratio"].items():
        s = result["ours"][part], result["theirs"][part]
        print(f"  {part:8} ours {s[0]:9.4f} s   theirs {s[1]:9.4f} s   ours / theirs {ratio:.3f}")
    return result


def host_bytes(line: str) -> int:
    """This process's VmRSS (resident now) or VmHWM (at most, since it was reset), in bytes. Linux."""
    return 1024 * int(re.search(rf"{line}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def compare_load(cfg: Config, dtype: str) -> dict:
    """A checkpoint in the page cache: into our decoder; as load_file's bare tensors (map); as bytes (read).
    The first two map the file, so every page is touched."""
    from safetensors.torch import load_file

    def touch(tensors):
        return sum(float(x.flatten()[:: 4096 // x.element_size()].sum()) for x in tensors)

    kind = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_decoder(Decoder(SIZES["load"][cfg.size]), folder, kind)
        file = Path(folder) / "model.safetensors"

        def ours():
            touch(load_decoder(folder, dtype=kind).parameters())

        peers = {"map": lambda: touch(load_file(file).values()), "read": file.read_bytes}
        result = take_turns(cfg, dtype, {part: (ours, peer) for part, peer in peers.items()})
        result["bytes"] = file.stat().st_size
        if platform.system() == "Linux":
            before = host_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            ours()
            result["peak"] = round((host_bytes("VmHWM") - before) / result["bytes"], 4)
            print(f"  file {result['bytes'] / 1e6:.1f} MB; peak of host memory over it {result['peak']:.3f}")
    return result


@torch.no_grad()
def compare_clip(cfg: Config, dtype: str) -> dict:
    """All hidden layers of FRAMES frames, random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    clip, kind = SIZES["clip"][cfg.size], getattr(torch, dtype)
    torch.manual_seed(0)
    tower = ImageTower(clip).to(cfg.device, kind).eval()
    config = CLIPVisionConfig(
        image_size=clip.image_size, patch_size=clip.patch_size, hidden_size=clip.width,
        intermediate_size=4 * clip.width, num_hidden_layers=clip.num_layers,
        num_attention_heads=clip.num_heads, hidden_act=clip.activation, attn_implementation="sdpa",
    )  # fmt: skip
    peer = CLIPVisionModel(config).to(cfg.device, kind).eval()
    pixels = torch.randn(FRAMES, 3, clip.image_size, clip.image_size, device=cfg.device, dtype=kind)
    return take_turns(cfg, dtype, {"encode": (lambda: tower.hidden(pixels, -1), lambda: peer(pixels))})


@torch.no_grad()
def compare_decoder(cfg: Config, dtype: str) -> dict:
    """P prompts of S tokens, G drawn completions each: one token (prefill) and T tokens (whole)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, device = getattr(torch, dtype), cfg.device
    torch.manual_seed(0)
    policy = text_policy(SIZES["decoder"][cfg.size], dtype, device)
    freeze_base(policy.decoder, dtype)
    config = hf_config(policy.decoder.cfg)
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    peer = peer.to(device, kind).eval()
    ids = torch.randint(2, policy.decoder.cfg.vocab_size, (P, S), device=device)
    mask, uniforms = torch.ones_like(ids).bool(), torch.rand(P, G, T, device=device)
    prompts = Prompts(ids, mask, torch.zeros(P, 0, policy.decoder.cfg.dim, device=device))
    no_end = torch.empty(0, dtype=torch.int64, device=device)
    options = dict(attention_mask=mask.long(), do_sample=True, top_k=0, num_return_sequences=G)
    options |= dict(pad_token_id=0, eos_token_id=None)

    def ours(T):
        out = generate(policy, prompts, G, T, end_ids=no_end, uniforms=uniforms[..., :T])
        assert out.completion_ids.shape == (P * G, T)

    def theirs(T):
        assert peer.generate(ids, max_new_tokens=T, **options).shape == (P * G, S + T)

    return take_turns(cfg, dtype, {
        "prefill": (partial(ours, 1), partial(theirs, 1)), "whole": (partial(ours, T), partial(theirs, T)),
    })  # fmt: skip


def compare_loss(cfg: Config, dtype: str) -> dict:
    """The loss and its gradient in ROWS hidden states, by the walk and over a whole (B, T, V) table; and the
    peak bytes of the tensors that each makes. dtype is the head's; the logits are compared in float32."""
    V, D, tokens = SIZES["loss"][cfg.size], 256, (ROWS // T, T)
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn((*tokens, D), requires_grad=True), torch.randn((*tokens, D))
    head, advantages = torch.randn(V, D) * D**-0.5, torch.randn(tokens[0])
    mask, old_logprobs = torch.ones(tokens, dtype=torch.bool), torch.full(tokens, -math.log(V))
    rollout = Completions(torch.randint(V, tokens), mask, old_logprobs, support=None, ended=mask[:, 0])
    objective = Objective(kl_coef=STEP.kl_coef)

    def walk():
        kind = head.to(getattr(torch, dtype))
        rollout_loss(hidden, kind, rollout, advantages, objective, ref_hidden=ref_hidden)[0].backward()

    def plain():
        ours, reference = (
            sampling_logprobs((x @ head.T).flatten(0, 1), 1.0, None, None) for x in (hidden, ref_hidden)
        )
        values = token_stats(ours, reference, rollout.completion_ids.flatten())
        logprobs, entropy, kl = (x.view(tokens) for x in values)
        grids = {"kl": kl, "entropy": entropy}
        policy_loss(logprobs, old_logprobs, advantages, mask, **grids, **vars(objective))[0].backward()

    result = take_turns(cfg, dtype, {"loss": (walk, plain)})
    peaks = [peak_bytes(function) for function in (walk, plain)]
    print(f"  peak of tensors: ours {peaks[0] / 1e6:.0f} MB, theirs {peaks[1] / 1e6:.0f} MB")
    return result | {"peak": peaks, "peak_ratio": round(peaks[0] / peaks[1], 4)}


def compare_draw(cfg: Config, dtype: str) -> dict:
    """An id for each of P * G rows of log-probabilities, against torch.multinomial, which depends on the rows
    beside it. dtype changes nothing: both draw in float32."""
    torch.manual_seed(0)
    logprobs = torch.randn(P * G, SIZES["draw"][cfg.size]).log_softmax(dim=1)
    uniforms = torch.rand(P * G)
    pair = partial(draw, logprobs, uniforms), lambda: torch.multinomial(logprobs.exp(), 1)
    return take_turns(cfg, dtype, {"draw": pair})


def peak_bytes(function) -> int:
    """Bytes of tensors alive at once within function(), at most, that it made itself."""
    with Live() as live:
        function()
    return live.peak


def growth(cfg: Config, dtype: str) -> dict:
    """A step's seconds and peak bytes as P, G, T, S and V grow alone, and those of a bridge as K does, with
    exponents: the slope of log(seconds) over log(size), by least squares."""
    result = {"dtype": dtype}
    print(f"\ngrowth, {dtype}, medians of {cfg.repeats}")
    for name, sizes in GROWTH.items():
        seconds, peaks = [], []
        for size in sizes:
            function = growing(dtype, **{name: size})
            watch = Stopwatch()
            for _ in range(cfg.warmup + cfg.repeats):
                with watch("step"):
                    function()
            seconds.append(watch.medians(cfg.warmup)["step"])
            peaks.append(peak_bytes(function))
        slopes = [slope(sizes, values) for values in (seconds, peaks)]
        result[name] = dict(sizes=sizes, seconds=seconds, peak=peaks, exponents=slopes)
        measured = zip(sizes, seconds, peaks, strict=True)
        shown = ", ".join(f"{n}: {s:.3f} s {b / 1e6:.0f} MB" for n, s, b in measured)
        print(f"  {name}  time {slopes[0]:5.2f}  memory {slopes[1]:5.2f}   {shown}", flush=True)
    return result


def slope(sizes, values) -> float:
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, values))
    x = x - x.mean()
    return round(float((x * y).sum() / (x * x).sum()), 3)


def growing(dtype: str, P=2, G=4, T=16, S=64, V=512, K=0):
    """A function that samples and updates at these sizes; with K the bridge reads K frames of 36 patches."""
    torch.manual_seed(0)
    if K:
        cfg, clip = replace(MODEL, num_frames=K), ClipConfig(48, 8, 128, 1, 4, embed_dim=0)
        bridge, patches = Bridge(cfg, clip), torch.randn(2, K, 36, clip.width)
        return lambda: bridge(patches, torch.arange(K).expand(2, K) * 0.5).sum().backward()
    policy = text_policy(replace(MODEL, num_layers=2, vocab_size=V), dtype)
    learner = lora.Learner(policy.decoder, STEP.lora_r, STEP.lora_alpha)
    ids = torch.randint(2, V, (P, S))
    prompts = Prompts(ids, torch.ones_like(ids).bool(), torch.zeros(P, 0, MODEL.dim))
    advantages = rank_advantages(torch.arange(G).expand(P, G))
    step = replace(STEP, group_size=G, max_new_tokens=T)

    def function():
        rollout = generate(policy, prompts, G, T, end_ids=NO_END, uniforms=torch.rand(P, G, T))
        states = reference_states(policy, prompts, rollout, size=0)
        told = dict(prompts=prompts, rollout=rollout, advantages=advantages, ref_states=states, step=0)
        train.update(step, policy, learner, **told)

    return function


COMPARE = {"step": compare, "load": compare_load, "clip": compare_clip, "decoder": compare_decoder}
COMPARE |= {"loss": compare_loss, "draw": compare_draw, "growth": growth}


def describe(peer: str) -> dict:
    """The machine and the versions that a time belongs to."""
    versions = {name: version(name) for name in PACKAGES[peer]}
    return {"processor": processor(), "threads": torch.get_num_threads(), **versions}


def main() -> int:
    cfg = parse_args(Config)
    pick_device(cfg.device)
    result = describe(cfg.peer if cfg.what == "step" else cfg.what)
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    result |= {"what": cfg.what, "size": cfg.size, "repeats": cfg.repeats}
    size = SIZES[cfg.what][cfg.size]
    result |= {"P": P, "G": G, "S": S, "T": T, "frames": FRAMES}
    result["model"] = asdict(size) if is_dataclass(size) else size
    if cfg.what == "gpu":
        result["runs"] = gpu.measure(cfg)
        print(gpu.table(result["runs"]))
    else:
        result["runs"] = [COMPARE[cfg.what](cfg, dtype) for dtype in DTYPES[cfg.dtype]]
    if cfg.json:
        write_json(cfg.json, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_script(main)
