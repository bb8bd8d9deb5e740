"""One way to train the small networks of claims: AdamW, a linear warm-up and a cosine to zero, clipped gradients.

Batches of 128; images are moved by up to 2 pixels, anew in every epoch. Weight decay is for matrices and kernels only. Batch
norms get the mean statistics of the last weights, as a running mean of small momentum has not arrived after a few hundred steps.

On 28x28 digits (4,000 to train on, 1,000 to test on): 98.9 % with the residual network of the CBAM claim (16, 32, 64
channels, 300 steps, rate 4e-3); 97.7 % with a ViT of four layers on patches of 7x7 and a class token (500 steps, rate 4e-3),
96.0 % on patches of 4x4 (500 steps, rate 2e-3). The ViT's positions must not begin much smaller than the patches: with 0.02
in place of 0.5 the last of these is 85.8 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from regard.train.classify import shifted
from regard.train.loop import Recipe

BATCH, SETTLING = 128, 20
Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def epochs(x: Tensor, y: Tensor, generator: torch.Generator, *, reach: int = 2) -> Batches:
    """Shuffled batches of images and labels, epoch after epoch without end."""
    while True:
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            yield shifted(x[index], reach, generator), y[index]


def train(model: nn.Module, batches: Batches, steps: int, lr: float, loss: Loss | None = None) -> None:
    """Take ``steps`` steps in place and leave the model in ``eval``.

    Args:
        batches: inputs and labels.
        lr: the highest rate of learning.
        loss: of one batch; default the cross-entropy of the model's logits.
    """
    recipe = Recipe(lr=lr)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    model.train()
    for step, (x, y) in enumerate(islice(batches, steps)):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step, steps)
        optimiser.zero_grad()
        (F.cross_entropy(model(x), y) if loss is None else loss(x, y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
    update_bn(islice(batches, SETTLING), model)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the inputs, in per cent, whose likeliest class is the right one."""
    said = torch.cat([model(part).argmax(-1) for part in x.split(250)])
    return 100 * (said == y).double().mean().item()
