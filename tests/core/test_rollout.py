from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import lora
import rollout as rollout_module
from clip import ClipConfig
from data import Prompts
from grpo_rank import IMPOSSIBLE, Objective, rollout_loss, sampling_logprobs
from model import KVCache, ModelConfig, VideoLM
from rollout import Sampling, completion_states, draw, generate

V, P, G, T, PAD = 40, 3, 4, 6, 0
CFG = ModelConfig(vocab_size=V, dim=32, num_layers=2, ffn_dim=48, num_queries=8, qformer_layers=1)
CLIP = ClipConfig(image_size=16, patch_size=8, width=16, num_layers=1, text_layers=1, vocab_size=V)
BANNED = torch.arange(V) < 8
END = torch.tensor([9, 10, 11])
SAMPLINGS = [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (0.3, 1.0)]  # temperature, top_p


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VideoLM(CFG, CLIP).requires_grad_(False)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(14) >= torch.tensor([[3], [0], [1]])
    ids = torch.randint(0, V, (P, 14), generator=generator)
    return Prompts(ids, mask, torch.randn(P, 8, CFG.dim, generator=generator))


def uniforms_of(seed):
    return torch.rand(P, G, T, generator=torch.Generator().manual_seed(seed))


def sample(model, prompts, seed=2, rows=slice(None), **options):
    sampling = Sampling(**{"max_new_tokens": T, "end_ids": END, "banned": BANNED} | options)
    return generate(model, prompts[rows], G, sampling, uniforms_of(seed)[rows])


@pytest.mark.parametrize(("temperature", "top_p"), SAMPLINGS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-3)])
def test_sampling_and_training_give_one_logprob(prompts, temperature, top_p, dtype, allowed):
    torch.manual_seed(0)
    model = VideoLM(CFG, CLIP)
    for i, parameter in enumerate(lora.add_adapters(model.decoder, 4, 8.0)):
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(i))  # no longer the start
    model.decoder.compute_dtype = dtype
    rollout = sample(model, prompts, temperature=temperature, top_p=top_p)
    states = completion_states(model, prompts, rollout)
    _, stats = rollout_loss(states, model.decoder.head, rollout, torch.zeros(P * G), Objective())
    assert stats["gap"] <= allowed
    with lora.using(model.decoder, "off"):  # the yardstick sees another policy
        states = completion_states(model, prompts, rollout)
        _, stats = rollout_loss(states, model.decoder.head, rollout, torch.zeros(P * G), Objective())
    assert stats["gap"] > 0.05
    assert rollout.logprobs[rollout.completion_mask].min() > -20 and rollout.logprobs.min() < -0.5


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="the order of AMX's sums was never measured")
def test_in_16_bits_a_step_sums_in_the_order_of_training():
    """A sum in another order rounds to another value now and then: log-probabilities off by hundredths."""
    P, G, T, lengths = 6, 5, 8, torch.tensor([[48], [29], [33], [40], [37], [31]])
    torch.manual_seed(0)
    cfg = replace(CFG, dim=96, num_layers=6, num_heads=6, num_kv_heads=2, ffn_dim=256)
    model = VideoLM(cfg, CLIP).requires_grad_(False)
    for i, parameter in enumerate(lora.add_adapters(model.decoder, 4, 8.0)):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    model.decoder.compute_dtype, gaps = torch.bfloat16, []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, V, (P, 48), generator=generator)
        mask = torch.arange(48) >= 48 - lengths  # as collate_prompts pads
        prompts = Prompts(ids, mask, torch.randn(P, 8, cfg.dim, generator=generator))
        uniforms = torch.rand(P, G, T, generator=generator)
        rollout = generate(model, prompts, G, Sampling(T, END, BANNED), uniforms)
        states = completion_states(model, prompts, rollout)
        _, stats = rollout_loss(states, model.decoder.head, rollout, torch.zeros(P * G), Objective())
        gaps.append(stats["gap"].item())
    assert max(gaps) <= 5e-3, gaps


@pytest.mark.parametrize(("temperature", "top_p"), SAMPLINGS)
def test_banned_ids_are_never_sampled(model, prompts, temperature, top_p):
    likely = torch.ones(V, dtype=torch.bool)
    likely[[12, 20]] = False  # all but two ids banned: whatever is drawn, it is one of these
    for banned in (BANNED, likely):
        rollout = sample(model, prompts, banned=banned, temperature=temperature, top_p=top_p)
        assert not banned[rollout.completion_ids[rollout.completion_mask]].any()
    logprobs = sampling_logprobs(model.decoder.head @ model.decoder.head.T, 1.0, BANNED, None)
    assert logprobs[:, BANNED].exp().eq(0).all()


