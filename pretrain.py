"""From nothing to `weights/`: draw the world, train CLIP on frames and captions, then fine-tune on a faulty
corpus.

    python pretrain.py [--out weights] [--seed N] [--stage all|clip|sft]

1. world   clips of scene seeds 0 .. num_clips - 1, written as mp4 files and read back like any video
2. clip    contrastive on (frame, caption) pairs; frozen afterwards, patch tokens computed once a clip
3. sft     adapter and decoder on question/answer pairs with the paper's curriculum: short answers first, then
long
"""

import itertools
import json
import os
import random
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import world
from cli import parse_args, run_script, write_json
from clip import Clip, ClipConfig, contrastive_loss, preprocess
from data import BOS_ID, EOS_ID, VIDEO_ID, Tokenizer, collate_completions, load_clips
from model import ModelConfig, VideoLM, load_model, save_model


@dataclass
class Config:
    out: str = "weights"  # folder of the result
    world_dir: str = "world/pretrain"  # folder of the drawn clips
    seed: int = 0
    stage: str = "all"  # all | clip | sft (takes CLIP from --out)
    num_clips: int = 10000  # clips of the fine-tuning corpus
    clip_steps: int = 1300  # optimiser steps of CLIP
    clip_batch: int = 128  # (frame, caption) pairs a step: 4 frames from each of clip_batch / 4 clips
    clip_lr: float = 1e-3
    align_steps: int = 1300  # optimiser steps on captions of frames and objects
    align_batch: int = 16  # clips a step, every frame with its caption; twice as many with their objects
    align_lr: float = 2e-3
    short_steps: int = 350  # optimiser steps on short answers
    long_steps: int = 350  # optimiser steps with the long ones
    sft_batch: int = 32  # clips a step, each with up to questions_per_clip questions
    questions_per_clip: int = 8
    sft_lr: float = 1e-3
    faults: bool = True  # False: the corpus without faults, to see what the model can perceive at best


