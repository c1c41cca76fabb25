"""A small GPT-2: a decoder with the normalisation before each layer and projections that store [in, out] weights.

References:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

Shapes: B sequences, S tokens, D hidden_size, H heads, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`."""

    vocab_size: int = 256  # V
    max_positions: int = 128  # longest sequence
    hidden_size: int = 64  # D
    intermediate_size: int = 256  # F
    num_heads: int = 4  # H; divides D
    num_layers: int = 2


class Projection(nn.Module):
    """A linear layer in the manner of GPT-2: the weight is [in, out] and the rows are flattened for `addmm`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * in_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, in] to [B, S, out]."""
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)  # [B * S, out]
        return rows.view(*x.shape[:-1], self.weight.shape[1])


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the tokens so far; one projection gives queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.c_attn = Projection(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Projection(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, S, D / H]
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, H, S, D / H]
        return self.c_proj(mixed.transpose(1, 2).flatten(2))  # [B, S, D]


class FeedForward(nn.Module):
    """The feed-forward layer, with GELU in its tanh approximation."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Projection(config.hidden_size, config.intermediate_size)
        self.c_proj = Projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # [B, S, F] -> [B, S, D]


class Block(nn.Module):
    """Attention and feed-forward layer, each normalised before."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model, with random weights; the output projection is the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_positions, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Predicts the next token at each position.

        Args:
            input_ids: int64 [B, S].

        Returns:
            Logits [B, S, V].
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # [S]
        x = self.wte(input_ids) + self.wpe(positions)  # [B, S, D]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)
