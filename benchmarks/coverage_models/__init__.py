"""The architectures that `coverage.py` converts, by family and name: small, with random weights, nothing downloaded."""

from __future__ import annotations

import torch

from coverage_models.audio import AUDIO
from coverage_models.building import Builder, Built, enliven
from coverage_models.decoders import DECODERS
from coverage_models.encoder_decoders import ENCODER_DECODERS
from coverage_models.multimodal import MULTIMODAL
from coverage_models.text_encoders import TEXT_ENCODERS
from coverage_models.timm_models import TIMM
from coverage_models.torch_nn import TORCH_NN
from coverage_models.torchvision_models import TORCHVISION
from coverage_models.vision import VISION

FAMILIES: dict[str, dict[str, Builder]] = {
    "text encoder": TEXT_ENCODERS,
    "decoder": DECODERS,
    "encoder-decoder": ENCODER_DECODERS,
    "vision": VISION,
    "audio": AUDIO,
    "multimodal": MULTIMODAL,
    "timm": TIMM,
    "torchvision": TORCHVISION,
    "torch.nn": TORCH_NN,
}


def build(name: str) -> Built:
    """The model in evaluation mode, and example inputs; always the same ones."""
    builder = next(builders[name] for builders in FAMILIES.values() if name in builders)
    torch.manual_seed(0)
    model, args, kwargs = builder()
    enliven(model)
    return model.eval(), args, kwargs
