"""What a run will need of the device's memory, before anything of it is allocated.

Weights, adapters and the cache are counted. What a step needs beside them is measured, on tensors that have
shapes but no memory (FakeTensorMode): three decoder layers and two of the true width run the code that the
run itself will run, forward and backward, and their difference is what each further layer adds.
"""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
from checkpoints import nf4
from checkpoints.policies import freeze_base, load_tokenizer, policy_configs
from clip import ClipConfig
from data import clips_at_once, longest_text
from grpo_rank import Objective, Tokens, nucleus, sampling_logprobs, walk
from model import Decoder, KVCache, ModelConfig, Projector, VideoLM
from plumbing.machine import hold, joinable, joined, pick_dtype, say, show_progress
from rollout import EVALUATED_AT_ONCE, answer, draw, reference_states


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made within it that are still alive: `live` now, `peak` at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.see((args, kwargs), counted=False)  # made before: a view of it is no new memory either
        out = func(*args, **(kwargs or {}))
        self.see(out, counted=True)
        return out

    def see(self, values, counted: bool):
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":  # which holds nothing
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage.nbytes() * counted
                    self.live += storage.nbytes() * counted
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key: int):
        self.live -= self.seen.pop(key)


def num_bytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def plan(
    cfg: ModelConfig, clip: ClipConfig, run, dtype: torch.dtype, num_videos: int, text_tokens: int
) -> dict[str, int]:
    """Bytes by purpose. `run`: train.py's Config; dtype: of the matrix products; text_tokens: of the longest
    prompt beside its video.

    The peak is what stays and the largest of what does not coincide: embedding videos, sampling, update. An
    allocator keeps some more for itself, about a tenth on a GPU.
    """
    with torch.device("meta"):
        whole = VideoLM(cfg, clip)
        if isinstance(whole.bridge, Projector) and run.base != "float32":
            whole.bridge.bfloat16()  # as weight_files.fill holds it
    layers = whole.decoder.named_modules()
    linears = [layer for name, layer in layers if name.split(".")[-1] in lora.DECODER_LINEARS]
    quantised = sum(x.weight.numel() for x in linears) if run.base == "nf4" else 0
    rest = sum(p.numel() for p in whole.decoder.parameters()) - quantised
    num_adapters = sum(run.lora_r * (x.in_features + x.out_features) for x in linears)
    N_video = whole.bridge.num_tokens
    P = run.sample_prompts or max(run.batch_prompts, EVALUATED_AT_ONCE)
    G, T = max(run.group_size, 1 + run.eval_samples), run.max_new_tokens  # an evaluation decodes greedily too
    S = N_video + text_tokens
    codes = quantised // 2 + quantised // nf4.BLOCK + 4 * quantised // (nf4.BLOCK * nf4.GROUP)
    # In products of 16 bits machine.hold keeps plain linear layers in 16 bits, whatever the base is
    held = 0 if dtype == torch.float32 else sum(x.weight.numel() for x in linears) - quantised
    wide = 4 if run.base == "float32" else 2
    stays = {
        f"decoder's weights ({run.base})": codes + 2 * held + wide * (rest - held),
        "CLIP and bridge": num_bytes(whole.clip.parameters()) + num_bytes(whole.bridge.parameters()),
        "adapters, gradients, optimiser states, reference": 4 * 5 * num_adapters,  # float32; two moments
        f"video tokens of {num_videos} videos": 4 * num_videos * N_video * cfg.dim,
    }
    joins = run.base != "nf4" and (held > 0 or joinable(linears, dtype))

    def of_layers(num_layers: int):
        with FakeTensorMode():
            decoder = Decoder(replace(cfg, num_layers=num_layers))
            freeze_base(decoder, run.base)
            if held:
                hold(decoder, dtype)
            for parameter in lora.add_adapters(decoder, run.lora_r, run.lora_alpha):
                parameter.grad = torch.zeros_like(parameter)
            decoder.compute_dtype, decoder.checkpointing = dtype, run.checkpointing
            decoder.row_block = 0  # no sequence is shorter than another
            return step_peaks(decoder, run, P, G, S, T, joins)

    parts = [partial(of_layers, 3), partial(of_layers, 2), partial(logits_peak, cfg, run)]
    parts += [partial(embedding_peak, cfg, clip, dtype), partial(sampling_logits, cfg, run, P * G)]
    more, few, logits, embedding, drawn = [part() for part in show_progress(parts, "memory plan")]
    each = (b + (cfg.num_layers - 3) * (b - a) for a, b in zip(few, more, strict=True))
    (cache, prefill, step, update), (draw_peak, between) = each, drawn
    sampling = max(prefill, cache + draw_peak, step + between)
    return stays | {
        "embedding videos": embedding,
        f"KV cache ({P} prompts, {G} completions each)": cache,
        f"sampling, beside the cache (logits of {P * G} answers)": sampling - cache,
        f"activations of the update ({run.micro_batch_prompts or run.batch_prompts} prompts)": update,
        "logits of the update": logits,
        "peak": sum(stays.values()) + max(embedding, sampling, update + logits),
    }


