"""Supervised training: AdamW on a loss, the learning rate rising and then falling."""

import math
import time
from collections import defaultdict

import torch
from tqdm import tqdm

from plumbing.machine import optimizer_step
from plumbing.options import BadInput

MAX_NORM = 1.0  # of the gradient of all parameters together


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Rises in equal parts over `warmup` steps (the first is not 0), then falls in equal parts to 5 % of the
    peak at the last of `steps`."""
    return peak * min((step + 1) / warmup, max(0.05, 1 - step / steps))


def adamw(parameters, lr: float) -> torch.optim.AdamW:
    """Weight decay for matrices only: biases, norms and other vectors are left to the loss."""
    parameters = list(parameters)
    matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def fit(name: str, loss_of_batch, parameters, *, steps: int, cfg, rate: str, print_every: int = 50) -> None:
    """Takes `steps` optimizer steps at the rate of cfg's option `rate`. loss_of_batch() draws the next batch
    and returns its loss, a scalar with gradient, and a dict of numbers to report. Prints their means over
    every `print_every` steps. Raises BadInput as soon as loss or gradient is not finite."""
    lr = getattr(cfg, rate)
    optimizer, warmup = adamw(parameters, lr), max(1, min(100, steps // 3))
    bar, sums, began = tqdm(range(steps), name), defaultdict(float), time.time()
    for step in bar:
        loss, numbers = loss_of_batch()
        loss.backward()
        norm = optimizer_step(optimizer, learning_rate(step, steps, lr, warmup), MAX_NORM)
        if not math.isfinite(norm + loss.item()):
            raise BadInput(f"--{rate} {lr}: {name} diverged at step {step + 1}; take a lower one")
        for key, value in {"loss": loss.item(), **numbers}.items():
            sums[key] += value
        if (step + 1) % print_every == 0:
            means = "  ".join(f"{key} {total / print_every:.4f}" for key, total in sums.items())
            bar.write(f"{name} step {step + 1}  {means}  {(time.time() - began) / (step + 1):.2f} s a step")
            sums.clear()
