"""What only a GPU can show, in one table: python -m experiments.bench --what gpu

    default job   python train.py, as it is and with --compile
    step          experiments/step.py against TRL, float32 and bfloat16
    decoding      a token of a decoder of 1.1 G parameters in bfloat16, as it is and as a captured step,
                  against the time that reading its weights takes
    7b            --preset 7b over 4-bit random weights: planned peak, measured peak, seconds a step

Each row stands by itself: one that fails says so in its last column, and the others are measured all the
same. `--size small --device cpu` runs the same rows at sizes too small to mean anything.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.huggingface import hf_config
from checkpoints.policies import freeze_base
from data import Prompts
from experiments import step
from model import ModelConfig
from plumbing.options import write_json
from rollout import generate

COLUMNS = ("row", "measured", "against", "ratio", "remarks")


@dataclass(frozen=True)
class Size:
    """What the rows are measured on."""

    decoder: ModelConfig  # of the decoding row
    tokens: int  # that it samples
    job: tuple[str, ...]  # options of the default job
    large: ModelConfig  # of the row 7b
    clip: tuple[int, int, int, int, int]  # its CLIP: image, patch, width, layers, heads
    preset: tuple[str, ...]  # options of its run


SIZES = {
    "full": Size(
        ModelConfig(32000, 2048, 22, 32, 4, 5632, tied=False), 128, (),
        ModelConfig(32000, 4096, 32, 32, 32, 11008, tied=False, max_positions=4096), (336, 14, 1024, 24, 16),
        ("--num_steps", "2", "--batch_prompts", "8", "--max_new_tokens", "64", "--num_train_clips", "12",
         "--num_eval_clips", "1"),
    ),
    "small": Size(
        step.MODEL, 8, ("--preset", "smoke", "--num_steps", "1"),
        ModelConfig(300, 64, 2, 4, 2, 96, tied=False, max_positions=4096), (28, 14, 64, 2, 1),
        ("--num_steps", "1", "--batch_prompts", "2", "--max_new_tokens", "2", "--num_train_clips", "2",
         "--num_eval_clips", "1", "--num_frames", "2", "--lora_r", "4"),
    ),
}  # fmt: skip


def measure(cfg) -> list[dict]:
    """The rows, printed as they come. cfg: bench's Config."""
    size, rows = SIZES[cfg.size], []
    with tempfile.TemporaryDirectory() as folder:
        twice = [(job, second) for job in (default_job, a_step, decoding) for second in (False, True)]
        for job, second in [*twice, (seven_billion, False)]:
            row = dict.fromkeys(COLUMNS, "")
            try:
                row |= job(cfg, size, folder, second)
            except Exception as error:  # a lent machine's minutes are few: the other rows still count
                row |= {"row": f"{job.__name__} {int(second)}", "remarks": f"failed: {error}"[:300]}
            rows.append(row)
            print("| " + " | ".join(str(row[name]) for name in COLUMNS) + " |", flush=True)
    return rows


