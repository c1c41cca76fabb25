"""torchvision: the small variants, narrowed where their constructors allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from coverage_models.building import Builder, Built

_SWIN: dict[str, Any] = {
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depths": [2],  # one stage: with more, torch.export reasons for a minute about padded sizes
    "num_heads": [2],
    "window_size": [4, 4],
    "mlp_ratio": 2.0,
    "num_classes": 5,
}


def _images(make: Callable[[], nn.Module], size: int = 32) -> Builder:
    def build() -> Built:
        return make(), (torch.randn(2, 3, size, size),), {}

    return build


def _vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def _swin_v2() -> nn.Module:
    return models.SwinTransformer(**_SWIN, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def _maxvit() -> nn.Module:
    return models.MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[16],
        block_layers=[1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )


def _efficientnet() -> nn.Module:
    settings = [
        FusedMBConvConfig(4, 3, 2, 16, 16, 1),
        MBConvConfig(4, 3, 2, 16, 24, 2),
        MBConvConfig(1, 3, 1, 24, 24, 1),
    ]
    return models.EfficientNet(settings, dropout=0.1, num_classes=5, last_channel=64)


def _mobilenet_v3() -> nn.Module:
    settings = [
        InvertedResidualConfig(16, 3, 32, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 64, 24, True, "HS", 2, 1, 1.0),
        InvertedResidualConfig(24, 3, 64, 24, False, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(settings, last_channel=64, num_classes=5)


def _head(features: int) -> list[nn.Module]:
    """Three linear layers in a row, as VGG and AlexNet have, 64 wide instead of 4096."""
    return [
        nn.Linear(features, 64),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(64, 5),
    ]


def _vgg() -> nn.Module:
    model = models.VGG(models.vgg.make_layers([8, "M", 16, "M", 512, "M"]), init_weights=False, num_classes=5)
    model.classifier = nn.Sequential(*_head(512 * 7 * 7))
    return model


def _alexnet() -> nn.Module:
    model = models.AlexNet(num_classes=5)
    model.classifier = nn.Sequential(nn.Dropout(), *_head(256 * 6 * 6))
    return model


TORCHVISION: dict[str, Builder] = {
    "torchvision/vit": _images(_vit),
    "torchvision/swin": _images(lambda: models.SwinTransformer(**_SWIN)),
    "torchvision/swin_v2": _images(_swin_v2),
    "torchvision/convnext": _images(
        lambda: models.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=5), 64
    ),
    "torchvision/maxvit": _images(_maxvit, 64),
    "torchvision/resnet": _images(lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)),
    "torchvision/resnext": _images(
        lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=4)
    ),
    "torchvision/efficientnet": _images(_efficientnet, 64),
    "torchvision/mobilenet_v2": _images(lambda: models.mobilenet_v2(num_classes=5, width_mult=0.25)),
    "torchvision/mobilenet_v3": _images(_mobilenet_v3),
    "torchvision/mnasnet": _images(lambda: models.MNASNet(0.25, num_classes=5), 64),
    "torchvision/regnet_y": _images(
        lambda: models.RegNet(
            BlockParams([1, 1], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25), num_classes=5, stem_width=16
        )
    ),
    "torchvision/shufflenet_v2": _images(lambda: models.ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 64], num_classes=5)),
    "torchvision/squeezenet": _images(lambda: models.squeezenet1_1(num_classes=5), 64),
    "torchvision/densenet": _images(
        lambda: models.DenseNet(
            growth_rate=8, block_config=(1, 1, 1, 1), num_init_features=16, bn_size=2, num_classes=5
        )
    ),
    "torchvision/vgg": _images(_vgg),
    "torchvision/alexnet": _images(_alexnet, 224),
}
