"""Nothing mixes a GPU's tensors with the CPU's: whole runs with the meta device in the place of a GPU."""

import signal
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import test_pretrain
import test_train
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
import train
from checkpoints import embedded
from model import Decoder
from oracles import choose, feedback
from plumbing import run_folder


def made_up(x):
    """What the host reads of a tensor on the meta device, which holds nothing: True, 1 or 0.5."""
    return torch.full(x.shape, {torch.bool: True, torch.int64: 1}.get(x.dtype, 0.5), dtype=x.dtype)


class MetaDevice(TorchDispatchMode):
    """Lets the meta device stand for a GPU: what mixes it with the CPU raises as it would there."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        aten, first, kwargs = torch.ops.aten, args[0] if args else None, kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        across = (aten.copy_, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        if len({x.device for x in tensors}) > 1 and op.overloadpacket not in across:
            raise RuntimeError(f"{op} is given tensors of two devices")
        if isinstance(first, torch.Tensor) and first.is_meta:
            if op is aten._local_scalar_dense.default:
                return made_up(first).item()
            if op is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
                return made_up(first).to(kwargs.get("dtype") or first.dtype)
            if op is aten.nonzero.default:  # as if all were true
                return torch.zeros(first.numel(), first.dim(), dtype=torch.int64, device="meta")
            if op is aten.index.Tensor and args[1][0].dtype == torch.bool:
                where = torch.zeros(args[1][0].numel(), dtype=torch.int64, device="meta")
                args = first, [where] * args[1][0].dim()
        return op(*args, **kwargs)


@pytest.fixture
def reading_back(monkeypatch):
    """What no meta tensor can do."""
    read_back = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read_back(made_up(x) if x.is_meta else x))
    monkeypatch.setattr(Decoder, "autocast", lambda self: nullcontext())  # there is none for meta


OPTIONS = ["--oracle trained", "--base nf4 --top_p 0.9 --checkpointing true"]
OPTIONS += [
    "--objective dpo --sample_prompts 20 --micro_batch_prompts 3",
    "--objective ppo --fill 2 --norm token",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_on_another_device_mixes_it_with_the_cpu(tmp_path, monkeypatch, reading_back, options):
    monkeypatch.setattr(train, "start_processes", lambda wanted: torch.device("meta"))
    adamw = lora.adamw  # fused there is none for meta
    monkeypatch.setattr(lora, "adamw", lambda *given, **more: adamw(*given, **more | {"fused": False}))
    monkeypatch.setattr(train, "describe", str)
    monkeypatch.setattr(run_folder.RunFolder, "save", lambda self: None)
    for room in (train, feedback, run_folder):
        monkeypatch.setattr(room, "reduce_sum", lambda *values, device: [*map(float, values)])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in it, reading back passes the mode by
    ask = choose.PatientOracle.rank

    def rank(oracle, batch, texts):  # what is made up ties: an order, so that the groups are live
        ranking = ask(oracle, batch, texts)
        return replace(ranking, ranks=torch.arange(5).expand(ranking.ranks.shape))

    monkeypatch.setattr(choose.PatientOracle, "rank", rank)
    argv = test_train.command(tmp_path, "meta", "--num_steps", "1", *options.split())
    monkeypatch.setattr(sys, "argv", argv)
    handler = signal.getsignal(signal.SIGINT)
    with MetaDevice():
        assert train.main() == 0
    signal.signal(signal.SIGINT, handler)


def test_no_stage_of_pretraining_on_another_device_mixes_it_with_the_cpu(tmp_path, monkeypatch, reading_back):
    monkeypatch.setattr(embedded, "pick_device", lambda wanted: "meta")
    with MetaDevice():
        test_pretrain.run(monkeypatch, tmp_path, "meta")
        ranker = "--stage ranker --ranker_clips 4 --ranker_steps 1 --ranker_batch 2".split()
        test_pretrain.run(monkeypatch, tmp_path, "meta", *ranker)
    assert (tmp_path / "meta" / "ranker" / "made.json").exists()
