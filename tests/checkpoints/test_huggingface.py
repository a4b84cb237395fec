"""Tiny random checkpoints, built with transformers where it is installed, against ours."""

import json
import shutil
import sys
import weakref
from collections import Counter
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_terminal import in_terminal
from test_train import ROOT

import lora
import train
from checkpoints import huggingface, nf4, peft_files
from checkpoints.chat_tokenizer import ChatTokenizer
from checkpoints.huggingface import decoder_config, load_clip, load_decoder, save_decoder
from checkpoints.nf4 import NF4Linear
from checkpoints.policies import PolicyOptions, load_policy, load_run, policy_configs
from checkpoints.pretrained import load_pretrained, save_pretrained
from clip import Clip, ClipConfig, preprocess
from data import Prompts, PromptSet
from eval import merge_run
from model import Decoder
from plumbing.options import BadInput
from rollout import Sampling, generate
from videoqa import world
from videoqa.answers import Question, instruction
from videoqa.video import resize_frame

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-5, initializer_range=0.2,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama2_vicuna_tinyllama": ("Llama", dict(tie_word_embeddings=False)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, rope_theta=100000.0)),
    "llama3": ("Llama", dict(tie_word_embeddings=False, rope_parameters=LLAMA3)),
    "vicuna_16k": ("Llama", dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})),
    "mistral": ("Mistral", dict(sliding_window=5, head_dim=12)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=False)),
}


def theirs(family, **more):
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | options | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in (p for n, p in model.named_parameters() if p.dim() == 1):
        parameter.data += 0.3 * torch.randn_like(parameter)  # biases of 0 and gains of 1 would hide an error
    return model


def chosen(policy, **options):
    return PolicyOptions(policy=str(policy), **options)


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return str(folder)


