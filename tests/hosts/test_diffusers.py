"""UNets and diffusion transformers: self, cross and joint sites, tokens of both streams, steps and guidance branches."""

import pytest
import torch
from torch import Tensor, nn

import regard as rg

diffusers = pytest.importorskip("diffusers")

LATENT = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))


def _unet(**more) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=12,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
    )


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=16,
    )


STEP = torch.tensor([3, 3])
UNET = {"sample": LATENT, "timestep": STEP, "encoder_hidden_states": TEXT}
# name: (build, inputs, {kind: number of sites}, (query tokens, key tokens) of one site)
HOSTS = {
    "sd": (_unet, UNET, {"self": 4, "cross": 4}, ("down_blocks.0.*.attn2", "image[8,12]", "text[7]")),
    "sdxl": (
        lambda: _unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
            transformer_layers_per_block=(2, 1),
            use_linear_projection=True,
        ),
        {**UNET, "added_cond_kwargs": {"text_embeds": torch.randn(2, 8), "time_ids": torch.ones(2, 6)}},
        {"self": 7, "cross": 7},
        ("down_blocks.0.*.transformer_blocks.1.attn2", "image[8,12]", "text[7]"),
    ),
    "flux": (
        _flux,
        {
            "hidden_states": torch.randn(2, 12, 4),
            "encoder_hidden_states": TEXT,
            "pooled_projections": torch.randn(2, 8),
            "timestep": torch.tensor([0.3, 0.3]),
            "img_ids": torch.zeros(12, 3),
            "txt_ids": torch.zeros(7, 3),
        },
        {"joint": 2},
        ("transformer_blocks.0.attn", "text[7] + image[12]", "text[7] + image[12]"),
    ),
    "sd3": (
        _sd3,
        {
            "hidden_states": LATENT,
            "encoder_hidden_states": TEXT,
            "pooled_projections": torch.randn(2, 8),
            "timestep": STEP,
        },
        {"joint": 2},
        ("transformer_blocks.0.attn", "image[4,6] + text[7]", "image[4,6] + text[7]"),
    ),
    "pixart": (
        _pixart,
        {
            "hidden_states": LATENT[..., :8],
            "encoder_hidden_states": TEXT,
            "timestep": STEP,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        },
        {"self": 2, "cross": 2},
        ("transformer_blocks.0.attn2", "image[4,4]", "text[7]"),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    make, inputs, _, _ = HOSTS[name]

    def cast(x):
        if isinstance(x, dict):
            return {n: cast(v) for n, v in x.items()}
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return make().eval().to(dtype), cast(inputs)


@pytest.mark.parametrize("name", HOSTS)
def test_sites_kinds_and_tokens(name: str) -> None:
    model, inputs = build(name)
    found = rg.sites(model, **inputs)
    _, _, kinds, (where, q, k) = HOSTS[name]
    assert not found.refused, found
    assert {kind: len(found.kind(kind)) for kind in ("self", "cross", "joint") if found.kind(kind)} == kinds
    site = found[where]
    site = site[0] if isinstance(site, list) else site
    assert (str(site.tokens_q), str(site.tokens_k)) == (q, k)


@pytest.mark.parametrize("name", HOSTS)
def test_reading_leaves_the_output_to_the_bit(name: str) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        before = model(**inputs)[0]
        with rg.capture(model) as cap:
            during = model(**inputs)[0]
        after = model(**inputs)[0]
    assert len(cap) == sum(HOSTS[name][2].values())
    assert torch.equal(before, during)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_weights_are_the_eager_processors(name: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs = build(name, torch.float64)
    with rg.capture(model) as cap, torch.no_grad():
        model(**inputs)
    ours = {n: call.weights() for n, call in cap.items()}
    model.set_attn_processor(AttnProcessor())
    theirs: dict[str, Tensor] = {}
    for name_, module in model.named_modules():
        if hasattr(module, "get_attention_scores"):
            original = module.get_attention_scores

            def keep(*args, original=original, name_=name_, **kwargs) -> Tensor:
                theirs[name_] = original(*args, **kwargs)
                return theirs[name_]

            module.get_attention_scores = keep
    with torch.no_grad():
        model(**inputs)
    assert ours.keys() == theirs.keys()
    for site, weights in ours.items():
        folded = theirs[site].unflatten(0, weights.shape[:2])
        torch.testing.assert_close(weights, folded, atol=1e-12, rtol=0)


def test_the_eager_processor_is_a_site_too() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs = build("sd", torch.float64)
    with torch.no_grad():
        fused = model(**inputs)[0]
    model.set_attn_processor(AttnProcessor())
    found = rg.sites(model, **inputs)
    assert len(found.verified) == 8, found
    where = found.kind("cross")[0].name
    results = []
    for processor in ("eager", "fused"):
        if processor == "fused":
            model.set_default_attn_processor()
        with torch.no_grad(), rg.edit(model, rg.Edit.scale_keys("text[2:4]", 3.0), where=where):
            results.append(model(**inputs)[0])
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)
    assert not torch.allclose(results[0], fused, atol=1e-6)


def test_words_are_edited_by_name_in_chosen_steps_and_branches() -> None:
    model, inputs = build("sd", torch.float64)
    rg.sites(model, **inputs)
    edit = rg.Edit.scale_keys("text[3:5]", 2.0, branch="cond")
    with torch.no_grad():
        plain = model(**inputs)[0]
        with rg.edit(model, edit, where="cross", steps=slice(1, 2)):
            outputs = [model(**inputs)[0] for _ in range(3)]
    assert torch.equal(outputs[0], plain)
    assert torch.equal(outputs[2], plain)
    assert torch.equal(outputs[1][0], plain[0])  # the unconditional half
    assert not torch.allclose(outputs[1][1], plain[1], atol=1e-6)


def test_a_named_branch_counts_one_step() -> None:
    model, inputs = build("flux")
    rg.sites(model, **inputs)
    where = "transformer_blocks.0.attn"
    with torch.no_grad(), rg.capture(model, where) as cap:
        for _ in range(2):
            for branch in ("cond", "uncond"):
                with model.cache_context(branch):
                    model(**inputs)
    assert [(c.step.index, c.step.branch) for c in cap.calls(where)] == [
        (0, "cond"),
        (0, "uncond"),
        (1, "cond"),
        (1, "uncond"),
    ]
    with torch.no_grad(), rg.edit(model, rg.Edit.v(lambda v, call: v * 0, branch="cond")):
        plain, changed = [], []
        with model.cache_context("uncond"):
            plain.append(model(**inputs)[0])
        with model.cache_context("cond"):
            changed.append(model(**inputs)[0])
    assert torch.equal(plain[0], model(**inputs)[0])
    assert not torch.allclose(changed[0], plain[0])


def test_keys_of_another_row() -> None:
    model, inputs = build("sd", torch.float64)
    rg.sites(model, **inputs)
    with torch.no_grad():
        plain = model(**inputs)[0]
        with rg.edit(model, rg.Edit.share({1: 0}), where="cross"):
            shared = model(**inputs)[0]
        swapped = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][[0, 0]]}
        expected = model(**swapped)[0]
    torch.testing.assert_close(shared, expected, atol=1e-12, rtol=0)
    assert torch.equal(shared[0], plain[0])


