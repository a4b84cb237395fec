"""Text decoders behind a CLIP, Q-Formers from scratch, random weights, SentencePiece tokenizers: tiny folders
that transformers writes."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import pretrain
import train
from checkpoints import memory
from checkpoints.chat_tokenizer import ChatTokenizer
from checkpoints.huggingface import load_clip, load_decoder
from checkpoints.nf4 import NF4Linear
from checkpoints.policies import (
    PolicyOptions,
    load_policy,
    load_run,
    load_tokenizer,
    policy_configs,
    save_adapter_of,
)
from checkpoints.pretrained import know_ends, load_pretrained
from checkpoints.supervised import train_supervised
from data import PromptSet, longest_text
from eval import merge_run
from model import Bridge
from plumbing.options import BadInput
from plumbing.run_folder import fingerprint
from rollout import Sampling, generate
from videoqa import world
from videoqa.answers import Question

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from test_huggingface import (  # noqa: E402
    QUESTION,
    SPELT,
    chosen,
    openai_names,
    saved,
    their_clip,
    their_llava,
    theirs,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
V = 400


def sentencepiece(folder, legacy=True, wrapped="TokenizersBackend", image=False):
    """Saves a tokenizer laid out as LLaMA's: BPE with a token for each byte, words that begin with ▁, <s> in
    front. legacy: ▁ comes before every stretch between special tokens, in later files at the start alone."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    first = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=V - 1, special_tokens=first, show_progress=False)
    texts = ["what does the red block do? (A) it moves (B) USER: a helpful ASSISTANT:"] * 3
    words.train_from_iterator(texts, trainer)
    found = json.loads(words.to_str())["model"]
    found["merges"] = [tuple(pair) for pair in found["merges"]]
    model = {k: found[k] for k in ("vocab", "merges", "unk_token")}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(**model, byte_fallback=True, fuse_unk=True))
    bpe.add_special_tokens(SPECIAL + ["<image>"] * image)
    if legacy:
        parts = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        bpe.normalizer = tokenizers.normalizers.Sequence(parts)
    else:
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    of = tokenizers.decoders
    parts = [of.Replace("▁", " "), of.ByteFallback(), of.Fuse(), of.Strip(" ", 1, 0)]
    bpe.decoder = of.Sequence(parts)
    bos = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.post_processor = bos
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": wrapped, "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("wrapped", ["TokenizersBackend", "LlamaTokenizer"])
@pytest.mark.parametrize("legacy", [True, False])
def test_chat_prompts_of_a_sentencepiece_tokenizer_are_auto_tokenizers(legacy, wrapped, tmp_path):
    for image in (False, True):
        auto = sentencepiece(tmp_path, legacy, wrapped, image)
        placeholder = auto.convert_tokens_to_ids("<image>") if image else None
        for template, text in SPELT.items():
            if "<|im_" in text:
                with pytest.raises(BadInput, match=r"has no token <.im_start.>, which --template"):
                    ChatTokenizer(str(tmp_path), template, placeholder, V)
                continue
            ours = ChatTokenizer(str(tmp_path), template, placeholder, V)
            if image:
                wanted = auto(text).input_ids
                place = wanted.index(placeholder)
                wanted = wanted[:place] + 3 * [placeholder] + wanted[place + 1 :]
            else:  # as LLaVA's own code does it: the two pieces apart, <s> before the first alone
                before, after = text.split("<image>")
                wanted = auto(before).input_ids + 3 * [V] + auto(after, add_special_tokens=False).input_ids
            assert ours.prompt(QUESTION, 3) == wanted, (template, image)
            assert wanted[0] == 1 and 1 not in wanted[1:]
            assert ours.video_start == wanted.index(ours.placeholder_id)
            assert {3 + byte for byte in "ü".encode()} < set(wanted)  # the letter that no word has, as bytes
        assert ours.decode([*auto(QUESTION).input_ids, 2]) == QUESTION
        banned = ours.banned_ids(V)
        assert ours.end_ids == (2,) and banned[:2].all() and not banned[2:200].any()


