"""Graphs whose labels are known from their edges: dictionaries, communities, shortest paths, triangles, and a real club."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.worlds.world import World

IGNORE = -100
PALETTE = ((200, 60, 50), (50, 110, 200), (70, 160, 80), (220, 160, 40), (140, 80, 170), (60, 170, 180), (150, 110, 70))


@dataclass(frozen=True)
class Graph:
    """A graph of n nodes.

    Args:
        features: (n, d).
        edges: (n, n), the weight with which the node of the row hears that of the column; 0 where there is no edge.
        targets: (n,), the class of each node, -100 where it is not asked.
        target: (), the class of the whole graph, -100 where it is not asked.
    """

    features: Float[Tensor, "n d"]
    edges: Float[Tensor, "n n"]
    targets: Int[Tensor, "n"]
    target: Int[Tensor, ""]


@dataclass(frozen=True)
class Graphs:
    """Graphs padded to the most nodes among them: ``mask`` is true for nodes that there are, the rest have no features,
    no edges, and no target (-100)."""

    features: Float[Tensor, "b n d"]
    edges: Float[Tensor, "b n n"]
    mask: Bool[Tensor, "b n"]
    targets: Int[Tensor, "b n"]
    target: Int[Tensor, "b"]


def pad(graphs: Sequence[Graph]) -> Graphs:
    """One batch of graphs.

    Raises:
        ValueError: no graph, or features of different widths.
    """
    widths = sorted({graph.features.shape[1] for graph in graphs})
    if len(widths) != 1:
        raise ValueError(f"graphs={len(graphs)} with features of widths {widths}: one width is needed")
    b, n = len(graphs), max(len(graph.targets) for graph in graphs)
    features, edges = torch.zeros(b, n, widths[0]), torch.zeros(b, n, n)
    mask, targets = torch.zeros(b, n, dtype=torch.bool), torch.full((b, n), IGNORE)
    for i, graph in enumerate(graphs):
        m = len(graph.targets)
        features[i, :m], edges[i, :m, :m], mask[i, :m], targets[i, :m] = (
            graph.features,
            graph.edges,
            True,
            graph.targets,
        )
    return Graphs(features, edges, mask, targets, torch.stack([graph.target for graph in graphs]))


def _graph(features: np.ndarray, edges: np.ndarray, targets: np.ndarray | None, target: int = IGNORE) -> Graph:
    asked = torch.full((len(edges),), IGNORE) if targets is None else torch.from_numpy(targets).long()
    return Graph(torch.from_numpy(features).float(), torch.from_numpy(edges).float(), asked, torch.tensor(target))


def _random_edges(chances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A symmetric matrix of edges (n, n) without loops, each there with its chance."""
    upper = np.triu(rng.random(chances.shape) < chances, 1)
    return upper | upper.T


def _random_tree(n: int, rng: np.random.Generator) -> np.ndarray:
    """Each node but the first is joined to an earlier one; then all of them are shuffled."""
    order, edges = rng.permutation(n), np.zeros((n, n), np.int64)
    for later in range(1, n):
        i, j = order[later], order[rng.integers(later)]
        edges[i, j] = edges[j, i] = 1
    return edges


class Networks(World[Graph]):
    """What the worlds of graphs have in common."""

    def batch(self, indices: Iterable[int] | Int[Tensor, " b"]) -> Graphs:
        """The samples with these numbers, padded."""
        return pad([self[int(i)] for i in indices])

    def panels(self, sample: Graph) -> dict[str, Tensor | str]:
        return {
            "graph": draw(sample),
            "edges": 1 - (sample.edges / sample.edges.max().clamp_min(1e-9)).expand(3, -1, -1),
            "targets": " ".join("-" if t == IGNORE else str(t) for t in sample.targets.tolist()),
            "target": str(sample.target.item()),
        }


