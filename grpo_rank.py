"""GRPO_rank (Oracle-RLAIF, arXiv:2510.02561): from an oracle's order of G answers to a policy gradient.

    gain       DCG(r) = 1 / ((1 + r) * log2(2 + r))                                  dcg
    advantage  A_i = mean_j(delta_j) - delta_i, penalty delta_i = 1 - nDCG_i         rank_advantages
    ratio      rho_t = pi(y_t | y_<t) / pi_old(y_t | y_<t)                           sampling_logprobs
    loss       -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A)
               + kl_coef * KL(pi_ref || pi) - entropy_coef * H(pi)                   policy_loss, rollout_loss

Shape letters, here and in every other file, used for nothing else:
    P prompts   G group_size   B = P * G completions, prompt-major   S prompt tokens   T completion tokens
    V vocabulary   D width   K frames of a clip   N patches of a frame
and n, the token positions in a flat list of them. Masks are bool, True = counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bound on log-ratios before exp: no inf. Only a broken run moves a token by e^20 = 5e8 within a few steps.
MAX_LOG_RATIO = 20.0
# Bytes of a buffer of the walk: enough rows that a product is worth reading the head for.
CHUNK_BYTES = 2**26
# "Impossible" as a finite number: exp gives exactly 0, and no gradient meets inf - inf as with -inf.
IMPOSSIBLE = torch.finfo(torch.float32).min


def _expect(name: str, tensor: Tensor | None, shape: tuple, *dtypes: torch.dtype) -> None:
    """One line that names what was wanted and what came; None is an optional tensor left out."""
    if tensor is not None and (tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes):
        wanted = f"{tuple(shape)} {' or '.join(map(str, dtypes))}"
        raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)} {tensor.dtype}")


# ---- 1. from an order to advantages


def dcg(ranks: Tensor, gain: str = "divided") -> Tensor:
    """Gain of a place, 0 = best, DCG(0) = 1. Any shape, values >= 0 -> same shape, float32.

    gain  divided   1 / ((1 + r) * log2(2 + r))    as the paper prints it, the default
          appendix  log2(2 + r) / (1 + r)          the only one that gives the paper's worked example
    """
    if gain not in ("divided", "appendix") or (ranks < 0).any():
        raise ValueError(f"need gain divided | appendix and ranks >= 0, got {gain!r} and {ranks.tolist()}")
    place = ranks.float()
    log = torch.log2(2 + place)
    return 1 / ((1 + place) * log) if gain == "divided" else log / (1 + place)


def ranks_from_scores(scores: Tensor) -> Tensor:
    """Competition ranks: how many of the group score strictly higher. (..., G) -> (..., G) int64, 0 = best.

    Equal scores tie ([7, 9, 7, 1] -> [1, 0, 1, 3]); a double argsort would order them by accident. NaN, which
    has no place in an order, raises ValueError; infinities are fine.
    """
    if scores.dim() == 0 or scores.isnan().any():
        raise ValueError(f"scores must be (..., G) without NaN, got {tuple(scores.shape)}: {scores.tolist()}")
    return (scores[..., None, :] > scores[..., :, None]).sum(dim=-1)


def _shared_gains(name: str, ranks: Tensor, gain: str) -> Tensor:
    """Mean gain of the places a tie fills ([0, 0, 2]: 0, 1 | 2). (P, G) -> same, float32, of constant sum."""
    wanted = ranks_from_scores(-ranks)
    wrong = (ranks != wanted).any(dim=1)  # also out of 0..G-1
    if wrong.any():
        should, got = wanted[wrong][0].tolist(), ranks[wrong][0].tolist()
        raise ValueError(f"{name} must be competition ranks, 0 = best: {should}, got {got}")
    places = torch.arange(ranks.shape[1], device=ranks.device)
    first = ranks[:, :, None]
    ties = (first == ranks[:, None, :]).sum(dim=2, keepdim=True)  # (P, G, 1), itself mask
    fills = (places >= first) & (places < first + ties)  # (P, G, G): completion, place
    return (fills * dcg(places, gain)).sum(dim=2) / ties.squeeze(2)


def rank_advantages(
    oracle_ranks: Tensor, policy_ranks: Tensor | None = None,
    form: str = "ideal", gain: str = "divided", ok: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A_i = mean_j(delta_j) - delta_i, delta_i = 1 - nDCG_i. (P, G) int64 -> (P, G) float32, rows sum to 0.

    The paper leaves open what nDCG divides by (README). With oracle ranks r and policy ranks p:
      ideal     DCG(r_i) / DCG(0)     the default: monotone in the oracle's order whatever the policy thinks
      printed   DCG(p_i) / DCG(r_i)   as printed: pushes good answers down that the policy rates too low
      inverted  DCG(r_i) / DCG(p_i)
    printed and inverted need policy_ranks: the completions' places by the policy's own log-probability.

    Ranks are competition ranks, 0 = best. Every DCG is the mean gain of the places that tied completions
    fill, in both rankings, so policy == oracle gives exactly 0 in printed and inverted. Equal answers get
    equal advantages under ideal, under the other two only where the policy ties them as well.
    Exactly 0: a dead group (all oracle ranks equal), and a failed one (ok (P,) bool False), whose ranks are
    not read. No division by a standard deviation. ValueError: shape, dtype, G < 2, not competition ranks.
    """
    if oracle_ranks.dim() != 2 or oracle_ranks.shape[1] < 2:
        raise ValueError(f"oracle_ranks must be (P, G >= 2), got {tuple(oracle_ranks.shape)}")
    _expect("oracle_ranks", oracle_ranks, oracle_ranks.shape, torch.int64)
    _expect("policy_ranks", policy_ranks, oracle_ranks.shape, torch.int64)
    _expect("ok", ok, oracle_ranks.shape[:1], torch.bool)
    if form not in ("ideal", "printed", "inverted") or (form != "ideal" and policy_ranks is None):
        raise ValueError(f"form must be ideal, or printed | inverted with policy_ranks, got {form!r}")

    failed = torch.zeros_like(oracle_ranks[:, :1]).bool() if ok is None else ~ok[:, None]
    oracle_ranks = oracle_ranks.masked_fill(failed, 0)  # from here on a dead group
    ndcg = oracle_gain = _shared_gains("oracle_ranks", oracle_ranks, gain)  # ideal: DCG(0) is 1
    if form != "ideal":
        policy_gain = _shared_gains("policy_ranks", policy_ranks.masked_fill(failed, 0), gain)
        ndcg = policy_gain / oracle_gain if form == "printed" else oracle_gain / policy_gain
    penalty = 1 - ndcg
    advantages = penalty.mean(dim=1, keepdim=True) - penalty
    dead = (oracle_ranks == oracle_ranks[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(dead, 0.0)  # exactly 0, not the rounding error of a mean


# ---- 2. from advantages to a loss


def token_weights(mask: Tensor, norm: str, constant: float | None, num_tokens, num_sequences) -> Tensor:
    """(B, T) float64 share of each token in the step's mean, 0 outside the mask. Norms: see `policy_loss`."""
    if norm not in ("sequence", "token", "constant") or (norm == "constant" and not constant):
        raise ValueError(f"norm must be sequence, token, or constant with {constant=} set, got {norm!r}")
    count, other = (num_tokens, num_sequences) if norm == "token" else (num_sequences, num_tokens)
    if count is None and other is not None:
        raise ValueError(f"norm {norm!r} needs the step's other count, got {num_tokens=}, {num_sequences=}")
    lengths = mask.sum(dim=1, keepdim=True)  # (B, 1)
    if count is None:
        count = lengths.sum() if norm == "token" else (lengths > 0).sum()
    count = max(count, 1)  # no token in the step: loss 0, gradient 0
    if norm == "sequence":
        count = count * lengths.clamp(min=1)
    elif norm == "constant":
        count = count * constant
    return mask.double() / count


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_eps: float) -> tuple:
    """(rho, min(rho A, clip(rho) A), whether the clip binds), all of the shape of logprobs."""
    # Detached here: an old_logprobs with a graph would cancel the gradient and learn nothing, silently.
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return ratio, torch.minimum(unclipped, clipped), clipped < unclipped


def of_tokens(advantages: Tensor, shape: tuple) -> Tensor:
    """(B, T): an advantage for each token; one of a completion, (B,), is that of all its tokens."""
    advantages = advantages[:, None].expand(shape) if advantages.shape == shape[:1] else advantages
    _expect("advantages", advantages, shape, torch.float32, torch.float64)
    return advantages


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_eps: float, norm: str = "sequence", constant: float | None = None,
    kl: Tensor | None = None, kl_coef: float = 0.0, entropy: Tensor | None = None, entropy_coef: float = 0.0,
    num_tokens: int | Tensor | None = None, num_sequences: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A) + kl_coef KL - entropy_coef H per token, then normalised.

    This is the readable equation, over values that exist already. `rollout_loss` computes the same loss from
    hidden states, with its gradient, and never holds (B, T, V).

    logprobs, old_logprobs, kl, entropy (B, T) float32 or float64, nats; advantages (B,), or (B, T) where they
    differ from token to token (PPO), likewise; mask (B, T) bool, the end token inside. What mask leaves out
    is never read, not even a NaN. Dead groups, whose answers all tie, and groups whose ranking failed leave
    the step before this: they are no rows here.
    norm      sequence  mean over a completion's tokens, then over completions (the papers)
              token     sum / num_tokens
              constant  sum / (constant * num_sequences)
    num_tokens, num_sequences count the WHOLE step's tokens and its completions with any token, so that
    the losses of micro-batches or processes add up to the step's however it is split; default: this call's.

    Returns (loss, stats), stats being detached sums over this call's tokens, to add up and divide once:
      tokens, sequences   counts                         ratio, surrogate   sums over tokens
      clipped             tokens where the clip binds    kl, entropy        sums over tokens, where given
      loss                this call's share of the step's loss: adds up, divided by nothing
    ValueError: shape, dtype, unknown norm, a coefficient without its term, only the count that norm ignores.
    """
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must be (B, T), got {tuple(logprobs.shape)}")
    grids = {"logprobs": logprobs, "old_logprobs": old_logprobs, "kl": kl, "entropy": entropy}
    for name, grid in grids.items():  # no half precision: its ratios are off by percents
        _expect(name, grid, logprobs.shape, torch.float32, torch.float64)
    advantages = of_tokens(advantages, logprobs.shape)
    _expect("mask", mask, logprobs.shape, torch.bool)
    if (kl_coef and kl is None) or (entropy_coef and entropy is None):
        raise ValueError(f"{kl_coef=} and {entropy_coef=} need kl and entropy, got None")
    weights = token_weights(mask, norm, constant, num_tokens, num_sequences).to(logprobs.dtype)

    logprobs, old_logprobs = (x.masked_fill(~mask, 0.0) for x in (logprobs, old_logprobs))
    ratio, surrogate, clipped = clipped_surrogate(logprobs, old_logprobs, advantages.detach(), clip_eps)
    per_token = -surrogate
    if kl_coef:
        per_token = per_token + kl_coef * kl
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    loss = (per_token.masked_fill(~mask, 0.0) * weights).sum()

    sums = {"ratio": ratio, "surrogate": surrogate, "clipped": clipped, "kl": kl, "entropy": entropy}
    stats = {k: x.detach().masked_fill(~mask, 0).sum() for k, x in sums.items() if x is not None}
    counts = {"tokens": mask.sum(), "sequences": mask.any(dim=1).sum()}
    return loss, counts | stats | {"loss": loss.detach()}


# ---- 3. from logits to log-probabilities


def sampling_logprobs(
    logits: Tensor, temperature: float, banned: Tensor | None, support: Tensor | None, reuse: bool = False
) -> Tensor:
    """The distribution that is sampled from and trained: rollout and loss both call this one function.

    logits (n, V); banned (V,) bool: ids without probability; support (n, V) bool: the only ids with any.
    Returns (n, V) float32 log softmax(logits / temperature) over what is left, IMPOSSIBLE elsewhere.
    reuse: the result takes the memory of logits, float32 without gradient. float64 stays float64.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0 (greedy decoding is an argmax), got {temperature}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    out = logits if reuse else None
    logits = torch.div(logits, temperature, out=out)
    if banned is not None:
        logits = logits.masked_fill_(banned, IMPOSSIBLE)
    if support is not None:
        logits = logits.masked_fill_(~support, IMPOSSIBLE)
    return torch.log_softmax(logits, dim=-1, out=out)


def nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Smallest set of most likely ids whose probability reaches top_p, never empty. (n, V) -> (n, V) bool.

    Of equally likely ids at its border the lower ones stay. top_p = 1 needs no nucleus: support=None.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    probs, ids = logprobs.exp().sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs  # probability of all that is likelier
    inside = (before < max(top_p, torch.finfo(probs.dtype).tiny)) & (probs > 0)
    return torch.zeros_like(ids, dtype=torch.bool).scatter(-1, ids, inside)


def pack_support(support: Tensor) -> Tensor:
    """Eight ids a byte, the lowest id in the lowest bit. (..., V) bool -> (..., ceil(V / 8)) uint8."""
    bits = F.pad(support.to(torch.uint8), (0, -support.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_support(bits: Tensor, V: int) -> Tensor:
    """Inverse of pack_support. (..., ceil(V / 8)) uint8 -> (..., V) bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :V].bool()


def token_stats(logprobs: Tensor, ref_logprobs: Tensor | None, ids: Tensor) -> tuple:
    """Two (n, V) of sampling_logprobs, ids (n,) -> log pi(id), H(pi), KL(ref || pi) or None, each (n,)."""
    impossible = logprobs < IMPOSSIBLE / 2
    finite = logprobs.masked_fill(impossible, 0.0)  # 0 * IMPOSSIBLE is 0, but its backward can be 0 * inf
    entropy = -(logprobs.exp() * finite).sum(dim=-1)
    kl = None
    if ref_logprobs is not None:
        kl = (ref_logprobs.exp() * (ref_logprobs.masked_fill(impossible, 0.0) - finite)).sum(dim=-1)
    return logprobs.gather(-1, ids[:, None]).squeeze(-1), entropy, kl


# ---- 4. from hidden states to the loss and its gradient, in one walk


@dataclass(frozen=True)
class Objective:
    """The settings of the loss; each means what it means in `policy_loss`."""

    clip_eps: float = 0.2
    norm: str = "sequence"
    constant: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


class Tokens(NamedTuple):
    """The n sampled tokens that count, in a flat list."""

    ids: Tensor  # (n,) int64
    old_logprobs: Tensor  # (n,)
    advantages: Tensor  # (n,)
    weights: Tensor  # (n,) of token_weights
    support: Tensor | None  # (n, ceil(V / 8)) uint8 of pack_support


class KnownGradient(torch.autograd.Function):
    """Gives autograd a loss whose gradient in `hidden` is known already."""

    @staticmethod
    def forward(ctx, hidden, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None


def logits_to_gradient(buffers, tokens: Tokens, objective: Objective, temperature, banned, has_ref: bool):
    """The part of a chunk between its products, in two or three buffers (n, V) that it overwrites.

        c = dL / dlog p(y) = -w A rho, 0 where the clip binds
        dL/dz = (c (onehot(y) - p) + w kl_coef (p - q) + w entropy_coef p (log p + H)) / temperature

    z, p: logits and probabilities of the policy, q: probabilities of the reference, y: the sampled id, w: the
    token's weight. buffers: z, and if has_ref the reference's logits and a spare one, else the spare one.
    Returns (3, n) log p(y), H and KL (0 without reference); and dL/dz in one of the buffers.
    """
    logp, other, spare = buffers[0], buffers[1], buffers[-1]
    support = None if tokens.support is None else unpack_support(tokens.support, logp.shape[1])
    for logits in buffers[: 1 + has_ref]:
        sampling_logprobs(logits, temperature, banned, support, reuse=True)
    kl = torch.zeros_like(tokens.weights)
    if has_ref:
        q = torch.exp(other, out=spare)
        kl = torch.einsum("nv,nv->n", q, other.sub_(logp))
    p = torch.exp(logp, out=other)
    entropy = -torch.einsum("nv,nv->n", p, logp)
    ids = tokens.ids[:, None]
    logprobs = logp.gather(1, ids).squeeze(1)

    old_logprobs, clip_eps = tokens.old_logprobs, objective.clip_eps
    ratio, _, binds = clipped_surrogate(logprobs, old_logprobs, tokens.advantages, clip_eps)
    flat = binds | ((logprobs - old_logprobs).abs() > MAX_LOG_RATIO)
    weights = tokens.weights / temperature
    c = (-weights * tokens.advantages * ratio).masked_fill(flat, 0.0)
    slope = (objective.kl_coef * weights - c)[:, None]  # what p is multiplied by
    if objective.entropy_coef:  # clamped, because 0 * inf would not be 0
        of_entropy = logp.add_(entropy[:, None]).clamp_(min=-1e4)
        slope = of_entropy.mul_((objective.entropy_coef * weights)[:, None]).add_(slope)
    gradient = p.mul_(slope)
    if objective.kl_coef:
        gradient.addcmul_(q, (objective.kl_coef * weights)[:, None], value=-1)
    return torch.stack([logprobs, entropy, kl]), gradient.scatter_add_(1, ids, c[:, None])


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b. If b is bfloat16, so is the product: faster, and off in the third digit."""
    if a.dtype == b.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.to(b.dtype) @ b)


@torch.no_grad()
def walk(
    hidden: Tensor, ref_hidden: Tensor | None, head: Tensor, tokens: Tokens, objective: Objective,
    temperature: float, banned: Tensor | None, compile: Callable | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden, ref_hidden (n, D), head (V, D) -> (3, n) log-probabilities, entropy and KL, and the gradient of
    the loss in hidden, (n, D). Chunks of CHUNK_BYTES share their buffers, and nothing is computed twice."""
    (n, _), V, has_ref = hidden.shape, head.shape[0], ref_hidden is not None
    chunks = -(-n * V * hidden.element_size() // CHUNK_BYTES)
    size = -(-n // max(chunks, 1))  # rows of a chunk, as even as can be
    buffers, values, gradient = (
        hidden.new_empty(2 + has_ref, size, V), hidden.new_empty(3, n), torch.empty_like(hidden)
    )  # fmt: skip
    middle = compile(logits_to_gradient, hidden.device.type) if compile else logits_to_gradient
    for rows in (slice(start, start + size) for start in range(0, n, max(size, 1))):
        chunk = Tokens(*(None if x is None else x[rows] for x in tokens))
        used = buffers[:, : len(chunk.ids)]
        product(hidden[rows], head.T, out=used[0])
        if has_ref:
            product(ref_hidden[rows], head.T, out=used[1])
        values[:, rows], slopes = middle(used, chunk, objective, temperature, banned, has_ref)
        product(slopes, head, out=gradient[rows])
    return values, gradient


def rollout_loss(
    hidden: Tensor, head: Tensor, completions, advantages: Tensor, objective: Objective, *,
    ref_hidden: Tensor | None = None, num_tokens=None, num_sequences=None, compile: Callable | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """`policy_loss` of a micro-batch from its hidden states, with the gradient in them, in one walk.

    hidden (B, T, D) float32 or float64: the state that predicts each token; ref_hidden: that of the frozen
    reference, None: no KL. head (V, D), frozen, of the same dtype or bfloat16. advantages (B,) or (B, T).
    completions: a rollout.Completions. KL is the exact KL(pi_ref || pi) over the vocabulary. compile:
    machine.compiled.
    Returns (loss, stats) of `policy_loss`, and in stats "gap", the largest |log pi - log pi_old| of a token:
    a maximum, not a sum. ValueError: shape, dtype, a head that learns.
    """
    fits = hidden.dim() == 3 and head.dim() == 2 and hidden.shape[2] == head.shape[1]
    if not fits or head.dtype not in (hidden.dtype, torch.bfloat16) or head.requires_grad:
        got = [(tuple(x.shape), x.dtype, x.requires_grad) for x in (hidden, head)]
        raise ValueError(f"hidden, head must be (B, T, D), (V, D) of one dtype, head frozen, got {got}")
    (B, T, _), V, mask = hidden.shape, head.shape[0], completions.completion_mask
    ids, old, support = completions.completion_ids, completions.logprobs, completions.support
    _expect("completion_ids", ids, (B, T), torch.int64)
    advantages = of_tokens(advantages, (B, T))
    _expect("banned", completions.banned, (V,), torch.bool)
    _expect("support", support, (B, T, (V + 7) // 8), torch.uint8)
    _expect("ref_hidden", ref_hidden, hidden.shape, hidden.dtype)
    if objective.kl_coef and ref_hidden is None:
        raise ValueError(f"kl_coef {objective.kl_coef} needs ref_hidden, got None")

    counts = {"num_tokens": num_tokens, "num_sequences": num_sequences}
    weights = token_weights(mask, objective.norm, objective.constant, **counts).to(hidden.dtype)
    grids = hidden.detach(), ref_hidden, ids, old, advantages, weights, support
    positions = mask.flatten().nonzero().squeeze(1)  # (n,)
    rows = [None if x is None else x.flatten(0, 1).index_select(0, positions) for x in grids]
    sampling = completions.temperature, completions.banned
    values, gradient = walk(*rows[:2], head, Tokens(*rows[2:]), objective, *sampling, compile)

    def grid(values):  # (n, ..) -> (B, T, ..)
        places = values.new_zeros(B * T, *values.shape[1:])
        return places.index_copy_(0, positions, values).unflatten(0, (B, T))

    logprobs, entropy, kl = map(grid, values)
    kl = None if ref_hidden is None else kl
    terms = {"kl": kl, "entropy": entropy} | vars(objective) | counts
    loss, stats = policy_loss(logprobs, old, advantages, mask, **terms)
    stats["gap"] = (logprobs - old).masked_fill(~mask, 0.0).abs().amax()
    return KnownGradient.apply(hidden, loss, grid(gradient)), stats
