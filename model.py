"""The video-language model: frozen CLIP patch tokens -> bridge (Q-Former) -> a small LLaMA-style decoder.

One attention function serves everything. A prompt's keys and values are computed once; its G completions
attend to that one copy, when sampling (`KVCache`, one token at a time) and when updating (all tokens at once,
with gradient).

Shape letters as in grpo_rank.py: P prompts, G group_size, S prompt tokens, T completion tokens, D width, K
frames, N patches of a frame.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import MOST_LAYERS, Clip, ClipConfig, preprocess

# The score of what may not be seen. Finite, so that a row of padding, which sees nothing, has no NaN.
HIDDEN = -1e30
# The same as a key's extra channel, before the scale: far below any score, and exact in 16 bits.
HIDDEN_KEY = -(2.0**14)
LONG = 256  # prompt tokens from which the fused kernels are faster, in both dtypes, forward and backward


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 512
    dim: int = 128  # D
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2  # grouped-query attention: num_heads / num_kv_heads queries share a key
    ffn_dim: int = 352
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    head_dim: int = 0  # 0: dim / num_heads
    tied: bool = True  # the output matrix is the embedding itself
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm of each head's queries and keys before they are rotated
    sliding_window: int = 0  # Mistral: a token sees itself and the window - 1 before it; 0: all
    rope_scaling: Literal["default", "linear", "llama3"] = "default"  # `periods`
    rope_factor: float = 1.0
    rope_low: float = 1.0  # llama3: wavelengths above rope_length / rope_low are stretched by rope_factor ...
    rope_high: float = 4.0  # ... and those below rope_length / rope_high stay as they are
    rope_length: int = 8192  # tokens of the first training
    max_positions: int = 0  # tokens of a sequence that the model was made for; 0: not known
    # The first three are a Bridge, the last two a Projector
    bridge: Literal["qformer", "patches", "pooled", "llava", "llava_pooled"] = "qformer"
    clip_layer: int = -2  # the hidden layer whose patch tokens the bridge reads
    video_start: int = 1  # tokens of a prompt before its video: BOS, or a chat template's opening
    bridge_width: int = 128  # of a Bridge's own layers; two linear layers lead from it to D
    bridge_heads: int = 4  # attention heads of the Q-Former
    num_queries: int = 32  # Q-Former tokens a video
    qformer_layers: int = 2
    num_frames: int = 8  # K
    framing: Literal["ffmpeg", "crop", "pad"] = "ffmpeg"  # how a frame becomes a square (read_frames)

    def __post_init__(self):
        if max(self.num_layers, self.qformer_layers) > MOST_LAYERS:
            raise ValueError(f"a decoder of {self.num_layers} and a Q-Former of {self.qformer_layers} layers")
        if self.bridge == "qformer" and (self.num_queries < 8 or self.num_queries % 8):
            raise ValueError(f"num_queries {self.num_queries}: a Q-Former asks equally often at 8 times")


# ------------------------------------------------------------------------------------------------ the decoder


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def periods(cfg: ModelConfig, device) -> Tensor:
    """(head_dim / 2,) positions a radian (RoPE, arXiv:2104.09864), stretched for long contexts if asked.

    llama3: slow turns, of which the first training saw less than rope_low, are slowed by rope_factor; fast
    ones, more than rope_high, are not; a linear ramp in between (as Llama 3.1 was trained).
    """
    head_dim = cfg.head_dim or cfg.dim // cfg.num_heads
    period = cfg.rope_theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    if cfg.rope_scaling == "default":
        return period
    turns = cfg.rope_length / (2 * math.pi * period)
    keep = ((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
    keep = torch.zeros_like(period) if cfg.rope_scaling == "linear" else keep
    return period / (keep + (1 - keep) / cfg.rope_factor)


def rotary(positions: Tensor, period: Tensor) -> tuple[Tensor, Tensor]:
    """(...) int64 positions, (h / 2,) positions a radian -> cos and signed sin, each (..., h) float32.

    `rotate` adds to each half of a vector the other half times this sin: minus in the first half.
    """
    angles = positions[..., None].float() / period
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + head_dim / 2) of the last dimension by its position's angle."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores of this dtype before a softmax: 0 where seen (bool), HIDDEN elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, HIDDEN)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, prefix=None) -> Tensor:
    """Attention of grouped completions to themselves and to one shared copy of their prompt.

    q (P, kv, G, rep, T, h): rep queries share a key (GQA). k, v (P, kv, G, L, h): the completions' own keys.
    bias of bias_of, broadcast to (P, 1, 1, 1, T, L). prefix: (k, v, bias) of the prompt, (P, kv, S, h) twice
    and (P, 1, 1, 1, 1 or T, S). Returns (P, kv, G, rep, T, h). One softmax over S + L scores, so the result
    is that of the unshared pass; the products with the prefix read its keys once for all G completions.
    """
    P, kv, G, rep, T, h = q.shape
    q = q * h**-0.5
    own = q.reshape(P, kv, G, rep * T, h) @ k.transpose(-1, -2)  # (P, kv, G, rep*T, L)
    scores = own.unflatten(3, (rep, T)) + bias
    if prefix is None:
        weights = scores.softmax(dim=-1)
        return (weights.flatten(3, 4) @ v).unflatten(3, (rep, T))
    prefix_k, prefix_v, prefix_bias = prefix
    S = prefix_k.shape[2]
    shared = q.reshape(P, kv, G * rep * T, h) @ prefix_k.transpose(-1, -2)  # (P, kv, G*rep*T, S)
    shared = shared.view(P, kv, G, rep, T, S) + prefix_bias
    weights = torch.cat([shared, scores], dim=-1).softmax(dim=-1)
    shared, own = weights.split([S, k.shape[3]], dim=-1)
    y = (shared.reshape(P, kv, G * rep * T, S) @ prefix_v).view(P, kv, G, rep, T, h)
    return y + (own.flatten(3, 4) @ v).unflatten(3, (rep, T))


def attend_long(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, window: int) -> Tensor:
    """Causal attention of a long prompt to itself, by PyTorch's fused kernels: memory linear in S.

    q (P, kv, rep, S, h), k, v (P, kv, S, h), mask (P, S) left-padded; window: the sliding window, 0: none.
    Returns (P, kv, rep, S, h). The kernels know no padding of rows beside causality, so padding is hidden by
    one more channel of the keys. A window is taken in blocks of queries, whose bias is the same for all.
    """
    P, kv, rep, S, h = q.shape
    extra = F.pad((~mask).to(k.dtype).mul(HIDDEN_KEY)[:, None, :, None], (0, 7))  # 8: kernels like multiples
    k = torch.cat([k, extra.expand(P, kv, S, 8)], dim=-1)
    q, v = F.pad(q, (0, 8), value=1.0).flatten(1, 2), F.pad(v, (0, 8))
    k, v = (x[:, :, None].expand(P, kv, rep, S, h + 8).flatten(1, 2) for x in (k, v))
    if not 0 < window < S:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=h**-0.5)
        return y[..., :h].unflatten(1, (kv, rep))
    size = max(window, LONG)  # queries of a block; they see the window before it
    ahead = torch.arange(size, device=q.device)[:, None] - torch.arange(-window, size, device=q.device)
    bias = bias_of((ahead >= 0) & (ahead < window), q.dtype)  # (size, window + size)
    blocks = []
    for start in range(0, S, size):
        stop, first = min(start + size, S), max(start - window, 0)
        part = bias[: stop - start, first - start + window : stop - start + window]
        near_k, near_v = k[:, :, first:stop], v[:, :, first:stop]
        y = F.scaled_dot_product_attention(q[:, :, start:stop], near_k, near_v, part, scale=h**-0.5)
        blocks.append(y)
    return torch.cat(blocks, dim=2)[..., :h].unflatten(1, (kv, rep))


def chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows (m,) int64 of x; None: all of them."""
    return x if rows is None else x.index_select(0, rows)


