"""BiFormer: sizes, names, and the attention of its last level."""

import pytest
import torch
import torch.nn.functional as F

from regard.models.backbones import biformer

SMALL = {"dim": 16, "head_dim": 8, "regions": 2, "topk": (1, 1, 2), "depths": (1, 1, 1, 1), "num_classes": 5}


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(biformer.biformer_tiny, 13_142_760), (biformer.biformer_small, 25_536_232), (biformer.biformer_base, 56_804_968)],
)
def test_parameter_counts_are_those_published(build, parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_official_names_become_ours() -> None:
    def both(*parts: str) -> list[str]:
        return [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]

    def norm(*parts: str) -> list[str]:
        return both(*parts) + [
            f"{p}.{kind}" for p in parts for kind in ("running_mean", "running_var", "num_batches_tracked")
        ]

    official = both("downsample_layers.0.0", "downsample_layers.0.3", "head") + norm("norm")
    official += norm("downsample_layers.0.1", "downsample_layers.0.4")
    for i in range(1, 4):
        official += both(f"downsample_layers.{i}.0") + norm(f"downsample_layers.{i}.1")
    for i in range(4):
        own = ["attn.qkv.qkv", "attn.wo"] if i < 3 else ["attn.proj"]
        parts = ["pos_embed", "norm1", "norm2", "mlp.0", "mlp.3", "attn.lepe", *own]
        official += both(*(f"stages.{i}.0.{part}" for part in parts))
    official.append("stages.3.0.attn.qkv.weight")
    state = {name: torch.zeros(()) for name in official}
    assert set(biformer.official_names(state)) == set(biformer.biformer_tiny(**SMALL).state_dict())
    assert len(biformer.official_names(state)) == len(official)


def test_the_last_level_is_plain_attention_with_a_convolution_of_its_input() -> None:
    layer = biformer.EnhancedAttention(16, 2).double()
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    image = x.transpose(1, 2).unflatten(2, (3, 5))
    local = F.conv2d(image, layer.lepe.weight, layer.lepe.bias, padding=2, groups=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(x, grid=(3, 5)), layer.proj(out + local), rtol=0, atol=1e-12)
    assert layer.qkv.bias is None


def test_every_level_but_the_last_has_sixty_four_keys_at_224() -> None:
    with torch.device("meta"):
        model = biformer.biformer_tiny()
    keys = [stage[0].block.attn.topk * (side // 7) ** 2 for stage, side in zip(model.stages, (56, 28, 14))]
    assert keys == [64, 64, 64]
    assert model.stages[3][0].block.attn.num_heads == 8


def test_features_are_maps_at_four_strides_and_the_head_reads_the_last() -> None:
    model = biformer.biformer_tiny(**SMALL).double().eval()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps = model.features(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    torch.testing.assert_close(model(image), model.head(model.norm(maps[-1]).mean((2, 3))), rtol=0, atol=1e-12)


def test_every_parameter_learns_at_odd_sizes() -> None:
    model = biformer.biformer_small(**SMALL, drop_path=0.0)
    F.cross_entropy(model(torch.randn(4, 3, 70, 99)), torch.tensor([0, 1, 2, 3])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: biformer.BiFormer(depths=(1, 1)), "depths="),
        (lambda: biformer.BiFormer(head_dim=48), "head_dim=48"),
        (lambda: biformer.BiFormer(topk=(1, 4, 50)), "topk=50"),
        (lambda: biformer.EnhancedAttention(12, 8), "num_heads=8"),
        (lambda: biformer.biformer_tiny(**SMALL)(torch.zeros(1, 1, 32, 32)), r"image must be \(b, 3, H, W\)"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
