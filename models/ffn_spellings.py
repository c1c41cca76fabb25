"""The spellings that a random feed-forward model is written with.

Of linear layers, of gate and up in one projection, of activations, of per-neuron vectors, of what changes nothing.
Features are the last dimension, or dimension 1 where `channels_first`. B, S tokens, W width of an image, D in_features,
F out_features or neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_IN_OUT = ("addmm", "mm", "matmul", "bmm", "baddbmm", "einsum_df", "einsum_dots")


def features_last(x: Tensor) -> Tensor:
    """[B, D, S] or [B, D, S, W] -> [B, S, D] or [B, S, W, D]."""
    return x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 2, 3, 1)


def features_first(x: Tensor) -> Tensor:
    """[B, S, D] or [B, S, W, D] -> [B, D, S] or [B, D, S, W]."""
    return x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 3, 1, 2)


def as_vector(vector: Tensor, rank: int, channels_first: bool) -> Tensor:
    """[F] so that it broadcasts along the features of a value with `rank` dimensions."""
    return vector.reshape(-1, *[1] * (rank - 2)) if channels_first else vector


class Layer(nn.Module):
    """A linear layer in one of `SPELLINGS`; the weight is stored as the spelling wants it."""

    def __init__(self, spelling: str, bias: str, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.spelling, self.placement = spelling, bias
        weight = torch.randn(out_features, in_features) * in_features**-0.5
        if spelling in _IN_OUT:
            weight = weight.t().contiguous()
        if spelling == "conv":
            weight = weight.reshape(*weight.shape, *[1] * max(rank - 2, 1))
        self.weight = nn.Parameter(weight)
        self.bias = None if bias == "none" else nn.Parameter(torch.randn(out_features) * 0.5)

    def matrix(self) -> Tensor:
        """The weight [F, D]."""
        return self.weight.t() if self.spelling in _IN_OUT else self.weight.flatten(1)

    def forward(self, x: Tensor, channels_first: bool) -> Tensor:
        """[..., D] to [..., F], or [B, D, ...] to [B, F, ...]."""
        if self.spelling == "einsum_fd":
            return self._einsum(x, channels_first)
        if self.spelling not in ("conv", "left_matmul"):
            return features_first(self._last(features_last(x))) if channels_first else self._last(x)
        if channels_first:
            return self._first(x)
        if x.dim() == 2:
            return self._first(x.unsqueeze(-1)).squeeze(-1)
        return features_last(self._first(features_first(x)))

    def _add_bias(self, y: Tensor, channels_first: bool) -> Tensor:
        return y if self.bias is None else y + as_vector(self.bias, y.dim(), channels_first)

    def _einsum(self, x: Tensor, channels_first: bool) -> Tensor:
        tokens = "bsw"[: x.dim() - 1]
        into = [tokens[0] + letter + tokens[1:] if channels_first else tokens + letter for letter in "df"]
        return self._add_bias(torch.einsum(f"{into[0]},fd->{into[1]}", x, self.weight), channels_first)

    def _first(self, x: Tensor) -> Tensor:
        if self.spelling == "left_matmul":
            y = self.weight @ x if x.dim() == 3 else (self.weight @ x.flatten(2)).unflatten(2, x.shape[2:])
            return self._add_bias(y, channels_first=True)
        convolution = functional.conv1d if x.dim() == 3 else functional.conv2d
        inside = self.bias if self.placement == "inside" else None
        y = convolution(x, self.weight, inside)
        return y if self.placement == "inside" else self._add_bias(y, channels_first=True)

    def _last(self, x: Tensor) -> Tensor:
        inside = self.bias if self.placement == "inside" else None
        if self.spelling == "linear" and inside is not None:
            return functional.linear(x, self.weight, inside)
        if self.spelling == "addmm" and inside is not None:
            rows = torch.addmm(inside, x.reshape(-1, x.shape[-1]), self.weight)
            return rows.view(*x.shape[:-1], rows.shape[-1])
        if self.spelling == "baddbmm" and inside is not None:
            return self._batched(x, inside)
        return self._add_bias(self._product(x), channels_first=False)

    def _product(self, x: Tensor) -> Tensor:
        """Without the bias."""
        weight = self.weight
        if self.spelling in ("mm", "addmm"):
            return torch.mm(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])
        if self.spelling in ("bmm", "baddbmm"):
            return self._batched(x, None)
        return {
            "linear": lambda: functional.linear(x, weight),
            "matmul": lambda: x @ weight,
            "matmul_t": lambda: x @ weight.t(),
            "einsum_df": lambda: torch.einsum(f"{'bsw'[: x.dim() - 1]}d,df->{'bsw'[: x.dim() - 1]}f", x, weight),
            "einsum_dots": lambda: torch.einsum("...d,df->...f", x, weight),
        }[self.spelling]()

    def _batched(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`bmm` or `baddbmm`, whose operands have three dimensions."""
        batches = x.unsqueeze(0) if x.dim() == 2 else x.reshape(-1, *x.shape[-2:])
        weight = self.weight.unsqueeze(0).expand(batches.shape[0], -1, -1)
        if bias is None:
            y = torch.bmm(batches, weight)
        else:
            y = torch.baddbmm(bias.view(1, 1, -1).expand(batches.shape[0], batches.shape[1], -1), batches, weight)
        return y.squeeze(0) if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def cut_projection(fused: Tensor, cut: str, dim: int) -> tuple[Tensor, Tensor]:
    """The two halves of a fused projection along `dim`, which is 1 or the last one, in one of `FUSED_CUTS`."""
    width = fused.shape[dim] // 2
    leading, trailing = fused.shape[:dim], fused.shape[dim:][1:]
    every = (slice(None),) * (dim % fused.dim())
    cuts: Mapping[str, Callable[[], tuple[Tensor, ...]]] = {
        "chunk": lambda: fused.chunk(2, dim),
        "split": lambda: fused.split(width, dim),
        "split_sizes": lambda: fused.split([width, width], dim),
        "slice": lambda: (fused[(*every, slice(None, width))], fused[(*every, slice(width, None))]),
        "unbind": lambda: fused.reshape(*leading, 2, width, *trailing).unbind(dim % fused.dim()),
        "interleaved_slice": lambda: (fused[(*every, slice(None, None, 2))], fused[(*every, slice(1, None, 2))]),
        "interleaved_unbind": lambda: fused.unflatten(dim, (width, 2)).unbind(dim % fused.dim() + 1),
        "tensor_split": lambda: torch.tensor_split(fused, 2, dim),
        "narrow": lambda: (fused.narrow(dim, 0, width), fused.narrow(dim, width, width)),
        "overlap": lambda: (fused.narrow(dim, 0, fused.shape[dim] - 1), fused.narrow(dim, 1, fused.shape[dim] - 1)),
    }
    first, second = cuts[cut]()
    return first, second


