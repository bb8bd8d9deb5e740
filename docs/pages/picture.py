"""What a layer lets look at what, measured: the gradient of its output with respect to its input."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from regard.catalog.registry import Method
from regard.checks.samples import build, random, sample, whole

SIDE, LENGTH, ITEMS = 13, 24, 4
COLOUR = (0, 150, 110)


def _influence(method: Method) -> Tensor:
    """(rows, n) in 0..1: how strongly each input token changes the middle output token, or each output token in turn."""
    flat = method.tags.input == "tokens"
    side = whole(method, SIDE)
    size = whole(method, LENGTH) if flat else (side, side)
    layer = build(method, torch.float32)
    x, options = sample(method, layer, size, batch=ITEMS, dtype=torch.float32)
    x.requires_grad_()
    torch.manual_seed(0)
    out = layer(x, **options)
    if method.tags.input == "image":
        out, channels = out.flatten(2).transpose(1, 2), 1
    else:
        channels = 2
    rows = range(out.shape[1]) if flat else [side // 2 * side + side // 2]
    found = []
    for row in rows:
        wanted = (out[:, row] * random(tuple(out[:, row].shape), out.dtype, seed=row)).sum()
        (grad,) = torch.autograd.grad(wanted, x, retain_graph=True)
        found.append(grad.norm(dim=channels).mean(0).flatten())
    values = torch.stack(found)
    # Roots keep faint influence visible beside a token's own.
    return (values / values.amax(1, keepdim=True).clamp_min(1e-12)).sqrt()


def influence(method: Method) -> str:
    """The measurement as an inline picture with its caption; empty for what is no layer."""
    if method.kind != "layer":
        return ""
    values = _influence(method)
    if method.tags.input == "tokens":
        caption = "How strongly each input token (column) changes each output token (row)"
    else:
        side = round(values.shape[1] ** 0.5)
        values = values.view(side, side)
        caption = "How strongly each place of a map changes the marked place of the output"
    rows, columns = values.shape
    mark = ""
    if method.tags.input != "tokens":
        mark = f'<rect class="mark" x="{columns // 2}" y="{rows // 2}" width="1" height="1"/>'
    label = f"{caption}, for random inputs and before any training."
    return (
        f'<figure class="influence"><svg viewBox="-0.1 -0.1 {columns + 0.2} {rows + 0.2}" role="img" aria-label="{label}">'
        f'<rect class="frame" width="{columns}" height="{rows}"/><image href="{_png(values)}" width="{columns}" '
        f'height="{rows}"/>{mark}</svg><figcaption>{label}</figcaption></figure>'
    )


def _png(values: Tensor) -> str:
    """One colour, as opaque as the value is large: it shows on light and dark pages."""
    alpha = (values * 255).round().byte()[..., None]
    pixels = torch.cat([torch.tensor(COLOUR, dtype=torch.uint8).expand(*values.shape, 3), alpha], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
