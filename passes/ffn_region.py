"""Walk back from a linear layer to the projections that feed it, through neuron-wise nodes only.

F intermediate_size: the input width of the linear layer where the walk starts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from sparsify.passes.activation import is_view

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
_LINEAR = {"add", "sub", "rsub", "mul", "div", "neg", "clone", "to", "_to_copy", "dropout", "contiguous", "alias"}
_LINEAR |= {"dropout_", "detach", "type_as", "feature_dropout", "alpha_dropout", "lift_fresh_copy", "add_", "mul_"}

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
    parts: list[Part] = field(default_factory=list)
    vectors: list[Node] = field(default_factory=list)
    interior: list[Node] = field(default_factory=list)
    blocked: list[tuple[Node, str]] = field(default_factory=list)

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
            if _op_name(node) in ("add", "sub") and 0 < sum(arg in fed for arg in tensors) < len(tensors):
                return True
            fed |= {node} if any(arg in fed for arg in tensors) else set()
        return False


def find_region(down: Node) -> Region:
    """Collect the region above `down`. Nodes come in the order of the graph."""
    region = Region(down)
    width = down.args[0].meta["val"].shape[-1]
    stack, seen = [down.args[0]], set[Node]()
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
        return _visit_constant(region, node, width)
    if is_neuron_wise(node):
        region.interior.append(node)
        return node.all_input_nodes[:1] if is_view(node) else node.all_input_nodes
    region.blocked.append((node, _why_blocked(node)))
    # Look behind a norm, reduction or convolution of the same width, to tell a refused FFN from something else.
    behind = [arg for arg in node.all_input_nodes[:1] if _width(arg) == width == _width(node) and not _is_join(node)]
    return behind


def _visit_constant(region: Region, node: Node, width: int) -> list[Node]:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.numel() in (1, width) and (value.dim() == 0 or value.shape[-1] in (1, width)):
        region.vectors.append(node)
        return []
    region.blocked.append((node, "reads a constant that is no per-neuron vector"))
    return []


def is_neuron_wise(node: Node) -> bool:
    """Every output element depends only on the same neuron of the inputs."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    if any(not isinstance(arg.meta.get("val"), Tensor) for arg in node.all_input_nodes):
        return is_view(node)  # sizes as arguments: fine in a view, not in arithmetic
    if node.target in _TRANSPARENT or is_view(node):
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _as_part(node: Node) -> Part | None:
    if is_linear(node):
        return Part(node, node, 0, _width(node))
    if node.target is operator.getitem and node.args[0].target in _CHUNKS:
        return _as_chunk(node)
    if node.target is aten.slice.Tensor and is_linear(node.args[0]):
        return _as_slice(node)
    return None


def _as_chunk(node: Node) -> Part | None:
    chunks = node.args[0]
    linear, index = chunks.args[0], node.args[1]
    dim = chunks.args[2] if len(chunks.args) > 2 else chunks.kwargs.get("dim", 0)
    if not is_linear(linear) or not _is_last(dim, linear):
        return None
    widths = [int(chunk.shape[-1]) for chunk in chunks.meta["val"]]
    start = sum(widths[:index])
    return Part(node, linear, start, start + widths[index])


def _as_slice(node: Node) -> Part | None:
    linear, dim, start, stop, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    if not _is_last(dim, linear) or step != 1:
        return None
    start, stop, _ = slice(start, stop).indices(_width(linear))
    return Part(node, linear, start, stop)


def is_linear(node: object) -> bool:
    """`aten.linear` with a weight that is a parameter, plain or transposed."""
    return isinstance(node, Node) and node.target is aten.linear.default


def _is_last(dim: int, node: Node) -> bool:
    return dim in (-1, node.meta["val"].dim() - 1)


def _is_activation(node: Node, seen: set[Node]) -> bool:
    name = _op_name(node)
    if name in ("mul", "mul_") and sum(isinstance(arg, Node) and arg in seen for arg in node.args) == 2:
        return True
    return name not in _LINEAR and not is_view(node)


def _op_name(node: Node) -> str:
    """`add` for `aten.add.Tensor`."""
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", node.target))


def _is_join(node: Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _width(node: Node) -> int:
    value = node.meta.get("val")
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() > 0 else -1


def _why_blocked(node: Node) -> str:
    if node.op == "placeholder":
        return f"the input `{node.name}` is mixed in between the projections"
    return f"`{_op_name(node)}` stands between the projections and is not neuron-wise, so neurons cannot be divided"
