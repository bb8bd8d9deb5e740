"""Graphs: networkx finds the same labels from the edges alone, padding adds nothing, nothing leaks but what is asked."""

from collections import Counter
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.graphs import (
    IGNORE,
    Communities,
    DictionaryLookup,
    Distances,
    Graph,
    Networks,
    Triangles,
    draw,
    karate_club,
    pad,
)
from regard.worlds.world import SPLITS

SEEDS = st.integers(0, 2**32)
RANGES = st.tuples(st.integers(2, 12), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1]))
ALL = [DictionaryLookup(), Communities(), Distances(), Distances(heaviest=5), Triangles()]


def as_networkx(graph: Graph) -> nx.Graph:
    return nx.from_numpy_array(graph.edges.numpy())


def check_simple(graph: Graph, nodes: tuple[int, int]) -> None:
    n = len(graph.targets)
    assert nodes[0] <= n <= nodes[1]
    assert graph.features.shape[0] == n
    assert torch.equal(graph.edges, graph.edges.T)
    assert (graph.edges.diagonal() == 0).all()


@settings(deadline=None)
@given(SEEDS, st.integers(2, 15))
def test_a_dictionary_answers_every_query(seed: int, size: int) -> None:
    graph = DictionaryLookup(seed=seed, size=size)[0]
    keys = graph.features[:size, :size].argmax(1).tolist()
    known = dict(zip(keys, graph.features[:size, size:].argmax(1).tolist()))
    assert sorted(known) == sorted(known.values()) == list(range(size))
    assert (graph.features[:size].sum(1) == 2).all()
    assert (graph.features[size:].sum(1) == 1).all()
    asked = graph.features[size:, :size].argmax(1).tolist()
    assert sorted(asked) == list(range(size))
    assert graph.targets.tolist() == [IGNORE] * size + [known[key] for key in asked]
    heard = nx.from_numpy_array(graph.edges.T.numpy(), create_using=nx.DiGraph)
    assert nx.is_isomorphic(heard.to_undirected(), nx.complete_bipartite_graph(size, size))
    assert all(heard.out_degree(node) == size for node in range(size))
    assert all(heard.out_degree(node) == 0 for node in range(size, 2 * size))


@settings(deadline=None)
@given(SEEDS, RANGES, st.integers(2, 4))
def test_certain_communities_are_the_cliques(seed: int, nodes: tuple[int, int], blocks: int) -> None:
    graph = Communities(seed=seed, nodes=nodes, blocks=blocks, inside=1.0, across=0.0)[0]
    check_simple(graph, nodes)
    parts = {frozenset(part) for part in nx.connected_components(as_networkx(graph))}
    targets = graph.targets.tolist()
    assert parts == {frozenset(i for i, t in enumerate(targets) if t == block) for block in set(targets)}


def test_edges_and_hints_are_as_frequent_and_strong_as_said() -> None:
    world = Communities(nodes=(60, 60), blocks=3, inside=0.3, across=0.05, hint=1.0)
    inside, across, own, others = [], [], [], []
    for i in range(60):
        graph = world[i]
        same = graph.targets[:, None] == graph.targets
        upper = torch.ones(60, 60, dtype=torch.bool).triu(1)
        inside.append(graph.edges[same & upper])
        across.append(graph.edges[~same & upper])
        hot = torch.nn.functional.one_hot(graph.targets, 3).bool()
        own.append(graph.features[hot])
        others.append(graph.features[~hot])
    for found, expected, deviation in (
        (inside, 0.3, 0.46),
        (across, 0.05, 0.22),
        (own, 1.0, 1.0),
        (others, 0.0, 1.0),
    ):
        values = torch.cat(found)
        assert abs(values.mean() - expected) < 5 * deviation / len(values) ** 0.5
        assert abs(values.std() - deviation) < 0.05
    shares = Counter(torch.cat([world[i].targets for i in range(60)]).tolist())
    assert all(abs(shares[block] - 1200) < 150 for block in range(3))


@settings(deadline=None)
@given(SEEDS, RANGES, st.floats(0, 4), st.integers(1, 5), st.integers(1, 9))
def test_networkx_finds_the_same_distances(
    seed: int, nodes: tuple[int, int], degree: float, heaviest: int, farthest: int
) -> None:
    graph = Distances(seed=seed, nodes=nodes, degree=degree, heaviest=heaviest, farthest=farthest)[0]
    check_simple(graph, nodes)
    assert set(graph.edges.unique().tolist()) <= set(range(heaviest + 1))
    assert graph.features.shape[1] == 1
    (source,) = graph.features[:, 0].nonzero()[:, 0].tolist()
    assert graph.features[source] == 1
    net = as_networkx(graph)
    lengths = nx.single_source_dijkstra_path_length(net, source)
    expected = [min(lengths.get(node, farthest + 1), farthest + 1) for node in range(len(net))]
    assert graph.targets.tolist() == expected
    assert graph.target == int(nx.is_connected(net))


