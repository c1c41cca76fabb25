"""A small BERT: an encoder with the normalisation after each residual sum, GELU, biases everywhere.

References:
    Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv 1810.04805.

Shapes: B sequences, S tokens, D hidden_size, H heads, F intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a `Bert`."""

    vocab_size: int = 256
    max_positions: int = 128  # longest sequence
    hidden_size: int = 64  # D
    intermediate_size: int = 256  # F
    num_heads: int = 4  # H; divides D
    num_layers: int = 2


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mixes tokens.

        Args:
            x: [B, S, D].
            mask: bool [B, 1, 1, S], True where a token may be read; None for all.
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, S, D / H]
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # [B, H, S, D / H]
        return self.output(mixed.transpose(1, 2).flatten(2))  # [B, S, D]


class FeedForward(nn.Module):
    """The feed-forward layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        return self.output(F.gelu(self.intermediate(x)))  # [B, S, F] -> [B, S, D]


class Layer(nn.Module):
    """Attention and feed-forward layer, each normalised after its residual sum."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.ffn = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [B, S, D] to [B, S, D]; `mask` as in `SelfAttention`."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.ffn_norm(x + self.ffn(x))


class Bert(nn.Module):
    """The encoder, with random weights."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encodes tokens.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S], 1 for tokens and 0 for padding; None where nothing is padded.

        Returns:
            [B, S, D].
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # [S]
        x = self.norm(self.token_embedding(input_ids) + self.position_embedding(positions))  # [B, S, D]
        mask = None if attention_mask is None else attention_mask[:, None, None, :] != 0  # [B, 1, 1, S]
        for layer in self.layers:
            x = layer(x, mask)
        return x
