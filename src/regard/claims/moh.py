"""Tokens that pick three quarters or half of the heads lose little, and share the work when they are asked to.

Set-up: handwritten digits of 8x8 pixels as 16 patches. Two pre-norm transformer layers of width 64 with 8 heads, learned
positions and the mean over patches, 30 epochs of Adam with batches of 64 and one cycle up to 3e-3; accuracy on the digits
held out. Compared, trained alike: multi-head attention; two shared heads with four or two of the six others (75 % and 50 %
of the heads), with a hundredth of the mean balancing loss; 50 % without it. Usage is how often the busiest routed head of a
layer is picked over how often the idlest is, on the digits held out, in the more uneven layer. Time of a forward pass that
skips the rows of heads that are off, width 512, 50 % of 8 heads, against one that computes them all: reported.

Bar, for the mean over three seeds: with 75 % of the heads at most 0.5 points below multi-head attention, with 50 % at most
2; with 50 %, usage at most 3 with the balancing loss, and larger without.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.cost import interleave
from regard.claims.claim import Budget, Row, mean_row
from regard.layers.sequence.moh import MixtureOfHeadAttention, MixtureOfHeads, active_only, balance_losses, highest
from regard.nn import Attention
from regard.worlds.digits import small_digits

SEEDS = 3
DIM, HEADS, SHARED, PATCHES = 64, 8, 2, 16


class Form(NamedTuple):
    active: int | None
    balance: float


FORMS = {
    "multi-head": Form(None, 0.0),
    "75 %": Form(4, 0.01),
    "50 %": Form(2, 0.01),
    "50 % without balance": Form(2, 0.0),
}


def attention(active: int | None) -> Attention:
    if active is None:
        return Attention(DIM, HEADS)
    return MixtureOfHeadAttention(DIM, HEADS, shared_heads=SHARED, active_heads=active)


class Block(nn.Module):
    def __init__(self, active: int | None) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), attention(active)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Reader(nn.Module):
    """Digits (b, 1, 8, 8) -> logits (b, 10)."""

    def __init__(self, active: int | None) -> None:
        super().__init__()
        self.stem, self.positions = nn.Conv2d(1, DIM, 2, stride=2), nn.Parameter(0.02 * torch.randn(PATCHES, DIM))
        self.blocks = nn.Sequential(Block(active), Block(active))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(x).mean(1))


def usage(model: Reader, pixels: Tensor) -> float:
    """Picks of the busiest routed head over those of the idlest, in the more uneven layer."""
    ratios = []

    def note(layer: MixtureOfHeads, args: tuple[Tensor, ...]) -> None:
        picks = highest(layer.route(args[0]), layer.active_heads).sum((0, 1))
        ratios.append((picks.max() / picks.min().clamp(min=1)).item())

    layers = [layer for layer in model.modules() if isinstance(layer, MixtureOfHeads)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    model(pixels)
    for hook in hooks:
        hook.remove()
    return max(ratios, default=1.0)


def fit(form: Form, epochs: int, count: int | None, seed: int) -> tuple[float, float]:
    """Accuracy in per cent, and usage."""
    train, test = small_digits("train", seed), small_digits("test", seed)
    seen, unseen = (images.pixels[:count].float() / 8 - 1 for images in (train, test))
    torch.manual_seed(seed)
    model, steps = Reader(form.active), epochs * (len(seen) // 64)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(seen))[: len(seen) // 64 * 64].view(-1, 64):
            optimiser.zero_grad()
            with balance_losses(model) as losses:
                loss = F.cross_entropy(model(seen[batch]), train.labels[batch])
            if form.balance:
                loss = loss + form.balance * torch.stack(losses).mean()
            loss.backward()
            optimiser.step()
            rate.step()
    with torch.no_grad():
        right = (model(unseen).argmax(-1) == test.labels[:count]).double().mean().item()
        return 100 * right, usage(model, unseen)


@torch.no_grad()
def time_of_skipping(length: int, dim: int, rounds: int) -> float:
    layer, x = MixtureOfHeadAttention(dim, HEADS, shared_heads=SHARED, active_heads=2), torch.randn(1, length, dim)
    calls: dict[str, Callable[[], Tensor]] = {"all": lambda: layer(x), "some": lambda: active_only(layer, x)}
    times = interleave(calls, rounds=rounds)
    return times["some"].median / times["all"].median


def run(budget: Budget, seeds: int) -> list[Row]:
    epochs, count, dim, lengths = (1, 128, 32, (16,)) if budget == "smoke" else (30, None, 512, (512, 2048))
    found = {name: [fit(form, epochs, count, s) for s in range(seeds)] for name, form in FORMS.items()}
    right, used = ({name: [run[i] for run in runs] for name, runs in found.items()} for i in range(2))
    whole, free = fmean(right["multi-head"]), fmean(used["50 % without balance"])
    rows = [
        mean_row(f"digits, %, {name} of the heads", right[name], whole - points, ">=", baseline=whole, note="all heads")
        for name, points in (("75 %", 0.5), ("50 %", 2.0))
    ]
    unbalanced = right["50 % without balance"]
    return [
        *rows,
        Row(
            "digits, %, 50 % of the heads without balance", fmean(unbalanced), baseline=whole, values=tuple(unbalanced)
        ),
        mean_row("usage, busiest over idlest head", used["50 %"], 3.0, "<=", baseline=free, note="without balance"),
        mean_row("the same without balance", used["50 % without balance"], fmean(used["50 %"]), ">"),
        *(Row(f"time of skipping, {n} tokens", time_of_skipping(n, dim, 7), baseline=1.0) for n in lengths),
    ]
