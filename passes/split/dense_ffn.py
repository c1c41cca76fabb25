"""The weights of one matched FFN, in one orientation and dtype, and the function that they compute.

T tokens, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.fx import GraphModule

from sparsify.passes.activation import extract_activation
from sparsify.passes.graph_values import as_node
from sparsify.passes.match_ffn import FFNMatch, Projection


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`: weight `[out, in]`, bias `[out]` or None. `role` is its place in the FFN."""

    role: str
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class DenseFFN:
    """An FFN by itself.

    Attributes:
        projections: from D to F, in the order in which `activation` takes them.
        vectors: per-neuron vectors `[F]` (or single numbers `[]`) that `activation` takes after the projections.
        activation: neuron-wise module from projections and vectors to `[..., F]`.
        down: from F to the output features.
        weight_dtype: dtype of the model's own weights; all tensors here are fp32 (fp64 in an fp64 model).
        requires_grad: the model's own weights do.
    """

    projections: tuple[Linear, ...]
    vectors: tuple[Tensor, ...]
    activation: GraphModule
    down: Linear
    weight_dtype: torch.dtype
    requires_grad: bool

    def hidden(self, x: Tensor) -> Tensor:
        """The activated neurons of `x` `[T, D]`: `[T, F]`."""
        return self.activation(*(project(x) for project in self.projections), *self.vectors)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, D_out]`."""
        return self.down(self.hidden(x))


def read_ffn(graph_module: GraphModule, match: FFNMatch) -> DenseFFN:
    """Read the weights of a match, copied to fp32 where they are narrower."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    inputs = [nodes[projection.node] for projection in match.projections] + [nodes[name] for name in match.vectors]
    interior = [nodes[name] for name in match.interior]
    weight = parameter(graph_module, match.down_proj.weight)
    vectors = (parameter(graph_module, str(nodes[name].target)).detach() for name in match.vectors)
    return DenseFFN(
        projections=tuple(_read_linear(graph_module, projection) for projection in match.projections),
        vectors=tuple(_widen(v).reshape(-1) if v.numel() > 1 else _widen(v) for v in vectors),
        activation=extract_activation(inputs, interior, as_node(nodes[match.down].args[0])),
        down=_read_linear(graph_module, match.down_proj),
        weight_dtype=weight.dtype,
        requires_grad=weight.requires_grad,
    )


def parameter(graph_module: GraphModule, path: str) -> Tensor:
    """The parameter, buffer or constant at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def _read_linear(graph_module: GraphModule, projection: Projection) -> Linear:
    weight = parameter(graph_module, projection.weight).detach()
    weight = weight.t() if projection.transposed else weight
    rows = slice(projection.start, projection.stop)
    bias = None if projection.bias is None else _widen(parameter(graph_module, projection.bias).detach()[rows])
    return Linear(projection.role, _widen(weight[rows]), bias)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