# ------------------------------------------------------------------------------------------ decoder and CLIP


def llama_folder(folder, weights=True):
    model = theirs("llama2_vicuna_tinyllama", vocab_size=V)
    saved(model, folder) if weights else model.config.save_pretrained(folder)
    sentencepiece(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(text decoder, CLIP) that transformers wrote."""
    home = tmp_path_factory.mktemp("policies")
    return llama_folder(home / "llama"), saved(their_clip("quick_gelu"), home / "clip")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.make_world(folder, range(1), workers=1)
    return str(next(folder.glob("*.mp4")))


@pytest.mark.parametrize("family", ["smollm2", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("names", ["transformers", "openai"])
def test_a_text_decoder_and_a_clip_become_a_policy_with_a_new_q_former(
    family, names, folders, tmp_path, capsys
):
    folder, clip = saved(theirs(family), tmp_path / "decoder"), folders[1]
    if names == "openai":
        clip = str(tmp_path / "ViT.safetensors")
        save_file(openai_names(their_clip("quick_gelu").state_dict()), clip)
    state = torch.random.get_rng_state()
    model = load_pretrained(chosen(folder, clip=clip, num_frames=2, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    (note,) = capsys.readouterr().out.splitlines()
    size = sum(p.numel() for p in model.bridge.parameters())
    assert f"the Q-Former between CLIP and decoder, {size:,} parameters, starts from scratch (seed 3)" in note
    assert "updates the decoder's LoRA alone" in note
    torch.testing.assert_close(model.decoder.state_dict(), load_decoder(folder).state_dict(), atol=0, rtol=0)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.clip.patch_tokens(pixels), load_clip(clip).patch_tokens(pixels))
    assert not any(p.requires_grad for p in model.parameters())
    options = dict(clip=clip, num_frames=2)
    same, other = (load_pretrained(chosen(folder, seed=seed, **options)).bridge for seed in (3, 4))
    assert all(map(torch.equal, model.bridge.parameters(), same.parameters()))
    assert not torch.equal(model.bridge.queries, other.queries)


@pytest.mark.parametrize("tokens, count", [("auto", 32), ("pooled", 3 + 4), ("patches", 3 * 4)])
def test_a_decoder_without_an_image_token_gets_one_behind_its_vocabulary(tokens, count, folders, video):
    policy, tokenizer = load_policy(chosen(folders[0], clip=folders[1], num_frames=3, video_tokens=tokens))
    assert tokenizer.placeholder_id == V == policy.cfg.vocab_size
    asked = Question("a", video, "what does the red block do?", "it moves")
    prompts = PromptSet(policy, tokenizer, [asked])
    assert prompts.prompts[0].count(V) == count == policy.bridge.num_tokens
    policy.cfg = replace(policy.cfg, max_positions=20)
    with pytest.raises(
        BadInput, match=f"{len(prompts.prompts[0])} tokens, {count} of them.* for 20 positions"
    ):
        PromptSet(policy, tokenizer, [asked])
    batch = prompts[torch.tensor([0])]
    x = policy.embed_prompt(batch.prompt_ids, batch.prompt_mask, batch.video_embeds)
    places = batch.prompt_ids[0] == V
    assert torch.equal(x[0, places], batch.video_embeds[0])  # exactly where they stand
    assert torch.equal(x[0, ~places], policy.decoder.embed_tokens(batch.prompt_ids[0, ~places]))
    uniforms = torch.rand(1, 50, 20, generator=torch.Generator().manual_seed(4))
    banned, ends = tokenizer.banned_ids(V), torch.tensor(tokenizer.end_ids)
    rollout = generate(policy, batch, 50, Sampling(20, ends, banned), uniforms)
    assert not banned[rollout.completion_ids[rollout.completion_mask]].any()
    assert len(set(prompts.texts(rollout))) > 10


def run_train(monkeypatch, tmp_path, *more):
    options = ["--num_frames", 2, "--num_steps", 1, "--world_dir", tmp_path / "world", "--num_train_clips", 2]
    options += ["--num_eval_clips", 1, "--batch_prompts", 2, "--eval_samples", 1, "--lora_r", 4, "--lr", 0.02]
    options += ["--max_new_tokens", 4, "--oracle", "longest:first", "--out", tmp_path / "run", *more]
    (tmp_path / "longest.py").write_text(
        "def first(question, texts, *, video, reference):\n"
        "    return [sum(len(other) > len(text) for other in texts) for text in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    assert train.main() == 0
    return json.loads((tmp_path / "run" / "metrics.jsonl").read_text())


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_train_takes_a_step_on_a_text_decoder_and_the_merged_run_is_a_policy_again(
    base, folders, tmp_path, monkeypatch, capsys
):
    where = ["--policy", folders[0], "--clip", folders[1], "--base", base, "--seed", 5]
    row = run_train(monkeypatch, tmp_path, *where)
    assert not row["bad"] and row["grad_norm"] > 0
    assert "starts from scratch (seed 5)" in capsys.readouterr().out
    policy, tokenizer, _ = load_run(str(tmp_path / "run"))  # with the Q-Former of the run
    assert all(isinstance(x.base, NF4Linear) == (base == "nf4") for x in lora.layers(policy.decoder).values())
    fresh, _ = load_policy(chosen(folders[0], clip=folders[1], num_frames=2, seed=5))
    assert torch.equal(policy.bridge.queries, fresh.bridge.queries)
    if base == "nf4":
        return
    merge_run(str(tmp_path / "run"), str(tmp_path / "merged"))
    lora.merge(policy.decoder)
    capsys.readouterr()
    again, tokenizer_again = load_policy(chosen(str(tmp_path / "merged"), clip=folders[1], num_frames=2))
    assert capsys.readouterr().out == ""  # its Q-Former is no new one
    torch.testing.assert_close(again.state_dict(), policy.state_dict(), atol=0, rtol=0)
    assert tokenizer_again.prompt(QUESTION, 2) == tokenizer.prompt(QUESTION, 2)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(1))
    states = again.decoder(again.decoder.embed_tokens(ids), torch.ones_like(ids).bool())  # the last ones
    assert (states[:, 0, 0] @ again.decoder.head.T - plain(ids).logits[:, -1]).abs().max() <= 1e-4


def test_a_q_former_in_place_of_llavas_projector_learns_and_merges(tmp_path, monkeypatch, capsys):
    base = saved(their_llava(image_token_index=V - 1, vocab_size=V), tmp_path / "llava")
    sentencepiece(tmp_path / "llava", image=True)
    row = run_train(monkeypatch, tmp_path, "--policy", base, "--video_tokens", "qformer")
    assert not row["bad"] and "the Q-Former between CLIP and decoder" in capsys.readouterr().out
    policy, _, _ = load_run(str(tmp_path / "run"))
    plain, merged = load_pretrained(chosen(base, num_frames=2)), str(tmp_path / "merged")
    assert isinstance(policy.bridge, Bridge) and policy.bridge.num_tokens == 32
    assert all(map(torch.equal, policy.clip.parameters(), plain.clip.parameters()))
    merge_run(str(tmp_path / "run"), merged)
    use = f"use it: --num_frames 2 --policy {merged} --video_tokens qformer"
    assert capsys.readouterr().out.splitlines()[-1] == use
    lora.merge(policy.decoder)
    again = load_pretrained(chosen(merged, num_frames=2, video_tokens="qformer"))
    torch.testing.assert_close(again.state_dict(), policy.state_dict(), atol=0, rtol=0)
    projector = load_pretrained(chosen(merged, num_frames=2)).bridge
    assert all(map(torch.equal, projector.parameters(), plain.bridge.parameters()))


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_what_supervised_training_writes_is_a_policy_that_trains_and_merges(
    base, folders, tmp_path, monkeypatch, capsys
):
    world.make_world(tmp_path / "videos", range(4), workers=1)
    names = [f"clip{i:07d}.mp4" for i in range(4)]
    rows = [dict(id=name, video=name, question="what moves?", answer="it moves") for name in names]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taught = tmp_path / "taught"
    options = ["--stage", "sft", "--with_bridge", "--policy", folders[0], "--clip", folders[1]]
    options += ["--data", tmp_path / "data.jsonl", "--videos", tmp_path / "videos", "--out", taught]
    options += ["--steps", 8, "--save_every", 8, "--lr", 0.01, "--num_frames", 2, "--base", base]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, options)])
    pretrain.main()
    before = load_policy(chosen(folders[0], clip=folders[1], num_frames=2))[0]
    policy, tokenizer = load_policy(chosen(taught, base=base))
    assert not torch.equal(policy.bridge.queries, before.bridge.queries)
    sizes = policy_configs(chosen(taught, base=base))
    assert sizes == (replace(policy.cfg, video_start=1), policy.clip_cfg)
    assert load_tokenizer(chosen(taught), V).prompt(QUESTION, 2) == tokenizer.prompt(QUESTION, 2)
    row = run_train(monkeypatch, tmp_path, "--policy", taught, "--base", base)
    assert not row["bad"]
    merge_run(str(tmp_path / "run"), str(tmp_path / "merged"))
    use = f"use it: --clip {folders[1]} --num_frames 2 --policy {tmp_path / 'merged'}"
    assert capsys.readouterr().out.splitlines()[-1] == use
    ranked, _, _ = load_run(str(tmp_path / "run"))
    lora.merge(ranked.decoder)
    capsys.readouterr()
    again, _ = load_policy(chosen(tmp_path / "merged", clip=folders[1], num_frames=2))
    assert capsys.readouterr().out == ""  # no bridge from scratch
    if base == "float32":
        torch.testing.assert_close(again.state_dict(), ranked.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_an_adapter_on_what_supervised_training_wrote_is_merged_before_the_base_takes_its_bits(
    base, folders, tmp_path
):
    """It was merged into 4 bits, and left the decoder's layers in float32."""
    config = {"decoder": folders[0], "clip": folders[1], "template": "auto", "video_tokens": "auto"}
    config |= {"fingerprints": {name: fingerprint(config[name]) for name in ("decoder", "clip")}}
    config |= {"model_type": "supervised_policy", "sizes": {"num_frames": 2}}
    (tmp_path / "taught").mkdir()
    (tmp_path / "taught" / "config.json").write_text(json.dumps(config))
    policy, _ = load_policy(chosen(folders[0], clip=folders[1], num_frames=2))
    for parameter in lora.add_adapters(policy.decoder, 4, 8.0):
        parameter.data += 0.02
    save_adapter_of(policy, str(tmp_path / "adapter"))
    options = dict(base=base, adapter=str(tmp_path / "adapter"))
    ours, _ = load_policy(chosen(tmp_path / "taught", **options))
    wanted, _ = load_policy(chosen(folders[0], clip=folders[1], num_frames=2, **options))
    torch.testing.assert_close(ours.decoder.state_dict(), wanted.decoder.state_dict(), atol=0, rtol=0)


def refused(*words, load=load_pretrained, **options):
    with pytest.raises(BadInput) as caught:
        load(PolicyOptions(**options))
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_parts_that_do_not_make_a_policy_are_refused_by_name(folders, tmp_path):
    llama, clip = folders
    llava = saved(their_llava(image_token_index=V - 1, vocab_size=V), tmp_path / "llava")
    for load in (policy_configs, load_policy):
        refused("config.json", "llama", "--clip", load=load, policy=llama)
        refused("--clip", clip, "leave --clip out", load=load, policy=llava, clip=clip)
        refused("config.json", "llama is no clip", load=load, policy=llama, clip=llama)
    refused("--clip", "leave --clip out", load=load_policy, policy="weights", clip=clip)
    with pytest.raises(BadInput, match="--stage bridge.*--policy"):
        pretrain.Config(stage="bridge")
    shutil.copy(f"{llama}/tokenizer.json", tmp_path / "llava")
    with pytest.raises(BadInput, match="^--policy .*has a projector; .*--video_tokens qformer$"):
        train_supervised(pretrain.Config(stage="bridge", policy=llava, out=str(tmp_path / "taught")))
    shutil.copytree(llama, tmp_path / "odd")
    shutil.copy(f"{clip}/model.safetensors", tmp_path / "odd" / "bridge.safetensors")
    refused("bridge.safetensors", "is missing", policy=str(tmp_path / "odd"), clip=clip)
    (tmp_path / "odd" / "config.json").write_text('{"model_type": ["llama"]}')
    refused("model_type ['llama'] is no policy", policy=str(tmp_path / "odd"), clip=clip)
    (tmp_path / "odd" / "preprocessor_config.json").write_text('{"do_pad": "false"}')
    refused("do_pad is 'false'", policy=llama, clip=str(tmp_path / "odd"))


# -------------------------------------------------------------------------------------------- random weights


def test_weights_are_random_only_where_there_are_none_and_the_option_says_so(folders, tmp_path, capsys):
    bare, clip = llama_folder(tmp_path / "bare", weights=False), folders[1]
    refused("model.safetensors: no such file", "--random_weights", policy=bare, clip=clip)
    options = dict(clip=clip, num_frames=2, random_weights=True)
    models = [load_policy(chosen(bare, seed=seed, **options))[0] for seed in (7, 7, 8)]
    said = capsys.readouterr().out
    assert f"{bare} holds no weights: --random_weights draws them, seed 7" in said
    assert f"{clip} holds" not in said
    first, same, other = (m.decoder.state_dict() for m in models)
    torch.testing.assert_close(first, same, atol=0, rtol=0)
    assert first.keys() == load_decoder(folders[0]).state_dict().keys()
    for name, x in first.items():
        if "norm" in name:
            assert (x == 1).all()
        else:
            assert x.std() == pytest.approx(0.02, rel=0.2) and not torch.equal(x, other[name])
    stored = load_clip(clip).vision_model.layers[0].fc1.weight
    assert torch.equal(models[0].clip.vision_model.layers[0].fc1.weight, stored)  # what is there is read
    (tmp_path / "bare" / "pytorch_model.bin").write_bytes(b"")  # weights, if of a kind that is refused
    refused("pytorch_model.bin", "pickle", policy=bare, **options)


def test_random_weights_serve_for_llava_and_for_clip_too(folders, tmp_path, capsys):
    their_llava().config.save_pretrained(tmp_path / "llava")
    their_clip("gelu").config.save_pretrained(tmp_path / "clip")
    llava = load_pretrained(chosen(str(tmp_path / "llava"), num_frames=2, random_weights=True))
    pair = dict(policy=folders[0], clip=str(tmp_path / "clip"), num_frames=2)
    refused("clip/model.safetensors: no such file", "--random_weights", **pair)
    model = load_pretrained(chosen(**pair, random_weights=True))
    for tower in (llava.clip, model.clip):
        layer = tower.vision_model.layers[0]
        assert (layer.fc1.bias == 0).all() and (layer.layer_norm1.weight == 1).all()
        assert layer.fc1.weight.std() == pytest.approx(0.02, rel=0.2)
    frames = torch.randint(0, 256, (1, 2, 3, 28, 28), dtype=torch.uint8)
    for policy in (llava, model):
        assert policy.embed_video(frames, torch.tensor([[0.0, 1.0]])).isfinite().all()


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_random_weights_never_stand_whole_in_more_bits_than_the_base(base, tmp_path):
    sizes = dict(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=12)
    their_llava(**sizes).config.save_pretrained(tmp_path)
    with memory.Live() as live:
        model = load_pretrained(chosen(str(tmp_path), num_frames=2, base=base, random_weights=True))
    layers = 12 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 512)
    held = [*model.decoder.parameters(), *model.decoder.buffers()]
    bits = {"bfloat16": 2, "nf4": 0.516}[base]
    assert 1 <= memory.num_bytes(held) / (bits * layers + 4 * 64 * 256) < 1.15
    # Beside what stays, the largest matrix alone is on its way, for nf4 with float32 and int64 copies of it.
    assert live.peak - live.live < {"bfloat16": 2, "nf4": 16}[base] * 256 * 512 < layers


