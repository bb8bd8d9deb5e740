"""Layers in the place of the causal self-attention of transformers decoders."""

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

import regard as rg
from regard.hosts.tiny import tiny_llama
from regard.nn import Attention


def llama(**more: object) -> nn.Module:
    return tiny_llama(**more)[0]


def qwen2() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config).eval()


def opt() -> nn.Module:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=61,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return OPTForCausalLM(config).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "build",
    [
        llama,
        lambda: llama(head_dim=6),
        lambda: llama(attention_bias=True),
        lambda: llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}),
        lambda: llama(
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1000.0,
                "original_max_position_embeddings": 16,
            }
        ),
        qwen2,
        opt,
    ],
)
def test_plain_attention_with_carried_weights_is_the_host(build: object) -> None:
    model = build()  # type: ignore[operator]
    left = torch.ones(3, 9, dtype=torch.long)
    left[1, :4] = 0
    inputs = {"input_ids": ids(3, 9), "attention_mask": left}
    with torch.no_grad():
        plain = model(**inputs).logits
        with rg.swap(model, "*.self_attn", Attention) as handle:
            assert all(done == ["q", "k", "v", "out"] for done in handle.carried.values())
            swapped = model(**inputs).logits
        valid = left.bool()
        torch.testing.assert_close(swapped[valid], plain[valid], atol=2e-6, rtol=0)
        assert torch.equal(model(**inputs).logits, plain)


def test_generation_with_the_hosts_cache() -> None:
    model = llama()
    prompt = {"input_ids": ids(2, 6), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(**prompt, **settings)
    with rg.swap(model, "*.self_attn", Attention):
        assert torch.equal(model.generate(**prompt, **settings), plain)
    with rg.swap(model, "*.self_attn", "rela"):
        cached = model.generate(**prompt, **settings)
        assert torch.equal(model.generate(**prompt, **settings, use_cache=False), cached)
        assert not torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["rela", "moba", "selective-self-attention", "multi-query-attention"])
def test_a_swapped_decoder_trains_a_step(name: str) -> None:
    model = llama()
    rg.swap(model, "*.self_attn", name)
    tokens = ids(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def test_a_swapped_decoder_stays_causal_and_is_captured() -> None:
    model = llama()
    rg.swap(model, "model.layers.*.self_attn", "rela")
    tokens, other = ids(1, 10), ids(1, 10).clone()
    other[0, 7:] = 5
    with torch.no_grad(), rg.capture(model, "model.layers.1.self_attn*") as cap:
        before = model(input_ids=tokens).logits
    assert torch.equal(model(input_ids=other).logits[:, :7], before[:, :7])
    weights = next(iter(cap.items()))[1].weights()
    assert weights.shape == (1, 4, 10, 10)
    assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rates_that_change_with_the_length_are_refused(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    model = llama(rope_parameters=rope)
    with pytest.raises(ValueError, match=f"of kind {kind}"):
        rg.swap(model, "*.self_attn", "rela")


def test_layers_that_cannot_stand_there_are_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match="cannot be causal"):
        rg.swap(model, "*.self_attn", "rela", causal=False)
    with pytest.raises(ValueError, match="grid"):
        rg.swap(model, "*.self_attn", "nat")
    with rg.swap(model, "*.self_attn", "rela"), pytest.raises(ValueError, match="use a cache that grows"):
        model.generate(input_ids=ids(1, 4), max_new_tokens=3, cache_implementation="static", pad_token_id=0)
