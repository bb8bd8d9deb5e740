"""A small text-to-image model out of the parts of Stable Diffusion: UNet, schedulers and text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Painter(nn.Module):
    r"""Pictures from sentences, by denoising.

    The latents of a picture are its pixels, two by two folded into channels and scaled to [-1, 1]; nothing is lost. The UNet
    predicts :math:`v = \alpha_t \epsilon - \sigma_t x_0`; the last step of the forward process is pure noise. The parts are
    the libraries' own: ``unet``, ``text_encoder`` (causal, with start, end and padding tokens), ``tokenizer``, ``scheduler``
    (deterministic DDIM), so that sites, captures, edits and controllers work on ``unet`` as on a large model. ``naming``
    is for training alone: it reads what the UNet knows at each place, to be compared with ``words``.

    Args:
        unet: diffusers' UNet2DConditionModel over (b, 4 x channels, h / 2, w / 2).
        text_encoder: transformers' CLIPTextModel.
        tokenizer: of transformers; pads to the encoder's window.
    """

    FOLD = 2

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, tokenizer: Any) -> None:
        from diffusers import DDIMInverseScheduler, DDIMScheduler

        super().__init__()
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        last: Any = unet.get_submodule("conv_out")
        self.naming = nn.Conv2d(last.in_channels, self.words.shape[1], 1)
        schedule: dict[str, Any] = {
            "num_train_timesteps": 1000,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        }
        self.scheduler: Any = DDIMScheduler(**schedule)
        self.inverse_scheduler: Any = DDIMInverseScheduler(**schedule)

    @property
    def size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents."""
        config: Any = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def tokenize(self, prompts: Sequence[str]) -> Int[Tensor, "b n"]:
        """Numbers of start, words, end and padding.

        Raises:
            ValueError: a word that is not in the vocabulary, a prompt that is longer than the window.
        """
        known, window = self.tokenizer.get_vocab(), self.tokenizer.model_max_length
        for prompt in prompts:
            unknown = [word for word in prompt.split() if word not in known]
            if unknown:
                raise ValueError(f"prompt={prompt!r} has words that the model does not know: {', '.join(unknown)}")
            if len(prompt.split()) + 2 > window:
                raise ValueError(
                    f"prompt={prompt!r} is longer than the window of {window} tokens, start and end included"
                )
        return self.tokenizer(list(prompts), padding="max_length", return_tensors="pt")["input_ids"]

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b n c"]:
        """What cross-attention sees of the prompts, padding included."""
        return self.encode_text(self.tokenize(prompts).to(self.device))

    def encode_text(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        return self.text_encoder(input_ids=ids).last_hidden_state

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def words(self) -> Float[Tensor, "w c"]:
        """The vectors of all words, as the text encoder reads them."""
        encoder: Any = self.text_encoder
        return encoder.get_input_embeddings().weight

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c H W"]:
        """Latents of pictures in [0, 1]."""
        return F.pixel_unshuffle(2 * images - 1, self.FOLD)

    def decode(self, latents: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [0, 1] of latents."""
        return (F.pixel_shuffle(latents, self.FOLD) / 2 + 0.5).clamp(0, 1)

    def noise(self, count: int, seed: int = 0) -> Float[Tensor, "b c H W"]:
        """Starting latents, each from a generator of its own: the i-th is the same whatever ``count``."""
        draws = [
            torch.randn(self.size, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in range(count)
        ]
        return torch.stack(draws).to(self.device)

    def forward(
        self, latents: Float[Tensor, "b c H W"], timesteps: Int[Tensor, " b"], ids: Int[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b c H W"], Float[Tensor, "b places d"]]:
        """The prediction v for noisy latents and tokenised prompts, and what the UNet knows at each place, as wide as words."""
        last: list[Tensor] = []
        with self.unet.get_submodule("conv_out").register_forward_pre_hook(lambda _, args: last.append(args[0])):
            v = self.unet(latents, timesteps, encoder_hidden_states=self.encode_text(ids)).sample
        return v, self.naming(last[0]).flatten(2).mT

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        latents: Float[Tensor, "n c H W"] | None = None,
        seed: int = 0,
        steps: int = 25,
        guidance: float = 3.0,
        after_step: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        r"""A picture for each prompt, by DDIM under classifier-free guidance :math:`v_\varnothing + w (v_c - v_\varnothing)`.

        The UNet runs once a step over the rows [unconditional, conditional], or over the prompts alone with a guidance of 1.

        Args:
            prompts: one a picture.
            latents: (b, c, H, W), where to start from, or (1, c, H, W) for all alike; default :meth:`noise` of ``seed``.
            seed: of the noise.
            steps: of denoising.
            guidance: w.
            after_step: gets the latents and the number of the step, and returns the latents to go on with.

        Raises:
            ValueError: a prompt that cannot be read, latents of another shape.
        """
        start = self.noise(len(prompts), seed) if latents is None else latents
        if start.shape[1:] != self.size or len(start) not in (1, len(prompts)):
            raise ValueError(f"latents of shape {tuple(start.shape)} must be (1 or {len(prompts)}, {self.size})")
        x, text = start.expand(len(prompts), -1, -1, -1), self.embed(prompts)
        if guidance != 1:
            text = torch.cat([self.embed([""]).expand_as(text), text])
        self.scheduler.set_timesteps(steps, device=self.device)
        for i, t in enumerate(self.scheduler.timesteps):
            v = self.guided(x, t, text, guidance)
            x = self.scheduler.step(v, t, x, eta=0.0).prev_sample
            if after_step is not None:
                x = after_step(x, i)
        return self.decode(x)

    def guided(self, x: Tensor, t: Tensor, text: Tensor, guidance: float) -> Tensor:
        """v for the conditional rows of ``text``, whose first half is unconditional unless ``guidance`` is 1."""
        if guidance == 1:
            return self.unet(x, t, encoder_hidden_states=text).sample
        free, conditional = self.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
        return free + guidance * (conditional - free)

    @torch.no_grad()
    def invert(
        self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str], *, steps: int = 25
    ) -> Float[Tensor, "b c H W"]:
        """Latents from which :meth:`sample` with a guidance of 1 about gives ``images`` again: DDIM run backwards."""
        x, text = self.encode(images.to(self.device)), self.embed(prompts)
        self.inverse_scheduler.set_timesteps(steps, device=self.device)
        for t in self.inverse_scheduler.timesteps:
            v = self.unet(x, t, encoder_hidden_states=text).sample
            x = self.inverse_scheduler.step(v, t, x).prev_sample
        return x
