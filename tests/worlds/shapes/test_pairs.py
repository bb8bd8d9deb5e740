"""Every edit is there, every sentence is true, and nothing else differs."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.shapes.facts import truth
from regard.worlds.shapes.language import Vocabulary, referents
from regard.worlds.shapes.pairs import EDITS, Pairs

WORLD = Pairs(edits=(0, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9_999))
def test_edits_and_sentences(index: int) -> None:
    sample = WORLD[index]
    before, after = sample.before.scene.things, sample.after.scene.things
    for edit in sample.edits:
        old = None if edit.before is None else before[edit.before]
        new = None if edit.after is None else after[edit.after]
        assert (old is None, new is None) == (edit.kind == "appear", edit.kind == "disappear")
        Vocabulary().encode(edit.sentence)
        name, _, rest = edit.sentence.partition(" has ")
        if name.startswith("the "):
            assert referents(name, truth(sample.before)) == [edit.before]
        if old and new:
            differ = [f for f in ("shape", "colour", "centre") if getattr(old, f) != getattr(new, f)]
            assert differ == {"move": ["centre"], "recolour": ["colour"], "reshape": ["shape"]}[edit.kind]
            dx, dy = new.centre[0] - old.centre[0], new.centre[1] - old.centre[1]
            expected = {
                "recolour": f"turned {new.colour}",
                "reshape": f"become a {new.shape}",
                "move": "moved "
                + (("right" if dx > 0 else "left") if abs(dx) >= abs(dy) else ("down" if dy > 0 else "up")),
            }
            assert rest == expected[edit.kind]
        elif new:
            assert edit.sentence == f"a {new.kind} has appeared"
        else:
            assert rest == "disappeared"
    edited = ({e.before for e in sample.edits}, {e.after for e in sample.edits})
    kept = [[t for i, t in enumerate(ts) if i not in out] for ts, out in zip((before, after), edited)]
    assert kept[0] == kept[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9_999))
def test_pictures_differ_where_they_should(index: int) -> None:
    sample = WORLD[index]
    moved = (sample.images[0] - sample.images[1]).abs().amax(0) > 0.02
    near = torch.nn.functional.max_pool2d(sample.changed[None].float(), 5, 1, 2)[0] > 0
    assert not (moved & ~near).any()
    assert moved.any() == bool(sample.edits)
    if not sample.edits:
        assert sample.sentences == ("nothing has changed",)


def test_all_kinds_come_and_noise_and_light_touch_the_pictures_only() -> None:
    kinds = Counter(edit.kind for i in range(60) for edit in WORLD[i].edits)
    assert set(kinds) == set(EDITS)
    dim = Pairs(light=0.2, noise=0.05)[0]
    assert not torch.equal(dim.images[0], dim.before.image)
    assert (dim.images[0] - dim.before.image).std() < 0.06
