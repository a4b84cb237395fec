"""The three stages that make the small model of the embedded world, weights/: clip, align, sft.

Started by pretrain.py, which says what each learns, and in which order. cfg is pretrain.py's options.
"""

import itertools
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import torch

from checkpoints.policies import load_model, model_digest, save_model
from checkpoints.supervised import answer_batch, answer_loss
from checkpoints.word_tokenizer import WordTokenizer
from clip import Clip, ClipConfig, contrastive_loss, preprocess
from data import BOS_ID, EOS_ID, collate_completions, load_clips
from model import ModelConfig, VideoLM
from plumbing.fitting import fit, unfrozen
from plumbing.machine import pick_device
from plumbing.options import (
    LEFT,
    BadInput,
    Bounds,
    Count,
    Options,
    Positive,
    is_kind,
    read_json,
    remove,
    write_json,
)
from videoqa import world

ANOTHER_OUT = "name another folder with --out"


@dataclass
class WorldOptions(Options):
    """The small model of the embedded world: clip, align, sft"""

    num_clips: Count = 10000  # clips of the fine-tuning corpus
    clip_steps: Count = 1300  # optimizer steps of CLIP
    clip_batch: Annotated[int, Bounds(4, 10**9)] = 128  # frames with captions a step, 4 of a clip
    clip_lr: Positive = 1e-3
    caption_steps: Count = 1200  # optimizer steps on captions of frames
    caption_batch: Count = 16  # clips a step, every frame with its caption
    annotation_steps: Count = 3000  # optimizer steps on annotations of clips
    annotation_batch: Count = 32  # clips a step, each with up to annotations_per_clip of them
    annotations_per_clip: Count = 10
    align_lr: Positive = 2e-3
    short_steps: Count = 350  # optimizer steps on short answers
    long_steps: Count = 350  # optimizer steps on long and short answers in turn
    sft_batch: Count = 32  # clips a step, each with up to questions_per_clip questions
    sft_lr: Positive = 1e-3
    faults: bool = True  # False: a corpus without faults, to see how much the model can perceive at best


