"""Supervised training: the loss of answers to questions about videos, and pretrained policies taught by it."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from data import VIDEO_ID, collate_completions
from model import VideoLM


def answer_batch(rows: list[list], limit: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """rows: for each of P clips its (question ids, answer ids), of which at most `limit` are drawn.

    Returns ids (P, G, T) int64 and (P, G, T) bool, True where an answer's tokens are. The questions of a clip
    are its G completions, so its video is computed once for all of them.
    """
    flat, starts, G = [], [], min(limit, max(map(len, rows)))
    for pairs in rows:
        picked = rng.sample(pairs, min(G, len(pairs)))
        empty = G - len(picked)
        flat += [question + answer for question, answer in picked] + [[VIDEO_ID]] * empty
        starts += [len(question) for question, _ in picked] + [1] * empty
    ids, mask = collate_completions(flat)
    answer = mask & (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None])
    return ids.unflatten(0, (len(rows), G)), answer.unflatten(0, (len(rows), G))


def answer_loss(model: VideoLM, opening: list[int], video: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    """Mean next-token cross-entropy of the answers' tokens, scalar.

    opening: the ids before the video. video (P, N_video, D), ids (P, G, T), answer (P, G, T) bool.
    """
    ids, answer = ids.to(video.device), answer.to(video.device)
    prompt_ids = torch.tensor([*opening] + [VIDEO_ID] * video.shape[1], device=video.device)
    prompt_ids = prompt_ids.expand(len(video), -1)
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    prompt = model.embed_prompt(prompt_ids, prompt_mask, video)
    states = model.decoder(prompt, prompt_mask, model.decoder.embed_tokens(ids))
    return F.cross_entropy(states[answer] @ model.decoder.head.float().T, ids[answer])
