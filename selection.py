"""Variance-aware data selection (Temporal-R1, arXiv:2506.01908): keep the questions whose answers disagree.

    python selection.py DATA.jsonl --videos DIR --k 8 --out SELECTED.jsonl

The policy is named as for train.py: --policy, --adapter, --base and the like. Each question is answered k
times at temperature 1, in batches; only the raw reward of the task counts. The paper's rule and thresholds
were never published, so ours are stated: a question is kept if 0 < right < k; one that asks for a span, if
its IoUs differ; one that asks for both, if either holds. `--share X` keeps fewer: of each task X times as
many as were asked of it, those whose answers disagree most. Line 1 of SELECTED.jsonl is the report, with
settings; all readers pass over it.

The answers lie in SELECTED.jsonl.samples, so that a killed selection goes on, and another share needs no new
ones; the same settings give the same file, byte for byte, whether it was killed or not.
"""

import hashlib
import json
import math
import os
from collections import Counter
from statistics import pstdev

import torch
from config import Config
from tqdm import tqdm

from checkpoints.policies import OPTIONS, load_policy
from data import PromptSet, load_questions
from plumbing.machine import pick_device
from plumbing.options import ArgumentParser, BadInput, add_options, run_script, write_whole
from rollout import generate
from videoqa.answers import Question, Reward, reward, task

FLAT = 1e-6  # a std below this is rounding noise: all overlaps are the same
STD_BINS = 10  # of width 0.05: the std of values in [0, 1] is at most 0.5


def spread(rewards: list[Reward]) -> dict:
    """Of one question's k rewards: the count of right answers, their variance, the std of IoU (ddof 0).

    None where the task lacks the part.
    """
    right = [r.discrete for r in rewards if r.discrete is not None]
    ious = [r.continuous for r in rewards if r.continuous is not None]
    c, k = sum(right), len(right)
    return {
        "right": int(c) if right else None,
        "variance": c * (k - c) / k**2 if right else None,  # p (1 - p), the same float for c and k - c
        "iou_std": pstdev(ious) if ious else None,
    }


def disagreement(s: dict) -> float:
    """What the questions of one task are ordered by: the std of the k raw rewards (ddof 0), at most 0.5.
    Where answer and span are asked for, the sum of both: each part that disagrees is one to learn from."""
    return math.sqrt(s["variance"] or 0.0) + (s["iou_std"] or 0.0)


def select(spreads: list[dict], tasks: list[str], k: int, share: float = 1.0, seed: int = 0) -> list[str]:
    """Per question why it is kept ("kept: ..") or not ("dropped: ..").

    Of each task the first round(share * number of questions of that task) by `disagreement` are kept, equal
    ones in a seeded order, and never one whose answers agree.
    """
    reasons = []
    for s, name in zip(spreads, tasks, strict=True):
        if s["right"] is not None and 0 < s["right"] < k:
            reasons.append("kept: answers disagree")
        elif s["iou_std"] is not None and s["iou_std"] > FLAT:
            reasons.append("kept: overlaps disagree")
        elif name == "grounding":
            reasons.append("dropped: all overlaps equal")
        else:
            reasons.append("dropped: all right" if s["right"] else "dropped: all wrong")
    drawn = torch.randperm(len(spreads), generator=torch.Generator().manual_seed(seed)).tolist()
    for name in sorted(set(tasks)):
        kept = [i for i in drawn if tasks[i] == name and reasons[i].startswith("kept")]
        kept.sort(key=lambda i: -disagreement(spreads[i]))  # stable: equal ones stay as drawn
        for i in kept[round(share * tasks.count(name)) :]:
            reasons[i] = "dropped: beyond the share, others disagree more"
    return reasons


def sample(model, tokenizer, questions: list[Question], first: int, k: int, max_new_tokens: int, seed: int):
    """k answers of each question, a list of lists of texts; one prefill a question, all decoded together.

    Every question draws from its own generator (seed and its number in the file).
    """
    prompts = PromptSet(model, tokenizer, questions)
    uniforms = torch.stack([
        torch.rand(k, max_new_tokens, generator=torch.Generator().manual_seed(seed * 1_000_003 + first + i))
        for i in range(len(questions))
    ])  # fmt: skip
    batch, device = prompts[torch.arange(len(questions))], prompts.video_embeds.device
    out = generate(
        model, batch, k, max_new_tokens, end_ids=torch.tensor(tokenizer.end_ids, device=device),
        banned=tokenizer.banned_ids(model.cfg.vocab_size).to(device), uniforms=uniforms.to(device),
    )  # fmt: skip
    texts = prompts.texts(out)
    return [texts[i * k : (i + 1) * k] for i in range(len(questions))]