def test_any_end_id_ends_and_is_the_last_that_counts(model, prompts):
    ends = set()
    for seed in range(12):
        rollout = sample(model, prompts, seed, temperature=1.5)
        rows = rollout.completion_ids, rollout.completion_mask, rollout.logprobs, rollout.ended
        for ids, mask, logprobs, ended in zip(*rows, strict=True):
            at = torch.isin(ids, END).nonzero().flatten()
            length = at[0] + 1 if len(at) else len(ids)
            assert ended == bool(len(at)) and mask.tolist() == [t < length for t in range(len(ids))]
            assert (logprobs[:length] < 0).all() and (logprobs[length:] == 0).all()
            assert (ids[length:] == PAD).all()
            ends |= set(ids[at].tolist())
    assert ends == set(END.tolist())


def test_it_stops_when_all_have_ended(model, prompts, monkeypatch):
    calls, real = [], model.decoder.step
    monkeypatch.setattr(
        model.decoder, "step", lambda *args, **cache: calls.append(args) or real(*args, **cache)
    )
    assert sample(model, prompts, end_ids=torch.arange(V)).completion_ids.shape == (P * G, 1)
    assert not calls
    rollout = sample(model, prompts, end_ids=torch.tensor([], dtype=torch.int64))
    assert len(calls) == T - 1 and not rollout.ended.any() and rollout.completion_mask.all()


def test_a_step_of_one_shape_for_all_t_gives_the_states_of_a_growing_one(model, prompts):
    """What a GPU captures once and replays: t is a tensor, and the slots behind it hold rubbish."""
    tokens, states = torch.randint(8, V, (P, G, T), generator=torch.Generator().manual_seed(5)), []
    for position in (int, lambda t: torch.tensor([t])):
        cache = KVCache(prompts.prompt_mask, G, T)
        embeds = model.embed_prompt(prompts.prompt_ids, prompts.prompt_mask, prompts.video_embeds)
        model.decoder(embeds, prompts.prompt_mask, cache=cache)
        model.decoder.step(tokens[:, :, 0] + 1, position(0), cache)
        for own in cache.own:
            own[..., 1:, :] = 1e4
        states.append([model.decoder.step(tokens[:, :, t], position(t), cache) for t in range(T)])
    for growing, static in zip(*states, strict=True):
        torch.testing.assert_close(static, growing, atol=1e-5, rtol=0)


def test_looking_seldom_whether_all_have_ended_changes_nothing(model, prompts, monkeypatch):
    """A GPU looks at every eighth token: what was sampled behind the last end is dropped again."""
    options = dict(seed=5, end_ids=torch.arange(8, 28), top_p=0.9)
    often = sample(model, prompts, **options)
    monkeypatch.setitem(rollout_module.LOOK_EVERY, "cpu", 8)
    seldom = sample(model, prompts, **options)
    assert 1 < often.completion_ids.shape[1] < T  # the last ends between two looks
    for name in ("completion_ids", "completion_mask", "support", "ended"):
        assert getattr(often, name).equal(getattr(seldom, name)), name
    torch.testing.assert_close(often.logprobs, seldom.logprobs, atol=1e-5, rtol=0)


def test_prompts_that_are_answered_leave_and_change_nothing(model, prompts, monkeypatch):
    """Where the answers of half the prompts have ended, the others go on alone, with the same draws."""
    options, left = dict(end_ids=torch.arange(8, 28), top_p=0.9), []
    real = KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda cache, going: left.append(len(going)) or real(cache, going))
    for seed in range(20):
        shrinking = sample(model, prompts, seed, **options)
        with monkeypatch.context() as patch:  # never looking, all stay to the end
            patch.setitem(rollout_module.LOOK_EVERY, "cpu", T)
            whole = sample(model, prompts, seed, **options)
        for name in ("completion_ids", "completion_mask", "support", "ended"):
            assert getattr(shrinking, name).equal(getattr(whole, name)), name
        torch.testing.assert_close(shrinking.logprobs, whole.logprobs, atol=1e-5, rtol=0)
    assert set(left) == {1}  # of 3 prompts


