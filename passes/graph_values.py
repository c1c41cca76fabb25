"""Typed access to what `torch.fx` types loosely: arguments that must be nodes, and the tensors that export recorded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.node import Argument


def as_node(argument: Argument) -> Node:
    """The argument, which the op's schema says is a tensor or list and the graph therefore holds as a node.

    Raises:
        TypeError: it is a constant.
    """
    if not isinstance(argument, Node):
        raise TypeError(f"expected a node of the graph, got {argument!r}")
    return argument


def fake_tensor(node: Node) -> Tensor | None:
    """The fake tensor that export recorded for the node; None for sizes, tuples and nodes without a record."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def last_size(node: Node) -> int | None:
    """The last size of the node's tensor, where it is a fixed number."""
    value = fake_tensor(node)
    return fixed_size(value.shape[-1]) if value is not None and value.dim() > 0 else None


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The number, also where export keeps it as a symbol that can only have one value; None if it may change."""
    return int(size) if is_concrete_int(size) else None


def op_name(node: Node) -> str:
    """`add` for `aten.add.Tensor`."""
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", node.target))
