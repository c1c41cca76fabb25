"""What the tables of architectures share: small random inputs, and models built from their configuration.

B = 2 images or sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# model, args, kwargs
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Builder = Callable[[], Built]
Inputs = Callable[[], dict[str, Any]]

VOCABULARY = 64


def tokens(length: int = 12) -> Tensor:
    """Token ids [B, S], none of them special."""
    return torch.randint(3, VOCABULARY, (2, length))


def text() -> dict[str, Any]:
    """Two sequences, the second with three positions of padding."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def text_pair() -> dict[str, Any]:
    """For an encoder and a decoder."""
    return {**text(), "decoder_input_ids": tokens(7)}


def images(size: int = 32, channels: int = 3) -> Inputs:
    """Pixels [B, C, H, W]."""
    return lambda: {"pixel_values": torch.randn(2, channels, size, size)}


def video(frames: int, size: int = 32) -> Inputs:
    """Pixels [B, frames, 3, H, W]."""
    return lambda: {"pixel_values": torch.randn(2, frames, 3, size, size)}


def random(**shapes: tuple[int, ...]) -> Inputs:
    """Normally distributed inputs of the given names and shapes."""
    return lambda: {name: torch.randn(*shape) for name, shape in shapes.items()}


def hugging_face(model: str, inputs: Inputs, **config: Any) -> Builder:
    """A class of transformers, built from its configuration; nothing is downloaded."""

    def build() -> Built:
        cls = getattr(transformers, model)
        return cls(cls.config_class(**config)), (), inputs()

    return build


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Give every weight a part in the output, so that a lost bias or FFN shows.

    Constant parameters (biases of 0, norms of 1, layer scales of 1e-5) become random, as do the statistics of batch
    norms; tiny weights get the scale 1 / sqrt(fan in).
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 0
        rms = float(parameter.square().mean().sqrt())
        if parameter.unique().numel() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif fan_in and rms < 0.5 / fan_in**0.5:
            parameter.mul_(1 / (rms * fan_in**0.5))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)  # pyright: ignore[reportOptionalMemberAccess]
