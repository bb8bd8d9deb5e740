"""Prompt-to-Prompt on a small UNet: which maps are taken over, when, and what stays to the bit."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.controllers._words import Words, positions_of, refine_mapper, replace_matrix, word_tokens
from regard.controllers.prompt_to_prompt import LocalBlend, PromptToPrompt, Refine, Replace, Reweight

diffusers = pytest.importorskip("diffusers")
STEPS = 5
WINDOW = 77


class Pieces:
    """Cuts words into pieces of three letters, so that words differ in their number of tokens."""

    model_max_length = WINDOW

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        pieces = [w[i : i + 3] for w in text.split() for i in range(0, len(w), 3)]
        return [0, *(self.known.setdefault(p, 2 + len(self.known)) for p in pieces), 1]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(next(p for p, i in self.known.items() if i == n) for n in token_ids)


TOKENIZER = Pieces()


def unet() -> nn.Module:
    torch.manual_seed(0)
    return (
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        .eval()
        .double()
    )


def embed(prompt: str) -> Tensor:
    ids = TOKENIZER.encode(prompt)
    ids = ids + [1] * (WINDOW - len(ids))
    table = torch.randn(500, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    places = torch.randn(WINDOW, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return 3 * (table[ids] + places)


def sample(
    model: nn.Module, prompts: list[str], control: PromptToPrompt | None = None, guided: bool = True
) -> list[Tensor]:
    """Latents after every step, from one noise; classifier-free guidance 3."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    text = torch.stack([embed(p) for p in prompts])
    text = torch.cat([embed("").expand_as(text), text]) if guided else text
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    latents = noise.expand(len(prompts), -1, -1, -1)
    history = []
    handle = rg.apply(model, control) if control is not None else None
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            out = model(torch.cat([latents] * 2) if guided else latents, t, encoder_hidden_states=text).sample
            if guided:
                free, conditioned = out.chunk(2)
                out = free + 3 * (conditioned - free)
            latents = scheduler.step(out, t, latents).prev_sample
            if control is not None:
                latents = control.blended(latents, i)
            history.append(latents)
    if handle is not None:
        handle.undo()
    return history


def control(prompts: list[str], edit=None, **options) -> PromptToPrompt:
    options = {"cross": 0.8, "self_attention": 0.4, **options}
    return PromptToPrompt(prompts, edit or Replace(), TOKENIZER, STEPS, **options)


SOURCE, EDITED = "a red circle", "a green circle"


@pytest.mark.parametrize("guided", [True, False])
def test_one_prompt_twice_gives_one_image_twice(guided: bool) -> None:
    both = sample(unet(), [SOURCE, SOURCE], control([SOURCE, SOURCE], guided=guided), guided)
    # The host's own convolutions differ in the last bit between the rows of a batch of two, with or without a controller.
    torch.testing.assert_close(both[-1][0], both[-1][1], atol=0 if guided else 1e-13, rtol=0)


@pytest.mark.parametrize("guided", [True, False])
def test_without_any_share_the_edit_is_ordinary_sampling(guided: bool) -> None:
    model = unet()
    nothing = control([SOURCE, EDITED], cross=0.0, self_attention=0.0, guided=guided)
    plain = sample(model, [SOURCE, EDITED], None, guided)
    assert torch.equal(sample(model, [SOURCE, EDITED], nothing, guided)[-1], plain[-1])


def test_the_source_does_not_change_and_the_edit_does() -> None:
    model = unet()
    plain = sample(model, [SOURCE, EDITED])
    edited = sample(model, [SOURCE, EDITED], control([SOURCE, EDITED]))
    torch.testing.assert_close(edited[-1][0], plain[-1][0], atol=1e-10, rtol=0)
    near = (edited[-1][1] - plain[-1][0]).norm()
    far = (plain[-1][1] - plain[-1][0]).norm()
    assert 0 < float(near) < float(far)


def test_several_edits_in_one_batch_equal_each_alone() -> None:
    model = unet()
    prompts = [SOURCE, EDITED, "a red square"]
    together = sample(model, prompts, control(prompts))
    for i in (1, 2):
        alone = sample(model, [SOURCE, prompts[i]], control([SOURCE, prompts[i]]))
        torch.testing.assert_close(together[-1][i], alone[-1][1], atol=1e-9, rtol=0)


