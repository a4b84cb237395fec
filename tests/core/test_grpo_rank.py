"""The heart: vectors worked by hand, properties, gradients, and a slow plain path to agree with."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_rank
from grpo_rank import (
    Objective,
    dcg,
    nucleus,
    pack_support,
    policy_loss,
    rank_advantages,
    ranks_from_scores,
    rollout_loss,
    sampling_logprobs,
    token_stats,
    unpack_support,
)
from plumbing import machine

BEST_FIRST = [0, 1, 2, 3, 4]


def advantages_of(oracle, policy=None, form="ideal", gain="divided"):
    policy = None if policy is None else torch.tensor([policy])
    return rank_advantages(torch.tensor([oracle]), policy, form, gain)[0]


# ---- 1. gains, ranks, advantages


def test_both_gains_are_one_at_the_top_and_fall():
    # divided: 1/(1 log2 2), 1/(2 log2 3), 1/(3 log2 4); appendix: log2(2)/1, log2(3)/2, log2(4)/3
    assert_close(dcg(torch.arange(3)), torch.tensor([1.0, 0.315465, 1 / 6]), atol=1e-6, rtol=0)
    assert_close(dcg(torch.arange(3), "appendix"), torch.tensor([1.0, 0.792481, 2 / 3]), atol=1e-6, rtol=0)
    assert dcg(torch.zeros(2, 3, 4, dtype=torch.int64)).shape == (2, 3, 4)
    assert dcg(torch.arange(3, dtype=torch.float64)).dtype == torch.float32


VECTORS = [
    (BEST_FIRST, None, "ideal", "divided", [0.666566, -0.017969, -0.166768, -0.225765, -0.256064]),
    (BEST_FIRST, None, "ideal", "appendix", [0.288676, 0.081157, -0.044658, -0.130842, -0.194332]),
    ([0, 0, 2, 3, 3], None, "ideal", "divided", [0.324298, 0.324298, -0.166768, -0.240914, -0.240914]),
    ([0, 1, 1, 1, 1], None, "ideal", "divided", [0.666566] + [-0.166641] * 4),
    ([0, 0, 0, 0, 4], None, "ideal", "divided", [0.064016] * 4 + [-0.256064]),
    ([1, 0], None, "ideal", "divided", [-0.342268, 0.342268]),
    (
        list(range(8)),
        None,
        "ideal",
        "divided",
        [0.773301, 0.088766, -0.060032, -0.119030, -0.149328, -0.167331, -0.179080, -0.187266],
    ),
    (BEST_FIRST, [1, 0, 2, 3, 4], "printed", "divided", [-0.981613, 1.872847] + [-0.297078] * 3),
    (
        BEST_FIRST,
        [4, 3, 2, 1, 0],
        "printed",
        "divided",
        [-3.377316, -3.113384, -2.454687, -0.524740, 9.470126],
    ),
    (BEST_FIRST, [1, 0, 2, 3, 4], "inverted", "divided", [1.872847, -0.981613] + [-0.297078] * 3),
    (BEST_FIRST, [1, 0, 2, 3, 4], "printed", "appendix", [-0.218387, 0.250991] + [-0.010868] * 3),
]


@pytest.mark.parametrize("oracle, policy, form, gain, wanted", VECTORS)
def test_advantages_are_the_table_s(oracle, policy, form, gain, wanted):
    assert_close(advantages_of(oracle, policy, form, gain), torch.tensor(wanted), atol=1e-5, rtol=0)


@pytest.mark.parametrize("gain", ["divided", "appendix"])
@pytest.mark.parametrize("form", ["ideal", "printed", "inverted"])
@pytest.mark.parametrize("policy", [BEST_FIRST, [2, 2, 0, 0, 2]])
def test_dead_groups_are_exactly_zero(form, gain, policy):
    assert advantages_of([0] * 5, policy, form, gain).tolist() == [0.0] * 5


@pytest.mark.parametrize("form", ["printed", "inverted"])
@pytest.mark.parametrize("order", [BEST_FIRST, [3, 0, 0, 3, 2], [0, 1, 1, 1, 1]])
def test_printed_and_inverted_have_no_signal_where_the_policy_agrees(form, order):
    assert advantages_of(order, order, form).tolist() == [0.0] * 5


def test_ties_enter_printed_with_the_shared_gain_of_both_rankings():
    # Places 0, 1 share g = (1 + 0.315465) / 2 = 0.657732 (the oracle's tie); the policy says 0, 1, 2.
    # nDCG = 1 / g, 0.315465 / g, 1 = 1.520376, 0.479624, 1, whose mean is 1: A = nDCG - 1.
    assert_close(
        advantages_of([0, 0, 2], [0, 1, 2], "printed"),
        torch.tensor([0.520376, -0.520376, 0.0]),
        atol=1e-5,
        rtol=0,
    )


def test_of_all_120_policy_orders_only_ideal_never_inverts_the_oracle():
    orders = torch.tensor(list(itertools.permutations(range(5))))  # (120, 5) policy ranks
    oracle = torch.arange(5).expand(120, 5).contiguous()
    counts = {}
    for form in ("ideal", "printed", "inverted"):
        a = rank_advantages(oracle, orders, form)
        best_down = (a[:, 0] < -1e-6).sum().item()
        worst_above_best = (a[:, 4] > a[:, 0] + 1e-6).sum().item()
        monotone = (a.diff(dim=1) <= 1e-6).all(dim=1).sum().item()
        counts[form] = (best_down, worst_above_best, monotone)
    assert counts == {"ideal": (0, 0, 120), "printed": (119, 114, 1), "inverted": (23, 0, 9)}


def test_default_lifts_the_best_answer_that_the_policy_rates_last_and_printed_sinks_it():
    oracle, policy = torch.tensor([BEST_FIRST]), torch.tensor([BEST_FIRST[::-1]])
    default = rank_advantages(oracle, policy)[0]
    assert default[0] > 0 > default[4]
    assert_close(default, rank_advantages(oracle, None, "ideal", "divided")[0], atol=0, rtol=0)
    printed = rank_advantages(oracle, policy, "printed")[0]
    assert printed[0] < 0 < printed[4]


@pytest.mark.parametrize("form, low, high", [("ideal", 0.95, 1.0), ("printed", 0.0, 0.2)])
def test_a_categorical_policy_learns_under_ideal_and_unlearns_under_printed(form, low, high):
    generator = torch.Generator().manual_seed(0)
    quality = torch.linspace(0, 1, 12)  # of 12 answers; the policy starts unsure, at a mean quality of 0.5
    logits = torch.zeros(12, requires_grad=True)
    for _ in range(150):
        logprobs = logits.log_softmax(0)
        picks = torch.multinomial(logprobs.exp().detach(), 64 * 5, replacement=True, generator=generator)
        oracle = ranks_from_scores(quality[picks].view(64, 5))
        policy = ranks_from_scores(logprobs.detach()[picks].view(64, 5))
        a = rank_advantages(oracle, policy, form).flatten()
        lp = logprobs[picks][:, None]
        loss, _ = policy_loss(lp, lp.detach(), a, torch.ones(320, 1, dtype=torch.bool), clip_eps=0.2)
        (grad,) = torch.autograd.grad(loss, logits)
        logits = (logits - 2 * grad).detach().requires_grad_()
    assert low <= (logits.softmax(0) * quality).sum().item() <= high


def test_failed_rankings_give_exactly_zero_and_are_not_read():
    ranks = torch.tensor([[0, 1, 2], [-7, 99, 99], [1, 2, 0]])
    ok = torch.tensor([True, False, True])
    for form in ("ideal", "printed", "inverted"):
        a = rank_advantages(ranks, ranks.flip(1), form, ok=ok)
        assert a[1].tolist() == [0.0] * 3
        assert_close(a[::2], rank_advantages(ranks[::2], ranks.flip(1)[::2], form), atol=0, rtol=0)


def test_equal_scores_tie_and_nan_is_refused():
    assert ranks_from_scores(torch.tensor([7, 9, 7, 1])).tolist() == [1, 0, 1, 3]
    assert ranks_from_scores(torch.tensor([[-math.inf, 0.5], [0.5, 0.5]])).tolist() == [[1, 0], [0, 0]]
    assert ranks_from_scores(torch.zeros(2, 3, 4)).dtype == torch.int64
    with pytest.raises(ValueError, match="NaN"):
        ranks_from_scores(torch.tensor([1.0, math.nan]))


BAD_RANKS = [
    torch.tensor([0, 1, 2]),  # not (P, G)
    torch.tensor([[0.0, 1.0]]),  # not int64
    torch.tensor([[0, 1]], dtype=torch.int32),
    torch.tensor([[0]]),  # G = 1 has no order
    torch.tensor([[1, 2, 3]]),  # counts from 1
    torch.tensor([[0, -1, 1]]),
    torch.tensor([[0, 0, 1]]),  # dense, not competition
    torch.tensor([[1, 1, 2]]),
]


@pytest.mark.parametrize("ranks", BAD_RANKS)
def test_what_is_no_ranking_is_refused_for_either_side(ranks):
    with pytest.raises(ValueError, match="oracle_ranks must.*got"):
        rank_advantages(ranks)
    if ranks.shape == (1, 3):
        with pytest.raises(ValueError, match="policy_ranks must.*got"):
            rank_advantages(torch.tensor([[0, 1, 2]]), ranks, "printed")


def test_wrong_options_and_shapes_are_refused():
    ranks = torch.tensor([[0, 1, 2]])
    for wrong in (
        dict(form="other"),
        dict(gain="other"),
        dict(form="printed"),  # needs policy_ranks
        dict(policy_ranks=torch.tensor([[0, 1]])),
        dict(ok=torch.tensor([1])),
        dict(ok=torch.tensor([True, True])),
    ):
        with pytest.raises(ValueError):
            rank_advantages(ranks, **wrong)
    with pytest.raises(ValueError):
        dcg(torch.tensor([-1]))


@st.composite
def score_groups(draw):
    P, G = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    scores = st.lists(st.integers(0, draw(st.integers(1, 9))), min_size=G, max_size=G)
    return torch.tensor(draw(st.lists(scores, min_size=P, max_size=P)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(score_groups(), st.sampled_from(["divided", "appendix"]), st.randoms(use_true_random=False))
def test_advantages_of_any_ranking(scores, gain, random):
    ranks = ranks_from_scores(scores)
    G = ranks.shape[1]
    a = rank_advantages(ranks, gain=gain)
    assert_close(a.sum(dim=1), torch.zeros(len(a)), atol=2e-6, rtol=0)  # zero sum
    order = torch.tensor(random.sample(range(G), G))
    # A mean sums in another order after the shuffle: equal to rounding.
    assert_close(rank_advantages(ranks[:, order], gain=gain), a[:, order], atol=1e-6, rtol=0)
    for p in range(len(ranks)):
        assert rank_advantages(ranks[p : p + 1], gain=gain).equal(a[p : p + 1])  # groups do not meet
        for i, j in itertools.combinations(range(G), 2):
            if ranks[p, i] == ranks[p, j]:
                assert a[p, i] == a[p, j]
            else:
                assert (a[p, i] > a[p, j]) == (ranks[p, i] < ranks[p, j])
    shared = grpo_rank._shared_gains("ranks", ranks, gain)
    assert_close(shared.sum(dim=1), dcg(torch.arange(G), gain).sum().expand(len(ranks)), atol=1e-5, rtol=0)
    for form in ("printed", "inverted"):
        b = rank_advantages(ranks, ranks.flip(1), form, gain)
        assert_close(b.sum(dim=1), torch.zeros(len(b)), atol=1e-4, rtol=0)


# ---- 2. the loss


def loss_inputs(B=6, T=5, seed=0):
    """Log-probabilities near the old ones, ragged completions, one fully masked row; (B, T) and (B,)."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=generator)
    logprobs = (old + 0.4 * torch.randn(B, T, generator=generator)).requires_grad_()
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[2] = 0
    mask = torch.arange(T) < lengths[:, None]
    return logprobs, old, torch.randn(B, generator=generator), mask


