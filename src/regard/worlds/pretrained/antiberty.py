"""AntiBERTy, a masked language model of antibody sequences: BERT with 8 layers and 8 heads over 20 amino acids."""

from __future__ import annotations

from regard.worlds.pretrained.source import Package, Pretrained, fill

WEIGHTS = "trained_models/AntiBERTy_md_smooth/pytorch_model.bin"
CONFIG = "trained_models/AntiBERTy_md_smooth/config.json"
VOCABULARY = "trained_models/vocab.txt"
PACKAGE = Package(
    "antiberty",
    "0.1.3",
    "antiberty",
    "MIT",
    {
        CONFIG: "e199c1692b5f0246ebc5522102044d6e900ffc7d56fa5932fdd5b3d56ef487e9",
        WEIGHTS: "f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137",
        VOCABULARY: "6db8c6cd6361eb233005b2dfe665d40d7f1ba78951bdf0fe61fa670ce192419a",
    },
)


def load() -> Pretrained:
    """A ``BertForMaskedLM`` and its tokenizer, for residues with blanks between them: ``"E V Q [MASK] V E"``.

    Reference: Ruffolo, Gray and Sulam, Deciphering antibody affinity maturation with language models and weakly
    supervised learning, 2021, arXiv 2112.07782.
    """
    folder = PACKAGE.folder()

    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    model = BertForMaskedLM(BertConfig.from_json_file(folder / CONFIG))
    fill(model, torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True))
    return Pretrained(model.eval(), BertTokenizer(vocab=str(folder / VOCABULARY), do_lower_case=False), PACKAGE)
