"""Words of prompts: which tokens they are, and how the tokens of two prompts correspond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Tokenizer(Protocol):
    """What is needed of a tokenizer: ids with the start and end tokens, the text of one id, and the length of the window."""

    model_max_length: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


def word_tokens(prompt: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Token positions of each word of ``prompt`` (split at blanks); position 0 is the start token."""
    ids = tokenizer.encode(prompt)
    if len(ids) > tokenizer.model_max_length:
        raise ValueError(f"prompt {prompt!r} has {len(ids)} tokens; the text window has {tokenizer.model_max_length}")
    pieces = [tokenizer.decode([i]).strip().removeprefix("##") for i in ids[1:-1]]
    positions: list[list[int]] = []
    at = 0
    for word in prompt.split():
        mine: list[int] = []
        length = 0
        while length < len(word) and at < len(pieces):
            length += len(pieces[at])
            at += 1
            mine.append(at)
        positions.append(mine)
    return positions


def positions_of(word: str, prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Token positions of every occurrence of ``word``; ValueError when it is not in the prompt."""
    words = [w.strip(".,;:!?") for w in prompt.split()]
    found = [p for w, places in zip(words, word_tokens(prompt, tokenizer), strict=True) if w == word for p in places]
    if not found:
        raise ValueError(f"word={word!r} is not in the prompt {prompt!r}; its words: {', '.join(words)}")
    return found


def replace_matrix(source: str, target: str, tokenizer: Tokenizer) -> Tensor:
    """M (window, window) of a word swap. Raises ValueError when the prompts have different numbers of words."""
    old, new = source.split(), target.split()
    if len(old) != len(new):
        raise ValueError(f"a word swap needs as many words; got {len(old)} in {source!r} and {len(new)} in {target!r}")
    window = tokenizer.model_max_length
    matrix = torch.zeros(window, window)
    matrix[0, 0] = 1
    end = 0
    for one, two in zip(word_tokens(source, tokenizer), word_tokens(target, tokenizer), strict=True):
        if len(one) == len(two):
            matrix[one, two] = 1
        else:
            for i in one:
                matrix[i, two] = 1 / len(two)
        end = max([end, *two])
    rest = torch.arange(end + 1, window)
    matrix[rest, rest] = 1
    return matrix


def refine_mapper(source: Sequence[int], target: Sequence[int], window: int) -> Tensor:
    """For each of ``window`` target tokens the source token it is aligned with, or -1.

    A global alignment with match 1, mismatch -1, gap 0.
    Beyond the last token of the target the padding maps to itself.
    """
    n, m = len(source), len(target)
    if max(n, m) > window:
        raise ValueError(f"a prompt has {max(n, m)} tokens; the text window has {window}")
    score = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            match = score[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            score[i][j] = max(match, score[i - 1][j], score[i][j - 1])
    mapper = torch.arange(window)
    mapper[:m] = -1
    i, j = n, m
    while i and j:
        if source[i - 1] == target[j - 1] and score[i][j] == score[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            mapper[j] = i
        elif score[i][j] == score[i][j - 1]:
            j -= 1
        else:
            i -= 1
    return mapper


class Words:
    """One token a word, numbered by a hash: for hosts whose text encoder reads whole words."""

    def __init__(self, model_max_length: int = 77) -> None:
        self.model_max_length = model_max_length
        self.words: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            number = 2 + sum(ord(c) * 131**i for i, c in enumerate(word)) % 100_003
            self.words[number] = word
            ids.append(number)
        return [0, *ids, 1]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(self.words[i] for i in token_ids)
