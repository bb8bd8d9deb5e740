"""RXNMapper, a masked language model of chemical reactions, one head of which knows where each product atom comes from."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.pretrained.source import Package, Pretrained, fill

LAYER, HEAD = 10, 5
"""Where the authors read the atom map, counted from 0."""

WHERE = "models/transformers/albert_heads_8_uspto_all_1310k"
PACKAGE = Package(
    "rxnmapper",
    "0.4.3",
    "rxnmapper",
    "MIT",
    {
        f"{WHERE}/config.json": "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
        f"{WHERE}/pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
        f"{WHERE}/vocab.txt": "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
    },
)
TOKEN = re.compile(r"\[[^\]]+]|Br?|Cl?|[NOSPFIbcnosp()\.=#+\\/:~@?*$-]|>>?|%[0-9]{2}|[0-9]")


def split(smiles: str) -> list[str]:
    """The atoms, bonds and marks of a molecule or a reaction in SMILES.

    Raises:
        ValueError: characters that are none of them.
    """
    tokens = TOKEN.findall(smiles)
    if not tokens or "".join(tokens) != smiles:
        raise ValueError(f"smiles={smiles!r} must be SMILES; of it {TOKEN.sub('', smiles)!r} was not understood")
    return tokens


class SmilesTokenizer:
    """Reactions as token numbers, between ``[CLS]`` and ``[SEP]``.

    Args:
        vocabulary: a file with one token a line.
    """

    def __init__(self, vocabulary: Path) -> None:
        self.numbers = {token: i for i, token in enumerate(vocabulary.read_text().splitlines())}

    def __call__(self, reaction: str) -> dict[str, Int[Tensor, "1 n"]]:
        """What the model takes, n being two more than :func:`split` gives.

        Raises:
            ValueError: a reaction with unknown characters, or longer than the model's 512 positions.
        """
        tokens = ["[CLS]", *split(reaction), "[SEP]"]
        if len(tokens) > 512:
            raise ValueError(f"reaction={reaction!r} has {len(tokens)} tokens, expected 512 at most")
        ids = torch.tensor([[self.numbers.get(token, self.numbers["[UNK]"]) for token in tokens]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def load() -> Pretrained:
    """An ``AlbertForMaskedLM``, whose one layer runs twelve times, and its :class:`SmilesTokenizer`.

    Reference: Schwaller et al., Extraction of organic chemistry grammar from unsupervised learning of chemical
    reactions, Science Advances 2021, doi 10.1126/sciadv.abe4166.
    """
    folder = PACKAGE.folder() / WHERE

    from transformers import AlbertConfig, AlbertForMaskedLM

    model = AlbertForMaskedLM(AlbertConfig.from_json_file(folder / "config.json"))
    fill(model, torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True))
    return Pretrained(model.eval(), SmilesTokenizer(folder / "vocab.txt"), PACKAGE)


def atom_map(reaction: str, weights: Float[Tensor, "n n"]) -> list[int]:
    """For each atom of the products, the number of the reactant atom that it attends to most.

    Atoms are counted from 0 in the order in which they are written, on each side of ``>>``.

    Args:
        reaction: ``REACTANTS>>PRODUCTS``.
        weights: of one head, ``[CLS]`` and ``[SEP]`` among the n tokens; rows are queries.

    Raises:
        ValueError: no reaction, or weights of another size.
    """
    tokens = split(reaction)
    if tokens.count(">>") != 1:
        raise ValueError(f"reaction={reaction!r} must have one '>>'")
    n = len(tokens) + 2
    if weights.shape != (n, n):
        raise ValueError(f"weights has the shape {tuple(weights.shape)}, expected ({n}, {n}) for reaction={reaction!r}")
    arrow = tokens.index(">>")
    atoms = [i for i, token in enumerate(tokens) if token[0].isalpha() or token[0] in "[*"]
    before = torch.tensor([i + 1 for i in atoms if i < arrow], device=weights.device)
    after = torch.tensor([i + 1 for i in atoms if i > arrow], device=weights.device)
    if not len(before) or not len(after):
        raise ValueError(f"reaction={reaction!r} must have atoms on both sides of '>>'")
    return weights[after][:, before].argmax(-1).tolist()
