"""What `torch.nn` itself offers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coverage_models.building import Builder, Built

_LAYER: dict[str, Any] = {"d_model": 32, "nhead": 2, "dim_feedforward": 64}


def _encoder_layer(**options: Any) -> Builder:
    def build() -> Built:
        return nn.TransformerEncoderLayer(**_LAYER, **options), (torch.randn(2, 12, 32),), {}

    return build


def _encoder(**options: Any) -> Builder:
    def build() -> Built:
        layer = nn.TransformerEncoderLayer(**_LAYER, **options)
        return nn.TransformerEncoder(layer, num_layers=2), (torch.randn(2, 12, 32),), {}

    return build


def _decoder(**options: Any) -> Builder:
    def build() -> Built:
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**_LAYER, **options), num_layers=2)
        batch_first = "batch_first" in options
        shapes = [(2, length, 32) if batch_first else (length, 2, 32) for length in (7, 12)]
        return decoder, tuple(torch.randn(shape) for shape in shapes), {}

    return build


def _transformer() -> Built:
    model = nn.Transformer(
        d_model=32, nhead=2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=64, batch_first=True
    )
    return model, (torch.randn(2, 12, 32), torch.randn(2, 7, 32)), {}


def _mlp() -> Built:
    return nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, 8)), (torch.randn(12, 32),), {}


def _conv_mlp() -> Built:
    layers = nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 16, 1)
    return nn.Sequential(*layers), (torch.randn(2, 16, 4, 6),), {}


TORCH_NN: dict[str, Builder] = {
    "nn/encoder_layer": _encoder_layer(batch_first=True),
    "nn/encoder_layer_gelu": _encoder_layer(activation="gelu"),
    "nn/encoder_layer_norm_first": _encoder_layer(batch_first=True, norm_first=True, activation="gelu"),
    "nn/encoder": _encoder(batch_first=True),
    "nn/encoder_time_first": _encoder(activation="gelu", norm_first=True),
    "nn/decoder": _decoder(batch_first=True),
    "nn/decoder_time_first": _decoder(activation="gelu", norm_first=True),
    "nn/transformer": _transformer,
    "nn/sequential_mlp": _mlp,
    "nn/sequential_conv_mlp": _conv_mlp,
}
