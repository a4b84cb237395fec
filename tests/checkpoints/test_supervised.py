"""Supervised training of pretrained policies, on tiny decoders with random weights."""

import json
import random
import sys

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from test_policies import folders  # noqa: F401 (a fixture)

import lora
import pretrain
from checkpoints import supervised, weight_files
from checkpoints.policies import PolicyOptions, load_model, load_policy, save_model
from checkpoints.supervised import answer_batch, answer_loss
from clip import ClipConfig
from model import ModelConfig, VideoLM
from plumbing import fitting
from plumbing.options import BadInput, parse_args
from plumbing.run_folder import fingerprint
from videoqa import world


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options that name 5 clips with 2 questions each, a short and a longer answer."""
    home = tmp_path_factory.mktemp("taught")
    world.make_world(home, range(5), workers=1)
    rows = []
    for i in range(5):
        asked = {"video": f"clip{i:07d}.mp4", "question": "what moves?"}
        rows.append(asked | {"id": f"{i}a", "answer": "it moves"})
        rows.append(asked | {"id": f"{i}b", "answer": "it moves it moves"})
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", home / "data.jsonl", "--videos", home, "--num_frames", 2, "--held_share", 0.4]


def train(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, options)])
    cfg = parse_args(pretrain.Config, pretrain.PRESETS)
    supervised.train_supervised(cfg)
    return cfg


def test_of_a_batch_only_answers_are_learned_each_after_its_own_question():
    rows = [[([5, 6], [7, 2]), ([5], [8, 9, 2])], [([5, 6, 6], [7, 2])]]
    ids, answer = answer_batch(rows, 8, random.Random(0))
    assert ids.shape == (2, 2, 5)
    learned = [ids[p, g][answer[p, g]].tolist() for p in range(2) for g in range(2)]
    assert sorted(learned) == [[], [7, 2], [7, 2], [8, 9, 2]]  # the second clip has only one question
    assert answer_batch(rows, 1, random.Random(0))[0].shape[1] == 1


def test_the_loss_is_the_mean_surprise_of_the_answers_tokens():
    torch.manual_seed(0)
    model = VideoLM(
        ModelConfig(vocab_size=16, dim=16, num_layers=1, ffn_dim=16, bridge_width=16), ClipConfig()
    )
    video, ids = torch.randn(1, 3, 16), torch.tensor([[[5, 8, 9, 6, 7, 0]]])  # question, answer, padding
    answer = torch.tensor([[[False, False, False, True, True, False]]])
    loss = answer_loss(model, [1], video, ids, answer)
    embedded = model.decoder.embed_tokens(torch.tensor([[1, 3, 3, 3, 5, 8, 9, 6]])).clone()
    embedded[:, 1:4] = video
    states = [model.decoder(embedded[:, :n], torch.ones(1, n).bool())[0, 0, 0] for n in (7, 8)]
    by_hand = [-(s @ model.decoder.head.T).log_softmax(dim=0)[i] for s, i in zip(states, (6, 7), strict=True)]
    torch.testing.assert_close(loss, sum(by_hand) / 2, atol=1e-5, rtol=0)


def test_bridge_then_lora_learn_into_folders_of_their_own_that_load_as_policies(
    folders,  # noqa: F811
    data,
    tmp_path,
    monkeypatch,
):
    before = fingerprint(*folders)
    aligned, tuned = tmp_path / "aligned", tmp_path / "tuned"
    many = ["--steps", 40, "--save_every", 20, "--batch_clips", 2, "--lr", 0.03, "--short_share", 0]
    start = ["--stage", "bridge", "--policy", folders[0], "--clip", folders[1], "--out", aligned]
    train(monkeypatch, *start, *data, *many)
    rows = [json.loads(line) for line in (aligned / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40] and rows[1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[1].keys() == {"step", "loss", "held_loss", "held_loss_other_video"}
    train(monkeypatch, "--stage", "sft", "--policy", aligned, "--out", tuned, *data, *many)
    assert fingerprint(*folders) == before and not (aligned / "adapter").exists()
    first, _ = load_policy(PolicyOptions(policy=str(aligned)))
    model, tokenizer = load_policy(PolicyOptions(policy=str(tuned)))
    assert model.cfg.num_frames == 2 and not lora.layers(model.decoder)
    torch.testing.assert_close(model.bridge.state_dict(), first.bridge.state_dict(), atol=0, rtol=0)
    moved = load_file(tuned / "adapter" / "adapter_model.safetensors")
    a, b = (next(x for k, x in moved.items() if f"layers.0.self_attn.q_proj.lora_{n}." in k) for n in "AB")
    weights = [m.decoder.layers[0].self_attn.q_proj.weight for m in (first, model)]
    torch.testing.assert_close(weights[1] - weights[0], 2.0 * b @ a, atol=1e-5, rtol=0)  # alpha / r = 2
    with pytest.raises(BadInput, match="has an adapter already"):
        train(monkeypatch, "--stage", "sft", "--policy", tuned, "--out", tmp_path / "more", *data)
    with pytest.raises(BadInput, match="--num_frames 3: .* has 2; leave it out"):
        load_policy(PolicyOptions(policy=str(tuned), num_frames=3))
    config = json.loads((tuned / "config.json").read_text())
    config["fingerprints"]["clip"] = "another"
    (tuned / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="not the clip that"):
        load_policy(PolicyOptions(policy=str(tuned)))


def test_loose_answers_come_in_the_share_that_is_asked_for_and_never_into_the_held_out_loss(
    folders,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    options = ["--stage", "sft", "--num_frames", 2, "--out", tmp_path]
    options += ["--policy", folders[0], "--clip", folders[1]]
    options += ["--taught_clips", 6, "--world_dir", tmp_path / "world", "--questions_per_clip", 50]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, options)])
    cfg = parse_args(pretrain.Config, pretrain.PRESETS)
    model, tokenizer = load_policy(cfg, own_bridge=True)
    lessons = supervised.Lessons(cfg, model, tokenizer)
    loose = {tuple(tokenizer.encode(text)) for texts in world.LOOSE_ANSWERS.values() for text in texts}

    def share(**given):
        _, ids, answer = lessons.batch(lessons.learned, False, random.Random(0), **given)
        taught = zip(ids.flatten(0, 1), answer.flatten(0, 1), strict=True)
        rows = [tuple(row[mask].tolist()[:-1]) for row, mask in taught if mask.any()]
        return sum(row in loose for row in rows) / len(rows)

    assert share() == 0 and share(loose_share=1.0) == 1
    assert 0.2 < share(loose_share=0.4) < 0.6
    shares, real = [], lessons.batch
    monkeypatch.setattr(lessons, "batch", lambda *given: shares.append(given[3]) or real(*given[:3]))
    cfg.loose_share = 0.4
    for step in (0, cfg.steps // 2, cfg.steps):
        lessons.loss(step)
    assert shares == pytest.approx([0, 0.2, 0.4])  # it rises along the training
    monkeypatch.setattr(lessons, "batch", real)
    held = lessons.held_losses()
    cfg.loose_share = 1.0
    assert lessons.held_losses() == held
    with pytest.raises(BadInput, match="--loose_share: .* leave it or --data out"):
        cfg.data = "rows.jsonl"
        supervised.Lessons(cfg, model, tokenizer)


def test_a_killed_training_resumes_to_the_same_bytes_and_starts_only_in_an_empty_folder(
    folders,  # noqa: F811
    data,
    tmp_path,
    monkeypatch,
):
    options = ["--stage", "sft", "--with_bridge", "--policy", folders[0], "--clip", folders[1], *data]
    options += ["--steps", 4, "--save_every", 2, "--batch_clips", 2, "--lora_r", 4]
    train(monkeypatch, *options, "--out", tmp_path / "whole")
    save = supervised.save_result

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(supervised, "save_result", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, *options, "--out", tmp_path / "killed")
    monkeypatch.setattr(supervised, "save_result", save)
    with pytest.raises(BadInput, match="exists already; .*--resume"):
        train(monkeypatch, *options, "--out", tmp_path / "killed")
    with pytest.raises(BadInput, match="--lr 0.5: "):
        train(monkeypatch, *options, "--out", tmp_path / "killed", "--resume", "--lr", 0.5)
    train(monkeypatch, *options, "--out", tmp_path / "killed", "--resume")
    for name in ("bridge.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize(
    "number, file", [(1, "features"), (1, "bridge"), (1, "config"), (2, "bridge"), (2, "config")]
)
def test_a_training_killed_at_any_write_ends_as_one_that_was_not(
    number,
    file,
    folders,  # noqa: F811
    data,
    tmp_path,
    monkeypatch,
):
    options = ["--stage", "sft", "--with_bridge", "--policy", folders[0], "--clip", folders[1], *data]
    options += ["--steps", 2, "--save_every", 1, "--batch_clips", 2, "--lora_r", 4]
    train(monkeypatch, *options, "--out", tmp_path / "whole")
    killed, writes = tmp_path / "killed", []

    def dying(write):
        def write_or_die(path, content):
            writes.append(file in path.removeprefix(str(killed)))
            if writes[-1] and sum(writes) == number:
                raise KeyboardInterrupt
            write(path, content)

        return write_or_die

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in (supervised, weight_files):  # the latter writes the bridge
            patch.setattr(module, "write_whole", dying(module.write_whole))
        patch.setattr(supervised, "write_json", dying(supervised.write_json))
        train(monkeypatch, *options, "--out", killed)
    # killed before its first config.json it starts over
    train(monkeypatch, *options, "--out", killed, "--resume", number > 1)
    for path in (tmp_path / "whole").rglob("*.*"):
        if path.name != "config.json":  # it names --out, and whether it was resumed
            assert path.read_bytes() == (killed / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_what_is_not_a_trainings_own_is_never_written_over(tmp_path):
    for name in ("adapter", "bridge.safetensors"):  # which a training has only behind training.safetensors
        (tmp_path / name).mkdir()
        with pytest.raises(BadInput, match="exists already"):
            supervised.check_out(pretrain.Config(stage="sft", out=str(tmp_path)))


def test_a_damaged_file_of_features_is_named_with_what_to_do(
    folders,  # noqa: F811
    data,
    tmp_path,
    monkeypatch,
):
    options = ["--stage", "sft", "--policy", folders[0], "--clip", folders[1], *data, "--steps", 1]
    train(monkeypatch, *options, "--out", tmp_path / "a")
    for path in (tmp_path / "a" / "features").iterdir():
        (tmp_path / "b" / "features").mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / "features" / path.name).write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"features/\w+.safetensors: .*; delete it, and it is computed again"):
        train(monkeypatch, *options, "--out", tmp_path / "b")


def test_a_bridge_aligned_with_one_decoder_serves_another_and_only_behind_its_own_clip(tmp_path):
    clip = ClipConfig(vocab_size=16)
    wide, narrow = (
        VideoLM(ModelConfig(vocab_size=16, dim=dim, num_layers=1, num_queries=8), clip) for dim in (32, 16)
    )
    save_model(wide, str(tmp_path / "wide"))
    supervised.take_bridge(narrow, str(tmp_path / "wide"))
    given = load_model(str(tmp_path / "wide")).bridge.state_dict()
    for name, x in narrow.bridge.state_dict().items():
        same = x.shape == given[name].shape and torch.equal(x, given[name])
        assert same != name.startswith(("fc1.", "fc2.")), name
    assert narrow.bridge(torch.randn(1, 8, 36, clip.width), torch.arange(8.0)[None]).shape == (1, 8, 16)
    strange = VideoLM(narrow.cfg, ClipConfig(vocab_size=16, width=64))
    with pytest.raises(BadInput, match="is of another CLIP"):
        supervised.take_bridge(strange, str(tmp_path / "wide"))


def test_a_supervised_training_that_diverges_ends_before_it_saves(folders, data, tmp_path, monkeypatch):  # noqa: F811
    options = ["--stage", "sft", "--policy", folders[0], "--clip", folders[1], *data, "--steps", 3]
    options += ["--batch_clips", 2, "--lora_r", 4, "--out", tmp_path / "out"]
    monkeypatch.setattr(fitting, "optimizer_step", lambda *given: float("nan"))
    with pytest.raises(BadInput, match="--lr 0.0003: sft diverged at step 1"):
        train(monkeypatch, *options)
    assert not (tmp_path / "out" / "config.json").exists()
