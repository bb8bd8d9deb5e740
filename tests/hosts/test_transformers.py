"""Every kind of transformers model: sites are found and verified, weights are the host's own, edits do what they say."""

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.core.call import OpaqueSite

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def _t(name: str):
    return getattr(transformers, name)


def _llava(implementation: str) -> nn.Module:
    config = _t("LlavaConfig")(
        text_config=_t("LlamaConfig")(**DECODER),
        vision_config=_t("CLIPVisionConfig")(**VISION),
        image_token_id=98,
        vision_feature_layer=-1,
        attn_implementation=implementation,
    )
    return _t("LlavaForConditionalGeneration")(config)


def _detr(implementation: str) -> nn.Module:
    backbone = _t("ResNetConfig")(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = _t("DetrConfig")(
        use_timm_backbone=False,
        backbone_config=backbone,
        backbone=None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
    )
    return _t("DetrModel")(config)


# name: (model of an attention implementation, its inputs, sites, kinds in order of first appearance)
HOSTS = {
    "llama": (
        lambda i: _t("LlamaForCausalLM")(_t("LlamaConfig")(**DECODER, attn_implementation=i)),
        {"input_ids": IDS},
        2,
        {"self"},
    ),
    "qwen2": (
        lambda i: _t("Qwen2ForCausalLM")(_t("Qwen2Config")(**DECODER, attn_implementation=i)),
        {"input_ids": IDS},
        2,
        {"self"},
    ),
    "gemma2": (
        lambda i: _t("Gemma2ForCausalLM")(
            _t("Gemma2Config")(**DECODER, head_dim=8, attn_logit_softcapping=0.5, attn_implementation=i)
        ),
        {"input_ids": IDS},
        2,
        {"self"},
    ),
    "gpt2": (
        lambda i: _t("GPT2LMHeadModel")(
            _t("GPT2Config")(
                vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, attn_implementation=i
            )
        ),
        {"input_ids": IDS},
        2,
        {"self"},
    ),
    "bert": (
        lambda i: _t("BertModel")(_t("BertConfig")(**TEXT, attn_implementation=i)),
        {"input_ids": IDS, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()},
        2,
        {"self"},
    ),
    "t5": (
        lambda i: _t("T5ForConditionalGeneration")(
            _t("T5Config")(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, attn_implementation=i)
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
        6,
        {"self", "cross"},
    ),
    "vit": (
        lambda i: _t("ViTModel")(_t("ViTConfig")(**VISION, attn_implementation=i)),
        {"pixel_values": IMAGE},
        2,
        {"self"},
    ),
    "dinov2": (
        lambda i: _t("Dinov2Model")(_t("Dinov2Config")(**VISION, attn_implementation=i)),
        {"pixel_values": IMAGE},
        2,
        {"self"},
    ),
    "clip": (
        lambda i: _t("CLIPVisionModel")(_t("CLIPVisionConfig")(**VISION, attn_implementation=i)),
        {"pixel_values": IMAGE},
        2,
        {"self"},
    ),
    "siglip": (
        lambda i: _t("SiglipVisionModel")(_t("SiglipVisionConfig")(**VISION, attn_implementation=i)),
        {"pixel_values": IMAGE},
        3,
        {"self", "cross"},
    ),
    "detr": (_detr, {"pixel_values": IMAGE}, 5, {"self", "cross"}),
    "llava": (
        _llava,
        {"input_ids": torch.cat([IDS[:, :2], torch.full((2, 16), 98), IDS[:, 2:]], 1), "pixel_values": IMAGE},
        4,
        {"self"},
    ),
}
# Soft-capping has no fused form in transformers, so this host is always eager.
EAGER_ONLY = {"gemma2"}


def build(name: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    make, inputs, _, _ = HOSTS[name]
    model = make("eager" if name in EAGER_ONLY else implementation).eval().to(dtype)
    return model, {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


def first(output) -> Tensor:
    return output[0]


@pytest.mark.parametrize("name", HOSTS)
def test_every_site_is_found_and_verified(name: str) -> None:
    model, inputs = build(name)
    found = rg.sites(model, **inputs)
    _, _, count, kinds = HOSTS[name]
    assert len(found) == count
    assert not found.refused, found
    assert {s.kind for s in found} == kinds
    assert all(s.error < 1e-5 for s in found)


@pytest.mark.parametrize("name", HOSTS)
def test_reading_leaves_the_output_to_the_bit(name: str) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        before = first(model(**inputs))
        with rg.capture(model) as cap:
            during = first(model(**inputs))
        after = first(model(**inputs))
    assert len(cap) == HOSTS[name][2]
    assert torch.equal(before, during)
    assert torch.equal(before, after)


def _eager_weights(model: nn.Module, inputs: dict) -> list[Tensor]:
    """Weights that every attention module itself returned, in the order in which they ran."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output) -> None:
        maps = [x for x in output if isinstance(x, Tensor) and x.ndim == 4] if isinstance(output, tuple) else []
        seen.extend(maps[-1:])

    hooks = [
        m.register_forward_hook(keep)
        for n, m in model.named_modules()
        if type(m).__name__.endswith("Attention") and not list(m.children())[:0]
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "bert", "t5", "vit", "dinov2", "clip"])
def test_weights_are_the_hosts_own(
    name: str, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some eager functions of transformers ask for their softmax in float32: not here, or float64 would be no oracle.
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None, **_: x.softmax(dim))
    fused, inputs = build(name, "sdpa", dtype)
    eager, _ = build(name, "eager", dtype)
    eager.load_state_dict(fused.state_dict())
    eager_maps = _eager_weights(eager, inputs)
    with rg.capture(fused) as cap, torch.no_grad():
        fused(**inputs)
    ours = [call.weights() for _, call in cap.items()]
    # The eager host gives several modules' outputs a map; T5's position bias is one of them and no map of weights.
    theirs = [w for w in eager_maps if torch.allclose(w.sum(-1), torch.ones_like(w.sum(-1)), atol=1e-4)]
    theirs = [w for i, w in enumerate(theirs) if i == 0 or w is not theirs[i - 1]]
    assert len(ours) == len(theirs)
    for mine, own in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, own.to(mine.dtype), atol=bound, rtol=0)


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5"])
def test_gradients_of_weights_are_autograds(name: str) -> None:
    fused, inputs = build(name, "sdpa", torch.float64)
    eager, _ = build(name, "eager", torch.float64)
    eager.load_state_dict(fused.state_dict())
    with rg.capture(fused, grad=True) as cap:
        first(fused(**inputs)).square().sum().backward()
    probe: dict[str, Tensor] = {}

    def leaf(site: str):
        def change(weights: Tensor, call) -> Tensor:
            probe[site] = torch.zeros_like(weights, requires_grad=True)
            return weights + probe[site]

        return change

    rg.sites(eager, **inputs)
    with rg.edit(eager, rg.Edit.weights(lambda w, call: leaf(call.site)(w, call))):
        first(eager(**inputs)).square().sum().backward()
    for site, call in cap.items():
        torch.testing.assert_close(call.weights_grad(), probe[site].grad, atol=1e-9, rtol=1e-6)


def test_left_padding_hides_the_padding() -> None:
    model, _ = build("llama")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with rg.capture(model) as cap, torch.no_grad():
        model(input_ids=IDS, attention_mask=mask)
    weights = cap["model.layers.1.self_attn"].weights()
    assert weights.shape == (2, 4, 9, 9)
    assert float(weights[0, :, 3:, :3].abs().max()) == 0.0
    torch.testing.assert_close(weights[0, :, 3:].sum(-1), torch.ones(4, 6))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_inside_generate(cache: str) -> None:
    model, _ = build("llama")
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    rows: list[Tensor] = []

    class Reader(rg.core.capture.Capture):  # reads each step before the static cache is written again
        def saw(self, tap, call, out, seam):
            out = super().saw(tap, call, out, seam)
            if tap.name == "model.layers.1.self_attn":
                rows.append(call.weights(rows=-1))
            return out

    with Reader(model) as cap:
        watched = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(plain, watched)
    calls = cap.calls("model.layers.1.self_attn")
    assert [c.step.index for c in calls] == [0, 1, 2, 3]
    with rg.capture(model) as whole, torch.no_grad():
        model(input_ids=watched[:, :-1])
    full = whole["model.layers.1.self_attn"].weights()
    for i, row in enumerate(rows):
        seen = 9 + i
        torch.testing.assert_close(row[:, :, 0, :seen], full[:, :, seen - 1, :seen], atol=1e-5, rtol=0)
        assert float(row[:, :, 0, seen:].abs().sum()) == 0.0


def test_a_static_cache_read_too_late_is_refused() -> None:
    model, _ = build("llama")
    with rg.capture(model) as cap:
        model.generate(
            IDS,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )
    with pytest.raises(OpaqueSite, match="overwritten in place"):
        cap.calls("model.layers.0.self_attn")[0].weights()


def test_image_tokens_of_a_language_model() -> None:
    model, inputs = build("llava")
    found = rg.sites(model, **inputs)
    language = [s for s in found if "language_model" in s.name]
    assert str(language[0].tokens_k) == "system[2] + image[16] + instruction[7]"
    with rg.capture(model, "*language_model*") as cap, torch.no_grad():
        model(**inputs)
    mass = cap[language[0].name].role_mass()
    torch.testing.assert_close(sum(mass.values()), torch.ones(2, 4, 25))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_edits_equal_their_definition(name: str, implementation: str) -> None:
    model, inputs = build(name, implementation, torch.float64)
    rg.sites(model, **inputs)
    factor = torch.rand(9, dtype=torch.float64) + 0.5
    where = [s for s in rg.sites(model, **inputs) if s.keys == 9][-1].name
    lowered = rg.Edit.scale_keys(range(9), factor)
    defined = rg.Edit.weights(lambda w, call: w * factor)
    bias = torch.randn(9, dtype=torch.float64)
    pairs = [
        (lowered, defined),
        (
            rg.Edit.scale_keys(range(9), factor, renormalize=True),
            rg.Edit.weights(lambda w, call: w * factor / (w * factor).sum(-1, keepdim=True)),
        ),
        (rg.Edit.bias(bias), rg.Edit.scores(lambda s, b, h, q, kv: s + bias)),
        (
            rg.Edit.mask(lambda b, h, q, kv: kv != 1),
            rg.Edit.weights(lambda w, call: _without(w, 1)),
        ),
    ]
    with torch.no_grad():
        plain = first(model(**inputs))
        for cheap, exact in pairs:
            with rg.edit(model, cheap, where=where):
                one = first(model(**inputs))
            with rg.edit(model, exact, where=where):
                two = first(model(**inputs))
            # The eager functions of transformers may take the softmax in float32.
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
            assert not torch.allclose(one, plain, atol=1e-5)
            assert torch.equal(first(model(**inputs)), plain)


def _without(weights: Tensor, key: int) -> Tensor:
    kept = weights.clone()
    kept[..., key] = 0
    total = kept.sum(-1, keepdim=True)
    return torch.where(total > 1e-9, kept / total.clamp_min(1e-9), weights)


def test_nothing_is_left_in_the_interface() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, inputs = build("llama")
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ZeroDivisionError), rg.edit(model, rg.Edit.v(lambda v, call: v / (1 // 0))):
        model(**inputs)
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert all("_regard_taps" not in m.__dict__ and not m._forward_hooks for m in model.modules())


def test_another_model_is_not_touched() -> None:
    one, inputs = build("llama")
    other, _ = build("llama")
    with torch.no_grad():
        plain = first(other(**inputs))
        with rg.edit(one, rg.Edit.v(lambda v, call: v * 0)):
            assert torch.equal(first(other(**inputs)), plain)
            assert not torch.equal(first(one(**inputs)), plain)


def test_swap_into_an_encoder_trains_a_step() -> None:
    from regard.nn import Attention

    model, inputs = build("bert")
    with torch.no_grad():
        plain = first(model(**inputs))
    valid = inputs["attention_mask"].bool()
    handle = rg.swap(model, "*.attention.self", Attention)
    assert handle.carried["encoder.layer.0.attention.self"][:3] == ["q", "k", "v"]
    torch.testing.assert_close(first(model(**inputs))[valid], plain[valid], atol=1e-6, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = first(model(**inputs))[valid].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    handle.undo()
    assert type(model.encoder.layer[0].attention.self).__name__ == "BertSelfAttention"
