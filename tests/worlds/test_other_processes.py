"""A world is the same in every process: nothing comes from the order of a set, from a hash, or from what was asked before."""

import subprocess
import sys

LOOKS = """
import hashlib
from regard.worlds.clips import Clips
from regard.worlds.documents import Documents
from regard.worlds.formulas import Formulas
from regard.worlds.graphs import Communities, DictionaryLookup, Distances, Triangles
from regard.worlds.recall import Copy, Needle, Recall
from regard.worlds.rooms.rooms import Rooms
from regard.worlds.shapes.scene import BACKGROUNDS, PATTERNS
from regard.worlds.shapes.world import Shapes
from regard.worlds.text import english, sha256

def seen(pixels):
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()

rich = Shapes(things=(2, 5), overlap=0.3, visible=0.6, patterns=PATTERNS, backgrounds=BACKGROUNDS, composites=True, tilt=90)
pages, formulas = Documents(skew=5.0, noise=0.1, count=30), Formulas(longest=24)
graphs = [w[7] for w in (DictionaryLookup(), Communities(), Distances(), Distances(heaviest=5), Triangles())]
sequences = [w.batch(range(9, 12)) for w in (Recall(count=50), Copy(count=50), Needle(needles=3, count=50))]
looks = [
    [seen(rich[i].image) for i in (5, 0, 3)],
    [seen(view.image) for view in Rooms()[3].views],
    seen(Clips()[2].frames),
    (pages[7].words, seen(pages[7].image)),
    [(formulas[i].markup, seen(formulas[i].image)) for i in (3, 1)],
    *((g.features.tolist(), g.edges.tolist(), g.targets.tolist(), g.target.item()) for g in graphs),
    *([t.tolist() for t in batch] for batch in sequences),
    sha256(english("val")),
]
"""


def test_the_same_in_another_process() -> None:
    here: dict[str, list[object]] = {}
    exec(LOOKS, here)
    code = f"{LOOKS}\nfor look in looks: print(look)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(look) for look in here["looks"]]
