"""The rules by explicit loops, on self-, cross- and co-attention of this library, torch, timm and transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.checks.explainer import TinyViT
from regard.explainers.generic_attribution import RelevancePropagation, gradient_weighted, propagate, topology
from regard.nn import Attention

TWO = {"text.*": "text", "image.*": "image", "both.*": [("text", "image"), ("image", "text")]}
Matrix = list[list[float]]


class Kept(Attention):
    """Eager attention that keeps its weights for autograd: the oracle of weights and gradients."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        weights.retain_grad()
        self.log.append((self.name, weights))
        return weights @ v


class CoAttention(nn.Module):
    """Two text and two image layers around two modules of co-attention; answers come from the first text token."""

    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.text, self.image = (
            nn.ModuleList(attention(8, 2) for _ in range(2)),
            nn.ModuleList(attention(8, 2) for _ in range(2)),
        )
        self.both = nn.ModuleList(attention(8, 2) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        for own, seen, both in zip(self.text, self.image, self.both, strict=True):
            text, image = text + own(text), image + seen(image)
            text, image = text + both(text, image), image + both(image, text)
        return self.head(text[:, 0])


def twins(make: Callable[[type[Attention]], nn.Module]) -> tuple[nn.Module, nn.Module, list[tuple[str, Tensor]]]:
    """The same model fused and eager, and the list that the eager one writes its weights to."""
    fused, eager = make(Attention).double().eval(), make(Kept).double().eval()
    for p in fused.parameters():
        nn.init.normal_(p, std=0.4)
    eager.load_state_dict(fused.state_dict())
    log: list[tuple[str, Tensor]] = []
    for name, m in eager.named_modules():
        if isinstance(m, Kept):
            m.name, m.log = name, log
    return fused, eager, log


def averaged(weights: Tensor, item: int) -> Matrix:
    assert weights.grad is not None
    heads, l, s = weights.shape[1:]
    a, g = weights[item].tolist(), weights.grad[item].tolist()
    return [[sum(max(0.0, a[h][i][j] * g[h][i][j]) for h in range(heads)) / heads for j in range(s)] for i in range(l)]


def times(a: Matrix, b: Matrix) -> Matrix:
    return [[sum(a[i][k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))] for i in range(len(a))]


def plus(a: Matrix, b: Matrix) -> Matrix:
    return [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def flipped(a: Matrix) -> Matrix:
    return [list(row) for row in zip(*a, strict=True)]


def normal(own: Matrix) -> Matrix:
    n = len(own)
    out = [[0.0] * n for _ in range(n)]
    for i in range(n):
        total = sum(own[i]) - 1
        for j in range(n):
            one = 1.0 if i == j else 0.0
            out[i][j] = one + ((own[i][j] - one) / total if total > 0 else 0.0)
    return out


def by_loops(
    steps: list[tuple[str, str, Matrix] | tuple[str, str, Matrix, Matrix]], sizes: dict[str, int]
) -> dict[str, Matrix]:
    """The rules, element by element; a step of four is co-attention."""
    r = {
        s + q: [[float(s == q and i == j) for j in range(sizes[q])] for i in range(sizes[s])]
        for s in sizes
        for q in sizes
    }
    for s, q, *abar in steps:
        old = dict(r)
        if s == q:
            for k in sizes:
                r[s + k] = plus(old[s + k], times(abar[0], old[s + k]))
            continue
        for a, x, y in zip(abar, (s, q), (q, s), strict=False):
            r[x + y] = plus(old[x + y], times(flipped(normal(old[x + x])), times(a, normal(old[y + y]))))
            r[x + x] = plus(old[x + x], times(a, old[y + x]))
    return r


def test_co_attention_equals_loops() -> None:
    fused, eager, log = twins(CoAttention)
    inputs = {"text": torch.randn(2, 3, 8).double(), "image": torch.randn(2, 4, 8).double()}
    target = torch.tensor([2, 0])
    eager(**inputs).gather(1, target[:, None]).sum().backward()
    # The last gaze of the image at the text changes nothing that the answer reads.
    unused = log.pop()[1]
    assert unused.grad is None
    for of, _size in (("text", 3), ("image", 4)):
        found = rg.explain(
            fused, inputs, "generic-attribution", target=target, topology=TWO, stream="text", of=of, token=0
        ).values
        for item in range(2):
            a = [averaged(w, item) for _, w in log]
            steps = [("t", "t", a[0]), ("i", "i", a[1]), ("t", "i", a[2], a[3])]
            steps += [("t", "t", a[4]), ("i", "i", a[5]), ("t", "i", a[6])]
            expected = by_loops(steps, {"t": 3, "i": 4})["t" + of[0]][0]
            expected = [0.0, *expected[1:]] if of == "text" else expected
            torch.testing.assert_close(found[item], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
            assert found[item].max() > 1e-3


class EncoderDecoder(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(attention(8, 2) for _ in range(2))
        self.decoder = nn.ModuleList(nn.ModuleList([attention(8, 2), attention(8, 2)]) for _ in range(2))
        self.query = nn.Parameter(torch.zeros(1, 3, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = x + layer(x)
        q = self.query.expand(len(x), -1, -1)
        for own, cross in self.decoder:
            q = q + own(q)
            q = q + cross(q, x)
        return self.head(q)


@pytest.mark.parametrize("n", [5, 3])
def test_encoder_decoder_equals_loops(n: int) -> None:
    """Also where both have the same number of tokens, so that sizes tell nothing."""
    fused, eager, log = twins(EncoderDecoder)
    x = torch.randn(2, n, 8).double()
    eager(x)[:, 1, 3].sum().backward()
    found = rg.explain(fused, x, "generic-attribution", target=lambda out: out[:, 1, 3], token=1).values
    own = rg.explain(fused, x, "generic-attribution", target=lambda out: out[:, 1, 3], token=1, of="decoder").values
    for item in range(2):
        steps = [
            (*streams, averaged(w, item))
            for streams, (_, w) in zip(["ee", "ee", "dd", "de", "dd", "de"], log, strict=True)
        ]
        r = by_loops(steps, {"e": n, "d": 3})
        torch.testing.assert_close(found[item], torch.tensor(r["de"][1], dtype=torch.float64), rtol=0, atol=1e-10)
        expected = [x if j != 1 else 0.0 for j, x in enumerate(r["dd"][1])]
        torch.testing.assert_close(own[item], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_one_layer_is_identity_plus_attention() -> None:
    model = nn.Sequential(Attention(8, 2), nn.Flatten(), nn.Linear(40, 3))
    with rg.capture(model, grad=True) as cap:
        model(torch.randn(2, 5, 8))[:, 1].sum().backward()
    call = cap["0"]
    abar = (call.weights() * call.weights_grad()).clamp_min(0).mean(1)
    rg.sites(model, torch.randn(2, 5, 8))
    torch.testing.assert_close(propagate(topology(cap)).matrix("tokens", "tokens"), torch.eye(5) + abar)


def test_rules_keep_their_invariants() -> None:
    weights = torch.rand(3, 2, 4)
    r, swapped = RelevancePropagation({"t": 2, "i": 4}), RelevancePropagation({"i": 2, "t": 4})
    for one, (t, i) in ((r, "ti"), (swapped, "it")):
        one.self_attention(t, torch.full((3, 2, 2), 0.3))
        one.self_attention(i, weights.transpose(1, 2) @ weights)
        one.cross_attention(t, i, weights)
        one.co_attention(t, i, weights, weights.transpose(1, 2))
    for s, q in ("tt", "ti", "it", "ii"):
        other = {"t": "i", "i": "t"}
        assert torch.equal(r.matrix(s, q), swapped.matrix(other[s], other[q]))
        assert (r.matrix(s, q) >= 0).all()
    assert (r.matrix("t", "t").diagonal(dim1=1, dim2=2) >= 1).all()
    order = torch.tensor([2, 0, 3, 1])
    moved = RelevancePropagation({"t": 2, "i": 4})
    moved.self_attention("t", torch.full((3, 2, 2), 0.3))
    moved.self_attention("i", (weights.transpose(1, 2) @ weights)[:, order][:, :, order])
    moved.cross_attention("t", "i", weights[:, :, order])
    moved.co_attention("t", "i", weights[:, :, order], weights.transpose(1, 2)[:, order])
    torch.testing.assert_close(moved.matrix("t", "i"), r.matrix("t", "i")[..., order])
    still = RelevancePropagation({"t": 2, "i": 4})
    still.self_attention("t", torch.zeros(3, 2, 2))
    still.cross_attention("t", "i", torch.zeros(3, 2, 4))
    assert torch.equal(still.matrix("t", "t"), torch.eye(2).expand(3, 2, 2))
    assert not still.matrix("t", "i").any()


def test_what_comes_back_changes_the_own_relevance_only() -> None:
    """R_ss += A R_qs touches no other matrix, and begins to count once q knows of s."""
    weights = torch.rand(1, 2, 4)
    r = RelevancePropagation({"t": 2, "i": 4})
    r.cross_attention("t", "i", weights)
    assert torch.equal(r.matrix("t", "t"), torch.eye(2)[None])
    r.cross_attention("i", "t", weights.transpose(1, 2))
    before = {pair: r.matrix(*pair).clone() for pair in ("ti", "it", "ii")}
    r.cross_attention("t", "i", weights)
    torch.testing.assert_close(r.matrix("t", "t"), torch.eye(2) + weights @ before["it"])
    assert torch.equal(r.matrix("i", "t"), before["it"])
    assert torch.equal(r.matrix("i", "i"), before["ii"])


def test_wrong_weights_are_refused() -> None:
    r = RelevancePropagation({"t": 2, "i": 4})
    with pytest.raises(ValueError, match="stream='x' is not one of t, i"):
        r.matrix("t", "x")
    with pytest.raises(ValueError, match=r"weights of t looking at i must be \(b, 2, 4\)"):
        r.cross_attention("t", "i", torch.rand(1, 4, 2))
    with pytest.raises(ValueError, match="weights of i"):
        r.co_attention("t", "i", torch.rand(1, 2, 4), torch.rand(1, 2, 4))
    assert not r.matrix("t", "i").any()


def eager_score(model: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The score with every softmax in the graph, and those softmaxes."""
    kept: list[Tensor] = []

    def eager(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        kept.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        return kept[-1] @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", eager)
        return model(image).gather(1, target[:, None]).sum(), kept


def test_timm_equals_eager_autograd() -> None:
    """Maps from the fused forward are those of a twin that keeps its weights in the graph."""
    timm = pytest.importorskip("timm")
    model = (
        timm.create_model("vit_base_patch16_224", img_size=(64, 48), depth=3, embed_dim=48, num_heads=4, num_classes=5)
        .double()
        .eval()
    )
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    image = torch.randn(2, 3, 64, 48).double()
    target = torch.tensor([1, 4])
    found = rg.explain(model, image, "generic-attribution", target=target)
    assert found.grid == (4, 3)
    score, kept = eager_score(model, image, target)
    layers = [(a * g).clamp_min(0).mean(1) for a, g in zip(kept, torch.autograd.grad(score, kept), strict=True)]
    identity = torch.eye(13).double()
    expected = identity
    for abar in layers:
        expected = (identity + abar) @ expected
    torch.testing.assert_close(found.values.flatten(1), expected[:, 0, 1:].detach(), rtol=0, atol=1e-10)
    one = rg.explain(model, image[1:], "generic-attribution", target=4).values
    torch.testing.assert_close(one, found.values[1:])
    last = rg.explain(model, image, "generic-attribution", target=target, start_layer=-1).values
    torch.testing.assert_close(last.flatten(1), layers[-1][:, 0, 1:].detach(), rtol=0, atol=1e-10)


def test_frozen_models_and_kept_gradients() -> None:
    model = TinyViT().eval()
    rg.tokens(model, q="cls + image[3,4]")
    image = torch.randn(1, 3, 12, 16)
    expected = rg.explain(model, image, "generic-attribution", target=1).values
    model.requires_grad_(False)
    found = rg.explain(model, image, "generic-attribution", target=1).values
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


TEXT = {"vocab_size": 50, "d_model": 16}
IDS = torch.randint(5, 48, (2, 6), generator=torch.Generator().manual_seed(0))


def _transformers() -> Any:
    return pytest.importorskip("transformers")


def test_bert_with_padding() -> None:
    hf = _transformers()
    size = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = hf.BertForSequenceClassification(hf.BertConfig(**size, attn_implementation="sdpa")).eval()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    found = rg.explain(
        model, {"input_ids": IDS, "attention_mask": mask}, "generic-attribution", target=1, token=0
    ).values
    alone = rg.explain(model, {"input_ids": IDS[1:, :4]}, "generic-attribution", target=1, token=0).values
    torch.testing.assert_close(found[1, :4], alone[0], rtol=1e-4, atol=1e-7)
    assert found[1, 4:].count_nonzero() == 0
    assert found[:, 0].count_nonzero() == 0


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_text_encoder_decoders(kind: str) -> None:
    """Read at the token that is produced next; relevance of the source text, equal lengths or not."""
    hf = _transformers()
    if kind == "t5":
        config = hf.T5Config(**TEXT, d_kv=8, num_heads=2, d_ff=32, num_layers=2, decoder_start_token_id=0)
        model = hf.T5ForConditionalGeneration(config).eval()
    else:
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40}
        config = hf.BartConfig(
            **TEXT, **heads, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=1,
            bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )  # fmt: skip
        model = hf.BartForConditionalGeneration(config).eval()
    for length in (6, 4):
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)[:, :length]}
        source = rg.explain(model, inputs, "generic-attribution").values
        made = rg.explain(model, inputs, "generic-attribution", of="decoder").values
        assert source.shape == (2, 6)
        assert made.shape == (2, length)
        assert made[:, -1].count_nonzero() == 0
        with rg.capture(model, ("self", "cross"), grad=True) as cap:
            model(**inputs).logits[:, -1].amax(-1).sum().backward()
        calls = cap.sequence()
        a = [gradient_weighted(c) for c in calls]
        assert [c.site.split(".")[-1] for c in calls].count("EncDecAttention" if kind == "t5" else "encoder_attn") == 2
        for item in range(2):
            steps = [(*s, x[item].tolist()) for s, x in zip(["ee", "ee", "dd", "de", "dd", "de"], a, strict=True)]
            r = by_loops(steps, {"e": 6, "d": length})
            torch.testing.assert_close(source[item], torch.tensor(r["de"][-1]), rtol=1e-4, atol=1e-6)


def test_detr_query_on_a_grid_that_is_not_square() -> None:
    hf = _transformers()
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    ends = {
        f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 24))
    }
    config = hf.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, backbone=None, d_model=16, encoder_layers=1, decoder_layers=2,
        num_queries=5, num_labels=3, **ends,
    )  # fmt: skip
    model = hf.DetrForObjectDetection(config).eval()
    rg.tokens(model, q="image[4,6]", where="*encoder.layers*")
    rg.tokens(model, q="query[5]", k="image[4,6]", where="*encoder_attn")
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    image = torch.randn(2, 3, 32, 48)
    found = rg.explain(
        model, {"pixel_values": image}, "generic-attribution", target=lambda out: out.logits[:, 3, 1], token=3
    )
    assert found.values.shape == (2, 4, 6)
    assert found.values.flatten(1).std(1).min() > 0
    other = rg.explain(
        model, {"pixel_values": image}, "generic-attribution", target=lambda out: out.logits[:, 2, 1], token=2
    )
    assert not torch.allclose(found.values, other.values, rtol=1e-2)
    with pytest.raises(ValueError, match="nothing says which token"):
        rg.explain(model, {"pixel_values": image}, "generic-attribution", target=lambda out: out.logits[:, 3, 1])


def test_lxmert_and_clip() -> None:
    hf = _transformers()
    config = hf.LxmertConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=32, l_layers=1, r_layers=1, x_layers=2,
        visual_feat_dim=8, visual_pos_dim=4, num_qa_labels=5,
    )  # fmt: skip
    lxmert = hf.LxmertForQuestionAnswering(config).eval()
    boxes = torch.rand(2, 6, 4)
    inputs = {"input_ids": IDS, "visual_feats": torch.randn(2, 6, 8), "visual_pos": boxes}
    with pytest.raises(ValueError, match=r"x_layers\.0 looks at other tokens more than once"):
        rg.explain(
            lxmert, inputs, "generic-attribution", target=lambda out: out.question_answering_score[:, 2], token=0
        )
    streams = {
        "*encoder.layer.*": "text",
        "*lang_self*": "text",
        "*r_layers*": "image",
        "*visn_self*": "image",
        "*visual_attention*": [("text", "image"), ("image", "text")],
    }
    for of in ("text", "image"):
        found = rg.explain(
            lxmert, inputs, "generic-attribution", target=lambda out: out.question_answering_score[:, 2],
            token=0, stream="text", of=of, topology=streams,
        ).values  # fmt: skip
        assert found.shape == (2, 6)
        assert (found.amax(1) > 0).all()
        assert bool((found[:, 0] == 0).all()) == (of == "text")

    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = hf.CLIPConfig(
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49, "bos_token_id": 48},
        vision_config={**tower, "image_size": 16, "patch_size": 4},
        projection_dim=8,
    )
    clip = hf.CLIPModel(config).eval()
    ids = torch.cat([IDS[:, :4], torch.full((2, 1), 49)], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}

    def matching(out: Any) -> Tensor:
        return out.logits_per_image.diagonal()

    image = rg.explain(clip, inputs, "generic-attribution", target=matching, where="vision_model.*", start_layer=-1)
    text = rg.explain(clip, inputs, "generic-attribution", target=matching, where="text_model.*")
    assert image.values.shape == (2, 4, 4)
    assert text.values.shape == (2, 5)
    assert (image.values.flatten(1).std(1) > 0).all()


def test_torch_encoder_decoder() -> None:
    model = nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=True).eval()
    inputs = {"src": torch.randn(2, 5, 16), "tgt": torch.randn(2, 5, 16)}
    found = rg.explain(model, inputs, "generic-attribution", target=lambda out: out[:, 2].square(), token=2).values
    assert found.shape == (2, 5)
    assert (found.std(1) > 0).all()
    alone = {name: x[1:] for name, x in inputs.items()}
    single = rg.explain(model, alone, "generic-attribution", target=lambda out: out[:, 2].square(), token=2).values
    torch.testing.assert_close(single, found[1:], rtol=1e-4, atol=1e-6)


def test_one_token_and_a_context_from_outside() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleList([Attention(8, 2), Attention(8, 2)])])

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            for own, cross in self.blocks:
                x = x + own(x)
                x = x + cross(x, context)
            return x

    model = Reads().eval()
    inputs = {"x": torch.randn(2, 4, 8), "context": torch.randn(2, 1, 8)}
    found = rg.explain(
        model, inputs, "generic-attribution", target=lambda out: out[:, 0, 0], token=0, of="context"
    ).values
    assert found.shape == (2, 1)
    assert (found > 0).any()


def test_models_it_cannot_follow_are_refused() -> None:
    model = TinyViT().eval()
    rg.tokens(model, q="cls + image[3,4]")
    image = torch.randn(1, 3, 12, 16)
    with pytest.raises(ValueError, match=r"target=9 is outside 0\.\.4"):
        rg.explain(model, image, "generic-attribution", target=9)
    with pytest.raises(ValueError, match="no gradient reached"):
        rg.explain(model, image, "generic-attribution", target=lambda out: model.head.bias.sum())
    with pytest.raises(ValueError, match="stream='query' is not one of tokens"):
        rg.explain(model, image, "generic-attribution", stream="query")
    with pytest.raises(ValueError, match=r"says nothing of blocks\.0\.attn"):
        rg.explain(model, image, "generic-attribution", topology={"layers.*": "tokens"})
    with pytest.raises(ValueError, match="start_layer=5 leaves none of 2"):
        rg.explain(model, image, "generic-attribution", start_layer=5)
    with pytest.raises(ValueError, match="go with a method given by name"):
        rg.explain(model, image, rg.create("generic-attribution"), start_layer=1)
    timm = pytest.importorskip("timm")
    windows = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(1, 2), embed_dim=16
    ).eval()
    with pytest.raises(ValueError, match="attends in windows"):
        rg.explain(windows, torch.randn(1, 3, 56, 56), "generic-attribution")

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Attention(8, 2), Attention(8, 2)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x)[:, ::2]).mean(1)

    with pytest.raises(ValueError, match=r"blocks\.1 has 3 tokens of stream 'tokens'"):
        rg.explain(Pools(), torch.randn(2, 6, 8), "generic-attribution", token=0)
