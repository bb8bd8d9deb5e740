"""Perceiver against explicit attention, its symmetries, its size and cost, and its edges."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regard.models.backbones.perceiver import Block, ModalityConcat, Perceiver

SMALL = {"dim": 12, "num_heads": 3, "num_latents": 5, "repeats": 3, "depth": 2, "bands": 4, "max_freq": 8.0}


def made(**arguments) -> Perceiver:
    model = Perceiver(3, 4, **(SMALL | arguments)).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def entries(b: int = 2, n: int = 12, c: int = 3) -> Tensor:
    return torch.randn(b, n, c, dtype=torch.float64)


def explicit_block(block: Block, z: Tensor, x: Tensor | None, mask: Tensor | None) -> Tensor:
    """One batch row: attention query by query and head by head."""
    q = block.norm1(z)
    seen = q if x is None else block.norm_context(x)
    a = block.attn
    out = []
    for i in range(len(z)):
        heads = []
        for h in range(a.num_heads):
            part = slice(h * a.head_dim, (h + 1) * a.head_dim)
            scores = a.k(seen)[:, part] @ a.q(q[i])[part] / math.sqrt(a.head_dim)
            scores = scores if mask is None else scores[mask]
            values = a.v(seen)[:, part] if mask is None else a.v(seen)[mask][:, part]
            heads.append((scores.exp() / scores.exp().sum()) @ values)
        out.append(a.out(torch.cat(heads)))
    z = z + torch.stack(out)
    h = block.norm2(z)
    return (
        z
        + F.linear(F.gelu(F.linear(h, block.mlp.fc1.weight, block.mlp.fc1.bias)), block.mlp.fc2.weight)
        + (block.mlp.fc2.bias)
    )


def explicit(model: Perceiver, x: Tensor, grid: tuple[int, int], mask: Tensor | None) -> Tensor:
    rates = [1 + k * (model.max_freq / 2 - 1) / (model.bands - 1) for k in range(model.bands)]
    rows = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            where = [-1 + 2 * i / (grid[0] - 1), -1 + 2 * j / (grid[1] - 1)]
            waves = [f(math.pi * r * p) for f in (math.sin, math.cos) for p in where for r in rates]
            rows.append(where + waves)
    features = torch.tensor(rows, dtype=torch.float64)
    logits = []
    for b in range(len(x)):
        array = torch.cat([x[b], features], -1)
        z = model.latents
        for repeat in range(model.repeats):
            z = explicit_block(model.read[0 if repeat == 0 else 1], z, array, None if mask is None else mask[b])
            for block in model.think[0]:
                z = explicit_block(block, z, None, None)
        logits.append(model.head(model.norm(z).mean(0)))
    return torch.stack(logits)


@pytest.mark.parametrize("arguments", [{}, {"cross_heads": 3}, {"cross_heads": 2, "cross_head_dim": 5, "mlp_ratio": 2}])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_explicit_attention(arguments: dict, masked: bool) -> None:
    model, x = made(**arguments), entries().requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(2, 12) > 0.5
        mask[:, 3] = True
    found = []
    for function in (lambda: model(x, grid=(3, 4), mask=mask), lambda: explicit(model, x, (3, 4), mask)):
        out = function()
        weights = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)
        found.append([out, *torch.autograd.grad((out * weights).sum(), [x, *model.parameters()])])
    # The features are made in single precision from the grid's own coordinates.
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_explicit_positions_are_exact() -> None:
    model, x = made(), entries()
    rows = torch.linspace(-1, 1, 3, dtype=torch.float64)
    columns = torch.linspace(-1, 1, 4, dtype=torch.float64)
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    torch.testing.assert_close(model(x, positions=positions), explicit(model, x, (3, 4), None), atol=1e-12, rtol=1e-10)


def test_order_of_the_entries_does_not_matter() -> None:
    model, x = made(), entries()
    positions = torch.rand(2, 12, 2, dtype=torch.float64) * 2 - 1
    order = torch.randperm(12)
    out = model(x, positions=positions)
    torch.testing.assert_close(model(x[:, order], positions=positions[:, order]), out)
    assert not torch.allclose(model(x[:, order], positions=positions), out), "positions are not read"


def test_masked_entries_have_no_influence() -> None:
    model, x = made(), entries().requires_grad_()
    positions = torch.rand(12, 2, dtype=torch.float64)
    mask = torch.arange(12).expand(2, -1) < 7
    out = model(x, positions=positions, mask=mask)
    torch.testing.assert_close(out, model(x[:, :7], positions=positions[:7]))
    assert not torch.autograd.grad(out.sum(), x)[0][:, 7:].any()


def test_a_row_without_entries_is_finite() -> None:
    model, x = made(), entries().requires_grad_()
    mask = torch.tensor([[False] * 12, [True] * 12])
    out = model(x, grid=(3, 4), mask=mask)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert out.isfinite().all()
    assert not grad[0].any()
    assert grad[1].any()


def count(**arguments) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Perceiver(3, 4, **(SMALL | arguments)).parameters())


def test_sharing() -> None:
    model = made()
    steps = list(model.steps())
    assert len(steps) == 3
    assert steps[0][0] is not steps[1][0]
    assert steps[1][0] is steps[2][0]
    assert steps[0][1] is steps[1][1] is steps[2][1]
    assert count(repeats=2) == count(repeats=7)
    one, two = count(repeats=1, shared=False), count(repeats=2, shared=False)
    assert count(repeats=4, shared=False) == one + 3 * (two - one)
    assert len({id(m) for pair in made(shared=False).steps() for m in pair}) == 6


def test_size_on_imagenet_is_the_papers() -> None:
    with torch.device("meta"):
        model = Perceiver(3, 1000)
        width = model.read[0].attn.k.in_features
        assert model.locate(torch.empty(1, 224 * 224, 3), (224, 224)).shape == (1, 50176, 261)
    assert width == model.read[0].attn.head_dim == 261
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 44.9


def test_unshared_is_several_times_larger() -> None:
    with torch.device("meta"):
        shared, separate = (sum(p.numel() for p in Perceiver(3, 1000, shared=s).parameters()) for s in (True, False))
    assert 6.5 < separate / shared < 8.5


def test_cost_is_linear_in_the_input() -> None:
    flops = []
    for n in (100, 200, 300):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            Perceiver(3, 4, **SMALL)(torch.empty(1, n, 3), positions=torch.empty(n, 2))
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == flops[2] - flops[1] > 0
    assert flops[0] - (flops[1] - flops[0]) > 0, "nothing is left for the latents"


def test_edges_work() -> None:
    model = made()
    assert model(entries(1, 1), grid=(1, 1)).shape == (1, 4)
    assert model(entries(2, 2), positions=torch.zeros(2, 2, dtype=torch.float64)).shape == (2, 4)
    assert model.encode(entries(), grid=(4, 3)).shape == (2, 5, 12)
    assert made(depth=0, axes=0)(entries()).shape == (2, 4)
    half = Perceiver(3, 4, **SMALL).bfloat16()
    assert half(entries().bfloat16(), grid=(3, 4)).dtype == torch.bfloat16


def test_modalities_side_by_side() -> None:
    join = ModalityConcat((3, 5), extra=2).double()
    image, sound = entries(2, 6, 3), entries(2, 4, 5)
    out = join(image, sound)
    assert out.shape == (2, 10, 7)
    torch.testing.assert_close(out[:, :6, :3], image)
    torch.testing.assert_close(out[:, 6:, :5], sound)
    torch.testing.assert_close(out[0, :6, 3:], join.vectors[0].expand(6, -1))
    torch.testing.assert_close(out[1, 6:, 5:], join.vectors[1].expand(4, -1))
    model = Perceiver(join.dim, 4, **(SMALL | {"axes": 0})).double()
    model(out).sum().backward()
    assert all(v.grad is not None and v.grad.any() for v in join.vectors)
    for widths, extra in (((), 1), ((0, 2), 1), ((2,), 0)):
        with pytest.raises(ValueError, match="must be positive"):
            ModalityConcat(widths, extra)
    with pytest.raises(ValueError, match=r"widths \(3, 5\); got \(5, 3\)"):
        join(sound, image)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"input_dim": 0}, "input_dim=0"),
        ({"num_latents": 0}, "num_latents=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"cross_heads": 2}, "cross_heads=2 must divide the 21"),
        ({"axes": -1}, "axes=-1"),
    ],
)
def test_refuses_bad_arguments(arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Perceiver(**({"input_dim": 3, "num_classes": 4} | SMALL | arguments))


def test_refuses_bad_inputs() -> None:
    model, x = made(), entries()
    places = torch.zeros(12, 2, dtype=torch.float64)
    for bad, options, word in (
        (entries(c=4), {"grid": (3, 4)}, r"x must be \(b, n, 3\)"),
        (entries(n=0), {"grid": (0, 4)}, "n at least 1"),
        (x, {}, "either grid or positions"),
        (x, {"grid": (3, 4), "positions": places}, "either grid or positions"),
        (x, {"grid": (3, 5)}, r"12 entries 2 coordinates; got \(3, 5\)"),
        (x, {"grid": (12,)}, "12 entries 2 coordinates"),
        (x, {"positions": places[:11]}, "12 entries 2 coordinates"),
    ):
        with pytest.raises(ValueError, match=word):
            model(bad, **options)
    with pytest.raises(ValueError, match="axes=0"):
        made(axes=0)(x, grid=(3, 4))


def test_linear_layers_begin_with_weights_cut_off_at_two_deviations_and_no_bias() -> None:
    model = Perceiver(3, 5, dim=64, num_heads=4, num_latents=8, repeats=1, depth=2, bands=6, max_freq=16)
    for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        scaled = layer.weight.detach() * layer.in_features**0.5
        assert scaled.abs().max() <= 2.0
        assert abs(scaled.std().item() - 0.88) < 0.1
        assert layer.bias is None or not layer.bias.any()
