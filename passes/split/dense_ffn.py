"""The weights of one matched FFN, in one orientation and dtype, and the function that they compute.

T tokens, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsify.errors import PassError
from sparsify.passes.activation import in_precision
from sparsify.passes.constants import constant_value
from sparsify.passes.linear_layer import LinearLayer, read_linear
from sparsify.passes.match_ffn import FFNMatch, NeuronVector


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`: weight `[out, in]`, bias `[out]` or None.

    `role` is its place in the FFN, `dtype` that of the model's own weight.
    """

    role: str
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype = torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class DenseFFN:
    """An FFN by itself. All tensors are fp32 (fp64 in an fp64 model).

    Attributes:
        projections: from D to F, in the order in which `activation` takes them.
        vectors: per-neuron vectors `[F]` (or single numbers `[]`) that `activation` takes after the projections.
        activation: neuron-wise module from projections and vectors to `[..., F]`.
        down: from F to the output features.
        requires_grad: the model's own weights do.
    """

    projections: tuple[Linear, ...]
    vectors: tuple[Tensor, ...]
    activation: GraphModule
    down: Linear
    requires_grad: bool

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the model's own weights, by role."""
        return {linear.role: linear.dtype for linear in (*self.projections, self.down)}

    def hidden(self, x: Tensor) -> Tensor:
        """The activated neurons of `x` `[T, D]`: `[T, F]`."""
        return self.activation(*(project(x) for project in self.projections), *self.vectors)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, D_out]`."""
        return self.down(self.hidden(x))


def read_ffn(graph_module: GraphModule, match: FFNMatch) -> DenseFFN:
    """Read the weights of a match, copied to fp32 where they are narrower."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    site = match.sites[0]
    projections = tuple(
        _read_linear(graph_module, nodes[name], projection.role, list(projection.rows))
        for name, projection in zip(site.projections, match.projections, strict=True)
    )
    down = _layer(nodes[site.down])
    last = _read_linear(graph_module, down.node, "down_proj", None)
    return DenseFFN(
        projections=projections,
        vectors=tuple(_read_vector(graph_module, nodes[vector.node], vector) for vector in match.vectors),
        activation=in_precision(match.function, last.weight.dtype),
        down=last,
        requires_grad=down.weight_source(graph_module).requires_grad,
    )


def _layer(node: Node) -> LinearLayer:
    layer = read_linear(node)
    if layer is None:
        raise PassError(f"`{node.name}` is no linear layer: the match is not of this graph")
    return layer


def _read_linear(graph_module: GraphModule, node: Node, role: str, rows: list[int] | None) -> Linear:
    layer = _layer(node)
    weight, bias = layer.weight_value(graph_module), layer.bias_value(graph_module)
    dtype = weight.dtype
    if rows is not None and rows != list(range(len(weight))):
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return Linear(role, _widen(weight), None if bias is None else _widen(bias), dtype)


def _read_vector(graph_module: GraphModule, node: Node, vector: NeuronVector) -> Tensor:
    """`[F]`, or `[]` for a single number."""
    value = _widen(constant_value(graph_module, node))
    if not vector.dims:
        return value.reshape(())
    by_neuron = value.movedim(vector.dims, tuple(range(len(vector.dims)))).flatten()
    return by_neuron[list(vector.index)]


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor.float()
