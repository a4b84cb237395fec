"""Preference pairs, and the training of the ranker on them (Bradley and Terry, 1952):
P(a is preferred to b) = sigmoid(score_a - score_b). Started by python pretrain.py --stage ranker.
"""

import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.policies import load_model
from checkpoints.word_tokenizer import WordTokenizer
from data import embed_videos
from oracles.ranker import Ranker, load_ranker, save_ranker
from plumbing.fitting import fit, unfrozen
from plumbing.machine import pick_device
from plumbing.options import BadInput, Bounds, Count, Options, Positive, Share, read_jsonl, write_json
from videoqa import world
from videoqa.answers import Question, grade, prompt_text
from videoqa.questions import is_below, is_text, load_questions

FIELDS = ("video", "question", "chosen", "rejected")
FIRST_SCENE = 3_000_000  # seed of the first scene of the ranker's clips: nothing else has seen them


@dataclass
class RankerOptions(Options):
    """The trained oracle: --stage ranker"""

    ranker_clips: Annotated[int, Bounds(2, 10**9)] = 2500  # of the world's pairs, which nothing else saw
    error_rate: Share = 0.1  # share of the world's pairs whose worse answer is the chosen one
    pairs_per_question: Count = 3
    pairs: str = ""  # JSONL of {"video", "question", "chosen", "rejected"} instead of the world's pairs
    held_share: Share = 0.1  # share of the videos held out, to measure on (also of --stage bridge, sft)
    ranker_steps: Count = 400  # optimizer steps on pairs
    ranker_batch: Count = 32  # videos a step, each with up to pairs_per_video pairs
    pairs_per_video: Count = 8
    ranker_lr: Positive = 1e-3


@dataclass(frozen=True)
class Pair:
    """Two answers to one question, of which somebody preferred one."""

    video: str  # path of the file
    question: str
    chosen: str
    rejected: str
    truth: int | None = None  # 1: the choice is right, -1: wrong, 0: both are equally good, None: not known


def load_pairs(path: str, videos_dir: str) -> list[Pair]:
    """From lines {"video", "question", "chosen", "rejected"}. BadInput names file and line."""
    wants, pairs = f"each line is {{{', '.join(FIELDS)}}}, texts of which only rejected may be empty", []
    for where, row in read_jsonl(path, wants):
        texts = [row.get(name) for name in FIELDS]
        if not (all(map(is_text, texts[:3])) and isinstance(texts[3], str)):
            raise BadInput(f"{where}: a field is missing, empty or no text; {wants}")
        video, question, chosen, rejected = (text.strip() for text in texts)
        if chosen == rejected:
            raise BadInput(f"{where}: chosen and rejected are the same; leave it out")
        if not is_below(video):
            raise BadInput(f"{where}: video {video!r} is not below --videos; name a folder above it there")
        pairs.append(Pair(os.path.join(videos_dir, video), question, chosen, rejected))
    if len({pair.video for pair in pairs}) < 2:
        raise BadInput(f"{path}: pairs of at least 2 videos are needed, one of them to be held out; add some")
    return pairs


def draw_pairs(questions: list[Question], per_question: int, error_rate: float, seed: int) -> list[Pair]:
    """Pairs from the embedded world, where `answers.grade` knows which answer is better.

    The choice is wrong with probability error_rate. Of two equally good answers either is chosen, as by
    people who must choose: this teaches equal scores for equally wrong answers. Some answers are true of the
    video but not what was asked: a ranker that never saw such is soon led to prefer them.
    """
    rng, pairs = random.Random(seed), []
    of_category, of_video = defaultdict(list), defaultdict(list)  # right answers
    for question in questions:
        of_category[question.category].append(question.answer)
        of_video[question.video].append(question.answer)

    def other(question):
        vague = [*world.LOOSE_ANSWERS[question.category], world.USUAL_ANSWER.get(question.category, "")]
        alike = of_category[question.category]
        draw, text = rng.random(), rng.choice(alike)
        if draw < 0.45:
            return rng.choice(vague if draw < 0.2 else of_video[question.video])
        return f"{text} {rng.choice(alike)}" if draw < 0.55 else text  # says two things

    for question in questions:
        for _ in range(per_question):
            one = question.answer if rng.random() < 0.8 else other(question)
            two = other(question)
            if one == two:
                continue
            better = grade(one, question) - grade(two, question)
            wrong = rng.random() < (error_rate if better else 0.5)
            chosen, rejected = (one, two) if (better >= 0) != wrong else (two, one)
            truth = 0 if not better else -1 if wrong else 1
            pairs.append(Pair(question.video, prompt_text(question), chosen, rejected, truth))
    return pairs


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log P(chosen is preferred) of scores of any one shape, elementwise."""
    return -F.logsigmoid(chosen - rejected)


def pair_report(difference: Tensor, truth: list[int | None]) -> dict:
    """How good the scores are on held-out pairs. difference (n,): score of the chosen less the rejected.

    accuracy: share of pairs whose chosen answer scores higher (a tie is half). true_accuracy: the same
    against the truth where it is known and not a tie. calibration_error: of P(more likely one is preferred),
    in ten bins from 0.5 to 1, the mean distance to the share that was, weighted by the bins' sizes.
    """
    right = (difference > 0).double() + 0.5 * (difference == 0)
    report = {"pairs": len(truth), "accuracy": right.mean().item()}
    signs = torch.tensor([t or 0 for t in truth])
    if (signs != 0).any():
        truly = (difference * signs)[signs != 0]
        report["true_accuracy"] = ((truly > 0).double() + 0.5 * (truly == 0)).mean().item()
    sure = torch.sigmoid(difference.double().abs())
    place = ((sure - 0.5) * 20).long().clamp(max=9)
    bins = [(sure[place == i], right[place == i]) for i in range(10) if (place == i).any()]
    report["nll"] = bradley_terry(difference, torch.zeros_like(difference)).mean().item()
    report["calibration_error"] = sum(abs(s.sum() - r.sum()).item() for s, r in bins) / len(truth)
    # Each bin: what was predicted, what came, of how many pairs
    report["bins"] = [[round(s.mean().item(), 3), round(r.mean().item(), 3), len(s)] for s, r in bins]
    return report


def score_pairs(ranker: Ranker, embeds: Tensor, pairs: list[list[Pair]]) -> Tensor:
    """Of P videos, embeds (P, N_video, D), R pairs each -> scores (P, R, 2), the preferred answer's first."""
    rows = [[(p.question, text) for p in own for text in (p.chosen, p.rejected)] for own in pairs]
    return ranker(embeds, rows).unflatten(1, (-1, 2))


