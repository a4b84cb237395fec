"""Supervised training: the loss of answers to questions about videos, and what teaches a pretrained policy.

    python pretrain.py --stage bridge --policy DECODER --clip CLIP --out A     # the bridge learns
    python pretrain.py --stage sft --policy A --out B                          # LoRA on the decoder learns
    python train.py --policy B                                                 # then ranks

The result is a policy folder of its own. The decoder's folder and CLIP's are only read:

    config.json         model_type SUPERVISED, where decoder and CLIP lie and what they are, the options
    bridge.safetensors  the bridge; its sizes are in config.json
    adapter/            after --stage sft: the LoRA in PEFT's files
    training.safetensors, metrics.jsonl   what --resume needs; the loss at every save
    features/           CLIP's patch tokens of each clip, float16: CLIP is frozen, so computed once
"""

import hashlib
import json
import os
import random
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import lora
from checkpoints.policies import SUPERVISED, PolicyOptions, kind_of, load_policy, save_adapter_of
from checkpoints.pretrained import BRIDGE_FILE
from checkpoints.weight_files import read_own, write_own
from data import VIDEO_ID, build_prompt, collate_completions, load_clips
from model import Bridge, ModelConfig, VideoLM
from plumbing.fitting import adamw, descend, unfrozen
from plumbing.machine import MachineOptions, pick_device, say, set_up
from plumbing.options import (
    LEFT,
    Alpha,
    BadInput,
    Count,
    Options,
    Positive,
    Share,
    check_record,
    finite,
    is_kind,
    json_lines,
    one_line,
    parse_json,
    read_json,
    read_tensors,
    remove,
    write_json,
    write_whole,
)  # fmt: skip
from plumbing.run_folder import OR_EARLIER, fingerprint
from videoqa import world
from videoqa.questions import load_questions

WANTS = "name a folder that pretrain.py --stage bridge or sft wrote"
FIRST_SCENE = 4_000_000  # seed of the first scene of the embedded world's clips for pretrained policies
KINDS = dict.fromkeys(("decoder", "clip", "template", "video_tokens"), str) | {"fingerprints": dict}
SIZES = ("bridge", "bridge_width", "bridge_heads", "num_queries", "qformer_layers", "num_frames")
SAVED_FIRST = ("training.safetensors", BRIDGE_FILE, "adapter", "metrics.jsonl")  # before config.json
LOSSES = "loss {loss:.3f}, held out {held_loss:.3f}, other video {held_loss_other_video:.3f}"  # printed
HELD_CLIPS = 32  # held-out clips that the loss is measured on


@dataclass
class SupervisedOptions(Options):
    """A pretrained decoder: --stage bridge, and --stage sft with --policy"""

    data: str = ""  # JSONL of questions and answers; empty: the embedded world's
    videos: str = ""  # folder that the video paths in --data or --pairs are relative to
    taught_clips: Count = 2500  # clips of the embedded world, where --data is empty
    loose_share: Share = 0.0  # of the embedded world's last answers, replaced by ones that are always true
    bridge_from: str = ""  # folder whose bridge to start from, of any decoder; for instance weights
    with_bridge: bool = False  # sft: the bridge learns too, not only the LoRA
    steps: Count = 1000  # optimizer steps
    batch_clips: Count = 8  # clips a step, each with up to questions_per_clip questions
    questions_per_clip: Count = 8
    lr: Positive = 3e-4  # the highest; it falls to 5 % of it
    warmup_share: Share = 0.05  # share of the steps in which the rate rises
    short_share: Share = 0.3  # share of the steps, the first, that learn only the shorter half of the answers
    lora_r: Count = 16
    lora_alpha: Alpha = 32.0
    checkpointing: bool = False  # keep only a layer's input for the backward pass: less memory, slower
    save_every: Count = 100  # steps between saves, and between losses on held-out clips
    resume: bool = False  # continue in --out from the last save


# ------------------------------------------------------------------------------------------------- the loss


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


