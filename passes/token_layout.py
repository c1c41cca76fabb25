"""How the tokens of an FFN lie in the model: behind `[T, D]` there may be `[B, S, D]`, flattened just before."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparsify.passes.graph_values import fake_tensor, shape_of

_FLATTENING = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.flatten.using_ints)


def before_flattening(x: Node, x_axis: int) -> Node:
    """The value that `x` `[T, D]` was flattened from, features last; `x` itself where there is none.

    Args:
        x: the input of an FFN.
        x_axis: of its features, counted from the end.
    """
    value = fake_tensor(x)
    if value is None or value.dim() != 2 or x_axis != -1 or x.target not in _FLATTENING:
        return x
    source = x.all_input_nodes[0]
    flattened = fake_tensor(source)
    if flattened is None or flattened.dim() < 3 or shape_of(flattened)[-1] != shape_of(value)[-1]:
        return x
    return source


def leading_sizes(x: Node, x_axis: int) -> list[int | str]:
    """The sizes of `x` without that of its features; those that may change as text."""
    value = fake_tensor(x)
    assert value is not None
    sizes = shape_of(value)
    del sizes[x_axis]
    return sizes


def group_size(x: Node, x_axis: int) -> int | None:
    """S at the example inputs, where the tokens are `[G, ..., D]`; None where there are only `[T, D]`."""
    value = fake_tensor(before_flattening(x, x_axis))
    if value is None or value.dim() < 3:
        return None
    sizes = [example_size(size) for size in value.movedim(x_axis, -1).shape[1:-1]]
    return None if None in sizes else int(torch.tensor(sizes).prod())


def example_size(size: int | torch.SymInt) -> int | None:
    """The number at the example inputs, for a size that may change too; None where export does not know it."""
    hint: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return None if hint is None else int(hint)