def test_the_output_of_a_site_is_the_explicit_one() -> None:
    model = unet()
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, dtype=torch.float64).expand(4, -1, -1, -1),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.stack([embed(p) for p in ["", "", SOURCE, EDITED]]),
    }
    with torch.no_grad(), rg.capture(model) as plain:
        model(**inputs)
    cross = next(n for n in plain if n.endswith("attn2"))
    ours = next(n for n in plain if n.endswith("attn1"))
    with torch.no_grad(), rg.apply(model, control([SOURCE, EDITED])), rg.capture(model) as edited:
        model(**inputs)
    before, after = plain[ours], edited[ours]
    weights = before.weights().clone()
    weights[3] = weights[2]
    torch.testing.assert_close(after.out, weights @ before.v, atol=1e-12, rtol=0)
    # At the first cross site q has changed already, so its own maps are the baseline.
    call = edited[cross]
    raw = (call.q @ call.k.transpose(-1, -2) * call.scale).softmax(-1)
    raw[3] = raw[2] @ replace_matrix(SOURCE, EDITED, TOKENIZER).double()
    torch.testing.assert_close(call.out, raw @ call.v, atol=1e-12, rtol=0)


def test_only_chosen_steps_and_sites() -> None:
    edit = control([SOURCE, EDITED], cross={"default_": (0.2, 0.6), "green": (0.0, 1.0)}, self_resolution=4)
    places = positions_of("green", EDITED, TOKENIZER)
    for step in range(STEPS):
        row = edit.schedule[step, 0]
        assert bool(row[places].all())
        others = [i for i in range(WINDOW) if i not in places]
        assert bool((row[others] == (1.0 if step in (1, 2) else 0.0)).all())
    model = unet()
    seen: dict[str, list[int]] = {}
    original = edit.edits

    def note(site, step):
        found = list(original(site, step))
        if site.kind == "self" and found:
            seen.setdefault(site.name, []).append(site.call.q.shape[2])
        return found

    edit.edits = note
    sample(model, [SOURCE, EDITED], edit)
    assert {n for sizes in seen.values() for n in sizes} == {16}
    assert all(len(sizes) == int(0.4 * STEPS) for sizes in seen.values())


def test_equal_factors_change_nothing_and_others_do() -> None:
    model = unet()
    prompts = [SOURCE, EDITED]
    base = sample(model, prompts, control(prompts, Replace()))[-1]
    ones = sample(model, prompts, control(prompts, Reweight({"green": 1.0}, Replace())))[-1]
    torch.testing.assert_close(ones, base, atol=1e-12, rtol=0)
    same = [SOURCE, SOURCE]
    stronger = sample(model, same, control(same, Reweight({"red": 4.0})))[-1]
    weaker = sample(model, same, control(same, Reweight({"red": 0.0})))[-1]
    assert float((stronger[1] - stronger[0]).norm()) > 1e-4
    assert float((weaker[1] - weaker[0]).norm()) > 1e-4


def test_reweighted_rows_are_not_normalised_again() -> None:
    change = Reweight({"red": 3.0}).weights(SOURCE, SOURCE, TOKENIZER)
    weights = torch.rand(2, 5, WINDOW).softmax(-1)
    got = change(weights, weights)
    places = positions_of("red", SOURCE, TOKENIZER)
    torch.testing.assert_close(got.sum(-1), 1 + 2 * weights[..., places].sum(-1))


def test_replace_matrix_of_a_token_list() -> None:
    # "red" is one piece, "green" two, "circle" two: positions 0 | a=1 | red=2 / green=2,3 | circle=3,4 / 4,5 | end ...
    matrix = replace_matrix("a red circle", "a green circle", TOKENIZER)
    expected = torch.zeros(WINDOW, WINDOW)
    expected[0, 0] = expected[1, 1] = 1
    expected[2, 2] = expected[2, 3] = 0.5
    expected[3, 4] = expected[4, 5] = 1
    rest = torch.arange(6, WINDOW)
    expected[rest, rest] = 1
    assert torch.equal(matrix, expected)
    assert torch.equal(replace_matrix(SOURCE, SOURCE, TOKENIZER), torch.eye(WINDOW))


def _score(source: list[int], target: list[int], mapper: list[int]) -> int:
    return sum(1 if source[i] == target[j] else -1 for j, i in enumerate(mapper) if i >= 0)


