"""Small models of other libraries, to be trained: architectures by their sizes, with the libraries' own classes."""

from __future__ import annotations

from torch import nn


def llama(vocab_size: int, dim: int, num_heads: int, num_kv_heads: int, depth: int, context: int) -> nn.Module:
    """transformers' Llama with tied embeddings: rotary positions, grouped heads, gated MLPs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def vit(
    image: int, patch: int, channels: int, classes: int, dim: int, num_heads: int, depth: int, registers: int
) -> nn.Module:
    """timm's ViT with a class token and register tokens."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=image,
        patch_size=patch,
        in_chans=channels,
        num_classes=classes,
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=2.0,
        reg_tokens=registers,
        no_embed_class=True,
    )
