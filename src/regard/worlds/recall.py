"""Sequences that ask for what was said before: associative recall, copying, and a needle in a haystack."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from regard.worlds.world import World

IGNORE = -100
EMPTY, MARK = 0, 1


class Asked(NamedTuple):
    """Tokens, and at each position the token that should come next, or -100 where nothing is asked."""

    tokens: Int[Tensor, "*b n"]
    targets: Int[Tensor, "*b n"]


def _asked(tokens: np.ndarray, targets: np.ndarray) -> Asked:
    return Asked(torch.from_numpy(tokens), torch.from_numpy(targets))


class Sequences(World[Asked]):
    """What the worlds of sequences have in common: samples of one length that stack to a batch."""

    def batch(self, indices: Iterable[int] | Int[Tensor, " b"]) -> Asked:
        """The samples with these numbers: tokens (b, n), targets (b, n)."""
        samples = [self[int(i)] for i in indices]
        return Asked(torch.stack([s.tokens for s in samples]), torch.stack([s.targets for s in samples]))

    def panels(self, sample: Asked) -> dict[str, Tensor | str]:
        asked = (sample.targets != IGNORE).nonzero()[:, 0].tolist()
        questions = [f"{sample.tokens[i]} at {i} -> {sample.targets[i]}" for i in asked]
        return {"tokens": " ".join(map(str, sample.tokens.tolist())), "asked": "\n".join(questions)}


@dataclass(frozen=True, kw_only=True)
class Recall(Sequences):
    """Multi-query associative recall: pairs of a key and a value, then each key once more, and its value is asked.

    Keys (1 to vocab/2 - 1) and values (vocab/2 to vocab - 1) are drawn without replacement. The g-th even place after
    the pairs, counted from 1, is taken for a question with a probability in proportion to g^(power - 1).

    Args:
        vocab: how many tokens there are; 0 is the empty one.
        length: tokens in a sequence, an even number.
        pairs: keys with a value, each asked once.
        passes: how often the list of pairs is said.
        power: exponent of the gaps; near 0 most questions come soon, 1 spreads them evenly.
        filled: random tokens, none of them a key of the sample, where nothing is said; otherwise the empty token.

    Raises:
        ValueError: more pairs than the vocabulary or the length have room for, an odd length, ``power`` not positive.

    Differs: the fillers of the original are drawn from all tokens and so may contradict a pair.

    Reference: Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré, "Zoology: Measuring and Improving Recall in
    Efficient Language Models", ICLR 2024, arXiv:2312.04927.
    """

    vocab: int = 8192
    length: int = 64
    pairs: int = 4
    passes: int = 1
    power: float = 0.01
    filled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1 or self.passes < 1:
            raise ValueError(f"pairs={self.pairs} and passes={self.passes} must be 1 or more")
        if self.length % 2:
            raise ValueError(f"length={self.length} must be even: a question and its answer take two tokens")
        if self.length < 2 * self.pairs * (self.passes + 1):
            need = 2 * self.pairs * (self.passes + 1)
            raise ValueError(f"length={self.length} must be {need} or more for {self.pairs} pairs and their questions")
        if self.vocab // 2 <= self.pairs:
            raise ValueError(f"vocab={self.vocab} must be {2 * self.pairs + 2} or more for {self.pairs} different keys")
        if not self.power > 0:
            raise ValueError(f"power={self.power} must be positive")

    def make(self, rng: np.random.Generator) -> Asked:
        half, said = self.vocab // 2, 2 * self.pairs * self.passes
        keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
        values = half + rng.choice(self.vocab - half, self.pairs, replace=False)
        chances = np.arange(1, (self.length - said) // 2 + 1) ** (self.power - 1.0)
        gaps = rng.choice(len(chances), self.pairs, replace=False, p=chances / chances.sum())

        tokens = np.zeros(self.length, np.int64)
        targets = np.full(self.length, IGNORE, np.int64)
        tokens[:said] = np.tile(np.stack([keys, values], 1).ravel(), self.passes)
        tokens[said + 2 * gaps], targets[said + 2 * gaps] = keys, values
        if self.filled:
            others = np.setdiff1d(np.arange(1, self.vocab), keys)
            tokens[tokens == EMPTY] = rng.choice(others, (tokens == EMPTY).sum())
        return _asked(tokens, targets)


@dataclass(frozen=True, kw_only=True)
class Copy(Sequences):
    """Copying: random tokens, a gap of empty ones, a mark, and the same tokens once more, each of them asked.

    Args:
        vocab: how many tokens there are: 0 is the empty one, 1 the mark, the others are copied.
        size: tokens to copy.
        gap: empty tokens before the mark.

    Shape:
        tokens (2 size + gap,), of which the last ``size`` are asked.

    Raises:
        ValueError: no token left to copy, ``size`` below 1, a negative gap.
    """

    vocab: int = 32
    size: int = 16
    gap: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab < 3:
            raise ValueError(f"vocab={self.vocab} must be 3 or more: the empty token, the mark, and one to copy")
        if self.size < 1 or self.gap < 0:
            raise ValueError(f"size={self.size} must be 1 or more, gap={self.gap} must not be negative")

    def make(self, rng: np.random.Generator) -> Asked:
        said = rng.integers(2, self.vocab, self.size)
        tokens = np.concatenate([said, np.full(self.gap, EMPTY), [MARK], said[:-1]])
        targets = np.concatenate([np.full(self.size + self.gap, IGNORE), said])
        return _asked(tokens, targets)


@dataclass(frozen=True, kw_only=True)
class Needle(Sequences):
    """Needles in a haystack: keys with their values somewhere among random tokens, and at the end one key is asked.

    A needle is a key (2 to vocab/2 - 1) and ``size`` values; hay and values are drawn from vocab/2 to vocab - 1. The
    sequence ends with the mark, the key and all values but the last.

    Args:
        vocab: how many tokens there are; 1 is the mark, and 0 is not used.
        length: tokens in a sequence.
        size: values of a needle, all of them asked.
        needles: how many there are, with different keys.
        depth: where in the hay the asked needle lies, from 0 (first) to 1 (last); at random without it.

    Raises:
        ValueError: more needles than the vocabulary or the length have room for, a depth outside [0, 1].

    Reference: Hsieh, Sun, Kriman, Acharya, Rekesh, Jia, Zhang, Ginsburg, "RULER: What's the Real Context Size of Your
    Long-Context Language Models?", COLM 2024, arXiv:2404.06654.
    """

    vocab: int = 256
    length: int = 512
    size: int = 1
    needles: int = 1
    depth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or self.needles < 1:
            raise ValueError(f"size={self.size} and needles={self.needles} must be 1 or more")
        if self.vocab // 2 - 2 < self.needles:
            need = 2 * self.needles + 4
            raise ValueError(f"vocab={self.vocab} must be {need} or more for {self.needles} different keys")
        if self.length < (need := self._shortest()):
            raise ValueError(
                f"length={self.length} must be {need} or more for needles={self.needles}, size={self.size}"
            )
        if self.depth is not None and not 0.0 <= self.depth <= 1.0:
            raise ValueError(f"depth={self.depth} must lie between 0 and 1")

    def _shortest(self) -> int:
        """With this many tokens there is a place for the last needle wherever the others fell."""
        width = 1 + self.size
        return 2 * width + (self.needles - 1) * (2 * width - 1)

    def make(self, rng: np.random.Generator) -> Asked:
        half, width = self.vocab // 2, 1 + self.size
        hay = self.length - width
        keys = 2 + rng.choice(half - 2, self.needles, replace=False)
        tokens = rng.integers(half, self.vocab, self.length)
        free = np.arange(hay - width + 1)
        for number, key in enumerate(keys):
            start = rng.choice(free) if self.depth is None or number else round(self.depth * free[-1])
            tokens[start] = key
            free = free[np.abs(free - start) >= width]
            if number == 0:
                values = tokens[start + 1 : start + width]
        tokens[hay:] = np.concatenate([[MARK, keys[0]], values[:-1]])
        targets = np.full(self.length, IGNORE)
        targets[-self.size :] = values
        return _asked(tokens, targets)
