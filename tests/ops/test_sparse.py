"""Sparse attention against one softmax per query, written as a loop."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.ops import sparse
from regard.ops.attend import attend
from regard.ops.select import topk_blocks
from regard.ops.windows import neighborhood_grid_index


def inputs(b: int, h: int, g: int, l: int, s: int, d: int = 5, e: int = 3) -> list[Tensor]:
    shapes = [(b, h, l, d), (b, g, s, d), (b, g, s, e)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def loop(q: Tensor, k: Tensor, v: Tensor, keys, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """``keys(b, h, i)`` lists what a query looks at."""
    (b, h, l, d), g, e = q.shape, k.shape[1], v.shape[-1]
    rows = []
    for i in range(b):
        for j in range(h):
            for t in range(l):
                at, head = keys(i, j, t), j // (h // g)
                if not at:
                    rows.append(q.new_zeros(e))
                    continue
                scores = k[i, head, at] @ q[i, j, t] * (d**-0.5 if scale is None else scale)
                if bias is not None:
                    scores = scores + bias.expand(b, h, l, -1)[i, j, t][: len(at)]
                rows.append(scores.softmax(0) @ v[i, head, at])
    return torch.stack(rows).view(b, h, l, e)


def agree(out: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (out, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


CASES = {
    "odd sizes": {"b": 2, "h": 2, "g": 2, "l": 7, "s": 11, "block_size": 4},
    "batch of one": {"b": 1, "h": 1, "g": 1, "l": 5, "s": 5, "block_size": 2},
    "grouped": {"b": 2, "h": 6, "g": 2, "l": 9, "s": 9, "block_size": 3},
    "causal": {"b": 2, "h": 4, "g": 2, "l": 6, "s": 11, "block_size": 4, "causal": True},
    "causal blocks": {"b": 2, "h": 2, "g": 1, "l": 11, "s": 11, "block_size": 4, "query_block": 4, "causal": True},
    "query blocks": {"b": 2, "h": 2, "g": 2, "l": 11, "s": 7, "block_size": 2, "query_block": 3},
    "one block": {"b": 2, "h": 2, "g": 2, "l": 4, "s": 3, "block_size": 8},
    "one query": {"b": 2, "h": 2, "g": 1, "l": 1, "s": 9, "block_size": 2, "causal": True},
    "scale": {"b": 1, "h": 2, "g": 2, "l": 7, "s": 6, "block_size": 3, "scale": 0.3},
    "shared table": {"b": 2, "h": 4, "g": 2, "l": 7, "s": 11, "block_size": 4, "table": (1, 1)},
    "key mask": {"b": 2, "h": 2, "g": 1, "l": 7, "s": 11, "block_size": 4, "mask": (2, 1, 1, 11)},
    "pair mask": {
        "b": 2,
        "h": 4,
        "g": 2,
        "l": 7,
        "s": 11,
        "block_size": 4,
        "query_block": 2,
        "mask": (2, 4, 7, 11),
        "causal": True,
    },
}


@pytest.mark.parametrize("compiling", [False, True], ids=["exact tiles", "bound on tiles"])
@pytest.mark.parametrize("chunk", [sparse.CHUNK, 100], ids=["at once", "in pieces"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_block_sparse(case: dict, chunk: int, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = dict(case)
    monkeypatch.setattr(sparse, "CHUNK", chunk)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    shape = {name: case.pop(name) for name in "bhgls"}
    b, h, l, s, size, r = shape["b"], shape["h"], shape["l"], shape["s"], case["block_size"], case.get("query_block", 1)
    leaves = inputs(**shape)
    n = -(-s // size)
    table = (*case.pop("table", (b, h)), -(-l // r), 4)
    index, valid = torch.randint(n, table), torch.rand(table) < 0.6  # blocks come twice, and rows may be empty
    valid[0, 0, 0] = False
    mask = torch.rand(case.pop("mask")) < 0.7 if "mask" in case else None
    allowed = torch.ones(b, h, l, s, dtype=torch.bool) if mask is None else mask.expand(b, h, l, s)

    def keys(i: int, j: int, t: int) -> list[int]:
        row = (i if table[0] > 1 else 0, j if table[1] > 1 else 0, t // r)
        blocks = set(index[row][valid[row]].tolist())
        late = s - l + t if case.get("causal") else s
        return [x for x in range(s) if x // size in blocks and x <= late and allowed[i, j, t, x]]

    expected = loop(*leaves, keys, case.get("scale"))
    out = sparse.block_sparse(*leaves, index, valid, mask=mask, **case)
    assert not out[0, 0, 0].any()
    agree(out, expected, leaves)
    agree(sparse.block_sparse_dense(*leaves, index, valid, mask=mask, **case), expected, leaves)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("pairs", "blocks", "width"), [(50, 7, 3), (9, 4, 8), (8, 8, 1), (0, 3, 2), (20, 1, 6)])
def test_tiles_hold_every_pair_once(pairs: int, blocks: int, width: int, compiling: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for nowhere in (0, 1):  # without and with pairs that go nowhere
        key_block = torch.randint(blocks + nowhere, (pairs,))
        pair, block = sparse._tiles(key_block, blocks, width)
        held = [(p, b) for row, b in zip(pair.tolist(), block.tolist()) for p in row if p >= 0]
        assert sorted(held) == [(p, b) for p, b in enumerate(key_block.tolist()) if b < blocks]
        assert compiling or all(p >= 0 for p in pair[:, 0].tolist())


def test_every_block_is_plain_attention() -> None:
    leaves = inputs(2, 4, 2, 9, 13)
    index = torch.arange(4).expand(2, 4, 9, 4)
    out = sparse.block_sparse(*leaves, index, torch.ones_like(index, dtype=torch.bool), block_size=4)
    agree(out, attend(*leaves, backend="reference"), leaves)


@pytest.mark.parametrize("s", [0, 6])
def test_nothing_chosen_is_zero(s: int) -> None:
    leaves = inputs(2, 2, 1, 5, s)
    index = torch.zeros(2, 2, 5, 3, dtype=torch.int64)
    out = sparse.block_sparse(*leaves, index, torch.zeros_like(index, dtype=torch.bool), block_size=4)
    assert out.shape == (2, 2, 5, 3)
    assert not out.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_everything_masked_is_zero() -> None:
    leaves = inputs(1, 2, 2, 5, 6)
    index = torch.zeros(1, 2, 5, 2, dtype=torch.int64)
    index[..., 1] = 1
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    out = sparse.block_sparse(*leaves, index, torch.ones_like(index, dtype=torch.bool), block_size=4, mask=mask)
    assert not out[:, :, 2].any()
    agree(out, attend(*leaves, mask=mask, backend="reference"), leaves)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = inputs(1, 1, 1, 4, 8)
    index = torch.tensor([0, 1]).expand(1, 1, 4, 2)
    out = sparse.block_sparse(q * 1e4, k, v, index, torch.ones_like(index, dtype=torch.bool), block_size=4)
    torch.testing.assert_close(out, attend(q * 1e4, k, v, backend="reference"), rtol=0, atol=1e-12)


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "CHUNK", 40)
    leaves = inputs(1, 2, 1, 3, 5, d=2, e=1)
    index, valid = topk_blocks(torch.randn(1, 2, 3, 3), 2)
    assert torch.autograd.gradgradcheck(lambda *x: sparse.block_sparse(*x, index, valid, block_size=2), leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in inputs(1, 2, 2, 9, 12))
    index, valid = topk_blocks(torch.randn(1, 2, 9, 3), 2)
    out = sparse.block_sparse(q, k, v, index, valid, block_size=4)
    exact = sparse.block_sparse_dense(q.double(), k.double(), v.double(), index, valid, block_size=4)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_memory_is_far_from_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "CHUNK", 1 << 14)
    l = 1024
    leaves = inputs(1, 1, 1, l, l, d=4, e=4)
    index, valid = topk_blocks(torch.randn(1, 1, l, 16), 2)
    near = neighborhood_grid_index((32, 32), 5)
    for call in (
        lambda: sparse.block_sparse(*leaves, index, valid, block_size=64),
        lambda: sparse.gather_attend(*leaves, near),
    ):
        with Largest() as largest:
            call().sum().backward()
        assert largest.numel <= 64 * l, "more than the scores of one block for every query"
    with Largest() as largest:
        attend(*leaves, backend="reference")
    assert largest.numel >= l * l


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(call) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call()
        assert out.requires_grad
        return sum(sizes.values())

    leaves = inputs(1, 1, 1, 256, 256, d=4, e=4)
    index, valid = topk_blocks(torch.randn(1, 1, 256, 4), 2)
    near = neighborhood_grid_index((16, 16), 7)
    for call in (
        lambda: sparse.block_sparse(*leaves, index, valid, block_size=64),
        lambda: sparse.gather_attend(*leaves, near),
    ):
        whole = kept(call)
        monkeypatch.setattr(sparse, "CHUNK", 1 << 12)
        assert kept(call) < whole / 2
        monkeypatch.undo()


LISTS = {
    "one list": {"b": 2, "h": 2, "g": 2, "l": 7, "s": 11, "index": (7, 4)},
    "one list, grouped": {"b": 2, "h": 6, "g": 2, "l": 7, "s": 11, "index": (7, 4)},
    "batch of one": {"b": 1, "h": 1, "g": 1, "l": 3, "s": 2, "index": (3, 5)},
    "every head's list": {"b": 2, "h": 4, "g": 2, "l": 7, "s": 11, "index": (2, 4, 7, 3)},
    "a list a sample": {"b": 2, "h": 4, "g": 2, "l": 5, "s": 6, "index": (2, 1, 5, 3)},
    "a list a head": {"b": 2, "h": 4, "g": 1, "l": 5, "s": 6, "index": (1, 4, 5, 3)},
    "empty lists": {"b": 2, "h": 4, "g": 2, "l": 5, "s": 6, "index": (5, 0)},
    "valid": {"b": 2, "h": 4, "g": 2, "l": 7, "s": 11, "index": (7, 4), "valid": (2, 4, 7, 4)},
    "valid for all": {"b": 2, "h": 4, "g": 2, "l": 7, "s": 11, "index": (2, 4, 7, 4), "valid": (7, 4)},
    "bias": {"b": 2, "h": 4, "g": 2, "l": 7, "s": 11, "index": (7, 4), "bias": (4, 7, 4)},
    "everything": {
        "b": 2,
        "h": 4,
        "g": 2,
        "l": 7,
        "s": 11,
        "index": (2, 1, 7, 4),
        "valid": (2, 1, 7, 4),
        "bias": (1, 4, 1, 4),
        "scale": 0.3,
    },
}


@pytest.mark.parametrize("chunk", [sparse.CHUNK, 100], ids=["at once", "in pieces"])
@pytest.mark.parametrize("case", LISTS.values(), ids=LISTS.keys())
def test_gather_attend(case: dict, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "CHUNK", chunk)
    leaves = inputs(**{name: case[name] for name in "bhgls"})
    b, h, l, m = case["b"], case["h"], case["l"], case["index"][-1]
    index = torch.randint(case["s"], case["index"])  # a key listed twice counts twice
    valid, bias = None, None
    if "valid" in case:
        valid = torch.rand(case["valid"]) < 0.6
        valid[..., 0, :] = False
    if "bias" in case:
        bias = torch.randn(case["bias"], dtype=torch.float64, requires_grad=True)

    def slots(i: int, j: int, t: int) -> list[int]:
        return list(range(m)) if valid is None else valid.expand(b, h, l, m)[i, j, t].nonzero()[:, 0].tolist()

    def keys(i: int, j: int, t: int) -> list[int]:
        return index.expand(b, h, l, m)[i, j, t, slots(i, j, t)].tolist()

    padded = None  # the loop reads the biases of the slots in use one after the other
    if bias is not None:
        full = bias.expand(b, h, l, m)
        rows = [full[i, j, t, slots(i, j, t)] for i in range(b) for j in range(h) for t in range(l)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).view(b, h, l, -1)
    expected = loop(*leaves, keys, case.get("scale"), padded)
    out = sparse.gather_attend(*leaves, index, valid, bias=bias, scale=case.get("scale"))
    if m == 0:
        assert not out.any()
        return
    if valid is not None:
        assert not out[:, :, 0].any()
    agree(out, expected, leaves if bias is None else [*leaves, bias])


def test_all_keys_listed_is_plain_attention() -> None:
    leaves = inputs(2, 4, 2, 9, 13)
    agree(sparse.gather_attend(*leaves, torch.arange(13).expand(9, 13)), attend(*leaves, backend="reference"), leaves)


def test_gather_attend_in_half_precision() -> None:
    q, k, v = (x.detach().to(torch.bfloat16) for x in inputs(1, 2, 1, 6, 6))
    index = torch.randint(6, (6, 3))
    exact = sparse.gather_attend(q.double(), k.double(), v.double(), index)
    out = sparse.gather_attend(q, k, v, index)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_bad_input_is_named() -> None:
    q, k, v = inputs(2, 4, 2, 6, 6)
    index = torch.zeros(2, 4, 6, 1, dtype=torch.int64)
    valid = torch.ones_like(index, dtype=torch.bool)
    for bad, names in [
        (lambda: sparse.block_sparse(q, k, v, index, valid, block_size=0), "block_size=0"),
        (lambda: sparse.block_sparse(q, k, v, index + 3, valid, block_size=2), r"blocks 0\.\.2; got 3"),
        (lambda: sparse.block_sparse(q, k, v, index[:, :, :4], valid[:, :, :4], block_size=2), "make 6"),
        (lambda: sparse.block_sparse(q, k, v, index[:, :3], valid[:, :3], block_size=2), "index"),
        (lambda: sparse.block_sparse(q, k, v, index, valid[:1], block_size=2), "valid"),
        (lambda: sparse.block_sparse(q, k[:, :, :4], v[:, :, :4], index, valid, block_size=2, causal=True), "causal"),
        (lambda: sparse.block_sparse(q[:, :3], k, v, index[:, :3], valid[:, :3], block_size=2), "multiple"),
        (lambda: sparse.gather_attend(q, k, v, index[:, :, :5]), "index must be"),
        (lambda: sparse.gather_attend(q, k, v, index - 1), r"keys 0\.\.5; got -1"),
        (lambda: sparse.gather_attend(q, k, v, index + 6), r"keys 0\.\.5; got 6"),
    ]:
        with pytest.raises(ValueError, match=names):
            bad()
