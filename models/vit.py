"""A small ViT: square images cut into patches by a convolution, a class token, a pre-norm encoder.

References:
    Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", arXiv 2010.11929.

Shapes: B images, P patches, S = P + 1 tokens, D hidden_size, H heads, F intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`."""

    image_size: int = 32  # pixels a side
    patch_size: int = 8  # pixels a side; divides image_size
    num_channels: int = 3
    num_classes: int = 10
    hidden_size: int = 64  # D
    intermediate_size: int = 256  # F
    num_heads: int = 4  # H; divides D
    num_layers: int = 2


class SelfAttention(nn.Module):
    """Multi-head attention; one projection gives queries, keys and values."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, S, D / H]
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, H, S, D / H]
        return self.proj(mixed.transpose(1, 2).flatten(2))  # [B, S, D]


class FeedForward(nn.Module):
    """The feed-forward layer."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        return self.fc2(F.gelu(self.fc1(x)))  # [B, S, F] -> [B, S, D]


class Block(nn.Module):
    """Attention and feed-forward layer, each normalised before."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The classifier, with random weights."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.class_token = nn.Parameter(torch.randn(1, 1, config.hidden_size) * 0.02)
        self.position_embedding = nn.Parameter(torch.randn(1, num_patches + 1, config.hidden_size) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classifies images.

        Args:
            images: [B, num_channels, image_size, image_size].

        Returns:
            Logits [B, num_classes].
        """
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, P, D]
        class_token = self.class_token.expand(images.shape[0], -1, -1)  # [B, 1, D]
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding  # [B, S, D]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