def states_behind(model: VideoLM, opening: list[int], video: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The states (P, G, T, D) that predict ids (P, G, T) after the opening and the video tokens
    (P, N_video, D). mask (P, G, T) bool: False where a row of ids has ended."""
    prompt_ids = torch.tensor([*opening] + [VIDEO_ID] * video.shape[1], device=video.device)
    prompt_ids = prompt_ids.expand(len(video), -1)
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    prompt = model.embed_prompt(prompt_ids, prompt_mask, video)
    return model.decoder(prompt, prompt_mask, model.decoder.embed_tokens(ids), completion_mask=mask)


def answer_loss(model: VideoLM, opening: list[int], video: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    """Mean next-token cross-entropy of the answers' tokens, scalar.

    opening: the ids before the video. video (P, N_video, D), ids (P, G, T), answer (P, G, T) bool.
    """
    ids, answer = ids.to(video.device), answer.to(video.device)
    asked = answer.flip(-1).cummax(-1).values.flip(-1)  # all up to an answer's last token
    states = states_behind(model, opening, video, ids, asked)
    return F.cross_entropy(states[answer] @ model.decoder.head.float().T, ids[answer])


# ------------------------------------------------------------------------------------------------- the data


class Lessons:
    """Questions with answers, by clip, and CLIP's cached patch tokens of the clips."""

    def __init__(self, cfg, model: VideoLM, tokenizer):
        data, videos = cfg.data, cfg.videos
        if data and cfg.loose_share:
            raise BadInput("--loose_share: is for the embedded world's questions; leave it or --data out")
        if not data:
            videos = f"{cfg.world_dir}_taught"
            data = world.make_world(videos, range(FIRST_SCENE, FIRST_SCENE + cfg.taught_clips))
        self.cfg, self.model, self.tokenizer, self.by_clip = cfg, model, tokenizer, {}
        for question in load_questions(data, videos):
            self.by_clip.setdefault(question.shown, []).append(question)
        clips = sorted(self.by_clip)
        random.Random(cfg.seed).shuffle(clips)
        num_held = max(round(cfg.held_share * len(clips)), 2)
        self.held, self.learned = clips[:num_held][:HELD_CLIPS], clips[num_held:]
        if not self.learned:
            raise BadInput(f"{data}: questions about {len(clips)} clips; give 3 or more, 2 are held out")
        lengths = {q.id: len(tokenizer.encode(q.answer)) for part in self.by_clip.values() for q in part}
        middle = sorted(lengths.values())[len(lengths) // 2]
        self.short = {c: [q for q in part if lengths[q.id] <= middle] for c, part in self.by_clip.items()}
        self.opening = tokenizer.prompt("", 1)[: model.cfg.video_start]
        self.folder = os.path.join(cfg.out, "features")
        os.makedirs(self.folder, exist_ok=True)
        self.clip_hash = fingerprint(cfg.clip or cfg.policy)

    def features(self, clips: list[tuple]) -> tuple[Tensor, Tensor]:
        """CLIP's patch tokens (P, K, N, clip width) and frame times (P, K) in seconds."""
        cfg, clip_cfg, device = self.model.cfg, self.model.clip_cfg, self.model.decoder.head.device
        paths = {}
        for clip in clips:
            key = repr((clip, cfg.num_frames, cfg.framing, cfg.clip_layer, self.clip_hash))
            name = hashlib.sha256(key.encode()).hexdigest()[:24]
            paths[clip] = os.path.join(self.folder, f"{name}.safetensors")
        missing = [clip for clip, path in paths.items() if not os.path.exists(path)]
        if missing:
            frames, times = load_clips(missing, cfg.num_frames, clip_cfg.image_size, cfg.framing)
            patches = self.model.patch_tokens(frames.to(device))
            for clip, tokens, seconds in zip(missing, patches, times, strict=True):
                write_whole(paths[clip], save({"patches": tokens.half().cpu(), "times": seconds}))
        stored = [read_tensors(paths[clip], "delete it, and it is computed again")[0] for clip in clips]
        patches, times = (torch.stack([one[name] for one in stored]) for name in ("patches", "times"))
        return patches.float().to(device), times.to(device)

    def batch(self, clips: list[tuple], short: bool, rng: random.Random, loose_share=0.0):
        """(video tokens (P, N_video, D), ids and answer mask (P, G, T)) of these clips' questions."""
        patches, times = self.features(clips)
        video, start = self.model.bridge(patches, times), len(self.opening) + self.model.bridge.num_tokens
        questions, rows = self.short if short else self.by_clip, []
        for clip, seconds in zip(clips, times.tolist(), strict=True):
            rows.append([])
            for question in questions[clip]:
                prompt = build_prompt(self.tokenizer, question, self.model.bridge.num_tokens, seconds)
                loose = loose_share and rng.random() < loose_share  # so ranks have something to unlearn
                text = rng.choice(world.LOOSE_ANSWERS[question.category]) if loose else question.answer
                rows[-1].append((prompt[start:], [*self.tokenizer.encode(text), self.tokenizer.end_ids[0]]))
        return video, *answer_batch(rows, self.cfg.questions_per_clip, rng)

    def loss(self, step: int) -> Tensor:
        """Of the batch of this step, which only the seed and the step decide."""
        short, rng = step < self.cfg.short_share * self.cfg.steps, random.Random(f"{self.cfg.seed} {step}")
        pool = [clip for clip in self.learned if self.short[clip]] if short else self.learned
        clips = rng.sample(pool, min(self.cfg.batch_clips, len(pool)))
        loose_share = self.cfg.loose_share * step / self.cfg.steps  # it rises: first what is right is learned
        video, ids, answer = self.batch(clips, short, rng, loose_share)
        return answer_loss(self.model, self.opening, video, ids, answer)

    @torch.no_grad()
    def held_losses(self) -> dict:
        """Cross-entropy a token, in nats, of held-out answers after their own clip's video and after another
        clip's. Their difference says how much the video is used."""
        sums, count, size = [0.0, 0.0], 0, max(self.cfg.batch_clips, 2)
        for i in range(0, max(len(self.held) - 1, 1), size):
            clips = self.held[i : i + size + (len(self.held) - i - size == 1)]  # no clip is left alone
            video, ids, answer = self.batch(clips, False, random.Random(0))
            num_tokens = answer.sum().item()
            for k, tokens in enumerate((video, video.roll(1, dims=0))):
                sums[k] += answer_loss(self.model, self.opening, tokens, ids, answer).item() * num_tokens
            count += num_tokens
        return {"held_loss": sums[0] / count, "held_loss_other_video": sums[1] / count}


# ------------------------------------------------------------------------------------------------- the stages


def train_supervised(cfg) -> None:
    """--stage bridge | sft of a pretrained policy; cfg: pretrain.py's options. Writes --out."""
    check_out(cfg)
    if not cfg.resume:
        for name in SAVED_FIRST:  # of a first save that was cut short; other options might leave it there
            remove(os.path.join(cfg.out, name))
    torch.manual_seed(cfg.seed)
    taught = cfg.stage == "bridge" or cfg.with_bridge
    model, tokenizer = load_policy(cfg, pick_device(cfg.device), taught or bool(cfg.bridge_from))
    if cfg.bridge_from:
        take_bridge(model, cfg.bridge_from)
    parameters = []
    if cfg.stage == "sft":
        generator = torch.Generator().manual_seed(cfg.seed)
        parameters += lora.add_adapters(model.decoder, cfg.lora_r, cfg.lora_alpha, generator=generator)
    if taught:
        if not isinstance(model.bridge, Bridge):
            raise BadInput(f"--policy {cfg.policy}: has a projector; a bridge needs --video_tokens qformer")
        parameters += unfrozen(model.bridge)
    set_up(model.decoder, MachineOptions(checkpointing=cfg.checkpointing))
    lessons, optimizer = Lessons(cfg, model, tokenizer), adamw(parameters, cfg.lr)
    history = load_training(cfg.out, parameters, optimizer) if cfg.resume else []
    first, warmup = history[-1]["step"] if history else 0, max(1, round(cfg.warmup_share * cfg.steps))
    if history:  # of a save that was cut short only the first file may be there
        save_result(cfg, model, parameters, optimizer, history)
    losses, options = [], dict(first=first, steps=cfg.steps, rate="lr", lr=cfg.lr, warmup=warmup)
    for step, loss in descend(cfg.stage, lessons.loss, optimizer, **options):
        losses.append(loss)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            history.append({"step": step + 1, "loss": sum(losses) / len(losses), **lessons.held_losses()})
            losses = []
            save_result(cfg, model, parameters, optimizer, history)
            tqdm.write(f"step {step + 1}: {LOSSES.format(**history[-1])}")
    say(f"{cfg.out}: a policy for --policy {cfg.out}")


def check_out(cfg) -> None:
    """Raises BadInput for an --out that is not this training's, and for starts that cannot be stored."""
    path = os.path.join(cfg.out, "config.json")
    if cfg.adapter:
        raise BadInput("--adapter: supervised training makes an adapter of its own; merge that one first")
    if os.path.isdir(os.path.join(cfg.policy, "adapter")) and kind_of(cfg.policy) == SUPERVISED:
        raise BadInput(f"--policy {cfg.policy}: has an adapter already; start from the folder before it")
    if not cfg.resume:
        names = os.listdir(cfg.out) if os.path.exists(cfg.out) else []
        begun = {"features", *(SAVED_FIRST if SAVED_FIRST[0] in names else ())}  # and killed: it starts over
        if any(name not in begun and not LEFT.fullmatch(name) for name in names):
            raise BadInput(f"--out {cfg.out}: exists already; name a new folder, or add --resume")
        return
    stored = read_json(path, "there is nothing to resume; leave --resume out").get("options")
    if not isinstance(stored, dict):
        raise BadInput(f"{path}: options is missing or damaged; {WANTS}")
    for name, value in asdict(cfg).items():
        if name not in ("resume", "out", "device") and stored.get(name) != value:
            raise BadInput(f"--{name} {value}: {path} has {stored.get(name)!r}; repeat the options to resume")


def take_bridge(model: VideoLM, folder: str) -> None:
    """Gives the model the bridge of another folder that pretrain.py wrote. If the decoders differ in width,
    its last two linear layers start anew. Raises BadInput if it was made for another CLIP."""
    config = read_json(os.path.join(folder, "config.json"), WANTS)
    sizes = config.get("model", config.get("sizes"))
    if not isinstance(sizes, dict):
        raise BadInput(f"--bridge_from {folder}: holds no bridge; {WANTS}")
    name, before = "model.safetensors", "bridge."  # in a whole model its names begin so
    if config.get("model_type") == SUPERVISED:
        name, before = BRIDGE_FILE, ""
    stored, _ = read_tensors(os.path.join(folder, name), WANTS)
    stored = {key.removeprefix(before): x for key, x in stored.items() if key.startswith(before)}
    sizes = {key: sizes[key] for key in SIZES if key in sizes and key != "num_frames"}
    model.cfg = resized(model.cfg, sizes, folder)
    bridge = Bridge(model.cfg, model.clip_cfg)
    new = bridge.state_dict()
    kept = {key: x.float() for key, x in stored.items() if key in new and x.shape == new[key].shape}
    anew = sorted(new.keys() - kept.keys())
    unfit = [key for key in anew if not key.startswith(("fc1.", "fc2."))]
    if unfit:
        raise BadInput(f"--bridge_from {folder}: {unfit[0]} is of another CLIP; name one of the same CLIP")
    bridge.load_state_dict(kept, strict=False)
    model.bridge = bridge.requires_grad_(False).to(model.decoder.head.device)
    say(f"bridge from {folder}; {', '.join(anew) + ' start anew' if anew else 'all of it'}")


# -------------------------------------------------------------------------------------------------- the files


def save_result(cfg, model: VideoLM, parameters, optimizer, history: list[dict]) -> None:
    """Writes the policy folder as it is now, and what --resume needs."""
    beneath = read_json(os.path.join(cfg.policy, "config.json"), WANTS)
    if beneath.get("model_type") != SUPERVISED:
        decoder, clip = os.path.abspath(cfg.policy), os.path.abspath(cfg.clip) if cfg.clip else ""
        beneath = {"decoder": decoder, "clip": clip}
        beneath["fingerprints"] = {name: fingerprint(path) for name, path in beneath.items()}
        beneath |= {"template": cfg.template, "video_tokens": cfg.video_tokens}
    tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        tensors |= {f"optimizer.{i}.{name}": x for name, x in optimizer.state[p].items()}
    content = {name: x.cpu().contiguous() for name, x in tensors.items()}
    training = save(content, {"history": json.dumps(finite(history))})
    write_whole(os.path.join(cfg.out, "training.safetensors"), training)
    if isinstance(model.bridge, Bridge):
        write_own(model.bridge, os.path.join(cfg.out, BRIDGE_FILE))
    if cfg.stage == "sft":
        save_adapter_of(model, os.path.join(cfg.out, "adapter"))
    write_whole(os.path.join(cfg.out, "metrics.jsonl"), json_lines(history).encode())
    config = {name: beneath[name] for name in KINDS}
    sizes = {name: getattr(model.cfg, name) for name in SIZES}
    config |= {"model_type": SUPERVISED, "sizes": sizes, "options": asdict(cfg)}
    write_json(os.path.join(cfg.out, "config.json"), config)


def load_training(folder: str, parameters, optimizer) -> list[dict]:
    """Restores parameters and optimizer from the last save; returns the rows of metrics.jsonl."""
    path = os.path.join(folder, "training.safetensors")
    tensors, metadata = read_tensors(path, WANTS)
    history = parse_json(metadata.get("history", ""), path, WANTS)
    if not is_kind(history, list[dict]) or not all(is_kind(row.get("step"), int) for row in history):
        raise BadInput(f"{path}: its history is damaged; {WANTS}")
    for i, p in enumerate(parameters):
        state = {k.rsplit(".", 1)[1]: x for k, x in tensors.items() if k.startswith(f"optimizer.{i}.")}
        shapes = {key: x.shape for key, x in state.items()}
        fits = shapes == {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        if not fits or getattr(tensors.get(f"parameter.{i}"), "shape", None) != p.shape:
            raise BadInput(f"{path}: parameter {i} is missing or does not fit the policy; {WANTS}")
        p.data.copy_(tensors[f"parameter.{i}"])
        optimizer.state[p] = {k: x if k == "step" else x.to(p.device) for k, x in state.items()}
    return history


def decoder_options(options: PolicyOptions) -> tuple[PolicyOptions, dict]:
    """The options that load the decoder beneath a folder of supervised training, its adapter included, and
    the folder's config.json. Raises BadInput if decoder or CLIP are not those that it was trained with, or if
    an option contradicts the folder."""
    folder = options.policy
    path = os.path.join(folder, "config.json")
    config = read_json(path, WANTS)
    for name, kind in (KINDS | {"sizes": dict}).items():
        if type(config.get(name)) is not kind:
            raise BadInput(f"{path}: {name} is missing or damaged; {WANTS}")
    fixed = {name: config[name] for name in ("clip", "template", "video_tokens")}
    fixed["num_frames"] = config["sizes"].get("num_frames")
    for name, value in fixed.items():
        if getattr(options, name) not in (value, getattr(PolicyOptions, name)):
            raise BadInput(f"--{name} {getattr(options, name)}: {folder} has {value}; leave it out")
    for name in ("decoder", "clip"):
        if fingerprint(config[name]) != config["fingerprints"].get(name):
            words = f"not the {name} that {folder} was trained with{OR_EARLIER}; put it back"
            raise BadInput(f"{config[name]}: {words}")
    adapter = os.path.join(folder, "adapter")
    fixed |= {"policy": config["decoder"], "adapter": adapter if os.path.isdir(adapter) else ""}
    own = {field.name: getattr(options, field.name) for field in fields(PolicyOptions)}
    return PolicyOptions(**own | fixed), config


def resized(cfg: ModelConfig, sizes: dict, folder: str) -> ModelConfig:
    """cfg with the sizes of a folder's bridge. BadInput: they are no sizes of one."""
    try:
        cfg = replace(cfg, **sizes)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{folder}/config.json: its sizes are damaged ({one_line(error)}); {WANTS}") from error
    check_record(cfg, folder, WANTS)
    return cfg


def load_supervised(options: PolicyOptions, device):
    """(VideoLM, tokenizer) of a folder that `train_supervised` wrote, its own adapter merged."""
    beneath, config = decoder_options(options)
    path = os.path.join(options.policy, BRIDGE_FILE)
    model, tokenizer = load_policy(beneath, device, own_bridge=os.path.exists(path))
    if os.path.exists(path):
        model.cfg = resized(model.cfg, config["sizes"], options.policy)
        model.bridge = read_own(lambda: Bridge(model.cfg, model.clip_cfg), path, device)
    return model, tokenizer
