"""The memory plan, gradient checkpointing and the preset that needs both."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora
import train
from checkpoints import memory, peft_files
from checkpoints.nf4 import NF4Linear
from checkpoints.policies import PolicyOptions, freeze_base, load_policy, load_run
from clip import ClipConfig
from data import Batches, Prompts
from grpo_rank import Objective, rollout_loss
from model import Decoder, KVCache, ModelConfig, VideoLM
from plumbing.machine import hold
from rollout import EVALUATED_AT_ONCE, Sampling, completion_states, generate
from videoqa import world

ROOT = Path(__file__).parents[2]
CFG = ModelConfig(vocab_size=64, dim=64, num_layers=6, ffn_dim=176, bridge="pooled", num_frames=4)
CLIP = ClipConfig(image_size=16, width=32, num_layers=1, text_layers=1)
# LLaMA-2-7B's published sizes
LLAMA = ModelConfig(32000, 4096, 32, 32, 32, 11008, bridge="pooled", num_frames=50)
CLIP_336 = ClipConfig(image_size=336, patch_size=14, width=32, num_layers=1, text_layers=1)
N_VIDEO = 50 + 24 * 24  # 626
TEXT = 128  # tokens of a prompt beside its video; VLM-RLAIF drops longer questions


def run_config(**options):
    small = dict(lora_r=4, batch_prompts=3, micro_batch_prompts=2, group_size=5, eval_samples=1)
    return train.Config(**(small | dict(max_new_tokens=7) | options))


def adapted(base="float32", checkpointing=False):
    torch.manual_seed(0)
    decoder = Decoder(CFG)
    freeze_base(decoder, base)
    trainable = lora.add_adapters(decoder, 4, 8.0)
    for p in trainable:
        p.data += 0.02
    decoder.checkpointing = checkpointing
    return decoder, trainable


def test_live_counts_what_is_made_and_not_yet_dropped():
    old = torch.ones(1000)
    with memory.Live() as live:
        view, a = old.view(10, 100), old + 1
        assert live.live == 4000  # a view of what was there before is no memory
        b = a.view(-1) * 2
        assert live.live == live.peak == 8000
        del a, b, view
        assert (live.live, live.peak) == (0, 8000)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_checkpointing_changes_no_gradient_and_no_sample(base):
    x, mask = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1)), torch.ones(2, 12).bool()
    gradients, peaks = [], []
    for checkpointing in (False, True):
        decoder, trainable = adapted(base, checkpointing)
        with memory.Live() as live:
            states = decoder(x[:, :3], mask[:, :3], x[:, None, 3:])
            states.square().sum().backward()
        gradients.append([p.grad for p in trainable])
        peaks.append(live.peak)
        cache = KVCache(mask, 2, 1)
        with torch.no_grad():
            decoder(x, mask, cache=cache)
        assert len(cache.prompt) == CFG.num_layers
    assert all(g.abs().max() > 0 for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert peaks[1] < 0.6 * peaks[0]


def test_the_plan_is_what_a_real_update_and_real_sampling_take():
    run = run_config(base="nf4", checkpointing=True, max_new_tokens=30, sample_prompts=3)
    lines = memory.plan(CFG, CLIP, run, torch.float32, num_videos=2, text_tokens=TEXT)
    policy = VideoLM(CFG, CLIP)
    policy.decoder, trainable = adapted("nf4", checkpointing=True)
    for p in trainable:
        p.grad = torch.zeros_like(p)
    S, T, G = policy.bridge.num_tokens + TEXT, 30, 5

    def prompts(P):
        ids, mask = torch.ones(P, S, dtype=torch.int64), torch.ones(P, S, dtype=torch.bool)
        return Prompts(ids, mask, torch.zeros(P, policy.bridge.num_tokens, 64))

    no_end = torch.tensor([], dtype=torch.int64)
    with memory.Live() as live:
        rollout = generate(policy, prompts(3), G, Sampling(T, no_end), torch.full((3, G, T), 0.5))
    of = {name.split(" (")[0]: size for name, size in lines.items()}
    assert live.peak == pytest.approx(of["KV cache"] + of["sampling, beside the cache"], rel=0.15)
    two = rollout[: 2 * G]
    with memory.Live() as live:
        states, head = completion_states(policy, prompts(2), two), policy.decoder.head.float()
        objective, ones = Objective(kl_coef=1.0, entropy_coef=1.0), torch.ones(2 * G)
        rollout_loss(states, head, two, ones, objective, ref_hidden=states.detach())[0].backward()
    both = of["activations of the update"] + of["logits of the update"]
    assert 0.75 < live.peak / both <= 1  # they do not quite meet
    decoder = policy.decoder
    held = [x for x in decoder.parameters() if not x.requires_grad]
    held += [x for name, x in decoder.named_buffers() if name.split(".")[-1] in ("codes", "absmax_codes")]
    # layers this small fill no whole group of absmax
    assert 1 <= memory.num_bytes(held) / of["decoder's weights"] < 1.1
    assert of["peak"] > max(size for name, size in of.items() if name != "peak")


@pytest.mark.parametrize("bridge", ["qformer", "llava"])
def test_the_plan_knows_what_embedding_videos_takes_and_how_many_prompts_an_evaluation_samples(bridge):
    cfg = replace(CFG, bridge=bridge, num_layers=3)
    run = run_config(batch_prompts=1, group_size=2, eval_samples=4)
    lines = memory.plan(cfg, CLIP, run, torch.float32, num_videos=2, text_tokens=9)
    of = {name.split(" (")[0]: size for name, size in lines.items()}
    policy = VideoLM(cfg, CLIP)
    with memory.Live() as live:  # 28 clips of 4 frames, as PromptSet takes them
        policy.embed_video(torch.zeros(28, 4, 3, 16, 16, dtype=torch.uint8), torch.zeros(28, 4))
    assert 0.95 < live.peak / of["embedding videos"] <= 1.02
    N_video = policy.bridge.num_tokens
    ids = torch.ones(EVALUATED_AT_ONCE, N_video + 9, dtype=torch.int64)
    prompts = Prompts(ids, torch.ones_like(ids).bool(), torch.zeros(len(ids), N_video, 64))
    no_end = torch.tensor([], dtype=torch.int64)
    with memory.Live() as live:  # as `evaluate` samples: one greedy answer and four drawn ones
        generate(policy, prompts, 5, Sampling(7, no_end), torch.full((len(ids), 5, 7), 0.5))
    assert live.peak == pytest.approx(of["KV cache"] + of["sampling, beside the cache"], rel=0.15)
    run = run_config(sample_prompts=1, micro_batch_prompts=1, group_size=2, max_new_tokens=1)
    few = memory.plan(cfg, CLIP, run, torch.float32, num_videos=2, text_tokens=9)
    stays = sum(list(few.values())[:4])  # weights, CLIP, adapters, video tokens
    assert few["peak"] == stays + few["embedding videos"]  # where nothing later takes more


def test_the_plan_holds_linear_layers_in_16_bits_where_products_are_taken_in_16():
    sizes = []
    for base, name in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        dtype = getattr(torch, name)
        cfg = replace(CFG, num_layers=3)
        policy = VideoLM(cfg, CLIP)
        freeze_base(policy.decoder, base)
        if dtype == torch.bfloat16:
            hold(policy.decoder, dtype)
        lines = memory.plan(cfg, CLIP, run_config(base=base), dtype, num_videos=1, text_tokens=9)
        (planned,) = (size for name, size in lines.items() if name.startswith("decoder's weights"))
        assert planned == memory.num_bytes(policy.decoder.parameters())
        sizes.append(planned)
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_plan_of_llama_2_7b_in_4_bits_counts_what_is_published_and_stays_under_24_gb():
    run = replace(run_config(), base="nf4", lora_r=64, max_new_tokens=128, checkpointing=True)
    run = replace(run, sample_prompts=1, micro_batch_prompts=1)
    lines = memory.plan(LLAMA, CLIP_336, run, torch.bfloat16, num_videos=1, text_tokens=TEXT)
    of = {name.split(" (")[0]: size for name, size in lines.items()}
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 32000 * 4096 + 65 * 4096  # the head is the embedding, in 16 bits; norms
    assert of["decoder's weights"] == pytest.approx(0.515869 * linears + 2 * rest, rel=1e-5)
    assert 0.515869 * linears / linears < 0.56
    assert of["adapters, gradients, optimiser states, reference"] == 159_907_840 * 20
    assert of["KV cache"] == 32 * 2 * 4096 * 2 * (N_VIDEO + TEXT + 5 * 128)
    assert of["video tokens of 1 videos"] == N_VIDEO * 4096 * 4
    assert of["peak"] < 24e9


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_plan_counts_the_logits_of_sampling(base, top_p):
    cfg = replace(CFG, vocab_size=5000, num_layers=3)
    run = run_config(base=base, top_p=top_p, max_new_tokens=4, sample_prompts=40)
    lines = memory.plan(cfg, CLIP, run, torch.float32, num_videos=2, text_tokens=9)
    of = {name.split(" (")[0]: size for name, size in lines.items()}
    torch.manual_seed(0)
    policy = VideoLM(cfg, CLIP)
    freeze_base(policy.decoder, base)
    policy.decoder.compute_dtype = torch.float32
    N_video = policy.bridge.num_tokens
    ids = torch.ones(40, N_video + 9, dtype=torch.int64)
    prompts = Prompts(ids, torch.ones_like(ids).bool(), torch.zeros(40, N_video, 64))
    banned, no_end = torch.zeros(5000, dtype=torch.bool), torch.tensor([], dtype=torch.int64)
    sampling = Sampling(4, no_end, banned, top_p=top_p)
    with memory.Live() as live:
        generate(policy, prompts, 5, sampling, torch.full((40, 5, 4), 0.5))
    assert (
        of["sampling, beside the cache"] > 40 * 5 * 5000 * 8
    )  # log-probabilities and probabilities, float32
    assert live.peak == pytest.approx(of["KV cache"] + of["sampling, beside the cache"], rel=0.1)


def test_sampling_in_parts_is_sampling_at_once():
    torch.manual_seed(0)
    policy = VideoLM(CFG, CLIP)
    ids = torch.randint(5, 60, (5, 30), generator=torch.Generator().manual_seed(2))
    prompts = Prompts(ids, torch.ones_like(ids).bool(), torch.randn(5, policy.bridge.num_tokens, 64))
    uniforms = torch.rand(5, 3, 9, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(max_new_tokens=9, end_ids=torch.arange(20), top_p=0.9)
    whole = generate(policy, prompts, 3, sampling, uniforms)
    parts = generate(policy, prompts, 3, replace(sampling, prompts_at_once=2), uniforms)
    assert whole.completion_mask.sum(dim=1).unique().numel() > 1  # the parts end at different lengths
    for name in ("completion_ids", "completion_mask", "ended"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    mask = whole.completion_mask  # behind an end there is no nucleus
    assert torch.equal(parts.support[mask], whole.support[mask])
    torch.testing.assert_close(parts.logprobs, whole.logprobs, atol=1e-5, rtol=0)


# ---- the preset, on the repository's own small weights ----


def test_the_7b_preset_has_the_papers_settings_and_asks_for_weights():
    settings = train.Config(**train.PRESETS["7b"] | {"policy": "some/folder"})
    wanted = dict(group_size=5, lora_r=64, lora_alpha=16.0, num_frames=50, num_epochs=4, num_steps=0)
    wanted |= dict(batch_prompts=64, max_new_tokens=896, base="nf4", checkpointing=True)
    assert {name: getattr(settings, name) for name in wanted} == wanted
    with pytest.raises(train.BadInput, match="--policy"):
        train.Config(**train.PRESETS["7b"])


def test_the_7b_preset_plans_then_rehearses_then_learns_from_a_merged_adapter(tmp_path, monkeypatch, capsys):
    world.make_world(tmp_path / "world" / "train2", range(1_000_000, 1_000_002))
    world.make_world(tmp_path / "world" / "eval1", range(2_000_000, 2_000_001))
    policy, _ = load_policy(PolicyOptions(policy=str(ROOT / "weights")))
    for p in lora.add_adapters(policy.decoder, 2, 4.0, generator=torch.Generator().manual_seed(1)):
        p.data += 0.01
    peft_files.save_adapter(policy.decoder, tmp_path / "lora")
    lora.merge(policy.decoder)
    start, _ = load_policy(PolicyOptions(policy=str(ROOT / "weights"), adapter=str(tmp_path / "lora")))
    wanted = policy.state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in start.state_dict().items())
    options = ["--preset", "7b", "--policy", ROOT / "weights", "--adapter", tmp_path / "lora"]
    options += ["--num_train_clips", 2, "--num_eval_clips", 1, "--world_dir", tmp_path / "world"]
    options += ["--num_frames", 9, "--num_epochs", 2, "--batch_prompts", 6, "--sample_prompts", 4]
    options += ["--max_new_tokens", 4, "--micro_batch_prompts", 3, "--lora_r", 4, "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    monkeypatch.setattr(memory, "plan", lambda *a: {"peak": 10**9})  # tested above
    assert train.main() == 0
    said = capsys.readouterr().out
    assert said.index("GB  peak") < said.index("rehearsal") < said.index("held out")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    questions = int(said.split(" questions to learn")[0].split()[-1])
    assert len(rows) == settings["num_steps"] == 2 * (questions // 6) > 0
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(x.abs().max() > 0 for name, x in stored.items() if "lora_B" in name)
    again, _, _ = load_run(tmp_path / "run")  # as eval.py reads it: the same base, the same frames
    assert again.cfg.num_frames == 9
    assert all(isinstance(x.base, NF4Linear) for x in lora.layers(again.decoder).values())


@pytest.mark.parametrize("objective", ["grpo_rank", "ppo", "dpo"])
def test_a_rehearsal_changes_nothing(capsys, objective):
    torch.manual_seed(0)
    policy, run = VideoLM(CFG, CLIP), run_config(objective=objective)
    policy.decoder.requires_grad_(False)
    critic = train.rivals().Critic(CFG.dim) if objective == "ppo" else None
    learner = lora.Learner(policy.decoder, run.lora_r, run.lora_alpha, critic=critic)

    class Set:
        prompts = [[5] * n for n in (30, 34, 32)]
        video_embeds = torch.zeros(3, policy.bridge.num_tokens, 64)

        def __len__(self):
            return 3

        def texts(self, rollout):
            return [""] * len(rollout.ended)

        def __getitem__(self, rows):
            assert rows[0] == 1  # the longest first
            ids = torch.full((len(rows), 34), 5)
            return Prompts(ids, torch.ones_like(ids).bool(), self.video_embeds[rows])

    lengths = []

    def update(*who, rollout, **batch):
        lengths.append(rollout.completion_mask.sum())
        return train.update(*who, rollout=rollout, **batch)

    sampling = Sampling(max_new_tokens=7, end_ids=torch.arange(64), banned=torch.zeros(64, dtype=torch.bool))
    before = {name: x.clone() for name, x in learner.tensors().items()}
    batches = Batches(Set(), run.batch_prompts, 0, torch.Generator(), (0, 1))
    memory.rehearse(run, policy, learner, batches, sampling, update)
    assert lengths == [2 * 5 * 7]  # a micro-batch of answers that nothing ends
    assert "rehearsal" in capsys.readouterr().out
    after = learner.tensors()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_decoder_too_large_for_joined_layers_is_planned_without_their_copies():
    """The plan measures three layers, whose copies would fit, of a decoder whose 13 GB of copies do not."""
    run = run_config(base="bfloat16", sample_prompts=2)
    lines = memory.plan(LLAMA, CLIP_336, run, torch.bfloat16, 1, TEXT)
    (sampling,) = (n for name, n in lines.items() if name.startswith("sampling"))
    assert sampling < 2e9
