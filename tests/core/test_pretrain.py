"""From nothing to weights, with a few steps of every stage."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from checkpoints import embedded
from checkpoints.policies import PolicyOptions, load_model, load_policy
from checkpoints.word_tokenizer import WordTokenizer
from clip import ClipConfig
from model import Bridge, ModelConfig
from plumbing.options import BadInput
from videoqa import world

FEW = "--num_clips 6 --clip_steps 2 --clip_batch 16 --caption_steps 2 --caption_batch 2 --annotation_steps 2"
FEW += " --annotation_batch 2 --short_steps 2 --long_steps 2 --sft_batch 2"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrain")


def run(monkeypatch, home, out, *options):
    where = ["--world_dir", home / "world", "--out", home / out]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, where), *FEW.split(), *options])
    pretrain.main()
    return home / out


def test_one_command_makes_a_policy_and_says_how(home, monkeypatch):
    out = run(monkeypatch, home, "whole")
    model, tokenizer = load_policy(PolicyOptions(policy=str(out)))
    assert model.cfg.vocab_size >= tokenizer.vocab_size
    made = json.loads((out / "made.json").read_text())
    assert list(made["seconds"]) == ["world", "clip", "align", "sft"] and made["seed"] == 0
    assert made["commands"] == [" ".join(["python", *sys.argv])]


def test_stages_one_by_one_make_the_weights_of_one_command_and_train_their_own_parts(home, monkeypatch):
    changed, before = [], {}
    for stage in ("clip", "align", "sft"):
        out = run(monkeypatch, home, "parts", "--stage", stage)
        if stage == "clip":
            with pytest.raises(BadInput, match=r"parts: its decoder is not trained .*--stage align and"):
                load_policy(PolicyOptions(policy=str(out)))
        after = load_file(out / "model.safetensors")
        moved = {name.split(".")[0] for name, x in after.items() if before and not x.equal(before[name])}
        changed, before = [*changed, moved], after
    assert changed == [set(), {"bridge", "decoder"}, {"decoder"}]
    whole = load_file(run(monkeypatch, home, "at_once") / "model.safetensors")
    assert all(torch.equal(x, before[name]) for name, x in whole.items())


@pytest.mark.parametrize("bridge", ["patches", "pooled"])
def test_every_bridge_can_be_pretrained_in_the_world(bridge, home, monkeypatch):
    out = run(monkeypatch, home, bridge, "--video_tokens", bridge)
    model = load_model(str(out))
    assert (
        model.cfg.bridge == bridge
        and model.bridge.num_tokens == {"patches": 8 * 36, "pooled": 8 + 36}[bridge]
    )


def test_a_frames_own_tokens_depend_on_no_other_frame():
    for bridge, tokens in (("patches", 36), ("pooled", 1)):
        model = Bridge(ModelConfig(bridge=bridge), ClipConfig())
        patches, times = torch.randn(2, 8, 36, 96), torch.arange(8.0).expand(2, 8)
        other = patches.clone()
        other[:, 1:] *= -1
        before, after = (model.frame_tokens(model(x, times)).view(2, 8, tokens, -1) for x in (patches, other))
        torch.testing.assert_close(before[:, 0], after[:, 0], atol=1e-5, rtol=0)
        assert (before[:, 1:] - after[:, 1:]).abs().amax(dim=(2, 3)).min() > 1e-3


def test_new_words_of_the_world_get_new_ids_and_old_ones_keep_theirs(home, monkeypatch):
    out = run(monkeypatch, home, "words")
    old = WordTokenizer.load(str(out / "tokenizer.json"))
    monkeypatch.setattr(world, "vocabulary", lambda: sorted([*old.words, "aardvark"]))
    again, cfg = (pretrain.Config(out=str(out), stage=stage) for stage in ("clip", "sft"))
    assert embedded.folder_tokenizer(again).words == [*old.words, "aardvark"]
    room = load_model(str(out)).cfg.vocab_size - old.vocab_size
    many = [f"aardvark{i}" for i in range(room + 1)]
    monkeypatch.setattr(world, "vocabulary", lambda: sorted([*old.words, *many]))
    with pytest.raises(BadInput, match="embeddings; make all weights anew"):
        embedded.folder_tokenizer(cfg)
    with pytest.raises(BadInput, match="none/tokenizer.json"):
        embedded.folder_tokenizer(pretrain.Config(out=str(home / "none"), stage="align"))


def test_a_stage_that_diverges_names_its_learning_rate_and_leaves_the_weights(home, monkeypatch):
    out = run(monkeypatch, home, "diverged")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(BadInput, match=r"^--sft_lr 1e\+20: .* diverged at step \d+; take a lower one"):
        run(monkeypatch, home, "diverged", "--stage", "sft", "--sft_lr", "1e20")
    with pytest.raises(BadInput, match=r"^--ranker_lr 1e\+20: ranker diverged"):
        ranker = "--stage ranker --ranker_clips 4 --ranker_steps 4 --ranker_lr 1e20"
        run(monkeypatch, home, "diverged", *ranker.split())
    assert (out / "model.safetensors").read_bytes() == before and not (out / "ranker").exists()


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "model.safetensors"])
def test_a_folder_of_something_else_is_not_written_to(name, tmp_path, home, monkeypatch):
    (tmp_path / name).write_text('{"model_type": "llama"}')
    monkeypatch.setattr(embedded, "run_stage", lambda *given: pytest.fail("it must not be trained"))
    with pytest.raises(BadInput, match=rf"^--out {tmp_path}: holds something else .*; name another folder"):
        run(monkeypatch, home, tmp_path, "--stage", "clip")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_needs_several_clips_is_not_begun_with_fewer():
    for name, least in (("clip_batch", 4), ("ranker_clips", 2)):  # 4 frames a clip; one clip is held out
        assert getattr(pretrain.Config(**{name: least}), name) == least
        with pytest.raises(BadInput, match=rf"^--{name} {least - 1}: give a whole number at least {least}"):
            pretrain.Config(**{name: least - 1})


@pytest.mark.parametrize("stage", ["sft", "ranker", "all"])
@pytest.mark.parametrize("given", [{"resume": True}, {"lora_r": 3}, {"adapter": "a"}, {"num_frames": 3}])
def test_an_option_of_a_pretrained_decoder_is_refused_without_one(stage, given):
    (name,) = given
    with pytest.raises(BadInput, match=rf"^--{name} .*: needs --policy"):
        pretrain.Config(stage=stage, **given)
    with pytest.raises(BadInput, match="^--pairs a: belongs to --stage ranker"):
        pretrain.Config(stage="sft", pairs="a", videos="v")


def test_a_stage_that_is_killed_as_it_is_saved_is_trained_once(home, monkeypatch):
    def trained():
        align = run(monkeypatch, home, "killed", "--stage", "align", "--align_lr", "0.1")
        return load_file(align / "model.safetensors"), json.loads((align / "made.json").read_text())

    def killed(*given):
        raise KeyboardInterrupt

    saved, rows = embedded.save_model, []
    run(monkeypatch, home, "killed", "--stage", "clip")
    for save in (killed, lambda *given: killed(saved(*given))):  # before the model's rename, and behind it
        monkeypatch.setattr(embedded, "save_model", save)
        with pytest.raises(KeyboardInterrupt):
            trained()
        rows.append(load_file(home / "killed" / "model.safetensors"))
    monkeypatch.setattr(embedded, "save_model", saved)
    model, made = trained()
    assert all(torch.equal(x, rows[1][name]) for name, x in model.items())
    assert any(not torch.equal(x, rows[0][name]) for name, x in model.items())
    assert list(made["seconds"]) == ["world", "clip", "align"] and len(made["commands"]) == 2
    assert not (home / "killed" / "saving.json").exists()
    again, made = trained()  # asked for once more it trains on
    assert any(not torch.equal(x, again[name]) for name, x in model.items()) and len(made["commands"]) == 3
