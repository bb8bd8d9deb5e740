"""Rollout and flow agree with blanking tokens out; raw attention of deep layers does not.

Set-up: strings of fourteen tokens behind a class token: a marker and the subject after it, two other nouns, and
fillers. The number of the marked noun is the label. Six pre-norm layers of four heads and 64 channels, 600 steps of the
recipe on fresh strings; a tenth of the fillers is the unknown word, so that it is nothing new later.
On 200 strings the importance of a token is how far the probability of the true class moves when the unknown word
stands in its place. Relevance is the class row of: the attention of one layer (mean over heads), its rollout, its
flow. Agreement is Spearman's rank correlation over the fourteen tokens, averaged over strings.

Bar, with three seeds: at the last layer rollout and flow each exceed raw attention by at least 0.15; from the first
layer to the last the correlation of rollout does not fall, and that of raw attention does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.claims._recipe import BATCH, accuracy, train
from regard.claims.claim import Budget, Row, mean_row
from regard.core.capture import capture
from regard.explainers.attention_flow import attention_flow, attention_rollout
from regard.nn.attention import Attention

SEEDS = 3
CLASS, MARKER, UNKNOWN, FIRST_NOUN, NOUNS, FIRST_FILLER, FILLERS = 0, 1, 2, 3, 10, 23, 20
LENGTH = 14


def strings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (count, 15) and the number of the marked noun, 0 or 1."""

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    tokens = FIRST_FILLER + draw(FILLERS, count, LENGTH)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.1] = UNKNOWN
    number = draw(2, count, 3)
    nouns = FIRST_NOUN + NOUNS * number + draw(NOUNS, count, 3)
    places = torch.rand(count, LENGTH // 2, generator=generator).argsort(1)[:, :3] * 2
    tokens.scatter_(1, places + 1, nouns)
    tokens.scatter_(1, places[:, :1], MARKER)
    return F.pad(tokens, (1, 0), value=CLASS), number[:, 0]


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim, 4), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, layers: int = 6, dim: int = 64) -> None:
        super().__init__()
        self.word = nn.Embedding(FIRST_FILLER + FILLERS, dim)
        self.position = nn.Parameter(torch.randn(LENGTH + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.word(tokens) + self.position)[:, 0])


def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield strings(BATCH, generator)


@torch.no_grad()
def blank_out(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """(b, n): how far the probability of the label moves when each token but the class token is the unknown word."""

    def probability(changed: Tensor) -> Tensor:
        return model(changed).softmax(1).gather(1, labels[:, None])[:, 0]

    before, moved = probability(tokens), []
    for place in range(1, tokens.shape[1]):
        blanked = tokens.clone()
        blanked[:, place] = UNKNOWN
        moved.append((probability(blanked) - before).abs())
    return torch.stack(moved, 1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of each row, ties with their mean rank, averaged over rows."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(x.numpy(), axis=1)) for x in (a, b)]
    first, second = (r - r.mean(1, keepdim=True) for r in ranks)
    return float(((first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1)).clamp_min(1e-12)).mean())


def run(budget: Budget, seeds: int) -> list[Row]:
    steps, count = (5, 4) if budget == "smoke" else (600, 200)
    found: dict[str, list[list[float]]] = {"raw": [], "rollout": [], "flow": []}
    right = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, world = Encoder(), torch.Generator().manual_seed(1000 + seed)
        train(model, batches(world), steps, lr=2e-3)
        tokens, labels = strings(count, world)
        importance = blank_out(model, tokens, labels)
        with torch.no_grad(), capture(model) as cap:
            right.append(accuracy(model, tokens, labels))
        attn = [call.weights() for call in cap.sequence()]
        depths = range(1, len(attn) + 1)
        relevance = {
            "raw": [attn[d - 1].mean(1)[:, 0, 1:] for d in depths],
            "rollout": [attention_rollout(attn[:d])[:, 0, 1:] for d in depths],
            "flow": [attention_flow(attn, targets=[0])[:, 0, 1:]],
        }
        for name, maps in relevance.items():
            found[name].append([spearman(m, importance) for m in maps])
    last = {name: [rho[-1] for rho in values] for name, values in found.items()}
    raw = sum(last["raw"]) / seeds
    gained = {name: [rho[-1] - rho[0] for rho in found[name]] for name in ("raw", "rollout")}
    return [
        mean_row(
            "rank correlation of rollout, last layer",
            last["rollout"],
            raw + 0.15,
            ">=",
            baseline=raw,
            note="raw attention",
        ),
        mean_row(
            "rank correlation of flow, last layer", last["flow"], raw + 0.15, ">=", baseline=raw, note="raw attention"
        ),
        mean_row("rollout, last layer less first", gained["rollout"], 0.0, ">="),
        mean_row("raw attention, last layer less first", gained["raw"], 0.0, "<"),
        Row("accuracy of the model, %", sum(right) / seeds, values=tuple(right)),
    ]
