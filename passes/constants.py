"""Values that depend on parameters alone: the same for every input, so they can be read while compiling.

A model is captured in evaluation mode, where no parameter changes. Weights may be written as views of parameters (a
transpose, a chunk, a cast); what is computed from several of them is a constant too, but no weight of a layer.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sparsify.passes.graph_values import as_node, fake_tensor, is_in_place, op_name

aten = torch.ops.aten

# What moves numbers, or changes their precision, but computes nothing.
_VIEWS = frozenset(
    {
        "t", "transpose", "permute", "numpy_T", "mT", "movedim", "swapaxes", "swapdims", "view", "reshape",
        "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "select", "slice", "narrow", "chunk", "split",
        "split_with_sizes", "tensor_split", "unbind", "expand", "contiguous", "clone", "to", "_to_copy", "type_as",
        "detach", "detach_", "alias", "lift_fresh_copy",
    }
)  # fmt: skip

# Of these, what leaves every number in its place, so that equal shapes are equal tensors.
_KEEP_ORDER = frozenset(
    {
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "slice", "expand", "contiguous", "clone", "to",
        "detach", "alias", "lift_fresh_copy",
    }
)  # fmt: skip


def is_constant(node: Node) -> bool:
    """The node holds the same value for every input of the model."""
    if node.op == "get_attr":
        return fake_tensor(node) is not None
    if node.op != "call_function" or not _computes_purely(node):
        return False
    return all(is_constant(argument) for argument in node.all_input_nodes)


def constant_value(graph_module: GraphModule, node: Node) -> Tensor:
    """The value of a constant node, detached; a view of the parameter wherever the graph takes a view.

    Args:
        graph_module: owns the parameters.
        node: a node for which `is_constant` holds.
    """
    with torch.no_grad():
        return _value(graph_module, node)


def parameter_at(graph_module: GraphModule, path: str) -> Tensor:
    """The parameter, buffer or constant at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def weight_source(node: Node) -> Node | None:
    """The one floating parameter that the node is a view or cast of; None for what is computed or quantised."""
    while node.op == "call_function" and not _is_computed(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    value = fake_tensor(node)
    return node if node.op == "get_attr" and value is not None and value.is_floating_point() else None


def is_quantised(node: Node) -> bool:
    """The constant is made from integers somewhere: a quantised weight."""
    value = fake_tensor(node)
    if node.op == "get_attr" and value is not None and value.dim() > 1 and not value.is_floating_point():
        return True
    return any(is_quantised(argument) for argument in node.all_input_nodes if is_constant(argument))


def describe_constant(graph_module: GraphModule, node: Node) -> str:
    """The expression as text: equal texts are equal values.

    Single numbers count by value, as tracing stores one anew at every call that makes it. Views that change nothing are
    left out.
    """
    if _changes_nothing(node):
        return describe_constant(graph_module, node.all_input_nodes[0])
    if node.op == "get_attr":
        value = parameter_at(graph_module, str(node.target))
        is_number = value.dim() == 0 and not value.is_meta and not isinstance(value, nn.Parameter)
        return f"{value.dtype} {value.item()!r}" if is_number else str(node.target)
    arguments = map_arg((node.args, node.kwargs), lambda argument: _Text(describe_constant(graph_module, argument)))
    return f"{node.target}{arguments}"


def _changes_nothing(node: Node) -> bool:
    if op_name(node) not in _KEEP_ORDER:
        return False
    before, after = fake_tensor(node.all_input_nodes[0]), fake_tensor(node)
    if before is None or after is None:
        return False
    return (before.shape, before.dtype) == (after.shape, after.dtype)


class _Text(str):
    """Text that shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _computes_purely(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return False
    if is_in_place(node) and op_name(node) != "detach_":
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _is_computed(node: Node) -> bool:
    if node.target is operator.getitem:
        return False
    return not isinstance(node.target, OpOverload) or node.target.overloadpacket.__name__ not in _VIEWS


def _value(graph_module: GraphModule, node: Node) -> Tensor:
    if node.op == "get_attr":
        return parameter_at(graph_module, str(node.target)).detach()
    args = map_arg(node.args, lambda argument: _value(graph_module, argument))
    kwargs = map_arg(node.kwargs, lambda argument: _value(graph_module, argument))
    if not callable(node.target):
        raise TypeError(f"`{node.name}` is no call")
    return node.target(*args, **kwargs)


def broadcast_source(node: Node) -> Node:
    """The constant behind `expand`, `repeat` and `unsqueeze` that copy it along a batch dimension; else the node.

    Sizes may depend on the input here, which is why such a node is no constant itself.
    """
    while node.target in (aten.expand.default, aten.repeat.default) or _adds_front(node):
        node = as_node(node.args[0])
    return node


def _adds_front(node: Node) -> bool:
    return node.target is aten.unsqueeze.default and node.args[1] in (0,)
