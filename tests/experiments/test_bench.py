"""bench.py's comparisons at sizes too small to mean anything: they run, on both sides, and report ratios."""

import pytest

from clip import ClipConfig
from experiments import bench
from model import ModelConfig
from plumbing.options import BadInput

TINY = ModelConfig(vocab_size=32, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=16)
PARTS = {"load": {"map", "read"}, "clip": {"encode"}, "decoder": {"prefill", "whole"}}


@pytest.mark.parametrize("what", PARTS)
def test_each_part_is_compared_with_its_peer(what, monkeypatch):
    if what != "load":
        pytest.importorskip("transformers")
    size = ClipConfig(28, 14, 64, 1, 1, embed_dim=0) if what == "clip" else TINY
    monkeypatch.setitem(bench.SIZES, what, {"small": size})
    cfg = bench.Config(what=what, dtype="float32", repeats=1, warmup=1)
    result = bench.COMPARE[what](cfg, "float32")
    assert result["ratio"].keys() == PARTS[what] and all(s > 0 for s in result["ours"].values())
    if what == "load":
        assert result["bytes"] > 4 * (32 * 16 + 4 * 16 * 16 + 3 * 16 * 16)  # embedding, attention, MLP


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_train_py_is_timed_in_its_parts(dtype, monkeypatch):
    monkeypatch.setattr(bench, "MODEL", TINY)
    for name, n in {"P": 2, "G": 3, "S": 4, "T": 5}.items():
        monkeypatch.setattr(bench, name, n)
    result = bench.compare(bench.Config(dtype=dtype, repeats=1, warmup=1, peer="none"), dtype)
    ours = result["ours"]
    assert ours["step"] >= ours["sample"] > 0 and ours["update"] > ours["reference, part of update"] > 0


def test_a_size_that_the_part_does_not_have_lists_those_it_has():
    with pytest.raises(BadInput, match=r"--what clip --size 1b: .*--what clip --size small\|full"):
        bench.Config(what="clip", size="1b")
    with pytest.raises(BadInput, match="--device cuda"):
        bench.Config(what="load", device="cuda")