def test_a_row_depends_on_its_own_uniforms_alone(model, prompts):
    whole, again = sample(model, prompts, top_p=0.9), sample(model, prompts, top_p=0.9)
    assert torch.equal(whole.completion_ids, again.completion_ids)
    assert not torch.equal(whole.completion_ids, sample(model, prompts, seed=3, top_p=0.9).completion_ids)
    for rows in (slice(0, 1), slice(1, 3)):  # the same prompts in two calls
        part = sample(model, prompts, rows=rows, top_p=0.9)
        used = part.completion_ids.shape[1]
        mine = whole[slice(rows.start * G, rows.stop * G)]
        assert torch.equal(part.completion_ids, mine.completion_ids[:, :used])
        assert not mine.completion_mask[:, used:].any()
        torch.testing.assert_close(part.logprobs, mine.logprobs[:, :used], atol=1e-4, rtol=0)


def test_where_a_uniform_is_nan_the_answer_is_greedy_and_the_others_stay(model, prompts):
    mixed, sampling, found = uniforms_of(2), Sampling(T, END, BANNED), []
    mixed[:, 0] = torch.nan
    for uniforms in (uniforms_of(2), mixed, None):
        ids = generate(model, prompts, G, sampling, uniforms).completion_ids
        found.append(F.pad(ids, (0, T - ids.shape[1])).view(P, G, T))
    drawn, both, greedy = found
    assert both[:, 0].equal(greedy[:, 0]) and both[:, 1:].equal(drawn[:, 1:])
    assert not both[:, 0].equal(drawn[:, 0])


def test_greedy_is_the_argmax_of_a_pass_without_cache(model, prompts):
    rollout = generate(model, prompts, 1, Sampling(T, torch.tensor([V]), BANNED))
    mask = prompts.prompt_mask
    x = model.embed_prompt(prompts.prompt_ids, mask, prompts.video_embeds)
    for t in range(T):
        logits = model.decoder(x, mask)[:, 0, 0] @ model.decoder.head.T
        token = logits.masked_fill(BANNED, -torch.inf).argmax(dim=-1)
        assert torch.equal(rollout.completion_ids[:, t], token)
        x = torch.cat([x, model.decoder.embed_tokens(token)[:, None]], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)


def test_draw_follows_the_distribution():
    probs = torch.tensor([0.0, 0.5, 0.02, 0.0, 0.3, 0.18, 0.0])
    logprobs = probs.log().clamp(min=IMPOSSIBLE).expand(20_000, -1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(4))
    counts, wanted = draw(logprobs, uniforms).bincount(minlength=7), probs * 20_000
    assert (counts[probs == 0] == 0).all()
    chi_square = ((counts - wanted).square() / wanted)[probs > 0].sum()
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in a thousand seeds


def test_draw_at_the_ends_of_the_unit_interval_is_possible():
    logprobs = torch.tensor([0.0, 0.7, 0.3, 0.0]).log().clamp(min=IMPOSSIBLE).expand(3, -1)
    edges = torch.tensor([0.0, 1 - 2**-24, 1.0])  # 1.0: what rounding could make of a number below it
    assert draw(logprobs, edges).tolist() == [1, 2, 2]
    assert draw(logprobs, torch.tensor([0.69, 0.71, 0.99])).tolist() == [1, 2, 2]


