"""Tiny models of every library with random weights, each with the inputs of one call: what checks and tests work on.

A library is imported when one of its models is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Hosted = tuple[nn.Module, dict[str, Tensor]]
IMAGE_ID = 98


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def tiny_vit(dim: int = 32, num_heads: int = 4, *, grid: tuple[int, int] = (3, 5)) -> Hosted:
    """timm's ViT: one block over a ``grid`` of patches without a class token, five classes."""
    from timm.models.vision_transformer import VisionTransformer

    size = (4 * grid[0], 4 * grid[1])
    with _seeded():
        model = VisionTransformer(
            img_size=size,
            patch_size=4,
            embed_dim=dim,
            depth=1,
            num_heads=num_heads,
            mlp_ratio=2.0,
            num_classes=5,
            class_token=False,
            global_pool="avg",
        )
        return model.eval(), {"x": torch.randn(2, 3, *size)}


def tiny_resnet() -> Hosted:
    """timm's ResNet: four stages of one block, five classes; ``layer2`` gives 6 x 8 places."""
    from timm.models.resnet import BasicBlock, ResNet

    with _seeded():
        model = ResNet(
            BasicBlock,  # type: ignore[arg-type]
            (1, 1, 1, 1),
            channels=(8, 8, 16, 16),
            stem_width=8,
            num_classes=5,
        )
        return model.eval(), {"x": torch.randn(2, 3, 48, 64)}


def tiny_vit_transformers() -> Hosted:
    """The ViT of transformers: two layers over a class token and 3 x 4 patches, five classes."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=(24, 32),
        patch_size=8,
        initializer_range=0.3,
    )
    config.num_labels = 5
    with _seeded():
        model = ViTForImageClassification(config)
        return model.eval(), {"pixel_values": torch.randn(2, 3, 24, 32)}


class EncoderClassifier(nn.Module):
    """torch's own transformer encoder, two layers over a class token and twelve patches, five classes."""

    def __init__(self, dim: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.patch_size = 8
        self.patch = nn.Conv2d(3, dim, self.patch_size, self.patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 13, dim))
        layer = nn.TransformerEncoderLayer(dim, num_heads, 2 * dim, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.encoder(x)[:, 0])


def tiny_encoder() -> Hosted:
    """:class:`EncoderClassifier`, on images of 2 x 6 patches."""
    with _seeded():
        model = EncoderClassifier()
        return model.eval(), {"x": torch.randn(2, 3, 16, 48)}


def tiny_vlm(num_kv_heads: int = 2) -> Hosted:
    """Llava with four decoder layers of four heads, and two prompts of 25 tokens, 16 of which are an image."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.4,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    config = LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1)
    config.image_token_id = IMAGE_ID
    with _seeded():
        model = LlavaForConditionalGeneration(config)
        ids = torch.randint(3, 90, (2, 25))
        ids[0, 2:18] = ids[1, 4:20] = IMAGE_ID
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32)}
        return model.eval(), inputs


def tiny_unet() -> Hosted:
    """The UNet of Stable Diffusion over 8 x 8 latents: two prompts of 77 tokens, the unconditional half of four rows first."""
    from diffusers import UNet2DConditionModel

    with _seeded():
        model: Any = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        inputs = {"sample": torch.randn(4, 4, 8, 8), "timestep": torch.tensor(3)}
        return model.eval(), {**inputs, "encoder_hidden_states": 3 * torch.randn(4, 77, 16)}


def tiny_joint() -> Hosted:
    """Flux, one block of two streams and one of a single stream, over 77 text tokens and 4 x 4 latents; rows as in a UNet."""
    from diffusers import FluxTransformer2DModel

    with _seeded():
        model: Any = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        )
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        inputs = {
            "hidden_states": torch.randn(4, 16, 4),
            "encoder_hidden_states": 3 * torch.randn(4, 77, 16),
            "pooled_projections": torch.randn(4, 8),
            "timestep": torch.full((4,), 0.3),
            "img_ids": torch.stack([torch.zeros(4, 4), rows, columns], -1).flatten(0, 1),
            "txt_ids": torch.zeros(77, 3),
        }
        return model.eval(), inputs


def as_double(hosted: Hosted) -> Hosted:
    """The model and its floating-point inputs in float64."""
    model, inputs = hosted
    return model.double(), {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def tiny_llama(**more: Any) -> Hosted:
    """transformers' Llama: two layers, four query heads and two key heads, 61 words; ``more`` goes to its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    facts: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    with _seeded():
        model = LlamaForCausalLM(LlamaConfig(**facts | more))
        return model.eval(), {"input_ids": torch.randint(3, 61, (2, 9))}
