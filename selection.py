"""Variance-aware data selection (Temporal-R1, arXiv:2506.01908): keep the questions whose answers disagree.

    python selection.py DATA.jsonl --videos DIR --k 8 --out SELECTED.jsonl

Each question is answered k times at temperature 1, in batches; only the raw reward of the task counts. The
paper's rule and thresholds were never published, so ours are stated: a question is kept if 0 < right < k;
one that asks for a span, if the std of its IoUs (ddof 0) is in the top `share` of its task; one that asks for
both, if either holds. Line 1 of SELECTED.jsonl is the report, with settings; all readers pass over it.

The answers lie in SELECTED.jsonl.samples, so that a killed selection goes on; the same settings give the same
file, byte for byte, whether it was killed or not.
"""

import hashlib
import json
import os
from collections import Counter
from statistics import fmean, pstdev

import torch
from tqdm import tqdm

from answers import Question, Reward, reward, task
from cli import ArgumentParser, BadInput, run_script, write_whole
from data import PromptSet, load_questions
from policies import load_policy
from rollout import generate

FLAT = 1e-6  # a std below this is rounding noise: all overlaps are the same
STD_BINS = 10  # of width 0.05: the std of values in [0, 1] is at most 0.5


def spread(rewards: list[Reward]) -> dict:
    """Of one question's k rewards: the count of right answers, their variance, the std of IoU (ddof 0).

    None where the task lacks the part.
    """
    right = [r.discrete for r in rewards if r.discrete is not None]
    ious = [r.continuous for r in rewards if r.continuous is not None]
    p = fmean(right) if right else None
    variance = None if p is None else p * (1 - p)
    return {
        "right": None if p is None else int(sum(right)),
        "variance": variance,
        "iou_std": pstdev(ious) if ious else None,
    }


def select(spreads: list[dict], tasks: list[str], k: int, share: float) -> list[str]:
    """Per question why it is kept ("kept: ..") or not ("dropped: ..").

    The overlaps of a task are ordered by std, equal ones in the order of the file; the first
    round(share * number of questions of that task) are kept, flat ones never.
    """
    top = set()
    for name in ("grounding", "grounded"):
        rows = [i for i, t in enumerate(tasks) if t == name]
        order = sorted(rows, key=lambda i: -spreads[i]["iou_std"])[: round(share * len(rows))]
        top.update(i for i in order if spreads[i]["iou_std"] > FLAT)
    reasons = []
    for i, s in enumerate(spreads):
        if s["right"] is not None and 0 < s["right"] < k:
            reasons.append("kept: answers disagree")
        elif i in top:
            reasons.append("kept: overlaps disagree")
        elif tasks[i] == "grounding":
            flat = s["iou_std"] <= FLAT
            reasons.append("dropped: all overlaps equal" if flat else "dropped: overlaps disagree too little")
        else:
            reasons.append("dropped: all right" if s["right"] else "dropped: all wrong")
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
    batch = prompts[torch.arange(len(questions))]
    out = generate(
        model, batch, k, max_new_tokens, end_ids=torch.tensor(tokenizer.end_ids),
        banned=tokenizer.banned_ids(model.cfg.vocab_size), uniforms=uniforms,
    )  # fmt: skip
    texts = prompts.texts(out)
    return [texts[i * k : (i + 1) * k] for i in range(len(questions))]


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    parser.add_argument("--policy", default="weights", help="folder that pretrain.py made")
    parser.add_argument("--k", type=int, default=8, help="answers a question")
    parser.add_argument(
        "--share", type=float, default=1 / 3, help="of the span questions, kept by std of IoU"
    )
    parser.add_argument("--max_new_tokens", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64, help="questions answered together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, good in (("k", args.k >= 2), ("share", 0 < args.share <= 1), ("batch", args.batch >= 1)):
        if not good:
            raise BadInput(f"--{name} {getattr(args, name)}: needs k >= 2, 0 < share <= 1, batch >= 1")
    questions = load_questions(args.data, args.videos)
    model, tokenizer = load_policy(args.policy)
    settings = {
        "data_sha256": _sha256(args.data),
        "model": args.policy,
        "model_sha256": _sha256(os.path.join(args.policy, "model.safetensors")),
        "questions": len(questions),
        "temperature": 1.0,
        **{name: getattr(args, name) for name in ("k", "share", "max_new_tokens", "batch", "seed")},
    }
    done = _resume(f"{args.out}.samples", settings, args.batch)
    with open(f"{args.out}.samples", "a", encoding="utf-8") as file:
        for first in tqdm(range(len(done), len(questions), args.batch), "batches", leave=False):
            part = questions[first : first + args.batch]
            texts = sample(model, tokenizer, part, first, args.k, args.max_new_tokens, args.seed)
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts))
            file.flush()
            done += texts
    spreads = [spread([reward(text, q) for text in texts]) for q, texts in zip(questions, done, strict=True)]
    reasons = select(spreads, [task(q) for q in questions], args.k, args.share)
    counts = dict(sorted(Counter(reasons).items()))
    report = settings | {"counts": counts, "histograms": histogram(spreads, args.k)}
    with open(args.data, encoding="utf-8") as file:
        rows = [line for line in file if line.strip() and not line.startswith('{"selection"')]
    chosen = [row.rstrip("\n") for row, why in zip(rows, reasons, strict=True) if why.startswith("kept")]
    content = "\n".join([json.dumps({"selection": report}), *chosen]) + "\n"
    write_whole(args.out, content.encode())
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    run_script(main)