def step_peaks(decoder: Decoder, run, P: int, G: int, S: int, T: int, joins: bool) -> tuple:
    """Bytes of the KV cache, and the peaks of prefill, of a sampling step and of a micro-batch's forward and
    backward, without weights and gradients. joins: whether generate joins the whole decoder's layers."""
    with Live() as live, joined(decoder) if joins else torch.no_grad():
        cache = KVCache(torch.ones(P, S, dtype=torch.bool), G, T)
        prompt = decoder.embed_tokens(torch.zeros(P, S, dtype=torch.int64))
        decoder(prompt, cache.prompt_mask, cache=cache)
        prefill, live.peak = live.peak, live.live
        decoder.step(torch.zeros(P, G, dtype=torch.int64), T - 1, cache)
        kept = num_bytes([*(x for pair in cache.prompt for x in pair), *cache.own])
    with Live() as update:
        P, G = run.micro_batch_prompts or run.batch_prompts, run.group_size
        prompt = decoder.embed_tokens(torch.zeros(P, S, dtype=torch.int64))
        completions = decoder.embed_tokens(torch.zeros(P, G, T, dtype=torch.int64))
        decoder(prompt, torch.ones(P, S, dtype=torch.bool), completions).sum().backward()
    return kept, prefill, live.peak, update.peak


def embedding_peak(cfg: ModelConfig, clip: ClipConfig, dtype: torch.dtype) -> int:
    """Peak bytes of videos on their way through CLIP and the bridge."""
    with FakeTensorMode():
        model = VideoLM(replace(cfg, num_layers=1), clip)
        model.decoder.compute_dtype = dtype
        clips = clips_at_once(cfg.num_frames, clip.num_patches)
        with Live() as live:
            size = (clips, cfg.num_frames, 3, clip.image_size, clip.image_size)
            model.embed_video(torch.zeros(size, dtype=torch.uint8), torch.zeros(size[:2]))
    return live.peak


