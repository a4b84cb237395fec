"""From nothing to `weights/`: draw the world, train CLIP on frames and captions, align, then
fine-tune on a faulty corpus.

    python pretrain.py [--out weights] [--seed N] [--stage all|clip|align|sft]
    python pretrain.py --stage ranker [--pairs FILE.jsonl --videos DIR]     # an oracle, from the weights
    python pretrain.py --stage bridge --policy LLAMA_DIR --clip CLIP_DIR [--data FILE.jsonl --videos DIR]

1. clip    contrastive on (frame, caption) pairs; frozen afterwards, patch tokens computed once a clip
2. align   bridge and decoder: first captions of every frame from that frame's video tokens alone, then
           annotations of the whole clip, an attribute each; the bridge is frozen afterwards
3. sft     the decoder on questions and answers, with the paper's curriculum: short answers first, then long
   ranker  the trained oracle (ranker.py), on preference pairs: the decoder again, and a scalar head
   bridge what stands between a pretrained decoder and CLIP (policies.py), alone, on questions and answers

A stage starts from the files that the one before left in --out and from a seed of its own, so the stages one
by one give what `all` gives. The clips are those of scene seeds 0 .. num_clips - 1, real mp4 files.
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

from checkpoints.policies import load_model, load_policy, save_bridge, save_model
from clip import Clip, ClipConfig, contrastive_loss, preprocess
from data import BOS_ID, EOS_ID, VIDEO_ID, Tokenizer, collate_completions, load_clips, load_questions
from model import Bridge, ModelConfig, VideoLM
from oracles import ranker
from plumbing.machine import pick_device
from plumbing.options import BadInput, parse_args, run_script, write_json
from videoqa import world
from videoqa.answers import prompt_text


@dataclass
class Config:
    out: str = "weights"  # folder of the result
    world_dir: str = "world/pretrain"  # folder of the drawn clips
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    stage: str = "all"  # all | clip | align | sft | ranker; all but clip go on from what is in --out; bridge
    num_clips: int = 10000  # clips of the fine-tuning corpus
    clip_steps: int = 1300  # optimiser steps of CLIP
    clip_batch: int = 128  # (frame, caption) pairs a step: 4 frames from each of clip_batch / 4 clips
    clip_lr: float = 1e-3
    caption_steps: int = 1200  # optimiser steps on captions of frames ...
    caption_batch: int = 16  # ... clips a step, every frame with its caption
    annotation_steps: int = 3000  # optimiser steps on annotations of clips ...
    annotation_batch: int = 32  # ... clips a step, each with up to annotations_per_clip of them
    annotations_per_clip: int = 10
    align_lr: float = 2e-3
    short_steps: int = 350  # optimiser steps on short answers
    long_steps: int = 350  # optimiser steps with the long ones
    sft_batch: int = 32  # clips a step, each with up to questions_per_clip questions
    questions_per_clip: int = 8
    sft_lr: float = 1e-3
    ranker_clips: int = 2500  # clips of the world's pairs, of scenes that nothing else has seen
    error_rate: float = 0.1  # share of the world's pairs whose worse answer is the chosen one
    pairs_per_question: int = 3
    pairs: str = ""  # JSONL of {"video", "question", "chosen", "rejected"} instead of the world's pairs
    videos: str = ""  # folder that its video paths are relative to
    held_share: float = 0.1  # share of the videos whose pairs measure the ranker
    ranker_steps: int = 400  # optimiser steps on pairs
    ranker_batch: int = 32  # videos a step, each with up to pairs_per_video pairs
    pairs_per_video: int = 8
    ranker_lr: float = 1e-3
    policy: str = ""  # bridge: folder of a text decoder or LLaVA-1.5, which also gets the result
    clip: str = ""  # bridge: folder or file of the text decoder's CLIP
    template: str = "vicuna_v1"  # bridge: conversation
    video_tokens: str = "qformer"  # bridge: qformer, or a text decoder's pooled | patches
    num_frames: int = 50  # bridge: K
    base: str = "bfloat16"  # bridge: how the frozen decoder is held, float32 | bfloat16 | nf4
    data: str = ""  # bridge: JSONL of questions and answers; empty: the embedded world's
    bridge_steps: int = 1000  # optimiser steps
    bridge_batch: int = 8  # videos a step, each with up to questions_per_clip questions
    bridge_lr: float = 1e-4
    faults: bool = True  # False: the corpus without faults, to see what the model can perceive at best

    def __post_init__(self):
        if self.stage not in ("all", *STAGES, "ranker", "bridge"):
            raise BadInput(f"--stage {self.stage}: choose one of all, {', '.join(STAGES)}, ranker, bridge")
        file = "data" if self.stage == "bridge" else "pairs"
        if bool(getattr(self, file)) != bool(self.videos):
            raise BadInput(f"--{file} and --videos go together: a JSONL and its videos' folder; give both")
        if (self.stage == "bridge") != bool(self.policy):
            raise BadInput("--stage bridge and --policy go together: name the decoder's folder")


STAGES = ("clip", "align", "sft")
RANKER_SEED = 3_000_000  # of the first scene of the ranker's clips


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
        return ids.to(device), mask.sum(dim=1).to(device)

    device = clip.logit_scale.device
    optimizer = optimizer_for(clip.parameters(), cfg.clip_lr)
    bar, hits, seen = tqdm(range(cfg.clip_steps), "clip"), 0.0, 0
    for step in bar:
        chosen = torch.randperm(len(frames), generator=generator)[: cfg.clip_batch // 4]
        which = torch.rand(len(chosen), frames.shape[1], generator=generator).argsort(dim=1)[:, :4]
        pixels = preprocess(frames[chosen[:, None], which].flatten(0, 1).to(device))
        pairs = [
            (scenes[c], times[c, k].item()) for c, ks in zip(chosen.tolist(), which, strict=True) for k in ks
        ]
        captions = [world.frame_caption(scene, t) for scene, t in pairs]
        wrong = [world.frame_caption(scene, t, rng) for scene, t in pairs]
        similarity = clip.similarity(pixels, *encode(captions + wrong))
        same = torch.tensor([[a == b for b in captions + wrong] for a in captions], device=device)
        loss = contrastive_loss(similarity, same)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, cfg.clip_steps, cfg.clip_lr)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        best = similarity.argmax(dim=1)
        hits, seen = hits + same.gather(1, best[:, None]).float().mean().item(), seen + 1
        if (step + 1) % 100 == 0:
            found = f"retrieval among {same.shape[1]}: {hits / seen:.1%}"
            bar.write(f"clip step {step + 1}  loss {loss.item():.3f}  {found}")
            hits, seen = 0.0, 0


def train_align(cfg: Config, model: VideoLM, patches, times, tokenizer: Tokenizer, generator):
    """Alignment before any question (LLaVA and BLIP-2 begin so too). Captions come first: from a frame's own
    few video tokens they teach which colour, kind, place and movement belong together, long before the
    sparser annotations of whole clips could. Without faults. Bridge and decoder learn."""
    scenes = [world.make_scene(c) for c in range(len(patches))]
    rows = [[_row(tokenizer, *pair, False) for pair in world.annotations(scene)] for scene in scenes]
    rng = random.Random(cfg.seed)

    def captions():
        chosen = torch.randperm(len(patches), generator=generator)[: cfg.caption_batch]
        video = model.bridge(patches[chosen].float(), times[chosen])  # (P, Q, D)
        K, (P, Q, D) = times.shape[1], video.shape
        texts = [world.frame_caption(scenes[c], t, actions=True) for c in chosen for t in times[c].tolist()]
        ids, mask = collate_completions([tokenizer.encode(text) + [EOS_ID] for text in texts])
        return video.view(P * K, Q // K, D), *(x.unsqueeze(1) for x in (ids, mask, mask))

    def annotations():
        chosen = torch.randperm(len(patches), generator=generator)[: cfg.annotation_batch]
        video = model.bridge(patches[chosen].float(), times[chosen])
        return video, *sft_batch([rows[c] for c in chosen], cfg.annotations_per_clip, rng)

    trainable = [*model.bridge.parameters(), *model.decoder.parameters()]
    train_decoder(model, captions, trainable, cfg.caption_steps, cfg.align_lr, "captions")
    train_decoder(model, annotations, trainable, cfg.annotation_steps, cfg.align_lr, "annotations")


def _row(tokenizer, question, answer, is_long):
    return tokenizer.encode(question), tokenizer.encode(answer) + [EOS_ID], is_long


def corpus(cfg: Config, tokenizer: Tokenizer, num_clips: int):
    """Per clip a list of (question ids, answer ids, is_long). Faults are drawn once, as in a file."""
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

    train_decoder(model, batch, [*model.decoder.parameters()], steps, cfg.sft_lr, name)


def train_decoder(model: VideoLM, batch, trainable, steps: int, peak: float, name: str, opening=(BOS_ID,)):
    """Next-token cross-entropy. batch() gives video tokens (P, N_video, D), ids and mask (P, G, T), and which
    tokens are to be predicted (P, G, T). opening: the ids before the video."""
    model.requires_grad_(False)
    for p in trainable:
        p.requires_grad_(True)
    optimizer = optimizer_for(trainable, peak)
    bar, total, count, began = tqdm(range(steps), name), 0.0, 0, time.time()
    for step in bar:
        video, ids, _, answer = batch()
        ids, answer = ids.to(video.device), answer.to(video.device)
        prompt_ids = torch.tensor([*opening] + [VIDEO_ID] * video.shape[1], device=video.device)
        prompt_ids = prompt_ids.expand(len(video), -1)
        prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
        prompt = model.embed_prompt(prompt_ids, prompt_mask, video)
        states = model.decoder(prompt, prompt_mask, model.decoder.embed_tokens(ids))
        loss = F.cross_entropy(states[answer] @ model.decoder.head.float().T, ids[answer])
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
    device, starts = model.decoder.head.device, range(0, len(frames), chunk)
    return torch.cat([model.patch_tokens(frames[i : i + chunk].to(device)).half() for i in starts])


@torch.no_grad()
def video_tokens(model: VideoLM, patches, times, chunk: int = 128):
    """(C, N_video, D) video tokens of every clip: after the alignment the bridge is frozen too, so that
    answers that ignore the video cannot teach it to."""
    starts = range(0, len(patches), chunk)
    return torch.cat([model.bridge(patches[i : i + chunk].float(), times[i : i + chunk]) for i in starts])


def run_stage(stage: str, cfg: Config, tokenizer: Tokenizer, frames, times) -> VideoLM:
    """The model after one stage; all but the first start from the model in --out."""
    torch.manual_seed(cfg.seed)
    generator, device = torch.Generator().manual_seed(cfg.seed), pick_device(cfg.device)
    if stage == "clip":
        vocab_size = -(-tokenizer.vocab_size // 8) * 8
        model = VideoLM(ModelConfig(vocab_size=vocab_size), ClipConfig(vocab_size=vocab_size)).to(device)
        model.clip.requires_grad_(True)
        train_clip(cfg, model.clip, tokenizer, frames, times, generator)
        return model
    model, times = load_model(cfg.out, device), times.to(device)
    patches = all_patch_tokens(model, frames)
    if stage == "align":
        train_align(cfg, model, patches, times, tokenizer, generator)
        return model
    rows = corpus(cfg, tokenizer, len(frames))
    short, long = ([[row for row in clip if row[2] == is_long] for clip in rows] for is_long in (False, True))
    embeds = video_tokens(model, patches, times)
    train_sft(cfg, model, embeds, [short], cfg.short_steps, "short", generator)
    train_sft(cfg, model, embeds, [long, short], cfg.long_steps, "long", generator)
    return model


def train_ranker(cfg: Config) -> dict:
    """Bradley-Terry on preference pairs, from the supervised start in --out; CLIP and bridge stay frozen.

    Writes ranker/ into --out. Returns the report on held-out pairs, of the file as it is read again.
    """
    began, rng, generator = time.time(), random.Random(cfg.seed), torch.Generator().manual_seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    model, tokenizer = load_model(cfg.out, device), Tokenizer.load(os.path.join(cfg.out, "tokenizer.json"))
    if cfg.pairs:
        pairs = ranker.load_pairs(cfg.pairs, cfg.videos)
    else:
        folder = f"{cfg.world_dir}_ranker"
        path = world.make_world(folder, range(RANKER_SEED, RANKER_SEED + cfg.ranker_clips))
        questions = load_questions(path, folder)
        pairs = ranker.draw_pairs(questions, cfg.pairs_per_question, cfg.error_rate, cfg.seed)
    videos = sorted({pair.video for pair in pairs})
    embeds = ranker.embed_videos(model, [(video,) for video in videos])
    video_of = {video: i for i, video in enumerate(videos)}
    order = torch.randperm(len(videos), generator=generator).tolist()
    num_held = min(max(round(cfg.held_share * len(videos)), 1), len(videos) - 1)
    held, learned = {videos[i] for i in order[:num_held]}, order[num_held:]
    of_video = [[] for _ in videos]
    for pair in pairs:
        of_video[video_of[pair.video]].append(pair)
    R = min(cfg.pairs_per_video, max(len(of_video[i]) for i in learned))
    scorer = ranker.Ranker(model, tokenizer).to(device)
    trainable = [*model.decoder.parameters(), *scorer.head.parameters()]
    for p in trainable:
        p.requires_grad_(True)
    optimizer, total = optimizer_for(trainable, cfg.ranker_lr), 0.0
    bar = tqdm(range(cfg.ranker_steps), "ranker")
    for step in bar:
        chosen = torch.randperm(len(learned), generator=generator)[: cfg.ranker_batch]
        chosen = [learned[i] for i in chosen]
        picked = [(rng.sample if len(of_video[i]) >= R else rng.choices)(of_video[i], k=R) for i in chosen]
        rows = [[(p.question, text) for p in some for text in (p.chosen, p.rejected)] for some in picked]
        scores = scorer(embeds[chosen], rows).unflatten(1, (R, 2))
        loss = ranker.bradley_terry(scores[..., 0], scores[..., 1]).mean()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, cfg.ranker_steps, cfg.ranker_lr)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if (step + 1) % 50 == 0:
            bar.write(f"ranker step {step + 1}  loss {total / 50:.4f}")
            total = 0.0
    ranker.save_ranker(scorer, cfg.out)
    tested = [pair for pair in pairs if pair.video in held]
    scorer = ranker.load_ranker(os.path.join(cfg.out, "ranker"), device)
    difference = ranker.score_pairs(scorer, tested, embeds, video_of)
    report = ranker.pair_report(difference, [pair.truth for pair in tested])
    report |= {"trained_on": len(pairs) - len(tested), "error_rate": None if cfg.pairs else cfg.error_rate}
    report |= {"seconds": round(time.time() - began, 1), "command": " ".join(["python", *sys.argv])}
    write_json(os.path.join(cfg.out, "ranker", "made.json"), report)
    return report


def train_bridge(cfg: Config):
    """The Bridge of a pretrained policy, from scratch or from where its file stands, on questions with
    answers, or captions; CLIP and decoder stay as they are. Writes BRIDGE_FILE into the policy's folder."""
    torch.manual_seed(cfg.seed)
    rng, device = random.Random(cfg.seed), pick_device(cfg.device)
    options = {k: getattr(cfg, k) for k in ("clip", "template", "video_tokens", "num_frames", "base", "seed")}
    model, tokenizer = load_policy(cfg.policy, device, **options)
    if not isinstance(model.bridge, Bridge):
        what = f"--video_tokens {cfg.video_tokens}: {cfg.policy} has a projector for these"
        raise BadInput(f"{what}; choose qformer")
    model.decoder.compute_dtype = getattr(torch, "float32" if cfg.base == "float32" else "bfloat16")
    model.decoder.checkpointing = True
    folder, data = cfg.videos, cfg.data
    if not data:
        folder = f"{cfg.world_dir}_bridge"
        data = world.make_world(folder, range(RANKER_SEED, RANKER_SEED + cfg.num_clips))
    of_video = {}
    for question in load_questions(data, folder):
        of_video.setdefault(question.shown, []).append(question)
    start, N = model.cfg.video_start, model.bridge.num_tokens
    sizes = model.cfg.num_frames, model.clip_cfg.image_size, model.cfg.framing

    def row(question):
        prompt = tokenizer.prompt(prompt_text(question), N)
        return prompt[start + N :], [*tokenizer.encode(question.answer), tokenizer.end_ids[0]], False

    def batch():
        shown = rng.sample(list(of_video), min(cfg.bridge_batch, len(of_video)))
        frames, times = load_clips(shown, *sizes)
        video = model.bridge(model.patch_tokens(frames.to(device)), times.to(device))
        return video, *sft_batch([[*map(row, of_video[part])] for part in shown], cfg.questions_per_clip, rng)

    opening = tokenizer.prompt("", 1)[:start]
    trainable = [*model.bridge.parameters()]
    train_decoder(model, batch, trainable, cfg.bridge_steps, cfg.bridge_lr, "bridge", opening)
    save_bridge(model.bridge, cfg.policy)


