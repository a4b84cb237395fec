"""Sampling G completions from a shared prompt, and their states again when updating.

The prompt (its video tokens included) is computed once for its G completions in both. Sampling and training
use one function from states to log-probabilities (`grpo_rank.sampling_logprobs`), so they agree at any
temperature, top-p and set of banned ids; train.py logs the largest difference of every step.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
from data import PAD_ID, Prompts, PromptSet
from grpo_rank import nucleus, pack_support, sampling_logprobs
from model import KVCache, VideoLM
from plumbing.machine import Captured, joined
from plumbing.options import BadInput

NOT_FINITE = (
    "the policy's logits are not finite: its training diverged, or its weights, --lora_alpha or a tiny"
    " --temperature overflow; start anew with a lower --lr, with --dtype float32 or with other weights"
)
# Tokens from one look at whether all have ended to the next: on a GPU a look waits for all that is queued.
LOOK_EVERY = {"cpu": 1, "meta": 1, "cuda": 8}
EVALUATED_AT_ONCE = 256  # prompts that an evaluation samples together, where no option says fewer


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, in training, evaluation and selection alike."""

    max_new_tokens: int
    end_ids: Tensor  # (any,) int64: each of them ends a completion
    banned: Tensor | None = None  # (V,) bool: ids that are never produced
    temperature: float = 1.0
    top_p: float = 1.0
    prompts_at_once: int = 0  # prompts sampled together; 0: all. Fewer need less memory for the KV cache

    @classmethod
    def of(cls, policy: VideoLM, tokenizer, **choices) -> "Sampling":
        """With the ends and the banned ids of the policy's tokenizer."""
        device = policy.decoder.head.device
        banned = tokenizer.banned_ids(policy.cfg.vocab_size).to(device)
        return cls(end_ids=torch.tensor(tokenizer.end_ids, device=device), banned=banned, **choices)