def sampling_logits(cfg: ModelConfig, run, rows: int) -> tuple[int, int]:
    """Bytes that one draw for `rows` answers takes at most, and those that it leaves until the next one: the
    loop of rollout.generate from a state to a token. Log-probabilities, (rows, V) float32, take the memory of
    the logits, which is used again in every step; a draw and a nucleus need tables of that size beside it."""
    with FakeTensorMode(), Live() as live:
        state, banned = torch.zeros(rows, cfg.dim), torch.zeros(cfg.vocab_size, dtype=torch.bool)
        head, uniforms = torch.zeros(cfg.vocab_size, cfg.dim), torch.zeros(rows)
        logits = torch.zeros(rows, cfg.vocab_size)
        for _ in range(2):  # the second draw begins while the first one's log-probabilities are still there
            torch.mm(state, head.T, out=logits)
            scores = sampling_logprobs(logits, run.temperature, banned, None, reuse=True)
            if run.top_p < 1:
                support = nucleus(scores, run.top_p)
                scores = sampling_logprobs(scores, 1.0, None, support)
            draw(scores, uniforms)
    spared = num_bytes([head]) if run.base == "float32" else 0  # the model's own head serves
    supports = 2 * run.max_new_tokens * rows * -(-cfg.vocab_size // 8) if run.top_p < 1 else 0
    return live.peak - spared + supports, live.live - spared + supports


def logits_peak(cfg: ModelConfig, run) -> int:
    """Peak bytes of `grpo_rank.walk` over a micro-batch's states, the reference's beside them; and of a
    float32 copy of the head, where it is of 16 bits."""
    n = (run.micro_batch_prompts or run.batch_prompts) * run.group_size * run.max_new_tokens
    with FakeTensorMode(), Live() as live:
        states, ref_states = torch.zeros(2, n, cfg.dim)
        head, ones = torch.zeros(cfg.vocab_size, cfg.dim), torch.ones(n)
        tokens, objective = Tokens(ones.long(), ones, ones, ones, None), Objective(kl_coef=1, entropy_coef=1)
        walk(states, ref_states, head, tokens, objective, 1.0, None)
    return live.peak - (num_bytes([head]) if run.base == "float32" else 0)


def print_plan(cfg, device: torch.device, sets):
    """Prints the plan of a run, before its policy is loaded. sets: its training and held-out questions."""
    model_config, clip_config = policy_configs(cfg)
    tokenizer = load_tokenizer(cfg, model_config.vocab_size)
    longest = max(longest_text(tokenizer, questions, model_config.num_frames) for questions in sets)
    num_videos = sum(len({question.shown for question in questions}) for questions in sets)
    dtype = getattr(torch, pick_dtype(cfg.dtype, device, model_config.dim))
    say(f"memory plan, before anything is allocated, for {longest} tokens of text:")
    for name, size in plan(model_config, clip_config, cfg, dtype, num_videos, longest).items():
        say(f"{size / 1e9:8.2f} GB  {name}")


def rehearse(cfg, policy, learner, batches, sampling, update):
    """Runs one step of the largest possible size (longest prompts, full-length answers) at rate 0, so that
    running out of memory happens now and not after hours. Prints the peaks of sampling and update on a GPU.
    update: train.update.
    """
    say("rehearsing the longest step")
    asked, device = batches.asked, batches.asked.video_embeds.device
    P = batches.P // batches.num_processes
    size = cfg.micro_batch_prompts or P
    longest = sorted(range(len(asked)), key=lambda i: -len(asked.prompts[i]))
    rows = torch.tensor(longest[: min(P, max(cfg.sample_prompts or P, size))])
    endless = replace(sampling, end_ids=sampling.end_ids[:0])
    uniforms = torch.full((len(rows), cfg.group_size, cfg.max_new_tokens), 0.5)
    before, peaks = {name: x.clone() for name, x in learner.tensors().items()}, {}
    with peak_bytes(device, peaks, "sampling"):
        rollout, _ = answer(policy, asked, rows, cfg.group_size, endless, uniforms)
    with peak_bytes(device, peaks, "update"):
        part, answers = asked[rows[:size]], rollout[: size * cfg.group_size]
        states = reference_states(policy, part, answers, size)
        ranks = torch.arange(cfg.group_size).expand(len(part.prompt_ids), -1)
        signal = dict(advantages=torch.ones(ranks.shape), ranks=ranks)
        batch = dict(prompts=part, rollout=answers, ref_states=states, **signal)
        update(cfg, policy, learner, step=cfg.num_steps, **batch)  # the rate of the step after the last is 0
    learner.restore(before)
    words = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peaks.items())
    say(f"measured in a rehearsal of the longest step: {words or 'only a GPU counts its peaks'}")


@contextmanager
def peak_bytes(device: torch.device, peaks: dict[str, int], name: str):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        peaks[name] = torch.cuda.max_memory_allocated(device)