def test_distances_have_the_degree_asked_for_and_both_answers() -> None:
    graphs = [Distances(nodes=(30, 30), degree=4.0)[i] for i in range(100)]
    degree = np.mean([graph.edges.sum(1).mean().item() for graph in graphs])
    assert abs(degree - 4) < 0.15
    assert {graph.target.item() for graph in graphs} == {0, 1}


@settings(deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(0, 20))
def test_networkx_counts_the_same_triangles(seed: int, most: int, spare: int) -> None:
    nodes = (10 * most, 10 * most + spare)
    graph = Triangles(seed=seed, nodes=nodes, most=most)[0]
    check_simple(graph, nodes)
    net = as_networkx(graph)
    assert sum(nx.triangles(net).values()) == 3 * graph.target.item()
    assert nx.is_connected(net)
    assert net.number_of_edges() == len(net) - 1 + most
    assert (graph.targets == IGNORE).all()
    assert (graph.features == 1).all()


def test_each_number_of_triangles_is_as_frequent() -> None:
    counts = Counter(Triangles()[i].target.item() for i in range(400))
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(60 < count < 140 for count in counts.values())


def test_the_karate_club() -> None:
    graph = karate_club()
    check_simple(graph, (34, 34))
    assert (graph.edges > 0).sum() == 2 * 78
    assert graph.edges[0, 1] == 4
    assert graph.targets[0] == 0
    assert graph.targets[33] == 1
    assert torch.equal(graph.features, torch.eye(34))
    assert graph.targets.bincount().tolist() == [17, 17]


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_padding_keeps_the_graphs_and_adds_nothing(sizes: list[int]) -> None:
    graphs = [Communities(seed=i, nodes=(n, n))[0] for i, n in enumerate(sizes)]
    batch, most = pad(graphs), max(sizes)
    assert batch.features.shape == (len(sizes), most, 3)
    assert batch.mask.sum(1).tolist() == sizes
    for i, (graph, n) in enumerate(zip(graphs, sizes)):
        assert torch.equal(batch.features[i, :n], graph.features)
        assert torch.equal(batch.edges[i, :n, :n], graph.edges)
        assert torch.equal(batch.targets[i, :n], graph.targets)
        assert batch.target[i] == graph.target
        assert batch.edges[i].sum() == graph.edges.sum()
        assert (batch.features[i, n:] == 0).all()
        assert (batch.targets[i, n:] == IGNORE).all()
        assert batch.mask[i, :n].all()


@pytest.mark.parametrize("world", ALL, ids=repr)
def test_batches_are_the_samples(world: Networks) -> None:
    batch = world.batch(torch.tensor([4, 0]))
    first = world[4]
    assert torch.equal(batch.targets[0][batch.mask[0]], first.targets)
    assert torch.equal(batch.features[0][batch.mask[0]], first.features)


def plain(graph: Graph) -> tuple:
    return graph.features.tolist(), graph.edges.tolist(), graph.targets.tolist(), graph.target.item()


@pytest.mark.parametrize("world", ALL, ids=repr)
def test_splits_share_no_graph(world: Networks) -> None:
    splits = [{str(plain(replace(world, split=split)[i])) for i in range(20)} for split in SPLITS]
    assert len(set.union(*splits)) == 60


def test_panels_and_the_picture_of_a_graph() -> None:
    world = Communities()
    panels = world.panels(world[0])
    assert panels["graph"].shape == (3, 256, 256)
    assert panels["targets"] == " ".join(map(str, world[0].targets.tolist()))
    assert torch.equal(panels["edges"][0] == 0, world[0].edges > 0)
    lonely = Graph(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0]), torch.tensor(0))
    image = draw(lonely, 64)
    assert (image[:, 0, 0] == 1).all()
    assert image.min() < 1
    assert Triangles().panels(Triangles()[0])["targets"].startswith("- -")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DictionaryLookup(size=1), "size=1 must be 2 or more"),
        (lambda: Communities(blocks=1), "blocks=1 must be 2"),
        (lambda: Communities(inside=1.5), r"inside=1\.5"),
        (lambda: Communities(across=-0.1), r"across=-0\.1"),
        (lambda: Communities(nodes=(0, 5)), r"nodes=\(0, 5\) must be the fewest and the most, 1 or more"),
        (lambda: Communities(nodes=(6, 5)), r"nodes=\(6, 5\)"),
        (lambda: Distances(nodes=(1, 5)), "2 or more"),
        (lambda: Distances(degree=-1.0), r"degree=-1\.0"),
        (lambda: Distances(heaviest=0), "heaviest=0"),
        (lambda: Distances(farthest=0), "farthest=0"),
        (lambda: Triangles(most=0), "most=0 must be 1"),
        (lambda: Triangles(nodes=(29, 60)), r"nodes=\(29, 60\) must be .* 30 or more"),
        (lambda: pad([]), "graphs=0 with features of widths"),
        (lambda: pad([karate_club(), Triangles()[0]]), r"graphs=2 with features of widths \[1, 34\]"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()
