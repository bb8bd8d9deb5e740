"""A decoder in which only the token mixer is free: embeddings, positions, MLPs, norms and head are the same for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from regard.models.language._decoder import Block, DecoderLM
from regard.models.slot import find
from regard.nn.attention import Attention

SequenceMixer = Callable[[int, int], nn.Module]


def _attention(dim: int, num_heads: int) -> nn.Module:
    return Attention(dim, num_heads, causal=True)


def mixer(name: str) -> SequenceMixer:
    """What builds the causal layer called ``name`` from (dim, num_heads): ``attention``, a registry name, or ``module:Class``.

    Raises:
        ValueError: no such layer, or one that cannot be causal.
    """
    if name == "attention":
        return _attention
    method = find(name)
    takes = inspect.signature(method.target).parameters
    if method.tags.input != "tokens" or not ("causal" in takes or method.tags.causal):
        raise ValueError(f"layer {name!r} cannot be causal, so it does not fit a decoder")

    def build(dim: int, num_heads: int) -> nn.Module:
        wishes = {"dim": dim, "num_heads": num_heads, "causal": True}
        return method.create(**{key: value for key, value in wishes.items() if key in takes})

    return build


def slot_decoder(
    name: str, vocab_size: int, *, dim: int = 64, num_heads: int = 4, depth: int = 2, context: int = 128
) -> DecoderLM:
    """A :class:`DecoderLM` without dropout whose attentions are replaced by the layer called ``name``.

    The mixers are built last, so that under one seed everything outside them starts from the same numbers. Embeddings and
    positions start larger than those of a large model: at 0.02 a network this narrow hardly learns to recall.
    """
    build = mixer(name)
    model = DecoderLM(vocab_size, dim, num_heads, depth=depth, context=context, dropout=0.0)
    for table in (model.tokens, model.positions):
        nn.init.normal_(table.weight, std=0.3)
    for block in (*model.blocks, model.last):
        assert isinstance(block, Block)
        block.attn = build(dim, num_heads)  # type: ignore[assignment]
    return model
