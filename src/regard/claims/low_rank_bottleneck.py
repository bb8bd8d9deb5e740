"""Heads narrower than a sequence is long cannot follow every pattern, and models made of them recall less.

A, one head. 32 fixed normal tokens of width 64; queries and keys of one head are fitted to the softmax of normal logits
of standard deviation 3 by 1,500 steps of Adam from 0.02 down a cosine. Bar, for the mean over three seeds: the divergence
falls with every larger head; 8 channels leave at least 100 times what 32 leave; 32 leave at most 5e-4 nats.

B, models. 32 tokens carry a key out of 64 and a value out of 64 each, 32 more ask for the values of as many keys. Two
pre-norm transformer layers of width 64 without positions, 300 steps of Adam with one cycle up to 3e-3, fresh batches of
16; accuracy on 256 new sequences. Compared, trained alike: 1, 4 and 16 heads of 64 / h channels, and as many of 64
channels. Bar, for the mean over three seeds: with 16 heads those of fixed size are better by 15 points; with fixed size
more heads never cost more than one point. Reported, as the fair comparison: 16 narrow heads in a model as wide as its
parameters then allow.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.claims.claim import Budget, Row
from regard.layers.sequence.low_rank_bottleneck import FixedHeadAttention
from regard.studies.low_rank_bottleneck import fit_pattern

SEEDS = 3
HEAD_DIMS, HEADS, DIM, FIXED, EQUAL = (2, 4, 8, 16, 32, 64), (1, 4, 16), 64, 64, 160
STORED, KEYS, VALUES = 32, 64, 64


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), FixedHeadAttention(dim, num_heads, head_dim=head_dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Memory(nn.Module):
    """Keys and values (b, n), value 0 being a question -> logits (b, n, values)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(KEYS, dim), nn.Embedding(VALUES + 1, dim)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, head_dim) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, VALUES))

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        return self.head(self.blocks(self.keys(keys) + self.values(values)))


def recall(count: int, world: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of all tokens, and what each question, the second half of tokens, is to be answered with."""
    keys = torch.rand(count, KEYS, generator=world).argsort(-1)[:, :STORED]
    values = torch.randint(VALUES, (count, STORED), generator=world)
    asked = torch.rand(count, STORED, generator=world).argsort(-1)
    tokens = torch.cat((keys, keys.gather(1, asked)), 1)
    return tokens, torch.cat((values + 1, torch.zeros_like(values)), 1), values.gather(1, asked)


def fit(dim: int, num_heads: int, head_dim: int, steps: int, count: int, seed: int) -> float:
    """Accuracy in per cent."""
    torch.manual_seed(seed)
    model, world = Memory(dim, num_heads, head_dim), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        keys, values, answers = recall(16, world)
        optimiser.zero_grad()
        F.cross_entropy(model(keys, values)[:, STORED:].flatten(0, 1), answers.flatten()).backward()
        optimiser.step()
        rate.step()
    keys, values, answers = recall(count, torch.Generator().manual_seed(1000 + seed))
    with torch.no_grad():
        return 100 * (model(keys, values)[:, STORED:].argmax(-1) == answers).double().mean().item()


def run(budget: Budget, seeds: int) -> list[Row]:
    fitting, steps, count = (3, 2, 4) if budget == "smoke" else (1500, 300, 256)
    left = {d: [fit_pattern(32, 64, d, s, steps=fitting)[0] for s in range(seeds)] for d in HEAD_DIMS}
    mean = {d: fmean(values) for d, values in left.items()}
    falls = [mean[wide] / mean[narrow] for narrow, wide in pairwise(HEAD_DIMS)]
    rows = [Row(f"divergence, nats, {d} channels", mean[d], values=tuple(left[d])) for d in HEAD_DIMS if d != 32]
    rows += [
        Row("divergence against the next smaller head, worst", max(falls), 1.0, "<", values=tuple(falls)),
        Row("divergence with 8 channels over that with 32", mean[8] / mean[32], 100.0, ">="),
        Row("divergence, nats, 32 channels", mean[32], 5e-4, "<=", baseline=mean[8], values=tuple(left[32])),
    ]
    narrow, fixed = (
        {h: [fit(DIM, h, size or DIM // h, steps, count, s) for s in range(seeds)] for h in HEADS}
        for size in (0, FIXED)
    )
    gain = [ours - theirs for ours, theirs in zip(fixed[16], narrow[16])]
    means = [fmean(fixed[h]) for h in HEADS]
    more = [b - a for a, b in pairwise(means)]
    rows += [Row(f"recall, %, {h} heads of 64 / h", fmean(narrow[h]), values=tuple(narrow[h])) for h in HEADS]
    rows += [Row(f"recall, %, {h} heads of 64", fmean(fixed[h]), values=tuple(fixed[h])) for h in HEADS]
    equal = [fit(EQUAL, 16, EQUAL // 16, steps, count, s) for s in range(seeds)]
    rows += [
        Row("recall, points, 16 heads of 64 over 16 of 4", fmean(gain), 15.0, ">=", values=tuple(gain)),
        Row("recall, points, of more heads of 64, worst", min(more), -1.0, ">=", values=tuple(more)),
        Row(f"recall, %, 16 heads of {EQUAL // 16}, as many parameters", fmean(equal), values=tuple(equal)),
    ]
    return rows