def train_clip(cfg, clip: Clip, tokenizer: WordTokenizer, frames, times, generator):
    """frames (C, K, 3, H, W) uint8 of scene seeds 0 .. C-1, times (C, K) seconds. Half of the captions in a
    batch are hard negatives. Reports retrieval: the share of frames that find their caption among all."""
    scenes = [world.make_scene(c, cfg.world == "hard") for c in range(len(frames))]
    rng, device = random.Random(cfg.seed + 1), clip.logit_scale.device

    def encode(texts):
        ids, mask = collate_completions([tokenizer.encode(text) + [EOS_ID] for text in texts])
        if ids.shape[1] > clip.cfg.text_length:
            raise BadInput(f"captions of {ids.shape[1]} tokens: raise text_length in clip.py's ClipConfig")
        return ids.to(device), mask.sum(dim=1).to(device)

    def batch_loss():
        chosen = torch.randperm(len(frames), generator=generator)[: cfg.clip_batch // 4]
        which = torch.rand(len(chosen), frames.shape[1], generator=generator).argsort(dim=1)[:, :4]
        pixels = preprocess(frames[chosen[:, None], which].flatten(0, 1).to(device))
        moments = [(c, k) for c, ks in zip(chosen.tolist(), which.tolist(), strict=True) for k in ks]
        shown = [(scenes[c], times[c, k].item()) for c, k in moments]
        captions = [world.frame_caption(scene, t) for scene, t in shown]
        wrong = [world.frame_caption(scene, t, rng) for scene, t in shown]
        ids, lengths = encode(captions + wrong)
        similarity = clip.similarity(pixels, ids, lengths)
        same = torch.tensor([[a == b for b in captions + wrong] for a in captions], device=device)
        found = same.gather(1, similarity.argmax(dim=1)[:, None]).float().mean()
        return contrastive_loss(similarity, same), {"retrieval": found.item()}

    fit("clip", batch_loss, clip.parameters(), steps=cfg.clip_steps, cfg=cfg, rate="clip_lr")


def train_align(cfg, model: VideoLM, patches, times, tokenizer: WordTokenizer, generator):
    """Bridge and decoder learn to describe, before any question is asked (as LLaVA and BLIP-2 begin).

    patches (C, K, N, clip width), times (C, K) seconds. Captions of single frames, predicted from only the
    video tokens of that frame, come first: they teach which colour, kind, place and movement belong together
    far sooner than annotations of whole clips do. Neither has faults.
    """
    scenes = [world.make_scene(c, cfg.world == "hard") for c in range(len(patches))]
    rows = [token_pairs(tokenizer, world.annotations(scene)) for scene in scenes]
    rng, actions = random.Random(cfg.seed), model.bridge.kind == "qformer"  # only it compares frames

    def captions():
        chosen = torch.randperm(len(patches), generator=generator)[: cfg.caption_batch]
        video = model.bridge(patches[chosen].float(), times[chosen])  # (P, N_video, D)
        moments = [(scenes[c], t) for c in chosen for t in times[c].tolist()]
        texts = [world.frame_caption(scene, t, actions=actions) for scene, t in moments]
        ids, mask = collate_completions([tokenizer.encode(text) + [EOS_ID] for text in texts])
        video = model.bridge.frame_tokens(video)  # (P * K, tokens of a frame, D)
        return answer_loss(model, [BOS_ID], video, ids.unsqueeze(1), mask.unsqueeze(1)), {}

    def annotations():
        chosen = torch.randperm(len(patches), generator=generator)[: cfg.annotation_batch]
        video = model.bridge(patches[chosen].float(), times[chosen])
        ids, answer = answer_batch([rows[c] for c in chosen], cfg.annotations_per_clip, rng)
        return answer_loss(model, [BOS_ID], video, ids, answer), {}

    parameters = unfrozen(model.bridge, model.decoder)
    fit("captions", captions, parameters, steps=cfg.caption_steps, cfg=cfg, rate="align_lr")
    fit("annotations", annotations, parameters, steps=cfg.annotation_steps, cfg=cfg, rate="align_lr")


def token_pairs(tokenizer: WordTokenizer, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(question ids, answer ids) of questions with their answers."""
    return [(tokenizer.encode(question), tokenizer.encode(answer) + [EOS_ID]) for question, answer in texts]


def corpus(cfg, tokenizer: WordTokenizer):
    """(short, long): for each clip a list of (question ids, answer ids). Faults are drawn once, as in a file.
    Long answers are spans and descriptions."""
    rng, short, long = random.Random(cfg.seed + 17), [], []
    for c in range(cfg.num_clips):
        scene = world.make_scene(c, cfg.world == "hard")
        ask = world.hard_questions if cfg.world == "hard" else world.make_questions
        brief, lengthy = [], []
        for row in ask(scene, world.clip_name(c, cfg.world == "hard")):
            answer = world.corpus_answer(row, rng, cfg.faults)
            (lengthy if row.get("span") else brief).append((row["question"], answer))
        short.append(token_pairs(tokenizer, brief))
        long.append(token_pairs(tokenizer, [*lengthy, *world.descriptions(scene)]))
    return short, long


def train_sft(cfg, model: VideoLM, video_embeds, tokenizer: WordTokenizer, generator):
    """The decoder learns answers; video_embeds (C, N_video, D) are fixed. The questions of a clip share its
    video tokens. In the second half batches of long and short answers take turns, so that a batch holds
    answers of similar length."""
    short, long = corpus(cfg, tokenizer)
    parts = {"short": ([short], cfg.short_steps), "long": ([long, short], cfg.long_steps)}
    for name, (corpora, steps) in parts.items():
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        turn = itertools.cycle(corpora)

        def batch_loss(turn=turn, rng=rng):
            rows = next(turn)
            chosen = torch.randperm(len(rows), generator=generator)[: cfg.sft_batch]
            ids, answer = answer_batch([rows[c] for c in chosen], cfg.questions_per_clip, rng)
            return answer_loss(model, [BOS_ID], video_embeds[chosen], ids, answer), {}

        fit(name, batch_loss, unfrozen(model.decoder), steps=steps, cfg=cfg, rate="sft_lr")


def run_stage(stage: str, cfg, tokenizer: WordTokenizer, frames, times) -> VideoLM:
    """The model after one stage; every stage but the first starts from the model in --out."""
    torch.manual_seed(cfg.seed)
    generator, device = torch.Generator().manual_seed(cfg.seed), pick_device(cfg.device)
    if stage == "clip":
        vocab_size, bridge = -(-tokenizer.vocab_size // 8) * 8, cfg.video_tokens.replace("auto", "qformer")
        model = VideoLM(ModelConfig(vocab_size, bridge=bridge), ClipConfig(vocab_size=vocab_size)).to(device)
        train_clip(cfg, model.clip.requires_grad_(True), tokenizer, frames, times, generator)
        return model
    model, times = load_model(cfg.out, device), times.to(device)
    patches = torch.cat([model.patch_tokens(part.to(device)).half() for part in frames.split(128)])
    if stage == "align":
        train_align(cfg, model, patches, times, tokenizer, generator)
        return model
    # The bridge is frozen now, so that answers which ignore the video cannot teach it to ignore the video
    parts = zip(patches.split(128), times.split(128), strict=True)
    with torch.no_grad():
        embeds = torch.cat([model.bridge(part.float(), seconds) for part, seconds in parts])
    train_sft(cfg, model, embeds, tokenizer, generator)
    return model


def folder_tokenizer(cfg) -> WordTokenizer:
    """The tokenizer of --out, the world's new words after its old ones, so that no id changes its word; of
    a folder without one, the world's words. Raises BadInput if a later stage finds no tokenizer, or more
    words than the model has embeddings for."""
    path, begins = os.path.join(cfg.out, "tokenizer.json"), cfg.stage in ("all", "clip")
    known = WordTokenizer.load(path).words if os.path.exists(path) or not begins else []
    tokenizer = WordTokenizer([*dict.fromkeys(known + world.vocabulary())])
    if not begins and tokenizer.vocab_size > (rows := load_model(cfg.out).cfg.vocab_size):
        raise BadInput(
            f"{path}: with the world's new words {tokenizer.vocab_size} tokens, but the model has {rows}"
            " embeddings; make all weights anew: python pretrain.py --out ANOTHER_FOLDER"
        )
    return tokenizer


def check_out(cfg):
    """Raises BadInput for an --out that holds something else than what the stages write."""
    names = os.listdir(cfg.out) if os.path.lexists(cfg.out) else []
    if "config.json" in names:
        ours = {"model", "clip"} <= read_json(os.path.join(cfg.out, "config.json"), ANOTHER_OUT).keys()
    else:
        first = ("tokenizer.json", "made.json", "saving.json")
        ours = all(name in first or LEFT.fullmatch(name) for name in names)
    if not ours:
        raise BadInput(f"--out {cfg.out}: holds something else than pretrain.py's weights; {ANOTHER_OUT}")


def save_stage(model, tokenizer, made: dict, folder: str):
    """The model appears in one rename; saving.json tells a kill before it from one after it."""
    record, saving = (os.path.join(folder, name) for name in ("made.json", "saving.json"))
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    write_json(saving, {"from": model_digest(folder), "made": made})
    save_model(model, folder)
    write_json(record, made)
    remove(saving)


def finish_save(folder: str) -> bool:
    """Whether a save had been killed after the model's rename; its record is written now."""
    path = os.path.join(folder, "saving.json")
    saving = read_json(path, f"remove it, or {ANOTHER_OUT}", optional=True)
    renamed = bool(saving) and saving.get("from") != model_digest(folder)
    if renamed:
        write_json(os.path.join(folder, "made.json"), saving.get("made"))
    remove(path)
    return renamed


def train_world(cfg) -> None:
    """All three stages, or the one that --stage names, with the options of pretrain.py. Writes --out."""
    check_out(cfg)
    finished = finish_save(cfg.out)
    tokenizer, began = folder_tokenizer(cfg), time.time()
    hard, scenes = cfg.world == "hard", range(cfg.num_clips)
    world.make_world(cfg.world_dir, scenes, hard=hard)
    shown = [(os.path.join(cfg.world_dir, world.clip_name(seed, hard)),) for seed in scenes]
    frames, times = load_clips(shown, ModelConfig.num_frames, ClipConfig.image_size)
    record, made = os.path.join(cfg.out, "made.json"), {"seconds": {}, "commands": []}
    if cfg.stage not in ("all", "clip") and os.path.exists(record):
        wants = "remove it, it only tells how the weights were made"
        made |= read_json(record, wants)
        if not (is_kind(made["commands"], list[str]) and is_kind(made["seconds"], dict)):
            raise BadInput(f"{record}: 'seconds' or 'commands' is damaged; {wants}")
    command = " ".join(["python", *sys.argv])
    if finished and cfg.stage != "all" and made["commands"][-1:] == [command]:
        print(f"{cfg.out}: {cfg.stage} was killed as it ended; nothing is left to be trained")
        return
    made |= {"seed": cfg.seed, "faults": cfg.faults, "torch": torch.__version__, "cpus": os.cpu_count()}
    made["commands"].append(command)
    made["seconds"].setdefault("world", round(time.time() - began, 1))
    for stage in ("clip", "align", "sft") if cfg.stage == "all" else (cfg.stage,):
        began = time.time()
        model = run_stage(stage, cfg, tokenizer, frames, times)
        made["seconds"][stage] = round(time.time() - began, 1)
        save_stage(model, tokenizer, made, cfg.out)
    print(json.dumps(made))
