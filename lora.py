"""Low-rank adapters by hand (Hu et al., arXiv:2106.09685): y = W x + (alpha / r) B A x, W frozen, B = 0 at
the start.

With its adapters off a model is the supervised start. A copy of the adapters is a frozen reference, which
costs no second model. There is no dropout, no hidden state in train()/eval(), and `merge` happens only when
it is called. The base may be a plain linear layer or one of 4 bits (checkpoints/nf4.py).
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class FrozenProduct(torch.autograd.Function):
    """x W^T + (x A^T) B^T, (n, in) -> (n, out), of a frozen weight W that weight_of(dtype, stored) makes and
    an adapter A (r, in), B (out, r), both None where there is none.

    The backward pass keeps the stored tensors, 4 bits for instance; F.linear would keep the 16-bit weights of
    all layers at once. One function for both products adds their gradients in x where they are."""

    @staticmethod
    def forward(ctx, x, weight_of, stored, A, B):
        ctx.weight_of, ctx.adapted = weight_of, A is not None
        y = F.linear(x, weight_of(x.dtype, stored))
        if not ctx.adapted:
            ctx.save_for_backward(*stored)
            return y
        low = x @ A.T
        ctx.save_for_backward(x, low, A, B, *stored)
        return y.addmm_(low, B.T)

    @staticmethod
    def backward(ctx, grad):
        stored, grad_x, grad_A, grad_B = ctx.saved_tensors, None, None, None
        if ctx.adapted:
            x, low, A, B, *stored = stored
            grad_low = grad @ B
            grad_A, grad_B = grad_low.T @ x, grad.T @ low
        if ctx.needs_input_grad[0]:
            weight = ctx.weight_of(grad.dtype, stored)
            if grad.is_cpu and grad.dtype == torch.bfloat16 and not HAS_BFLOAT16:
                weight = weight.T.contiguous().T  # there grad W takes 3 to 6 times as long as grad (W^T)^T
            grad_x = grad @ weight
            if ctx.adapted:
                grad_x.addmm_(grad_low, A)
        return grad_x, None, None, grad_A, grad_B


def frozen_linear(x: Tensor, weight_of, stored, bias: Tensor | None, A=None, B=None) -> Tensor:
    """x W^T + (x A^T) B^T + b in x's dtype (autocast's, where it is on). Only x, A and B get a gradient."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if A is not None:
        A, B = A.to(x.dtype), B.to(x.dtype)
    y = FrozenProduct.apply(x.reshape(-1, x.shape[-1]), weight_of, stored, A, B).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


