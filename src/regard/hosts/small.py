"""Small models of other libraries, to be trained: architectures by their sizes, with the libraries' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.hosts.painter import Painter
from regard.ops.positions import axial_sincos


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

    model: Any = VisionTransformer(
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
    nn.init.normal_(model.patch_embed.proj.weight, std=(channels * patch * patch) ** -0.5)
    _see(
        image // patch,
        model.pos_embed[0],
        [(*block.attn.qkv.weight.chunk(3), block.attn.proj.weight) for block in model.blocks],
        num_heads,
    )
    return model


def early_vit(
    image: int, patch: int, channels: int, classes: int, dim: int, num_heads: int, depth: int, registers: int
) -> nn.Module:
    """:func:`vit` whose patches, a power of two wide, are read by a :class:`~regard.hosts.stem.Stem`."""
    from timm.layers import HybridEmbed

    from regard.hosts.stem import Stem

    model: Any = vit(image, patch, channels, classes, dim, num_heads, depth, registers)
    stem = Stem(channels, patch, dim)
    model.patch_embed = HybridEmbed(stem, img_size=image, patch_size=1, proj=False, embed_dim=dim)
    return model


def words_tokenizer(words: Sequence[str], length: int) -> Any:
    """A tokenizer of transformers with a token a word; the first three words are padding, start and end.

    Args:
        words: the vocabulary; a word's number is its place.
        length: tokens that texts are padded to.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    padding, start, end = words[:3]
    whole = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=padding))
    whole.pre_tokenizer = WhitespaceSplit()
    whole.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=[(start, 1), (end, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, model_max_length=length, pad_token=padding, bos_token=start, eos_token=end
    )


def painter(words: Sequence[str], size: int, widths: tuple[int, ...], text_dim: int, window: int) -> Painter:
    """A :class:`Painter` of ``size`` x ``size`` pixels whose UNet attends at each of its levels, in four heads."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=text_dim,
        intermediate_size=4 * text_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=window,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    unet: Any = UNet2DConditionModel(
        sample_size=size // Painter.FOLD,
        in_channels=3 * Painter.FOLD**2,
        out_channels=3 * Painter.FOLD**2,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        cross_attention_dim=text_dim,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    unet.to(memory_format=torch.channels_last)
    return Painter(unet, CLIPTextModel(text), words_tokenizer(words, window))


def _vision(size: int, patch: int, dim: int, depth: int) -> dict[str, Any]:
    """Facts of a CLIP vision tower with four heads."""
    return {
        "image_size": size,
        "patch_size": patch,
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
    }


def _see(side: int, positions: Tensor, layers: Sequence[tuple[Tensor, ...]], num_heads: int) -> None:
    """Initial values with which a small vision tower learns soon: each patch is set off from what is near and alike.

    Positions on the grid are as large as the patches, q and k of a head are one random projection, and what is read is
    subtracted. After Asher Trockman, J. Zico Kolter, Mimetic Initialization of Self-Attention Layers, 2023, arXiv:2305.09828.

    Args:
        side: patches along a side of the picture.
        positions: (side * side, dim).
        layers: for each the weights of q, k, v and of the output.
    """
    dim = positions.shape[1]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    with torch.no_grad():
        positions.copy_(axial_sincos(torch.stack([rows, columns], -1).flatten(0, 1), dim, base=20.0))
        for q, k, v, out in layers:
            for head in q.split(dim // num_heads):
                nn.init.orthogonal_(head, gain=1.5)
            k.copy_(q)
            nn.init.orthogonal_(v)
            out.copy_(-0.5 * v.T)


def _see_clip(tower: Any) -> None:
    """:func:`_see` for a CLIP vision tower, whose patches a :class:`~regard.hosts.stem.Stem` reads from now on."""
    from regard.hosts.stem import Stem

    config = tower.config
    tower.embeddings.patch_embedding = Stem(3, config.patch_size, config.hidden_size)
    embeddings, attention = tower.embeddings, [layer.self_attn for layer in tower.encoder.layers]
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    _see(
        config.image_size // config.patch_size,
        embeddings.position_embedding.weight[1:],
        [tuple(getattr(one, name).weight for name in projections) for one in attention],
        config.num_attention_heads,
    )


def _read(tower: Any) -> None:
    """Initial values with which a small text tower tells words apart: the end token reads all of them, undiminished."""
    for layer in tower.encoder.layers:
        nn.init.orthogonal_(layer.self_attn.v_proj.weight)
        nn.init.orthogonal_(layer.self_attn.out_proj.weight)


def clip(
    words: Sequence[str], window: int, size: int, patch: int, dim: int, depth: tuple[int, int], joint: int
) -> nn.Module:
    """transformers' CLIP with equally wide towers, of words and of patches, that meet in ``joint`` numbers.

    Patches, a power of two wide, are read by a :class:`~regard.hosts.stem.Stem`, for which timm is needed too.

    Args:
        words: as in :func:`words_tokenizer`, but that sentences end with the number after the last word: transformers takes an
            end of 2 for whatever number is the highest in a sentence.
        depth: layers of the text tower and of the vision tower.
    """
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(words) + 1,
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": depth[0],
        "num_attention_heads": 4,
        "max_position_embeddings": window,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": len(words),
    }
    config = CLIPConfig(text_config=text, vision_config=_vision(size, patch, dim, depth[1]), projection_dim=joint)
    model = CLIPModel(config)
    _see_clip(model.vision_model)
    _read(model.text_model)
    return model


def llava(words: int, size: int, patch: int, tower: tuple[int, int], dim: int, depth: int, context: int) -> nn.Module:
    """transformers' Llava: a CLIP vision tower (width, depth) as in :func:`clip`, and a Llama of four heads over two key heads.

    Args:
        words: in the vocabulary; the number after the last stands for a place of the image.
        context: longest sequence, image included.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=words + 1,
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**_vision(size, patch, *tower)),
        vision_feature_layer=-1,
        image_seq_length=(size // patch) ** 2,
    )
    config.image_token_id = words
    model: Any = LlavaForConditionalGeneration(config)
    seeing = model.model.vision_tower
    _see_clip(seeing)
    # Llava takes what is before the tower's last norm, which then has nothing to learn from.
    seeing.post_layernorm.requires_grad_(False)
    return model


def resnet(channels: int, classes: int, width: int) -> nn.Module:
    """timm's ResNet of four stages of one block for small images: the first stage at full size, the last at an eighth."""
    from timm.models.resnet import BasicBlock, ResNet

    model = ResNet(
        BasicBlock,  # type: ignore[arg-type]
        (1, 1, 1, 1),
        num_classes=classes,
        in_chans=channels,
        channels=(width, 2 * width, 4 * width, 8 * width),
        stem_width=width,
    )
    model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, padding=1, bias=False)  # type: ignore[assignment, arg-type]
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model
