"""Which library takes a CPU's float32 products: they stay float32, and sampling leaves no trace."""

from types import SimpleNamespace

import pytest
import torch

from model import Decoder, ModelConfig
from plumbing import machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def decoder(dim=256, dtype=torch.float32):
    return SimpleNamespace(cfg=SimpleNamespace(dim=dim), compute_dtype=dtype, row_block=1, one_dnn=False)


@pytest.mark.parametrize("shape", [(64, 64, 64), (7, 256, 688), (640, 576, 96), (2, 512, 4096)])
def test_products_of_a_wide_decoder_are_float32_on_every_cpu(shape):
    """In bfloat16 they would be off by a thousandth: nothing but AMX rounds, and there it is not taken."""
    n, inner, out = shape
    machine.pick_products(decoder(), CPU)
    a, b = torch.randn(n, inner, dtype=torch.float64), torch.randn(inner, out, dtype=torch.float64)
    a, b = (x.float().double() for x in (a, b))
    off = (a.float() @ b.float() - a @ b).abs().max() / inner**0.5
    assert off < 2e-5
    rounded = (a.bfloat16().double() @ b.bfloat16().double() - a @ b).abs().max() / inner**0.5
    assert rounded > 1e-3  # the yardstick sees bfloat16


UNITS = [({"AVX512-BF16"}, True), ({"AVX512-BF16", "AMX"}, False), (set(), False)]


@pytest.mark.parametrize(("units", "pays"), UNITS)
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_dnn_is_taken_where_it_pays_and_rows_come_in_blocks_where_it_computes(
    units, pays, dim, dtype, monkeypatch
):
    has = {name: lambda name=name: name in units for name in machine.BFLOAT16_UNITS}
    monkeypatch.setattr(machine, "BFLOAT16_UNITS", has)
    settings, one = torch.backends.mkldnn.matmul, decoder(dim, dtype)
    machine.pick_products(one, CPU)
    wide = pays and dim == 256
    block = machine.ROW_BLOCK if wide or dtype == torch.bfloat16 else 1
    picked = settings.fp32_precision, one.row_block
    assert picked == ("bf16" if wide else "none", block)
    with pytest.raises(KeyError), machine.steady_products(one):
        assert settings.fp32_precision == ("bf16" if pays else "none")
        assert one.row_block == (machine.ROW_BLOCK if pays else block)
        raise KeyError
    assert (settings.fp32_precision, one.row_block) == picked


def test_a_gpu_computes_no_padding_for_the_cpus_library():
    one = decoder(dtype=torch.bfloat16)
    machine.pick_products(one, torch.device("cuda"))
    assert (one.row_block, one.one_dnn) == (1, False) and Decoder(ModelConfig()).row_block == 1


def test_auto_is_bfloat16_on_a_cpu_that_has_it_for_a_wide_decoder_and_what_is_asked_for_stays(monkeypatch):
    for units, width, chosen in (
        ({"AMX"}, 512, "bfloat16"),
        ({"AMX"}, 511, "float32"),
        (set(), 4096, "float32"),
    ):
        has = {name: lambda name=name, units=units: name in units for name in machine.BFLOAT16_UNITS}
        monkeypatch.setattr(machine, "BFLOAT16_UNITS", has)
        assert machine.pick_dtype("auto", CPU, width) == chosen
        assert machine.pick_dtype("bfloat16", CPU, 8) == "bfloat16"
    assert machine.pick_dtype("auto", torch.device("cuda"), 8) == "bfloat16"
