"""The checkpoint that --resume goes on from, on the same data and weights; and batches that a run skipped."""

import hashlib
import json
import os

import torch
from safetensors.torch import save

from plumbing.machine import process_info, say
from plumbing.options import BadInput, finite, is_kind, parse_json, read_json, read_tensors, write_whole
from plumbing.run_folder import COPY_AGAIN, OR_EARLIER

PROGRESS = {  # what a checkpoint has beside its tensors
    "step": int, "bad_steps": int, "bad_in_a_row": int, "wall_s": int | float,
    "before": dict, "before_values": dict,
}  # fmt: skip


def made_before(out: str, now: dict) -> dict:
    """What the run was made with and from. BadInput: from other data or weights than `now`'s. Prints a note
    of what shifts the rounding."""
    path = os.path.join(out, "config.json")
    made = read_json(path, COPY_AGAIN)["made"]
    if not is_kind(made, {"from": dict}):
        raise BadInput(f"{path}: 'made' is damaged; {COPY_AGAIN}")
    if made["from"].keys() != now["from"].keys():
        raise BadInput(f"{path}: a run of an earlier version; start it anew")
    for name, value in now["from"].items():
        if made["from"][name] != value:
            words = f"{name} changed since the run began{OR_EARLIER}; put it back to resume"
            raise BadInput(f"--out {out}: {words}")
    pairs = {name: (made.get(name), now[name]) for name in ("threads", "processes", "torch")}
    changed = [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        say(f"note: {', '.join(changed)} since the run began; its numbers round differently from here on")
    return made


def write_checkpoint(path: str, tensors: dict[str, torch.Tensor], progress: dict) -> None:
    """One rename replaces the file. progress: any JSON with the fields of PROGRESS."""
    text = json.dumps(finite(progress))
    metadata = {"progress": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_whole(path, save({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, metadata))


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, progress). BadInput: the file is missing or damaged."""
    tensors, metadata = read_tensors(path, COPY_AGAIN)
    text = metadata.get("progress", "")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if metadata.get("sha256", digest) != digest:
        raise BadInput(f"{path}: its progress is damaged; {COPY_AGAIN}")
    progress = parse_json(text, path, COPY_AGAIN)
    if not is_kind(progress, PROGRESS):
        raise BadInput(f"{path}: its progress has no {', '.join(PROGRESS)}; {COPY_AGAIN}")
    return tensors, progress


def write_bad_batch(out: str, step: int, batch: dict) -> str:
    """Stores all tensors of the records of a step that was skipped; returns the file's path."""
    named = {k: x for value in batch.values() for k, x in getattr(value, "__dict__", {}).items()} | batch
    tensors = {k: x.cpu().contiguous() for k, x in named.items() if isinstance(x, torch.Tensor)}
    path = os.path.join(out, "bad_batches", f"step_{step}_process_{process_info()[0]}.safetensors")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_whole(path, save(tensors))
    return path