def test_the_clip_binds_on_both_sides_for_both_signs_as_in_the_vector():
    logprobs = torch.full((4, 1), -1.0, requires_grad=True)
    old = torch.tensor([[-1.5], [-1.5], [-0.5], [-0.5]])  # ratio e^.5, e^.5, e^-.5, e^-.5
    a, mask = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, 1, dtype=torch.bool)
    for i, wanted in enumerate([-1.2, 1.648721, -0.606531, 0.8]):
        row = slice(i, i + 1)
        loss, stats = policy_loss(logprobs[row], old[row], a[row], mask[row], clip_eps=0.2)
        assert_close(loss.item(), wanted, atol=1e-6, rtol=0)
        assert stats["clipped"].item() == (i in (0, 3))
    loss, stats = policy_loss(logprobs, old, a, mask, clip_eps=0.2)
    assert_close(loss.item(), 0.160548, atol=1e-6, rtol=0)
    assert (stats["clipped"] / stats["tokens"]).item() == 0.5
    loss.backward()  # d(-rho A) = -rho A, a mean over 4; clipped tokens learn nothing
    assert_close(logprobs.grad[:, 0], torch.tensor([0, 1.648721, -0.606531, 0]) / 4, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm, wanted", [("token", 1.4), ("sequence", 2.0), ("constant", 0.875)])
def test_normalisers_are_the_vector(norm, wanted):
    # ratio 1, so a token's loss is -A: four tokens of loss 1, one of loss 3; an empty row adds nothing
    lp, a = torch.zeros(3, 4), torch.tensor([-1.0, -3.0, 50.0])
    mask = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    loss, _ = policy_loss(lp, lp, a, mask, clip_eps=0.2, norm=norm, constant=4)
    assert_close(loss.item(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up_to_the_step_in_loss_gradient_and_stats(norm, size):
    logprobs, old, a, mask = loss_inputs()
    kl, entropy = torch.rand(6, 5), torch.rand(6, 5)
    options = dict(clip_eps=0.2, norm=norm, constant=7, kl_coef=0.3, entropy_coef=0.1)
    whole, stats = policy_loss(logprobs, old, a, mask, kl=kl, entropy=entropy, **options)
    (wanted,) = torch.autograd.grad(whole, logprobs)
    options |= dict(num_tokens=int(stats["tokens"]), num_sequences=stats["sequences"])  # int or tensor
    total = {key: 0.0 for key in stats}
    for i in range(0, 6, size):
        rows = slice(i, i + size)
        parts = (logprobs[rows], old[rows], a[rows], mask[rows])
        loss, part = policy_loss(*parts, kl=kl[rows], entropy=entropy[rows], **options)
        loss.backward()
        total = {key: total[key] + part[key] for key in total}
    assert_close(logprobs.grad, wanted, atol=1e-6, rtol=0)
    assert_close(total["loss"], whole.detach(), atol=1e-6, rtol=0)
    for key in total:
        assert_close(total[key], stats[key], atol=1e-5, rtol=0, check_dtype=False)


def test_stats_are_sums_over_counted_tokens():
    logprobs, old, a, mask = loss_inputs()
    kl = torch.rand(6, 5)
    _, stats = policy_loss(logprobs, old, a, mask, clip_eps=0.2, kl=kl)
    ratio = (logprobs - old).exp().detach()
    assert stats["tokens"] == mask.sum() and stats["sequences"] == 5  # one of six rows has no token
    assert_close(stats["ratio"], ratio[mask].sum(), atol=1e-5, rtol=0)
    assert_close(stats["kl"], kl[mask].sum(), atol=1e-5, rtol=0)
    binds = ((ratio > 1.2) & (a[:, None] > 0)) | ((ratio < 0.8) & (a[:, None] < 0))
    assert stats["clipped"] == (binds & mask).sum() > 0
    assert "entropy" not in stats and not any(value.requires_grad for value in stats.values())


def test_nothing_outside_the_mask_is_read_not_even_nan():
    logprobs, old, a, mask = loss_inputs()
    kl = torch.rand(6, 5)
    options = dict(clip_eps=0.2, kl_coef=0.3, entropy_coef=0.2)
    wanted, wanted_stats = policy_loss(logprobs, old, a, mask, kl=kl, entropy=kl, **options)
    poison = torch.where(mask, 0.0, math.nan)
    dirty = (logprobs.detach() + poison).requires_grad_()
    a = torch.where(mask.any(dim=1), a, math.nan)  # an all-masked row's advantage is not read either
    loss, stats = policy_loss(dirty, old + poison, a, mask, kl=kl + poison, entropy=kl + poison, **options)
    loss.backward()
    assert_close((loss, stats), (wanted, wanted_stats), atol=0, rtol=0)
    assert dirty.grad.isfinite().all() and dirty.grad[~mask].eq(0).all()


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_a_step_without_tokens_has_loss_and_gradient_zero(norm):
    logprobs, old, a, mask = loss_inputs()
    options = dict(clip_eps=0.2, norm=norm, constant=7)
    loss, stats = policy_loss(logprobs, old, a, mask & False, **options)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == 0 and grad.eq(0).all() and stats["tokens"] == 0


def test_on_policy_gradient_is_reinforce_though_the_ratio_is_one():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(2, 3, generator=generator).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])  # 3 tokens in all
    a = torch.tensor([0.5, -0.5])
    # old_logprobs with a graph of its own must not cancel the gradient
    loss, stats = policy_loss(logprobs, logprobs, a, mask, clip_eps=0.2, norm="token")
    loss.backward()
    assert_close(logprobs.grad, -a[:, None] * mask / 3, atol=1e-7, rtol=0)
    assert stats["ratio"] == 3 and stats["clipped"] == 0


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_at_step_zero_ratio_is_one_kl_zero_and_the_loss_of_full_groups_zero(norm):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(10, 4, 8, generator=generator), torch.randn(20, 8, generator=generator)
    ids, mask = torch.randint(20, (10, 4), generator=generator), torch.ones(10, 4, dtype=torch.bool)
    a = rank_advantages(torch.tensor([[0, 1, 2, 3, 4], [2, 0, 0, 3, 3]])).flatten()
    old = sampling_logprobs(hidden @ head.T, 1.0, None, None).gather(-1, ids[..., None]).squeeze(-1)
    objective = Objective(norm=norm, constant=4, kl_coef=0.5)
    hidden.requires_grad_()
    loss, stats = rollout_loss(
        hidden, head, sampled(ids, mask, old), a, objective, ref_hidden=hidden.detach()
    )
    assert_close(stats["ratio"].item(), 40.0, atol=1e-4, rtol=0)
    assert stats["kl"] == 0 and stats["gap"] < 1e-5
    assert abs(loss.item()) < 1e-6
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.abs().max() > 1e-3  # and yet it learns


def test_kl_and_entropy_enter_with_their_sign_and_coefficient():
    lp, ones = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    kl, entropy = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]])
    options = dict(clip_eps=0.2, kl=kl, entropy=entropy, kl_coef=0.1, entropy_coef=0.01)
    loss, _ = policy_loss(lp, lp, torch.tensor([0.5]), ones, **options)
    assert_close(loss.item(), -0.5 + 0.1 * 2 - 0.01 * 3, atol=1e-6, rtol=0)


