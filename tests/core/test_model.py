import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
from checkpoints.policies import load_model, save_model
from clip import ClipConfig
from model import Bridge, Decoder, KVCache, ModelConfig, VideoLM, pool

CFG = ModelConfig(vocab_size=40, dim=32, num_layers=2, ffn_dim=48, num_queries=16, qformer_layers=1)
CLIP = ClipConfig(image_size=16, patch_size=8, width=16, num_layers=2, text_layers=1, vocab_size=40)
P, G, T, S = 2, 3, 4, 6
MASK = torch.tensor([[False, False, True, True, True, True], [True] * 6])  # prompts of 4 and of 6 tokens


def build(kind=Decoder, cfg=CFG, *args):
    torch.manual_seed(0)
    return kind(cfg, *args)


def embeddings(seed=1):
    """A prompt (P, S, D), garbage in its padding, and completions (P, G, T, D)."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(P, S, CFG.dim, generator=generator)
    return prompt, torch.randn(P, G, T, CFG.dim, generator=generator)


def unshared(decoder, prompt, mask, completions):
    """The slow loop: every state from a sequence of its own, prompt and t first tokens; nothing is shared."""
    rows, own = prompt.repeat_interleave(G, dim=0), completions.flatten(0, 1)  # (B, S, D), (B, T, D)
    states = []
    for t in range(T):
        seen = torch.cat([mask.repeat_interleave(G, dim=0), torch.ones(P * G, t, dtype=torch.bool)], dim=1)
        states.append(decoder(torch.cat([rows, own[:, :t]], dim=1), seen)[:, 0, 0])
    return torch.stack(states, dim=1).unflatten(0, (P, G))


def test_shared_prefix_gives_the_unshared_values_and_gradients():
    decoder, (prompt, completions) = build(), embeddings()
    weights = torch.randn(P, G, T, CFG.dim, generator=torch.Generator().manual_seed(2))
    results = []
    for run in (lambda *x: decoder(*x), lambda *x: unshared(decoder, *x)):
        inputs = prompt.clone().requires_grad_(), completions.clone().requires_grad_()
        states = run(inputs[0], MASK, inputs[1])
        learn = [p for name, p in decoder.named_parameters() if name != "embed_tokens.weight"]
        results.append([states, *torch.autograd.grad((states * weights).sum(), [*inputs, *learn])])
    for shared, slow in zip(*results, strict=True):
        assert slow.abs().max() > 1e-3  # something to compare
        torch.testing.assert_close(shared, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 3, 5, 300])
@pytest.mark.parametrize("kv", [2, 4])
def test_long_prompts_give_the_values_and_gradients_of_short_ones(window, kv, monkeypatch):
    decoder = build(cfg=replace(CFG, sliding_window=window, num_kv_heads=kv))
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randn(P, 23, CFG.dim, generator=generator)
    completions = torch.randn(P, G, T, CFG.dim, generator=generator)
    mask, results = torch.arange(23) >= torch.tensor([[6], [0]]), []
    weights = torch.randn(P, G, T, CFG.dim, generator=generator)
    for limit in (256, 4):  # prompt tokens from which a prompt is long
        monkeypatch.setattr(model, "LONG", limit)
        inputs = prompt.clone().requires_grad_(), completions.clone().requires_grad_()
        states = decoder(inputs[0], mask, inputs[1])
        learn = [p for name, p in decoder.named_parameters() if name != "embed_tokens.weight"]
        results.append([states, *torch.autograd.grad((states * weights).sum(), [*inputs, *learn])])
    for short, long in zip(*results, strict=True):
        assert short.abs().max() > 1e-3
        torch.testing.assert_close(long, short, atol=1e-4, rtol=1e-4)
    assert (results[1][1][~mask] == 0).all()  # padding has no gradient


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("window", [0, 200])
def test_the_largest_tensor_grows_as_the_prompt_not_as_its_square(window):
    decoder, largest = build(cfg=replace(CFG, sliding_window=window)), []
    for length in (600, 1200):
        prompt = torch.randn(1, length, CFG.dim, requires_grad=True)
        with Largest() as seen:
            decoder(
                prompt, torch.ones(1, length, dtype=torch.bool), torch.zeros(1, 2, 3, CFG.dim)
            ).sum().backward()
        largest.append(seen.elements)
    assert largest[1] < 2.1 * max(largest[0], 256 * 456) and largest[1] < 1200**2 / 8


def test_padding_changes_nothing_and_has_no_gradient():
    decoder, (prompt, completions) = build(), embeddings()
    prompt.requires_grad_()
    states = decoder(prompt, MASK, completions)
    alone = decoder(prompt[:1, 2:], MASK[:1, 2:], completions[:1])  # the first prompt without its padding
    torch.testing.assert_close(states[:1], alone, atol=1e-5, rtol=0)
    states.square().sum().backward()
    assert prompt.grad.isfinite().all() and (prompt.grad[~MASK] == 0).all() and (prompt.grad[MASK] != 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize("limit", [256, 4])  # prompt tokens from which a prompt is long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_leaving_out_the_padding_changes_no_state_and_no_gradient(limit, checkpointing, monkeypatch):
    monkeypatch.setattr(model, "LONG", limit)
    decoder, (prompt, completions) = build(cfg=replace(CFG, sliding_window=5)), embeddings()
    decoder.checkpointing, results = checkpointing, []
    lengths = torch.tensor([[T, 1, 2], [0, 3, T]])[:, :G]  # 0: a completion that nobody asks for
    mask = torch.arange(T) < lengths[..., None]
    weights = torch.randn(P, G, T, CFG.dim, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    for decoder.row_block in (1, 4, 0):
        inputs = prompt.clone().requires_grad_(), completions.clone().requires_grad_()
        states = decoder(inputs[0], MASK, inputs[1], completion_mask=mask)
        learn = [p for name, p in decoder.named_parameters() if name != "embed_tokens.weight"]
        gradients = torch.autograd.grad((states * weights).sum(), [*inputs, *learn])
        results.append([states[mask], *gradients])
    for *packed, padded in zip(*results, strict=True):
        assert padded.abs().max() > 1e-3
        for values in packed:
            torch.testing.assert_close(values, padded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [1, 8])
def test_products_run_over_tokens_alone_and_those_of_the_last_layer_over_states_that_are_asked_for(block):
    """... and over as many places of padding as a whole block needs."""
    decoder, (prompt, completions), rows = build(), embeddings(), []
    decoder.row_block = block
    for layer in decoder.layers:
        layer.mlp.register_forward_hook(lambda mlp, args, out: rows.append(out.numel() // CFG.dim))
    mask = torch.arange(T) < torch.arange(1, P * G + 1).clamp(max=T).view(P, G, 1)
    decoder(prompt, MASK, completions, completion_mask=mask)
    own = (mask.sum() - P * G).item()  # a completion's last token predicts nothing
    tokens = [MASK.sum().item() + own] * (CFG.num_layers - 1) + [P + own]
    assert rows == [-(-n // block) * block for n in tokens] and (block == 1 or rows != tokens)


def test_a_state_sees_only_earlier_tokens_of_its_own_completion():
    decoder, (prompt, completions) = build(), embeddings()
    before, t = decoder(prompt, MASK, completions), 1
    completions[0, 1, t] += 1
    changed = (decoder(prompt, MASK, completions) != before).any(dim=-1)  # (P, G, T)
    wanted = torch.zeros(P, G, T, dtype=torch.bool)
    wanted[0, 1, t + 1 :] = True  # state t predicts token t, so it has not seen it
    assert torch.equal(changed, wanted)


@torch.no_grad()
@pytest.mark.parametrize("block", [32, 2])
def test_cached_steps_give_the_full_forward(block, monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK", block)  # of tokens for which there is room at once
    decoder, (prompt, _) = build(), embeddings()
    tokens = torch.randint(0, 40, (P, G, T), generator=torch.Generator().manual_seed(3))
    full, cache = decoder(prompt, MASK, decoder.embed_tokens(tokens)), KVCache(MASK, G, T)
    states = [decoder(prompt, MASK, cache=cache).expand(P, G, 1, -1)[:, :, 0]]
    states += [decoder.step(tokens[:, :, t], t, cache) for t in range(T - 1)]
    torch.testing.assert_close(torch.stack(states, dim=2), full, atol=1e-5, rtol=0)
    assert [own.shape for own in cache.own] == [(2, P, CFG.num_kv_heads, G, T, 8)] * CFG.num_layers


def test_grouped_queries_equal_repeated_keys():
    grouped, full = build(), build(cfg=replace(CFG, num_kv_heads=CFG.num_heads))
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:  # (kv * h, D) -> (heads * h, D): each key serves two queries
            weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    prompt, completions = embeddings()
    a, b = grouped(prompt, MASK, completions), full(prompt, MASK, completions)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_decoder_is_transformers_llama_name_by_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=CFG.vocab_size, hidden_size=CFG.dim, num_hidden_layers=2, rms_norm_eps=CFG.norm_eps,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=CFG.ffn_dim, tie_word_embeddings=True,
    )  # fmt: skip
    llama, decoder = transformers.LlamaForCausalLM(config).eval(), build()
    llama.model.load_state_dict(decoder.state_dict())  # strict: the parameter names are one to one
    ids = torch.randint(0, CFG.vocab_size, (P, S + T), generator=torch.Generator().manual_seed(4))
    mask = torch.cat([MASK, torch.ones(P, T, dtype=torch.bool)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = llama(ids, mask.long(), positions).logits[:, S - 1 : -1]
        x = decoder.embed_tokens(ids)
        ours = decoder(x[:, :S], MASK, x[:, None, S:])[:, 0] @ decoder.head.T
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_pooled_is_temporal_tokens_then_spatial_ones():
    # features 0..11 as 2 frames x 3 patches x 2: means over patches (2,3) (8,9), then over time
    wanted = torch.tensor([[[2.0, 3], [8, 9], [3, 4], [5, 6], [7, 8]]])
    assert torch.equal(pool(torch.arange(12.0).view(1, 2, 3, 2)), wanted)
    clip = ClipConfig(image_size=336, patch_size=14, width=8)
    big = Bridge(replace(CFG, bridge="pooled", num_frames=50, dim=8), clip)
    tokens = big(torch.zeros(1, 50, 576, 8), torch.arange(50.0)[None])
    assert tokens.shape[1] == big.num_tokens == 626


@pytest.mark.parametrize("K", [1, 4, 7])
@pytest.mark.parametrize("kind", ["qformer", "patches", "pooled"])
def test_adapters_give_the_stated_number_of_tokens_for_any_number_of_frames(kind, K):
    bridge = build(Bridge, replace(CFG, bridge=kind, num_frames=K), CLIP)
    patches = torch.randn(P, K, 4, CLIP.width, generator=torch.Generator().manual_seed(5))
    times = torch.arange(K).expand(P, K) * 0.5
    tokens = bridge(patches, times)
    count = {"qformer": 16, "patches": K * 4, "pooled": K + 4}[kind]
    assert tokens.shape == (P, count, CFG.dim) and bridge.num_tokens == count and tokens.isfinite().all()
    assert (bridge(patches, times + 3) - tokens).abs().max() > 1e-3  # when a frame is shown matters ...
    if K > 1:
        assert (bridge(patches.flip(1), times) - tokens).abs().max() > 1e-3  # ... and so does their order


def test_clip_computes_in_the_dtype_of_the_decoders_products_and_gives_float32():
    model = build(VideoLM, CFG, CLIP)
    frames, tokens = torch.randint(0, 256, (2, 3, 3, CLIP.image_size, CLIP.image_size)).byte(), {}
    for dtype in (torch.float32, torch.bfloat16):
        model.decoder.compute_dtype = dtype
        tokens[dtype] = model.patch_tokens(frames)
    exact, rounded = tokens.values()
    assert exact.dtype == rounded.dtype == torch.float32 and not exact.equal(rounded)
    assert (exact - rounded).abs().mean() < 0.02 * exact.abs().mean()


def test_video_tokens_stand_by_position_whatever_the_ids():
    model = build(VideoLM, CFG, CLIP)
    ids = torch.randint(4, 40, (P, 8), generator=torch.Generator().manual_seed(6))
    mask = torch.arange(8) >= torch.tensor([[2], [0]])
    ids[:, -1] = 3  # the placeholder's id inside the question stays a word
    video = torch.randn(P, 3, CFG.dim)
    x = model.embed_prompt(ids, mask, video)
    assert torch.equal(x[0, 3:6], video[0]) and torch.equal(x[1, 1:4], video[1])
    words = model.decoder.embed_tokens(ids)
    assert torch.equal(x[0, [2, 6, 7]], words[0, [2, 6, 7]]) and torch.equal(x[1, 4:], words[1, 4:])


def test_a_saved_model_comes_back(tmp_path):
    model = build(VideoLM, CFG, CLIP)
    save_model(model, tmp_path, torch.float32)
    loaded = load_model(tmp_path)
    assert (loaded.cfg, loaded.clip_cfg) == (CFG, CLIP)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path):
    save_model(build(VideoLM, CFG, CLIP), tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())
    sizes["model"]["ffn_dim"] = 64
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    words = r"^\S*model.safetensors: tensor decoder.layers.0.mlp.*config.json's sizes make it.*$"
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="deserializing header.*damaged: copy it again"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="^.*pytorch_model.bin: a pickle, which can run code.*$"):
        load_model(tmp_path)


def test_times_are_told_by_periods_from_half_a_second_to_512_seconds():
    features = model.time_features(torch.tensor([0.125, 128.0]))  # 32 periods in equal ratios
    periods = 0.5 * 1024 ** (torch.arange(32) / 31)
    angles = 2 * torch.pi * torch.tensor([[0.125], [128.0]]) / periods
    torch.testing.assert_close(features, torch.cat([angles.sin(), angles.cos()], dim=1), atol=2e-3, rtol=0)
    assert features[0, 0] > 0.999 < features[1, 31]  # a quarter of the shortest, and of the longest


def test_a_q_former_is_told_how_a_patch_changes_from_frame_to_frame():
    bridge = build(Bridge, replace(CFG, num_frames=4), CLIP)
    moving, times = torch.randn(P, 4, 4, CLIP.width), torch.arange(4.0).expand(P, 4)
    still = moving[:, :1].expand_as(moving)
    before = [bridge(x, times) for x in (still, moving)]
    bridge.motion.weight.data.mul_(3)
    after = [bridge(x, times) for x in (still, moving)]
    torch.testing.assert_close(after[0], before[0], atol=1e-6, rtol=0)
    assert (after[1] - before[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_sliding_window_hides_what_lies_before_it_in_every_pass():
    """In one layer a state sees its window alone: changing what lies before it changes nothing."""
    window = 2
    decoder = build(cfg=replace(CFG, num_layers=1, sliding_window=window))
    prompt, _ = embeddings()
    tokens = torch.randint(0, 40, (P, G, T), generator=torch.Generator().manual_seed(3))
    full, cache = decoder(prompt, MASK, decoder.embed_tokens(tokens)), KVCache(MASK, G, T)
    states = [decoder(prompt, MASK, cache=cache).expand(P, G, 1, -1)[:, :, 0]]
    states += [decoder.step(tokens[:, :, t], t, cache) for t in range(T - 1)]
    torch.testing.assert_close(torch.stack(states, dim=2), full, atol=1e-5, rtol=0)
    for seen in range(S):  # state t stands on token S + t - 1, which sees itself and the window - 1 before it
        changed = prompt.clone()
        changed[:, seen] += 1
        differs = (decoder(changed, MASK, decoder.embed_tokens(tokens)) != full).any(dim=-1)  # (P, G, T)
        wanted = torch.tensor([seen > S + t - 1 - window for t in range(T)]) & MASK[:, seen, None, None]
        assert differs.equal(wanted.expand(P, G, T)), seen


def test_the_frames_that_a_head_of_the_q_former_looks_at_are_shifted_as_it_has_learned():
    layer = build(model.QFormerLayer, 32, 4)
    layer.slopes.data.fill_(5.0)  # each head sees one frame alone
    queries, patches = torch.randn(1, 1, 32), torch.randn(1, 3, 32)
    for shift in (-1.0, 0.0, 1.0):  # frames ahead of the query
        layer.shifts.data.fill_(shift)
        ahead, nowhere = torch.tensor([[[-1.0, 0.0, 1.0]]]), torch.zeros(1, 3)
        found, seen = layer(queries, patches, ahead, nowhere), int(shift) + 1
        alone = layer(queries, patches[:, seen : seen + 1], ahead[..., seen : seen + 1], nowhere[:, :1])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
