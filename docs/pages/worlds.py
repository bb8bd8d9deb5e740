"""The worlds, each with a sheet of samples drawn by the program."""

from __future__ import annotations

import importlib
import inspect
import io

from PIL import Image
from torch import Tensor

from regard.worlds.world import World

WORLDS = (
    "shapes.world:Shapes",
    "shapes.pairs:Pairs",
    "shapes.popout:PopOut",
    "shapes.gaze:Gaze",
    "shapes.degraded:Degraded",
    "shapes.drawings:Drawings",
    "shapes.lanes:Lanes",
    "shapes.panorama:Panoramas",
    "shapes.organs:Organs",
    "shapes.screens:Screens",
    "shapes.mazes:Mazes",
    "rooms.rooms:Rooms",
    "rooms.rooms:StereoRooms",
    "rooms.rooms:RoomClips",
    "rooms.rooms:RingRooms",
    "rooms.houses:Houses",
    "clips:Clips",
    "documents:Documents",
    "formulas:Formulas",
    "photos:Crops",
    "recall:Recall",
    "recall:Copy",
    "recall:Needle",
    "graphs:DictionaryLookup",
    "graphs:Communities",
    "graphs:Distances",
)
JUDGES = {
    "Shapes": "shapes.judge.judge, shapes.judge.satisfies",
    "Rooms": "rooms.judge.surfaces, rooms.errors.depth_error and its like",
    "Clips": "clips_judge.judge_clip, clips_judge.heard",
    "Documents": "documents_judge.read_page",
    "Formulas": "formulas.image_score; markup is compared by markup.equivalent",
}
SAMPLES, SIDE, GAP = 3, 128, 8


def make(name: str) -> World:
    module, _, cls = name.partition(":")
    return getattr(importlib.import_module(f"regard.worlds.{module}"), cls)()


def picture(panel: Tensor) -> Image.Image:
    """A panel (3, h, w) of at least SIDE pixels in height."""
    pixels = (panel.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    times = max(1, round(SIDE / image.height))
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def sheet(rows: list[list[Image.Image]]) -> bytes:
    """One row a sample, as a PNG file."""
    columns = [max(row[i].width for row in rows) for i in range(len(rows[0]))]
    heights = [max(image.height for image in row) for row in rows]
    size = (sum(columns) + GAP * (len(columns) - 1), sum(heights) + GAP * (len(heights) - 1))
    whole, top = Image.new("RGB", size, "white"), 0
    for row, height in zip(rows, heights):
        left = 0
        for image, width in zip(row, columns):
            whole.paste(image, (left, top))
            left += width + GAP
        top += height + GAP
    file = io.BytesIO()
    whole.save(file, "PNG", optimize=True)
    return file.getvalue()


def pages() -> dict[str, str | bytes]:
    """``worlds.md`` and its pictures."""
    made: dict[str, str | bytes] = {}
    parts = [
        "# Worlds",
        "",
        "Data with exact ground truth, made from a seed: `world[i]` is the same sample on every machine, and nothing is stored. "
        "The samples below are the first three of each world with its defaults.",
    ]
    for name in WORLDS:
        world = make(name)
        cls = type(world)
        doc = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        parts += ["", f"## {cls.__name__}", "", doc, "", f"`regard.worlds.{name.replace(':', '.')}`", ""]
        if cls.__name__ in JUDGES:
            judges = JUDGES[cls.__name__]
            parts += [
                f"What a picture shows, a generated one too, is read off it or held against the truth by {judges}.",
                "",
            ]
        shown = [world.panels(world[i]) for i in range(SAMPLES)]
        images = [[picture(p) for p in panels.values() if isinstance(p, Tensor)] for panels in shown]
        if images[0]:
            titles = [title for title, p in shown[0].items() if isinstance(p, Tensor)]
            path = f"assets/worlds/{cls.__name__.lower()}.png"
            made[path] = sheet(images)
            parts += [f"![{', '.join(titles)}]({path})", "", f"From left to right: {', '.join(titles)}.", ""]
        for title, text in shown[0].items():
            if isinstance(text, str):
                parts += [f"{title}:", "", "```text", text[:800], "```", ""]
    made["worlds.md"] = "\n".join(parts) + "\n"
    return made