def test_a_broken_run_gives_finite_losses():
    lp = torch.tensor([[0.0, -500.0]], requires_grad=True)
    loss, _ = policy_loss(
        lp, lp.detach().flip(1), torch.tensor([-1.0]), torch.ones(1, 2).bool(), clip_eps=0.2
    )
    loss.backward()
    assert loss.isfinite() and lp.grad.isfinite().all()


def test_wrong_arguments_of_the_loss_are_refused():
    logprobs, old, a, mask = loss_inputs()
    good = dict(logprobs=logprobs, old_logprobs=old, advantages=a, mask=mask, clip_eps=0.2)
    policy_loss(**good)
    for wrong in (
        dict(logprobs=logprobs[0]),
        dict(old_logprobs=old[:, :1]),
        dict(logprobs=logprobs.bfloat16()),
        dict(advantages=a[:, None]),
        dict(advantages=a.view(2, 3)),
        dict(mask=mask.float()),
        dict(norm="mean"),
        dict(norm="constant"),
        dict(kl_coef=0.1),
        dict(entropy_coef=0.1),
        dict(kl=old[0], kl_coef=0.1),
        dict(num_tokens=9),  # sequence divides by num_sequences
        dict(num_sequences=9, norm="token"),
    ):
        with pytest.raises(ValueError):
            policy_loss(**(good | wrong))


