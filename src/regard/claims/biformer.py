"""Routing finds what belongs together however far apart it lies, with a few regions to look at.

Maps of 28x28 tokens in 7x7 regions. Half of the regions ask, half answer: every asking region shares a random feature of
16 channels with one answering region at least three regions away, each token with noise of its own (half the feature's
deviation); answering tokens also carry one of ten labels, in ten further channels. Queries and keys are the features, values
the labels, nothing is trained. A region is answered when the label that its tokens receive most of is its partner's.

Compared: bi-level routing to two regions (32 keys a query); windows of 7x7 tokens, plain and shifted by 3, the evidence
of both added (98 keys a query); full attention (784 keys), all with the same projections and scale. Bar, over 24 maps a
seed: routing answers at least 95 % of the regions, windows at most 40 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.claims.claim import Budget, Row, mean_row
from regard.layers.vision.biformer import BiLevelRoutingAttention
from regard.ops.attend import attend
from regard.ops.masks import dense, grid_window

SEEDS = 3
SIDE, REGIONS, FEATURE, LABELS = 28, 7, 16, 10
SHARPNESS = 6.0


def partners(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """24 asking regions and the answering region of each, at least three rows or columns away."""
    at = torch.cartesian_prod(torch.arange(REGIONS), torch.arange(REGIONS))
    far = (at[:, None] - at).abs().amax(-1) >= 3
    while True:
        order = torch.randperm(REGIONS**2, generator=generator)
        asking, free, answering = order[:24], order[24:48].tolist(), []
        for region in asking:
            answering.append(next((other for other in free if far[region, other]), None))
            if answering[-1] is None:
                break
            free.remove(answering[-1])
        else:
            return asking, torch.tensor(answering)


def world(maps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (maps, 784, 26), the asking regions (maps, 24) and the labels of their partners."""
    regions = torch.zeros(maps, REGIONS**2, FEATURE + LABELS)
    regions[..., :FEATURE] = torch.randn(maps, REGIONS**2, FEATURE, generator=generator)
    label = torch.randint(LABELS, (maps, 24), generator=generator)
    pairs = [partners(generator) for _ in range(maps)]
    for i, (asking, answering) in enumerate(pairs):
        regions[i, answering, :FEATURE] = regions[i, asking, :FEATURE]
        regions[i, answering, FEATURE + label[i]] = 1.0
    side = SIDE // REGIONS
    image = regions.unflatten(1, (REGIONS, REGIONS)).repeat_interleave(side, 1).repeat_interleave(side, 2).clone()
    image[..., :FEATURE] += 0.5 * torch.randn(maps, SIDE, SIDE, FEATURE, generator=generator)
    return image.flatten(1, 2), torch.stack([asking for asking, _ in pairs]), label


def router() -> BiLevelRoutingAttention:
    """The layer that reads queries and keys off the features and values off the labels, and changes nothing else."""
    dim = FEATURE + LABELS
    layer = BiLevelRoutingAttention(dim, 1, REGIONS, topk=2, qk_dim=FEATURE)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        features = SHARPNESS**0.5 * torch.eye(FEATURE, dim)
        layer.qkv.weight[:FEATURE], layer.qkv.weight[FEATURE : 2 * FEATURE] = features, features
        labels = torch.arange(FEATURE, dim)
        layer.qkv.weight[2 * FEATURE + labels, labels] = 1.0
        layer.wo.weight.copy_(torch.eye(dim))
    return layer


def answered(evidence: Tensor, asking: Tensor, label: Tensor) -> float:
    """Per cent of asking regions that receive most of the right label, from evidence (maps, 784, labels)."""
    side = SIDE // REGIONS
    regions = evidence.view(-1, REGIONS, side, REGIONS, side, LABELS).sum((2, 4)).flatten(1, 2)
    said = regions.gather(1, asking[..., None].expand(-1, -1, LABELS))
    right = (said.argmax(-1) == label) & (said.amax(-1) > 0)
    return 100 * right.double().mean().item()


@torch.no_grad()
def run(budget: Budget, seeds: int) -> list[Row]:
    maps = 2 if budget == "smoke" else 24
    layer = router()
    routed, windowed, full = [], [], []
    n = SIDE**2
    masks = [dense(grid_window((SIDE, SIDE), 7, shift), 1, 1, n, n) for shift in (0, 3)]
    for seed in range(seeds):
        x, asking, label = world(maps, torch.Generator().manual_seed(seed))
        routed.append(answered(layer(x, grid=(SIDE, SIDE))[..., FEATURE:], asking, label))
        features = SHARPNESS**0.5 * x[:, None, :, :FEATURE]
        values = x[:, None, :, FEATURE:]
        windows = sum(attend(features, features, values, mask=mask)[:, 0] for mask in masks)
        windowed.append(answered(torch.as_tensor(windows), asking, label))
        full.append(answered(attend(features, features, values)[:, 0], asking, label))
    everything = sum(full) / seeds
    return [
        mean_row("regions answered by routing, %", routed, 95.0, ">=", baseline=everything, note="full attention"),
        mean_row("regions answered by shifted windows, %", windowed, 40.0, "<="),
        Row(
            "keys of a query under routing",
            2 * n / REGIONS**2,
            98,
            "<=",
            baseline=98,
            note="windows, plain and shifted",
        ),
    ]
