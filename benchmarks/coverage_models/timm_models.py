"""timm: the published variants, narrowed to 8 to 32 features and one or two blocks a stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GluMlp
from timm.models import (
    efficientnet,
    metaformer,
    mlp_mixer,
    mobilenetv3,
    mvitv2,
    nest,
    nfnet,
    tiny_vit,
    vitamin,
    volo,
)
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn

from coverage_models.building import Builder, Built

_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
_SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (2, 2),
    "mlp_ratio": 2,
}
_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
_LEVIT: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": (16, 16, 32),
    "num_heads": (2, 2, 2),
    "depth": (1, 1, 1),
    "key_dim": 8,
}


def _built(make: Callable[..., nn.Module], size: int, **options: Any) -> Builder:
    """`make` with five classes, and two images."""

    def build() -> Built:
        return make(**{"num_classes": 5, **options}), (torch.randn(2, 3, size, size),), {}

    return build


def _timm(variant: str, size: int = 32, **options: Any) -> Builder:
    """A registered variant with other sizes."""
    return _built(partial(timm.create_model, variant), size, **options)


def _vit(variant: str, **options: Any) -> Builder:
    return _timm(variant, **{**_VIT, **options})


def _mixer(**options: Any) -> Builder:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32}
    return _built(mlp_mixer.MlpMixer, 32, **sizes, **options)


def _metaformer(**options: Any) -> Builder:
    return _built(metaformer.MetaFormer, 64, depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), **options)


def _vitamin(**options: Any) -> nn.Module:
    return timm.create_model(
        "vitamin_small_224",
        img_size=64,
        embed_dim=32,
        depth=2,
        num_heads=2,
        **options,
        embed_cfg=vitamin.VitCfg(embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8),
    )


def _mvitv2(**options: Any) -> nn.Module:
    sizes: dict[str, Any] = {"depths": (1, 1), "embed_dim": 16, "mlp_ratio": 2.0, "stride_q": ((1, 1), (2, 2))}
    return mvitv2.MultiScaleVit(mvitv2.MultiScaleVitCfg(**sizes), img_size=(64, 64), **options)


def _nfnet(**options: Any) -> nn.Module:
    config = nfnet.NfCfg(
        depths=(1, 1, 1, 1),
        channels=(16, 16, 32, 32),
        stem_type="3x3",
        stem_chs=16,
        group_size=8,
        skipinit=True,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5, "rd_divisor": 8},
    )
    return nfnet.NormFreeNet(config, **options)


def _blocks(*stages: str) -> dict[str, Any]:
    """In the notation of timm: kind, repeats, kernel, stride, expansion, channels, squeeze-excite."""
    return {"block_args": decode_arch_def([[stage] for stage in stages])}


TIMM: dict[str, Builder] = {
    "timm/vit": _vit("vit_tiny_patch16_224"),
    "timm/vit_parallel": _vit("vit_small_patch16_18x2_224"),
    "timm/vit_swiglu": _vit("vit_giant_patch14_dinov2"),
    "timm/vit_siglip": _vit("vit_base_patch16_siglip_224"),
    "timm/vit_relpos": _vit("vit_relpos_small_patch16_224"),
    "timm/naflexvit": _timm(
        "naflexvit_base_patch16_gap", patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2
    ),
    "timm/deit3": _vit("deit3_small_patch16_224"),
    "timm/beit": _vit("beit_base_patch16_224"),
    "timm/eva02_tiny": _vit("eva02_tiny_patch14_224"),
    "timm/eva02_base": _vit("eva02_base_patch14_224"),
    "timm/cait": _vit("cait_xxs24_224", depth_token_only=1),
    "timm/xcit": _timm(
        "xcit_nano_12_p16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, cls_attn_layers=1
    ),
    "timm/convit": _vit("convit_tiny", local_up_to_layer=1),
    "timm/mixer": _mixer(),
    "timm/resmlp": _mixer(mlp_ratio=4, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine),
    "timm/gmixer": _mixer(mlp_ratio=(1.0, 4.0), mlp_layer=GluMlp, act_layer=nn.SiLU),
    "timm/gmlp": _mixer(mlp_ratio=2, block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=mlp_mixer.GatedMlp),
    "timm/swin": _timm("swin_tiny_patch4_window7_224", **_SWIN),
    "timm/swinv2": _timm("swinv2_tiny_window8_256", **_SWIN),
    "timm/convnext": _timm("convnext_tiny", **_CONVNEXT),
    "timm/convnext_conv_mlp": _timm("convnext_atto", **_CONVNEXT),
    "timm/convnextv2": _timm("convnextv2_atto", **_CONVNEXT),
    "timm/inception_next": _timm("inception_next_atto", 64, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "timm/poolformerv2": _metaformer(norm_layers=metaformer.GroupNorm1NoBias, use_mlp_head=False),
    "timm/convformer": _metaformer(token_mixers=metaformer.SepConv, norm_layers=metaformer.LayerNorm2dNoBias),
    "timm/caformer": _metaformer(
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    ),
    "timm/levit": _timm("levit_128s", 64, **_LEVIT),
    "timm/levit_conv": _timm("levit_conv_128s", 64, **_LEVIT),
    "timm/efficientformer": _timm(
        "efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(8, 16, 16, 32), mlp_ratios=2
    ),
    "timm/efficientformerv2": _timm(
        "efficientformerv2_s0", 64, img_size=64, depths=(1, 1, 1, 2), embed_dims=(8, 16, 16, 32), mlp_ratios=2
    ),
    "timm/edgenext": _timm("edgenext_small", 64, depths=(1, 1, 1, 1), dims=(16, 16, 16, 32)),
    "timm/fastvit": _timm("fastvit_t8", 64, layers=(1, 1, 1, 1), embed_dims=(8, 16, 16, 32), mlp_ratios=(2, 2, 2, 2)),
    "timm/repvit": _timm("repvit_m0_9", 64, embed_dim=(8, 16, 16, 32), depth=(1, 1, 1, 1)),
    "timm/mambaout": _timm("mambaout_femto", 64, **_CONVNEXT),
    "timm/hiera": _timm("hiera_tiny_224", 64, img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1), q_pool=1),
    "timm/pit": _timm("pit_ti_224", 64, img_size=64, base_dims=(8, 8, 16), depth=(1, 1, 1), heads=(2, 2, 2)),
    "timm/efficientvit": _timm(
        "efficientvit_b0", 64, widths=(8, 8, 16, 16, 32), depths=(1, 1, 1, 1, 1), head_dim=8, head_widths=(32, 32)
    ),
    "timm/resnetv2": _timm("resnetv2_50", 64, layers=(1, 1), channels=(16, 32)),
    "timm/starnet": _timm("starnet_s1", 64, base_dim=8, depths=(1, 1, 1, 1)),
    "timm/resnet": _timm("resnet26", 64, layers=(1, 1, 1, 1)),
    "timm/volo": _built(
        volo.VOLO,
        64,
        layers=(1, 1, 1, 1),
        img_size=64,
        stem_hidden_dim=8,
        embed_dims=(16, 32, 32, 32),
        num_heads=(1, 2, 2, 2),
        mlp_ratio=2.0,
    ),
    "timm/coatnet": _timm(
        "coatnet_nano_rw_224",
        64,
        img_size=64,
        embed_dim=(16, 16, 32, 32),
        depths=(1, 1, 1, 1),
        stem_width=8,
        transformer_dim_head=8,
    ),
    "timm/vitamin": _built(_vitamin, 64),
    "timm/mvitv2": _built(_mvitv2, 64),
    "timm/nest": _built(
        nest.Nest, 64, img_size=64, embed_dims=(16, 16, 32), num_heads=(2, 2, 2), depths=(1, 1, 1), mlp_ratio=2.0
    ),
    "timm/tiny_vit": _built(
        tiny_vit.TinyVit, 64, depths=(1, 1), embed_dims=(8, 16), num_heads=(1, 2), window_sizes=(2, 2), mlp_ratio=2.0
    ),
    "timm/efficientnet": _built(
        efficientnet.EfficientNet,
        64,
        **_blocks("ds_r1_k3_s1_e1_c16_se0.25", "ir_r2_k3_s2_e4_c16_se0.5", "er_r1_k3_s2_e4_c24"),
        num_features=64,
        stem_size=16,
        act_layer=nn.SiLU,
    ),
    "timm/mobilenetv3": _built(
        mobilenetv3.MobileNetV3,
        64,
        **_blocks("ds_r1_k3_s2_e1_c16_se0.25_nre", "ir_r2_k5_s2_e4_c24_se0.25", "cn_r1_k1_s1_c64"),
        num_features=64,
        act_layer=nn.Hardswish,
    ),
    "timm/nfnet": _built(_nfnet, 64),
}