# ---- 3. log-probabilities


def head_inputs(B=3, T=5, D=6, V=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator).requires_grad_()
    head = torch.randn(V, D, generator=generator).requires_grad_()
    ref_hidden = torch.randn(B, T, D, generator=generator)
    mask = torch.arange(T) < torch.tensor([T, 2, 4])[:, None]
    banned = torch.zeros(V, dtype=torch.bool)
    banned[[0, 7]] = True
    allowed = torch.rand(B, T, V, generator=generator) < 0.5
    allowed[..., 3] = True
    ids = torch.multinomial((allowed & ~banned).float().view(-1, V), 1, generator=generator).view(B, T)
    return hidden, head, ref_hidden, ids, mask, banned, allowed


def sampled(ids, mask, old, temperature=1.0, banned=None, support=None):
    """What `rollout_loss` reads of a rollout."""
    tensors = dict(completion_ids=ids, completion_mask=mask, logprobs=old, support=support)
    return SimpleNamespace(**tensors, temperature=temperature, banned=banned)


def changed(completions, **fields):
    return SimpleNamespace(**(vars(completions) | fields))


def plain_loss(hidden, head, completions, advantages, objective, ref_hidden=None, **counts):
    """The equations one by one, on a whole (B, T, V) table, with autograd's gradient."""
    (B, T), V = completions.completion_ids.shape, head.shape[0]
    support = completions.support
    support = None if support is None else unpack_support(support, V).flatten(0, 1)
    same = completions.temperature, completions.banned, support
    logprobs = sampling_logprobs((hidden @ head.T).flatten(0, 1), *same)
    ref = None if ref_hidden is None else sampling_logprobs((ref_hidden @ head.T).flatten(0, 1), *same)
    values = token_stats(logprobs, ref, completions.completion_ids.flatten())
    logprobs, entropy, kl = (x if x is None else x.view(B, T) for x in values)
    return policy_loss(
        logprobs, completions.logprobs, advantages, completions.completion_mask, clip_eps=objective.clip_eps,
        norm=objective.norm, constant=objective.constant, kl=kl, kl_coef=objective.kl_coef, entropy=entropy,
        entropy_coef=objective.entropy_coef, **counts,
    )  # fmt: skip