def test_a_draw_is_of_its_own_row_and_uniform_alone_over_a_real_vocabulary():
    generator = torch.Generator().manual_seed(5)
    # 5003 is prime: no whole blocks
    logprobs = (3 * torch.randn(12, 5003, generator=generator)).log_softmax(dim=1)
    logprobs[:, ::3] = IMPOSSIBLE
    uniforms = torch.rand(12, generator=generator)
    ids = draw(logprobs, uniforms)
    order = torch.randperm(12, generator=generator)
    assert draw(logprobs[order], uniforms[order]).equal(ids[order])
    assert torch.cat([draw(logprobs[i : i + 1], uniforms[i : i + 1]) for i in range(12)]).equal(ids)
    cdf = logprobs.double().exp().cumsum(dim=1)  # the slow way, over all of V in float64
    point = uniforms.double() * cdf[:, -1]
    low, high = cdf.gather(1, ids[:, None] - 1).squeeze(1), cdf.gather(1, ids[:, None]).squeeze(1)
    assert ((low - 1e-6 <= point) & (point <= high + 1e-6)).all() and (ids % 3 != 0).all()
    steps = torch.linspace(0, 1, 4000)  # a larger uniform never gives an earlier id
    assert (draw(logprobs[:1].expand(4000, -1), steps).diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_questions_about_one_video_share_its_pass_and_get_the_states_of_their_own(model, dtype, monkeypatch):
    """Five prompts of three lengths about two videos, not in order; in 16 bits each is computed by itself."""
    generator = torch.Generator().manual_seed(3)
    video = torch.tensor([7, 2, 7, 7, 2])
    mask = torch.arange(16) >= torch.tensor([[3], [0], [2], [0], [5]])
    ids, embeds = torch.randint(0, V, (5, 16), generator=generator), torch.randn(8, 8, CFG.dim)
    ids[range(5), (~mask).sum(dim=1)] = 1  # all prompts begin alike
    alone, rows = Prompts(ids, mask, embeds[video]), []
    hook = model.decoder.layers[0].mlp.register_forward_hook(lambda mlp, args, out: rows.append(out.numel()))
    monkeypatch.setattr(model.decoder, "compute_dtype", dtype)
    results = []
    for prompts in (alone, Prompts(ids, mask, embeds[video], video)):
        cache = KVCache(mask, G, T)
        with torch.no_grad():
            state = rollout_module.prefill(model, prompts, cache)
        kept = [x.transpose(1, 2)[mask] for pair in cache.prompt for x in pair]
        results.append([state, *kept])
    hook.remove()
    opening = CFG.video_start + 8  # tokens: they are computed for 2 videos, not for 5 prompts
    assert rows[0] - rows[1] == (3 * opening * CFG.dim if dtype == torch.float32 else 0)
    for own, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_prompts_sampled_in_parts_give_the_completions_of_all_at_once(model, prompts, top_p):
    """The parts end after different numbers of tokens: they are put together padded on the right."""
    options = dict(seed=5, end_ids=torch.arange(8, 24), top_p=top_p)
    whole = sample(model, prompts, **options)
    alone = [sample(model, prompts, rows=slice(p, p + 1), **options) for p in range(P)]
    assert len({part.completion_ids.shape[1] for part in alone}) > 1
    parts = sample(model, prompts, prompts_at_once=1, **options)
    for name in ("completion_ids", "completion_mask", "support", "ended"):
        one, other = getattr(parts, name), getattr(whole, name)
        assert one is other is None if top_p == 1 and name == "support" else one.equal(other), name
    torch.testing.assert_close(parts.logprobs, whole.logprobs, atol=1e-5, rtol=0)


def test_the_completions_of_chosen_prompts_are_all_of_theirs_and_no_others(model, prompts):
    whole = sample(model, prompts, top_p=0.9)
    part = whole.of_prompts(torch.tensor([True, False, True]))
    rows = [*range(G), *range(2 * G, 3 * G)]
    for name in ("completion_ids", "completion_mask", "logprobs", "support", "ended"):
        assert getattr(part, name).equal(getattr(whole, name)[rows]), name


def test_of_several_prompts_that_go_on_each_keeps_its_own_keys_and_draws(model, monkeypatch):
    generator, left = torch.Generator().manual_seed(3), []
    mask = torch.arange(16) >= torch.tensor([[3], [0], [2], [0], [5], [1]])
    ids = torch.randint(0, V, (6, 16), generator=generator)
    prompts = Prompts(ids, mask, torch.randn(6, 8, CFG.dim, generator=generator))
    real = KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda cache, going: left.append(len(going)) or real(cache, going))
    sampling = Sampling(T, torch.arange(8, 28), BANNED)
    for seed in range(10):
        uniforms = torch.rand(6, G, T, generator=torch.Generator().manual_seed(seed))
        shrinking = generate(model, prompts, G, sampling, uniforms)
        with monkeypatch.context() as patch:  # never looking, all stay to the end
            patch.setitem(rollout_module.LOOK_EVERY, "cpu", T)
            whole = generate(model, prompts, G, sampling, uniforms)
        assert shrinking.completion_ids.equal(whole.completion_ids)
        torch.testing.assert_close(shrinking.logprobs, whole.logprobs, atol=1e-5, rtol=0)
    assert 3 in left


def test_reference_states_are_those_of_the_frozen_adapters_prompt_by_prompt_whatever_the_micro_batch(prompts):
    torch.manual_seed(0)
    model = VideoLM(CFG, CLIP)
    parameters = lora.add_adapters(model.decoder, 4, 8.0)
    wanted = []
    for seed in (0, 1):  # the policy that is frozen, then the one that has moved on
        for parameter in parameters:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
        if seed == 0:
            lora.freeze_reference(model.decoder)
            rollout = sample(model, prompts)
            wanted = completion_states(model, prompts, rollout)
    mask = rollout.completion_mask
    for size in (0, 1, 2):
        parts = rollout_module.reference_states(model, prompts, rollout, size)
        assert len(parts) == (-(-P // size) if size else 1) and not parts[0].requires_grad
        torch.testing.assert_close(torch.cat(parts)[mask], wanted[mask], atol=1e-4, rtol=1e-4)
