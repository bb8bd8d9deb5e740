"""Rollout sums over paths, flow is the linear program, and both read models of three libraries."""

import itertools

import networkx
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

import regard as rg
from regard.checks.explainer import TinyViT
from regard.explainers import attention_flow as module
from regard.explainers.attention_flow import (
    AttentionFlow,
    AttentionGraph,
    attention_flow,
    attention_rollout,
    encoder_decoder,
    mixing,
)
from regard.nn import Attention


def random_weights(layers: int, n: int, b: int = 1, h: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(layers, b, h, n, n, dtype=torch.float64, generator=generator)
    return list(scores.softmax(-1))


def linear_program(layers: list[Tensor], target: int, source: int) -> float:
    """Maximum flow by its definition: one variable an edge, conservation at every inner node."""
    depth, n = len(layers), len(layers[0])
    edges = [(l, i, j) for l in range(1, depth + 1) for i in range(n) for j in range(n)]
    balance = {(l, i): np.zeros(len(edges)) for l in range(depth + 1) for i in range(n)}
    for e, (l, i, j) in enumerate(edges):
        balance[l, i][e] -= 1
        balance[l - 1, j][e] += 1
    inner = [row for node, row in balance.items() if node not in {(depth, target), (0, source)}]
    # Only the source may send and only the sink may keep.
    capacity = [(0.0, float(layers[l - 1][i, j])) for l, i, j in edges]
    done = linprog(-balance[0, source], A_eq=np.array(inner), b_eq=np.zeros(len(inner)), bounds=capacity)
    return -done.fun


def test_rollout_is_the_sum_over_all_paths() -> None:
    attn = random_weights(3, 4)
    low, middle, top = (layer[0].tolist() for layer in mixing(attn))
    expected = [[0.0] * 4 for _ in range(4)]
    for i, j, k, m in itertools.product(range(4), repeat=4):
        expected[i][m] += top[i][j] * middle[j][k] * low[k][m]
    torch.testing.assert_close(
        attention_rollout(attn)[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("depth", "n"), [(3, 4), (4, 6)])
def test_flow_is_the_linear_program_and_networkx(depth: int, n: int) -> None:
    attn = random_weights(depth, n, seed=depth)
    flow = attention_flow(attn, normalize=False)[0]
    layers = [layer[0] for layer in mixing(attn)]
    graph = AttentionGraph(layers).to_networkx()
    for target, source in itertools.product(range(n), (0, n - 1)):
        found = float(flow[target, source])
        assert abs(found - linear_program(layers, target, source)) < 1e-6
        theirs = networkx.maximum_flow_value(
            graph, (depth, target), (0, source), flow_func=networkx.algorithms.flow.edmonds_karp
        )
        assert abs(found - theirs) < 1e-6


def test_graph_has_the_paper_s_nodes() -> None:
    layers = [layer[0] for layer in mixing(random_weights(2, 3))]
    graph = AttentionGraph(layers)
    full = graph.adjacency()
    assert full.shape == (9, 9)
    assert full.count_nonzero() == 18
    torch.testing.assert_close(full[3:6, :3], layers[0])
    torch.testing.assert_close(full[6:, 3:6], layers[1])
    network = graph.to_networkx()
    assert set(network.nodes) == {(l, i) for l in range(3) for i in range(3)}
    assert network.edges[(2, 1), (1, 0)]["capacity"] == float(layers[1][1, 0])


def test_rollout_invariants() -> None:
    attn = random_weights(4, 5, b=3)
    rollout = attention_rollout(attn)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(3, 5, dtype=torch.float64))
    alone = attention_rollout([a[1:2] for a in attn])
    torch.testing.assert_close(rollout[1:2], alone)
    torch.testing.assert_close(attention_rollout([a.flip(1) for a in attn]), rollout)
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = attention_rollout([a[..., order, :][..., order] for a in attn])
    torch.testing.assert_close(moved, rollout[:, order][..., order])
    identity = torch.eye(5).expand(2, 3, 5, 5)
    assert torch.equal(attention_rollout([identity] * 3), torch.eye(5).expand(2, 5, 5))
    causal = [a.tril() / a.tril().sum(-1, keepdim=True) for a in attn]
    assert torch.equal(attention_rollout(causal), attention_rollout(causal).tril())
    torch.testing.assert_close(
        attention_rollout(attn, residual=0.0), attn[3].mean(1) @ attn[2].mean(1) @ attn[1].mean(1) @ attn[0].mean(1)
    )


def test_deep_layer_stands_on_the_left() -> None:
    copy_first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    rollout = attention_rollout([copy_first[None, None], swap[None, None]], residual=0.0)
    assert torch.equal(rollout[0], swap @ copy_first)
    assert not torch.equal(rollout[0], copy_first @ swap)


@pytest.mark.parametrize("seed", range(4))
def test_flow_lies_between_rollout_and_what_the_input_gives(seed: int) -> None:
    attn = random_weights(3, 5, b=2, seed=seed)
    flow, rollout = attention_flow(attn, normalize=False), attention_rollout(attn)
    assert (flow >= rollout - 1e-8).all()
    assert (flow <= mixing(attn)[0].sum(1, keepdim=True).clamp_max(1) + 1e-8).all()
    torch.testing.assert_close(attention_flow(attn), flow / flow.sum(-1, keepdim=True))
    torch.testing.assert_close(
        attention_flow(attn, targets=[4, 1], sources=[2], normalize=False), flow[:, [4, 1]][..., [2]]
    )


def test_one_layer_is_its_own_flow_and_rollout() -> None:
    attn = random_weights(1, 6)
    torch.testing.assert_close(attention_flow(attn), mixing(attn)[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(attention_rollout(attn), mixing(attn)[0])
    one = torch.ones(1, 1, 1, 1)
    assert attention_flow([one]).item() == attention_rollout([one]).item() == 1


def test_masked_rows_and_padding() -> None:
    attn = random_weights(3, 4)
    padded = []
    for a in attn:
        wide = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
        wide[..., :4, :4] = a
        padded.append(wide)
    for function in (attention_rollout, attention_flow):
        found = function(padded)
        torch.testing.assert_close(found[:, :4, :4], function(attn))
        assert found[:, :4, 4:].count_nonzero() == 0
        assert torch.equal(found[0, 4:], torch.eye(6).double()[4:])


def test_half_precision_is_widened() -> None:
    attn = random_weights(3, 7)
    rough = attention_rollout([a.bfloat16() for a in attn])
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.sum(-1), torch.ones(1, 7))
    torch.testing.assert_close(rough.double(), attention_rollout(attn), rtol=0.02, atol=0.01)


def test_encoder_decoder_is_the_graph_with_cross_edges() -> None:
    encoder, decoder = random_weights(2, 3, b=2), random_weights(2, 2, b=2, seed=1)
    cross = [torch.randn(2, 2, 2, 3, dtype=torch.float64).softmax(-1) for _ in decoder]
    layers = encoder_decoder(encoder, decoder, cross)
    assert len(layers) == 6
    rollout = attention_rollout(layers)
    top = attention_rollout(encoder)
    half = torch.eye(2, dtype=torch.float64) / 2
    own, reads = torch.eye(2, dtype=torch.float64).expand(2, 2, 2), torch.zeros(2, 2, 3, dtype=torch.float64)
    for d, c in zip(decoder, cross, strict=True):
        step = d.mean(1) / 2 + half
        own, reads = step @ own, step @ reads
        own, reads = own / 2, reads / 2 + c.mean(1) @ top / 2
    torch.testing.assert_close(rollout[:, :3, :3], top)
    torch.testing.assert_close(rollout[:, 3:, :3], reads)
    torch.testing.assert_close(rollout[:, 3:, 3:], own)
    flow = attention_flow(layers, targets=[3, 4], sources=[0, 1, 2], normalize=False)
    assert (flow >= reads - 1e-8).all()

    # The paper's drawing: decoder nodes have edges straight to the top of the encoder, whose nodes pass at most 1.
    graph = networkx.DiGraph()
    item = 1
    for depth, layer in enumerate(mixing(encoder), 1):
        for i, j in itertools.product(range(3), range(3)):
            graph.add_edge(("e", depth, i), ("e", depth - 1, j), capacity=float(layer[item, i, j]))
    for depth, (d, c) in enumerate(zip(decoder, cross, strict=True)):
        self_step = (d.mean(1) / 2 + half)[item]
        for i in range(2):
            for j in range(2):
                graph.add_edge(("s", depth, i), ("d", depth, j), capacity=float(self_step[i, j]))
            graph.add_edge(("d", depth + 1, i), ("s", depth, i), capacity=0.5)
            for j in range(3):
                graph.add_edge(("d", depth + 1, i), ("e", 2, j), capacity=float(c.mean(1)[item, i, j] / 2))
    for i, j in itertools.product(range(2), range(3)):
        assert abs(networkx.maximum_flow_value(graph, ("d", 2, i), ("e", 0, j)) - float(flow[item, i, j])) < 1e-6


def test_bad_weights_are_refused() -> None:
    good = random_weights(2, 4)
    with pytest.raises(ValueError, match="attn is empty"):
        attention_rollout([])
    with pytest.raises(ValueError, match=r"attn\[1\] must be \(b, h, n, n\)"):
        attention_rollout([good[0], good[1][0]])
    with pytest.raises(ValueError, match=r"attn\[1\] has 3 tokens"):
        attention_rollout([good[0], random_weights(1, 3)[0]])
    with pytest.raises(ValueError, match=r"attn\[0\] holds negative"):
        attention_rollout([good[0] - 0.3])
    with pytest.raises(ValueError, match=r"attn\[0\] holds .*NaN"):
        attention_rollout([good[0] * float("nan")])
    with pytest.raises(ValueError, match="rows that sum to"):
        attention_flow([good[0] * 1.01])
    with pytest.raises(ValueError, match=r"residual=1\.5"):
        attention_rollout(good, residual=1.5)
    with pytest.raises(ValueError, match=r"target=4 is outside 0\.\.3"):
        attention_flow(good, targets=[4])
    with pytest.raises(ValueError, match="decoder and cross"):
        encoder_decoder(good, good, good[:1])


def test_many_pairs_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.PAIRS == 10_000
    monkeypatch.setattr(module, "PAIRS", 9)
    attn = random_weights(1, 4)
    attention_flow(attn, targets=[0, 1, 2], sources=[0, 1, 2])
    with pytest.warns(UserWarning, match="3 x 4 maximum flows on 8 nodes"):
        attention_flow(attn, targets=[0, 1, 2])


def named_vit() -> TinyViT:
    model = TinyViT().eval()
    rg.tokens(model, q="cls + image[3,4]")
    return model


def test_explainer_reads_the_class_row_of_every_item() -> None:
    model, image = named_vit(), torch.randn(3, 3, 12, 16)
    with rg.capture(model) as cap, torch.no_grad():
        model(image)
    attn = [call.weights() for call in cap.sequence()]
    for name, function in (("attention-flow-rollout", attention_rollout), ("attention-flow", attention_flow)):
        found = rg.explain(model, image, name)
        torch.testing.assert_close(found.values.flatten(1), function(attn)[:, 0, 1:])
        later = rg.explain(model, image, name, start_layer=1, token="image").values.flatten(1)
        torch.testing.assert_close(later, function(attn[1:])[:, 1:, 1:].mean(1))


def test_explainer_on_timm() -> None:
    timm = pytest.importorskip("timm")
    size = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), **size).eval()
    found = rg.explain(model, torch.randn(2, 3, 48, 64), "attention-flow-rollout")
    assert found.grid == (3, 4)
    pooled = timm.create_model("vit_tiny_patch16_224", img_size=48, class_token=False, global_pool="avg", **size).eval()
    flow = rg.explain(pooled, torch.randn(1, 3, 48, 48), "attention-flow")
    torch.testing.assert_close(flow.values.sum((1, 2)), torch.ones(1))
    windows = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(1, 2), embed_dim=16
    ).eval()
    with pytest.raises(ValueError, match="windows or among other tokens"):
        rg.explain(windows, torch.randn(1, 3, 56, 56), "attention-flow-rollout")


