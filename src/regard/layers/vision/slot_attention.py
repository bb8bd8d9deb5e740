"""Slot attention: a few exchangeable slots compete for the inputs, round after round."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.ops.attend import mix, scores
from regard.ops.rows import single


def naive(layer: SlotAttention, x: Float[Tensor, "b n c"], mask: Tensor | None = None) -> Float[Tensor, "b k e"]:
    """Input by input and slot by slot."""
    start = layer.sample(len(x))
    rows = []
    for b, inputs in enumerate(x):
        seen = [i for i in range(len(inputs)) if mask is None or mask[b, i]]
        normed = layer.norm_inputs(inputs)
        keys, values = layer.k(normed), layer.v(normed)
        slots = list(start[b])
        for _ in range(layer.iterations):
            heads = []
            for h in range(layer.num_heads):
                part = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
                queries = [layer.q(layer.norm_slots(s))[part] / layer.head_dim**0.5 for s in slots]
                shares = torch.zeros(len(slots), len(inputs), dtype=x.dtype)
                for i in seen:
                    logits = torch.stack([q @ keys[i, part] for q in queries])
                    shares[:, i] = logits.exp() / logits.exp().sum() + layer.eps
                read = values[:, part]
                heads.append([share @ read / share.sum() if seen else 0 * read.sum(0) for share in shares])
            updates = [torch.cat([head[s] for head in heads]) for s in range(len(slots))]
            slots = [layer.gru(u[None], s[None])[0] for u, s in zip(updates, slots)]
            slots = [s + layer.mlp(layer.norm_mlp(s)) for s in slots]
        rows.append(torch.stack(slots))
    return torch.stack(rows)


@method(
    "slot-attention",
    kind="layer",
    tags=Tags(
        mask=True,
        random=True,
        swap=False,
        xfail={"device_followed": "torch's fused GRU cell has no kernel for the stand-in device"},
    ),
    example={"dim": 8, "num_heads": 1, "num_slots": 3, "iterations": 2},
    naive=naive,
)
class SlotAttention(nn.Module):
    r"""Turn n inputs into k exchangeable slots by rounds of attention in which the slots compete for each input.

    The softmax runs over the slots; the weights of each slot are then normalised over the inputs, so that a slot reads
    a weighted mean. Slots start as draws from one learned Gaussian and are updated by a recurrent cell; all rounds
    share their weights. ``iterations`` may be changed after training, and any number of slots may be asked for.

    .. math::
        a_{sn} = \mathop{\mathrm{softmax}}_s \frac{q(z_s) \cdot k(x_n)}{\sqrt d} + \epsilon, \quad
        u_s = \frac{\sum_n a_{sn}\, v(x_n)}{\sum_n a_{sn}}, \quad
        z_s \leftarrow g + \mathrm{MLP}(\mathrm{LN}\, g), \; g = \mathrm{GRU}(u_s, z_s)

    Args:
        dim: channels of the inputs.
        num_heads: competitions held side by side, each over its own share of the channels.
        slot_dim: channels of a slot; default ``dim``.
        mlp_ratio: hidden units of the MLP, as a multiple of ``slot_dim``.
        num_slots: slots that are drawn when none are given.
        iterations: rounds.
        eps: added after the softmax, so that a slot that wins nothing still has a mean.

    Shape: x (b, n, dim) -> (b, num_slots, slot_dim). ``slots`` (b, k, slot_dim) is where to start from, instead of a
        draw; ``mask`` (b, n) is True where an input may be seen. :meth:`trace` also gives the last round's weights
        (b, h, k, n), which sum to 1 over the slots.

    Raises:
        ValueError: widths, counts, mask or slots that do not fit, no inputs.

    Cost: per round 4 b k n slot_dim FLOPs for scores and mean and 2 b k (7 + 2 mlp_ratio) slot_dim^2 for queries and
        updates; the inputs are projected once. Memory for the weights: b h k n a round.

    Example:
        >>> import torch
        >>> layer = SlotAttention(16, num_slots=3)
        >>> layer(torch.randn(2, 49, 16)).shape
        torch.Size([2, 3, 16])

    Differs: the paper has one head; with several each holds its own softmax over the slots. Inputs can be masked; a
        slot that may see nothing is updated with zero. Softmax and mean are computed in single precision or better. As
        in the paper slots are drawn in ``eval`` too: pass ``slots`` made with a generator for the same ones twice.

    Reference: Francesco Locatello, Dirk Weissenborn, Thomas Unterthiner, Aravindh Mahendran, Georg Heigold, Jakob
        Uszkoreit, Alexey Dosovitskiy, Thomas Kipf, Object-Centric Learning with Slot Attention, NeurIPS 2020,
        arXiv:2006.15055
    """

    form = "slots"

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        slot_dim: int | None = None,
        mlp_ratio: int = 2,
        num_slots: int = 7,
        iterations: int = 3,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        slot_dim = dim if slot_dim is None else slot_dim
        if min(dim, slot_dim, mlp_ratio) < 1:
            raise ValueError(f"dim={dim}, slot_dim={slot_dim} and mlp_ratio={mlp_ratio} must be positive")
        if num_heads < 1 or slot_dim % num_heads:
            raise ValueError(f"slot_dim={slot_dim} must be a multiple of num_heads={num_heads}")
        if num_slots < 1 or iterations < 0 or eps < 0:
            raise ValueError(
                f"num_slots={num_slots} must be positive, iterations={iterations} and eps={eps} not negative"
            )
        self.dim, self.slot_dim, self.num_heads, self.head_dim = dim, slot_dim, num_heads, slot_dim // num_heads
        self.num_slots, self.iterations, self.eps = num_slots, iterations, eps
        self.norm_inputs, self.norm_slots, self.norm_mlp = (
            nn.LayerNorm(dim),
            nn.LayerNorm(slot_dim),
            nn.LayerNorm(slot_dim),
        )
        self.q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.k = nn.Linear(dim, slot_dim, bias=False)
        self.v = nn.Linear(dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        hidden = mlp_ratio * slot_dim
        self.mlp = nn.Sequential(nn.Linear(slot_dim, hidden), nn.ReLU(), nn.Linear(hidden, slot_dim))
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, slot_dim)))
        self.log_deviation = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, slot_dim)))

    def sample(
        self, batch: int, num_slots: int | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b k e"]:
        """Fresh slots from the learned Gaussian, the same in every precision under one seed."""
        num_slots = self.num_slots if num_slots is None else num_slots
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} must be positive")
        shape = (batch, num_slots, self.slot_dim)
        noise = torch.randn(shape, dtype=torch.float32, device=self.mean.device, generator=generator)
        return self.mean + self.log_deviation.exp() * noise.to(self.mean.dtype)

    def compete(
        self, slots: Float[Tensor, "b k e"], keys: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h k n"]:
        """What share of each input goes to each slot: a softmax over the slots, zero where nothing may be seen."""
        logits = scores(self._heads(self.q(self.norm_slots(slots))), keys)
        shares = single(logits).softmax(-2)
        return shares if mask is None else shares.masked_fill(~mask[:, None, None], 0.0)

    def update(
        self, slots: Float[Tensor, "b k e"], keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Float[Tensor, "b k e"], Float[Tensor, "b h k n"]]:
        """One round: the new slots, and the weights that made them."""
        weights = self.compete(slots, keys, mask)
        shares = weights + self.eps
        if mask is not None:
            shares = shares.masked_fill(~mask[:, None, None], 0.0)
        total = shares.sum(-1, keepdim=True)
        means = mix((shares / total.masked_fill(total == 0.0, 1.0)).to(values.dtype), values)
        updates = means.transpose(1, 2).flatten(2)
        new = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return new + self.mlp(self.norm_mlp(new)), weights

    def trace(
        self, x: Float[Tensor, "b n c"], *, slots: Float[Tensor, "b k e"] | None = None, mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "b k e"], Float[Tensor, "b h k n"]]:
        """The slots, and how the last round shared the inputs among them."""
        slots, keys, values = self._begin(x, slots, mask)
        weights = self.compete(slots, keys, mask)
        for _ in range(self.iterations):
            slots, weights = self.update(slots, keys, values, mask)
        return slots, weights

    def forward(
        self, x: Float[Tensor, "b n c"], *, slots: Float[Tensor, "b k e"] | None = None, mask: Tensor | None = None
    ) -> Float[Tensor, "b k e"]:
        slots, keys, values = self._begin(x, slots, mask)
        for _ in range(self.iterations):
            slots, _ = self.update(slots, keys, values, mask)
        return slots

    def _heads(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _begin(self, x: Tensor, slots: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if x.ndim != 3 or x.shape[2] != self.dim or x.shape[1] == 0:
            raise ValueError(f"x must be (b, n, {self.dim}) with n at least 1; got {tuple(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(f"mask must be boolean and {tuple(x.shape[:2])}; got {mask.dtype}, {tuple(mask.shape)}")
        slots = self.sample(len(x)) if slots is None else slots
        if slots.ndim != 3 or slots.shape[0] != len(x) or slots.shape[1] == 0 or slots.shape[2] != self.slot_dim:
            raise ValueError(
                f"slots must be ({len(x)}, k, {self.slot_dim}) with k at least 1; got {tuple(slots.shape)}"
            )
        normed = self.norm_inputs(x)
        return slots, self._heads(self.k(normed)), self._heads(self.v(normed))


class ImplicitSlotAttention(SlotAttention):
    """Slot attention whose gradient passes through the last round only, as if the rounds had found a fixed point.

    The backward pass keeps one round instead of all of them; the Gaussian that the slots start from gets no gradient.

    Reference: Michael Chang, Thomas L. Griffiths, Sergey Levine, Object Representations as Fixed Points: Training
        Iterative Refinement Algorithms with Implicit Differentiation, NeurIPS 2022, arXiv:2207.00787
    """

    def forward(
        self, x: Float[Tensor, "b n c"], *, slots: Float[Tensor, "b k e"] | None = None, mask: Tensor | None = None
    ) -> Float[Tensor, "b k e"]:
        slots, keys, values = self._begin(x, slots, mask)
        with torch.no_grad():
            for _ in range(self.iterations - 1):
                slots, _ = self.update(slots, keys, values, mask)
        return self.update(slots.detach(), keys, values, mask)[0] if self.iterations else slots
