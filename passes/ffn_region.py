"""Walk back from a linear layer to the projections that feed it, through neuron-wise nodes only.

F intermediate_size: the input width of the linear layer where the walk starts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import Node

from sparsify.passes.activation import is_view
from sparsify.passes.graph_values import as_node, fake_tensor, last_size, op_name

aten = torch.ops.aten

# Neuron-wise, though torch does not tag them as pointwise.
_TRANSPARENT = (
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.silu.default,
    aten.gelu.default,
)
# Pointwise, but linear in the activations: alone they make no activation function.
_ARITHMETIC = {"add", "add_", "sub", "rsub", "mul", "mul_", "div", "neg"}
_COPIES = {"clone", "to", "_to_copy", "type_as", "contiguous", "alias", "detach", "lift_fresh_copy"}
_LINEAR = _ARITHMETIC | _COPIES | {"dropout", "dropout_", "feature_dropout", "alpha_dropout"}

_CHUNKS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Part:
    """Rows `start:stop` of the output of one linear layer: all of it, or the part that a chunk or slice takes."""

    node: Node
    linear: Node
    start: int
    stop: int


@dataclass
class Region:
    """What lies between the projections and `down`."""

    down: Node
    parts: list[Part] = field(default_factory=list[Part])
    vectors: list[Node] = field(default_factory=list[Node])
    interior: list[Node] = field(default_factory=list[Node])
    blocked: list[tuple[Node, str]] = field(default_factory=list[tuple[Node, str]])

    @property
    def has_activation(self) -> bool:
        """A neuron-wise node that is not linear, or a product of two values that depend on projections."""
        seen = {*self.interior, *(part.node for part in self.parts)}
        return any(_is_activation(node, seen) for node in self.interior)

    @property
    def is_residual_stream(self) -> bool:
        """A projection is added to something that no projection feeds, as where a norm reads `x + attention(x)`."""
        fed = {part.node for part in self.parts}
        between = sorted({*self.interior, *(node for node, _ in self.blocked)}, key=_position(self.down))
        for node in between:
            tensors = [arg for arg in node.all_input_nodes if arg not in self.vectors]
            if op_name(node) in ("add", "sub") and 0 < sum(arg in fed for arg in tensors) < len(tensors):
                return True
            fed |= {node} if any(arg in fed for arg in tensors) else set()
        return False


def find_region(down: Node) -> Region:
    """Collect the region above `down`. Nodes come in the order of the graph."""
    region = Region(down)
    width = last_size(as_node(down.args[0])) or 0
    stack, seen = [as_node(down.args[0])], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(_visit(region, node, width))
    position = _position(down)
    region.interior.sort(key=position)
    region.vectors.sort(key=position)
    region.parts.sort(key=lambda part: (position(part.linear), part.start))
    return region


def _position(node: Node) -> Callable[[Node], int]:
    """The order of the graph, as a sort key."""
    return {other: i for i, other in enumerate(node.graph.nodes)}.__getitem__


def _visit(region: Region, node: Node, width: int) -> list[Node]:
    """File the node; return the nodes to visit next."""
    part = _as_part(node)
    if part is not None:
        region.parts.append(part)
        return []
    if node.op == "get_attr":
        _file_constant(region, node, width)
        return []
    if is_neuron_wise(node):
        region.interior.append(node)
        return node.all_input_nodes[:1] if is_view(node) else node.all_input_nodes
    region.blocked.append((node, _why_blocked(node)))
    # Look behind a norm, reduction or convolution of the same width, to tell a refused FFN from something else.
    return [arg for arg in node.all_input_nodes[:1] if last_size(arg) == width == last_size(node)]


def _file_constant(region: Region, node: Node, width: int) -> None:
    value = fake_tensor(node)
    if value is not None and (value.numel() == 1 or value.numel() == width == last_size(node)):
        region.vectors.append(node)
        return
    region.blocked.append((node, f"`{node.target}`, no per-neuron vector, is mixed in between the projections"))


def is_neuron_wise(node: Node) -> bool:
    """Every output element depends only on the same neuron of the inputs."""
    if node.op != "call_function" or fake_tensor(node) is None:
        return False
    if any(fake_tensor(arg) is None for arg in node.all_input_nodes):
        return is_view(node)  # sizes as arguments: fine in a view, not in arithmetic
    if node.target in _TRANSPARENT or is_view(node):
        return True
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _as_part(node: Node) -> Part | None:
    if is_linear(node):
        return Part(node, node, 0, last_size(node) or 0)
    if node.target is operator.getitem and as_node(node.args[0]).target in _CHUNKS:
        return _as_chunk(node)
    if node.target is aten.slice.Tensor and is_linear(node.args[0]):
        return _as_slice(node)
    return None


def _as_chunk(node: Node) -> Part | None:
    """`chunk(linear, ..)[index]` on the last dimension."""
    chunks, index = as_node(node.args[0]), cast("int", node.args[1])
    linear = as_node(chunks.args[0])
    dim = chunks.args[2] if len(chunks.args) > 2 else chunks.kwargs.get("dim", 0)
    if not is_linear(linear) or not _is_last(dim, linear):
        return None
    widths = [int(chunk.shape[-1]) for chunk in chunks.meta["val"]]
    start = sum(widths[:index])
    return Part(node, linear, start, start + widths[index])


def _as_slice(node: Node) -> Part | None:
    """`linear[..., start:stop]`."""
    linear = as_node(node.args[0])
    dim, start, stop, step = cast("tuple[Any, ...]", (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]))
    if not _is_last(dim, linear) or step != 1:
        return None
    start, stop, _ = slice(start, stop).indices(last_size(linear) or 0)
    return Part(node, linear, start, stop)


def is_linear(node: object) -> bool:
    """A linear layer, whatever its weight is."""
    return isinstance(node, Node) and node.target is aten.linear.default


def _is_last(dim: object, node: Node) -> bool:
    value = fake_tensor(node)
    return value is not None and dim in (-1, value.dim() - 1)


def _is_activation(node: Node, seen: set[Node]) -> bool:
    if op_name(node) in ("mul", "mul_") and sum(isinstance(arg, Node) and arg in seen for arg in node.args) == 2:
        return True
    return op_name(node) not in _LINEAR and not is_view(node)


def _why_blocked(node: Node) -> str:
    if node.op == "placeholder":
        return f"the input `{node.name}` is mixed in between the projections"
    return f"`{op_name(node)}` stands between the projections and is not neuron-wise, so neurons cannot be divided"