def test_the_longest_prompt_is_known_before_any_video_and_weight_is_read(folders, video):
    asked = [Question("a", video, "what moves?", "it")]
    asked.append(Question("b", video, QUESTION, "", spans=((1.0, 2.0),)))
    asked.append(Question("c", video, "which one of all these?", "", options=("red", "blue"), answer_index=0))
    policy, tokenizer = load_policy(chosen(folders[0], clip=folders[1], num_frames=2))
    texts = [len(ids) - policy.bridge.num_tokens for ids in PromptSet(policy, tokenizer, asked).prompts]
    alone = load_tokenizer(chosen(folders[0]), V)
    assert longest_text(alone, [asked[0]], 2) == texts[0] and longest_text(alone, [asked[2]], 2) == texts[2]
    # where the times of the frames are said, those of a long video: a few digits more
    assert texts[1] == max(texts) < longest_text(alone, asked, 2) <= texts[1] + 8


# -------------------------------------------------------------------------------------------- merged, and old

# What load_run reads of a run's config.json beside the policy's options
MADE = dict(lora_r=4, lora_alpha=8.0, max_new_tokens=5, eval_samples=1, dtype="float32")
LEFT_BESIDE = {  # what a real checkpoint has beside its weights, and a merged one needs to be served
    "generation_config.json": '{"eos_token_id": 2, "do_sample": true, "temperature": 0.6, "top_p": 0.9}',
    "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
    "special_tokens_map.json": '{"eos_token": "</s>"}', "added_tokens.json": "{}", "merges.txt": "a b",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merged_run_is_the_folder_that_it_came_from_with_other_weights(dtype, folders, tmp_path, capsys):
    source, run, out = tmp_path / "source", tmp_path / "run", tmp_path / "merged"
    model = theirs("llama2_vicuna_tinyllama", vocab_size=V).to(getattr(torch, dtype))
    saved(model, source, max_shard_size="20KB")
    sentencepiece(source)
    for name, text in LEFT_BESIDE.items():
        (source / name).write_text(text)
    options = chosen(source, clip=folders[1], num_frames=2)
    policy, tokenizer = load_policy(options)
    for parameter in lora.add_adapters(policy.decoder, 4, 8.0):
        parameter.data += 0.02
    save_adapter_of(policy, str(run / "adapter"))
    made = vars(options) | MADE | {"made": {}}
    (run / "config.json").write_text(json.dumps(made))
    capsys.readouterr()
    merge_run(str(run), str(out))
    wrote, use = capsys.readouterr().out.splitlines()[-2:]
    assert wrote.startswith(f"wrote {out}: ")
    assert use == f"use it: --clip {folders[1]} --num_frames 2 --policy {out}"
    kept = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == kept | {"bridge.safetensors"}
    assert not list(tmp_path.glob("*.tmp"))
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
            continue
        before, after = load_file(path), load_file(out / path.name)
        assert {name: (x.shape, x.dtype) for name, x in before.items()} == {
            name: (x.shape, x.dtype) for name, x in after.items()
        }
        assert all(torch.equal(x, after[name]) != ("proj" in name) for name, x in before.items())
    lora.merge(policy.decoder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == getattr(torch, dtype) and merged.generation_config.eos_token_id == 2
    ids = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(1))
    states = policy.decoder(policy.decoder.embed_tokens(ids), torch.ones_like(ids).bool())
    gap = (states[:, 0, 0] @ policy.decoder.head.T - merged.float()(ids).logits[:, -1]).abs().max()
    assert gap <= (1e-4 if dtype == "float32" else 0.2)  # bfloat16 rounds the merged weights


def test_a_merged_model_knows_the_end_that_its_policy_learned(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "bos_token_id": 1}')
    know_ends(str(tmp_path), (7,))
    assert not (tmp_path / "generation_config.json").exists()  # config.json says it
    know_ends(str(tmp_path), (2, 7))
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"eos_token_id": [7, 2], "bos_token_id": 1}


