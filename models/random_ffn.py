"""A model with feed-forward layers built as a `Recipe` says, near misses included, and inputs for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.models.ffn_near_misses import (
    COUPLED,
    RESHAPED,
    UNMATCHED,
    Between,
    Unmatched,
    down_projection,
    other_input,
    projection,
)
from sparsify.models.ffn_recipe import Recipe, fit
from sparsify.models.ffn_spellings import (
    ACTIVATION,
    COMBINE,
    Layer,
    Vector,
    add_noise,
    as_vector,
    cut_projection,
    features_first,
    features_last,
    in_frame,
)

_WIDTH = 3  # of grids and images
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def example_inputs(recipe: Recipe, more: int = 0) -> tuple[Tensor, ...]:
    """Inputs of `RandomFFN(recipe)`.

    Args:
        recipe: of the model.
        more: added to every dimension of tokens that is not 1.

    Returns:
        x, and what else a near miss is given.
    """
    generator = torch.Generator().manual_seed(recipe.seed + 100 * (1 + more))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(_DTYPES[recipe.dtype])

    batch, seq, width = (size if size == 1 else size + more for size in (recipe.batch, recipe.seq, _WIDTH))
    tokens = {2: (batch,), 3: (batch, seq), 4: (batch, seq, width)}[_rank(recipe)]

    def value(features: int) -> Tensor:
        return draw(batch, features, *tokens[1:]) if recipe.channels_first else draw(*tokens, features)

    x = value(recipe.hidden)
    if recipe.miss == "input_weights":
        return x, draw(recipe.neurons, recipe.hidden), draw(recipe.neurons, recipe.hidden)
    if recipe.miss == "scalar_input":
        return x, draw()
    if recipe.miss in ("token_gate_input", "mask_input", "foreign_input"):
        return x, value(recipe.neurons if recipe.miss == "foreign_input" else 1)
    return (x,)


def _rank(recipe: Recipe) -> int:
    return {"rows": 2, "tokens": 3, "channels": 3}.get(recipe.layout, 4)


class FFN(nn.Module):
    """One feed-forward layer. `forward` returns its output, and intermediate values that a near miss hands out."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        first, neurons, rank = recipe.channels_first, recipe.neurons, recipe.rank
        widths = {"plain": neurons, "two": neurons, "overlap": neurons + 1, "third": 3 * neurons}
        self.dim = 1 if first else -1
        self.up = projection(recipe, recipe.up, widths.get(recipe.cut, 2 * neurons))
        self.gate = Layer(recipe.gate, recipe.up_bias, recipe.hidden, neurons, rank) if recipe.cut == "two" else None
        self.down = down_projection(recipe)
        vectors = ((name, getattr(recipe, name)) for name in ("before", "after"))
        self.vectors = nn.ModuleDict(
            {name: Vector(kind, neurons, rank, first, recipe.full_rank) for name, kind in vectors if kind}
        )
        self.inert = nn.ModuleDict({"dropout_module": nn.Dropout(0.1), "identity": nn.Identity()})
        self.between = Between(recipe)
        self.unmatched = Unmatched(recipe) if recipe.miss in UNMATCHED else None

    def forward(self, x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Keeps the shape of `x`, but for near misses that drop or swap tokens."""
        if self.unmatched is not None:
            return self.unmatched(x, a, b), []
        leading = x.shape[:-1]
        if self.recipe.flatten:
            x = x.reshape(-1, x.shape[-1])
            a = a.reshape(-1, a.shape[-1]) if a is not None and a.dim() > 0 else a
        hidden, extra = self._hidden(x, a)
        y, more = self._project_down(hidden, x)
        return (y.reshape(*leading, y.shape[-1]) if self.recipe.flatten else y), extra + more

    def _hidden(self, x: Tensor, given: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        recipe = self.recipe
        gate, up, extra = self._project_up(x)
        gate = self._noise(gate, recipe.noise_before)
        gate = self.between(gate, x, given) if recipe.place == "before" else gate
        if "before" in self.vectors:
            gate = self.vectors["before"](gate)
        activated = in_frame(ACTIVATION[recipe.activation], recipe.frame, gate, recipe.channels_first)
        if recipe.miss == "inplace_alias":
            activated = gate * activated
        if "after" in self.vectors:
            activated = self.vectors["after"](activated)
        activated = self._noise(activated, recipe.noise_between)
        activated = self.between(activated, x, given) if recipe.place == "between" else activated
        hidden = self._noise(activated if up is None else self._combine(activated, up), recipe.noise_after)
        return self.between(hidden, x, given) if recipe.place == "after" else hidden, extra

    def _noise(self, h: Tensor, noise: str) -> Tensor:
        return add_noise(h, noise, self.recipe.channels_first, self.inert)

    def _project_up(self, x: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Gate, up and what else is handed out; a plain FFN has the first alone."""
        recipe = self.recipe
        dim, projected = self.dim, self.up(x, recipe.channels_first)
        if recipe.cut == "plain":
            return projected, None, []
        if self.gate is not None:
            gate = self.up if recipe.miss == "same_projection" else self.gate
            return gate(other_input(x, recipe.miss), recipe.channels_first), projected, []
        if recipe.cut == "third":
            gate, up, third = projected.chunk(3, dim)
            return gate, up, [third]
        if recipe.cut in COUPLED:
            return COUPLED[recipe.cut](projected, dim % projected.dim()), None, []
        parts = cut_projection(projected, recipe.cut, dim)
        if recipe.miss == "source_mutated":
            projected.mul_(2.0)
        if recipe.miss == "part_mutated":
            parts[0].mul_(2.0)
        gate, up = parts[::-1] if recipe.up_first else parts
        return gate, up, []

    def _combine(self, activated: Tensor, up: Tensor) -> Tensor:
        if self.recipe.miss == "outer_product":
            return activated.unsqueeze(1) * up.unsqueeze(2)
        combine = COMBINE[self.recipe.combine]
        return combine(up, activated) if self.recipe.up_first else combine(activated, up)

    def _project_down(self, h: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        miss, first = self.recipe.miss, self.recipe.channels_first
        if miss == "concat":
            h = torch.cat([x, h] if self.recipe.up_first else [h, x], self.dim)
        read = RESHAPED[miss](h) if miss in RESHAPED else h
        y = self._tied_down(read) if miss == "tied_down" else self.down(read, first)
        if miss == "swap_tokens":
            y = y.transpose(0, 1)
        if miss == "flatten_tokens":
            y = y.unflatten(1, (self.recipe.seq, -1))
        if miss == "outer_product":
            return y.mean(2), []
        if miss == "second_reader_added":
            return y + h.mean(self.dim, keepdim=True), []
        if miss == "mutated_after":
            h.zero_()
        if miss == "output_mutated":
            y.add_(1.0)
        return y, [h] if miss == "second_reader_output" else []

    def _tied_down(self, h: Tensor) -> Tensor:
        return functional.linear(h, self.up.matrix().t()) if isinstance(self.up, Layer) else h


class Attention(nn.Module):
    """Softmax attention with one head, written out. Its sums of values are no FFN."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[..., S, D] to the same."""
        scores = self.query(x) @ self.key(x).transpose(-1, -2) * x.shape[-1] ** -0.5
        return self.out(scores.softmax(-1) @ self.value(x))


class RandomFFN(nn.Module):
    """The model of a recipe, its weights drawn from the recipe's seed. The first FFN is `first`, another `second`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.first = FFN(recipe)
            if recipe.copies in ("two", "parallel"):
                self.second = FFN(fit(replace(recipe, miss="")))
            if recipe.miss in ("shared_up", "shared_down"):
                role = recipe.miss.removeprefix("shared_")
                setattr(self.second, role, getattr(self.first, role))
            self.norm = self._norm(recipe) if recipe.norm else nn.Identity()
            if recipe.attention:
                self.attention = Attention(recipe.hidden)
            if recipe.reader:
                self.reader = nn.Linear(recipe.hidden, recipe.hidden)
            if recipe.layer_scale:
                scale = as_vector(torch.rand(recipe.hidden) + 0.5, _rank(recipe), recipe.channels_first)
                self.layer_scale = nn.Parameter(scale.clone())
        self.to(_DTYPES[recipe.dtype])

    @staticmethod
    def _norm(recipe: Recipe) -> nn.Module:
        return nn.GroupNorm(1, recipe.hidden) if recipe.channels_first else nn.LayerNorm(recipe.hidden)

    def forward(self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """One tensor in the layout of the recipe, or several where intermediate values are handed out.

        Args:
            x: in the layout of the recipe.
            a: what a near miss is given.
            b: the same.
        """
        recipe = self.recipe
        if recipe.miss in ("x_mutated", "residual_inplace"):
            x = x.clone()
        if recipe.attention == "before":
            x = x + self._on_tokens(self.attention, x)
        first, extra = self._block(self.first, x, a, b)
        y = first
        if recipe.copies in ("two", "shared"):
            y, more = self._block(self.second if recipe.copies == "two" else self.first, y, a, b)
            extra += more
        if recipe.copies == "parallel":
            y = first + self._block(self.second, x, None, None)[0]
        if recipe.attention == "after":
            y = y + self._on_tokens(self.attention, y)
        if recipe.copies.startswith("tied"):
            y, extra = self._use_weight_again(y)
        return (y, *extra) if extra else y

    def _block(self, ffn: FFN, x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        recipe = self.recipe
        normed = self.norm(x)
        y, extra = ffn(normed, a, b)
        if recipe.layer_scale:
            y = y * self.layer_scale
        if recipe.reader:
            y = y + self._on_tokens(self.reader, normed)
        if recipe.attention == "parallel":
            y = y + self._on_tokens(self.attention, normed)
        if recipe.miss == "residual_inplace":
            return x.add_(y), extra
        return (x + y if recipe.residual else y), extra

    def _on_tokens(self, module: nn.Module, x: Tensor) -> Tensor:
        """Apply a module that has features last and knows two dimensions before them."""
        last = features_last(x) if self.recipe.channels_first else x
        y = module(last if last.dim() > 2 else last.unsqueeze(0))
        y = y if last.dim() > 2 else y.squeeze(0)
        return features_first(y) if self.recipe.channels_first else y

    def _use_weight_again(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        up = self.first.up
        matrix = up.matrix() if isinstance(up, Layer) else torch.zeros(0)
        last = features_last(y) if self.recipe.channels_first else y
        tied = functional.linear(last, matrix)  # [..., F]
        if self.recipe.copies == "tied":
            return y, [tied]
        return y, [functional.linear(tied, matrix.t())]
