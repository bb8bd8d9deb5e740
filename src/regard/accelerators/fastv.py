"""FastV: drop the image tokens that the last prompt token hardly looks at, from one decoder layer on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog import Tags, method
from regard.core.call import Call
from regard.core.capture import capture
from regard.core.host import Handle, host_of
from regard.core.tokens import Tokens


def importance(call: Call, valid: Tensor) -> Tensor:
    """(b, s): weight that the last valid token gives to each token, mean over heads; one row of the matrix is made."""
    s = valid.shape[1]
    last = s - 1 - valid.flip(1).int().argmax(1)
    rows = last.unique()
    weights = call.weights(rows=rows).mean(1)
    return weights[torch.arange(len(valid), device=valid.device), torch.searchsorted(rows, last)]


@method("fastv", kind="accelerator", tags=Tags(), example={"keep": 0.5, "after": 1})
class FastV:
    r"""Prunes image tokens of a vision-language model after ``after`` decoder layers; no training.

    Attention in the deeper layers of such models goes to text; most image tokens receive next to nothing. After layer
    ``after`` the weight that the last prompt token gives to each image token ranks them, and all layers from there on see
    only the best. Prefill costs fewer operations, and the caches of those layers are shorter. The choice made at prefill
    holds for the whole answer.

    .. math:: \phi_j = \frac1H \sum_h A^{(after-1)}_{h,\,last,\,j}, \qquad
        keep = \mathrm{top}_{\max(1,\,\mathrm{round}(keep \cdot N))} \{\phi_j : j \text{ an image token}\} \cup text

    Args:
        keep: share of the image tokens that stay, in (0, 1]; 1 changes nothing, bit for bit.
        after: decoder layers that see every token, 1 or more; the paper's K.

    Shape: keeps m of s prompt tokens, the same number in every row of a batch; hidden states of the deeper layers are (b, m, c).

    Raises:
        ValueError: keep or after outside their range, a model without image tokens or decoder, a static cache.

    Cost: a layer over n tokens takes :math:`4nc^2 + 2n^2c + 2ncm` with m the width of its MLP; see :meth:`saving`.

    Example:
        >>> round(FastV(keep=0.5, after=2).saving(layers=32, tokens=640, image=576, dim=4096, hidden=11008), 2)
        0.43

    Differs: the released cached variant counts positions anew after pruning and ranks by the first item of a batch; here
    positions stay the true ones and every item is ranked by its own attention. Where the items have different numbers of
    image tokens, the number dropped is that of the item with the fewest, so that tensors stay rectangular. Ties go to the
    earlier token. The variant without a cache, which ranks anew at every step, is not built.

    Reference: An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
    Models. ECCV 2024. arXiv:2403.06764
    """

    def __init__(self, keep: float = 0.5, after: int = 2) -> None:
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep={keep} must be in (0, 1]: the share of image tokens that stay")
        if after < 1:
            raise ValueError(f"after={after} must be 1 or more: a layer must have run to rank by its attention")
        self.keep, self.after = keep, after

    def attach(self, model: nn.Module) -> Handle:
        """Prune ``model`` (transformers, with image tokens in the sequence) until the handle is undone."""
        return host_of(model).prune(model, self.after, self.kept)

    def kept(self, call: Call, image: Tensor, valid: Tensor) -> Tensor:
        """Positions (b, m) that stay, ascending."""
        count = int(image.sum(1).min())
        if count == 0:
            warnings.warn("an item of the batch has no image tokens: nothing is pruned", stacklevel=2)
            return torch.arange(image.shape[1], device=image.device).expand(image.shape)
        dropped = count - max(1, round(count * self.keep))
        scores = importance(call, valid).masked_fill(~image, float("inf"))
        order = scores.sort(dim=1, descending=True, stable=True).indices
        return order[:, : image.shape[1] - dropped].sort(1).values

    def saving(self, *, layers: int, tokens: int, image: int, dim: int, hidden: int) -> float:
        """Share of the prefill's multiply-adds that is saved, by the paper's formula."""

        def layer(n: int) -> float:
            return 4 * n * dim**2 + 2 * n**2 * dim + 2 * n * dim * hidden

        short = layer(tokens - (image - max(1, round(image * self.keep))))
        return 1 - (self.after * layer(tokens) + (layers - self.after) * short) / (layers * layer(tokens))


def attention_share(model: nn.Module, inputs: Mapping[str, Any], *, where: str = "*") -> dict[str, Tensor]:
    """Share of the last prompt token's attention that each role gets, layer by layer: role -> (layers,).

    Raises ValueError where the sites have no named image tokens.
    """
    shares: dict[str, list[Tensor]] = {}
    with torch.no_grad(), capture(model, where) as cap:
        model(**inputs)
    for _, call in cap.items():
        tokens = call.tokens_k
        if not isinstance(tokens, Tokens) or {"system", "instruction"}.isdisjoint(s.role for s in tokens.segments):
            continue
        row = call.weights(rows=-1).mean((0, 1, 2))
        for role, part in tokens.split(row, 0).items():
            shares.setdefault(role, []).append(part.sum())
    if "image" not in shares:
        raise ValueError(
            f"no site of {type(model).__name__} has named image tokens; describe them with regard.tokens(...)"
        )
    return {role: torch.stack(parts) for role, parts in shares.items()}
