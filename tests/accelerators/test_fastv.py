"""FastV: dropping tokens equals hiding them, in prefill and in cached decoding."""

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.accelerators.fastv import FastV, attention_share, importance

transformers = pytest.importorskip("transformers")

IMAGE_ID, PROMPT, IMAGES = 98, 25, 16
LAYERS = 4


def vlm(implementation: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.4,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        attn_implementation=implementation,
    )
    return transformers.LlavaForConditionalGeneration(config).eval().to(dtype)


def batch(padding: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Two prompts: system, 16 image tokens, instruction; the first is padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (2, PROMPT + padding), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    ids[0, padding + 2 : padding + 18] = IMAGE_ID
    ids[1, 4:20] = IMAGE_ID
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def hidden(kept: Tensor, size: int) -> rg.Edit:
    """The same choice by a mask: a dropped token is seen by itself only."""
    there = torch.zeros(len(kept), size, dtype=torch.bool).scatter(1, kept, True)

    def allow(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        prompt = kv.clamp(max=size - 1)
        return there[b, prompt] | (kv >= size) | (q == kv)

    return rg.Edit.mask(allow)


DEEP = [f"model.language_model.layers.{i}.self_attn" for i in range(2, LAYERS)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 3])
def test_dropping_equals_hiding(implementation: str, padding: int) -> None:
    # In float64 the eager function of the host makes NaN of padded rows: its softmax is in float32.
    dtype = torch.float32 if implementation == "eager" else torch.float64
    model, inputs = vlm(implementation, dtype), batch(padding, dtype)
    with torch.no_grad(), rg.apply(model, "fastv", keep=0.25, after=2) as handle:
        dropped = model(**inputs).logits
        kept = handle.kept
    with torch.no_grad(), rg.edit(model, hidden(kept, PROMPT + padding), where=DEEP):
        masked = model(**inputs).logits
    rows = masked.gather(1, kept[..., None].expand(-1, -1, masked.shape[-1]))
    valid = inputs["attention_mask"].bool().gather(1, kept)
    torch.testing.assert_close(dropped[valid], rows[valid], atol=1e-5, rtol=0)
    assert not torch.allclose(rows, model(**inputs).logits.gather(1, kept[..., None].expand_as(rows)), atol=1e-3)


@pytest.mark.parametrize("padding", [0, 3])
def test_sixteen_cached_steps_equal_hiding(padding: int) -> None:
    model, inputs = vlm(), batch(padding)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    with rg.apply(model, "fastv", keep=0.25, after=2) as handle:
        pruned = model.generate(**inputs, **options)
        kept = handle.kept
    with rg.edit(model, hidden(kept, PROMPT + padding), where=DEEP):
        masked = model.generate(**inputs, **options)
    assert torch.equal(pruned.sequences, masked.sequences)
    for one, two in zip(pruned.logits, masked.logits, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_caches_are_uneven_and_positions_true() -> None:
    model, inputs = vlm(), batch()
    with rg.apply(model, "fastv", keep=0.5, after=2) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
        size = handle.kept.shape[1]
    assert size == PROMPT - IMAGES // 2
    assert [layer.keys.shape[2] for layer in cache.layers] == [PROMPT] * 2 + [size] * (LAYERS - 2)
    assert cache.get_seq_length() == PROMPT


def test_kept_tokens_are_sorted_and_hold_all_text() -> None:
    model, inputs = vlm(), batch(3)
    with rg.apply(model, "fastv", keep=0.25, after=1) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.kept
    assert bool((kept.diff(dim=1) > 0).all())
    image = inputs["input_ids"] == IMAGE_ID
    there = torch.zeros_like(image).scatter(1, kept, True)
    assert bool((there | image).all())
    assert (there & image).sum(1).tolist() == [4, 4]


def test_the_score_is_one_row_of_the_hosts_weights() -> None:
    model, inputs = vlm("eager", torch.float32), batch(2, torch.float32)
    with rg.capture(model, DEEP[0]) as cap, torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    score = importance(cap[DEEP[0]], inputs["attention_mask"].bool())
    torch.testing.assert_close(score, maps[2][:, :, -1].mean(1).to(score.dtype), atol=1e-6, rtol=0)
    # Padding on the right: the last prompt token is not the last column.
    right = inputs["attention_mask"].flip(1).bool()
    expected = cap[DEEP[0]].weights().mean(1)[torch.arange(2), torch.tensor([PROMPT - 1, PROMPT + 1])]
    torch.testing.assert_close(importance(cap[DEEP[0]], right), expected)


def test_each_item_is_ranked_by_its_own_attention() -> None:
    model, inputs = vlm(), batch()
    alone = []
    for i in range(2):
        with rg.apply(model, "fastv", keep=0.25, after=2) as handle, torch.no_grad():
            model(**{n: x[i : i + 1] for n, x in inputs.items()})
            alone.append(handle.kept)
    with rg.apply(model, "fastv", keep=0.25, after=2) as handle, torch.no_grad():
        model(**inputs)
    assert torch.equal(handle.kept, torch.cat(alone))


def test_keeping_everything_and_undoing_are_exact() -> None:
    model, inputs = vlm(dtype=torch.float32), batch(dtype=torch.float32)
    with torch.no_grad():
        plain = model(**inputs).logits
        hooks = _hooks(model)
        with rg.apply(model, "fastv", keep=1.0, after=2):
            assert torch.equal(model(**inputs).logits, plain)
        handle = rg.apply(model, "fastv", keep=0.5, after=2)
        assert model(**inputs).logits.shape[1] < PROMPT
        handle.undo()
        handle.undo()
        assert torch.equal(model(**inputs).logits, plain)
    assert _hooks(model) == hooks


def _hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_rounding_never_drops_the_last_image_token() -> None:
    model, inputs = vlm(), batch()
    with rg.apply(model, "fastv", keep=0.01, after=2) as handle, torch.no_grad():
        model(**inputs)
    assert handle.kept.shape[1] == PROMPT - IMAGES + 1


def test_text_only_is_left_alone() -> None:
    model, inputs = vlm(), batch()
    ids = inputs["input_ids"].where(inputs["input_ids"] != IMAGE_ID, 5)
    with torch.no_grad(), rg.apply(model, "fastv", keep=0.5, after=2):
        assert model(input_ids=ids).logits.shape[1] == PROMPT
    mixed = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"][:1], ids[1:]]),
        "pixel_values": inputs["pixel_values"][:1],
    }
    with (
        torch.no_grad(),
        rg.apply(model, "fastv", keep=0.5, after=2),
        pytest.warns(UserWarning, match="no image tokens"),
    ):
        assert model(**mixed).logits.shape[1] == PROMPT


def test_saving_is_the_papers_formula() -> None:
    dim, hidden, layers, tokens, image = 8, 24, 6, 20, 12
    per_layer = [4 * n * dim**2 + 2 * n * n * dim + 2 * n * dim * hidden for n in [20] * 2 + [14] * 4]
    full = 6 * (4 * 20 * dim**2 + 2 * 400 * dim + 2 * 20 * dim * hidden)
    got = FastV(keep=0.5, after=2).saving(layers=layers, tokens=tokens, image=image, dim=dim, hidden=hidden)
    assert got == pytest.approx(1 - sum(per_layer) / full, abs=1e-12)


def test_attention_share_sums_to_one() -> None:
    model, _ = vlm(), batch()
    ids = torch.randint(3, 90, (2, PROMPT))
    ids[:, 2:18] = IMAGE_ID
    share = attention_share(model, {"input_ids": ids, "pixel_values": batch()["pixel_values"]})
    assert set(share) == {"system", "image", "instruction"}
    torch.testing.assert_close(sum(share.values()), torch.ones(LAYERS, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep": 0.0}, "keep=0.0"), ({"keep": 1.5}, "keep=1.5"), ({"after": 0}, "after=0")],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastV(**arguments)


def test_models_and_caches_that_cannot_be_pruned() -> None:
    model, inputs = vlm(), batch()
    with pytest.raises(ValueError, match=r"1\.\.3"):
        rg.apply(model, "fastv", after=LAYERS)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
        )
    )
    with pytest.raises(ValueError, match="image_token_id"):
        rg.apply(llama, "fastv")
    with pytest.raises(ValueError, match="cannot drop tokens"):
        rg.apply(nn.Linear(2, 2), "fastv")
    with rg.apply(model, "fastv"), pytest.raises(ValueError, match="dynamic cache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with rg.apply(model, "fastv"), pytest.raises(ValueError, match="input_ids are needed"):
        model(inputs_embeds=torch.randn(1, 5, 32, dtype=torch.float64))