def in_dtype(dtype: torch.dtype, stored: tuple[Tensor]) -> Tensor:
    return stored[0].to(dtype)


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update. (..., in) -> (..., out), any float dtype of the base.
    rslora: scaled by alpha / sqrt(r) (arXiv:2312.03732)."""

    def __init__(self, base: nn.Module, r: int, alpha: float, generator=None, rslora: bool = False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        device = [*base.parameters(), *base.buffers()][0].device
        # kaiming uniform with a = sqrt(5), as the LoRA and PEFT codes start A
        bound = math.sqrt(1 / base.in_features)
        a = torch.rand(r, base.in_features, generator=generator) * 2 * bound - bound
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        self.register_buffer("reference_A", None, persistent=False)
        self.register_buffer("reference_B", None, persistent=False)
        self.use = "policy"  # policy | reference | off

    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        """The A and B in use; None when it is the start itself."""
        if self.use == "policy":
            return self.lora_A, self.lora_B
        return (None, None) if self.use == "off" else (self.reference_A, self.reference_B)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.pair()
        if A is None:
            return self.base(x)
        plain = isinstance(self.base, nn.Linear)
        weight_of, stored = (in_dtype, (self.base.weight,)) if plain else self.base.frozen()
        return frozen_linear(x, weight_of, stored, self.base.bias, A, B * self.scale)


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def linears(model: nn.Module) -> list[str]:
    """Paths of the layers that could be adapted."""
    return [name for name, m in model.named_modules() if hasattr(m, "in_features")]


def add_adapters(model, r, alpha, targets=DECODER_LINEARS, generator=None, rslora=False) -> list:
    """Freezes `model`, wraps every linear layer whose path or last name is in `targets`, and returns the
    trainable parameters."""
    model.requires_grad_(False)
    names = [name for name in linears(model) if name in targets or name.split(".")[-1] in targets]
    if not names:
        raise ValueError(f"no linear layer is named any of {', '.join(targets)}: nothing to adapt")
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoRALinear(getattr(owner, child), r, alpha, generator, rslora))
    return [p for layer in layers(model).values() for p in (layer.lora_A, layer.lora_B)]


@contextmanager
def using(model: nn.Module, which: str):
    """Within it the model is the "policy", the frozen "reference" or the start itself ("off")."""
    adapted = layers(model).values()
    before = [layer.use for layer in adapted]
    for layer in adapted:
        layer.use = which
    try:
        yield
    finally:
        for layer, use in zip(adapted, before, strict=True):
            layer.use = use


def freeze_reference(model: nn.Module):
    """From now on "reference" is the policy as it is here (the paper does this at every epoch's start)."""
    for layer in layers(model).values():
        layer.reference_A, layer.reference_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()


@torch.no_grad()
def merge(model: nn.Module):
    """Puts plain linear layers in the place of the adapted ones, each adapter folded into the base weight
    (computed in float32), in the base's dtype; for a 4-bit base in float32."""
    for name, layer in layers(model).items():
        base, update = layer.base, layer.scale * layer.lora_B.float() @ layer.lora_A.float()
        weight = base.weight if isinstance(base, nn.Linear) else base.dequantised()
        plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        # New memory: the base's may be pages of a file, which are dear to write on
        plain.weight = nn.Parameter((weight.float() + update).to(weight.dtype), requires_grad=False)
        plain.bias = base.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


class AdamW:
    """AdamW (arXiv:1711.05101) without weight decay, by torch's own function. param_groups and step are as
    in torch.optim.AdamW, which would load torch's compiler first: 0.7 of a default job's 20 seconds."""

    def __init__(self, parameters: list[Tensor]):
        self.param_groups = [{"params": parameters, "lr": 0.0}]
        self.exp_avg = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.exp_avg_sq = [torch.zeros_like(x) for x in self.exp_avg]
        self.steps = [torch.zeros((), device=p.device) for p in parameters]

    @torch.no_grad()
    def step(self):
        """One step at the group's lr. Every parameter has a gradient."""
        group = self.param_groups[0]
        parameters, grads = group["params"], [p.grad for p in group["params"]]
        adamw(
            parameters, grads, self.exp_avg, self.exp_avg_sq, [], self.steps, lr=group["lr"],
            beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False, fused=True,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """The moments and the number of steps, by number of the parameter."""
        parts = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}
        return {f"optimizer.{i}.{part}": x for part, all in parts.items() for i, x in enumerate(all)}


class Learner:
    """What learns: a model's adapters with the optimizer that they belong to, their frozen reference, and a
    critic if the objective has one. `tensors` gives all that a resume needs, `restore` takes it back."""

    def __init__(self, model: nn.Module, r: int, alpha: float, seed=0, critic: nn.Module | None = None):
        generator = torch.Generator().manual_seed(seed)
        trainable = add_adapters(model, r, alpha, generator=generator)
        self.model, self.critic = model, critic or nn.Module()
        self.optimizer = AdamW(trainable + [*self.critic.parameters()])
        freeze_reference(model)

    def tensors(self) -> dict[str, Tensor]:
        """Adapters and reference by layer and name, the critic's parameters, the optimizer's moments."""
        adapted, parts = layers(self.model).items(), ("lora_A", "lora_B", "reference_A", "reference_B")
        tensors = {f"{name}.{part}": getattr(layer, part) for name, layer in adapted for part in parts}
        tensors |= {f"critic.{name}": x for name, x in self.critic.state_dict().items()}
        return tensors | self.optimizer.tensors()

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]):
        """Raises ValueError if one of them is missing or has another shape or dtype."""
        for name, wanted in self.tensors().items():
            stored = tensors.get(name)
            if stored is None or (stored.shape, stored.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(f"{name} does not fit the policy")
            wanted.copy_(stored)
