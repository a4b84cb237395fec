"""From nothing to weights, with a few steps of every stage."""

import json
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from test_train import MetaDevice, made_up

import pretrain
from checkpoints.policies import PolicyOptions, load_policy
from model import Decoder

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
        after = load_file(out / "model.safetensors")
        moved = {name.split(".")[0] for name, x in after.items() if before and not x.equal(before[name])}
        changed, before = [*changed, moved], after
    assert changed == [set(), {"bridge", "decoder"}, {"decoder"}]
    whole = load_file(home / "whole" / "model.safetensors")
    assert all(torch.equal(x, before[name]) for name, x in whole.items())


def test_no_stage_on_another_device_mixes_it_with_the_cpu(home, monkeypatch):
    read_back = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read_back(made_up(x) if x.is_meta else x))
    monkeypatch.setattr(pretrain, "pick_device", lambda wanted: "meta")
    monkeypatch.setattr(Decoder, "autocast", lambda self: nullcontext())  # there is none for meta
    with MetaDevice():
        run(monkeypatch, home, "meta")
        ranker = "--stage ranker --ranker_clips 4 --ranker_steps 1 --ranker_batch 2".split()
        run(monkeypatch, home, "meta", *ranker)
    assert (home / "meta" / "ranker" / "made.json").exists()
