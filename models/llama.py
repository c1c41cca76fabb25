"""A small Llama: RMSNorm before each layer, rotary positions, a gated feed-forward layer, no biases.

With `fused_gate_up` one projection gives gate and up, which are chunked, as Phi-3 does.

References:
    Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", arXiv 2302.13971.
    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.

Shapes: B sequences, S tokens, D hidden_size, H heads, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a `Llama`."""

    vocab_size: int = 256  # V
    hidden_size: int = 64  # D
    intermediate_size: int = 256  # F
    num_heads: int = 4  # H; D / H is even
    num_layers: int = 2
    rope_base: float = 10000.0
    fused_gate_up: bool = False  # one projection [2F, D] instead of two [F, D]


def rotate(x: Tensor, base: float) -> Tensor:
    """Turns the halves of each head, [B, H, S, D / H], by an angle that grows with the position."""
    half = x.shape[-1] // 2
    frequencies = base ** -(torch.arange(half, device=x.device) / half)  # [D / 2H]
    angles = torch.outer(torch.arange(x.shape[2], device=x.device), frequencies)  # [S, D / 2H]
    first, second = x.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the tokens so far, with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rope_base = config.rope_base
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, S, D / H]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, self.rope_base), rotate(key, self.rope_base)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, H, S, D / H]
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [B, S, D]


class FeedForward(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [B, S, F] -> [B, S, D]


class FusedFeedForward(nn.Module):
    """The gated feed-forward layer with one projection for gate (first half) and up."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, S, F] each
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward layer, each normalised before."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size)
        self.self_attn = CausalSelfAttention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size)
        self.mlp = FusedFeedForward(config) if config.fused_gate_up else FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to [B, S, D]."""
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp(self.ffn_norm(x))


class Llama(nn.Module):
    """The language model, with random weights."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Predicts the next token at each position: int64 [B, S] to logits [B, S, V]."""
        x = self.embed_tokens(input_ids)  # [B, S, D]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))
