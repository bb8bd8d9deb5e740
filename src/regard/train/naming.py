"""Learning to say, at each place of a picture, what is there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.shapes.facts import truth
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.questions import cell
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import COLOURS, SHAPES

SAID = (tuple(COLOURS), SHAPES, ("top", "centre", "bottom"), ("left", "centre", "right"))


def patch_things(sample: ShapesSample, patch: int) -> Int[Tensor, " n"]:
    """For each patch the number of the thing that covers half of it or more, or -1."""
    nothing_first = F.pad(sample.visible.float(), (0, 0, 0, 0, 1, 0))
    most, which = F.avg_pool2d(nothing_first, patch).flatten(1).max(0)
    return torch.where(most >= 0.5, which - 1, -1)


def what_is_where(sample: ShapesSample, patch: int) -> Int[Tensor, "4 n"]:
    """For each patch the colour, the shape, the row and the column of the thing there, as places in ``SAID``; -1 for none."""
    said = [[-1] * len(SAID)]
    for thing, found in zip(sample.scene.things, truth(sample)):
        place = cell(found).split()
        rows, columns = (next((i for i, name in enumerate(names) if name in place), 1) for names in SAID[2:])
        said.append([SAID[0].index(thing.colour), SAID[1].index(thing.shape), rows, columns])
    return torch.tensor(said).T[:, patch_things(sample, patch) + 1]


def naming(
    seen: Float[Tensor, "b n d"], there: Int[Tensor, "b k n"], words: Float[Tensor, "w d"]
) -> Float[Tensor, " b"]:
    r"""For each picture, the cross-entropy of the words for what is at its places, summed over kinds of words.

    .. math:: -\frac{1}{|P|} \sum_{p \in P} \sum_k \log \frac{e^{x_p \cdot w_{k(p)}}}{\sum_{j \in S_k} e^{x_p \cdot w_j}}

    with x divided by its root mean square, and P the places where something is.

    Args:
        seen: x, what is known at each place.
        there: for each of the first k kinds in ``SAID`` the word, or -1.
        words: the vectors w of the whole vocabulary.
    """
    given = F.rms_norm(seen.float(), seen.shape[-1:])
    total = given.sum((1, 2)) * 0.0
    for names, said in zip(SAID, there.unbind(1)):
        rows = Vocabulary().encode(" ".join(names))[1:-1]
        total = total + F.cross_entropy((given @ words[rows].T).mT, said, ignore_index=-1, reduction="none").sum(1)
    return total / (there[:, 0] >= 0).sum(1).clamp_min(1)
