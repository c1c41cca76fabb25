"""Hugging Face vision models: images of 32 or 64 pixels, one or two blocks a stage."""

from __future__ import annotations

from typing import Any

from coverage_models.building import Builder, hugging_face, images, video

_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2],  # one stage: with more, torch.export reasons for a minute about padded sizes
    "num_heads": [2],
    "window_size": 4,
    "mlp_ratio": 2.0,
}
_PYRAMID = {
    "image_size": 64,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 32],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
}
_CVT = {
    "embed_dim": [8, 16, 32],
    "num_heads": [1, 1, 2],
    "depth": [1, 2, 3],  # no stage can be shallower: it reads the drop path rate of its own index
    "mlp_ratio": [2.0, 2.0, 2.0],
    "drop_rate": [0.0, 0.0, 0.0],
    "drop_path_rate": [0.0, 0.0, 0.0],
}
_DETR = {
    "use_timm_backbone": False,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    },
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
}


def _vit(model: str, **config: Any) -> Builder:
    return hugging_face(model, images(), **{**_VIT, **config})


def _swin(model: str, **config: Any) -> Builder:
    return hugging_face(model, images(), **{**_SWIN, **config})


def _pyramid(model: str, **config: Any) -> Builder:
    return hugging_face(model, images(64), **{**_PYRAMID, **config})


def _conv(model: str, size: int, **config: Any) -> Builder:
    return hugging_face(model, images(size), **config)


VISION: dict[str, Builder] = {
    "vit": _vit("ViTModel"),
    "deit": _vit("DeiTModel"),
    "beit": _vit("BeitModel", use_relative_position_bias=True, layer_scale_init_value=0.1),
    "dinov2": _vit("Dinov2Model", mlp_ratio=2),
    "dinov2_swiglu": _vit("Dinov2Model", mlp_ratio=2, use_swiglu_ffn=True),
    "dinov3_vit": _vit("DINOv3ViTModel", use_gated_mlp=True),
    "dinov3_convnext": _conv("DINOv3ConvNextModel", 64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1]),
    "aimv2": _vit("Aimv2VisionModel"),
    "dpt": _vit("DPTModel"),
    "yolos_detection": _vit("YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=4),
    "vitdet": _vit(
        "VitDetModel",
        pretrain_image_size=32,
        window_size=2,
        mlp_ratio=2,
        residual_block_indices=[1],
        use_relative_position_embeddings=True,
    ),
    "sam_vision": _vit("SamVisionModel", mlp_dim=64, window_size=2, global_attn_indexes=[1], output_channels=16),
    "timesformer": hugging_face("TimesformerModel", video(2), **_VIT, num_frames=2),
    "vivit": hugging_face("VivitModel", video(4), **_VIT, num_frames=4, tubelet_size=[2, 8, 8]),
    "swin": _swin("SwinModel"),
    "swinv2": _swin("Swinv2Model"),
    "segformer": _pyramid("SegformerModel", sr_ratios=[2, 2, 1, 1]),
    "segformer_segmentation": _pyramid(
        "SegformerForSemanticSegmentation", sr_ratios=[2, 2, 1, 1], decoder_hidden_size=16
    ),
    "pvt": _pyramid("PvtModel", sequence_reduction_ratios=[2, 2, 1, 1]),
    "pvt_v2": _pyramid("PvtV2Model", sr_ratios=[2, 2, 1, 1]),
    "cvt": _conv("CvtModel", 32, **_CVT),
    "poolformer": _conv("PoolFormerModel", 64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], mlp_ratio=2.0),
    "convnext": _conv("ConvNextModel", 32, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    "convnextv2": _conv("ConvNextV2Model", 32, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    "focalnet": _conv(
        "FocalNetModel",
        32,
        image_size=32,
        embed_dim=16,
        depths=[1, 1],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
        mlp_ratio=2.0,
    ),
    "hiera": _conv(
        "HieraModel",
        32,
        image_size=[32, 32],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[1, 2],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
        mlp_ratio=2.0,
    ),
    "levit": _conv(
        "LevitModel",
        64,
        image_size=64,
        hidden_sizes=[16, 16, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "mobilevit": _conv(
        "MobileViTModel",
        64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
        num_attention_heads=2,
    ),
    "mobilevitv2": _conv(
        "MobileViTV2Model",
        64,
        image_size=64,
        width_multiplier=0.25,
        n_attn_blocks=[1, 1, 1],
        base_attn_unit_dims=[16, 24, 32],
    ),
    "swiftformer": _conv(
        "SwiftFormerModel", 64, image_size=64, depths=[1, 1, 1, 1], embed_dims=[16, 16, 32, 32], mlp_ratio=2
    ),
    "detr": _conv("DetrModel", 64, **_DETR),
    "detr_detection": _conv("DetrForObjectDetection", 64, **_DETR, num_labels=3),
    "efficientnet": _conv(
        "EfficientNetModel",
        64,
        image_size=64,
        width_coefficient=0.5,
        depth_coefficient=1.0,
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        kernel_sizes=[3, 3, 5],
        strides=[1, 2, 2],
        num_block_repeats=[1, 1, 1],
        expand_ratios=[1, 6, 6],
        squeeze_expansion_ratio=0.5,
        hidden_dim=640,
    ),
    "mobilenet_v2": _conv("MobileNetV2Model", 64, image_size=64, depth_multiplier=0.25),
    "resnet": _conv(
        "ResNetModel", 32, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck"
    ),
    "regnet": _conv(
        "RegNetModel", 32, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, layer_type="y"
    ),
}
