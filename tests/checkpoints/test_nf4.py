import pytest
import torch
import torch.nn.functional as F

import lora
from checkpoints import nf4
from model import Decoder, ModelConfig
from plumbing import machine
from plumbing.machine import MachineOptions, joined

CFG = ModelConfig(vocab_size=40, dim=32, num_layers=2, ffn_dim=48)


def gaussian(*shape, seed=0, std=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def linear(out_features, in_features, bias=False, seed=0):
    layer = torch.nn.Linear(in_features, out_features, bias=bias)
    layer.weight.data = gaussian(out_features, in_features, seed=seed)
    return layer.requires_grad_(False)


def unpack(codes):
    return torch.stack([codes >> 4, codes & 15], dim=1).flatten()


def test_the_levels_are_the_quantiles_of_a_normal_distribution():
    def quantiles(n):  # of probabilities 0.9677083 down to, and without, 0.5
        return 2**0.5 * torch.erfinv(2 * torch.linspace(0.9677083, 0.5, n + 1).double()[:-1] - 1)

    levels = torch.cat([-quantiles(7), torch.zeros(1).double(), quantiles(8).flip(0)])
    torch.testing.assert_close(torch.tensor(nf4.LEVELS).double(), levels / levels.max(), atol=1e-6, rtol=0)


def test_the_scales_levels_are_256_of_a_sign_and_seven_decades():
    levels = nf4.dynamic_levels()
    assert len(levels.unique()) == 256 and levels.max() == 1 and 0 in levels
    assert levels.min() == -levels[-2]  # mirrored, but for the 1
    for decade, count in enumerate((64, 32, 16, 8, 4, 2, 1)):
        inside = (levels > 10.0 ** -(decade + 1)) & (levels < 10.0**-decade)
        assert inside.sum() == count


def test_codes_are_the_nearest_level_of_a_blocks_largest_magnitude():
    weight = gaussian(48, 100)
    codes, _, _, _ = nf4.quantise(weight)
    levels = torch.tensor(nf4.LEVELS)
    for block, got in zip(weight.flatten().split(64), unpack(codes).split(64), strict=True):
        distance = (block[:, None] / block.abs().max() - levels).abs()  # a slow loop, by the definition
        assert torch.equal(got.long(), distance.argmin(dim=1))
        assert got[block.abs().argmax()] in (0, 15)


def test_two_codes_share_a_byte_the_first_in_the_high_half():
    row = torch.zeros(1, 64)
    row[0, :4] = torch.tensor([-1.0, 1.0, 0.34, -0.18])
    codes = nf4.quantise(row)[0]
    assert codes[:3].tolist() == [0x0F, 0xB5, 0x77]  # the zeros of a block are the code 7


def test_pieces_change_nothing(monkeypatch):
    weight = gaussian(300, 257)  # ends within a block, and within a group
    whole = nf4.quantise(weight)
    monkeypatch.setattr(nf4, "PIECE", 2**14)
    assert all(torch.equal(a, b) for a, b in zip(whole, nf4.quantise(weight), strict=True))


def test_absmax_in_8_bits_are_those_of_32_to_a_percent():
    weight = gaussian(256, 256)
    layer = nf4.NF4Linear(weight)
    exact = weight.view(-1, 64).abs().amax(dim=1)
    ones = torch.full_like(layer.codes, 0xFF)  # every code 15, so that the weight is the absmax
    stored = nf4.dequantise(weight.shape, torch.float32, (ones, *layer.stored()[1:])).view(-1, 64)
    assert ((stored[:, 0] - exact) / exact).abs().max() < 0.01


def test_a_layer_takes_at_most_056_bytes_a_parameter():
    layer = nf4.quantise_linear(linear(512, 1024))
    stored = sum(x.numel() * x.element_size() for x in layer.buffers())
    assert stored / (512 * 1024) < 0.53 and not list(layer.parameters())


def test_the_relative_error_of_a_product_is_that_of_16_levels():
    weight, x = gaussian(512, 1024), gaussian(64, 1024, seed=1, std=1.0)
    y = x @ weight.T
    error = ((nf4.NF4Linear(weight)(x) - y).norm() / y.norm()).item()
    evenly = (weight.view(-1, 64) / weight.view(-1, 64).abs().amax(1, keepdim=True) * 7).round() / 7
    evenly = (evenly * weight.view(-1, 64).abs().amax(1, keepdim=True)).view_as(weight)
    even_error = ((x @ evenly.T - y).norm() / y.norm()).item()  # 4 bits, the same blocks, levels evenly apart
    print(f"relative matmul error: NF4 {error:.4f}, evenly spaced {even_error:.4f}")
    assert 0.08 < error < 0.10 < even_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_dequantised_weight(dtype):
    plain = linear(48, 100, bias=True)
    bias = plain.bias.clone()
    layer = nf4.quantise_linear(plain)
    x = gaussian(3, 7, 100, seed=1).to(dtype).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    again = x.detach().clone().requires_grad_()
    wanted = F.linear(again, layer.dequantised(dtype)) + bias.to(dtype)
    wanted.square().sum().backward()
    assert torch.equal(y, wanted) and torch.equal(x.grad, again.grad)
    assert x.grad.abs().max() > 0


def test_the_backward_pass_keeps_4_bits_not_16():
    layer, kept = nf4.quantise_linear(linear(256, 256)), {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(torch.ones(1, 256, requires_grad=True))
    assert 0 < sum(kept.values()) < 0.6 * 256 * 256


def test_autocast_decides_the_products_dtype():
    layer, x = nf4.quantise_linear(linear(32, 64)), gaussian(2, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x.bfloat16())) and y.dtype == torch.bfloat16


def test_a_block_of_zeros_stays_zero_and_a_lone_outlier_stays_itself():
    weight = torch.zeros(4, 64)
    weight[1, 5] = 3.0
    again = nf4.NF4Linear(weight).dequantised()
    torch.testing.assert_close(again, weight, atol=0.02, rtol=0)
    assert torch.equal(again == 0, weight == 0)


def test_casting_a_model_does_not_touch_what_is_stored():
    layer = nf4.quantise_linear(linear(64, 64))
    before = layer.dequantised()
    assert torch.equal(layer.to(torch.bfloat16).half().float().dequantised(), before)


def test_quantising_gives_each_16_bit_weight_up_before_the_next(monkeypatch):
    decoder, alive = Decoder(CFG), []
    held = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    one = nf4.quantise_linear
    monkeypatch.setattr(
        nf4, "quantise_linear", lambda x: (one(x), alive.append(sum(m.weight is not None for m in held)))[0]
    )
    nf4.quantise_linears(decoder, lora.DECODER_LINEARS)
    assert alive == list(range(7 * CFG.num_layers - 1, -1, -1))
    assert not any(isinstance(m, torch.nn.Linear) for m in decoder.modules())


def adapted():
    torch.manual_seed(0)
    decoder = Decoder(CFG)
    nf4.quantise_linears(decoder, lora.DECODER_LINEARS)
    trainable = lora.add_adapters(decoder, 4, 8.0)
    return decoder, trainable


X, MASK = gaussian(2, 5, 32, seed=1, std=1.0), torch.ones(2, 5, dtype=torch.bool)


def test_adapters_learn_on_a_4_bit_base_that_does_not_change():
    decoder, trainable = adapted()
    stored = {k: v.clone() for k, v in decoder.state_dict().items() if "base" in k}
    start = decoder(X, MASK).detach()
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(2):
        decoder(X, MASK).square().mean().backward()
        optimizer.step()
    assert len(trainable) == 2 * 7 * CFG.num_layers
    assert all(p.grad.abs().max() > 0 for p in trainable)
    assert all(torch.equal(v, decoder.state_dict()[k]) for k, v in stored.items()) and stored
    assert not torch.equal(decoder(X, MASK), start)
    with lora.using(decoder, "off"), torch.no_grad():
        assert torch.equal(decoder(X, MASK), start)
        with joined(decoder):  # a 4-bit base is never unfolded into one of more bits
            assert all(layer.mlp.joined is None for layer in decoder.layers)


def test_a_merged_4_bit_base_is_the_adapted_one():
    decoder, trainable = adapted()
    for i, p in enumerate(trainable):
        p.data += gaussian(*p.shape, seed=i, std=0.1)
    with torch.no_grad():
        wanted = decoder(X, MASK)
        lora.merge(decoder)
        torch.testing.assert_close(decoder(X, MASK), wanted, atol=1e-5, rtol=0)
    assert not lora.layers(decoder) and decoder.state_dict().keys() == Decoder(CFG).state_dict().keys()


def test_a_compiled_layer_is_one_graph_with_the_same_values_and_gradients():
    layer = lora.LoRALinear(nf4.quantise_linear(linear(64, 128)), 4, 8.0)
    layer.lora_B.data += 0.1
    x = gaussian(3, 128, seed=1).requires_grad_()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.square().sum().backward()
    again = x.detach().clone().requires_grad_()
    wanted = layer(again)
    wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(x.grad, again.grad, atol=1e-6, rtol=0)


def test_compile_reaches_every_4_bit_layer_and_changes_no_value(monkeypatch):
    compiled, decoder = [], Decoder(CFG)
    nf4.quantise_linears(decoder, lora.DECODER_LINEARS)
    wanted = decoder(X, MASK)

    def stand_in(fn, device_type):
        compiled.append(device_type)
        return torch.compile(fn, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(machine, "compiled", stand_in)
    for asked in (False, True):
        options = MachineOptions(compile=asked, dtype="float32")
        machine.set_up(decoder, options)
        assert decoder.captured == asked and compiled == ["cpu"] * 7 * CFG.num_layers * asked
        torch.testing.assert_close(decoder(X, MASK), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_product_has_the_values_and_gradients_of_a_linear_layer(dtype):
    x, weight, bias, ahead = gaussian(5, 12), gaussian(7, 12), gaussian(7), gaussian(5, 7)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = lora.frozen_linear(found, lambda dtype, stored: stored[0].to(dtype), (weight,), bias)
        theirs = F.linear(wanted, weight, bias)
    assert ours.dtype == theirs.dtype == dtype
    ours.backward(ahead.to(dtype))
    theirs.backward(ahead.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6  # bfloat16 has 8 bits; the order of sums may differ
    for a, b in ((ours, theirs), (found.grad, wanted.grad)):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
