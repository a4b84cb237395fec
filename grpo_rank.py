"""GRPO_rank (Oracle-RLAIF, arXiv:2510.02561): from an oracle's order of G answers to a policy gradient.

    gain       DCG(r) = 1 / ((1 + r) * log2(2 + r))                                  dcg
    advantage  A_i = mean_j(delta_j) - delta_i, penalty delta_i = 1 - nDCG_i         rank_advantages
    ratio      rho_t = pi(y_t | y_<t) / pi_old(y_t | y_<t)                           completion_logprobs
    loss       -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A)
               + kl_coef * KL(pi_ref || pi) - entropy_coef * H(pi)                   policy_loss

Shape letters, here and in every other file, used for nothing else:
    P prompts   G group_size   B = P * G completions, prompt-major   S prompt tokens   T completion tokens
    V vocabulary   D width   K frames of a clip   N patches of a frame
and n, the token positions in a flat list of them. Masks are bool, True = counts.
"""

import functools
import os
import shutil
import sys
import sysconfig

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

# Bound on log-ratios before exp: no inf. Only a broken run moves a token by e^20 = 5e8 within a few steps.
MAX_LOG_RATIO = 20.0
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
    ties = (first == ranks[:, None, :]).sum(dim=2, keepdim=True)  # (P, G, 1), itself counted
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


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """KL per token from the sampled token alone, d = logprobs - ref_logprobs. Any shape -> same shape, nats.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (joschu.net/blog/kl-approx.html; k2 and k3 are >= 0).
    Over tokens drawn from pi the *values* of k1 and k3 average to KL(pi || ref), k2 nearly. Their *gradients*
    (all that a loss uses) do not follow: k1 gives 0, k2 that of KL(pi || ref), k3 that of KL(ref || pi).
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"estimator must be k1, k2 or k3 (exact: completion_logprobs), got {estimator!r}")
    d = logprobs - ref_logprobs.detach()
    k3 = torch.expm1((-d).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + d
    return {"k1": d, "k2": d.square() / 2, "k3": k3}[estimator]


def group_zscores(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO advantages: (R - mean) / (std + eps) of each group, std with ddof 1.

    rewards: (P, G). Returns (P, G) float32; a group whose rewards differ by no more than eps (rounding noise)
    is exactly 0.
    """
    assert rewards.dim() == 2, f"rewards must be (P, G), got {tuple(rewards.shape)}"
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    scores = centred / (rewards.std(dim=1, keepdim=True) + eps)
    tied = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True) <= eps
    return scores.masked_fill(tied, 0.0).float()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_eps: float, norm: str = "sequence", constant: float | None = None,
    kl: Tensor | None = None, kl_coef: float = 0.0, entropy: Tensor | None = None, entropy_coef: float = 0.0,
    num_tokens: int | Tensor | None = None, num_sequences: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A) + kl_coef KL - entropy_coef H per token, then normalised.

    logprobs, old_logprobs, kl, entropy (B, T) float32 or float64, nats; advantages (B,) likewise; mask (B, T)
    bool, the end token inside. What mask leaves out is never read, not even a NaN. Dead groups, whose answers
    all tie, and groups whose ranking failed leave the step before this: they are no rows here.
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
    _expect("advantages", advantages, logprobs.shape[:1], torch.float32, torch.float64)
    _expect("mask", mask, logprobs.shape, torch.bool)
    if (kl_coef and kl is None) or (entropy_coef and entropy is None):
        raise ValueError(f"{kl_coef=} and {entropy_coef=} need kl and entropy, got None")
    if norm not in ("sequence", "token", "constant") or (norm == "constant" and not constant):
        raise ValueError(f"norm must be sequence, token, or constant with {constant=} set, got {norm!r}")
    count, other = (num_tokens, num_sequences) if norm == "token" else (num_sequences, num_tokens)
    if count is None and other is not None:
        raise ValueError(f"norm {norm!r} needs the step's other count, got {num_tokens=}, {num_sequences=}")

    lengths = mask.sum(dim=1)  # (B,)
    tokens, sequences = lengths.sum(), (lengths > 0).sum()

    # Detached here: an old_logprobs with a graph would cancel the gradient and learn nothing, silently.
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantage = advantages.detach()[:, None]  # the same for every token of a completion
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage
    surrogate = torch.minimum(unclipped, clipped)

    per_token = -surrogate
    if kl_coef:
        per_token = per_token + kl_coef * kl
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    per_token = per_token.masked_fill(~mask, 0.0)
    shares = {"sequence": lengths.clamp(min=1)[:, None], "token": 1, "constant": constant}
    if count is None:
        count = tokens if norm == "token" else sequences
    loss = (per_token / shares[norm]).sum() / max(count, 1)  # no token in the step: loss 0, gradient 0

    sums = {"ratio": ratio, "surrogate": surrogate, "clipped": clipped < unclipped}
    sums |= {"kl": kl, "entropy": entropy}
    stats = {k: x.detach().masked_fill(~mask, 0).sum() for k, x in sums.items() if x is not None}
    return loss, {"tokens": tokens, "sequences": sequences, "loss": loss.detach(), **stats}


# ---- 3. from hidden states to log-probabilities


