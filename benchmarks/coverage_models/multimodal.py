"""Hugging Face models of text and images, and a few of neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from coverage_models.building import Builder, hugging_face, images, random, text, tokens

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_TOWERS = {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16}


def _text_and(other: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {**text(), **other()}


def _towers(model: str, **config: Any) -> Builder:
    """One encoder for text, one for images."""
    return hugging_face(model, _text_and(images()), **{**_TOWERS, **config})


def _siglip2() -> dict[str, Any]:
    mask = torch.ones(2, 16, dtype=torch.long)
    shapes = torch.tensor([[4, 4], [4, 4]])
    return {"pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _layoutlmv3() -> dict[str, Any]:
    return {**text(), **images()(), "bbox": torch.randint(0, 32, (2, 12, 4)).sort(-1).values}


def _llava() -> dict[str, Any]:
    """The first 16 tokens stand for the patches of the image."""
    places = torch.full((2, 16), 63)
    return {"input_ids": torch.cat([places, tokens().clamp(max=62)], 1), **images()()}


def _pix2struct() -> dict[str, Any]:
    """Every patch begins with its row and column."""
    positions = torch.randint(0, 4, (2, 16, 2)).float()
    return {"flattened_patches": torch.cat([positions, torch.randn(2, 16, 192)], -1)}


def _trajectories() -> dict[str, Any]:
    return {
        "states": torch.randn(2, 6, 4),
        "actions": torch.randn(2, 6, 3),
        "rewards": torch.randn(2, 6, 1),
        "returns_to_go": torch.randn(2, 6, 1),
        "timesteps": torch.arange(6).repeat(2, 1),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }


MULTIMODAL: dict[str, Builder] = {
    "clip": _towers("CLIPModel"),
    "siglip": _towers("SiglipModel"),
    "siglip2_vision": hugging_face("Siglip2VisionModel", _siglip2, **_VISION, num_patches=16),
    "chinese_clip": _towers("ChineseCLIPModel"),
    "groupvit": _towers(
        "GroupViTModel",
        projection_intermediate_dim=64,
        vision_config={**_VISION, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]},
    ),
    "blip": _towers("BlipModel", text_config={**_TEXT, "encoder_hidden_size": 32}),
    "blip2_qformer": hugging_face(
        "Blip2QFormerModel",
        random(query_embeds=(2, 4, 32), encoder_hidden_states=(2, 5, 32)),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        encoder_hidden_size=32,
    ),
    "git": hugging_face(
        "GitModel",
        _text_and(images()),
        **{**_TEXT, "max_position_embeddings": 32},
        vision_config=_VISION,
        use_cache=False,
    ),
    "vilt": hugging_face("ViltModel", _text_and(images()), **_TEXT, image_size=32, patch_size=8, max_image_length=-1),
    "flava": hugging_face(
        "FlavaModel",
        _text_and(images()),
        text_config=_TEXT,
        image_config=_VISION,
        multimodal_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        hidden_size=32,
        projection_dim=16,
    ),
    "visual_bert": hugging_face(
        "VisualBertModel", _text_and(random(visual_embeds=(2, 4, 16))), **_TEXT, visual_embedding_dim=16
    ),
    "lxmert": hugging_face(
        "LxmertModel",
        _text_and(random(visual_feats=(2, 4, 16), visual_pos=(2, 4, 4))),
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=16,
    ),
    "layoutlmv3": hugging_face(
        "LayoutLMv3Model",
        _layoutlmv3,
        **_TEXT,
        input_size=32,
        patch_size=8,
        coordinate_size=4,
        shape_size=8,
        max_2d_position_embeddings=64,
    ),
    "llava": hugging_face(
        "LlavaModel",
        _llava,
        text_config={
            **_TEXT,
            "model_type": "llama",
            "max_position_embeddings": 32,
            "num_key_value_heads": 1,
            "use_cache": False,
        },
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        image_token_id=63,
        vision_feature_layer=-1,
    ),
    "pix2struct_vision": hugging_face(
        "Pix2StructVisionModel",
        _pix2struct,
        hidden_size=32,
        patch_embed_hidden_size=192,
        d_ff=64,
        d_kv=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        seq_len=16,
    ),
    "perceiver": hugging_face(
        "PerceiverModel",
        random(inputs=(2, 12, 16)),
        num_latents=4,
        d_latents=32,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    ),
    "decision_transformer": hugging_face(
        "DecisionTransformerModel",
        _trajectories,
        state_dim=4,
        act_dim=3,
        hidden_size=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
    ),
}
