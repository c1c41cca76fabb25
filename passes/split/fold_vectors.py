"""Fold what an FFN does to its neurons with constants alone into its weights, where it is affine.

Experts otherwise gather a row of every constant for each token. F intermediate_size.

1. act(c * (x W^T + b) + d)     -> act(x (c W)^T + (c b + d))          batch norm, learned scales before the activation
2. (c * h + d) V^T + e          -> h (V c)^T + (e + V d)               scales after it, in any factor of a product
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from sparsify.passes.activation import in_precision
from sparsify.passes.graph_values import as_node, op_name
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.split.dense_ffn import DenseFFN, Linear

aten = torch.ops.aten
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_SHIFTS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)


def fold_vectors(match: FFNMatch, dense: DenseFFN) -> tuple[FFNMatch, DenseFFN]:
    """The same FFN with fewer vectors: `match.function` and `match.vectors` go on fitting the result.

    Args:
        match: of `dense`.
        dense: fp32 or fp64, as `read_ffn` gives it.
    """
    folding = _Folding(match.function, len(match.projections))
    constants = in_precision(folding.constants, dense.down.weight.dtype)(*dense.vectors)
    *ends, (factor, offset) = zip(constants[::2], constants[1::2], strict=True)
    projections = tuple(
        _scale_rows(linear, scale, shift) for linear, (scale, shift) in zip(dense.projections, ends, strict=True)
    )
    kept = folding.kept
    folded = replace(
        dense,
        projections=projections,
        vectors=tuple(dense.vectors[i] for i in kept),
        activation=in_precision(folding.function, dense.down.weight.dtype),
        down=_scale_columns(dense.down, factor, offset),
    )
    vectors = tuple(match.vectors[i] for i in kept)
    return replace(match, function=folding.function, vectors=vectors), folded


def fold_function(match: FFNMatch) -> tuple[GraphModule, int]:
    """`match.function` as `fold_vectors` leaves it, and how many vectors it still takes."""
    folding = _Folding(match.function, len(match.projections))
    return folding.function, len(folding.kept)


def _scale_rows(linear: Linear, scale: Tensor | None, shift: Tensor | None) -> Linear:
    weight, bias = linear.weight, linear.bias
    if scale is not None:
        scale = scale.to(weight.dtype)
        weight = weight * scale.reshape(-1, 1)
        bias = None if bias is None else bias * scale
    if shift is not None:
        shift = shift.to(weight.dtype).expand(len(weight))
        bias = shift.clone() if bias is None else bias + shift
    return replace(linear, weight=weight, bias=bias)


def _scale_columns(down: Linear, factor: Tensor | None, offset: Tensor | None) -> Linear:
    weight, bias = down.weight, down.bias
    if offset is not None:
        moved = weight @ offset.to(weight.dtype).expand(weight.shape[1])
        bias = moved if bias is None else bias + moved
    return replace(down, weight=weight if factor is None else weight * factor.to(weight.dtype), bias=bias)


@dataclass
class _Affine:
    """`scale * value + shift`, by nodes of the graph of constants; None is 1 and 0."""

    scale: Node | None = None
    shift: Node | None = None


class _Folding:
    """The function without its affine ends, and a graph that computes these from the vectors.

    Attributes:
        function: from projections and the `kept` vectors to the input of down_proj.
        constants: from all vectors to scale and shift of every projection, then of the input of down_proj.
        kept: indices of vectors.
    """

    def __init__(self, function: GraphModule, num_projections: int) -> None:
        self._graph, self._constants = Graph(), Graph()
        self._graph.output(self._graph.graph_copy(function.graph, {}))
        inputs = self._graph.find_nodes(op="placeholder")
        projections, vectors = inputs[:num_projections], inputs[num_projections:]
        self._varying = _reached_from(projections)
        self._copies = {node: self._constants.placeholder(node.name) for node in vectors}
        ends = [self._fold_projection(node) for node in projections]
        ends.append(self._fold_result())
        self._constants.output(tuple(node for end in ends for node in (end.scale, end.shift)))
        self._graph.eliminate_dead_code()
        self.kept = [i for i, node in enumerate(vectors) if node.users]
        for node in vectors:
            if not node.users:
                self._graph.erase_node(node)
        self.function, self.constants = GraphModule({}, self._graph), GraphModule({}, self._constants)

    def _fold_projection(self, source: Node) -> _Affine:
        """Outwards from the projection: every node scales and shifts what the ones before it gave."""
        end = _Affine()
        while len(source.users) == 1:
            (user,) = source.users
            other = self._constant_operand(user, source)
            if op_name(user) == "to":
                source = user
            elif other is None or user.target not in (*_SCALES, *_SHIFTS):
                break
            elif user.target in _SCALES:
                end.scale = self._apply(user, end.scale or self._number(1.0), other)
                end.shift = None if end.shift is None else self._apply(user, end.shift, other)
                self._bypass(user, source)
            else:
                end.shift = self._apply(user, end.shift or self._number(0.0), other)
                self._bypass(user, source)
        return end

    def _fold_result(self) -> _Affine:
        """Inwards from the result: every node is scaled by those around it."""
        end = _Affine()
        (output,) = self._graph.find_nodes(op="output")
        stack: list[tuple[Node, bool]] = [(as_node(output.args[0]), True)]
        while stack:
            node, may_shift = stack.pop()
            inner = [argument for argument in node.all_input_nodes if argument in self._varying]
            other = self._constant_operand(node, inner[0]) if len(inner) == 1 else None
            if len(node.users) != 1 or not inner:
                continue
            if op_name(node) == "to":
                stack.append((inner[0], may_shift))
            elif len(inner) == 2 and node.target is aten.mul.Tensor:
                stack += [(factor, False) for factor in inner]
            elif other is not None and node.target in _SCALES:
                end.scale = self._apply(node, end.scale or self._number(1.0), other)
                stack.append((self._bypass(node, inner[0]), may_shift))
            elif other is not None and node.target in _SHIFTS and may_shift:
                shift = self._apply(node, self._number(0.0), other)
                shift = shift if end.scale is None else self._multiply(shift, end.scale)
                end.shift = shift if end.shift is None else self._constants.call_function(
                    aten.add.Tensor, (end.shift, shift)
                )
                stack.append((self._bypass(node, inner[0]), may_shift))
        return end

    def _constant_operand(self, node: Node, source: Node) -> Argument:
        """The other operand of `node`, where it is a constant and `source` stands where division allows it."""
        if node.op != "call_function" or node.kwargs or len(node.args) != 2:
            return None
        first, second = node.args
        commutes = node.target in (aten.mul.Tensor, aten.add.Tensor)
        other = second if first is source else first if commutes else None
        if other is source or other in self._varying:
            return None
        return self._evaluate(other) if isinstance(other, Node) else other

    def _evaluate(self, constant: Node) -> Node:
        """The same value in the graph of constants."""
        if constant not in self._copies:
            for source in constant.all_input_nodes:
                self._evaluate(source)
            self._copies[constant] = self._constants.node_copy(constant, self._copies.__getitem__)
        return self._copies[constant]

    def _apply(self, node: Node, value: Node, other: Argument) -> Node:
        return self._constants.call_function(node.target, (value, other))  # pyright: ignore[reportArgumentType]

    def _multiply(self, a: Node, b: Node) -> Node:
        return self._constants.call_function(aten.mul.Tensor, (a, b))

    def _number(self, value: float) -> Node:
        return self._constants.call_function(aten.scalar_tensor.default, (value,), {"dtype": torch.float64})

    def _bypass(self, node: Node, source: Node) -> Node:
        node.replace_all_uses_with(source)
        self._graph.erase_node(node)
        return source


def _reached_from(projections: list[Node]) -> set[Node]:
    """The projections, and every node that one of them feeds."""
    reached = set(projections)
    for node in projections[0].graph.nodes:
        if reached.intersection(node.all_input_nodes):
            reached.add(node)
    return reached
