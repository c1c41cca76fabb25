"""What makes an FFN a near miss or a hazard.

Values that depend on other neurons or tokens, weights that are no parameters, values that are written in place.
B, S tokens, D hidden, F neurons; h the value between the projections, x what the FFN reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.models.ffn_recipe import Recipe
from sparsify.models.ffn_spellings import ACTIVATION, Layer, as_vector, features_first, features_last


class Between(nn.Module):
    """`h` to a value of the same shape, in a way that forbids to divide the neurons; `h` itself for other misses."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.miss, self.channels_first = recipe.miss, recipe.channels_first
        self.dim = 1 if recipe.channels_first else -1  # of the neurons
        self.token_dim = -1 if recipe.channels_first else max(recipe.rank - 2, 0)
        shape = {
            "depthwise": (recipe.neurons, 1, 3),
            "spatial": (recipe.seq, recipe.seq),
            "token_gate": (1, recipe.hidden),
            "positional": (recipe.seq, recipe.neurons)[:: -1 if recipe.channels_first else 1],
            "token_vector": (recipe.seq,) if recipe.channels_first else (recipe.seq, 1),
            "token_vector_square": (recipe.seq,),
            "squeeze_excite": (recipe.neurons, recipe.neurons),
            "computed_vector": as_vector(torch.empty(recipe.neurons), recipe.rank, recipe.channels_first).shape,
        }.get(recipe.miss)
        self.weight = None if shape is None else nn.Parameter(torch.randn(shape) * 0.5)

    def forward(self, h: Tensor, x: Tensor, given: Tensor | None) -> Tensor:
        """`given` is a value that the caller of the model passes."""
        if self.miss in _NEURONS:
            return _NEURONS[self.miss](h, self.dim)
        if self.miss in _TOKENS:
            return _TOKENS[self.miss](h, self.token_dim)
        if self.weight is not None:
            return self._with_weight(h, x, self.weight)
        if self.miss.endswith("_input") and given is not None:
            return h.masked_fill(given > 0, 0.0) if self.miss == "mask_input" else h * given
        if self.miss == "arange_vector":
            values = torch.arange(h.shape[self.dim]).to(h.dtype) / h.shape[self.dim]
            return h * as_vector(values, h.dim(), self.channels_first)
        if self.miss == "max_pool":
            return self._with_tokens_last(h, lambda t: functional.max_pool1d(t, 3, 1, 1))
        return _OTHER[self.miss](h, x) if self.miss in _OTHER else h

    def _with_weight(self, h: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.miss == "depthwise":
            return self._with_tokens_last(h, lambda t: functional.conv1d(t, weight, padding=1, groups=t.shape[1]))
        if self.miss == "spatial":
            return self._with_tokens_last(h, lambda t: functional.linear(t, weight))
        if self.miss == "squeeze_excite":
            pooled = h.mean(self.token_dim, keepdim=True)
            last = functional.linear(features_last(pooled) if self.channels_first else pooled, weight)
            return h * torch.sigmoid(features_first(last) if self.channels_first else last)
        if self.miss == "computed_vector":
            return h * (1.0 + weight)
        if self.miss == "token_gate":
            gate = functional.linear(features_last(x) if self.channels_first else x, weight)
            return h * torch.sigmoid(features_first(gate) if self.channels_first else gate)
        return h + weight if self.miss == "positional" else h * weight

    def _with_tokens_last(self, h: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(h) if self.channels_first else function(h.transpose(1, 2)).transpose(1, 2)


def _rms_norm(h: Tensor, dim: int) -> Tensor:
    return h * torch.rsqrt(h.square().mean(dim, keepdim=True) + 1e-6)


def _layer_norm(h: Tensor, dim: int) -> Tensor:
    if dim == -1:
        return functional.layer_norm(h, h.shape[-1:])
    centred = h - h.mean(dim, keepdim=True)
    return _rms_norm(centred, dim)


def _shuffle(h: Tensor, dim: int) -> Tensor:
    """[..., F] with neurons in another order, as ShuffleNet does."""
    dim = dim % h.dim()
    return h.unflatten(dim, (2, h.shape[dim] // 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


_NEURONS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda h, dim: h.softmax(dim),
    "layer_norm": _layer_norm,
    "rms_norm": lambda h, dim: functional.rms_norm(h, h.shape[-1:]) if dim == -1 else _rms_norm(h, dim),
    "rms_norm_by_hand": _rms_norm,
    "subtract_mean": lambda h, dim: h - h.mean(dim, keepdim=True),
    "cumsum": lambda h, dim: h.cumsum(dim),
    "roll_neurons": lambda h, dim: h.roll(1, dim),
    "flip_neurons": lambda h, dim: h.flip(dim),
    "shuffle_neurons": _shuffle,
    "sort_neurons": lambda h, dim: h.sort(dim).values,
    "gather_neurons": lambda h, dim: h.index_select(dim, torch.arange(h.shape[dim]).flip(0)),
}
_TOKENS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    **{f"{name}_tokens": _NEURONS[name] for name in ("softmax", "cumsum")},
    **{f"{name}_tokens": _NEURONS[f"{name}_neurons"] for name in ("roll", "flip", "sort")},
}


def _regroup(h: Tensor) -> Tensor:
    """[B, S, F] read as [B, F, S]: values change places."""
    return h.reshape(h.shape[0], h.shape[2], h.shape[1]).transpose(1, 2)


def _mutate_slice(h: Tensor) -> Tensor:
    h[:, :2].mul_(2.0)
    return h


def _assign_slice(h: Tensor) -> Tensor:
    h[:, 0] = 0.5
    return h


def _mutate_view(h: Tensor) -> Tensor:
    h.view_as(h).mul_(2.0)
    return h


def _mutate_input(h: Tensor, x: Tensor) -> Tensor:
    x.add_(1.0)
    return h


_OTHER: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regroup": lambda h, x: _regroup(h),
    "swap_neurons": lambda h, x: h.transpose(1, 2),
    "dropout_always": lambda h, x: functional.dropout(h, 0.5, True),
    "noise_always": lambda h, x: h + torch.randn_like(h),
    "batch_norm_training": lambda h, x: functional.batch_norm(h, None, None, training=True),
    "residual_between": lambda h, x: h + x,
    "global_gate": lambda h, x: h * x.mean(),
    "global_scale": lambda h, x: h / (h.abs().amax() + 1.0),
    "arange_tokens": lambda h, x: h * torch.arange(h.shape[1]).unsqueeze(-1),
    "slice_mutated": lambda h, x: _mutate_slice(h),
    "slice_assigned": lambda h, x: _assign_slice(h),
    "view_mutated": lambda h, x: _mutate_view(h),
    "x_mutated": _mutate_input,
    "input_mutated": _mutate_input,
}


def other_input(x: Tensor, miss: str) -> Tensor:
    """What gate reads where up reads x."""
    return {
        "two_inputs": lambda: x * 2.0,
        "two_inputs_shifted": lambda: x + 1.0,
        "crossed_tokens": lambda: x.transpose(0, 1),  # B = S
        "crossed_features": lambda: x.transpose(1, 2),  # S = D
    }.get(miss, lambda: x)()


# A projection to [..., 2 * F] whose neurons work in pairs, along `dim`.
COUPLED: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "maxout": lambda p, dim: p.unflatten(dim, (p.shape[dim] // 2, 2)).amax(dim + 1),
    "pair_softmax": lambda p, dim: p.unflatten(dim, (p.shape[dim] // 2, 2)).softmax(dim + 1).select(dim + 1, 0),
    "glu": lambda p, dim: functional.glu(p, dim),
}


# [B, S, F] to what down_proj reads.
RESHAPED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "swap_tokens": lambda h: h.transpose(0, 1),
    "swap_tokens_kept": lambda h: h.transpose(0, 1),
    "mean_tokens": lambda h: h.mean(1, keepdim=True),
    "flatten_tokens": lambda h: h.flatten(1),
    "slice_tokens": lambda h: h[:, 1:],
    "repeat_tokens": lambda h: torch.cat([h, h], 1),
}


class ConvolutionLayer(nn.Module):
    """No linear layer of each token: grouped, wide, strided or padded, over one dimension of tokens."""

    def __init__(self, recipe: Recipe, in_features: int, out_features: int) -> None:
        super().__init__()
        kind = recipe.miss.partition("_")[0]
        groups, size, stride = 1 + (kind == "grouped"), 3 if kind == "wide" else 1, 1 + (kind == "strided")
        padding = 1 if kind in ("wide", "padded") else 0
        self.conv = nn.Conv1d(in_features, out_features, size, stride=stride, padding=padding, groups=groups)

    def forward(self, x: Tensor, channels_first: bool) -> Tensor:
        """[B, S, D] to [B, S', F], or [B, D, S] to [B, F, S']."""
        return self.conv(x) if channels_first else features_last(self.conv(features_first(x)))


class ComputedLayer(nn.Module):
    """A linear layer whose weight is no parameter: quantised, low-rank adapted, or computed from `x`."""

    def __init__(self, recipe: Recipe, in_features: int, out_features: int) -> None:
        super().__init__()
        self.miss = recipe.miss
        self.base = nn.Linear(in_features, out_features)
        if self.miss.startswith("quantised"):
            self.register_buffer("codes", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8))
            self.scale = nn.Parameter(torch.rand(out_features, 1) * 0.01)
        if self.miss.startswith("lora"):
            self.a, self.b = nn.Linear(in_features, 2, bias=False), nn.Linear(2, out_features, bias=False)
        if self.miss == "hypernetwork":
            self.weights = nn.Linear(in_features, out_features * in_features, bias=False)
        shape = {
            "per_batch_weights": (recipe.batch, in_features, out_features),
            "per_token_weights": (recipe.seq, in_features, out_features),
            "sliced_weight": (2 * out_features, in_features),
        }.get(self.miss, (out_features, in_features))
        self.bank = nn.Parameter(torch.randn(shape) * 0.4)

    def forward(self, x: Tensor, channels_first: bool) -> Tensor:
        """[..., D] to [..., F], or [B, D, ...] to [B, F, ...]."""
        return features_first(self._last(features_last(x))) if channels_first else self._last(x)

    def _last(self, x: Tensor) -> Tensor:
        if self.miss.startswith("quantised"):
            codes = self.get_buffer("codes")
            return functional.linear(x, codes.to(x.dtype) * self.scale, self.base.bias)
        if self.miss.startswith("lora"):
            return self.base(x) + self.b(self.a(x)) * 0.5
        if self.miss == "hypernetwork":
            return functional.linear(x, self.weights(x.mean((0, 1))).view(-1, x.shape[-1]), self.base.bias)
        if self.miss == "sliced_weight":
            return functional.linear(x, self.bank[: self.base.out_features], self.base.bias)
        if self.miss == "scaled_weight":
            return functional.linear(x, self.bank * 0.5, self.base.bias)
        if self.miss == "per_token_weights":
            return torch.einsum("bsd,sdf->bsf", x, self.bank)
        if self.miss == "einsum_sum":
            return torch.einsum("bsd,fd->bf", x, self.bank).unsqueeze(1)
        return torch.bmm(x, self.bank)


_COMPUTED = (
    *("quantised_up", "lora_up", "hypernetwork", "per_batch_weights", "per_token_weights", "einsum_sum"),
    *("sliced_weight", "scaled_weight"),
)


def projection(recipe: Recipe, spelling: str, out_features: int) -> nn.Module:
    """A layer from D, as the miss wants it."""
    if recipe.miss.endswith("_conv"):
        return ConvolutionLayer(recipe, recipe.hidden, out_features)
    if recipe.miss in _COMPUTED:
        return ComputedLayer(recipe, recipe.hidden, out_features)
    return Layer(spelling, recipe.up_bias, recipe.hidden, out_features, recipe.rank)


def down_projection(recipe: Recipe) -> nn.Module:
    """A layer to D, as the miss wants it."""
    width = recipe.neurons + recipe.hidden if recipe.miss == "concat" else recipe.neurons
    if recipe.miss == "flatten_tokens":
        return Layer("linear", recipe.down_bias, recipe.seq * width, recipe.seq * recipe.hidden, 2)
    if recipe.miss in ("grouped_down", "wide_down", "strided_down", "padded_down"):
        return ConvolutionLayer(recipe, width, recipe.hidden)
    if recipe.miss in ("quantised_down", "lora_down"):
        return ComputedLayer(recipe, width, recipe.hidden)
    rank = 4 if recipe.miss == "outer_product" else recipe.rank
    return Layer(recipe.down, recipe.down_bias, width, recipe.hidden, rank)


class Unmatched(nn.Module):
    """Whole blocks `[B, S, D]` that have the form of an FFN, but no weights of a fixed size that are parameters."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.miss, self.activation = recipe.miss, ACTIVATION[recipe.activation]
        self.up, self.down = nn.Linear(recipe.hidden, recipe.neurons), nn.Linear(recipe.neurons, recipe.hidden)
        self.key, self.value = (nn.Linear(recipe.hidden, recipe.hidden) for _ in range(2))

    def forward(self, x: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """`keys` and `values` [N, D] are inputs of the model."""
        if self.miss == "input_weights" and keys is not None and values is not None:
            return self.activation(functional.linear(x, keys)) @ values
        if self.miss == "dynamic_neurons":
            count = x.shape[1]
            h = self.activation(functional.linear(x, self.up.weight[:count]))
            return functional.linear(h, self.down.weight[:, :count])
        return self.activation(self.value(x) @ self.key(x).transpose(1, 2)) @ x


UNMATCHED = ("input_weights", "dynamic_neurons", "attention_scores")