@dataclass
class Completions:
    """B = P * G completions, prompt-major, padded on the right; the end token is inside the mask. What they
    were sampled with travels along, so that the update trains the distribution that was sampled from."""

    completion_ids: Tensor  # (B, T) int64
    completion_mask: Tensor  # (B, T) bool
    logprobs: Tensor  # (B, T) float32, of the distribution that was sampled from; 0 outside the mask
    support: Tensor | None  # (B, T, ceil(V / 8)) uint8: the top-p nucleus of each draw; None: all ids
    ended: Tensor  # (B,) bool: an end id was sampled (False: cut at max_new_tokens)
    temperature: float = 1.0
    banned: Tensor | None = None  # (V,) bool

    def __getitem__(self, rows):
        return replace(
            self, completion_ids=self.completion_ids[rows], completion_mask=self.completion_mask[rows],
            logprobs=self.logprobs[rows], ended=self.ended[rows],
            support=None if self.support is None else self.support[rows],
        )  # fmt: skip

    def of_prompts(self, chosen: Tensor) -> "Completions":
        """Those of the chosen prompts. chosen (P,) bool on any device."""
        G = len(self.ended) // len(chosen)
        return self[chosen.to(self.ended.device).repeat_interleave(G)]

    @classmethod
    def joined(cls, parts: list["Completions"]) -> "Completions":
        """The completions of all parts, whose T may differ, as one."""
        longest = max(part.completion_ids.shape[1] for part in parts)

        def grid(name, filler=0):
            values = [getattr(part, name) for part in parts]
            if values[0] is None:
                return None  # no support where top_p is 1
            padding = [(0, 0) * (x.dim() - 2) + (0, longest - x.shape[1]) for x in values]
            return torch.cat([F.pad(x, pad, value=filler) for x, pad in zip(values, padding, strict=True)])

        return replace(
            parts[0], completion_ids=grid("completion_ids", PAD_ID), completion_mask=grid("completion_mask"),
            logprobs=grid("logprobs"), support=grid("support"), ended=torch.cat([x.ended for x in parts]),
        )  # fmt: skip


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: (n, V) log-probabilities and (n,) uniforms in [0, 1) -> (n,) ids.

    The uniforms come from outside, so a draw depends on its own row alone: neither on the batch it runs in,
    nor on how prompts are split over processes, nor on the device.
    """
    n, V = logprobs.shape
    block = math.ceil(V**0.5)
    probs = logprobs.new_empty(n, -(-V // block) * block)
    probs[:, V:] = 0
    torch.exp(logprobs, out=probs[:, :V])
    probs = probs.view(n, -1, block)
    chosen, rest = _search(probs.sum(dim=2), uniforms.double())  # first the block, then the id in it
    probs = probs.gather(1, chosen[:, None, None].expand(n, 1, block)).squeeze(1)
    return chosen * block + _search(probs, rest)[0]


def _search(weights: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """weights (n, m) >= 0, shares (n,) float64 in [0, 1] of their sum -> the first place (n,), of weight > 0,
    whose cumulative weight lies above the share; and how far into its weight the share goes, (n,)."""
    cdf = weights.double().cumsum(dim=1)
    total = cdf[:, -1:]
    point = (shares[:, None] * total).clamp(max=torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cdf, point, right=True).clamp(max=cdf.shape[1] - 1)  # NaN lies behind all
    above = cdf.gather(1, place)
    weight = weights.gather(1, place).double()
    return place.squeeze(1), (1 - (above - point) / weight).clamp(0, 1).squeeze(1)


def pick(logprobs: Tensor, uniforms: Tensor | None) -> Tensor:
    """`draw`, but the likeliest id where a uniform is NaN, or where there are none at all."""
    if uniforms is None:
        return logprobs.argmax(dim=-1)
    ids, greedy = draw(logprobs, uniforms.nan_to_num()), uniforms.isnan().nonzero().squeeze(1)
    return ids.index_copy(0, greedy, logprobs[greedy].argmax(dim=-1))


def generate(
    model: VideoLM, prompts: Prompts, group_size: int, sampling: Sampling, uniforms: Tensor | None = None
) -> Completions:
    """G completions of each prompt. uniforms (P, G, max_new_tokens) in [0, 1) decide every draw; where one is
    NaN, the likeliest token is taken; None decodes all greedily."""
    parts = []
    for p in micro_batches(len(prompts.prompt_ids), sampling.prompts_at_once):
        drawn = None if uniforms is None else uniforms[p].to(prompts.prompt_ids.device)
        parts.append(generate_at_once(model, prompts[p], group_size, sampling, drawn))
    return Completions.joined(parts)


def prefill(model: VideoLM, prompts: Prompts, cache: KVCache) -> Tensor:
    """The last states (P, D) of the prompts; the cache takes their keys and values. In float32 all questions
    about a video share one pass over it, if videos have two or more on average. In 16 bits they do not: sums
    in another order than in training would round differently."""
    P, device = len(prompts.prompt_ids), prompts.prompt_ids.device
    prompt = model.embed_prompt(prompts.prompt_ids, prompts.prompt_mask, prompts.video_embeds)
    videos = torch.arange(P, device=device) if prompts.videos is None else prompts.videos
    same = videos == videos[:, None]  # (P, P)
    turn = same.tril(-1).sum(dim=1)  # (P,) how many before it ask about its video
    if model.decoder.compute_dtype == torch.float32 and 2 * (turn == 0).sum() <= P:
        first = same.to(torch.uint8).argmax(dim=1)  # (P,) the first that asks about its video
        end = model.cfg.video_start + prompts.video_embeds.shape[1]
        return shared_prefill(model.decoder, prompt, prompts.prompt_mask, end, first, turn, cache)
    return model.decoder(prompt, prompts.prompt_mask, cache=cache).flatten(0, 2)


def shared_prefill(decoder, prompt: Tensor, mask: Tensor, end: int, first: Tensor, turn: Tensor, cache):
    """`prefill` with the texts about a video as G completions of its `end` tokens, those up to its last one.

    prompt (P, S, D), mask (P, S), left-padded; first (P,) the number of a prompt with the same video, turn
    (P,) its place, from 0, among those that have it.
    """
    (_, S, D), device, rows = prompt.shape, prompt.device, torch.arange(len(prompt), device=prompt.device)
    padding, text = (~mask).sum(dim=1, keepdim=True), mask.sum(dim=1) - end  # (P, 1), (P,) tokens
    openers = (turn == 0).nonzero().squeeze(1)  # (V,)
    video = torch.searchsorted(openers, first)  # (P,) of V
    G, T = int(turn.max()) + 1, int(text.max()) + 1
    opening = prompt[openers[:, None], padding[openers] + torch.arange(end, device=device)]  # (V, end, D)
    texts = prompt.new_zeros(len(openers), G, T, D)
    asked = torch.zeros(len(openers), G, T, dtype=torch.bool, device=device)
    ahead = torch.arange(T, device=device)
    texts[video, turn] = prompt[rows[:, None], (padding + end + ahead).clamp(max=S - 1)]
    asked[video, turn] = ahead <= text[:, None]  # with the state after the last token
    place = torch.arange(S, device=device) - padding  # of each token in its video's sequence
    place = torch.where(place < end, place, place + turn[:, None] * (T - 1)).clamp(min=0)
    cache.source = video[:, None], place
    seen = torch.ones(opening.shape[:2], dtype=torch.bool, device=device)
    return decoder(opening, seen, texts, cache, asked)[video, turn, text]  # of (V, G, T, D)


def generate_at_once(model: VideoLM, prompts: Prompts, G: int, sampling: Sampling, uniforms) -> Completions:
    """`generate` without parts: one prefill, then a token a step for all of them until all have ended."""
    decoder = model.decoder
    P, T, device = len(prompts.prompt_ids), sampling.max_new_tokens, prompts.prompt_ids.device
    # Inference mode: no bookkeeping for views and versions, a tenth of the time where tensors are small.
    with torch.inference_mode(), joined(decoder):
        cache = KVCache(prompts.prompt_mask, G, T)
        state = prefill(model, prompts, cache).repeat_interleave(G, dim=0)  # (B, D)
        ids = torch.full((P * G, T), PAD_ID, device=device)
        logprobs = torch.zeros(P * G, T, device=device)
        mask = torch.zeros(P * G, T, dtype=torch.bool, device=device)
        all_ended, supports = torch.zeros(P * G, dtype=torch.bool, device=device), []
        rows, ended = torch.arange(P * G, device=device), all_ended  # of prompts that are still answered
        head = decoder.head.to(state.dtype)  # float32; a copy where the base is of 16 bits
        logits, sound = state.new_empty(P * G, len(head)), torch.ones((), dtype=torch.bool, device=device)
        step, captured = partial(decoder.step, cache=cache), decoder.captured and device.type == "cuda"
        for t in range(T):
            torch.mm(state, head.T, out=logits)
            scores = sampling_logprobs(logits, sampling.temperature, sampling.banned, None, reuse=True)
            sound &= scores[:, 0].isfinite().all()  # one logit that is not finite makes its row NaN
            if sampling.top_p < 1:
                support = nucleus(scores, sampling.top_p)
                packed = pack_support(support & ~ended[:, None])
                supports.append(packed.new_zeros(P * G, packed.shape[1]).index_copy_(0, rows, packed))
                scores = sampling_logprobs(scores, 1.0, None, support)  # renormalised over the nucleus
            token = pick(scores, None if uniforms is None else uniforms[:, :, t].flatten()[rows])
            token = torch.where(ended, PAD_ID, token)
            ids[rows, t], mask[rows, t] = token, ~ended
            taken = token.clamp(max=len(head) - 1)[:, None]  # a row of NaN, which `sound` knows, draws V
            logprobs[rows, t] = scores.gather(1, taken).squeeze(1).masked_fill(ended, 0.0)
            ended = ended | torch.isin(token, sampling.end_ids)
            all_ended[rows] = ended
            if t == T - 1 or t % LOOK_EVERY[device.type] == 0:
                if not sound:
                    raise BadInput(NOT_FINITE)
                answered = ended.view(-1, G).all(dim=1)
                if t == T - 1 or answered.all():
                    break
                half = len(answered) // 2
                if answered.sum() >= len(answered) - half and not captured:  # one half leaves
                    going = answered.to(torch.uint8).argsort(stable=True)[:half]
                    cache.keep(going)
                    rows, ended, token = (x.view(-1, G)[going].flatten() for x in (rows, ended, token))
                    logits = logits[: len(rows)]
            if captured and t == 0:
                step = Captured(step, token.view(P, G))
            state = step(token.view(-1, G), t).flatten(0, 1)
        used = mask.any(dim=0).sum().item()  # the longest completion: nothing was sampled after it
        support = torch.stack(supports[:used], dim=1) if supports else None
    return Completions(  # clones are ordinary tensors, for the loss
        completion_ids=ids[:, :used].clone(), completion_mask=mask[:, :used].clone(),
        logprobs=logprobs[:, :used].clone(), support=None if support is None else support.clone(),
        ended=all_ended.clone(), temperature=sampling.temperature, banned=sampling.banned,
    )  # fmt: skip


def answer(
    policy: VideoLM, questions: PromptSet, rows: Tensor, G: int, sampling: Sampling, uniforms: Tensor | None
) -> tuple[Completions, list[list[str]]]:
    """G answers to each of these questions: the completions, and their texts as P lists of G.

    rows (P,) int64, numbers of questions; uniforms (P, G, max_new_tokens) in [0, 1), None decodes greedily.
    """
    rollout = generate(policy, questions[rows], G, sampling, uniforms)
    texts = questions.texts(rollout)
    return rollout, [texts[p * G : (p + 1) * G] for p in range(len(rows))]


def completion_states(model: VideoLM, prompts: Prompts, completions: Completions) -> Tensor:
    """(B, T, D): the state that predicts each completion token, with gradient."""
    P = len(prompts.prompt_ids)
    prompt = model.embed_prompt(prompts.prompt_ids, prompts.prompt_mask, prompts.video_embeds)
    ids, mask = (x.unflatten(0, (P, -1)) for x in (completions.completion_ids, completions.completion_mask))
    own = model.decoder.embed_tokens(ids)  # (P, G, T, D)
    return model.decoder(prompt, prompts.prompt_mask, own, completion_mask=mask).flatten(0, 1)


def micro_batches(P: int, size: int) -> list[slice]:
    """Slices of at most `size` of P prompts; size 0: all in one."""
    return [slice(i, i + size) for i in range(0, P, size)] if size else [slice(0, P)][: min(P, 1)]


def rows_of(prompts: slice, G: int) -> slice:
    """The completions of these prompts: prompt p owns rows p * G .. p * G + G - 1."""
    return slice(prompts.start * G, prompts.stop * G)


def reference_states(policy: VideoLM, prompts: Prompts, completions: Completions, size: int) -> list[Tensor]:
    """The frozen reference's states of the completions, (b * G, T, D) for each micro-batch of `size` prompts.
    They wait in host memory: in the 7b preset they are 4.7 GB."""
    G = len(completions.ended) // max(len(prompts.prompt_ids), 1)
    with lora.using(policy.decoder, "reference"), joined(policy.decoder):
        micro = micro_batches(len(prompts.prompt_ids), size)
        return [completion_states(policy, prompts[p], completions[rows_of(p, G)]).cpu() for p in micro]