def test_an_adapter_merged_into_a_float32_start_loses_nothing(folders, tmp_path):
    policy, _ = load_policy(chosen(folders[0], clip=folders[1], num_frames=2))
    for parameter in lora.add_adapters(policy.decoder, 4, 8.0):
        parameter.data += 0.02
    save_adapter_of(policy, str(tmp_path))
    lora.merge(policy.decoder)
    again, _ = load_policy(chosen(folders[0], clip=folders[1], num_frames=2, adapter=str(tmp_path)))
    torch.testing.assert_close(again.decoder.state_dict(), policy.decoder.state_dict(), atol=0, rtol=0)


def test_what_an_earlier_version_wrote_is_refused_with_the_way_on(folders, tmp_path):
    old = tmp_path / "weights"
    shutil.copytree("weights", old)
    config = json.loads((old / "config.json").read_text())
    config["model"]["adapter"] = config["model"].pop("bridge")
    (old / "config.json").write_text(json.dumps(config))
    refused(f"{old}/config.json: ", "earlier version", "pretrain.py", load=load_policy, policy=str(old))
    shutil.copytree(folders[0], tmp_path / "llama")
    (tmp_path / "llama" / "video_adapter.safetensors").write_bytes(b"")
    pair = dict(policy=str(tmp_path / "llama"), clip=folders[1])
    refused("video_adapter.safetensors", "rename the file to bridge.safetensors", **pair)
    run = vars(chosen("weights")) | MADE
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(BadInput, match="made is missing, so an earlier version made this run.*--adapter"):
        load_run(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(run | {"made": {}, "lora_r": "4"}))
    with pytest.raises(BadInput, match="^--lora_r 4: give a whole number at least 1 and"):
        load_run(str(tmp_path))