def train_py(cfg, out: str, *options: str) -> tuple[dict, list[dict], str]:
    """A run of train.py in a process of its own: results.json, the rows of metrics.jsonl, what it printed."""
    command = [sys.executable, "train.py", "--device", cfg.device, *options, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return json.loads(Path(out, "results.json").read_text()), rows, done.stdout


def default_job(cfg, size: Size, folder: str, compiled: bool) -> dict:
    options = [*size.job, "--world_dir", f"{folder}/world", *["--compile"] * compiled]
    results, rows, _ = train_py(cfg, f"{folder}/job{compiled:d}", *options)
    before, after = (100 * results[when]["greedy"]["accuracy"] for when in ("before", "after"))
    update = sum(row["update_s"] for row in rows) / len(rows)
    sampling = sum(row["sampling_s"] for row in rows) / len(rows)
    return {
        "row": "default job" + ", --compile" * compiled, "measured": f"{results['wall_s']:.1f} s",
        "remarks": f"greedy {before:.1f} -> {after:.1f} %; a step: sampling {sampling:.3f} s,"
        f" update {update:.3f} s",
    }  # fmt: skip


def a_step(cfg, size: Size, folder: str, sixteen_bits: bool) -> dict:
    dtype = "bfloat16" if sixteen_bits else "float32"
    result = step.compare(cfg, dtype)
    ours, theirs = result["ours"]["step"], result["trl"].get("step")
    against = {"against": f"TRL {theirs:.4f} s", "ratio": result["ratio"]} if theirs else {}
    return {"row": f"step, {dtype}", "measured": f"{ours:.4f} s"} | against


def decoding(cfg, size: Size, folder: str, captured: bool) -> dict:
    """Seconds a token: those of all tokens less those of a prefill."""
    P, G, S, T = step.P, step.G, step.S, size.tokens
    policy = step.text_policy(size.decoder, "bfloat16", cfg.device)
    freeze_base(policy.decoder, "bfloat16")
    policy.decoder.captured = captured
    ids = torch.randint(2, size.decoder.vocab_size, (P, S), device=cfg.device)
    video = torch.zeros(P, 0, size.decoder.dim, device=cfg.device)
    prompts, times = Prompts(ids, torch.ones_like(ids).bool(), video), {1: [], T: []}
    for _ in range(cfg.warmup + cfg.repeats):
        for tokens, seconds in times.items():
            uniforms = torch.rand(P, G, tokens, device=cfg.device)
            began = now(cfg.device)
            generate(policy, prompts, G, tokens, end_ids=ids[0, :0], uniforms=uniforms)
            seconds.append(now(cfg.device) - began)
    prefill, whole = (sorted(seconds[cfg.warmup :])[cfg.repeats // 2] for seconds in times.values())
    token = (whole - prefill) / (T - 1)
    weights = sum(p.numel() * p.element_size() for p in policy.decoder.parameters())
    bound = weights / bandwidth(cfg.device)
    return {
        "row": f"a token of {P} x {G} answers" + ", captured" * captured, "measured": f"{1e3 * token:.3f} ms",
        "against": f"reading {weights / 1e9:.2f} GB of weights, {1e3 * bound:.3f} ms",
        "ratio": round(token / bound, 2), "remarks": f"prefill {1e3 * prefill:.1f} ms",
    }  # fmt: skip


def now(device: str) -> float:
    """Seconds, once all that is queued is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(device: str) -> float:
    """Bytes a second of the device's memory: the fastest of ten copies, which read and write."""
    x = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y, seconds = torch.empty_like(x), []
    for _ in range(10):
        began = now(device)
        y.copy_(x)
        seconds.append(now(device) - began)
    return 2 * len(x) / min(seconds)


def seven_billion(cfg, size: Size, folder: str, _) -> dict:
    write_layout(size, f"{folder}/decoder", f"{folder}/clip")
    given = [
        "--preset",
        "7b",
        "--policy",
        f"{folder}/decoder",
        "--clip",
        f"{folder}/clip",
        "--random_weights",
    ]
    given += ["--dtype", "float32"] * (cfg.device == "cpu")
    world = ["--world_dir", f"{folder}/world7"]
    results, rows, said = train_py(cfg, f"{folder}/seven", *given, *size.preset, *world)
    planned = re.search(r"([\d.]+) GB  peak", said)[1]
    measured = re.search(r"rehearsal of the longest step: (.*)", said)[1]
    seconds = sum(rows[-1][f"{part}_s"] for part in ("sampling", "reference", "update"))
    return {
        "row": "7b preset, 4 bits", "measured": measured,
        "against": f"planned {planned} GB",
        "remarks": f"{seconds:.1f} s a step, {results['wall_s']:.0f} s in all; {' '.join(size.preset)}",
    }  # fmt: skip


def write_layout(size: Size, decoder: str, clip: str) -> None:
    """Two folders of the Hugging Face layout without weights: a decoder with a tokenizer of bytes, a CLIP."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    os.makedirs(decoder)
    write_json(f"{decoder}/config.json", hf_config(size.large))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    words = tokenizers.Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    words.add_special_tokens(["<unk>", "<s>", "</s>"])
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    words.save(f"{decoder}/tokenizer.json")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(f"{decoder}/tokenizer_config.json", named | {"tokenizer_class": "PreTrainedTokenizerFast"})
    image, patch, width, layers, heads = size.clip
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    vision = dict(image_size=image, patch_size=patch, hidden_size=width, intermediate_size=4 * width)
    vision |= dict(num_hidden_layers=layers, num_attention_heads=heads)
    os.makedirs(clip)
    config = {"model_type": "clip", "vision_config": vision, "text_config": text, "projection_dim": 64}
    write_json(f"{clip}/config.json", config)


def table(rows: list[dict]) -> str:
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(head + ["| " + " | ".join(str(row[name]) for name in COLUMNS) + " |" for row in rows])
