"""Random-feature attention learns averages over keys that random features of the whole input do not; a shift helps some of them.

Set-up: a query and 8 keys on the sphere in 12 dimensions, 300 heads, a perceptron with as many coefficients, 200 to 2,000
training samples. Errors are those of 1,000 unseen samples, over the variance of the target; the ridge is chosen on 1,000
others. Targets are means over the keys: of a ReLU of the key alone, of the square and of the cube of its correlation with
the query. The shift is 4 throughout. Number of keys: 4 to 32, 800 samples, the ReLU of the key.

Bar, with three seeds and 2,000 samples: of the key alone, attention has at most 0.4 of the error of the perceptron; of the
square, the shifted attention has at most 0.6 and both others at least 0.9; of the cube, attention has at most 0.6 and the
perceptron at least 0.9. With 200 samples the shift lowers the error of the cube. From 4 to 32 keys the error of
attention grows at most 1.5 times and that of the perceptron at least 2 times. Reported without a bar: where the shift
stops helping or hurts, for the first seed with other shifts too.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

import torch

from regard.claims.claim import Budget, Row, mean_row
from regard.studies.random_feature_attention_study import (
    DIM,
    HEADS,
    MLP,
    PLAIN,
    SHIFTED,
    RandomFeatureAttention,
    compare,
    layers,
)

SEEDS = 3
KEYS, SQUARE, CUBE = "keys alone", "correlation squared", "correlation cubed"
SHIFTS = (1.0, 2.0, 8.0)
Errors = dict[tuple[str, str, int], list[float]]


def errors(num_keys: int, samples: tuple[int, ...], seeds: Iterable[int], targets: tuple[str, ...]) -> Errors:
    """By target, model and number of samples: one error a seed."""
    found: Errors = {}
    for seed in seeds:
        world = torch.Generator().manual_seed(seed)
        for row in compare(layers(num_keys, world), num_keys, samples, world, targets):
            key = str(row["target"]), str(row["model"]), int(row["samples"])
            found.setdefault(key, []).append(float(row["error"]))
    return found


def shifts(samples: int) -> list[Row]:
    world = torch.Generator().manual_seed(0)
    models = {f"{c:g}": RandomFeatureAttention(DIM, HEADS, shift=c, generator=world) for c in SHIFTS}
    rows = compare(models, 8, (samples,), world, (KEYS, SQUARE, CUBE))
    return [Row(f"{row['target']}: error with a shift of {row['model']}", float(row["error"])) for row in rows]


def run(budget: Budget, seeds: int) -> list[Row]:
    few, many, fixed = (20, 40, 20) if budget == "smoke" else (200, 2000, 800)
    found = errors(8, (few, many), range(seeds), (KEYS, SQUARE, CUBE))
    mean = {key: fmean(values) for key, values in found.items()}
    learned, alone = mean[KEYS, PLAIN, many], mean[KEYS, MLP, many]
    rows = [
        Row(f"{KEYS}: error of attention", learned, 0.4 * alone, "<=", alone, tuple(found[KEYS, PLAIN, many]), "mlp"),
        mean_row(f"{SQUARE}: error of shifted attention", found[SQUARE, SHIFTED, many], 0.6, "<="),
        mean_row(f"{SQUARE}: error of attention", found[SQUARE, PLAIN, many], 0.9, ">="),
        mean_row(f"{SQUARE}: error of the mlp", found[SQUARE, MLP, many], 0.9, ">="),
        mean_row(f"{CUBE}: error of attention", found[CUBE, PLAIN, many], 0.6, "<="),
        mean_row(f"{CUBE}: error of the mlp", found[CUBE, MLP, many], 0.9, ">="),
    ]
    plain = mean[CUBE, PLAIN, few]
    more = {"baseline": plain, "note": "not shifted"}
    rows.append(
        mean_row(f"{CUBE}: error of shifted attention, {few} samples", found[CUBE, SHIFTED, few], plain, "<", **more)
    )
    for target in (KEYS, CUBE):
        rows.append(Row(f"{target}: error of shifted attention", mean[target, SHIFTED, many], baseline=mean[target, PLAIN, many],
                        note="not shifted"))  # fmt: skip
    by_keys = {n: errors(n, (fixed,), range(seeds), (KEYS,)) for n in (4, 8, 16, 32)}
    for model, bar, direction in ((PLAIN, 1.5, "<="), (MLP, 2.0, ">=")):
        values = tuple(fmean(by_keys[n][KEYS, model, fixed]) for n in by_keys)
        name = f"{KEYS}: growth of the error from 4 to 32 keys, {model}"
        rows.append(Row(name, values[-1] / values[0], bar, direction, values=values))  # type: ignore[arg-type]
    return rows + shifts(many)
