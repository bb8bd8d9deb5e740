"""Films of shapes: tracks, masks, occlusions, actions and sound that agree with each other and with the pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.audio import TONES
from regard.worlds.clips import HIDDEN, MOTIONS, STAYS, Clip, Clips, offsets, runs
from regard.worlds.shapes.render import reach
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import CLASSES, Scene, Thing

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10**6)


def film(*tracks: list[tuple[float, float]], sizes: tuple[float, ...], motions: tuple[str, ...]) -> Clip:
    """A clip put together by hand; the things after the first are painted over it."""
    names = [("circle", "red"), ("square", "blue"), ("star", "green")]
    frames = []
    for places in zip(*tracks):
        things = tuple(Thing(shape, colour, place, size) for (shape, colour), place, size in zip(names, places, sizes))
        frames.append(ShapesSample.of(Scene((32, 48), things=things)))
    moving = torch.tensor([[motion != STAYS for motion in motions]] * len(frames))
    return Clip(tuple(frames), motions, moving, 10, torch.zeros(1600 * len(frames)))


def test_a_ball_passes_behind_a_wall_by_hand() -> None:
    places = [(6.0, 16.0), (15.0, 16.0), (24.0, 16.0), (33.0, 16.0), (42.0, 16.0)]
    clip = film(places, [(24.0, 16.0)] * 5, sizes=(8.0, 16.0), motions=("moves right", STAYS))
    assert clip.caption == "a red circle moves right, a blue square stays"
    share = clip.visible_share[:, 0]
    assert share[0] == share[4] == 1
    assert share[2] == 0
    assert 0 < share[1] < 1
    assert [(e.thing, e.verb, e.first, e.last, e.by) for e in clip.occlusions] == [(0, "is covered", 1, 3, 1)]
    assert [(e.thing, e.verb, e.first, e.last, e.by) for e in clip.actions] == [
        (0, "moves right", 0, 4, None),
        (0, "hides", 2, 2, 1),
    ]
    assert clip.boxes[2, 0].tolist() == [0, 0, 0, 0]
    assert clip.amodal_boxes[2, 0].tolist() == [20, 12, 28, 20]
    assert clip.hidden_by[2, 0, 1] == clip.amodal[2, 0].sum()
    assert torch.equal(clip.sounding[0], clip.visible[0, 0])
    assert not clip.sounding[2].any()
    assert clip.tags[2].nonzero()[:, 0].tolist() == [CLASSES.index("circle")]


ENDS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "circles": (0, 0),
    "zigzags": (1, 0),
    "bounces": (1, 0),
    STAYS: (0, 0),
}


@pytest.mark.parametrize(("motion", "ends"), ENDS.items())
def test_motions(motion: str, ends: tuple[float, float]) -> None:
    way = offsets(motion, np.linspace(0, 1, 401))
    assert (way[-1] - way[0]).tolist() == pytest.approx(ends, abs=1e-9)
    spans = np.ptp(way, 0)
    assert spans.max() <= 1
    steps = np.diff(way, axis=0)
    turns = (np.sign(steps[1:, 1]) * np.sign(steps[:-1, 1]) < 0).sum()
    assert turns == {"zigzags": 3, "bounces": 3, "circles": 2}.get(motion, 0)
    if motion == "circles":
        np.testing.assert_allclose(np.hypot(*way.T), 0.3)
    if motion == "bounces":
        assert way[:, 1].max() <= 0


def test_runs() -> None:
    assert list(runs(torch.tensor([1, 1, 0, 1, 0, 0, 1]).bool())) == [(0, 1), (3, 3), (6, 6)]
    assert list(runs(torch.zeros(3).bool())) == []


@quick
@given(seeds)
def test_masks_tracks_and_pictures_agree(seed: int) -> None:
    clip = Clips(seed=seed, size=(48, 64), frames=6, screens=2)[0]
    t, n = clip.moving.shape
    assert t == 6
    assert clip.frames.shape == (6, 3, 48, 64)
    assert (clip.visible & ~clip.amodal).sum() == 0
    assert (clip.visible.sum(1) <= 1).all()
    assert torch.equal(clip.hidden_by.sum(2), (clip.amodal & ~clip.visible).flatten(2).sum(2))
    assert (clip.hidden_by.triu() == clip.hidden_by).all()
    pixels = clip.visible_share * clip.amodal.flatten(2).sum(2)
    torch.testing.assert_close(pixels, clip.visible.flatten(2).sum(2).float())
    inside = [i for i, thing in enumerate(clip.things) if min(thing.centre) > reach(thing)]
    middle = (clip.amodal_boxes[..., :2] + clip.amodal_boxes[..., 2:]) / 2
    for i in inside:
        assert (middle[:, i] - clip.centres[:, i]).abs().max() < 0.3 * clip.things[i].size
    kinds = [thing.kind for thing in clip.things]
    assert len({thing.colour for thing in clip.things}) == n
    assert all([thing.kind for thing in sample.scene.things] == kinds for sample in clip.samples)


@quick
@given(seeds)
def test_things_move_exactly_while_they_are_said_to_and_stay_in_the_picture(seed: int) -> None:
    clip = Clips(seed=seed, size=(40, 56), frames=9, screens=0)[0]
    for i, (motion, thing) in enumerate(zip(clip.motions, clip.things)):
        steps = clip.centres[1:, i] - clip.centres[:-1, i]
        changed = steps.abs().amax(1) > 1e-4
        moving = clip.moving[:, i]
        assert moving.any() == (motion != STAYS)
        assert not changed[~(moving[1:] | moving[:-1])].any()
        assert changed[moving[1:] & moving[:-1]].all()
        edge = reach(thing) - 1e-3
        assert (clip.centres[:, i] >= edge).all()
        assert (clip.centres[:, i] <= torch.tensor([56, 40]) - edge).all()
        x, y = (clip.centres[-1, i] - clip.centres[0, i]).tolist()
        if motion.startswith("moves"):
            expected = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion.split()[1]]
            if clip.moving[:, i].sum() > 1:
                assert (round(np.sign(x) * (abs(x) > 1e-3)), round(np.sign(y) * (abs(y) > 1e-3))) == expected


def test_a_frame_shows_the_middle_of_its_time() -> None:
    """So a thing has made half a step in the frame in which it starts, and half a step is left for the one after its last."""
    world = Clips(frames=8, things=(1, 1), screens=0, still=0.0, active=(0.5, 0.5), motions=("moves right",))
    seen = set()
    for i in range(20):
        clip = world[i]
        x, moving = clip.centres[:, 0, 0], clip.moving[:, 0]
        first, last = next(runs(moving))
        step = (x[first + 1] - x[first]).item()
        assert 0.4 * 64 <= 4 * step <= 0.6 * 64
        if first > 0:
            assert (x[first] - x[first - 1]).item() == pytest.approx(step / 2, rel=1e-3)
        if last < 7:
            assert (x[last + 1] - x[last]).item() == pytest.approx(step / 2, rel=1e-3)
        seen.add(first)
    assert len(seen) > 2


@quick
@given(seeds)
def test_events_are_what_the_masks_say(seed: int) -> None:
    clip = Clips(seed=seed, frames=10, screens=2)[0]
    hides = torch.zeros_like(clip.moving)
    for event in clip.actions:
        during = slice(event.first, event.last + 1)
        if event.verb == "hides":
            hides[during, event.thing] = True
            assert clip.hidden_by[during, event.thing, event.by].sum() > 0
        else:
            assert event.verb == clip.motions[event.thing]
            assert clip.moving[during, event.thing].all()
    assert torch.equal(hides, clip.visible_share < HIDDEN)
    covered = torch.zeros_like(clip.hidden_by, dtype=torch.bool)
    for event in clip.occlusions:
        covered[event.first : event.last + 1, event.thing, event.by] = True
        assert event.by > event.thing
    assert torch.equal(covered, clip.hidden_by > 0)


@quick
@given(seeds)
def test_what_moves_is_heard(seed: int) -> None:
    clip = Clips(seed=seed, frames=6, still=0.4)[0]
    assert clip.audio.shape == (9600,)
    assert clip.audio.abs().max() <= 1
    for k in range(6):
        piece = clip.audio[1600 * k : 1600 * (k + 1)].double().numpy()
        spectrum = np.abs(np.fft.rfft(piece * np.hanning(1600))) / 400
        for c, shape in enumerate(CLASSES):
            near = np.abs(np.fft.rfftfreq(1600, 1 / 16000) - TONES[shape]) < 12
            heard = spectrum[near].max() > 0.02
            sounders = [i for i, t in enumerate(clip.things) if t.shape == shape and clip.moving[k, i]]
            assert heard == bool(clip.tags[k, c]) or len(sounders) > 1, (k, shape)


def test_screens_hide_what_moves_behind_them() -> None:
    clips = [Clips(frames=12, screens=1, still=0.0, things=(1, 1))[i] for i in range(20)]
    assert all(len(clip.things) == 2 and clip.motions[1] == STAYS for clip in clips)
    assert all((clip.hidden_by[:, 0, 1] > 0).any() for clip in clips if clip.motions[0].startswith("moves"))
    assert sum(e.verb == "hides" for clip in clips for e in clip.actions) > 8


def test_every_thing_is_seen_well_in_some_frame() -> None:
    for world in (Clips(frames=6, things=(4, 4)), Clips(frames=6, things=(4, 4), visible=0.9)):
        assert all(world[i].visible_share.amax(0).min() >= world.visible for i in range(5))
    hiding = Clips(frames=6, things=(4, 4), visible=0.0)
    assert min(hiding[i].visible_share.amax(0).min() for i in range(20)) < 0.6
    with pytest.raises(ValueError, match=r"visible=1\.0 of each"):
        Clips(size=(32, 32), frames=2, things=(7, 7), visible=1.0)[0]


def test_a_silent_clip_and_a_single_frame() -> None:
    silent = Clips(still=1.0)[0]
    assert silent.audio.abs().max() == 0
    assert not silent.tags.any()
    assert not silent.sounding.any()
    assert set(silent.motions) == {STAYS}
    one = Clips(frames=1, still=0.0)[0]
    assert one.frames.shape[0] == 1
    assert one.tags.any()
    assert one.audio.shape == (1600,)
    assert set(Clips().panels(one)) == {"caption", "frame 0", "things 0", "sound"}


def test_all_motions_are_drawn_and_can_be_chosen() -> None:
    seen = {motion for i in range(40) for motion in Clips(size=(32, 32))[i].motions}
    assert seen == {*MOTIONS, STAYS}
    chosen = Clips(motions=("circles",), shapes=("star",), still=0.0, screens=0)[3]
    assert set(chosen.motions) == {"circles"}
    assert {thing.shape for thing in chosen.things} == {"star"}


def test_a_clip_is_its_number_and_nothing_else() -> None:
    world = Clips(size=(32, 40))
    again = replace(world)
    assert torch.equal(world[7].frames, again[7].frames)
    assert torch.equal(world[7].audio, again[7].audio)
    assert not torch.equal(world[7].audio, world[8].audio)
    for other in (replace(world, seed=1), replace(world, split="val")):
        assert not torch.equal(world[7].centres[:, :1], other[7].centres[:, :1])


def test_panels() -> None:
    clip = Clips()[0]
    panels = Clips().panels(clip)
    assert panels.pop("caption") == clip.caption
    assert all(panel.shape[0] == 3 and panel.min() >= 0 and panel.max() <= 1 for panel in panels.values())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": (16, 64)}, r"size=\(16, 64\) is too small"),
        ({"frames": 0}, "frames=0"),
        ({"fps": 7}, "fps=7 must divide the 16000"),
        ({"things": (0, 2)}, r"things=\(0, 2\)"),
        ({"things": (2, 8)}, r"things=\(2, 8\) and screens=1"),
        ({"screens": -1}, "screens=-1"),
        ({"shapes": ()}, r"shapes=\(\) must name"),
        ({"shapes": ("blob",)}, "shapes='blob'"),
        ({"shapes": ("house",)}, "shapes='house'"),
        ({"motions": ("stays",)}, "motions='stays'"),
        ({"still": 1.5}, r"still=1\.5"),
        ({"visible": -0.1}, r"visible=-0\.1"),
        ({"active": (0.0, 1.0)}, r"active=\(0\.0, 1\.0\)"),
        ({"travel": (0.5, 0.9)}, r"travel=\(0\.5, 0\.9\)"),
    ],
)
def test_bad_worlds(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Clips(**arguments)
