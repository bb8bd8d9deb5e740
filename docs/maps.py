"""Makes docs/assets/maps.png: what a small vision transformer, trained here on handwritten digits, looks at.

Run it with ``python docs/maps.py``; a minute or two on one core, the same picture from the same seed.
"""

from __future__ import annotations

import math
from pathlib import Path

import timm
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

import regard as rg
from regard.core.maps import Map
from regard.worlds.digits import digits

OUT = Path(__file__).parent / "assets" / "maps.png"
COLUMNS, SIDE, GAP = 9, 120, 12


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=4,
        in_chans=1,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=10,
    )
    train = digits("train")
    x, y = inputs(train.pixels), train.labels
    steps = 640
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def inputs(pixels: Tensor) -> Tensor:
    return pixels.float().view(-1, 1, 28, 28) / 255 - 0.5


def picture(image: Tensor, heat: Tensor | None) -> Tensor:
    """(SIDE, SIDE, 3) in 0..1."""
    grey = nn.functional.interpolate(image[None] + 0.5, (SIDE, SIDE), mode="nearest")[0, 0]
    ink = grey[..., None].expand(-1, -1, 3)
    if heat is None:
        return ink
    colour = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float()
    return 0.7 * colour + 0.3 * ink


def main() -> None:
    model = trained()
    test = digits("test")
    rows = torch.tensor([int((test.labels == n).nonzero()[1]) for n in range(COLUMNS)])
    image = inputs(test.pixels[rows])
    with rg.capture(model, "blocks.*") as cap, torch.no_grad():
        right = model(image).argmax(1) == test.labels[rows]
    _, last = list(cap.items())[-1]
    attention = Map(last.map("image", rows="cls").mean((1, 2)), image)
    lines = [None, attention, *(rg.explain(model, image, n) for n in ("attention-flow-rollout", "generic-attribution"))]
    sheet = torch.ones(GAP + len(lines) * (SIDE + GAP), GAP + COLUMNS * (SIDE + GAP), 3)
    for i, found in enumerate(lines):
        heats = [None] * COLUMNS if found is None else list(found.upsample(SIDE).normalized().values.detach())
        for j in range(COLUMNS):
            top, left = GAP + i * (SIDE + GAP), GAP + j * (SIDE + GAP)
            sheet[top : top + SIDE, left : left + SIDE] = picture(image[j], heats[j])
    assert math.isfinite(float(sheet.sum()))
    Image.fromarray((sheet.clamp(0, 1) * 255).byte().numpy()).save(OUT, optimize=True)
    print(f"{OUT}: {int(right.sum())} of {COLUMNS} digits read right")


if __name__ == "__main__":
    main()