def schedule(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up (the first step is not 0), then linear decay to 5 % of the peak."""
    return peak * min((step + 1) / warmup, max(0.05, 1 - step / total))


def optimizer_for(parameters, lr):
    parameters = list(parameters)
    matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train_clip(cfg: Config, clip: Clip, tokenizer: Tokenizer, frames, times, generator):
    """frames (C, K, 3, H, W) uint8 of scene seeds 0 .. C-1. Each batch holds as many hard negative captions
    as right ones. Prints how often an image finds its caption among them all."""
    scenes, rng = [world.make_scene(c) for c in range(len(frames))], random.Random(cfg.seed + 1)

    def encode(texts):
        ids, mask = collate_completions([tokenizer.encode(text) + [EOS_ID] for text in texts])
        assert ids.shape[1] <= clip.cfg.text_length, f"captions of {ids.shape[1]} tokens: raise text_length"
        return ids, mask.sum(dim=1)

    optimizer = optimizer_for(clip.parameters(), cfg.clip_lr)
    bar, hits, seen = tqdm(range(cfg.clip_steps), "clip"), 0.0, 0
    for step in bar:
        chosen = torch.randperm(len(frames), generator=generator)[: cfg.clip_batch // 4]
        which = torch.rand(len(chosen), frames.shape[1], generator=generator).argsort(dim=1)[:, :4]
        pixels = preprocess(frames[chosen[:, None], which].flatten(0, 1))
        pairs = [
            (scenes[c], times[c, k].item()) for c, ks in zip(chosen.tolist(), which, strict=True) for k in ks
        ]
        captions = [world.frame_caption(scene, t) for scene, t in pairs]
        wrong = [world.frame_caption(scene, t, rng) for scene, t in pairs]
        similarity = clip.similarity(pixels, *encode(captions + wrong))
        same = torch.tensor([[a == b for b in captions + wrong] for a in captions])
        loss = contrastive_loss(similarity, same)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, cfg.clip_steps, cfg.clip_lr)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        best = similarity.argmax(dim=1)
        hits, seen = hits + same[torch.arange(len(same)), best].float().mean().item(), seen + 1
        if (step + 1) % 100 == 0:
            found = f"retrieval among {same.shape[1]}: {hits / seen:.1%}"
            bar.write(f"clip step {step + 1}  loss {loss.item():.3f}  {found}")
            hits, seen = 0.0, 0


def train_align(cfg: Config, model: VideoLM, patches, times, tokenizer: Tokenizer, generator):
    """Alignment on captions, before any question: the adapter learns which colour, shape and place belong
    together (LLaVA and BLIP-2 begin so too). In turn: every frame's caption from that frame's video tokens
    alone, and what each object of a clip does, from all of them. Without faults. Adapter and decoder
    learn."""
    scenes = [world.make_scene(c) for c in range(len(patches))]
    frames_turn = itertools.cycle((True, False))

    def batch():
        size = cfg.align_batch if next(frames_turn) else 2 * cfg.align_batch
        chosen = torch.randperm(len(patches), generator=generator)[:size]
        video = model.adapter(patches[chosen].float(), times[chosen])  # (P, Q, D)
        if size > cfg.align_batch:
            rows = [[_row(tokenizer, q, a, True) for q, a in world.descriptions(scenes[c])] for c in chosen]
            return video, *sft_batch(rows, 3, random.Random(0))
        K, (P, Q, D) = times.shape[1], video.shape
        texts = [world.frame_caption(scenes[c], t) for c in chosen for t in times[c].tolist()]
        ids, mask = collate_completions([tokenizer.encode(text) + [EOS_ID] for text in texts])
        return video.view(P * K, Q // K, D), *(x.unsqueeze(1) for x in (ids, mask, mask))

    trainable = [*model.adapter.parameters(), *model.decoder.parameters()]
    train_decoder(cfg, model, batch, trainable, cfg.align_steps, cfg.align_lr, "align")


def _row(tokenizer, question, answer, is_long):
    return (
        tokenizer.encode(question),
        tokenizer.encode(answer) + [EOS_ID],
        is_long,
    )


def corpus(cfg: Config, tokenizer: Tokenizer, num_clips: int):
    """Per clip a list of (question ids, answer ids, is_long). The faults are drawn once: a corpus is a
    file."""
    rng, rows = random.Random(cfg.seed + 17), []
    for c in range(num_clips):
        scene = world.make_scene(c)
        asked = [
            (r["question"], world.corpus_answer(r, rng, cfg.faults), bool(r.get("span")))
            for r in world.make_questions(scene, f"clip{c:07d}.mp4")
        ]
        asked += [(question, answer, True) for question, answer in world.descriptions(scene)]
        rows.append([_row(tokenizer, *row) for row in asked])
    return rows


def sft_batch(rows: list[list], limit: int, rng: random.Random):
    """rows: the chosen clips' (question, answer, long) triples. Returns ids, mask and answer mask (P, G, T):
    the questions of a clip are its G completions, so the video is computed once for all of them."""
    flat, starts, G = [], [], min(limit, max(map(len, rows)))
    for triples in rows:
        picked = rng.sample(triples, min(G, len(triples)))
        flat += [q + a for q, a, _ in picked] + [[EOS_ID]] * (G - len(picked))
        starts += [len(q) for q, _, _ in picked] + [10**6] * (G - len(picked))
    ids, mask = collate_completions(flat)
    answer = mask & (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None])
    return [x.unflatten(0, (len(rows), G)) for x in (ids, mask, answer)]


def train_sft(cfg: Config, model: VideoLM, video_embeds, corpora, steps, name, generator):
    """Answers to questions; the decoder alone learns. corpora: lists of rows per clip; steps take them in
    turn, so a batch holds answers of like length. The questions of a clip share its video tokens."""
    rng, turn = random.Random(int(torch.randint(2**31, (1,), generator=generator))), itertools.cycle(corpora)

    def batch():
        rows = next(turn)
        chosen = torch.randperm(len(rows), generator=generator)[: cfg.sft_batch]
        return video_embeds[chosen], *sft_batch([rows[c] for c in chosen], cfg.questions_per_clip, rng)

    train_decoder(cfg, model, batch, [*model.decoder.parameters()], steps, cfg.sft_lr, name)


def train_decoder(cfg: Config, model: VideoLM, batch, trainable, steps: int, peak: float, name: str):
    """Next-token cross-entropy. batch() gives video tokens (P, N_video, D), ids and mask (P, G, T), and which
    tokens are to be predicted (P, G, T)."""
    model.requires_grad_(False)
    for p in trainable:
        p.requires_grad_(True)
    optimizer = optimizer_for(trainable, peak)
    bar, total, count, began = tqdm(range(steps), name), 0.0, 0, time.time()
    for step in bar:
        video, ids, _, answer = batch()
        prompt_ids = torch.tensor([BOS_ID] + [VIDEO_ID] * video.shape[1]).expand(len(video), -1)
        prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
        prompt = model.embed_prompt(prompt_ids, prompt_mask, video)
        states = model.decoder(prompt, prompt_mask, model.decoder.embed_tokens(ids))
        loss = F.cross_entropy(states[answer] @ model.decoder.head.T, ids[answer])
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, peak)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total, count = total + loss.item(), count + 1
        if (step + 1) % 50 == 0:
            pace = f"{(time.time() - began) / (step + 1):.2f} s a step"
            bar.write(f"{name} step {step + 1}  loss {total / count:.4f}  {pace}")
            total, count = 0.0, 0


@torch.no_grad()
def all_patch_tokens(model: VideoLM, frames, chunk: int = 128):
    """(C, K, N, clip width) float16 patch tokens of every clip: CLIP is frozen, so once is enough."""
    parts = [model.patch_tokens(frames[i : i + chunk]).half() for i in range(0, len(frames), chunk)]
    return torch.cat(parts)


@torch.no_grad()
def video_tokens(model: VideoLM, patches, times, chunk: int = 128):
    """(C, N_video, D) video tokens of every clip: after the alignment the adapter is frozen too, so that
    answers that ignore the video cannot teach it to."""
    starts = range(0, len(patches), chunk)
    return torch.cat([model.adapter(patches[i : i + chunk].float(), times[i : i + chunk]) for i in starts])


def main():
    cfg = parse_args(Config)
    began, seconds = time.time(), {}

    def lap(name):
        seconds[name] = round(time.time() - began - sum(seconds.values()), 1)

    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    tokenizer = Tokenizer(world.vocabulary())
    vocab_size = -(-tokenizer.vocab_size // 8) * 8
    model = VideoLM(ModelConfig(vocab_size=vocab_size), ClipConfig(vocab_size=vocab_size))
    world.make_world(cfg.world_dir, range(cfg.num_clips))
    paths = [os.path.join(cfg.world_dir, f"clip{c:07d}.mp4") for c in range(cfg.num_clips)]
    frames, times = load_clips(paths, model.cfg.num_frames, model.clip_cfg.image_size)
    lap("world")
    if cfg.stage == "sft":
        model.clip.load_state_dict(load_model(cfg.out).clip.state_dict())
    else:
        model.clip.requires_grad_(True)
        train_clip(cfg, model.clip, tokenizer, frames, times, generator)
        model.clip.requires_grad_(False)
        lap("clip")
    save_model(model, cfg.out)
    if cfg.stage != "clip":
        patches = all_patch_tokens(model, frames)
        train_align(cfg, model, patches, times, tokenizer, generator)
        save_model(model, cfg.out)
        lap("align")
        rows = corpus(cfg, tokenizer, cfg.num_clips)
        short, long = (
            [[row for row in clip if row[2] == is_long] for clip in rows] for is_long in (False, True)
        )
        embeds = video_tokens(model, patches, times)
        train_sft(cfg, model, embeds, [short], cfg.short_steps, "short", generator)
        train_sft(cfg, model, embeds, [long, short], cfg.long_steps, "long", generator)
        lap("sft")
    save_model(model, cfg.out)
    tokenizer.save(os.path.join(cfg.out, "tokenizer.json"))
    made = {
        "command": " ".join(["python", *sys.argv]),
        "seed": cfg.seed,
        "seconds": seconds,
        "torch": torch.__version__,
    }
    write_json(os.path.join(cfg.out, "made.json"), made | {"cpus": os.cpu_count(), "faults": cfg.faults})
    print(json.dumps(made))


if __name__ == "__main__":
    run_script(main)
