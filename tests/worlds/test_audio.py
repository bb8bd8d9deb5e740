"""Tones and spectrograms against scipy, transformers and what a sine must look like."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import signal

from regard.worlds.audio import LOUDNESS, RATE, TONES, chorus, gate, log_mel, mel_filters


def sine(hertz: float, seconds: float = 0.5) -> torch.Tensor:
    return torch.from_numpy(np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).float()


def test_every_shape_has_its_own_tone() -> None:
    tones = sorted(TONES.values())
    assert all(b / a > 1.2 for a, b in pairwise(tones))
    assert tones[-1] < RATE / 4
    peaks = {int(log_mel(sine(hertz)).mean(-1).argmax()) for hertz in tones}
    assert len(peaks) == len(tones)


def test_gate_is_open_while_it_sounds_and_never_jumps() -> None:
    level = gate(np.array([False, True, True, False, True]), 5 * 1600)
    assert level[:1600].max() == 0
    assert level[4800:6400].max() == 0
    assert (level[1600 + 160 : 4800 - 160] == 1).all()
    assert level[6400 + 800] == 1
    assert np.abs(np.diff(level)).max() < 0.01
    assert gate(np.zeros(4, bool), 400).max() == 0


def test_chorus_holds_the_tones_of_what_sounds_when_it_sounds() -> None:
    on = np.array([[True, False], [True, True], [False, False]])
    sound = chorus(["circle", "star"], on, 3 * 1600, np.array([0.3, 1.0])).numpy()
    assert sound.shape == (4800,)
    assert np.abs(sound[3200:]).max() == 0
    bins = np.fft.rfftfreq(1600, 1 / RATE)
    for k, heard in enumerate((["circle"], ["circle", "star"])):
        spectrum = np.abs(np.fft.rfft(sound[1600 * k : 1600 * (k + 1)] * np.hanning(1600))) / 400
        for shape, hertz in TONES.items():
            level = spectrum[np.abs(bins - hertz).argmin()]
            assert (level > LOUDNESS / 2) == (shape in heard), (k, shape, level)
    with pytest.raises(ValueError, match="samples=100 must be a multiple of the 3"):
        chorus(["circle", "star"], on, 100, np.zeros(2))


def test_power_spectrogram_is_scipys() -> None:
    g = torch.Generator().manual_seed(0)
    wave = torch.randn(4000, generator=g)
    window = signal.get_window("hann", 512)
    stft = signal.ShortTimeFFT(window, 160, RATE, phase_shift=None)
    padded = np.pad(wave.double().numpy(), 256, mode="reflect")
    frames = np.stack([padded[i : i + 512] * window for i in range(0, 4001, 160)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    assert np.allclose(np.abs(stft.stft(wave.double().numpy(), p0=2, p1=20)) ** 2, power.T[:, 2:20])
    expected = np.log(np.maximum(mel_filters(64, 512).double().numpy() @ power.T, 1e-6))
    np.testing.assert_allclose(log_mel(wave).numpy(), expected, atol=2e-4)


def test_filters_are_those_of_transformers() -> None:
    audio = pytest.importorskip("transformers.audio_utils")
    theirs = audio.mel_filter_bank(257, 40, 0.0, RATE / 2, RATE, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_filters(40, 512).numpy(), theirs.T, atol=1e-5)


def test_filters_cover_the_middle_evenly() -> None:
    filters = mel_filters(20, 1024)
    assert filters.min() == 0
    inner = filters.sum(0)[20:450]
    torch.testing.assert_close(inner, torch.ones_like(inner))


def test_shapes_batches_and_silence() -> None:
    wave = torch.stack([sine(440), torch.zeros(8000)])[None]
    mel = log_mel(wave, bins=32)
    assert mel.shape == (1, 2, 32, 51)
    assert torch.equal(mel[0, 0], log_mel(sine(440), bins=32))
    assert (mel[0, 1] == math.log(1e-6)).all()
    louder = log_mel(10 * sine(440)) - log_mel(sine(440))
    assert louder.max().item() == pytest.approx(2 * math.log(10), abs=0.01)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="256 are needed"):
        log_mel(torch.zeros(256))
    with pytest.raises(ValueError, match="must be finite"):
        log_mel(torch.full((1000,), math.nan))
    with pytest.raises(ValueError, match="hop=0"):
        log_mel(torch.zeros(1000), hop=0)
