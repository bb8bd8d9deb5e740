"""English text and program text that every Python brings along: its reference pages, docstrings and modules."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from regard.worlds.world import SPLITS, Split

SHARES = (0.8, 0.9)
ASIDE = {"antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "this", "tkinter",
         "turtledemo"}  # fmt: skip
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})
SOURCES = ("argparse", "ast", "datetime", "doctest", "inspect", "pathlib", "pickle", "subprocess", "tarfile", "typing")
TOKEN = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s")


def python_source() -> Int[Tensor, "n"]:
    """The bytes of some modules of the standard library that this Python has as single files."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_bytes() for path in (folder / f"{name}.py" for name in SOURCES) if path.exists()]
    return torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8).long()


def _topics() -> Iterator[tuple[str, list[str]]]:
    """The pages of the language reference that ``help()`` shows."""
    if importlib.util.find_spec("pydoc_data") is None:
        raise ModuleNotFoundError("this Python lacks pydoc_data, the text behind help(): install its full library")
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield name, [topics[name]]


def _described(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module and of all that is defined in it, from top to bottom."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            yield doc
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _described(child)


def _docstrings() -> Iterator[tuple[str, list[str]]]:
    """The docstrings of every module of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - ASIDE):
        if name.startswith("_"):
            continue
        for path in [folder / f"{name}.py", *sorted((folder / name).rglob("*.py"))]:
            parts = path.relative_to(folder).parts
            if path.exists() and not {"test", "tests"} & set(parts):
                yield "/".join(parts), list(_described(ast.parse(path.read_bytes())))


def _is_prose(paragraph: str) -> bool:
    """Ten words or more in ASCII from a capital to a full stop, 85 % of them plain words."""
    words = paragraph.split()
    plain = sum(re.fullmatch(r"[('\"]*[A-Za-z]+([-'/][A-Za-z]+)*[)'\".,:;?!]*", word) is not None for word in words)
    whole = paragraph[:1].isupper() and paragraph[-1:] in ".?!:"
    return paragraph.isascii() and whole and len(words) >= 10 and plain >= 0.85 * len(words)


@cache
def documents() -> dict[str, tuple[str, ...]]:
    """Prose by the name of its page or module, a paragraph a string; none appears twice in all."""
    seen: set[str] = set()
    kept: dict[str, tuple[str, ...]] = {}
    for name, texts in [*_topics(), *_docstrings()]:
        paragraphs: list[str] = []
        for block in re.split(r"\n\s*\n", "\n\n".join(texts).translate(PLAIN)):
            paragraph = re.sub(r"^([*-]|\d+\.) ", "", " ".join(block.split()))
            if paragraph not in seen and _is_prose(paragraph):
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            kept[name] = tuple(paragraphs)
    return kept


def english(split: Split = "train") -> Int[Tensor, "n"]:
    """English prose as bytes, 0 to 127: the reference pages and docstrings of this Python, a paragraph a line.

    Code, tables, signatures and headings are left out. Of each document the first 80 % of the paragraphs are to train
    on, the next 10 % to validate and the last 10 % to test; no paragraph stands in two splits. About 880,000
    bytes, the same on every machine with the same release of Python (3.11.7: the test text has the SHA-256 fd189bb7...);
    neighbouring releases share some 96 % of it, and :func:`sha256` tells them apart.

    Args:
        split: ``train``, ``val`` or ``test``.

    Raises:
        ValueError: an unknown split.
        ModuleNotFoundError: a Python without its reference pages.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(map(repr, SPLITS))}")
    part = SPLITS.index(split)
    lines: list[str] = []
    for paragraphs in documents().values():
        cuts = [0, *(round(share * len(paragraphs)) for share in SHARES), len(paragraphs)]
        lines += paragraphs[cuts[part] : cuts[part + 1]]
    return to_bytes("".join(f"{line}\n" for line in lines))


def to_bytes(text: str) -> Int[Tensor, "n"]:
    """The bytes of a text in UTF-8."""
    return torch.tensor(list(text.encode()), dtype=torch.long)


def to_text(data: Int[Tensor, "n"]) -> str:
    """The text of these bytes; what is not UTF-8 becomes the replacement sign."""
    return bytes(data.tolist()).decode(errors="replace")


def sha256(data: Int[Tensor, "n"]) -> str:
    """The fingerprint of these bytes, to be kept beside the figures that were measured on them."""
    return hashlib.sha256(bytes(data.tolist())).hexdigest()


def windows(data: Int[Tensor, "n"], length: int, batch: int, generator: torch.Generator) -> Int[Tensor, "b l"]:
    """Windows (batch, length) from random places; take one token more than a model reads, for its targets.

    Raises:
        ValueError: fewer tokens than ``length``, a length or batch below 1.
    """
    if length < 1 or batch < 1:
        raise ValueError(f"length={length} and batch={batch} must be 1 or more")
    if len(data) < length:
        raise ValueError(f"data has {len(data)} tokens, length={length} needs as many or more")
    starts = torch.randint(len(data) - length + 1, (batch, 1), generator=generator)
    return data[starts + torch.arange(length)]


class Words:
    """The most frequent words of a text, with the space before them, as tokens; other words go by their bytes.

    Tokens 0 to 255 are bytes, the others words from the most frequent on. Decoding gives back any text.

    Args:
        text: from which the words are counted.
        size: how many tokens there may be.

    Raises:
        ValueError: ``size`` below 256.
    """

    def __init__(self, text: str, size: int = 4096) -> None:
        if size < 256:
            raise ValueError(f"size={size} must be 256 or more: every byte is a token")
        counts = Counter(piece for piece in TOKEN.findall(text) if len(piece.encode()) > 1)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self.words = tuple(ranked[: size - 256])
        self._ids = {word: 256 + i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return 256 + len(self.words)

    def encode(self, text: str) -> Int[Tensor, "n"]:
        ids: list[int] = []
        for piece in TOKEN.findall(text):
            ids += [self._ids[piece]] if piece in self._ids else piece.encode()
        return torch.tensor(ids, dtype=torch.long)

    def decode(self, ids: Int[Tensor, "n"]) -> str:
        pieces = (bytes([i]) if i < 256 else self.words[i - 256].encode() for i in ids.tolist())
        return b"".join(pieces).decode(errors="replace")