def test_explainer_on_text_with_padding() -> None:
    transformers = pytest.importorskip("transformers")
    size = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**size)).eval()
    ids = torch.randint(5, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    both = rg.explain(model, {"input_ids": ids, "attention_mask": mask}, "attention-flow", token=0).values
    alone = rg.explain(model, {"input_ids": ids[1:, :5]}, "attention-flow", token=0).values
    torch.testing.assert_close(both[1, :5], alone[0], rtol=0, atol=1e-6)
    assert both[1, 5:].count_nonzero() == 0
    mean = rg.explain(
        model, {"input_ids": ids, "attention_mask": mask}, "attention-flow-rollout", token=slice(None)
    ).values
    cut = rg.explain(model, {"input_ids": ids[1:, :5]}, "attention-flow-rollout", token=slice(None)).values
    torch.testing.assert_close(mean[1, :5], cut[0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="nothing says which token"):
        rg.explain(model, {"input_ids": ids}, "attention-flow-rollout")


def test_a_causal_model_is_read_at_its_last_token() -> None:
    model = torch.nn.Sequential(Attention(8, 2, causal=True), Attention(8, 2, causal=True))
    x = torch.randn(2, 5, 8)
    found = rg.explain(model, x, "attention-flow-rollout").values
    torch.testing.assert_close(found, rg.explain(model, x, "attention-flow-rollout", token=4).values)
    first = rg.explain(model, x, "attention-flow-rollout", token=0).values
    assert torch.equal(first, torch.tensor([[1.0, 0, 0, 0, 0]] * 2))
    marked = torch.zeros(2, 5, dtype=torch.bool)
    marked[0, 4] = marked[1, 0] = True
    both = rg.explain(model, x, "attention-flow-rollout", token=marked).values
    torch.testing.assert_close(both, torch.stack([found[0], first[1]]))
    with pytest.raises(ValueError, match="mark rows of every item"):
        rg.explain(model, x, "attention-flow-rollout", token=marked & False)
    with pytest.raises(ValueError, match="start_layer=2 leaves none"):
        rg.explain(model, x, AttentionFlow(start_layer=2))
