"""Frozen linear layers in 4 bits (NF4, QLoRA: Dettmers et al., arXiv:2305.14314), by hand.

A weight is cut into blocks of 64. A block keeps its largest magnitude (absmax), and of each number the
nearest of 16 levels, those at which a normal distribution is cut into equal parts. The absmax are
quantised in turn, less their mean, in groups of 256, to 8 bits: 0.5 + 1 / 64 + 4 / (64 * 256) = 0.5159
bytes a parameter.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import frozen_linear

# The levels that QLoRA's appendix E and the bitsandbytes library publish: code 0 is -1, code 15 is 1.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
BLOCK, GROUP = 64, 256  # numbers of an absmax, absmax of a scale
PIECE = 2**24  # numbers quantised at once: bounds the float32 copies to a few times 64 MB


def dynamic_levels() -> Tensor:
    """(256,) float32, ascending: the signed 8-bit dynamic type (arXiv:2110.02861). Of either sign 64 even
    values in 0.1 .. 1, 32 in 0.01 .. 0.1, down to one in the seventh decade; and 0 and 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - decade) + 1) * 10.0**-decade
        middles = (edges[1:] + edges[:-1]) / 2
        values += [middles, -middles]
    return torch.cat(values).sort().values


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The number of the nearest level, uint8, of the lower one where two are as near. levels ascend."""
    levels = levels.to(x.device)
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any float weight -> (codes, absmax_codes, absmax_scale, absmax_mean), what `dequantise` reads.

    codes (n / 2,) uint8, two numbers a byte, the first in the high half; absmax_codes (n / 64,) uint8, filled
    up to whole groups; absmax_scale (groups,) and absmax_mean (1,) float32. n is the number of elements, row
    by row, filled up with zeros to whole blocks.
    """
    codes, absmax = [], []
    for piece in weight.detach().flatten().split(PIECE):
        x = F.pad(piece.float(), (0, -len(piece) % BLOCK)).view(-1, BLOCK)
        absmax.append(x.abs().amax(dim=1))
        tiny = torch.finfo(torch.float32).tiny  # a block of zeros has the level 0 everywhere
        code = nearest(x / absmax[-1].clamp(min=tiny)[:, None], torch.tensor(LEVELS)).view(-1, 2)
        codes.append(code[:, 0] << 4 | code[:, 1])
    absmax = torch.cat(absmax)
    mean = absmax.mean().view(1)
    rest = F.pad(absmax - mean, (0, -len(absmax) % GROUP)).view(-1, GROUP)
    scale = rest.abs().amax(dim=1)
    absmax_codes = nearest(rest / scale.clamp(min=tiny)[:, None], dynamic_levels())
    return torch.cat(codes), absmax_codes.flatten(), scale, mean


def dequantise(shape, dtype, stored: tuple[Tensor, ...]) -> Tensor:
    """The weight of `shape` in `dtype`, out of `NF4Linear.stored`; the product is taken in float32."""
    codes, absmax_codes, absmax_scale, absmax_mean, pairs, dynamic = stored
    values = F.embedding(codes.int(), pairs).view(-1, BLOCK)  # (blocks, 64)
    absmax = dynamic[absmax_codes.int()].view(-1, GROUP) * absmax_scale[:, None] + absmax_mean
    values = values.mul_(absmax.flatten()[: len(values), None]).to(dtype)
    return values.flatten()[: shape.numel()].view(shape)


class NF4Linear(nn.Module):
    """A frozen linear layer of 4-bit weights, (..., in) -> (..., out). The weight is made anew for every
    product, in the input's dtype (autocast's, where it is on)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.shape, (self.out_features, self.in_features) = weight.shape, weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.dequantise = dequantise  # with --compile one fused pass (machine.set_up)
        codes, absmax_codes, scale, mean = quantise(weight)
        levels = torch.tensor(LEVELS)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax_codes", absmax_codes)
        # The bits of float32 numbers as integers: what casts a model to 16 bits must not round these.
        self.register_buffer("absmax_scale", scale.view(torch.int32))
        self.register_buffer("absmax_mean", mean.view(torch.int32))
        for name, table in {"pairs": pairs, "dynamic": dynamic_levels()}.items():
            self.register_buffer(name, table.to(codes.device).view(torch.int32), persistent=False)

    def stored(self) -> tuple[Tensor, ...]:
        """What `dequantise` reads. pairs (256, 2): a byte's two levels."""
        floats = (self.absmax_scale, self.absmax_mean, self.pairs, self.dynamic)
        return self.codes, self.absmax_codes, *(x.view(torch.float32) for x in floats)

    def dequantised(self, dtype=torch.float32) -> Tensor:
        """The weight, (out, in)."""
        return dequantise(self.shape, dtype, self.stored())

    def frozen(self) -> tuple:
        """What lora.frozen_linear makes the weight of."""
        return partial(self.dequantise, self.shape), self.stored()

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, *self.frozen(), self.bias)


def quantise_linear(linear: nn.Linear) -> NF4Linear:
    """The layer in 4 bits, on the linear's device. Frees the original weight at once, so a model quantised
    while it is being read never exists in 16 bits."""
    layer = NF4Linear(linear.weight, linear.bias)
    linear.weight = linear.bias = None
    return layer


def quantise_linears(model: nn.Module, targets) -> None:
    """Quantises every nn.Linear whose last name is in `targets`, in place; before adapters are added."""
    for name, linear in list(model.named_modules()):
        owner, _, child = name.rpartition(".")
        if isinstance(linear, nn.Linear) and child in targets:
            setattr(model.get_submodule(owner), child, quantise_linear(linear))