def sampling_logprobs(logits: Tensor, temperature: float, banned: Tensor | None, support: Tensor | None):
    """The distribution that is sampled from and trained: rollout and loss both call this one function.

    logits (n, V); banned (V,) bool: ids without probability; support (n, V) bool: the only ids with any.
    Returns (n, V) float32 log softmax(logits / temperature) over what is left, IMPOSSIBLE elsewhere.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0 (greedy decoding is an argmax), got {temperature}")
    logits = logits.float() / temperature
    if banned is not None:
        logits = logits.masked_fill(banned, IMPOSSIBLE)
    if support is not None:
        logits = logits.masked_fill(~support, IMPOSSIBLE)
    return F.log_softmax(logits, dim=-1)


def nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Smallest set of most likely ids whose probability reaches top_p, never empty. (n, V) -> (n, V) bool.

    Of equally likely ids at its border the lower ones stay. top_p = 1 needs no nucleus: support=None.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    probs, ids = logprobs.exp().sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs  # probability of all that is likelier
    return torch.zeros_like(ids, dtype=torch.bool).scatter(-1, ids, (before < top_p) & (probs > 0))


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


def _chunk_stats(hidden, ref_hidden, ids, bits, head, banned, temperature):
    """token_stats of one chunk of rows: the only place where rows are V wide, and none outlives the call."""
    support = None if bits is None else unpack_support(bits, head.shape[0])
    logprobs = sampling_logprobs(hidden @ head.T, temperature, banned, support)
    if ref_hidden is None:
        return token_stats(logprobs, None, ids)
    ref_logits = (ref_hidden @ head.T).detach()  # frozen, though the head may learn
    return token_stats(logprobs, sampling_logprobs(ref_logits, temperature, banned, support), ids)


def completion_logprobs(
    hidden: Tensor, head: Tensor, completion_ids: Tensor, completion_mask: Tensor, *,
    temperature: float = 1.0, banned: Tensor | None = None, support: Tensor | None = None,
    ref_hidden: Tensor | None = None, chunk_size: int = 1024, compile: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(logprobs, entropy, kl) of a completion's tokens, (B, T) float32 each, nats, 0 outside the mask.

    hidden (B, T, D): the state that predicts token t of completion_ids (B, T) int64; head (V, D), same dtype.
    completion_mask (B, T) bool. banned (V,) bool and support (B, T, ceil(V / 8)) uint8 of pack_support: those
    of the sampling, so that both sides of the ratio are one distribution at any temperature and top_p.
    ref_hidden (B, T, D): the frozen reference's states, taken through the same head (which adapters leave
    alone) over the same support, without gradient. Without it kl is None.

    kl is the exact KL(pi_ref || pi) = sum_v ref_v (log ref_v - log pi_v): the direction of the objective, and
    the one whose gradient k3 as a loss estimates. Its gradient in the logits is (pi - pi_ref) / temperature.
    Memory: the n masked positions go through head chunk_size rows at a time, each chunk recomputed in the
    backward, so neither (B, T, V) nor (n, V) ever exists. compile: see compiled(). ValueError: shape, dtype.
    """
    if hidden.dim() != 3 or head.dim() != 2 or hidden.shape[2] != head.shape[1] or hidden.dtype != head.dtype:
        got = [(tuple(x.shape), x.dtype) for x in (hidden, head)]
        raise ValueError(f"hidden, head must be (B, T, D), (V, D) of one dtype, got {got}")
    (B, T, _), V = hidden.shape, head.shape[0]
    _expect("completion_ids", completion_ids, (B, T), torch.int64)
    _expect("completion_mask", completion_mask, (B, T), torch.bool)
    _expect("banned", banned, (V,), torch.bool)
    _expect("support", support, (B, T, (V + 7) // 8), torch.uint8)
    _expect("ref_hidden", ref_hidden, hidden.shape, hidden.dtype)

    positions = completion_mask.flatten().nonzero().squeeze(1)  # (n,)
    n = len(positions)
    flat = [None if x is None else x.flatten(0, 1) for x in (hidden, ref_hidden, completion_ids, support)]
    chunk_stats, filled = _chunk_stats, positions
    if compile:  # one shape, one compilation: fill up with position 0, whose results are dropped
        chunk_stats = compiled(_chunk_stats, hidden.device.type)
        filled = F.pad(positions, (0, -n % chunk_size if n else chunk_size))
    chunks = []
    for chosen in filled.split(chunk_size):  # with n = 0 one empty chunk: a gradient of 0, not none at all
        rows = [None if x is None else x.index_select(0, chosen) for x in flat]
        args = (chunk_stats, *rows, head, banned, temperature)
        chunks.append(checkpoint(*args, use_reentrant=False, preserve_rng_state=False))

    def grid(parts: tuple) -> Tensor | None:  # [(chunk_size,), ..] -> (B, T)
        if parts[0] is None:
            return None
        values = torch.cat(parts)[:n]
        return values.new_zeros(B * T).index_copy(0, positions, values).view(B, T)

    logprobs, entropy, kl = map(grid, zip(*chunks, strict=True))
    return logprobs, entropy, kl


@functools.cache
def compiled(fn, device_type: str):
    """torch.compile(fn), static shapes, made once; fn itself, said on stderr, where the tools are missing."""
    compiler = os.environ.get("CC", "gcc") if device_type == "cuda" else os.environ.get("CXX", "g++")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")  # of Debian's python3-dev
    tools = {
        "Triton for this GPU": device_type != "cuda" or has_triton(),
        f"compiler {compiler!r}": shutil.which(compiler),
        header: os.path.isfile(header),
    }
    missing = [name for name, found in tools.items() if not found]
    if not missing:
        return torch.compile(fn, dynamic=False)
    print(f"compile: no {', no '.join(missing)}; {fn.__name__} runs uncompiled", file=sys.stderr)
    return fn
