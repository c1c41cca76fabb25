"""An FFN divided into experts, as tensors: how to divide it, and how to run it.

T tokens, D hidden_size, F intermediate_size, E num_experts, S of them shared, R = E - S routed, U units of m neurons:
routed experts have one each, or as many as their widths ask for (`sparsify.expert_units`).

    y = bias + shared(x) + sum over the selected e of (E_e(x) + expert_bias_e)

E_e is the sum over the neurons of expert e, without a bias. With every expert selected, no expert_bias and the dense
bias this is the dense FFN, whatever the partition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional

from sparsify import ops
from sparsify.expert_units import ExpertUnits
from sparsify.passes.split.dense_ffn import DenseFFN, Linear


@dataclass(frozen=True)
class Experts:
    """The routed experts, the shared one and the bias.

    Attributes:
        projections: per role `[U, m, D]`, and the biases `[U, m]` or None.
        vectors: per-neuron vectors `[U, m]`, or single numbers.
        down: `[U, D_out, m]`.
        expert_bias: `[U, D_out]` or None; that of an expert is the sum over its units.
        shared: one wide FFN that runs for every token, or None.
        bias: `[D_out]` or None.
        activation: see `DenseFFN`.
        roles: of the projections.
        sizes: units of each routed expert, where not all have one.
    """

    projections: tuple[Tensor, ...]
    projection_biases: tuple[Tensor | None, ...]
    vectors: tuple[Tensor, ...]
    down: Tensor
    expert_bias: Tensor | None
    shared: DenseFFN | None
    bias: Tensor | None
    activation: GraphModule
    roles: tuple[str, ...]
    sizes: tuple[int, ...] | None = None

    @property
    def num_routed(self) -> int:
        """R."""
        return self.num_units if self.sizes is None else len(self.sizes)

    @property
    def num_units(self) -> int:
        """U."""
        return self.down.shape[0]

    @property
    def units(self) -> ExpertUnits | None:
        """Says which units the experts have; None where each is one."""
        return None if self.sizes is None else ExpertUnits(self.sizes).to(self.down.device)

    @property
    def owners(self) -> Tensor:
        """`[U]`: the expert of each unit."""
        sizes = torch.tensor(self.sizes or [1] * self.num_units, dtype=torch.int64, device=self.down.device)
        return torch.arange(len(sizes), device=self.down.device).repeat_interleave(sizes)

    def of_one_width(self) -> list[tuple[Tensor, Tensor]]:
        """For each width, the experts of it `[n]`, and their units `[n, units of one]`."""
        owners, sizes = self.owners, torch.tensor(self.sizes or [1] * self.num_units)
        groups = ((sizes == size).nonzero().flatten() for size in sizes.unique())
        return [(group, torch.stack([(owners == e).nonzero().flatten() for e in group])) for group in groups]

    def to_units(self, biases: Tensor) -> Tensor:
        """`[R, D_out]` to `[U, D_out]`: the first unit of an expert takes its bias."""
        owners = self.owners
        first = torch.cat([owners.new_ones(1), owners.diff()]) if len(owners) else owners
        return biases[owners] * first.to(biases.dtype).unsqueeze(1)

    def to_experts(self, biases: Tensor) -> Tensor:
        """`[U, ..]` to `[R, ..]`: the sum over the units of each expert."""
        return biases.new_zeros(self.num_routed, *biases.shape[1:]).index_add_(0, self.owners, biases)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each routed expert."""
        return tuple(size * self.down.shape[2] for size in self.sizes or [1] * self.num_units)

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights, biases and vectors."""
        own = [*self.projections, *self.projection_biases, *self.vectors, self.down, self.expert_bias, self.bias]
        if self.shared is not None:
            linears = (*self.shared.projections, self.shared.down)
            own += [t for linear in linears for t in (linear.weight, linear.bias)] + list(self.shared.vectors)
        return sum(tensor.numel() for tensor in own if tensor is not None)

    def hidden(self, x: Tensor) -> Tensor:
        """The activated neurons of all routed experts, whether chosen or not: `[T, D]` to `[T, U, m]`."""
        biases = zip(self.projections, self.projection_biases, strict=True)
        projected = [functional.linear(x, w.flatten(0, 1), None if b is None else b.flatten()) for w, b in biases]
        vectors = [v.flatten() if v.dim() == 2 else v for v in self.vectors]
        return self.activation(*projected, *vectors).unflatten(1, (self.down.shape[0], self.down.shape[2]))

    def __call__(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """Run the selected experts through the ops that the graph will hold: `[T, D]`, `[T, K]` -> `[T, D_out]`.

        Without `routing_weights` `[T, K]` every expert counts as 1.
        """
        routed = self.num_units > 0
        y = self._routed(x, expert_ids, routing_weights) if routed else x.new_zeros(len(x), self.down.shape[1])
        return self.with_shared(y, x)

    def masked(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """As `__call__`, by products over all neurons: less work and memory where experts are many and narrow.

        Args:
            x: `[T, D]`.
            expert_ids: `[T, K]`; -1 is a slot that is not used.
            routing_weights: `[T, K]`.

        Returns:
            `[T, D_out]`.
        """
        used = expert_ids >= 0
        shares = x.new_zeros(len(x), self.num_routed)
        shares = shares.scatter_add_(1, expert_ids.clamp(min=0), routing_weights.to(x.dtype) * used)[:, self.owners]
        hidden = (self.hidden(x) * shares.unsqueeze(2)).flatten(1)
        y = hidden @ self.down.transpose(1, 2).flatten(0, 1)
        y = y if self.expert_bias is None else y + shares @ self.expert_bias
        return self.with_shared(y, x)

    def with_shared(self, y: Tensor, x: Tensor) -> Tensor:
        """Add what every token gets."""
        y = y if self.shared is None else y + self.shared(x)
        return y if self.bias is None else y + self.bias

    def _routed(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor | None) -> Tensor:
        weights = torch.ones_like(expert_ids, dtype=x.dtype) if routing_weights is None else routing_weights
        units = self.units
        weights, expert_ids = (weights, expert_ids) if units is None else units(weights, expert_ids)
        rows, order, offsets = ops.dispatch(x, expert_ids, self.num_units)
        biases = zip(self.projections, self.projection_biases, strict=True)
        projected = [ops.expert_linear(rows, weight, bias, offsets) for weight, bias in biases]
        expert_of_row = expert_ids.reshape(-1).index_select(0, order).clamp(min=0)
        vectors = [v.index_select(0, expert_of_row) if v.dim() == 2 else v for v in self.vectors]
        hidden = self.activation(*projected, *vectors)
        outputs = ops.expert_linear(hidden, self.down, self.expert_bias, offsets)
        return ops.combine(outputs, weights, order)


def divide(dense: DenseFFN, neurons: Tensor, num_shared: int) -> Experts:
    """Give every expert its neurons. The result equals the dense FFN when every expert is selected.

    Args:
        dense: the FFN.
        neurons: `[E, m]` int64, the neurons of each expert, shared experts first; -1 pads an expert that has fewer.
        num_shared: S.

    Returns:
        The experts, without expert_bias.
    """
    return divide_unevenly(dense, neurons[:num_shared].reshape(-1), neurons[num_shared:], None)


def divide_unevenly(dense: DenseFFN, shared: Tensor, routed: Tensor, sizes: tuple[int, ...] | None) -> Experts:
    """As `divide`, for experts of several units.

    Args:
        dense: the FFN.
        shared: `[s]` int64, neurons that run for every token; may be none.
        routed: `[U, m]` int64, neurons of each unit; -1 pads.
        sizes: units of each routed expert; None for one each.
    """
    take = routed.clamp(min=0)  # padding repeats neuron 0 with a zero column in down: its value cannot matter
    return Experts(
        projections=tuple(project.weight[take] for project in dense.projections),
        projection_biases=tuple(None if p.bias is None else p.bias[take] for p in dense.projections),
        vectors=tuple(v[take] if v.dim() == 1 else v for v in dense.vectors),
        down=_columns(dense.down.weight, routed),
        expert_bias=None,
        shared=take_neurons(dense, shared) if len(shared) else None,
        bias=None if dense.down.bias is None else dense.down.bias.clone(),
        activation=dense.activation,
        roles=tuple(project.role for project in dense.projections),
        sizes=sizes,
    )


def take_neurons(dense: DenseFFN, neurons: Tensor) -> DenseFFN:
    """The part of an FFN that `neurons` `[n]` compute, without the down bias; -1 is padding."""
    take = neurons.clamp(min=0)
    return replace(
        dense,
        projections=tuple(
            Linear(p.role, p.weight[take], None if p.bias is None else p.bias[take]) for p in dense.projections
        ),
        vectors=tuple(v[take] if v.dim() == 1 else v for v in dense.vectors),
        down=Linear(dense.down.role, _columns(dense.down.weight, neurons[None])[0], None),
    )


def _columns(weight: Tensor, neurons: Tensor) -> Tensor:
    """`[D_out, F]` by `[E, m]` -> `[E, D_out, m]`, zero where the neuron is padding."""
    columns = weight.t()[neurons.clamp(min=0)]  # [E, m, D_out]
    return (columns * (neurons >= 0).unsqueeze(-1)).transpose(1, 2).contiguous()
