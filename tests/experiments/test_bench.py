"""bench.py's comparisons at sizes too small to mean anything: they run, on both sides, and report ratios."""

import pytest

import grpo_rank
from clip import ClipConfig
from experiments import bench, gpu
from experiments import step as whole_step
from model import ModelConfig
from plumbing.options import BadInput
from plumbing.progress import markdown
from videoqa.questions import check_video
from videoqa.video import read_frames

TINY = ModelConfig(vocab_size=32, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=16)
PARTS = {"load": {"map", "read"}, "clip": {"encode"}, "decoder": {"prefill", "whole"}}
PARTS |= {"loss": {"loss"}, "draw": {"draw"}, "video": {"8 frames", "50 frames"}}


@pytest.mark.parametrize("what", PARTS)
def test_each_part_is_compared_with_its_peer(what, monkeypatch):
    if what in ("clip", "decoder"):
        pytest.importorskip("transformers")
    if what == "video":
        pytest.importorskip("torchcodec")
    sizes = {"clip": ClipConfig(28, 14, 64, 1, 1, embed_dim=0), "loss": 2000, "draw": 40, "video": 10}
    size = sizes.get(what, TINY)
    monkeypatch.setattr(bench, "ROWS", 96)
    monkeypatch.setattr(grpo_rank, "CHUNK_BYTES", 2000 * 4 * 12)
    monkeypatch.setitem(bench.SIZES, what, {"small": size})
    cfg = bench.Config(what=what, dtype="float32", repeats=1, warmup=1)
    result = bench.COMPARE[what](cfg, "float32")
    assert result["ratio"].keys() == PARTS[what] and all(s > 0 for s in result["ours"].values())
    if what == "loss":
        assert result["peak_ratio"] < 0.2  # eight chunks, three buffers
    if what == "load":
        assert result["bytes"] > 4 * (32 * 16 + 4 * 16 * 16 + 3 * 16 * 16)  # embedding, attention, MLP


def test_the_film_that_readers_are_timed_with_is_whole_and_moves(tmp_path):
    path = str(tmp_path / "film.mp4")
    bench.draw_film(path, 20)
    found = check_video(path)
    assert found["ok"] and (found["frames"], found["fps"], found["duration"]) == (480, 24, 20)
    frames, times = read_frames(path, 8, 48)
    assert times.tolist() == pytest.approx([1.25 + 2.5 * i for i in range(8)], abs=1 / 24)
    assert all((a != b).any() for a, b in zip(frames, frames[1:], strict=False))


def test_growth_gives_an_exponent_for_each_size(monkeypatch):
    assert bench.slope([1, 2, 4], [3.0, 12.0, 48.0]) == 2
    monkeypatch.setattr(bench, "MODEL", TINY)
    monkeypatch.setattr(bench, "GROWTH", {"V": (32, 64), "S": (4, 8), "K": (2, 4)})
    result = bench.growth(bench.Config(what="growth", repeats=1, warmup=1), "float32")
    assert result.keys() == {"dtype", "V", "S", "K"}
    assert all(len(result[name]["exponents"]) == 2 and min(result[name]["peak"]) > 0 for name in "VSK")


def small_steps(monkeypatch):
    monkeypatch.setattr(whole_step, "MODEL", TINY)
    for name, n in {"P": 2, "G": 3, "S": 4, "T": 5}.items():
        monkeypatch.setattr(whole_step, name, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_train_py_is_timed_in_its_parts(dtype, monkeypatch):
    small_steps(monkeypatch)
    result = bench.compare(bench.Config(dtype=dtype, repeats=1, warmup=1, peer="none"), dtype)
    ours = result["ours"]
    assert ours["step"] >= ours["sample"] > 0 and ours["update"] > ours["reference, part of update"] > 0


def test_a_size_that_the_part_does_not_have_lists_those_it_has():
    with pytest.raises(BadInput, match=r"--what clip --size 1b: .*--what clip --size small\|full"):
        bench.Config(what="clip", size="1b")
    with pytest.raises(BadInput, match="--device cuda"):
        bench.Config(what="load", device="cuda")


def test_the_rows_for_a_gpu_run_on_a_cpu_and_one_that_fails_leaves_the_others(monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    small_steps(monkeypatch)

    def broken(cfg, size, folder, second):
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(gpu, "default_job", broken)
    cfg = bench.Config(what="gpu", size="small", device="cpu", repeats=1, warmup=1, peer="none")
    rows = gpu.measure(cfg)
    printed = markdown(gpu.COLUMNS, [row.values() for row in rows]).splitlines()
    assert printed[2:] == [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row["remarks"] for row in rows[:2]] == ["failed: no Triton here"] * 2
    assert all(row["measured"] and "failed" not in row["remarks"] for row in rows[2:]), rows
    assert float(rows[-1]["against"].split()[1]) >= 0 and "s a step" in rows[-1]["remarks"]
