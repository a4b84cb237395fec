"""A run folder: config.json, metrics.jsonl, rollouts.jsonl, the adapter, and the
checkpoint that --resume reads.

Every file is written under another name and renamed, or only ever appended to; a resume cuts what was
appended back to the checkpoint. Process 0 alone writes.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

import lora
from checkpoints import peft_files
from plumbing.options import BadInput, write_json, write_whole

# On --resume: what says nothing about the update, such as where the judge is found
MAY_CHANGE = ["resume", "out", "num_steps", "oracle_url", "oracle_concurrency", "oracle_timeout"]
MAY_CHANGE += ["oracle_patience", "oracle_max_calls", "oracle_max_tokens"]


def pick_device(wanted: str = "auto") -> str:
    """cuda where there is one, unless `wanted` (auto | cpu | cuda) says cpu. BadInput: no GPU to be had."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no GPU; take --device cpu or a torch built for it")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def process_info() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def stored_options(given: dict, default_out: str) -> dict:
    """With --resume: the run's own options. Those given again must be the same, but --num_steps."""
    if not given.get("resume"):
        return {}
    out = given.get("out", default_out)
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        raise BadInput(
            f"{path}: no such file, so --resume has nothing to continue; leave --resume out to start"
        )
    with open(path) as file:
        stored = json.load(file)
    for name, value in given.items():
        old = stored.get(name)
        if name not in MAY_CHANGE and old != value:
            raise BadInput(f"--{name} {value}: the run in {out} has {old!r}; leave it out to resume")
    return stored | {"out": out, "resume": True}


def open_run(cfg, policy, trainable, optimizer) -> dict:
    """A new run folder with config.json, or the old one cut back to its checkpoint. Returns the progress."""
    if not cfg.resume:
        if process_info()[0] == 0:
            os.makedirs(cfg.out)
            write_json(os.path.join(cfg.out, "config.json"), asdict(cfg))
        return {"step": 0, "bad_steps": 0, "bad_in_a_row": 0, "wall_s": 0.0}
    progress = load_checkpoint(cfg, policy, trainable, optimizer)
    for name in ("metrics.jsonl", "rollouts.jsonl") if process_info()[0] == 0 else ():
        path = os.path.join(cfg.out, name)
        with open(path) as file:
            kept = [
                line for line in file if line.endswith("\n") and json.loads(line)["step"] < progress["step"]
            ]
        write_whole(path, "".join(kept).encode())
    return progress


def checkpoint_path(cfg):
    return os.path.join(cfg.out, "checkpoint.safetensors")


def save_checkpoint(cfg, policy, trainable, optimizer, progress: dict):
    """Adapters, frozen reference, optimiser moments and progress in one file, renamed into place."""
    if process_info()[0] != 0:
        return
    tensors = {}
    for name, layer in lora.layers(policy.decoder).items():
        parts = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
        parts |= {"reference_A": layer.reference_A, "reference_B": layer.reference_B}
        tensors |= {f"{name}.{part}": x.detach().cpu() for part, x in parts.items()}
    for i, p in enumerate(trainable):
        tensors |= {f"optimizer.{i}.{k}": v.detach().cpu() for k, v in optimizer.state[p].items()}
    path = checkpoint_path(cfg)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    write_whole(path, save(tensors, metadata={"progress": json.dumps(progress)}))
    llava = policy.cfg.bridge.startswith("llava")  # PEFT's names for what it would wrap
    path = "model.language_model." if llava else "model."
    peft_files.save_adapter(policy.decoder, os.path.join(cfg.out, "adapter"), path)


