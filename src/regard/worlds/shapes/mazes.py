"""Mazes of two rooms' worth of paths: are the two marked cells connected?"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.worlds.world import World

Cell = tuple[int, int]
CELL = 5
WALL, FLOOR = (0.1, 0.1, 0.1), (0.95, 0.95, 0.95)
START, END, PAINT = (0.9, 0.06, 0.08), (0.1, 0.28, 0.92), (0.98, 0.9, 0.05)


@dataclass(frozen=True, eq=False)
class MazeSample:
    """A forest of two trees on a grid of cells.

    Args:
        image: (3, 5 rows, 5 columns).
        doors: pairs of neighbouring cells (row, column) that are open to each other.
        start, end: the marked cells.
        frames: (t, 3, h, w), the cells reached from the start after 0, 1, ... steps painted in; the last is the answer.
        path: cells from start to end; empty where they are not connected.
    """

    image: Float[Tensor, "3 h w"]
    doors: frozenset[tuple[Cell, Cell]]
    start: Cell
    end: Cell
    frames: Float[Tensor, "t 3 h w"]
    path: tuple[Cell, ...]

    @property
    def connected(self) -> bool:
        return bool(self.path)


@dataclass(frozen=True, kw_only=True)
class Mazes(World[MazeSample]):
    """Mazes that fall into two halves without a way between them; the marks lie in one half or in both, alike often.

    Args:
        cells: rows and columns; a cell is five pixels wide.

    Raises:
        ValueError: fewer than two by two cells.
    """

    cells: tuple[int, int] = (5, 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.cells) < 2:
            raise ValueError(f"cells={self.cells} must be two by two or more")

    def make(self, rng: np.random.Generator) -> MazeSample:
        every = list(np.ndindex(*self.cells))
        connected = bool(rng.uniform() < 0.5)
        while True:
            doors = _forest(rng, self.cells)
            halves = _halves(every, doors)
            if connected and max(map(len, halves)) < 2:
                continue
            if connected:
                half = [h for h in halves if len(h) > 1][int(rng.integers(sum(len(h) > 1 for h in halves)))]
                start, end = (half[int(i)] for i in rng.choice(len(half), 2, replace=False))
            else:
                start, end = (half[int(rng.integers(len(half)))] for half in halves)
                if rng.uniform() < 0.5:
                    start, end = end, start
            break
        steps, came = reached(start, doors)
        path = _path(came, start, end) if end in came else ()
        frames = np.stack(
            [draw(self.cells, doors, start, end, set().union(*steps[: t + 1])) for t in range(len(steps))]
        )
        image = draw(self.cells, doors, start, end, set())
        return MazeSample(torch.from_numpy(image), frozenset(doors), start, end, torch.from_numpy(frames), path)

    def panels(self, sample: MazeSample) -> dict[str, Tensor | str]:
        """The maze, all that can be reached, and the answer."""
        answer = "connected" if sample.connected else "not connected"
        return {"image": sample.image, "reached": sample.frames[-1], "answer": answer}


def _neighbours(a: Cell, doors: set[tuple[Cell, Cell]]) -> list[Cell]:
    row, column = a
    around = [(row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column)]
    return [b for b in around if (min(a, b), max(a, b)) in doors]


def _forest(rng: np.random.Generator, cells: Cell) -> set[tuple[Cell, Cell]]:
    """A random spanning tree (Kruskal's) less one of its doors."""
    rows, columns = cells
    edges = [((r, c), (r + 1, c)) for r in range(rows - 1) for c in range(columns)]
    edges += [((r, c), (r, c + 1)) for r in range(rows) for c in range(columns - 1)]
    root = {cell: cell for cell in np.ndindex(*cells)}

    def find(a: Cell) -> Cell:
        while root[a] != a:
            a = root[a]
        return a

    tree = []
    for i in rng.permutation(len(edges)):
        a, b = edges[i]
        if find(a) != find(b):
            root[find(a)] = find(b)
            tree.append((a, b))
    tree.pop(int(rng.integers(len(tree))))
    return set(tree)


def reached(start: Cell, doors: set[tuple[Cell, Cell]]) -> tuple[list[set[Cell]], dict[Cell, Cell]]:
    """The cells first reached after 0, 1, ... steps, and from which cell each was reached."""
    came, steps, edge = {start: start}, [], deque([start])
    while edge:
        steps.append(set(edge))
        for _ in range(len(edge)):
            a = edge.popleft()
            for b in _neighbours(a, doors):
                if b not in came:
                    came[b] = a
                    edge.append(b)
    return steps, came


def _halves(every: list[Cell], doors: set[tuple[Cell, Cell]]) -> list[list[Cell]]:
    first = set(reached(every[0], doors)[1])
    return [sorted(first), [cell for cell in every if cell not in first]]


def _path(came: dict[Cell, Cell], start: Cell, end: Cell) -> tuple[Cell, ...]:
    path = [end]
    while path[-1] != start:
        path.append(came[path[-1]])
    return tuple(reversed(path))


def draw(
    cells: Cell, doors: set[tuple[Cell, Cell]], start: Cell, end: Cell, painted: set[Cell]
) -> Float[np.ndarray, "3 h w"]:
    """Floor of three by three pixels in each cell, open towards its doors; start and end marked in the middle."""
    image = np.empty((cells[0] * CELL, cells[1] * CELL, 3), np.float32)
    image[:] = WALL
    for row, column in np.ndindex(*cells):
        floor = PAINT if (row, column) in painted else FLOOR
        y, x = row * CELL, column * CELL
        image[y + 1 : y + 4, x + 1 : x + 4] = floor
        for r, c in _neighbours((row, column), doors):
            dy, dx = r - row, c - column
            image[y + 1 + dy : y + 4 + dy, x + 1 + dx : x + 4 + dx] = floor
    for (row, column), colour in ((start, START), (end, END)):
        image[row * CELL + 2, column * CELL + 2] = colour
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def is_path(path: tuple[Cell, ...], doors: frozenset[tuple[Cell, Cell]]) -> bool:
    """Whether each step goes through a door."""
    return all((min(a, b), max(a, b)) in doors for a, b in pairwise(path))
