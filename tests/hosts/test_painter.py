"""The small text-to-image model: what goes in and out of it, and that its loop is the scheduler's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from regard.hosts.small import painter

WORDS = ("<padding>", "<start>", "<end>", "a", "red", "blue", "circle", "square")
WINDOW = 6


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return painter(WORDS, 16, (8, 16), 8, WINDOW).eval()


def test_folding_loses_nothing(model: Any) -> None:
    images = torch.rand(2, 3, 16, 16)
    latents = model.encode(images)
    assert latents.shape == (2, *model.size) == (2, 12, 8, 8)
    torch.testing.assert_close(model.decode(latents), images, atol=1e-6, rtol=0)
    first = images[0, :, :2, :2] * 2 - 1
    torch.testing.assert_close(latents[0, :, 0, 0], first.flatten(), atol=0, rtol=0)


def test_prompts_are_padded_between_start_and_end(model: Any) -> None:
    assert model.tokenize(["a red circle", ""]).tolist() == [[1, 3, 4, 6, 2, 0], [1, 2, 0, 0, 0, 0]]
    assert model.tokenizer.encode("a red circle") == [1, 3, 4, 6, 2]
    assert model.tokenizer.model_max_length == WINDOW
    text = model.embed(["a red circle", "a red square"])
    assert text.shape == (2, WINDOW, 8)
    torch.testing.assert_close(text[0, :3], text[1, :3])  # causal: what comes later changes nothing before
    assert (text[0, 3:] - text[1, 3:]).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a green circle", "prompt='a green circle' has words that the model does not know: green"),
        ("a red circle a red", "is longer than the window of 6 tokens"),
    ],
)
def test_prompts_that_cannot_be_read(model: Any, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.sample([prompt])


def test_noise_does_not_depend_on_how_much_is_asked_for(model: Any) -> None:
    assert torch.equal(model.noise(3, seed=5)[:2], model.noise(2, seed=5))
    assert not torch.equal(model.noise(1, seed=5), model.noise(1, seed=6))


def test_samples_are_determined_by_prompt_and_noise(model: Any) -> None:
    prompts = ["a red circle", "a blue square"]
    both = model.sample(prompts, seed=3, steps=4)
    assert both.shape == (2, 3, 16, 16)
    assert 0 <= both.min() <= both.max() <= 1
    assert torch.equal(both, model.sample(prompts, seed=3, steps=4))
    alone = model.sample(prompts[1:], latents=model.noise(2, seed=3)[1:], steps=4)
    torch.testing.assert_close(alone[0], both[1], atol=1e-4, rtol=0)
    same = model.sample(prompts, latents=model.noise(1, seed=3), steps=4)
    torch.testing.assert_close(same[0], both[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"latents of shape \(3, 12, 8, 8\) must be"):
        model.sample(prompts, latents=model.noise(3))


def test_the_loop_is_ddim_under_guidance(model: Any) -> None:
    """Against the formula: x0 and the noise read off v, and both mixed anew for the step after."""
    steps, weight = 5, 3.0
    x = model.noise(1)
    text, empty = model.embed(["a red circle"]), model.embed([""])
    share = model.scheduler.alphas_cumprod
    times = [999 - 200 * i for i in range(steps)]
    with torch.no_grad():
        for i, t in enumerate(times):
            free, said = (model.unet(x, t, encoder_hidden_states=c).sample for c in (empty, text))
            v = free + weight * (said - free)
            clean, noise = (
                share[t].sqrt() * x - (1 - share[t]).sqrt() * v,
                share[t].sqrt() * v + (1 - share[t]).sqrt() * x,
            )
            after = share[times[i + 1]] if i + 1 < steps else torch.tensor(1.0)
            x = after.sqrt() * clean + (1 - after).sqrt() * noise
    expected = model.sample(["a red circle"], latents=model.noise(1), steps=steps, guidance=weight)
    torch.testing.assert_close(expected, model.decode(x), atol=2e-3, rtol=0)


def test_without_guidance_the_model_sees_the_prompts_alone(model: Any) -> None:
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model.sample(["a red circle"], steps=2, guidance=1.0)
    model.sample(["a red circle"], steps=2)
    hook.remove()
    assert rows == [1, 1, 2, 2]


def test_after_each_step_the_latents_can_be_changed(model: Any) -> None:
    seen: list[int] = []

    def black(latents: torch.Tensor, step: int) -> torch.Tensor:
        seen.append(step)
        return torch.full_like(latents, -1.0) if step == 3 else latents

    assert model.sample(["a red circle"], steps=4, after_step=black).abs().max() == 0
    assert seen == [0, 1, 2, 3]
