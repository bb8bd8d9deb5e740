"""Keys taken out of a cache: the model goes on as if they were masked, at the positions they would have had."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

import regard as rg
from regard.core.call import Call
from regard.hosts.tiny import tiny_llama
from regard.nn import Attention, Rotary
from regard.ops.positions import rotary_angles

STEPS = 6


def llama() -> nn.Module:
    return tiny_llama()[0]


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0))


def recent(call: Call) -> Tensor | None:
    """The first two keys and the latest four."""
    s = call.k.shape[2]
    if s <= 6:
        return None
    return torch.tensor([0, 1, *range(s - 4, s)]).expand(call.k.shape[0], -1)


def heavy(call: Call) -> Tensor:
    """For each key head the five keys that received most, and the latest."""
    b, g, s = call.k.shape[:3]
    most = call.received().unflatten(1, (g, -1)).sum(2)[..., : s - 1].topk(min(5, s - 1)).indices
    return torch.cat((most, torch.full((b, g, 1), s - 1)), -1).sort(-1).values


def decode(model: nn.Module, prompt: Tensor, mask: Tensor) -> Tensor:
    cache, tokens, logits = DynamicCache(config=model.config), prompt, []
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for _ in range(STEPS):
        out = model(input_ids=tokens, attention_mask=mask, use_cache=True, **{name: cache})
        logits.append(out.logits[:, -1])
        tokens, mask = out.logits[:, -1:].argmax(-1), torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return torch.stack(logits, 1)


def masked(choose: Callable[[Call], Tensor | None]) -> tuple[rg.Edit, rg.Edit]:
    """The same in a cache that keeps everything: what would have been forgotten is masked ever after."""
    alive: dict[str, Tensor] = {}

    def allow(call: Call) -> Tensor:
        b, g, s = call.k.shape[:3]
        seen = alive.get(call.site, torch.ones(b, g, 0, dtype=torch.bool))
        now = alive[call.site] = torch.cat((seen, torch.ones(b, g, s - seen.shape[2], dtype=torch.bool)), 2)
        return now.repeat_interleave(call.q.shape[1] // g, 1)[:, :, None]

    def choice(out: Tensor, call: Call) -> Tensor:
        now = alive[call.site]
        held = Call(call.q, *(x[now].view(*x.shape[:2], -1, x.shape[-1]) for x in (call.k, call.v)), scale=call.scale)
        inside = now[:, :, None].repeat_interleave(call.q.shape[1] // now.shape[1], 1)
        if call.mask is not None:
            held.mask = call.mask.expand(*call.q.shape[:3], -1)[inside.expand(*call.q.shape[:3], -1)].view(
                *call.q.shape[:3], -1
            )
        held.mixed, held.causal, held.site = call.mixed, call.causal, call.site
        index = choose(held)
        if index is not None:
            index = index if index.ndim == 3 else index[:, None].expand(*now.shape[:2], -1)
            places = now.nonzero()[:, 2].view(*now.shape[:2], -1).gather(2, index)
            alive[call.site] = torch.zeros_like(now).scatter(2, places, True)
        return out

    return rg.Edit("mask", allow), rg.Edit.out(choice)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("choose", [recent, heavy])
@pytest.mark.parametrize("swapped", [False, True])
@torch.no_grad()
def test_forgotten_keys_are_masked_keys(choose: Callable[[Call], Tensor | None], padded: bool, swapped: bool) -> None:
    model = llama().double()
    prompt, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[1, :3] = 0
    rg.sites(model, input_ids=prompt, attention_mask=mask)
    where = "*.self_attn"
    if swapped:
        rg.swap(model, "*.self_attn", Attention)
        rg.sites(model, input_ids=prompt, attention_mask=mask)
        where = "*.self_attn.layer"
    plain = decode(model, prompt, mask)
    with rg.edit(model, rg.Edit.cache(choose), where=where):
        ours = decode(model, prompt, mask)
    with rg.edit(model, *masked(choose), where=where):
        theirs = decode(model, prompt, mask)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    assert not torch.allclose(ours, plain)
    assert torch.equal(ours[:, 0], plain[:, 0])
    assert torch.equal(decode(model, prompt, mask), plain)


@torch.no_grad()
def test_keeping_everything_is_the_identity_and_a_budget_holds_in_generate() -> None:
    model = llama()
    rg.sites(model, input_ids=ids(1, 9))
    settings = {
        "max_new_tokens": 7,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    plain = model.generate(ids(2, 9), **settings)
    for edit in (rg.Edit.cache(lambda call: None), rg.Edit.cache(recent, strength=0)):
        with rg.edit(model, edit, where="*.self_attn"):
            same = model.generate(ids(2, 9), **settings)
        assert torch.equal(same.sequences, plain.sequences)
        for a, b in zip(same.past_key_values.layers, plain.past_key_values.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
    with rg.edit(model, rg.Edit.cache(recent), where="model.layers.1.self_attn"):
        cut = model.generate(ids(2, 9), **settings)
        beams = model.generate(ids(2, 9), **settings, num_beams=3)
    assert [layer.keys.shape[2] for layer in cut.past_key_values.layers] == [15, 6]
    assert cut.past_key_values.layers[1].get_seq_length() == 15
    assert beams.sequences.shape == (2, 16)


@torch.no_grad()
def test_an_own_layer_with_its_own_cache() -> None:
    torch.manual_seed(0)
    layer = Attention(dim=24, num_heads=3, causal=True).double()
    layer.rotary = Rotary(rotary_angles(torch.ones((), dtype=torch.float64), 8))
    model = nn.ModuleDict({"attn": layer})
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    model.forward = model["attn"].forward  # type: ignore[method-assign]
    cache = layer.new_cache(2, 12, dtype=torch.float64)
    with rg.edit(model, rg.Edit.cache(recent), where="attn"):
        steps = [layer(token, cache=cache) for token in x.split(1, 1)]
    assert cache.length == 6
    assert cache.position == 12
    mask = torch.ones(12, 12, dtype=torch.bool)
    alive: list[int] = []
    for i in range(12):
        alive.append(i)
        mask[i] = False
        mask[i, alive] = True
        alive = alive if len(alive) <= 6 else [0, 1, *alive[-4:]]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x, mask=mask[None].expand(2, -1, -1)), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="were forgotten"):
        cache.crop(3)


@torch.no_grad()
def test_what_cannot_be_kept_is_refused() -> None:
    model = llama()
    rg.sites(model, input_ids=ids(1, 9))
    with rg.edit(model, rg.Edit.cache(recent)), pytest.raises(ValueError, match="no cache to edit"):
        model(input_ids=ids(1, 9), use_cache=False)
    for wrong in (
        torch.tensor([[3, 2]]),
        torch.tensor([[0, 9]]),
        torch.tensor([[0.5]]),
        torch.zeros(1, 3, 2, dtype=torch.long),
    ):
        with (
            rg.edit(model, rg.Edit.cache(lambda call, wrong=wrong: wrong)),
            pytest.raises(ValueError, match="to keep must"),
        ):
            model(input_ids=ids(1, 9), use_cache=True)
    assert torch.isfinite(model(input_ids=ids(1, 9)).logits).all()
    with pytest.raises(ValueError, match="on \\(1\\) or off"):
        rg.Edit.cache(recent, strength=0.5)
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
        )
    ).eval()
    rg.sites(gemma, input_ids=ids(1, 9))
    with rg.edit(gemma, rg.Edit.cache(recent)), pytest.raises(ValueError, match="without a window"):
        gemma(input_ids=ids(1, 9), use_cache=True)