def logits(decoder, ids, S):
    """(P, T, V) of the tokens behind the first S, prompt and completion as two parts."""
    x = decoder.embed_tokens(ids)
    mask = torch.ones(len(ids), S, dtype=torch.bool)
    return decoder(x[:, :S], mask, x[:, None, S:])[:, 0] @ decoder.head.T


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_family_gives_transformers_logits_and_64_greedy_tokens(family, tmp_path):
    model = theirs(family)
    decoder = load_decoder(saved(model, tmp_path))
    ids = torch.randint(2, 60, (2, 100), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits[:, 7:-1]
    assert (logits(decoder, ids, 8) - wanted).abs().max() <= 1e-4 < wanted.std()
    mask = torch.arange(8) >= torch.tensor([[3], [0]])  # padded on the left
    policy = SimpleNamespace(decoder=decoder, embed_prompt=lambda ids, mask, video: decoder.embed_tokens(ids))
    prompts = Prompts(ids[:, :8], mask, torch.zeros(2, 0, 1))
    ours = generate(policy, prompts, 1, Sampling(64, torch.tensor([], dtype=torch.int64))).completion_ids
    options = dict(max_new_tokens=64, do_sample=False, pad_token_id=0)
    greedy = model.generate(ids[:, :8], attention_mask=mask.long(), **options)[:, 8:]
    assert torch.equal(ours, greedy)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_half_precision_files_load_as_stored(dtype, tmp_path):
    model = theirs("qwen2").to(dtype)
    decoder = load_decoder(saved(model, tmp_path, max_shard_size="10KB"))
    assert (tmp_path / "model.safetensors.index.json").exists()
    for name, x in decoder.state_dict().items():
        assert torch.equal(x, model.model.state_dict()[name].float())


@torch.no_grad()
def test_of_two_files_and_of_two_ropes_the_ones_that_transformers_takes_are_taken(tmp_path):
    saved(theirs("llama3"), tmp_path, max_shard_size="10KB")
    torch.manual_seed(5)
    other = transformers.LlamaForCausalLM(theirs("llama3").config)
    save_file(other.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    ropes = {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
    ropes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    change(tmp_path, **ropes)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(2, 60, (2, 100), generator=torch.Generator().manual_seed(1))
    ours = logits(load_decoder(str(tmp_path)), ids, 8)
    assert (ours - wanted(ids).logits[:, 7:-1]).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_decoder_is_a_plain_checkpoint_that_transformers_loads(family, tmp_path):
    decoder = load_decoder(saved(theirs(family), tmp_path / "base"))
    lora.add_adapters(decoder, 4, 8.0, generator=torch.Generator().manual_seed(2))
    for layer in lora.layers(decoder).values():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(3))
    ids = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    adapted = logits(decoder, ids, 8)
    with lora.using(decoder, "off"):
        assert (logits(decoder, ids, 8) - adapted).abs().max() > 0.1  # the adapter does something
    lora.merge(decoder)
    save_decoder(decoder, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (merged(ids).logits[:, 7:-1] - adapted).abs().max() <= 1e-4
    again = load_decoder(str(tmp_path / "merged"))
    torch.testing.assert_close(again.state_dict(), decoder.state_dict(), atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------------ CLIP

VISION = dict(
    hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1, image_size=28,
    patch_size=14,
)  # fmt: skip
TEXT = dict(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, vocab_size=50,
    max_position_embeddings=9, bos_token_id=48, eos_token_id=49,
)  # fmt: skip


def their_clip(act):
    torch.manual_seed(0)
    text, vision = TEXT | {"hidden_act": act}, VISION | {"hidden_act": act}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.dim() == 2:
            parameter.data *= 3
    return model


def openai_names(state):
    """The same weights as OpenAI publishes them, written out here apart from checkpoint.py's table."""
    out = {}
    for side, prefix in (("vision", "visual."), ("text", "")):
        m = f"{side}_model."
        for i in range(VISION["num_hidden_layers"] if side == "vision" else TEXT["num_hidden_layers"]):
            old, new = f"{m}encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                qkv = [state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{new}attn.in_proj_{kind}"] = torch.cat(qkv)
                for a, b in (
                    ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                ):  # fmt: skip
                    out[f"{new}{b}.{kind}"] = state[f"{old}{a}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    out["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["visual.proj"], out["text_projection"] = (
        state[f"{x}_projection.weight"].T for x in ("visual", "text")
    )
    return {k: v.contiguous() for k, v in out.items()} | {"logit_scale": state["logit_scale"]}


@torch.no_grad()
@pytest.mark.parametrize("source", ["quick_gelu", "gelu", "openai"])
def test_clip_gives_transformers_features_and_hidden_layers(source, tmp_path):
    model = their_clip("quick_gelu" if source == "openai" else source)
    if source == "openai":
        save_file(openai_names(model.state_dict()), tmp_path / "ViT.safetensors")
        clip = load_clip(str(tmp_path / "ViT.safetensors"))
    else:
        clip = load_clip(saved(model, tmp_path))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    ids = torch.randint(1, 48, (4, 9), generator=generator)
    lengths = torch.tensor([9, 4, 6, 2])
    ids[torch.arange(4), lengths - 1] = 49
    wanted = model(ids, pixels, output_hidden_states=True)
    assert (clip.vision_model(pixels) - wanted.image_embeds).abs().max() <= 1e-5
    assert (clip.text_model(ids, lengths) - wanted.text_embeds).abs().max() <= 1e-5
    for layer in (-1, -2, 0):
        hidden = wanted.vision_model_output.hidden_states[layer][:, 1:]
        assert (clip.patch_tokens(pixels, layer) - hidden).abs().max() <= 1e-5 < hidden.std()


def expand2square(frame):
    """LLaVA's: (H, W, 3) in the middle of a square of CLIP's mean colour."""
    height, width, _ = frame.shape
    side = max(height, width)
    square = np.full((side, side, 3), [122, 116, 104], dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = frame
    return square


@pytest.mark.parametrize("shape", [(40, 61), (90, 160), (61, 40), (20, 23), (28, 28), (90, 30)])
def test_preprocessing_is_clip_image_processors(shape):
    generator = torch.Generator().manual_seed(2)
    frame = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    square = expand2square(frame.permute(1, 2, 0).numpy())
    for how, image in (("crop", frame.permute(1, 2, 0).numpy()), ("pad", square)):
        pixels = processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        ours = torch.from_numpy(resize_frame(frame.permute(1, 2, 0).numpy(), 28, how))
        ours = preprocess(ours.permute(2, 0, 1)[None])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        assert ((ours - pixels) * std).abs().max() <= 1 / 255 + 1e-6


# ----------------------------------------------------------------------------------------------------- LLaVA


def frames_on_show(path, k):
    """Whole decoded frames (H, W, 3) at the centres of k equal parts, by counting: the frame rate is even."""
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [frames[(2 * i + 1) * len(frames) // (2 * k)] for i in range(k)]


def drawn_clip(folder, size):
    """A clip (width, height) of colour ramps that drift, with a hard edge. Its path."""
    y, x = np.mgrid[: size[1], : size[0]]
    with av.open(str(folder / "ramps.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "10"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for t in range(8):
            pixels = np.stack([x * 3 + 20 * t, y * 2 + 9 * t, 255 * (x > y + 4 * t)], axis=2) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return str(folder / "ramps.mp4")


@pytest.mark.parametrize("clip", ["world", (90, 64), (64, 100)])
@pytest.mark.parametrize("framing", ["crop", "pad"])
def test_frames_reach_a_llava_policy_as_clip_image_processor_makes_them(
    clip, framing, tokenizer_files, tmp_path, monkeypatch
):
    saved(their_llava(image_token_index=3, vocab_size=320), tmp_path)
    shutil.copy(tokenizer_files / "tokenizer.json", tmp_path)
    if framing == "pad":
        (tmp_path / "preprocessor_config.json").write_text('{"do_pad": true}')
    if clip == "world":
        world.make_world(tmp_path, range(1))
        (path,) = map(str, tmp_path.glob("*.mp4"))
    else:
        path = drawn_clip(tmp_path, clip)
    policy, tokenizer = load_policy(chosen(str(tmp_path), num_frames=4))
    seen, patch_tokens = [], policy.clip.patch_tokens
    policy.clip.patch_tokens = lambda pixels, layer: seen.append(pixels) or patch_tokens(pixels, layer)
    PromptSet(policy, tokenizer, [Question("a", path, "what does the red block do?", "it moves")])
    frames = frames_on_show(path, 4)
    if framing == "pad":
        frames = [expand2square(frame) for frame in frames]
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    wanted = processor(frames, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    assert seen[0].shape == wanted.shape and wanted.std() > 0.3
    assert ((seen[0] - wanted) * std).abs().max() <= 1 / 255 + 1e-6


def their_llava(image_token_index=59, **text):
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=image_token_index,
        text_config=transformers.LlamaConfig(**SIZES | text), image_seq_length=4,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_llava_gives_transformers_logits_on_two_frames(tmp_path):
    model = their_llava()
    for tokens in ("patches", "pooled"):
        pooled = tokens == "pooled"
        ours = load_pretrained(chosen(saved(model, tmp_path), video_tokens=tokens, num_frames=2))
        generator = torch.Generator().manual_seed(1)
        frames = torch.randint(0, 256, (1, 2, 3, 28, 28), dtype=torch.uint8, generator=generator)
        words = torch.randint(2, 59, (1, 10), generator=generator)
        N_video = 2 + 4 if pooled else 2 * 4
        video = ours.embed_video(frames, torch.tensor([[0.0, 1.0]]))
        assert video.shape[1] == N_video == ours.bridge.num_tokens
        ids = torch.cat([words[:, :1], torch.full((1, N_video), 59), words[:, 1:]], dim=1)
        S = 4 + N_video
        prompt = ours.embed_prompt(ids[:, :S], torch.ones(1, S, dtype=torch.bool), video)
        own = ours.decoder.embed_tokens(ids[:, None, S:])
        states = ours.decoder(prompt, torch.ones(1, S, dtype=torch.bool), own)
        features = model.get_image_features(preprocess(frames[0])).pooler_output  # two frames of (N, D)
        if pooled:  # written out
            x = torch.stack(list(features))
            x = torch.cat([x.mean(dim=1), x.mean(dim=0)])
            embeds = model.get_input_embeddings()(ids)
            embeds[0, 1 : 1 + N_video] = x
            wanted = model(inputs_embeds=embeds).logits
        else:
            wanted = model(input_ids=ids, pixel_values=preprocess(frames[0])).logits
        assert (states[:, 0] @ ours.decoder.head.T - wanted[:, S - 1 : -1]).abs().max() <= 1e-4


@torch.no_grad()
def test_a_merged_llava_is_a_plain_checkpoint_that_transformers_loads(tmp_path):
    model = load_pretrained(chosen(saved(their_llava(), tmp_path / "base"), num_frames=2))
    lora.add_adapters(model.decoder, 4, 8.0, generator=torch.Generator().manual_seed(2))
    for layer in lora.layers(model.decoder).values():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(3))
    ids = torch.randint(2, 59, (2, 30), generator=torch.Generator().manual_seed(1))
    adapted = logits(model.decoder, ids, 8)
    lora.merge(model.decoder)
    save_pretrained(model, str(tmp_path / "base"), str(tmp_path / "merged"), end_ids=(2,))
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert (merged(ids).logits[:, 7:-1] - adapted).abs().max() <= 1e-4
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    features = torch.stack(list(merged.get_image_features(pixels).pooler_output))
    ours = model.bridge(model.clip.patch_tokens(pixels)[:, None], None)[:, 1:]  # pooled over one frame
    assert (ours - features).abs().max() <= 1e-4


def test_published_llava_names_and_defaults_load_too(tmp_path):
    folder = tmp_path / "llava"
    saved(their_llava(), folder)
    state = load_file(folder / "model.safetensors")
    state = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in state.items()}
    save_file(state, folder / "model.safetensors")
    model = load_pretrained(chosen(folder, num_frames=2))
    wanted = state["vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"]
    assert torch.equal(model.clip.vision_model.layers[1].fc1.weight, wanted)
    # the published text_config names next to nothing: the rest are LLaMA-7B's own sizes
    cfg = decoder_config({"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}, "config.json")
    assert (cfg.dim, cfg.num_layers, cfg.ffn_dim, cfg.num_kv_heads) == (4096, 32, 11008, 32) and not cfg.tied


# ------------------------------------------------------------------------------------------------- full sizes


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """A byte-level BPE tokenizer, trained here, with BOS put in front, as transformers saves it."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(["what does the red block do? (A) it moves (B) it stays"] * 3, trainer)
    bos = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.post_processor = bos
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


QUESTION = "what does the red block do?\n(A) it moves (B) ümlaut"
SPELT = {  # as LLaVA's, LLaMA-2-chat's and ChatML's own documents write them, in full
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. "
    f"USER: <image>\n{QUESTION} ASSISTANT:",
    "llama-2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using natural "
    f"language.\n<</SYS>>\n\n<image>\n{QUESTION} [/INST]",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
    f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n",
    "mistral": f"[INST] <image>\n{QUESTION} [/INST]",
    "plain": f"<image>\n{QUESTION}\n",
}


@pytest.mark.parametrize("template", SPELT)
def test_chat_prompts_are_auto_tokenizers_with_the_placeholder_repeated(template, tokenizer_files):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_files)
    ours = ChatTokenizer(str(tokenizer_files), template, 3, 320)
    wanted = theirs(SPELT[template]).input_ids
    place = wanted.index(3)
    assert ours.prompt(QUESTION, 1) == wanted and ours.video_start == place
    assert ours.prompt(QUESTION, 5) == wanted[:place] + [3] * 5 + wanted[place + 1 :]
    # a placeholder that the tokenizer does not know: before and after the video apart, BOS once
    apart = ChatTokenizer(str(tokenizer_files), template, 310, 320)
    assert [3 if i == 310 else i for i in apart.prompt(QUESTION, 1)] == wanted
    assert ours.decode([*ours.encode(QUESTION), *ours.end_ids]) == QUESTION
    banned = ours.banned_ids(320)
    # the turn's end first, then eos_token; another template's end is never drawn
    assert ours.end_ids == ((5, 2) if template in ("chatml", "qwen3") else (2,))
    assert banned[[0, 1, 3, 4]].all() and banned[5] == (5 not in ours.end_ids)
    assert not banned[2] and not banned[6 : ours.vocab_size].any()
    assert banned[ours.vocab_size :].all() and apart.banned_ids(320)[310]
    with pytest.raises(BadInput, match="^question .*holds the special token <image>; take it out$"):
        ours.prompt("is <image> here?", 5)


@pytest.mark.parametrize("think", [False, True])
def test_a_chat_model_is_told_the_answer_format_and_the_times_behind_its_question(
    think, tokenizer_files, tmp_path
):
    saved(their_llava(image_token_index=3, vocab_size=320), tmp_path)
    shutil.copy(tokenizer_files / "tokenizer.json", tmp_path)
    world.make_world(tmp_path / "videos", range(1), workers=1)
    policy, tokenizer = load_policy(chosen(str(tmp_path), num_frames=3, think=think))
    (video,) = (tmp_path / "videos").glob("*.mp4")
    asked = Question("a", str(video), "when does it move?", "", spans=((1.0, 2.0),))
    (prompt,) = PromptSet(policy, tokenizer, [asked]).prompts
    wanted = f"when does it move?\n{instruction(asked, think, [2 / 3, 2, 10 / 3])}"  # a third of 4 s each
    assert "from 0.7 to 3.3 seconds" in wanted and ("<think>" in wanted) == think
    assert prompt == tokenizer.prompt(wanted, policy.bridge.num_tokens)


def test_a_runs_policy_merges_into_a_checkpoint_of_its_kind(tokenizer_files, tmp_path):
    saved(their_llava(image_token_index=3, vocab_size=320), tmp_path / "base")
    shutil.copy(tokenizer_files / "tokenizer.json", tmp_path / "base")
    policy, _ = load_policy(chosen(str(tmp_path / "base"), num_frames=2))
    lora.add_adapters(policy.decoder, 4, 8.0)
    for layer in lora.layers(policy.decoder).values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(3))
    run = vars(chosen(tmp_path / "base", num_frames=2)) | {"lora_r": 4, "lora_alpha": 8.0, "made": {}}
    run |= {"max_new_tokens": 5, "eval_samples": 1, "dtype": "float32"}
    peft_files.save_adapter(policy.decoder, str(tmp_path / "run" / "adapter"))
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    written, read = (tmp_path / x / "model.safetensors" for x in ("merged", "base"))
    read.chmod(0o640)
    merge_run(str(tmp_path / "run"), str(tmp_path / "merged"))
    lora.merge(policy.decoder)
    again, tokenizer = load_policy(chosen(str(tmp_path / "merged"), num_frames=2))
    torch.testing.assert_close(again.state_dict(), policy.state_dict(), atol=0, rtol=0)
    assert again.cfg.video_start == tokenizer.video_start and tokenizer.placeholder_id == 3
    with pytest.raises(BadInput, match="exists already; name another folder"):
        merge_run(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert written.stat().st_mode == read.stat().st_mode  # others may read what others could read


def test_a_tokenizer_whose_ids_exceed_the_embedding_is_refused(tokenizer_files, tmp_path):
    with pytest.raises(BadInput, match=r"^\S*tokenizer.json: id \d+ exceeds the model's 200 rows;"):
        ChatTokenizer(str(tokenizer_files), "plain", 3, 200)
    with pytest.raises(BadInput, match=r"^\S*tokenizer.json: no such file"):
        ChatTokenizer(str(tmp_path), "plain", 3, 320)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"^\S*tokenizer.json: .*copy the file again$"):
        ChatTokenizer(str(tmp_path), "plain", 3, 320)


@pytest.mark.parametrize("video_tokens, count", [("pooled", 3 + 4), ("patches", 3 * 4)])
def test_a_llava_folder_is_a_policy_that_answers_and_never_samples_the_placeholder(
    video_tokens, count, tokenizer_files, tmp_path
):
    saved(their_llava(image_token_index=3, vocab_size=320), tmp_path)
    shutil.copy(tokenizer_files / "tokenizer.json", tmp_path)
    world.make_world(tmp_path / "videos", range(1))
    policy, tokenizer = load_policy(chosen(str(tmp_path), video_tokens=video_tokens, num_frames=3))
    (video,) = (tmp_path / "videos").glob("*.mp4")
    question = Question("a", str(video), "what does the red block do?", "it moves")
    prompts = PromptSet(policy, tokenizer, [question])
    assert prompts.prompts[0].count(3) == count == policy.bridge.num_tokens
    batch = prompts[torch.tensor([0])]
    x = policy.embed_prompt(batch.prompt_ids, batch.prompt_mask, batch.video_embeds)
    assert torch.equal(x[0, batch.prompt_ids[0] == 3], batch.video_embeds[0])  # exactly where they stand
    banned, generator = tokenizer.banned_ids(320), torch.Generator().manual_seed(4)
    uniforms = torch.rand(1, 50, 20, generator=generator)
    ends = torch.tensor(tokenizer.end_ids)
    rollout = generate(policy, batch, 50, Sampling(20, ends, banned), uniforms)
    assert not banned[rollout.completion_ids[rollout.completion_mask]].any()
    assert len(set(prompts.texts(rollout))) > 10


@pytest.fixture
def llava_folder(tokenizer_files, tmp_path):
    saved(their_llava(image_token_index=3, vocab_size=320), tmp_path / "llava")
    shutil.copy(tokenizer_files / "tokenizer.json", tmp_path / "llava")
    return tmp_path / "llava"


@pytest.mark.parametrize(
    ("base", "bridge"), [("float32", "auto"), ("float32", "qformer"), ("bfloat16", "auto"), ("nf4", "auto")]
)
def test_train_takes_a_step_on_a_llava_in_every_base_and_peft_reads_its_adapter(
    base, bridge, llava_folder, tmp_path, monkeypatch
):
    (tmp_path / "longest.py").write_text(
        "def first(question, texts, *, video, reference):\n"
        "    return [sum(len(other) > len(text) for other in texts) for text in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--policy", llava_folder, "--base", base, "--num_frames", 2, "--num_steps", 1, "--lr", 0.02]
    options += ["--world_dir", tmp_path / "world", "--num_train_clips", 2, "--num_eval_clips", 1]
    options += ["--batch_prompts", 2, "--micro_batch_prompts", 1, "--eval_samples", 1, "--lora_r", 4]
    options += ["--max_new_tokens", 4, "--oracle", "longest:first", "--out", tmp_path / "run"]
    options += ["--dtype", "float32" if base == "float32" else "bfloat16", "--video_tokens", bridge]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    assert train.main() == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert not row["bad"] and row["grad_norm"] > 0
    policy, _, _ = load_run(str(tmp_path / "run"))
    adapted = lora.layers(policy.decoder).values()
    assert len(adapted) == 2 * 7 and all(isinstance(x.base, NF4Linear) == (base == "nf4") for x in adapted)
    head = policy.decoder.head.dtype
    assert head == (torch.float32 if base == "float32" else torch.bfloat16)
    if base == "float32":
        peft = pytest.importorskip("peft")
        plain = transformers.LlavaForConditionalGeneration.from_pretrained(llava_folder)
        ids = torch.randint(4, 300, (2, 20), generator=torch.Generator().manual_seed(1))
        before = plain(ids).logits
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "run" / "adapter"))
        after = theirs(ids).logits
        assert (logits(policy.decoder, ids, 8) - after[:, 7:-1]).abs().max() <= 1e-4
        assert (after - before).abs().max() > 0.1  # the adapter was found, and does something


def test_a_run_on_a_llava_fits_80_columns_and_is_never_silent_for_long(llava_folder, tmp_path):
    options = ["--policy", llava_folder, "--num_frames", 2, "--num_steps", 2, "--batch_prompts", 4]
    options += ["--world_dir", tmp_path / "world", "--num_train_clips", 4, "--num_eval_clips", 2]
    options += ["--eval_samples", 1, "--max_new_tokens", 4, "--out", tmp_path.parent / "run"]
    lines, silence = in_terminal([str(x) for x in (ROOT / "train.py", *options)])
    assert any(line.startswith("report: ") for line in lines), lines
    assert max(map(len, lines)) <= 80 and silence[0] < 3, (silence, max(lines, key=len))


def test_a_4_bit_llava_is_read_one_full_precision_layer_at_a_time(llava_folder, monkeypatch):
    alive, most = Counter(), []  # storages in full precision, by the decoder layer's name

    def watch(name, tensor):
        alive[name] += 1
        weakref.finalize(tensor.untyped_storage(), alive.subtract, [name])
        most.append(sum(count > 0 for count in alive.values()))

    read, quantise, last = huggingface.Tensors.__getitem__, nf4.quantise_linear, []

    def read_watched(tensors, name):
        tensor = read(tensors, name)
        if "language_model.model.layers." in name and tensor.dim() == 2:
            last.append(name)
            watch(name, tensor)
        return tensor

    def quantise_watched(linear):
        watch(last[-1], linear.weight)
        return quantise(linear)

    monkeypatch.setattr(huggingface.Tensors, "__getitem__", read_watched)
    monkeypatch.setattr(nf4, "quantise_linear", quantise_watched)
    model = load_pretrained(chosen(llava_folder, num_frames=2, base="nf4"))
    assert len(alive) == len(last) == 2 * 7 and len(most) == 2 * 2 * 7 and max(most) == 1
    assert not +alive and sum(isinstance(m, NF4Linear) for m in model.modules()) == 2 * 7


# Sizes from the models' own config.json. Counts from the model cards of Llama-3.1-8B and Qwen2.5-7B (what the
# hub reads off their safetensors) and Keras' llama2_7b_en. Llama-2-7b-hf's shows 2,048 more, which are
# constants: its files hold rotary_emb.inv_freq, 64 numbers in each of 32 layers.
PUBLISHED = {
    "LLaMA-2-7B": (6_738_415_616, dict(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5)),
    "Llama-3.1-8B": (8_030_261_248, dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192})),
    "Qwen2.5-7B": (7_615_616_512, dict(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6,
        rope_theta=1e6, sliding_window=131072, use_sliding_window=False)),
}  # fmt: skip


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_decoders_have_exactly_the_published_parameters(name):
    published, config = PUBLISHED[name]
    with torch.device("meta"):
        decoder = Decoder(decoder_config(config, "config.json"))
    assert count(decoder) == published
    if name == "LLaMA-2-7B":
        shapes = [
            m.weight.shape for n, m in decoder.named_modules() if n.split(".")[-1] in lora.DECODER_LINEARS
        ]
        assert sum(64 * (a + b) for a, b in shapes) == 159_907_840  # r = 64 on all seven linear layers


def test_full_size_clip_has_exactly_the_published_parameters():
    with torch.device("meta"):
        clip = Clip(ClipConfig(
            image_size=336, patch_size=14, width=1024, num_layers=24, num_heads=16, text_width=768,
            text_layers=12, text_heads=12, text_length=77, vocab_size=49408, embed_dim=768,
            activation="quick_gelu",
        ))  # fmt: skip
    assert count(clip) == 427_944_193  # Keras' card of clip-vit-large-patch14-336


# -------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def llama(tmp_path):
    saved(theirs("smollm2"), tmp_path)
    return tmp_path


def refused(folder, *words, load=load_decoder):
    with pytest.raises(BadInput) as caught:
        load(str(folder))
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_extra_or_misshapen_tensor_is_named_with_its_file(llama):
    file, name = llama / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    state = load_file(file)
    for odd in (
        {k: v for k, v in state.items() if k != name},
        state | {"model.layers.2.mlp.up_proj.weight": state[name].clone()},
        state | {name: state[name].T.contiguous()},
    ):
        save_file(odd, file)
        refused(llama, "model.layers.", "mlp.up_proj.weight", str(file))


def test_a_tensor_missing_from_all_shards_is_named_with_their_index(tmp_path):
    saved(theirs("llama3"), tmp_path, max_shard_size="10KB")
    index, name = tmp_path / "model.safetensors.index.json", "model.layers.1.mlp.up_proj.weight"
    content = json.loads(index.read_text())
    shard = tmp_path / content["weight_map"].pop(name)
    save_file({k: v for k, v in load_file(shard).items() if k != name}, shard)
    index.write_text(json.dumps(content))
    refused(tmp_path, f"{index}: tensor {name} is missing; use files that belong together")


@pytest.mark.parametrize("kind", ["llama", "clip", "qwen2_vl", None])
def test_a_folder_that_is_no_policy_is_refused_with_what_a_policy_is(kind, tmp_path):
    if kind in ("llama", "clip"):
        saved(theirs("smollm2") if kind == "llama" else their_clip("gelu"), tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} if kind else {"sizes": {}}))
        save_file({}, tmp_path / "model.safetensors")
    for load in (policy_configs, load_policy):
        words = ("config.json", kind or "'model'", "pretrain.py", "LLaVA-1.5")
        refused(tmp_path, *words, load=lambda folder, load=load: load(chosen(folder)))


def test_an_unsupported_architecture_lists_the_supported_ones(llama):
    change(llama, model_type="gpt2")
    refused(llama, "config.json", "gpt2", "llama", "mistral", "qwen2", "qwen3", "clip", "llava")
    change(llama, model_type="llama", rope_parameters={"rope_type": "yarn"})
    refused(llama, "config.json", "yarn")
    change(llama, rope_parameters=None, attention_bias=True)
    refused(llama, "config.json", "attention_bias")


def test_truncated_files_and_broken_indices_are_refused(tmp_path):
    saved(theirs("llama3"), tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content in (whole[:-10], whole[:4], b"\xff" * 100):
        shard.write_bytes(content)
        refused(tmp_path, shard.name)
    shard.unlink()
    refused(tmp_path, shard.name)
    shard.write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": names | {"model.odd.weight": shard.name}}))
    refused(tmp_path, "model.safetensors.index.json", "model.odd.weight")
    index.write_text("{")
    refused(tmp_path, "model.safetensors.index.json")


def test_pickles_and_folders_without_config_are_refused(llama, tmp_path_factory):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, "pytorch_model.bin", "pickle", "safetensors.torch.save_file")
    refused(tmp_path_factory.mktemp("empty"), "config.json", "Hugging Face layout")
    (llama / "ViT.pt").write_bytes(b"")
    refused(llama / "ViT.pt", "ViT.pt", "pickle", load=load_clip)


# --------------------------------------------------------------------------------- folders as users have them

LONG = torch.arange(40)[None] % 60


def weights_of(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def gap_to_transformers(folder, model=None):
    model = model or transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (logits(load_decoder(str(folder)), LONG, 8) - model.eval()(LONG).logits[:, 7:-1]).abs().max()


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_beside_a_tied_config_is_taken_as_transformers_takes_it(differs, tmp_path):
    saved(theirs("qwen2"), tmp_path)
    head = torch.randn(60, 32, generator=torch.Generator().manual_seed(1))
    weights_of(
        tmp_path,
        lambda state: (
            state | {"lm_head.weight": head if differs else state["model.embed_tokens.weight"].clone()}
        ),
    )
    assert gap_to_transformers(tmp_path) <= 1e-4
    assert load_decoder(str(tmp_path)).cfg.tied != differs


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_its_classs_default(family, tmp_path):
    saved(theirs(family, rms_norm_eps=1e-6, num_key_value_heads=4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias"):
        config.pop(name, None)
    if family.startswith("llama2"):
        config.pop("num_key_value_heads")  # of this class alone: as many as heads
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert gap_to_transformers(tmp_path) <= 1e-4


def test_mistrals_window_is_4096_where_it_is_left_out_and_none_where_it_is_null():
    config = {"model_type": "mistral", "num_hidden_layers": 2}
    assert decoder_config(config, "config.json").sliding_window == 4096
    assert decoder_config(config | {"sliding_window": None}, "config.json").sliding_window == 0


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_whatever_stands_before_a_decoders_names_it_is_found(prefix, tmp_path):
    model = theirs("smollm2")
    saved(model, tmp_path)
    weights_of(tmp_path, lambda state: {k.replace("model.", prefix, 1): x for k, x in state.items()})
    assert gap_to_transformers(tmp_path, model) <= 1e-4


def test_a_llava_from_a_trainers_state_dict_is_the_same_llava(tmp_path):
    model = their_llava()
    saved(model, tmp_path / "written")
    shutil.copytree(tmp_path / "written", tmp_path / "trainer")
    state = {name: x.clone().contiguous() for name, x in model.state_dict().items()}
    save_file(state, tmp_path / "trainer" / "model.safetensors")
    assert any(name.startswith("model.vision_tower.") for name in state)
    one, other = (load_pretrained(chosen(tmp_path / name, num_frames=2)) for name in ("written", "trainer"))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("where", ["top", "text"])
def test_a_llava_is_tied_where_its_config_says_so_at_the_top_or_in_the_text(where, tmp_path):
    saved(their_llava(tie_word_embeddings=True), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config["text_config"] if where == "top" else config).pop("tie_word_embeddings")
    assert (config if where == "top" else config["text_config"])["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(chosen(tmp_path, num_frames=2)).cfg.tied


@torch.no_grad()
def test_a_clip_whose_mlp_is_not_four_times_its_width_gives_transformers_features(tmp_path):
    torch.manual_seed(0)
    text, vision = (part | {"hidden_act": "gelu"} for part in (TEXT, VISION))
    config = transformers.CLIPConfig(
        text_config=text | {"intermediate_size": 96}, vision_config=vision | {"intermediate_size": 272},
        projection_dim=24,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    clip = load_clip(saved(model, tmp_path))
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ids, lengths = torch.full((2, 9), 49), torch.tensor([9, 9])
    ids[:, :8] = torch.randint(1, 48, (2, 8), generator=torch.Generator().manual_seed(1))
    wanted = model(ids, pixels)
    assert (clip.vision_model(pixels) - wanted.image_embeds).abs().max() <= 1e-5
    assert (clip.text_model(ids, lengths) - wanted.text_embeds).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": "60"}, ("vocab_size is '60'", "a whole number above 0")),
        ({"rope_parameters": None, "rope_theta": "1e4"}, ("rope_theta is '1e4'", "a number above 0")),
        ({"num_attention_heads": 0}, ("num_attention_heads is 0",)),
        ({"num_hidden_layers": True}, ("num_hidden_layers is True",)),
        ({"rms_norm_eps": None}, ("rms_norm_eps is None",)),
        ({"num_key_value_heads": 3}, ("num_attention_heads 4 is no multiple of num_key_value_heads 3",)),
        ({"rope_parameters": {"rope_type": "yarn"}}, ("rope type yarn is not supported",)),
        ({"rope_parameters": "linear"}, ("rope_parameters is 'linear'",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq")),
        ({"layer_types": ["sliding_attention"] * 2}, ("a sliding window in some layers",)),
        ({"layer_types": ["chunked_attention"] * 2}, ("layer_types ['chunked_attention', ",)),
        ({"tie_word_embeddings": "false"}, ("tie_word_embeddings is 'false'", "true or false")),
        ({"attention_bias": "no"}, ("attention_bias is 'no'", "true or false")),
    ],
)
def test_an_odd_config_is_one_line_that_names_the_true_cause(changes, words, llama):
    change(llama, **changes)
    refused(llama, f"{llama}/config.json: {words[0]}", *words[1:])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e8m0fnu])
def test_weights_that_are_not_stored_as_floating_point_numbers_are_refused(dtype, llama):
    file, name = llama / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    state = load_file(file)
    save_file(state | {name: state[name].to(dtype)}, file)
    refused(llama, str(file), name, "not as floating-point numbers")


@pytest.mark.parametrize("shape", [(), (3,), (1, 3, 4, 4)])
def test_an_openai_file_whose_shapes_are_no_vits_is_refused(shape, tmp_path):
    odd = openai_names(their_clip("gelu").state_dict()) | {"visual.conv1.weight": torch.zeros(shape)}
    save_file(odd, tmp_path / "ViT.safetensors")
    refused(tmp_path / "ViT.safetensors", "ViT.safetensors: its shapes", load=load_clip)


def test_odd_weights_are_one_line_that_names_the_true_cause(tmp_path):
    saved(theirs("llama3"), tmp_path)
    file, sound = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(sound | {name: sound[name].clone().index_fill_(0, torch.tensor(3), torch.nan)}, file)
    refused(tmp_path, str(file), name, "NaN")
    save_file({k: x for k, x in sound.items() if k != "lm_head.weight"}, file)
    refused(tmp_path, str(file), "lm_head.weight is missing", "tie_word_embeddings false")
    wrapped = {
        "base_model.model." + k.replace("up_proj.", "up_proj.base_layer."): x for k, x in sound.items()
    }
    save_file(wrapped, file)
    refused(tmp_path, str(file), "base_layer", "merge_and_unload")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n")
    refused(tmp_path, str(file), "Git LFS", "git lfs pull")
