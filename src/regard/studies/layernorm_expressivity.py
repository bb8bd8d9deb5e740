"""What layer norm does for attention: keys on a hyperplane can be attended equally, keys on a sphere can all be chosen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.studies.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {"none": (False, False), "project": (True, False), "scale": (False, True), "layer norm": (True, True)}


class FactorizedLayerNorm(nn.Module):
    r"""Layer norm in its two parts: projection onto the hyperplane orthogonal to (1, ..., 1), and scaling onto a sphere.

    .. math:: y = x - \tfrac1d (x \cdot \mathbf 1) \mathbf 1, \qquad z = radius \cdot y / \sqrt{\|y\|^2 + d\,eps}

    Args:
        dim: channels.
        project: do the first part.
        scale: do the second part; alone it is RMS norm.
        affine: multiply by a learned gain and add a learned bias.
        radius: of the sphere; default sqrt(dim), that of layer norm.
        eps: as in layer norm, added to the mean square.

    Shape: (..., dim) -> (..., dim). A zero vector stays zero.
    """

    def __init__(
        self,
        dim: int,
        *,
        project: bool = True,
        scale: bool = True,
        affine: bool = True,
        radius: float | None = None,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        if dim < 1 or (project and dim < 2):
            raise ValueError(f"dim={dim} must be positive, and at least 2 to project")
        if eps < 0 or (radius is not None and radius <= 0):
            raise ValueError(f"eps={eps} must not be negative, and radius={radius} must be positive")
        self.dim, self.project, self.scale, self.eps = dim, project, scale, eps
        self.radius = math.sqrt(dim) if radius is None else radius
        self.gain = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        if self.project:
            x = x - x.mean(-1, keepdim=True)
        if self.scale:
            square = x.square().sum(-1, keepdim=True) + self.dim * self.eps
            x = self.radius * x / square.masked_fill(square == 0, 1.0).sqrt()
        return x if self.gain is None or self.bias is None else x * self.gain + self.bias


def separable(keys: Float[Tensor, "n d"], i: int) -> bool:
    r"""Whether some query ranks key i strictly first: whether :math:`(k_j - k_i) \cdot q \le -1` for all j has a solution."""
    from scipy.optimize import linprog

    others = torch.cat([keys[:i], keys[i + 1 :]]) - keys[i]
    if not len(others):
        return True
    rows = (others / others.norm(dim=-1, keepdim=True).mean()).double().cpu().numpy()
    done = linprog([0.0] * rows.shape[1], A_ub=rows, b_ub=[-1.0] * len(rows), bounds=(None, None), method="highs")
    if done.status not in (0, 2):
        raise RuntimeError(f"the linear program of key {i} ended with status {done.status}: {done.message}")
    return done.status == 0


def chosen_by_reflection(keys: Float[Tensor, "n d"], tries: int = 100) -> Bool[Tensor, "n"]:
    """For which keys a query that ranks them first is found by reflection; the others may have one or not.

    The search starts at the key itself and reflects the query at the hyperplane on which the key ties with the one ranked first.
    """
    queries = keys - keys.mean(0)
    own = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
    found = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    for start in (keys, queries):
        queries = start.clone()
        for _ in range(tries):
            lead = (queries @ keys.T - (queries * keys).sum(-1, keepdim=True)).masked_fill(own, float("-inf"))
            ahead, rival = lead.max(-1)
            found |= ahead < 0
            if found.all():
                return found
            apart = keys[rival] - keys
            step = 2 * (queries * apart).sum(-1) / apart.square().sum(-1).clamp_min(1e-300)
            queries = torch.where((ahead < 0)[:, None], queries, queries - step[:, None] * apart)
    return found


def unselectable(keys: Float[Tensor, "n d"]) -> Bool[Tensor, "n"]:
    """Which keys no query ranks strictly first: those in the convex hull of the others. Exact up to rounding.

    Equal keys count as one, with a warning, and share its verdict.

    Raises:
        ValueError: no keys, or keys that are not finite.
    """
    if keys.ndim != 2 or not len(keys) or not keys.isfinite().all():
        raise ValueError(f"keys must be (n, d), n at least 1, and finite; got {tuple(keys.shape)}")
    distinct, back = keys.double().unique(dim=0, return_inverse=True)
    if len(distinct) < len(keys):
        warnings.warn(f"{len(keys) - len(distinct)} of {len(keys)} keys equal another one", stacklevel=2)
    chosen = chosen_by_reflection(distinct)
    for i in (~chosen).nonzero().flatten().tolist():
        chosen[i] = separable(distinct, i)
    return ~chosen[back]


def query_angle(w_q: Float[Tensor, "d c"], w_k: Float[Tensor, "d c"], x: Float[Tensor, "n c"]) -> Float[Tensor, "n"]:
    r"""Degrees between what a query asks of the normed keys, :math:`W_k^\top W_q x`, and the direction (1, ..., 1).

    At 0 the query attends equally to all keys that are orthogonal to (1, ..., 1); 90 is the largest.
    """
    asked = x @ w_q.T @ w_k
    cosine = asked.sum(-1).abs() / (asked.norm(dim=-1) * math.sqrt(asked.shape[-1]))
    return cosine.clamp(max=1.0).acos().rad2deg()


def random_keys(dim: int, count: int, runs: int, seed: int = 0) -> list[dict[str, bool | int | float | str]]:
    """Share of normal random keys that cannot be selected, after each part of layer norm, mean over ``runs`` sets."""
    rows: list[dict[str, bool | int | float | str]] = []
    for arm, (project, scale) in ARMS.items():
        norm = FactorizedLayerNorm(dim, project=project, scale=scale, affine=False)
        generator = torch.Generator().manual_seed(seed)
        shares = []
        for _ in range(runs):
            keys = norm(torch.randn(count, dim, generator=generator, dtype=torch.float64))
            shares.append(unselectable(keys).double().mean().item())
        some = sum(share > 0 for share in shares) / runs
        rows.append(
            {"norm": arm, "dim": dim, "keys": count, "unselectable": sum(shares) / runs, "sets with some": some}
        )
    return rows


def _share(table: Table, arm: str, **where: int) -> list[float]:
    return table.where(norm=arm, **where).column("unselectable")


@method("layernorm-expressivity", kind="study")
class LayerNormExpressivity:
    r"""Count the keys that no query can select, with and without the two parts of layer norm.

    A key inside the convex hull of the others is never ranked first, whatever the query. Scaling puts all keys on a sphere,
    where none is inside; projection alone takes a dimension away and makes it worse. What projection gives
    instead is a query, along (1, ..., 1), that attends to all keys equally.

    .. math:: k_i \text{ is selectable} \iff \exists q \; \forall j \ne i: \; q \cdot k_j < q \cdot k_i

    Example:
        >>> table = LayerNormExpressivity().run()
        >>> all(table.claims.values())
        True

    Differs: keys are normal random vectors; those of a trained language model are not looked at here. The linear program is
        homogeneous, without bounds on the query, and solved with HiGHS. The majority task that shows the use of projection
        is trained in this paper's claim.

    Reference: Shaked Brody, Uri Alon, Eran Yahav, On the Expressivity Role of LayerNorm in Transformers' Attention,
        Findings of ACL 2023, arXiv:2305.02582
    """

    claims: dict[str, Callable[[Table], bool]] = {
        "scaling leaves no key unselectable": lambda t: not any(_share(t, "scale") + _share(t, "layer norm")),
        "without scaling at least 40 % of 64 keys in 4 dimensions are": lambda t: (
            _share(t, "none", dim=4, keys=64)[0] >= 0.4
        ),
        "projection alone never lowers the share": lambda t: all(
            projected >= plain for projected, plain in zip(_share(t, "project"), _share(t, "none"))
        ),
    }

    def run(self, scale: Literal["toy", "full"] = "toy", seed: int = 0) -> Table:
        """A table of shares by norm, dimension and number of keys.

        Args:
            scale: ``toy`` (seconds) or ``full`` (a minute, more keys and sets).
            seed: of the keys.
        """
        if scale not in ("toy", "full"):
            raise ValueError(f"scale={scale!r} must be 'toy' or 'full'")
        sizes = [(4, 16, 6), (4, 64, 2)] if scale == "toy" else [(4, 16, 40), (4, 64, 20), (4, 128, 20), (8, 128, 20)]
        rows = [row for dim, count, runs in sizes for row in random_keys(dim, count, runs, seed)]
        return Table.build("Keys that no query selects", rows, self.claims)

    def finding(self, table: Table) -> str:
        """The table in one sentence."""
        dim, count = table.column("dim")[-1], table.column("keys")[-1]
        none, scaled = (_share(table, arm, dim=dim, keys=count)[0] for arm in ("none", "layer norm"))
        return (
            f"Of {count} random keys in {dim} dimensions no query selects {100 * none:.0f} %; "
            f"after layer norm {100 * scaled:.0f} %."
        )

    def plot(self, table: Table) -> Figure:
        """Shares that cannot be selected, a group of bars for each number of keys."""
        from matplotlib.figure import Figure

        groups = list(dict.fromkeys(zip(table.column("dim"), table.column("keys"))))
        figure = Figure(figsize=(2.5 + 1.6 * len(groups), 3), layout="constrained")
        axes = figure.subplots()
        for i, arm in enumerate(ARMS):
            heights = [_share(table, arm, dim=dim, keys=count)[0] for dim, count in groups]
            axes.bar([g + (i - 1.5) / 5 for g in range(len(groups))], heights, 0.2, label=arm)
        axes.set_xticks(range(len(groups)), [f"{count} keys, {dim} dimensions" for dim, count in groups])
        axes.set_ylabel("share that no query selects")
        axes.legend(title="norm")
        return figure
