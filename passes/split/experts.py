"""An FFN divided into experts, as tensors: how to divide it, and how to run it.

T tokens, D hidden_size, F intermediate_size, E num_experts, S of them shared, R = E - S routed, m neurons of an expert.

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
from sparsify.passes.split.dense_ffn import DenseFFN, Linear


@dataclass(frozen=True)
class Experts:
    """The routed experts, the shared one and the bias.

    Attributes:
        projections: per role `[R, m, D]`, and the biases `[R, m]` or None.
        vectors: per-neuron vectors `[R, m]`, or single numbers.
        down: `[R, D_out, m]`.
        expert_bias: `[R, D_out]` or None.
        shared: one wide FFN of `S * m` neurons that runs for every token, or None.
        bias: `[D_out]` or None.
        activation: see `DenseFFN`.
        roles: of the projections.
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

    @property
    def num_routed(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights, biases and vectors."""
        own = [*self.projections, *self.projection_biases, *self.vectors, self.down, self.expert_bias, self.bias]
        if self.shared is not None:
            linears = (*self.shared.projections, self.shared.down)
            own += [t for linear in linears for t in (linear.weight, linear.bias)] + list(self.shared.vectors)
        return sum(tensor.numel() for tensor in own if tensor is not None)

    def hidden(self, x: Tensor) -> Tensor:
        """The activated neurons of all routed experts, whether chosen or not: `[T, D]` to `[T, R, m]`."""
        biases = zip(self.projections, self.projection_biases, strict=True)
        projected = [functional.linear(x, w.flatten(0, 1), None if b is None else b.flatten()) for w, b in biases]
        vectors = [v.flatten() if v.dim() == 2 else v for v in self.vectors]
        return self.activation(*projected, *vectors).unflatten(1, (self.num_routed, self.down.shape[2]))

    def __call__(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """Run the selected experts through the ops that the graph will hold: `[T, D]`, `[T, K]` -> `[T, D_out]`.

        Without `routing_weights` `[T, K]` every expert counts as 1.
        """
        routed = self.num_routed > 0
        y = self._routed(x, expert_ids, routing_weights) if routed else x.new_zeros(len(x), self.down.shape[1])
        y = y if self.shared is None else y + self.shared(x)
        return y if self.bias is None else y + self.bias

    def _routed(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor | None) -> Tensor:
        rows, order, offsets = ops.dispatch(x, expert_ids, self.num_routed)
        biases = zip(self.projections, self.projection_biases, strict=True)
        projected = [ops.expert_linear(rows, weight, bias, offsets) for weight, bias in biases]
        expert_of_row = expert_ids.reshape(-1).index_select(0, order).clamp(min=0)
        vectors = [v.index_select(0, expert_of_row) if v.dim() == 2 else v for v in self.vectors]
        hidden = self.activation(*projected, *vectors)
        outputs = ops.expert_linear(hidden, self.down, self.expert_bias, offsets)
        weights = torch.ones_like(expert_ids, dtype=x.dtype) if routing_weights is None else routing_weights
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
    routed, shared = neurons[num_shared:], neurons[:num_shared].reshape(-1)
    take = routed.clamp(min=0)  # padding repeats neuron 0 with a zero column in down: its value cannot matter
    return Experts(
        projections=tuple(project.weight[take] for project in dense.projections),
        projection_biases=tuple(None if p.bias is None else p.bias[take] for p in dense.projections),
        vectors=tuple(v[take] if v.dim() == 1 else v for v in dense.vectors),
        down=_columns(dense.down.weight, routed),
        expert_bias=None,
        shared=take_neurons(dense, shared) if num_shared else None,
        bias=None if dense.down.bias is None else dense.down.bias.clone(),
        activation=dense.activation,
        roles=tuple(project.role for project in dense.projections),
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