def walk_inputs(use_support, dtype=torch.float64, seed=0):
    """A rollout whose old log-probabilities are off by up to some tenths, so that the clip binds on both
    sides for both signs of the advantage."""
    hidden, head, ref_hidden, ids, mask, banned, allowed = head_inputs(seed=seed)
    hidden, head, ref_hidden = (x.detach().to(dtype) for x in (hidden, head, ref_hidden))
    support = allowed.flatten(0, 1) if use_support else None
    logprobs = sampling_logprobs((hidden @ head.T).flatten(0, 1), 0.7, banned, support)
    now = logprobs.gather(1, ids.view(-1, 1)).view(3, 5)
    shift = torch.tensor([[0.5, -0.5, 0.1, -0.1, 0.0], [0.4, -0.6, 0, 0, 0], [-0.05, 0.6, -0.7, 0, 0]])
    support = pack_support(allowed) if use_support else None
    completions = sampled(ids, mask, now + shift, 0.7, banned, support)
    advantages = torch.tensor([0.7, -0.4, -0.3], dtype=dtype)
    return hidden.requires_grad_(), head, ref_hidden, completions, advantages


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl_coef, entropy_coef", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@pytest.mark.parametrize("use_support", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 4, 64])
def test_the_walk_is_the_equation_in_value_gradient_and_stats(
    norm, kl_coef, entropy_coef, use_support, chunk_rows, monkeypatch
):
    hidden, head, ref_hidden, completions, advantages = walk_inputs(use_support)
    monkeypatch.setattr(grpo_rank, "CHUNK_BYTES", chunk_rows * 8 * head.shape[0])
    objective = Objective(
        clip_eps=0.2, norm=norm, constant=7, kl_coef=kl_coef, entropy_coef=entropy_coef
    )  # fmt: skip
    ref_hidden = ref_hidden if kl_coef else None
    args = hidden, head, completions, advantages, objective
    for counts in ({}, {"num_tokens": 31, "num_sequences": 9}):
        loss, stats = rollout_loss(*args, ref_hidden=ref_hidden, **counts)
        wanted, wanted_stats = plain_loss(*args, ref_hidden=ref_hidden, **counts)
        (grad,), (wanted_grad,) = (torch.autograd.grad(3 * x, hidden) for x in (loss, wanted))
        assert_close(loss, wanted, atol=1e-12, rtol=0)
        assert_close(grad, wanted_grad, atol=1e-12, rtol=0)
        assert wanted_grad.abs().max() > 1e-3 and grad[~completions.completion_mask].eq(0).all()
        assert_close(stats.pop("gap").item(), 0.7, atol=1e-6, rtol=0)
        assert_close(stats, wanted_stats, atol=1e-11, rtol=0)
        assert 0 < stats["clipped"] < stats["tokens"]


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_walks_over_micro_batches_add_up_to_the_step(norm):
    hidden, head, ref_hidden, completions, advantages = walk_inputs(True)
    objective = Objective(norm=norm, constant=7, kl_coef=0.3)
    whole, stats = rollout_loss(hidden, head, completions, advantages, objective, ref_hidden=ref_hidden)
    (wanted,) = torch.autograd.grad(whole, hidden)
    for i in range(3):
        cut = ("completion_ids", "completion_mask", "logprobs", "support")
        part = changed(completions, **{name: getattr(completions, name)[i : i + 1] for name in cut})
        rollout_loss(
            hidden[i : i + 1], head, part, advantages[i : i + 1], objective, ref_hidden=ref_hidden[i : i + 1],
            num_tokens=stats["tokens"], num_sequences=stats["sequences"],
        )[0].backward()  # fmt: skip
    assert_close(hidden.grad, wanted, atol=1e-12, rtol=0)


