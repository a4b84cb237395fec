"""Variance-aware data selection (Temporal-R1, arXiv:2506.01908): keep the questions whose answers disagree.

    python selection.py DATA.jsonl --videos DIR --k 8 --out SELECTED.jsonl

The policy answers each question k times at temperature 1; only the raw reward of the task counts. The paper
published neither rule nor thresholds, so these are ours: a question is kept if 0 < right < k; a question that
asks for a span, if its IoUs differ; a question that asks for both, if either holds. `--share X` keeps fewer:
of the n questions of each task at most round(X * n), those whose answers disagree most. Line 1 of
SELECTED.jsonl is the report: settings, counts, histograms; all readers of questions skip it.

The answers are kept in SELECTED.jsonl.samples, their settings beside them: a killed selection continues from
them, and another --share needs no new ones. The same settings give the same file, byte for byte.
"""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import pstdev
from typing import Annotated, Literal

import torch

from checkpoints.policies import PolicyOptions, data_of, load_policy, policy_of
from data import PromptSet
from plumbing.machine import MachineOptions, pick_device, set_up, show_progress
from plumbing.options import (
    ArgumentParser,
    BadInput,
    Bounds,
    Count,
    PositiveShare,
    add_options,
    json_lines,
    read_jsonl,
    refuse_same,
    run_script,
    write_whole,
)
from plumbing.run_folder import Kept
from rollout import Sampling, answer
from videoqa.answers import Reward, reward, task
from videoqa.questions import load_questions

FLAT = 1e-6  # a std below this is rounding noise: all overlaps are the same
STD_BINS = 10  # of width 0.05: the std of values in [0, 1] is at most 0.5


@dataclass
class Config(PolicyOptions):
    """The selection"""

    videos: str = ""  # the folder that the questions' video paths are relative to
    out: str = ""  # the JSONL file to write
    k: Annotated[int, Bounds(2, 10**9)] = 8  # answers to each question
    share: PositiveShare = 1.0  # of n questions of a task at most round(share * n) are kept
    max_new_tokens: Count = 10  # tokens of an answer at most
    batch: Count = 64  # questions answered together
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        for name, wanted in {"videos": "a folder", "out": "a JSONL file"}.items():
            if not getattr(self, name):
                raise BadInput(f"--{name} is missing; give {wanted}")


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


def sample(policy, tokenizer, questions: list, first: int, cfg: Config) -> list[list[str]]:
    """k answers to each of these questions, of which the first is number `first` of the file. Every question
    draws from its own generator, so that its answers do not depend on the batch."""
    seeds = [cfg.seed * 1_000_003 + first + i for i in range(len(questions))]
    shape, generator = (cfg.k, cfg.max_new_tokens), torch.Generator()
    uniforms = [torch.rand(shape, generator=generator.manual_seed(seed)) for seed in seeds]
    prompts, rows = PromptSet(policy, tokenizer, questions), torch.arange(len(questions))
    sampling = Sampling.of(policy, tokenizer, max_new_tokens=cfg.max_new_tokens)
    return answer(policy, prompts, rows, cfg.k, sampling, torch.stack(uniforms))[1]


def answers_of(policy, tokenizer, questions: list, kept: Kept, cfg: Config) -> list[list[str]]:
    """k answers to each question, those of `kept` not asked for again. A batch cut in two by a kill is
    answered whole again: its other rows could change the last bits of a question's log-probabilities."""
    known = {name: row["answers"] for name, row in kept.of.items() if len(row["answers"]) == cfg.k}
    for first in show_progress(range(0, len(questions), cfg.batch), "answering"):
        batch = questions[first : first + cfg.batch]
        if all(question.id in known for question in batch):
            continue
        texts = sample(policy, tokenizer, batch, first, cfg)
        new = {question.id: row for question, row in zip(batch, texts, strict=True)}
        kept.add([{"id": name, "answers": row} for name, row in new.items() if name not in known])
        known |= new
    return [known[question.id] for question in questions]


def histogram(spreads: list[dict], k: int) -> dict:
    """Numbers of questions by right answers (0..k), and by std of IoU in bins of width 0.05."""
    right = Counter(s["right"] for s in spreads)
    stds = [s["iou_std"] for s in spreads if s["iou_std"] is not None]
    bins = Counter(min(int(std * 2 * STD_BINS), STD_BINS - 1) for std in stds)
    return {
        "right": [right[c] for c in range(k + 1)] if len(right) > (None in right) else [],
        "iou_std": [bins[i] for i in range(STD_BINS)] if stds else [],
    }


def settings_of(cfg: Config, questions: list, dtype: torch.dtype) -> dict:
    """All that decides the answers. Answers of other settings are not continued."""
    sampled = {"temperature": 1.0, "k": cfg.k, "max_new_tokens": cfg.max_new_tokens, "batch": cfg.batch}
    made = data_of(questions) | policy_of(cfg) | {"dtype": str(dtype), "questions": len(questions)}
    return made | sampled


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data", help="questions, one JSON object a line")
    add_options(parser, Config)
    given = vars(parser.parse_args())
    data = given.pop("data")
    cfg = Config(**given)
    written = cfg.out, f"{cfg.out}.samples"
    for path in written:
        refuse_same(path, data)
    questions, device = load_questions(data, cfg.videos), pick_device(cfg.device)
    for path in written:
        refuse_same(path, *{question.video for question in questions})
    policy, tokenizer = load_policy(cfg, device)
    dtype = "float32" if device == "cpu" else "bfloat16"
    set_up(policy.decoder, MachineOptions(dtype=dtype))
    settings = settings_of(cfg, questions, policy.decoder.compute_dtype)
    kept = Kept(f"{cfg.out}.samples", {"answers": list[str]}, settings=settings)
    texts = answers_of(policy, tokenizer, questions, kept, cfg)
    spreads = [spread([reward(text, q) for text in row]) for q, row in zip(questions, texts, strict=True)]
    reasons = select(spreads, [task(q) for q in questions], cfg.k, cfg.share, cfg.seed)
    counts = dict(sorted(Counter(reasons).items()))
    report = settings | {"share": cfg.share, "counts": counts, "histograms": histogram(spreads, cfg.k)}
    rows = [row for _, row in read_jsonl(data, "give questions as JSONL") if row.keys() != {"selection"}]
    rows = [row for row, why in zip(rows, reasons, strict=True) if why.startswith("kept")]
    write_whole(cfg.out, json_lines([{"selection": report}, *rows]).encode())
    print(f"{cfg.out}: {len(rows)} of {len(questions)} questions, each answered {cfg.k} times")
    for why, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        print(f"{count:8} {why}")
    return 0


if __name__ == "__main__":
    run_script(main)
