"""Read a linear layer off its node: `aten.linear`, or a convolution that looks at one position only.

Other spellings become `aten.linear` in `normalize_linear`. A 1x1 convolution is the same layer with the features in
another axis; it is read where it stands, as rewriting those that stay dense would make them slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsify.passes.constants import constant_value, is_constant, is_quantised, parameter_at, weight_source
from sparsify.passes.graph_values import arguments, as_node, fake_tensor, op_name, size_at

aten = torch.ops.aten

_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
_BATCHED = (aten.bmm.default, aten.baddbmm.default, aten.matmul.default, aten.einsum.default, aten._grouped_mm.default)


@dataclass(frozen=True)
class LinearLayer:
    """`x @ W.T + b` along one axis.

    Attributes:
        node: holds the output.
        x: the input.
        weight: `[out, in]`, for a convolution `[out, in, 1, ..]`.
        bias: `[out]` or None.
        axis: of the features, in input and output, counted from the end: -1 for `aten.linear`.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    axis: int

    @property
    def out_features(self) -> int:
        """Size of the output along the axis."""
        return size_at(self.node, self.axis) or 0

    @property
    def fault(self) -> str | None:
        """Why weight and bias are no plain parameters, or None."""
        if weight_source(self.weight) is not None and (self.bias is None or weight_source(self.bias) is not None):
            return None
        if is_quantised(self.weight):
            return "its weight is quantised; convert the model before it is quantised"
        if is_constant(self.weight):
            return "its weight is computed from several parameters (an adapter or parametrization): merge it first"
        return "its weight is computed from the input of the model"

    def weight_value(self, graph_module: GraphModule) -> Tensor:
        """`[out, in]`, a view of the parameter where the graph takes a view."""
        return constant_value(graph_module, self.weight).flatten(1)

    def weight_source(self, graph_module: GraphModule) -> Tensor:
        """The parameter that the weight is a view of.

        Raises:
            ValueError: see `fault`.
        """
        source = weight_source(self.weight)
        if source is None:
            raise ValueError(f"`{self.node.name}`: {self.fault}")
        return parameter_at(graph_module, str(source.target))

    def bias_value(self, graph_module: GraphModule) -> Tensor | None:
        """`[out]`."""
        return None if self.bias is None else constant_value(graph_module, self.bias)


def read_linear(node: Node) -> LinearLayer | None:
    """The layer, or None where the node is none."""
    if node.target is aten.linear.default:
        given = arguments(node)
        return LinearLayer(node, as_node(given["input"]), as_node(given["weight"]), given["bias"], -1)
    dims = _pointwise_dims(node)
    if dims is None or arguments(node)["groups"] != 1:
        return None
    given = arguments(node)
    return LinearLayer(node, as_node(given["input"]), as_node(given["weight"]), given["bias"], -1 - dims)


def read_grouped(node: Node) -> LinearLayer | None:
    """A layer with one matrix per group: a grouped convolution, experts of a Mixture-of-Experts layer; else None."""
    dims = _pointwise_dims(node)
    if dims is not None:
        given = arguments(node)
        return LinearLayer(node, as_node(given["input"]), as_node(given["weight"]), given["bias"], -1 - dims)
    if "grouped_mm" in op_name(node):  # aten::_grouped_mm, and what stands in for it where it has no kernel
        return LinearLayer(node, as_node(node.args[0]), as_node(node.args[1]), None, -1)
    if node.target not in _BATCHED or len(node.all_input_nodes) < 2:
        return None
    weight = next((operand for operand in node.all_input_nodes if _is_bank(operand)), None)
    x = next((operand for operand in node.all_input_nodes if not _is_bank(operand)), None)
    if weight is None or x is None or is_constant(x):
        return None
    comes_first = node.target is not aten.baddbmm.default and node.all_input_nodes[0] is weight
    return LinearLayer(node, x, weight, None, -2 if comes_first else -1)


def _is_bank(node: Node) -> bool:
    """Several matrices `[E, .., ..]`, or those of them that the input selects."""
    while op_name(node) in ("index", "index_select", "embedding", "transpose", "mT", "to", "contiguous"):
        node = node.all_input_nodes[0]
    return _rank(node) == 3 and is_constant(node)


def _pointwise_dims(node: Node) -> int | None:
    """The number of spatial dimensions of a convolution with kernel 1, stride 1 and no padding; else None."""
    dims = _CONVOLUTIONS.get(node.target)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if dims is None:
        return None
    given = arguments(node)
    kernel = fake_tensor(as_node(given["weight"]))
    if kernel is None or any(size != 1 for size in kernel.shape[2:]):
        return None
    unpadded = given["padding"] in ("same", "valid") or _all(given["padding"], 0)
    return dims if unpadded and _all(given["stride"], 1) else None


def _all(value: Any, wanted: int) -> bool:
    return all(item == wanted for item in (value if isinstance(value, (list, tuple)) else [value]))


def _rank(node: Node) -> int:
    value = fake_tensor(node)
    return -1 if value is None else value.dim()
