"""Typed access to what `torch.fx` types loosely: arguments that must be nodes, and the tensors that export recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.node import Argument
from torch.utils import _pytree as pytree


def tensor_leaves(tree: object) -> list[Tensor]:
    """The tensors of inputs or outputs; caches and other objects, which a graph drops, are left out."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def floating_leaves(tree: object) -> list[Tensor]:
    """Of these tensors the floating ones that have a dimension: what outputs are compared by."""
    return [tensor for tensor in tensor_leaves(tree) if tensor.is_floating_point() and tensor.dim() > 0]


def output_leaves(graph_module: GraphModule, output: Any) -> list[tuple[Any, Any]]:
    """What a captured model returns, value by value, each with its path in the model's own output.

    Args:
        graph_module: the model.
        output: the argument of its output node, or of that in a copy of its graph.
    """
    pytree_info = getattr(getattr(graph_module.graph, "_codegen", None), "pytree_info", None)
    if pytree_info is not None:
        output = pytree.tree_unflatten(pytree.tree_leaves(output), pytree_info.out_spec)
    return list(pytree.tree_flatten_with_path(output)[0])


def as_node(argument: Argument) -> Node:
    """The argument, which the op's schema says is a tensor or list and the graph therefore holds as a node.

    Raises:
        TypeError: it is a constant.
    """
    if not isinstance(argument, Node):
        raise TypeError(f"expected a node of the graph, got {argument!r}")
    return argument


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an aten call by the names of its schema, defaults filled in."""
    schema = node.target._schema if isinstance(node.target, OpOverload) else None  # pyright: ignore[reportPrivateUsage]
    if schema is None:
        raise TypeError(f"`{node.name}` calls {node.target}, which is no aten op")
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def fake_tensor(node: Node) -> Tensor | None:
    """The fake tensor that export recorded for the node; None for sizes, tuples and nodes without a record."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def last_size(node: Node) -> int | None:
    """The last size of the node's tensor, where it is a fixed number."""
    return size_at(node, -1)


def size_at(node: Node, axis: int) -> int | None:
    """The size of the node's tensor along `axis` (negative: from the end), where it is a fixed number."""
    value = fake_tensor(node)
    if value is None or not -value.dim() <= axis < value.dim():
        return None
    return fixed_size(value.shape[axis])


def sizes_of(node: Node) -> list[int | str]:
    """The sizes of the node's tensor; those that may change as text, as arithmetic on them would fix them."""
    value = fake_tensor(node)
    if value is None:
        raise TypeError(f"`{node.name}` holds no tensor")
    return shape_of(value)


def shape_of(value: Tensor) -> list[int | str]:
    """The sizes of a fake tensor, as `sizes_of` gives them."""
    return [int(size) if is_concrete_int(size) else str(size) for size in value.shape]


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The number, also where export keeps it as a symbol that can only have one value; None if it may change."""
    return int(size) if is_concrete_int(size) else None


def op_name(node: Node) -> str:
    """`add` for `aten.add.Tensor`; "" for what is no op: an input or a weight may have the name of one."""
    if node.op != "call_function":
        return ""
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", node.target))


def is_in_place(node: Node) -> bool:
    """The op writes to its first argument, as `relu_` does."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]