def test_a_policy_with_a_weight_that_is_no_number_is_refused_by_name(tmp_path):
    shutil.copytree("weights", tmp_path / "weights")
    file = tmp_path / "weights" / "model.safetensors"
    state = load_file(file)
    state["decoder.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(state, file)
    refused(str(file), "down_proj", "NaN", load=load_policy, policy=str(tmp_path / "weights"))


def test_a_runs_adapter_is_put_on_no_other_weights_wherever_they_lie(tmp_path):
    shutil.copytree("weights", tmp_path / "weights")
    options = chosen(tmp_path / "weights")
    policy, _ = load_policy(options)
    lora.add_adapters(policy.decoder, 4, 8.0)
    save_adapter_of(policy, str(tmp_path / "run" / "adapter"))
    made = {"from": {"--policy": fingerprint(options.policy)}}
    (tmp_path / "weights").rename(tmp_path / "moved")
    moved = vars(chosen(tmp_path / "moved")) | MADE | {"made": made}
    (tmp_path / "run" / "config.json").write_text(json.dumps(moved))
    load_run(str(tmp_path / "run"))
    file = tmp_path / "moved" / "model.safetensors"
    save_file({name: x * 0.9 for name, x in load_file(file).items()}, file)
    with pytest.raises(BadInput, match="config.json: --policy changed since the run was made .*; put back"):
        load_run(str(tmp_path / "run"))