def pairs_to_learn(cfg) -> list[Pair]:
    """The pairs of --pairs, or the embedded world's."""
    if cfg.pairs:
        return load_pairs(cfg.pairs, cfg.videos)
    folder = f"{cfg.world_dir}_ranker"
    scenes = range(FIRST_SCENE, FIRST_SCENE + cfg.ranker_clips)
    path = world.make_world(folder, scenes, hard=cfg.world == "hard")
    return draw_pairs(load_questions(path, folder), cfg.pairs_per_question, cfg.error_rate, cfg.seed)


def train_ranker(cfg) -> dict:
    """The decoder of the model in --out learns, with a scalar head, to score preferred answers higher; CLIP
    and bridge stay frozen. cfg: pretrain.py's options.

    Writes ranker/ into --out. Returns the report on held-out pairs, of the file as it is read again.
    """
    began, rng, generator = time.time(), random.Random(cfg.seed), torch.Generator().manual_seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    if not os.path.exists(os.path.join(cfg.out, "config.json")):
        remedy = f"copy one: cp -r weights {cfg.out}"
        raise BadInput(f"--out {cfg.out}: the ranker starts from a policy that is there already; {remedy}")
    model = load_model(cfg.out, device)
    tokenizer = WordTokenizer.load(os.path.join(cfg.out, "tokenizer.json"), model.cfg.vocab_size)
    pairs = pairs_to_learn(cfg)
    videos = sorted({pair.video for pair in pairs})
    embeds, _ = embed_videos(model, [(video,) for video in videos])
    video_of = {video: i for i, video in enumerate(videos)}
    order = torch.randperm(len(videos), generator=generator).tolist()
    num_held = min(max(round(cfg.held_share * len(videos)), 1), len(videos) - 1)
    held, learned = {videos[i] for i in order[:num_held]}, order[num_held:]
    of_video = [[] for _ in videos]
    for pair in pairs:
        of_video[video_of[pair.video]].append(pair)
    R = min(cfg.pairs_per_video, max(len(of_video[i]) for i in learned))
    scorer = Ranker(model, tokenizer).to(device)

    def batch_loss():
        chosen = torch.randperm(len(learned), generator=generator)[: cfg.ranker_batch]
        chosen = [learned[i] for i in chosen]
        picked = [(rng.sample if len(of_video[i]) >= R else rng.choices)(of_video[i], k=R) for i in chosen]
        scores = score_pairs(scorer, embeds[chosen], picked)
        return bradley_terry(scores[..., 0], scores[..., 1]).mean(), {}

    parameters = unfrozen(model.decoder, scorer.head)
    fit("ranker", batch_loss, parameters, steps=cfg.ranker_steps, cfg=cfg, rate="ranker_lr")
    save_ranker(scorer, cfg.out)
    tested = [pair for pair in pairs if pair.video in held]
    scorer = load_ranker(os.path.join(cfg.out, "ranker"), device)
    scores = []
    for i in range(0, len(tested), 256):
        part = tested[i : i + 256]
        of_part = embeds[[video_of[pair.video] for pair in part]]
        scores.append(score_pairs(scorer, of_part, [[pair] for pair in part]).flatten(1).cpu())
    chosen, rejected = torch.cat(scores).unbind(dim=1)
    report = pair_report(chosen - rejected, [pair.truth for pair in tested])
    report |= {"trained_on": len(pairs) - len(tested), "error_rate": None if cfg.pairs else cfg.error_rate}
    report |= {"seconds": round(time.time() - began, 1), "command": " ".join(["python", *sys.argv])}
    write_json(os.path.join(cfg.out, "ranker", "made.json"), report)
    return report