class Packing:
    """Padded sequences (P, L, ...) as rows (n, ...), one for each of their n tokens, and back.

    A layer works token by token on rows, in its large products too; only attention sees sequences. So nothing
    is computed for padding, but for what fills up a block of rows.
    """

    def __init__(self, kept: Tensor, block: int):
        """kept (P, L) bool: where there is a token. Places of padding fill n up to a multiple of `block`;
        block 0 takes all places."""
        self.shape, self.where = kept.shape, None  # (n,) places; None: all
        tokens = kept.flatten()
        n = -(-int(tokens.sum()) // block) * block if block else tokens.numel()
        if n < tokens.numel():
            self.where = tokens.to(torch.uint8).argsort(descending=True, stable=True)[:n]

    def rows(self, x: Tensor) -> Tensor:
        return chosen(x.flatten(0, 1), self.where)

    def sequences(self, rows: Tensor) -> Tensor:
        """With 0 in the padding."""
        if self.where is not None:
            rows = rows.new_zeros(self.shape.numel(), *rows.shape[1:]).index_copy_(0, self.where, rows)
        return rows.unflatten(0, self.shape)


class KVCache:
    """Keys and values of sampling. A layer has those of the prompt once, (P, kv, S, h) each, and those of its
    completions in one tensor (2, P, kv, G, room, h). A step writes its slot in place and reads them all, the
    empty ones hidden. There is room for BLOCK tokens, then for more, up to T."""

    BLOCK = 8

    def __init__(self, prompt_mask: Tensor, G: int, T: int):
        self.prompt_mask, self.G, self.T = prompt_mask, G, T
        self.room, self.prompt, self.own = 0, [], []
        self.rotary = None  # Decoder.prepare
        self.source = None  # (sequence, place) of each token of the prompts, (P, 1) and (P, S), if they share

    def begin(self, *pair: Tensor):
        """Takes the next layer's keys and values of the prefill, (sequences, kv, L, h) each."""
        if self.source is not None:
            pair = (x.transpose(1, 2)[self.source].transpose(1, 2) for x in pair)
        k, v = (x[:, :, : self.prompt_mask.shape[1]].contiguous() for x in pair)  # read in every step
        self.prompt.append((k, v))
        self.own.append(k.new_zeros(2, *k.shape[:2], self.G, 0, k.shape[3]))

    def make_room(self, tokens: int):
        if tokens > self.room:  # by a quarter at least, so that little is copied
            more = min(self.T, max(tokens, self.room + max(self.BLOCK, self.room // 4))) - self.room
            self.room += more
            for i, own in enumerate(self.own):  # layer by layer, so that no second cache is held
                self.own[i] = F.pad(own, (0, 0, 0, more))

    def keep(self, prompts: Tensor):
        """Drops all prompts but these, (m,) int64."""
        self.prompt_mask = self.prompt_mask[prompts]
        if self.rotary:
            self.prefix_bias, self.rotary = self.prefix_bias[prompts], [x[prompts] for x in self.rotary]
        for i, ((k, v), own) in enumerate(zip(self.prompt, self.own, strict=True)):  # also one by one
            self.prompt[i], self.own[i] = (k[prompts], v[prompts]), own[:, prompts]


class SelfAttention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.num_kv_heads, self.rep = cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads
        self.head_dim = cfg.head_dim or cfg.dim // cfg.num_heads
        self.q_proj = nn.Linear(cfg.dim, cfg.num_heads * self.head_dim, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.dim, cfg.num_kv_heads * self.head_dim, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.dim, cfg.num_kv_heads * self.head_dim, bias=cfg.qkv_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity() for _ in range(2)
        )
        self.o_proj = nn.Linear(cfg.num_heads * self.head_dim, cfg.dim, bias=False)
        self.joined = None  # machine.joined: q_proj, k_proj and v_proj in one product, and o_proj

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor, asking: Tensor | None):
        """x (..., D), cos, sin (..., h) -> q (..., kv, rep, h), k and v (..., kv, h), rotated; q only of the
        rows `asking`."""
        if self.joined is None:
            q, k, v = self.q_proj(chosen(x, asking)), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = self.joined[0].parts(x)
            q = chosen(q, asking)
        q = self.q_norm(q.unflatten(-1, (self.num_kv_heads, self.rep, self.head_dim)))
        q = rotate(q, chosen(cos, asking)[..., None, None, :], chosen(sin, asking)[..., None, None, :])
        k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = v.unflatten(-1, (self.num_kv_heads, self.head_dim))
        return q, rotate(k, cos[..., None, :], sin[..., None, :]), v

    def out(self, y: Tensor) -> Tensor:
        return self.o_proj(y) if self.joined is None else self.joined[1](y)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.up_proj = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.down_proj = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)
        self.joined = None  # machine.joined: gate_proj and up_proj in one product, and down_proj

    def forward(self, x: Tensor) -> Tensor:
        if self.joined is not None:
            gate, up = self.joined[0].parts(x)
            return self.joined[1](F.silu(gate).mul_(up))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(cfg), MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention, asking: Tensor | None = None) -> Tensor:
        """x (..., D) -> (..., D), or (m, D) for the m rows `asking`: the others only give their keys and
        values. `attention` maps the q, k, v of `SelfAttention.qkv` to (..., kv * rep * h)."""
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), cos, sin, asking)
        x = chosen(x, asking) + self.self_attn.out(attention(q, k, v))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A LLaMA-style causal language model. What LLaMA, Mistral and Qwen do differently is in the config."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.compute_dtype = torch.float32  # bfloat16: the matrix products of the layers run in it (autocast)
        self.checkpointing = False  # the backward pass keeps only a layer's input and computes it again
        self.row_block = 1  # products have a multiple of so many rows; 0: those of all padding as well
        self.one_dnn = False  # machine.pick_products
        self.captured = False  # on a GPU sampling replays one captured step (machine.Captured)
        nn.init.normal_(self.embed_tokens.weight, std=cfg.dim**-0.5)
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """(V, D) output matrix."""
        return self.embed_tokens.weight if self.cfg.tied else self.lm_head.weight

    def autocast(self):
        on = self.compute_dtype != torch.float32
        return torch.autocast(self.head.device.type, self.compute_dtype if on else torch.bfloat16, enabled=on)

    def score_dtype(self, x: Tensor) -> torch.dtype:
        """Of the layers' products, with x (..., D) coming in."""
        return x.dtype if self.compute_dtype == torch.float32 else self.compute_dtype

    def rotary(self, positions: Tensor):
        return rotary(positions, periods(self.cfg, positions.device))

    def near(self, asking: Tensor, asked: Tensor) -> Tensor:
        """Positions (..., T) and (..., S) -> (..., T, S) bool: within the sliding window."""
        return asking[..., None] - asked[..., None, :] < (self.cfg.sliding_window or math.inf)

    def forward(
        self, prompt: Tensor, prompt_mask: Tensor, completions: Tensor | None = None, cache=None,
        completion_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One pass over prompts and, behind them, G completions that share each prompt.

        prompt (P, S, D) embeddings, prompt_mask (P, S) left-padded; completions (P, G, T, D) embeddings,
        padded on the right; completion_mask (P, G, T), None: no padding. Returns (P, G, T, D): the states
        that predict completion tokens 0 .. T-1, that is the prompt's last state and the completion's states
        but its last; without completions (P, 1, 1, D). What the mask leaves out has no meaning. A `cache`
        keeps the prompt's keys and values for `step`.
        """
        (P, S, D), dtype = prompt.shape, self.score_dtype(prompt)
        if completions is None:
            completions = prompt.new_zeros(P, 1, 1, D)
        G, T = completions.shape[1], completions.shape[2] - 1  # a completion's last token predicts nothing
        if completion_mask is None:
            completion_mask = prompt_mask.new_ones(P, G, T + 1)
        positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)  # padding does not count
        slots = torch.arange(T, device=prompt.device)
        own = positions[:, -1:] + 1 + slots  # (P, T), the same for all G
        asking = positions[:, -1:] if S > LONG else positions  # the prompt's last state needs one row
        seen = prompt_mask[:, None] & self.near(asking, positions) & (asking[..., None] >= positions[:, None])
        prompt_bias = bias_of(seen, dtype).view(P, 1, 1, 1, -1, S)
        own_bias = bias_of((slots <= slots[:, None]) & self.near(slots, slots), dtype)  # (T, T)
        prefix_seen = prompt_mask[:, None] & self.near(own, positions)
        prefix_bias = bias_of(prefix_seen, dtype).view(P, 1, 1, 1, T, S)
        every, last, last_rows = self.packings(prompt_mask, completion_mask)

        def attention(q, k, v, asked: Packing):
            q = asked.sequences(q).permute(0, 2, 3, 1, 4)  # (P, kv, rep, L, h)
            k, v = (every.sequences(x).transpose(1, 2) for x in (k, v))  # (P, kv, L, h)
            asking = q.shape[3] - G * T  # prompt positions whose state is needed: all, in the last layer one
            q0, k0, v0 = q[..., :asking, :], k[:, :, :S], v[:, :, :S]
            if S > LONG and asking > 1:
                y = attend_long(q0, k0, v0, prompt_mask, self.cfg.sliding_window)
            else:
                bias = prompt_bias[..., -asking:, :]
                y = attend(q0[:, :, None], k0[:, :, None], v0[:, :, None], bias)[:, :, 0]
            if cache is not None:
                cache.begin(k, v)
            if T > 0:
                q1 = q[..., asking:, :].unflatten(3, (G, T)).transpose(2, 3)  # (P, kv, G, rep, T, h)
                k1, v1 = k[:, :, S:].unflatten(2, (G, T)), v[:, :, S:].unflatten(2, (G, T))
                y1 = attend(q1, k1, v1, own_bias, prefix=(k0, v0, prefix_bias))
                y = torch.cat([y, y1.transpose(2, 3).flatten(3, 4)], dim=3)
            return asked.rows(y.permute(0, 3, 1, 2, 4).flatten(2))

        # Prompt and completions travel as one sequence, so every matrix product of a layer is one product.
        x = every.rows(torch.cat([prompt, completions[:, :, :-1].flatten(1, 2)], dim=1))
        cos, sin = self.rotary(every.rows(torch.cat([positions, own.repeat(1, G)], dim=1)))
        with self.autocast():
            for layer in self.layers:
                final = layer is self.layers[-1]
                args = partial(attention, asked=last if final else every), last_rows if final else None
                if self.checkpointing and torch.is_grad_enabled() and cache is None:
                    args = layer, x, cos, sin, *args
                    x = checkpoint(*args, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
                else:
                    x = layer(x, cos, sin, *args)
        x = last.sequences(self.norm(x.float()))
        first, own = x[:, None, :1].expand(P, G, 1, D), x[:, 1:].view(P, G, T, D)
        return torch.cat([first, own], dim=2)

    def packings(self, prompt_mask: Tensor, completion_mask: Tensor) -> tuple[Packing, Packing, Tensor]:
        """The packing of all layers but the last, that of the last, and the numbers of its rows in the first.
        The last layer gives only a prompt's last state. prompt_mask (P, S), completion_mask (P, G, T)."""
        S = prompt_mask.shape[1]
        kept = torch.cat([prompt_mask, completion_mask[:, :, 1:].flatten(1)], dim=1)  # (P, L)
        every, last = Packing(kept, self.row_block), Packing(kept[:, S - 1 :], self.row_block)
        count = kept.numel() if every.where is None else len(every.where)
        numbers = every.sequences(torch.arange(count, device=kept.device))  # (P, L)
        return every, last, last.rows(numbers[:, S - 1 :])

    def prepare(self, cache: KVCache, dtype: torch.dtype):
        """What the steps need beside their tokens, for all T of them at once."""
        slots = torch.arange(cache.T, device=cache.prompt_mask.device)
        own = cache.prompt_mask.sum(dim=1, keepdim=True) + slots
        cache.rotary = self.rotary(own)  # of positions (P, T)
        cache.own_bias = bias_of((slots <= slots[:, None]) & self.near(slots, slots), dtype)  # (T, T)
        near = self.near(own, cache.prompt_mask.cumsum(dim=1) - 1)
        cache.prefix_bias = bias_of(cache.prompt_mask[:, None] & near, dtype)  # (P, T, S)

    def step(self, tokens: Tensor, t: int | Tensor, cache: KVCache) -> Tensor:
        """Token t of every completion in (P, G), the state that predicts token t + 1 out (P, G, D). With t an
        int64 tensor (1,) all shapes are the same at every t."""
        x = self.embed_tokens(tokens)  # (P, G, D)
        P, G = tokens.shape
        if cache.rotary is None:
            self.prepare(cache, self.score_dtype(x))
        at, room = (t, cache.T) if isinstance(t, Tensor) else (slice(t, t + 1), t + 1)
        cache.make_room(room)
        cos, sin = (table[:, at].expand(P, G, -1) for table in cache.rotary)
        own_bias = cache.own_bias[at, : cache.room].view(1, 1, 1, 1, 1, -1)
        prefix_bias = cache.prefix_bias[:, at].view(P, 1, 1, 1, 1, -1)
        for layer, own, prompt in zip(self.layers, cache.own, cache.prompt, strict=True):

            def attention(q, k, v, own=own, prompt=prompt):
                k, v = (x.transpose(1, 2).unsqueeze(3) for x in (k, v))  # (P, kv, G, 1, h)
                own[0, :, :, :, at], own[1, :, :, :, at] = k, v
                q = q.transpose(1, 2).unsqueeze(4)  # (P, kv, G, rep, 1, h)
                y = attend(q, *own, own_bias, prefix=(*prompt, prefix_bias))
                return y[..., 0, :].transpose(1, 2).flatten(2)

            with self.autocast():
                x = layer(x, cos, sin, attention)
        return self.norm(x.float())


# -------------------------------------------------------------------------------------------- video to tokens


def time_features(seconds: Tensor) -> Tensor:
    """Times in seconds (...) -> (..., 64): 32 sines and cosines, periods 0.5 s to 512 s in equal ratios."""
    periods = torch.logspace(-1, 9, 32, base=2.0, device=seconds.device)
    angles = seconds[..., None].float() * (2 * math.pi / periods)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class QFormerLayer(nn.Module):
    """Queries read the patches, then each other, then an MLP. Pre-norm."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        # How sharply a head prefers what is near its query's time and place: bias = -exp(slope) * distance.
        self.slopes = nn.Parameter(torch.linspace(1.5, -1.0, num_heads)[:, None].repeat(1, 2))
        # ... and how many frames before or after its own time a head looks: motion is seen by comparing.
        self.shifts = nn.Parameter(torch.tensor([0.0, 1.0, -1.0, 0.0]).repeat(num_heads // 4 + 1)[:num_heads])
        self.norm_cross, self.norm_self, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.cross_q, self.cross_kv, self.cross_out = (nn.Linear(dim, dim * m) for m in (1, 2, 1))
        self.self_qkv, self.self_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def heads(self, x: Tensor, parts: int):
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # parts x (P, heads, L, h)

    def forward(self, x: Tensor, patches: Tensor, frames_ahead: Tensor, cells_away: Tensor) -> Tensor:
        """x (P, Q, D), patches (P, K*N, D); how far the patches are ahead in time, (P, Q, K*N) frames, and
        away in space, (Q, K*N) cells -> (P, Q, D)."""
        (q,) = self.heads(self.cross_q(self.norm_cross(x)), 1)
        k, v = self.heads(self.cross_kv(patches), 2)
        time_slope, space_slope = self.slopes.exp().view(-1, 2, 1, 1).unbind(1)  # (heads, 1, 1) each
        frames_away = (frames_ahead[:, None] - self.shifts.view(-1, 1, 1)).abs()  # (P, heads, Q, K*N)
        bias = -time_slope * frames_away - space_slope * cells_away
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + self.cross_out(y.transpose(1, 2).flatten(2))
        q, k, v = self.heads(self.self_qkv(self.norm_self(x)), 3)
        x = x + self.self_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm_mlp(x))))


class Bridge(nn.Module):
    """CLIP patch tokens of K frames -> video tokens of the decoder's width D, by one of three ways:

    qformer  num_queries tokens. The queries stand on a grid: 8 even times of the clip, num_queries / 8 places
             of the picture at each. They read all patches of all frames, with a learned preference for what
             is near (locality is what resamplers lose: Honeybee, arXiv:2312.06742); then two linear layers.
             A patch also carries how it changes from frame to frame: places alone teach motion late.
    patches  all K * N tokens, then two linear layers (LLaVA-1.5 has only these two: `Projector`).
    pooled   K temporal tokens (mean over patches), N spatial tokens (mean over time), then two linear layers
             (VLM-RLAIF: K = 50, N = 576 -> 626).
    Frame-time embeddings are added in all three. All layers but the last two have the width bridge_width, so
    that what was aligned with one decoder serves another (`fc1` and `fc2` start anew).
    """

    NUM_TIMES = 8

    def __init__(self, cfg: ModelConfig, clip: ClipConfig):
        super().__init__()
        self.kind, self.num_frames, width = cfg.bridge, cfg.num_frames, cfg.bridge_width
        K, N = cfg.num_frames, clip.num_patches
        self.num_tokens = {"qformer": cfg.num_queries, "patches": K * N}.get(self.kind, K + N)
        self.norm, self.proj = nn.LayerNorm(clip.width), nn.Linear(clip.width, width)
        self.time_proj = nn.Linear(64, width)
        self.patch_position = nn.Parameter(torch.randn(N, width) * 0.5)
        self.fc1, self.fc2 = nn.Linear(width, cfg.dim), nn.Linear(cfg.dim, cfg.dim)
        if self.kind == "qformer":
            self.motion = nn.Linear(clip.width, width, bias=False)
            self.queries = nn.Parameter(torch.randn(cfg.num_queries // self.NUM_TIMES, width))
            layers = (QFormerLayer(width, cfg.bridge_heads) for _ in range(cfg.qformer_layers))
            self.layers = nn.ModuleList(layers)
            self.final_norm = nn.LayerNorm(width)

    def frame_tokens(self, video: Tensor) -> Tensor:
        """Of the video tokens (P, num_tokens, D) those of each frame: (P * K, tokens of a frame, D). With a
        Q-Former K must be NUM_TIMES."""
        video = video[:, : self.num_frames] if self.kind == "pooled" else video
        return video.reshape(len(video) * self.num_frames, -1, video.shape[2])

    def forward(self, patches: Tensor, frame_times: Tensor) -> Tensor:
        """patches (P, K, N, clip width), frame_times (P, K) seconds -> video_embeds (P, num_tokens, D)."""
        patches = self.norm(patches)
        x = self.proj(patches) + self.patch_position
        if self.kind == "qformer" and patches.shape[1] > 1:
            x = x + self.motion(torch.gradient(patches, dim=1)[0])
        x = x + self.time_proj(time_features(frame_times)).unsqueeze(2)  # (P, K, N, D)
        if self.kind == "pooled":
            x = pool(x)
        elif self.kind == "patches":
            x = x.flatten(1, 2)
        else:
            x = self.final_norm(self.read(x, frame_times))
        return self.fc2(F.gelu(self.fc1(x)))

    def read(self, x: Tensor, frame_times: Tensor) -> Tensor:
        """Patches (P, K, N, bridge_width) -> (P, num_queries, bridge_width)."""
        (_, K, N, _), places = x.shape, len(self.queries)
        spacing = (frame_times[:, -1:] - frame_times[:, :1]).clamp(min=1e-3) / max(K - 1, 1)  # (P, 1) seconds
        even = (torch.arange(self.NUM_TIMES, device=x.device) + 0.5) / self.NUM_TIMES
        centres = even * K - 0.5  # in frames
        times = frame_times[:, :1] + centres * spacing  # (P, 8) seconds
        frames_ahead = (frame_times[:, None] - times[:, :, None]) / spacing[:, None]  # (P, 8, K)
        frames_ahead = frames_ahead.repeat_interleave(places, dim=1)
        frames_ahead = frames_ahead.repeat_interleave(N, dim=2)  # (P, Q, K*N)
        cells_away = torch.cdist(grid(places, x.device), grid(N, x.device)) * places**0.5  # (places, N)
        cells_away = cells_away.repeat(self.NUM_TIMES, K)  # (Q, K*N)
        queries = self.queries + self.time_proj(time_features(times)).unsqueeze(2)  # (P, 8, places, D)
        queries, patches = queries.flatten(1, 2), x.flatten(1, 2)
        for layer in self.layers:
            queries = layer(queries, patches, frames_ahead, cells_away)
        return queries


class Projector(nn.Module):
    """LLaVA-1.5's two linear layers: patches (P, K, N, clip width) -> video_embeds (P, num_tokens, D).

    llava         all K * N projected patches, frame by frame
    llava_pooled  K temporal tokens, then N spatial ones, pooled after the projection (VLM-RLAIF)
    Neither knows the frames' times.
    """

    def __init__(self, cfg: ModelConfig, clip: ClipConfig):
        super().__init__()
        self.pooled, K, N = cfg.bridge == "llava_pooled", cfg.num_frames, clip.num_patches
        self.num_tokens = K + N if self.pooled else K * N
        self.linear_1, self.linear_2 = nn.Linear(clip.width, cfg.dim), nn.Linear(cfg.dim, cfg.dim)

    def forward(self, patches: Tensor, frame_times: Tensor) -> Tensor:
        x = self.linear_1(patches.to(self.linear_1.weight.dtype))
        x = self.linear_2(F.gelu(x)).float()  # (P, K, N, D)
        return pool(x) if self.pooled else x.flatten(1, 2)


def grid(n: int, device) -> Tensor:
    """(n, 2) centres of n cells that tile the unit square row by row, rows and columns as even as can be."""
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(n // rows) + 0.5, indexing="ij")
    return torch.stack([y.flatten() / rows, x.flatten() / (n // rows)], dim=1).to(device)


def pool(x: Tensor) -> Tensor:
    """(P, K, N, D) -> (P, K + N, D): K temporal tokens, then N spatial ones (VLM-RLAIF)."""
    return torch.cat([x.mean(dim=2), x.mean(dim=1)], dim=1)


# -------------------------------------------------------------------------------------------------- the whole


class VideoLM(nn.Module):
    """CLIP (frozen), bridge and decoder. A prompt is [opening] [video tokens] [question]; the opening,
    cfg.video_start tokens, is BOS alone in the small default."""

    def __init__(self, cfg: ModelConfig, clip_cfg: ClipConfig):
        super().__init__()
        self.cfg, self.clip_cfg = cfg, clip_cfg
        self.clip = Clip(clip_cfg).requires_grad_(False)
        self.bridge = (Projector if cfg.bridge.startswith("llava") else Bridge)(cfg, clip_cfg)
        self.decoder = Decoder(cfg)
        self.decoder_path = "model."  # of the decoder's layers in the model that PEFT would wrap

    @torch.no_grad()
    def patch_tokens(self, frames: Tensor) -> Tensor:
        """uint8 frames (P, K, 3, H, W) -> (P, K, N, clip width) float32: frozen, so computed once a clip; the
        products in the dtype of the decoder's."""
        with self.decoder.autocast():
            tokens = self.clip.patch_tokens(preprocess(frames.flatten(0, 1)), self.cfg.clip_layer)
        return tokens.float().unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def embed_video(self, frames: Tensor, frame_times: Tensor) -> Tensor:
        """uint8 frames (P, K, 3, H, W), frame_times (P, K) seconds -> frozen video_embeds (P, N_video, D)."""
        device = self.decoder.head.device
        return self.bridge(self.patch_tokens(frames.to(device)), frame_times.to(device))

    def embed_prompt(self, prompt_ids: Tensor, prompt_mask: Tensor, video_embeds: Tensor) -> Tensor:
        """(P, S) ids with placeholders -> (P, S, D): the video tokens stand where the prompt's layout says,
        cfg.video_start after the padding, whatever ids are there, even V, which has no row."""
        start = (~prompt_mask).sum(dim=1) + self.cfg.video_start  # (P,)
        slots = start[:, None] + torch.arange(video_embeds.shape[1], device=start.device)
        index = slots.unsqueeze(-1).expand(-1, -1, video_embeds.shape[2])
        x = self.decoder.embed_tokens(prompt_ids.clamp(max=self.cfg.vocab_size - 1))
        return x.scatter(1, index, video_embeds.to(x.dtype))
