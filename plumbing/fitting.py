"""Supervised training: AdamW on a loss, the learning rate rising and then falling."""

import math
import time
from collections import defaultdict

import torch
from tqdm import tqdm

from plumbing.machine import optimizer_step
from plumbing.options import BadInput

MAX_NORM = 1.0  # of the gradient of all parameters together
PRINT_EVERY = 50  # steps


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Rises in equal parts over `warmup` steps (the first is not 0), then falls in equal parts towards 0 at
    `steps`, but never below 5 % of the peak."""
    return peak * min((step + 1) / warmup, max(0.05, 1 - step / steps))


def unfrozen(*modules: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The modules' parameters, which learn from now on."""
    return [p.requires_grad_(True) for module in modules for p in module.parameters()]


def adamw(parameters, lr: float) -> torch.optim.AdamW:
    """Weight decay for matrices only: biases, norms and other vectors are left to the loss."""
    parameters = list(parameters)
    matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def descend(name: str, loss_of, optimizer, *, steps: int, rate: str, lr: float, warmup: int, first=0):
    """Optimizer steps `first` .. `steps` - 1 on loss_of(step), a scalar with gradient; yields (step, loss)
    after each. lr: the highest rate, which the option named `rate` gave. Raises BadInput as soon as loss or
    gradient is not finite."""
    for step in tqdm(range(first, steps), name, initial=first, total=steps):
        loss = loss_of(step)
        loss.backward()
        norm = optimizer_step(optimizer, learning_rate(step, steps, lr, warmup), MAX_NORM)
        if not math.isfinite(norm + loss.item()):
            raise BadInput(f"--{rate} {lr}: {name} diverged at step {step + 1}; take a lower one")
        yield step, loss.item()


def fit(name: str, loss_of_batch, parameters, *, steps: int, cfg, rate: str) -> None:
    """Takes `steps` optimizer steps at the rate of cfg's option `rate`. loss_of_batch() draws the next batch
    and returns its loss, a scalar with gradient, and a dict of numbers to report. Prints their means."""
    lr, sums, began = getattr(cfg, rate), defaultdict(float), time.time()

    def loss_of(step):
        loss, numbers = loss_of_batch()
        for key, value in {"loss": loss.item(), **numbers}.items():
            sums[key] += value
        return loss

    options = dict(steps=steps, rate=rate, lr=lr, warmup=max(1, min(100, steps // 3)))
    for step, _ in descend(name, loss_of, adamw(parameters, lr), **options):
        if (step + 1) % PRINT_EVERY == 0:
            means = "  ".join(f"{key} {total / PRINT_EVERY:.4f}" for key, total in sums.items())
            tqdm.write(f"{name} step {step + 1}  {means}  {(time.time() - began) / (step + 1):.2f} s a step")
            sums.clear()