COMBINE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": torch.mul,
    "sum": torch.add,
    "maximum": torch.maximum,
}


def _gelu_tanh(a: Tensor) -> Tensor:
    return 0.5 * a * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * torch.pow(a, 3.0))))


ACTIVATION: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "gelu_by_hand": lambda a: a * 0.5 * (1.0 + torch.erf(a / math.sqrt(2.0))),
    "gelu_tanh_by_hand": _gelu_tanh,
    "squared_relu": lambda a: torch.relu(a).square(),
    "silu": functional.silu,
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
    "mish": functional.mish,
    "softplus": functional.softplus,
    "clamp": lambda a: a.clamp(-1.0, 1.0),
    "hardtanh": functional.hardtanh,
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "tanh": torch.tanh,
    "where": lambda a: torch.where(a > 0, a, torch.expm1(a) * 0.5),
    "where_zeros": lambda a: torch.where(a > 0, a, torch.zeros_like(a)),
    "where_constant": lambda a: torch.where(a > 0.25, a, torch.tensor(0.25, dtype=a.dtype)),
    "maximum": lambda a: torch.maximum(a, a * 0.1),
    "bilinear": lambda a: a,
    "relu_inplace": lambda a: a.relu_(),
    "silu_inplace": lambda a: functional.silu(a, inplace=True),
}


def in_frame(activation: Callable[[Tensor], Tensor], frame: str, a: Tensor, channels_first: bool) -> Tensor:
    """`activation(a)` on another form of `a`."""
    if frame == "double":
        return activation(a.double()).to(a.dtype)
    if frame == "flat" and channels_first:
        return activation(a.flatten(2)).reshape(a.shape)
    if frame == "flat":
        return activation(a.reshape(-1, a.shape[-1])).reshape(a.shape)
    if frame == "permute":
        return activation(a.transpose(1, -1 if a.dim() > 2 else 0)).transpose(1, -1 if a.dim() > 2 else 0)
    return activation(a)


def add_noise(h: Tensor, noise: str, channels_first: bool, modules: nn.ModuleDict) -> Tensor:
    """`h`, after one of `NOISE`, which does nothing in evaluation mode."""
    tokens = -1 if channels_first else -2  # 0 in a matrix of rows
    if noise in ("dropout_module", "identity"):
        return modules[noise](h)
    if noise == "dropout":
        return functional.dropout(h, 0.1, modules.training)
    if noise in ("double", "flat"):
        return in_frame(torch.clone, noise, h, channels_first)
    if noise == "permute":
        neurons = 1 if channels_first else -1
        return h.transpose(neurons, tokens).contiguous().transpose(neurons, tokens)
    if noise == "permute_tokens":
        return h.transpose(0, tokens).contiguous().transpose(0, tokens)
    return {"": lambda: h, "contiguous": h.contiguous, "clone": h.clone}[noise]()


class Vector(nn.Module):
    """One of `VECTORS`: learned numbers, one for each neuron."""

    def __init__(self, kind: str, neurons: int, rank: int, channels_first: bool, full_rank: bool) -> None:
        super().__init__()
        self.kind = kind
        leading = (1,) if channels_first else (1,) * (rank - 1)
        shape = as_vector(torch.empty(neurons), rank, channels_first).shape
        shape = (*leading, *shape) if full_rank else shape
        shape = shape[:0] if kind == "scalar" else shape
        self.weight = nn.Parameter(torch.rand(neurons if kind == "batch_norm" else shape) + 0.5)
        if kind == "batch_norm":
            self.bias = nn.Parameter(torch.randn(neurons) * 0.5)
            self.register_buffer("mean", torch.randn(neurons) * 0.5)
            self.register_buffer("variance", torch.rand(neurons) + 0.5)

    def forward(self, h: Tensor) -> Tensor:
        """Keeps the shape of `h`."""
        if self.kind == "batch_norm":
            mean, variance = self.get_buffer("mean"), self.get_buffer("variance")
            return functional.batch_norm(h, mean, variance, self.weight, self.bias, self.training)
        if self.kind == "prelu":
            return torch.where(h >= 0, h, h * (self.weight - 1.0))
        return h + self.weight if self.kind == "shift" else h * self.weight