def test_a_walk_over_nothing_keeps_a_gradient_of_zero_and_without_gradient_gives_the_same_values():
    hidden, head, ref_hidden, completions, advantages = walk_inputs(False, torch.float32)
    completions.completion_mask = completions.completion_mask & False
    loss, stats = rollout_loss(hidden, head, completions, advantages, Objective(), ref_hidden=ref_hidden)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss == 0 and grad.eq(0).all() and stats["tokens"] == stats["gap"] == 0
    hidden, head, ref_hidden, completions, advantages = walk_inputs(False, torch.float32)
    loss, stats = rollout_loss(hidden, head, completions, advantages, Objective())
    with torch.no_grad():
        again, _ = rollout_loss(hidden, head, completions, advantages, Objective())
    assert "kl" not in stats and again == loss and not again.requires_grad and loss.requires_grad


def test_tokens_that_became_impossible_or_certain_leave_the_walk_finite():
    hidden, head, ref_hidden, completions, advantages = walk_inputs(False, torch.float32)
    hidden = (200 * hidden.detach()).requires_grad_()  # probabilities of exactly 0 and 1
    completions.logprobs = torch.full((3, 5), -300.0)
    for entropy_coef in (0.0, 5.0):
        objective = Objective(kl_coef=0.3, entropy_coef=entropy_coef)
        loss, _ = rollout_loss(hidden, head, completions, advantages, objective, ref_hidden=ref_hidden)
        (grad,) = torch.autograd.grad(loss, hidden)
        assert loss.isfinite() and grad.isfinite().all()


def test_the_gradient_of_kl_in_the_logits_is_policy_minus_reference():
    # which pins the direction: that of KL(pi || ref) would be pi * (log pi - log ref - KL)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, generator=generator).requires_grad_()
    ref = sampling_logprobs(torch.randn(4, 9, generator=generator), 1.0, None, None)
    _, _, kl = token_stats(sampling_logprobs(logits, 0.5, None, None), ref, torch.zeros(4, dtype=torch.int64))
    kl.sum().backward()
    assert_close(logits.grad, ((logits / 0.5).softmax(-1) - ref.exp()).detach() / 0.5, atol=1e-6, rtol=0)


def test_banned_and_unsupported_ids_have_probability_zero_and_no_gradient():
    hidden, head, ref_hidden, ids, mask, banned, allowed = head_inputs()
    logits = (40 * torch.randn(15, 19, generator=torch.Generator().manual_seed(2))).requires_grad_()
    keep = allowed.view(15, 19) & ~banned
    logprobs = sampling_logprobs(logits, 0.7, banned, allowed.view(15, 19))
    assert logprobs.exp()[~keep].eq(0).all()
    assert_close(logprobs.exp().sum(-1), torch.ones(15), atol=1e-5, rtol=0)
    stats = token_stats(logprobs, logprobs.detach(), ids.flatten())
    # weights far above 1: entropy and KL must not meet 0 * inf in the backward
    (grad,) = torch.autograd.grad(sum(1e3 * value.sum() for value in stats), logits)
    assert grad.isfinite().all() and grad[~keep].eq(0).all() and grad[keep].ne(0).any()