def main():
    cfg = parse_args(Config)
    if cfg.stage == "bridge":
        return train_bridge(cfg)
    if cfg.stage == "ranker":
        print(json.dumps(train_ranker(cfg)))
        return
    tokenizer = Tokenizer(world.vocabulary())
    began = time.time()
    world.make_world(cfg.world_dir, range(cfg.num_clips))
    shown = [(os.path.join(cfg.world_dir, f"clip{c:07d}.mp4"),) for c in range(cfg.num_clips)]
    frames, times = load_clips(shown, ModelConfig.num_frames, ClipConfig.image_size)
    record = os.path.join(cfg.out, "made.json")
    made = {"seconds": {}, "commands": []}
    if cfg.stage not in ("all", "clip") and os.path.exists(record):
        with open(record) as file:
            made = json.load(file)
    made |= {"seed": cfg.seed, "faults": cfg.faults, "torch": torch.__version__, "cpus": os.cpu_count()}
    made["commands"].append(" ".join(["python", *sys.argv]))
    made["seconds"].setdefault("world", round(time.time() - began, 1))
    for stage in STAGES if cfg.stage == "all" else [cfg.stage]:
        began = time.time()
        save_model(run_stage(stage, cfg, tokenizer, frames, times), cfg.out)
        tokenizer.save(os.path.join(cfg.out, "tokenizer.json"))
        made["seconds"][stage] = round(time.time() - began, 1)
        write_json(record, made)
    print(json.dumps(made))


if __name__ == "__main__":
    run_script(main)