def test_a_loss_on_maps_reaches_the_latent() -> None:
    model, inputs = build("sd", torch.float64)
    rg.sites(model, **inputs)
    latent = inputs["sample"].clone().requires_grad_()
    with rg.capture(model, "cross") as cap:
        model(**{**inputs, "sample": latent})
    loss = sum(call.weights()[..., 3].sum() for _, call in cap.items())
    (gradient,) = torch.autograd.grad(loss, latent)

    def value(x: Tensor) -> float:
        with torch.no_grad(), rg.capture(model, "cross") as maps:
            model(**{**inputs, "sample": x})
        return float(sum(call.weights()[..., 3].sum() for _, call in maps.items()))

    direction = torch.randn_like(latent)
    with torch.no_grad():
        numeric = (value(latent + 1e-6 * direction) - value(latent - 1e-6 * direction)) / 2e-6
    assert abs(float((gradient * direction).sum()) - numeric) < 1e-6 * max(1.0, abs(numeric))


def test_nothing_is_left_behind() -> None:
    from diffusers.models.cache_utils import CacheMixin

    plain = CacheMixin.cache_context
    model, _ = build("flux")
    with rg.capture(model):
        assert CacheMixin.cache_context is not plain
    with pytest.raises(TypeError), rg.capture(model):
        model()
    assert CacheMixin.cache_context is plain
    assert all("_regard_taps" not in m.__dict__ and not m._forward_hooks for m in model.modules())