class Shapes(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes, forward or backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def kept_and_largest(loss_of, V, B=8, T=16, D=4):
    """Elements that autograd keeps for the backward, and of the largest tensor ever made, head aside."""
    hidden, ref_hidden = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    head, kept = torch.randn(V, D), []
    ids, mask = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.bool)
    completions = sampled(ids, mask, torch.full((B, T), -3.0))

    def keep(tensor):
        kept.append(0 if tensor.data_ptr() == head.data_ptr() else tensor.numel())
        return tensor

    with Shapes() as shapes, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective = Objective(kl_coef=0.1)
        loss, _ = loss_of(hidden, head, completions, torch.ones(B), objective, ref_hidden=ref_hidden)
        loss.backward()
    return sum(kept), shapes.largest


def test_memory_is_three_buffers_of_a_chunk_whatever_the_vocabulary(monkeypatch):
    monkeypatch.setattr(grpo_rank, "CHUNK_BYTES", 4 * 8000)
    kept, largest = kept_and_largest(rollout_loss, V=100)
    kept_wide, largest_wide = kept_and_largest(rollout_loss, V=1000)
    assert kept == kept_wide == 8 * 16 * 4  # the gradient in the states
    assert largest == 3 * 64 * 100 and largest_wide == 3 * 8000  # of the buffers, forward and backward
    plain_kept, plain_largest = kept_and_largest(plain_loss, V=1000)
    assert plain_kept > 8 * 16 * 1000 and plain_largest == 8 * 16 * 1000  # the yardstick sees the difference


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logprobs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]).log()
    assert nucleus(logprobs, 0.7).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert nucleus(logprobs, 0.8).tolist()[0] == [False, True, True, True]
    for least in (1e-6, 1e-46):  # the top id always, even of a share that is 0 in float32
        assert nucleus(logprobs, least).sum(-1).tolist() == [1, 1]
    assert nucleus(logprobs, 1.0)[0].all()
    banned = torch.tensor([False, True, False, False])
    assert not nucleus(sampling_logprobs(logprobs, 1.0, banned, None), 1.0)[:, 1].any()
    with pytest.raises(ValueError):
        nucleus(logprobs, 0.0)


@pytest.mark.parametrize("V", [1, 8, 13, 64, 65])
def test_support_survives_its_packing_into_bits(V):
    support = torch.rand(3, 2, V, generator=torch.Generator().manual_seed(V)) < 0.5
    bits = pack_support(support)
    assert bits.shape == (3, 2, math.ceil(V / 8)) and bits.dtype == torch.uint8
    assert unpack_support(bits, V).equal(support)
    assert pack_support(torch.arange(9) == 8).tolist() == [0, 1]  # lowest id in the lowest bit


def test_a_head_in_bfloat16_is_an_option_with_a_known_error():
    hidden, head, ref_hidden, completions, advantages = walk_inputs(False, torch.float32)
    objective = Objective()
    _, exact = rollout_loss(hidden, head, completions, advantages, objective)
    _, rough = rollout_loss(hidden, head.bfloat16(), completions, advantages, objective)
    assert 0 < abs(rough["gap"] - exact["gap"]) < 0.1  # of log-probabilities of up to 7 nats


def test_wrong_arguments_of_the_walk_are_refused():
    hidden, head, ref_hidden, completions, advantages = walk_inputs(True, torch.float32)
    good = dict(hidden=hidden, head=head, completions=completions, advantages=advantages)
    good |= dict(objective=Objective(), ref_hidden=ref_hidden)
    rollout_loss(**good)
    learns = head.clone().requires_grad_()
    wrong = [dict(hidden=hidden[0]), dict(hidden=hidden.bfloat16(), head=head.bfloat16()), dict(head=head.T)]
    wrong += [dict(head=learns), dict(ref_hidden=ref_hidden[:1]), dict(ref_hidden=ref_hidden.double())]
    wrong += [dict(advantages=advantages[:1]), dict(objective=Objective(kl_coef=0.1), ref_hidden=None)]
    wrong += [dict(objective=Objective(norm="mean")), dict(objective=Objective(), num_tokens=9)]
    for name, value in (
        ("completion_ids", completions.completion_ids[:, :1]),
        ("completion_ids", completions.completion_ids.int()),
        ("completion_mask", completions.completion_mask.long()),
        ("logprobs", completions.logprobs.bfloat16()),
        ("support", unpack_support(completions.support, head.shape[0])),
        ("support", completions.support[..., :1]),
        ("temperature", 0.0),
        ("banned", completions.banned[1:]),
    ):
        wrong.append(dict(completions=changed(completions, **{name: value})))
    for change in wrong:
        with pytest.raises(ValueError):
            rollout_loss(**(good | change))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "''"])  # the second is there, and broken
