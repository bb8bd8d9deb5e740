"""Sound for moving pictures: a tone for every shape, and log-mel spectrograms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from regard.worlds.shapes.scene import CLASSES

RATE = 16_000
LOUDNESS = 0.1
FADE = 0.01
TONES = {shape: 300 * 2 ** (0.3 * i) for i, shape in enumerate(CLASSES)}
"""Hertz, from 300 to 2,955, each 23 per cent above the one before."""


def gate(sounding: Bool[ndarray, "t"], samples: int) -> Float[ndarray, "samples"]:
    """0 or 1 for equal stretches of time, faded in and out within ``FADE`` seconds inside the stretches that sound."""
    on = np.repeat(sounding, -(-samples // len(sounding)))[np.arange(samples)]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], on.astype(int), [0]])))
    time, level = np.arange(samples) + 0.5, np.zeros(samples)
    for start, stop in zip(edges[::2], edges[1::2]):
        rise = np.minimum(time - start, stop - time) / (FADE * RATE)
        level = np.maximum(level, np.clip(rise, 0, 1))
    return level


def chorus(
    shapes: Sequence[str], sounding: Bool[ndarray, "t n"], samples: int, phases: Float[ndarray, "n"]
) -> Float[Tensor, "samples"]:
    """What n things sound like together: of each the sine of its shape, of amplitude 0.1, in the stretches of time it sounds.

    ``samples`` is the length at 16 kHz; the t stretches share it evenly.

    Raises:
        ValueError: t does not divide ``samples``.
    """
    if samples % len(sounding):
        raise ValueError(f"samples={samples} must be a multiple of the {len(sounding)} stretches of time")
    time = np.arange(samples) / RATE
    sound = np.zeros(samples)
    for shape, on, phase in zip(shapes, sounding.T, phases):
        sound += LOUDNESS * gate(on, samples) * np.sin(2 * np.pi * TONES[shape] * time + phase)
    return torch.from_numpy(sound).float()


def mel_filters(bins: int, n_fft: int, rate: int = RATE) -> Float[Tensor, "bins f"]:
    """Triangles of height 1, evenly spaced from 0 to rate / 2 on the scale m = 2595 log10(1 + f / 700)."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, bins + 2) / 2595) - 1)
    f = np.linspace(0, rate / 2, n_fft // 2 + 1)
    rise = (f - corners[:-2, None]) / np.diff(corners)[:-1, None]
    fall = (corners[2:, None] - f) / np.diff(corners)[1:, None]
    return torch.from_numpy(np.minimum(rise, fall).clip(0)).float()


def log_mel(
    wave: Float[Tensor, "*b samples"], bins: int = 64, n_fft: int = 512, hop: int = 160, rate: int = RATE
) -> Float[Tensor, "*b bins t"]:
    """Natural logarithm of the mel-weighted power spectrogram, at least -13.8 (power 1e-6), 1 + samples // hop frames.

    Frames of ``n_fft`` samples in a Hann window, centred every ``hop`` samples; the ends are reflected.

    Raises:
        ValueError: a wave that is no longer than half a frame, or not finite; a size that is not positive.
    """
    for name, value in (("bins", bins), ("n_fft", n_fft), ("hop", hop), ("rate", rate)):
        if value < 1:
            raise ValueError(f"{name}={value} must be positive")
    if wave.shape[-1] <= n_fft // 2:
        raise ValueError(
            f"wave of {wave.shape[-1]} samples is too short: more than n_fft / 2 = {n_fft // 2} are needed"
        )
    if not wave.isfinite().all():
        raise ValueError("wave must be finite")
    window = torch.hann_window(n_fft, device=wave.device, dtype=wave.dtype)
    flat = wave.reshape(-1, wave.shape[-1])
    power = torch.stft(flat, n_fft, hop, window=window, center=True, return_complex=True).abs().square()
    mel = mel_filters(bins, n_fft, rate).to(power) @ power
    return mel.clamp(min=1e-6).log().reshape(*wave.shape[:-1], bins, -1)