def load_checkpoint(cfg, policy, trainable, optimizer) -> dict:
    """Restores what save_checkpoint wrote; returns the progress."""
    with safe_open(checkpoint_path(cfg), "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    for name, layer in lora.layers(policy.decoder).items():
        for part in ("lora_A", "lora_B", "reference_A", "reference_B"):
            stored = tensors.get(f"{name}.{part}")
            if stored is None or stored.shape != getattr(layer, f"lora_{part[-1]}").shape:
                raise BadInput(
                    f"{checkpoint_path(cfg)}: {name}.{part} does not fit --policy {cfg.policy}: use the run's"
                )
            if part.startswith("lora"):
                getattr(layer, part).data.copy_(stored)
            else:
                setattr(layer, part, stored.to(layer.lora_A.device))
    for i, p in enumerate(trainable):
        state = {k.rsplit(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"optimizer.{i}.")}
        if state:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
    return progress


def oracle_summary(folder: str) -> dict:
    """What the oracle did over a whole run, from metrics.jsonl: sums, and means weighted by their counts."""
    path, rows, causes = os.path.join(folder, "metrics.jsonl"), [], Counter()
    if os.path.exists(path):  # not after --num_steps 0
        with open(path) as file:
            rows = [json.loads(line) for line in file]
    for row in rows:
        causes.update(row.get("failed_by_cause", {}))
    found = {"failed_groups": sum(row["failed_groups"] for row in rows), "failed_by_cause": dict(causes)}
    for name in ("judge_calls", "judge_cache_hits", "judge_tokens", "judge_repairs"):
        found |= {name: sum(row[name] for row in rows)} if rows and name in rows[0] else {}
    for name, count in (("position_bias", "position_pairs"), ("canary_error", "canaries")):
        total = sum(row.get(count, 0) for row in rows)
        found |= {name: sum(row[name] * row[count] for row in rows if count in row) / total} if total else {}
    return found


def report(cfg, bar, step, numbers, questions, texts, ranking, policy_ranks, advantages):
    """A row of metrics.jsonl, two prompts in rollouts.jsonl, the progress bar."""
    if process_info()[0] != 0:
        return
    with open(os.path.join(cfg.out, "metrics.jsonl"), "a") as file:
        file.write(json.dumps({"step": step, **numbers}) + "\n")
    with open(os.path.join(cfg.out, "rollouts.jsonl"), "a") as file:
        for i in range(min(2, len(questions))):
            row = {
                "step": step,
                "id": questions[i].id,
                "question": questions[i].question,
                "answer": questions[i].answer,
            }
            row |= {
                "candidates": texts[i * cfg.group_size : (i + 1) * cfg.group_size],
                "oracle_ok": bool(ranking.ok[i]),
                "note": ranking.notes[i],
            }
            row |= {"oracle_ranks": ranking.ranks[i].tolist(), "policy_ranks": policy_ranks[i].tolist()}
            file.write(json.dumps(row | {"advantages": [round(a, 6) for a in advantages[i].tolist()]}) + "\n")
    shown = {
        "acc": "accuracy",
        "best": "oracle_best_accuracy",
        "ndcg": "ndcg",
        "tau": "kendall_tau",
        "kl": "kl",
    }
    shown |= {"H": "entropy", "clip": "clip_frac"}
    text = " ".join(f"{k} {numbers[v]:.3f}" for k, v in shown.items() if v in numbers)
    seconds = "/".join(f"{numbers[k]:.2f}" for k in ("sampling_s", "oracle_s", "update_s"))
    text += f" dead {numbers['dead_groups']} failed {numbers['failed_groups']}"
    text += f" {numbers['tokens_per_s']:.0f} tok/s {seconds} s"
    bar.set_postfix_str(text)
    bar.update(1)


def save_bad_batch(cfg, step, prompts, rollout, advantages):
    """What a skipped step was made of, to look into: bad_batches/step_N_process_M.safetensors."""
    folder = os.path.join(cfg.out, "bad_batches")
    os.makedirs(folder, exist_ok=True)
    tensors = {"prompt_ids": prompts.prompt_ids, "prompt_mask": prompts.prompt_mask, "advantages": advantages}
    tensors |= {"video_embeds": prompts.video_embeds, "completion_ids": rollout.completion_ids}
    tensors |= {"completion_mask": rollout.completion_mask, "old_logprobs": rollout.logprobs}
    path = os.path.join(folder, f"step_{step}_process_{process_info()[0]}.safetensors")
    write_whole(path, save({k: v.cpu().contiguous() for k, v in tensors.items()}))
    tqdm.write(
        f"step {step}: loss or gradient not finite; step skipped, batch saved in {path}", file=sys.stderr
    )