def test_compile_falls_back_where_the_tools_are_missing_and_says_so_once(monkeypatch, capsys, compiler):
    monkeypatch.setenv("CXX", compiler)
    machine.compiled.cache_clear()
    hidden, head, ref_hidden, completions, advantages = walk_inputs(True)
    monkeypatch.setattr(grpo_rank, "CHUNK_BYTES", 4 * 8 * head.shape[0])  # 4 rows: 11 are no multiple
    results = []
    args = hidden, head, completions, advantages, Objective(kl_coef=0.3, entropy_coef=0.1)
    for compile in (None, machine.compiled, machine.compiled):
        loss, _ = rollout_loss(*args, ref_hidden=ref_hidden, compile=compile)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    assert_close(results[1:], [results[0]] * 2, atol=1e-12, rtol=0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"no compiler {compiler!r} that works" in said
    completions.completion_mask = completions.completion_mask & False
    assert rollout_loss(*args, ref_hidden=ref_hidden, compile=machine.compiled)[0] == 0
    machine.compiled.cache_clear()


@pytest.mark.parametrize("language", ["c", "c++"])
def test_a_compiler_of_one_language_alone_is_enough_where_no_other_is_needed(tmp_path, monkeypatch, language):
    """Triton needs C, torch.compile for a CPU C++."""
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\ntest "$3" = "{language}"\n')  # behind -fsyntax-only -x
    script.chmod(0o755)
    found = {other: machine.works(str(script), other) for other in ("c", "c++")}
    assert found == {"c": language == "c", "c++": language == "c++"}
    asked = []
    monkeypatch.setattr(machine, "works", lambda compiler, language: asked.append(language))
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    for device in ("cuda", "cpu"):
        machine.compiled.__wrapped__(F.relu, device)
    assert asked == ["c", "c++"]


def test_compile_is_asked_for_where_the_tools_are_there(monkeypatch):
    monkeypatch.setattr(machine, "works", lambda compiler, language: True)
    monkeypatch.setattr(machine.os.path, "isfile", lambda path: True)
    seen = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: seen.append(options) or fn)
    machine.compiled.cache_clear()
    assert machine.compiled(F.relu, "cpu") is F.relu and seen == [{}]
    monkeypatch.setattr(machine, "has_triton", lambda: False)
    assert machine.compiled(F.relu, "cuda") is F.relu and len(seen) == 1  # no Triton: not even tried
    machine.compiled.cache_clear()


def test_a_nucleus_that_has_reached_top_p_exactly_takes_no_further_id():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert probs.log().exp().equal(probs)  # so that the border is met exactly
    for top_p, size in ((0.5, 1), (0.75, 2), (0.875, 3)):
        assert nucleus(probs.log(), top_p).sum() == size


@pytest.mark.parametrize("sign", [1, -1])
def test_far_ratios_are_exact_up_to_the_bound_and_flat_behind_it_in_the_walk_as_in_the_equation(sign):
    hidden, head, _, completions, advantages = walk_inputs(False)
    completions.logprobs[0] += torch.tensor([-24.0, 24.0, -5.0, 5.0, 0.0])  # of the policy that sampled
    args = hidden, head, completions, sign * advantages, Objective()
    results = []
    for loss, stats in (rollout_loss(*args), plain_loss(*args)):
        results.append((loss, *torch.autograd.grad(loss, hidden), stats["ratio"]))
    assert_close(*results, atol=1e-9, rtol=1e-9)
    rows = dict(
        logprobs=torch.zeros(1, 2), old_logprobs=torch.tensor([[-19.0, 0.5]]), advantages=torch.ones(1)
    )
    _, stats = policy_loss(**rows, mask=torch.ones(1, 2).bool(), clip_eps=0.2)
    assert_close(stats["ratio"].item(), math.exp(19) + math.exp(-0.5), atol=0, rtol=1e-6)


def test_the_gap_is_of_either_sign():
    hidden, head, _, completions, advantages = walk_inputs(False)  # log pi_old - log pi in -0.7 .. 0.6
    for off, gap in ((2.0, 2.6), (-2.0, 2.7)):
        moved = changed(completions, logprobs=completions.logprobs + off)
        _, stats = rollout_loss(hidden, head, moved, advantages, Objective())
        assert_close(stats["gap"].item(), gap, atol=1e-6, rtol=0)


def test_log_probabilities_of_logits_in_16_bits_are_float32():
    logits = torch.tensor([[1.0, 2.0, 4.0]]).bfloat16()
    found = sampling_logprobs(logits, 0.7, None, None)
    assert_close(found, (logits.float() / 0.7).log_softmax(-1), atol=1e-6, rtol=0)