def _sha256(paths: list[str]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def weight_files(*folders: str) -> list[str]:
    """All safetensors files of these folders, or files; empty names are passed over."""
    found = []
    for path in filter(None, folders):
        names = sorted(os.listdir(path)) if os.path.isdir(path) else [""]
        found += [os.path.join(path, n) if n else path for n in names if n.endswith(".safetensors") or not n]
    return found


def _resume(path: str, settings: dict, batch: int) -> list[list[str]]:
    """The answers of all whole batches of an earlier run; the file is cut back to them, or begun."""
    header, done = json.dumps(settings) + "\n", []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
        if lines and lines[0] != header:
            raise BadInput(
                f"{path}: begun with other settings; repeat those, or remove the file to start anew"
            )
        whole = [line for line in lines[1:] if line.endswith("\n")]
        done = [json.loads(line) for line in whole]
        if len(done) < settings["questions"]:
            done = done[: len(done) // batch * batch]
    rows = "".join(json.dumps(texts, ensure_ascii=False) + "\n" for texts in done)
    write_whole(path, (header + rows).encode())
    return done


def histogram(spreads: list[dict], k: int) -> dict:
    """Numbers of questions by right answers (0..k), and by std of IoU in bins of width 0.05."""
    right = Counter(s["right"] for s in spreads)
    stds = [s["iou_std"] for s in spreads if s["iou_std"] is not None]
    bins = Counter(min(int(std * 2 * STD_BINS), STD_BINS - 1) for std in stds)
    return {
        "right": [right[c] for c in range(k + 1)] if len(right) > (None in right) else [],
        "iou_std": [bins[i] for i in range(STD_BINS)] if stds else [],
    }


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data", help="questions, one JSON object a line")
    parser.add_argument("--videos", required=True, help="the folder that video paths are relative to")
    parser.add_argument("--out", required=True, help="the JSONL file to write")
    parser.add_argument("--k", type=int, default=8, help="answers a question")
    parser.add_argument("--share", type=float, default=1.0, help="of all questions, kept at most; 0 < X <= 1")
    parser.add_argument("--max_new_tokens", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64, help="questions answered together")
    add_options(parser, Config, ("policy", "device", *OPTIONS))
    args = parser.parse_args()
    policy = Config(**{k: v for k, v in vars(args).items() if k in ("policy", "device", *OPTIONS)})
    for name, good in (("k", args.k >= 2), ("share", 0 < args.share <= 1), ("batch", args.batch >= 1)):
        if not good:
            raise BadInput(f"--{name} {getattr(args, name)}: needs k >= 2, 0 < share <= 1, batch >= 1")
    questions = load_questions(args.data, args.videos)
    device = pick_device(policy.device)
    chosen = {name: getattr(policy, name) for name in OPTIONS}
    model, tokenizer = load_policy(policy.policy, device, **chosen)
    model.decoder.compute_dtype = torch.float32 if device == "cpu" else torch.bfloat16
    settings = {
        "data_sha256": _sha256([args.data]),
        "model": policy.policy,
        "model_sha256": _sha256(weight_files(policy.policy, policy.clip, policy.adapter)),
        "questions": len(questions),
        "temperature": 1.0,
        **{name: getattr(args, name) for name in ("k", "max_new_tokens", "batch")},
        **chosen,
    }
    done = _resume(f"{args.out}.samples", settings, args.batch)
    with open(f"{args.out}.samples", "a", encoding="utf-8") as file:
        for first in tqdm(range(len(done), len(questions), args.batch), "batches", leave=False):
            part = questions[first : first + args.batch]
            texts = sample(model, tokenizer, part, first, args.k, args.max_new_tokens, policy.seed)
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts))
            file.flush()
            done += texts
    spreads = [spread([reward(text, q) for text in texts]) for q, texts in zip(questions, done, strict=True)]
    reasons = select(spreads, [task(q) for q in questions], args.k, args.share, policy.seed)
    counts = dict(sorted(Counter(reasons).items()))
    report = settings | {"share": args.share, "counts": counts, "histograms": histogram(spreads, args.k)}
    with open(args.data, encoding="utf-8") as file:
        rows = [line for line in file if line.strip() and not line.startswith('{"selection"')]
    chosen = [row.rstrip("\n") for row, why in zip(rows, reasons, strict=True) if why.startswith("kept")]
    content = "\n".join([json.dumps({"selection": report}), *chosen]) + "\n"
    write_whole(args.out, content.encode())
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    run_script(main)