def draw(graph: Graph, side: int = 256) -> Float[Tensor, "3 h w"]:
    """The nodes on a circle, coloured by their class, grey where it is not asked, and the edges between them."""
    from PIL import Image, ImageDraw

    radius, angles = max(2, side // 60), np.linspace(0, 2 * np.pi, len(graph.targets), endpoint=False)
    places = side / 2 + (side / 2 - 3 * radius) * np.stack([np.sin(angles), -np.cos(angles)], 1)
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for i, j in graph.edges.nonzero().tolist():
        pen.line([*places[i], *places[j]], fill=(190, 190, 190))
    for (x, y), target in zip(places.tolist(), graph.targets.tolist()):
        colour = (120, 120, 120) if target == IGNORE else PALETTE[target % len(PALETTE)]
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@dataclass(frozen=True, kw_only=True)
class DictionaryLookup(Networks):
    """Queries that hear all keys, each to be given the value of the key that it names.

    A complete bipartite graph: nodes 0 to size - 1 hold a key and a value each, the others a key alone; keys and values
    are permutations. Attention whose ranking of the keys is the same for every query cannot solve it.

    Args:
        size: how many keys there are, and as many queries.

    Shape:
        features (2 size, 2 size): one-hot key, then one-hot value, zero for a query.

    Raises:
        ValueError: fewer than two keys.

    Reference: Brody, Alon, Yahav, "How Attentive are Graph Attention Networks?", ICLR 2022, arXiv:2105.14491.
    """

    size: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 2:
            raise ValueError(f"size={self.size} must be 2 or more")

    def make(self, rng: np.random.Generator) -> Graph:
        k, one_hot = self.size, np.eye(self.size)
        keys, values, asked = (rng.permutation(k) for _ in range(3))
        features, edges = np.zeros((2 * k, 2 * k)), np.zeros((2 * k, 2 * k))
        features[:k] = np.concatenate([one_hot[keys], one_hot[values]], 1)
        features[k:, :k] = one_hot[asked]
        edges[k:, :k] = 1
        return _graph(features, edges, np.concatenate([np.full(k, IGNORE), values[np.argsort(keys)[asked]]]))


@dataclass(frozen=True, kw_only=True)
class Communities(Networks):
    """A stochastic block model: each node is to be told its block, from its neighbours and a hint too weak alone.

    Features (n, blocks) are the hint.

    Args:
        nodes: fewest and most nodes.
        blocks: how many there are; a node belongs to each with the same chance.
        inside, across: chances of an edge in a block and between blocks.
        hint: how far the mean of a node's feature stands out in the place of its block, over noise of deviation 1.

    Raises:
        ValueError: nodes not from 1 up, fewer than two blocks, a chance outside [0, 1].
    """

    nodes: tuple[int, int] = (30, 60)
    blocks: int = 3
    inside: float = 0.3
    across: float = 0.05
    hint: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_nodes(self.nodes, 1)
        if self.blocks < 2:
            raise ValueError(f"blocks={self.blocks} must be 2 or more")
        if not (0.0 <= self.inside <= 1.0 and 0.0 <= self.across <= 1.0):
            raise ValueError(f"inside={self.inside} and across={self.across} must lie between 0 and 1")

    def make(self, rng: np.random.Generator) -> Graph:
        blocks = rng.integers(self.blocks, size=_how_many(rng, self.nodes))
        same = blocks[:, None] == blocks
        edges = _random_edges(np.where(same, self.inside, self.across), rng)
        features = self.hint * np.eye(self.blocks)[blocks] + rng.standard_normal((len(blocks), self.blocks))
        return _graph(features, edges, blocks)


@dataclass(frozen=True, kw_only=True)
class Distances(Networks):
    """A random graph with a marked node: how far is each node from it, and is the graph connected?

    Features (n, 1) are 1 for the marked node. The target of the graph is 1 when it is connected, otherwise 0.

    Args:
        nodes: fewest and most nodes.
        degree: how many neighbours a node has on average.
        heaviest: weights of edges are whole numbers from 1 to this.
        farthest: distances above it, and nodes that cannot be reached, are the class ``farthest`` + 1.

    Raises:
        ValueError: nodes not from 2 up, a negative degree, ``heaviest`` or ``farthest`` below 1.
    """

    nodes: tuple[int, int] = (10, 30)
    degree: float = 2.5
    heaviest: int = 1
    farthest: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_nodes(self.nodes, 2)
        if self.degree < 0:
            raise ValueError(f"degree={self.degree} must not be negative")
        if self.heaviest < 1 or self.farthest < 1:
            raise ValueError(f"heaviest={self.heaviest} and farthest={self.farthest} must be 1 or more")

    def make(self, rng: np.random.Generator) -> Graph:
        from scipy.sparse.csgraph import shortest_path

        n = _how_many(rng, self.nodes)
        there = _random_edges(np.full((n, n), self.degree / (n - 1)), rng)
        weights = np.triu(rng.integers(1, self.heaviest + 1, (n, n)), 1)
        edges = there * (weights + weights.T)
        source = int(rng.integers(n))
        distances = shortest_path(edges, directed=False, indices=source)
        targets = np.minimum(distances, self.farthest + 1)
        return _graph(np.eye(n)[:, [source]], edges, targets, int(np.isfinite(distances).all()))


@dataclass(frozen=True, kw_only=True)
class Triangles(Networks):
    """How many triangles has a graph? A random tree and some more edges, each of which may close one.

    Whatever the answer, there are n - 1 + ``most`` edges. Features (n, 1) are all 1.

    Args:
        nodes: fewest and most nodes.
        most: triangles in a graph; each number from 0 to this is as frequent.

    Raises:
        ValueError: fewer than ten nodes a triangle, or ``most`` below 1.
    """

    nodes: tuple[int, int] = (30, 60)
    most: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1:
            raise ValueError(f"most={self.most} must be 1 or more")
        _check_nodes(self.nodes, 10 * self.most)

    def make(self, rng: np.random.Generator) -> Graph:
        n, wanted = _how_many(rng, self.nodes), int(rng.integers(self.most + 1))
        while True:
            edges = _random_tree(n, rng)
            for closing in [True] * wanted + [False] * (self.most - wanted):
                two_steps = (edges @ edges > 0) == closing
                free = np.argwhere(np.triu(two_steps & (edges == 0), 1))
                if not len(free):
                    break
                i, j = free[rng.integers(len(free))]
                edges[i, j] = edges[j, i] = 1
            else:
                if np.trace(edges @ edges @ edges) == 6 * wanted:
                    return _graph(np.ones((n, 1)), edges, None, wanted)


def karate_club() -> Graph:
    """Zachary's karate club: 34 members, who was seen with whom and how often, and the side that each took.

    Features are one-hot numbers of the members; class 0 stayed with the instructor, 1 went with the officer.

    Reference: Zachary, "An Information Flow Model for Conflict and Fission in Small Groups", J. Anthropol. Res. 1977.
    """
    import networkx as nx

    club = nx.karate_club_graph()
    sides = np.array([int(club.nodes[member]["club"] == "Officer") for member in range(len(club))])
    return _graph(np.eye(len(club)), nx.to_numpy_array(club, nodelist=range(len(club))), sides)


def _check_nodes(nodes: tuple[int, int], least: int) -> None:
    if not least <= nodes[0] <= nodes[1]:
        raise ValueError(f"nodes={nodes} must be the fewest and the most, {least} or more")


def _how_many(rng: np.random.Generator, nodes: tuple[int, int]) -> int:
    return int(rng.integers(nodes[0], nodes[1] + 1))