def test_refine_is_the_best_alignment() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        n, m = (int(x) for x in torch.randint(1, 6, (2,), generator=generator))
        source = torch.randint(0, 3, (n,), generator=generator).tolist()
        target = torch.randint(0, 3, (m,), generator=generator).tolist()
        mapper = refine_mapper(source, target, WINDOW)[:m].tolist()
        aligned = [i for i in mapper if i >= 0]
        assert aligned == sorted(set(aligned))
        assert all(source[i] == target[j] for j, i in enumerate(mapper) if i >= 0)
        best = 0
        for size in range(min(n, m) + 1):
            for rows in itertools.combinations(range(n), size):
                for columns in itertools.combinations(range(m), size):
                    best = max(
                        best, sum(1 if source[i] == target[j] else -1 for i, j in zip(rows, columns, strict=True))
                    )
        assert _score(source, target, mapper) == best
    assert refine_mapper([0, 5, 1], [0, 4, 5, 1], WINDOW)[:6].tolist() == [0, -1, 1, 2, 4, 5]


def test_refine_keeps_new_tokens_and_takes_the_rest() -> None:
    old, new = "a circle", "a red circle"
    change = Refine().weights(old, new, TOKENIZER)
    source, own = torch.rand(2, 3, WINDOW), torch.rand(2, 3, WINDOW)
    got = change(source, own)
    assert torch.equal(got[..., 2], own[..., 2])  # "red"
    assert torch.equal(got[..., 3:5], source[..., 2:4])  # "circle"
    assert torch.equal(got[..., 1], source[..., 1])
    prompts = [old, new]
    assert sample(unet(), prompts, control(prompts, Refine()))[-1].isfinite().all()


def test_blend_keeps_the_source_outside_the_region() -> None:
    blend = LocalBlend(words=[["red"], ["green"]], resolution=4, start=0.2)
    prompts = [SOURCE, EDITED]
    edit = control(prompts, blend=blend)
    images = sample(unet(), prompts, edit)
    region = blend.region(edit.maps, (8, 8))
    assert bool(region[1].any())
    outside = ~region[1].expand(4, 8, 8)
    assert torch.equal(images[-1][1][outside], images[-1][0][outside])
    never = control(prompts, blend=LocalBlend(words=[["red"], ["green"]], resolution=4, threshold=1.0, start=0.0))
    latents = sample(unet(), prompts, never)[-1]
    assert torch.equal(latents[1], latents[0])  # nothing is above its own maximum: an empty region


def test_blend_region_by_hand() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0] = 1.0
    maps[1, 3, 3] = 2.0
    region = LocalBlend(words=[[], []], resolution=4).region(maps, (8, 8))
    corner, other = torch.zeros(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
    corner[:4, :4] = True
    other[4:, 4:] = True
    assert torch.equal(region[0, 0], corner)
    assert torch.equal(region[1, 0], corner | other)


def test_words_and_their_tokens() -> None:
    assert word_tokens("a green circle.", TOKENIZER) == [[1], [2, 3], [4, 5, 6]]
    assert positions_of("circle", "a green circle.", TOKENIZER) == [4, 5, 6]
    words = Words()
    assert word_tokens("two words", words) == [[1], [2]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: control([SOURCE]), "at least one edit"),
        (lambda: control([SOURCE, "a green"]), "as many words"),
        (lambda: control([SOURCE, EDITED], cross=1.2), r"\[0, 1\]"),
        (lambda: control([SOURCE, EDITED], cross={"blue": (0, 1)}), "word='blue'"),
        (lambda: control([SOURCE, EDITED], Reweight({"blue": 2.0})), "word='blue'"),
        (lambda: control([SOURCE, "word " * 80], Refine()), "the text window has 77"),
        (lambda: control([SOURCE, EDITED], blend=LocalBlend(words=[["red"]])), "each of 2 prompts"),
        (lambda: PromptToPrompt([SOURCE, EDITED], Replace(), TOKENIZER, 0), "num_steps=0"),
    ],
)
def test_bad_input(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="batch has 4 rows"):
        sample(unet(), [SOURCE, EDITED], control([SOURCE, EDITED, "a red square"]))
    short = PromptToPrompt([SOURCE, EDITED], Replace(), TOKENIZER, STEPS - 1)
    with pytest.raises(ValueError, match="num_steps must be the loop's own"):
        sample(unet(), [SOURCE, EDITED], short)


def test_gradients_reach_the_latent_through_an_edited_map() -> None:
    model = unet()
    latent = torch.randn(4, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    text = torch.stack([embed(p) for p in ["", "", SOURCE, EDITED]])
    with rg.apply(model, control([SOURCE, EDITED])):
        model(latent, torch.tensor(3), encoder_hidden_states=text).sample[3].sum().backward()
    assert float(latent.grad[2].abs().max()) > 0  # the edit's image depends on the source's latent
    assert float(latent.grad[0].abs().max()) == 0
