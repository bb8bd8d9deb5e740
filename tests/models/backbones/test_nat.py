"""NAT: sizes, names, and what it computes beside its layers."""

import pytest
import torch
from torch import nn

from regard.models.backbones import nat

SMALL = {"dim": 16, "num_heads": (1, 1, 2, 2), "kernel_size": 3, "depths": (1, 2, 1, 1), "num_classes": 5}


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (nat.nat_mini, 19_984_174),
        (nat.nat_tiny, 27_901_582),
        (nat.nat_small, 50_743_297),
        (nat.nat_base, 89_769_652),
    ],
)
def test_parameter_counts_are_those_published(build, parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_parameters_carry_the_official_names() -> None:
    def both(*parts: str) -> set[str]:
        return {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}

    expected = both("patch_embed.proj.0", "patch_embed.proj.1", "patch_embed.norm", "norm", "head")
    for i, depth in enumerate((1, 2, 1, 1)):
        for block in (f"levels.{i}.blocks.{j}." for j in range(depth)):
            expected |= {block + part for part in ("gamma1", "gamma2", "attn.rpb")}
            expected |= both(*(block + p for p in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")))
        if i < 3:
            expected |= {f"levels.{i}.downsample.reduction.weight"} | both(f"levels.{i}.downsample.norm")
    assert set(nat.nat_mini(**SMALL, layer_scale=1e-5).state_dict()) == expected


def test_features_are_maps_at_four_strides_and_the_head_reads_the_last() -> None:
    model = nat.nat_tiny(**SMALL).double().eval()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps = model.features(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    pooled = model.norm(maps[-1].flatten(2).transpose(1, 2)).mean(1)
    torch.testing.assert_close(model(image), model.head(pooled), rtol=0, atol=1e-12)


def test_every_parameter_learns() -> None:
    model = nat.nat_small(**{**SMALL, "depths": (1, 1, 1, 1)}, drop_path=0.0)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 64)), torch.tensor([0, 1, 2, 3])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_levels_smaller_than_the_kernel_work() -> None:
    model = nat.NAT(16, (1, 1, 2, 2), 7, depths=(1, 1, 1, 1), num_classes=5).eval()
    assert model(torch.randn(1, 3, 33, 50)).isfinite().all()


def test_stochastic_depth_drops_samples_in_training_only() -> None:
    model, image = nat.nat_mini(**SMALL, drop_path=0.9), torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: nat.NAT(depths=(1, 1)), "depths="),
        (lambda: nat.NAT(16, (3,), depths=(1,)), "num_heads=3"),
        (lambda: nat.nat_mini(**SMALL)(torch.zeros(1, 4, 32, 32)), r"image must be \(b, 3, H, W\)"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
