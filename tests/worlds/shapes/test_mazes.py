"""Answers, paths and frames against networkx, and the picture against the doors."""

import networkx
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.shapes.mazes import CELL, Mazes, is_path


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9_999), st.sampled_from([(5, 5), (2, 2), (4, 7)]))
def test_against_networkx(index: int, cells: tuple[int, int]) -> None:
    sample = Mazes(cells=cells)[index]
    graph = networkx.Graph(list(sample.doors))
    graph.add_nodes_from(np.ndindex(*cells))
    assert networkx.is_forest(graph)
    assert networkx.number_connected_components(graph) == 2
    assert sample.start != sample.end
    assert sample.connected == networkx.has_path(graph, sample.start, sample.end)
    if sample.connected:
        assert list(sample.path) == networkx.shortest_path(graph, sample.start, sample.end)
        assert is_path(sample.path, sample.doors)
    far = networkx.single_source_shortest_path_length(graph, sample.start)
    assert len(sample.frames) == max(far.values()) + 1
    for t, frame in enumerate(sample.frames):
        for row, column in np.ndindex(*cells):
            corner = frame[:, row * CELL + 1, column * CELL + 1]
            assert (corner[2] < 0.5) == (far.get((row, column), 99) <= t)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9_999))
def test_the_picture_shows_the_doors(index: int) -> None:
    sample = Mazes()[index]
    for row, column in np.ndindex(5, 4):
        open_ = sample.image[:, row * CELL + 2, column * CELL + 4].mean() > 0.5
        assert open_ == (((row, column), (row, column + 1)) in sample.doors)
        open_ = sample.image[:, column * CELL + 4, row * CELL + 2].mean() > 0.5
        assert open_ == (((column, row), (column + 1, row)) in sample.doors)
    red = sample.image[:, sample.start[0] * CELL + 2, sample.start[1] * CELL + 2]
    assert red.argmax() == 0
    assert torch.equal(sample.frames[0][:, :1], sample.image[:, :1])


def test_both_answers_come_alike() -> None:
    share = np.mean([Mazes()[i].connected for i in range(400)])
    assert 0.42 < share < 0.58
