"""Which nodes are neuron-wise, and those among them that must be written in simpler ones for experts.

A node is neuron-wise when every output element depends only on the same neuron of the inputs. F neurons.

1. glu(a)                 -> b * sigmoid(c)                                  b, c the halves of a
2. batch_norm(a, w, b)    -> (a - mean) * rsqrt(var + eps) * w + b           in evaluation mode, channels are neurons
3. prelu(a, w)            -> where(a > 0, a, w * a)
4. to(a, ..), type_as(a)  -> to(a, dtype of the result)                      whatever the spelling of the cast
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import Target

from sparsify.passes.graph_values import arguments, as_node, fake_tensor, op_name, sizes_of
from sparsify.passes.neuron_axes import Neurons

aten = torch.ops.aten

Emit = Callable[[Node, Neurons], Node]

# Linear in the activations: alone they make no activation function.
_COPIES = {"clone", "to", "_to_copy", "type_as", "contiguous", "alias", "detach", "lift_fresh_copy"}
_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_LINEAR = {"add", "add_", "sub", "rsub", "mul", "mul_", "div", "div_", "neg", "batch_norm"} | _COPIES | _DROPOUTS
# Neuron-wise, though torch does not tag them as pointwise.
_UNTAGGED = {
    "silu", "silu_", "gelu", "gelu_", "hardswish", "hardswish_", "log_sigmoid", "masked_fill", "where", "rsub",
    "special_erf", "special_expit", "zeros_like", "ones_like", "full_like", "threshold", "fill", "true_divide",
}  # fmt: skip


def is_neuron_wise(node: Node, dims: tuple[int, ...]) -> bool:
    """Whether the node leaves every neuron to itself.

    Args:
        node: any node that holds a tensor.
        dims: the dimensions of that tensor that count neurons.
    """
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    if any(fake_tensor(argument) is None for argument in node.all_input_nodes):
        return False
    name = op_name(node)
    if name in _DROPOUTS:
        return not arguments(node)["train"]
    if name == "batch_norm":
        return not arguments(node)["training"] and dims == (1,) and arguments(node)["running_mean"] is not None
    if name == "prelu":
        return dims == (1,) or len(sizes_of(as_node(node.args[1]))) == 0 or sizes_of(as_node(node.args[1])) == [1]
    if name == "glu":
        return len(dims) == 1 and dims[0] == int(arguments(node)["dim"]) % len(sizes_of(node))
    if name in _COPIES | _UNTAGGED:
        return True
    tags = node.target.tags
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def is_inert(node: Node) -> bool:
    """A copy, a cast to the dtype that is there already, or dropout that is off: the values stay what they are."""
    if op_name(node) not in _COPIES | _DROPOUTS or not is_neuron_wise(node, ()):
        return False
    before, after = fake_tensor(as_node(node.args[0])), fake_tensor(node)
    return before is not None and after is not None and before.dtype == after.dtype


def is_linear_op(node: Node) -> bool:
    """A node that alone makes no activation function."""
    return op_name(node) in _LINEAR


def out_of_place(target: Target) -> Target:
    """`aten.relu_.default` -> `aten.relu.default`; anything else unchanged."""
    if not isinstance(target, OpOverload):
        return target
    packet, overload = target.name().removeprefix("aten::").partition(".")[::2]
    if not packet.endswith("_"):
        return target
    return getattr(getattr(torch.ops.aten, packet[:-1], None), overload or "default", target)


def _glu(graph: Graph, node: Node, neurons: Neurons, emit: Emit) -> Node:
    source, width = as_node(node.args[0]), int(sizes_of(node)[neurons.dims[0]])
    value = emit(source, neurons)
    gate = emit(source, Neurons(neurons.dims, neurons.index + width, neurons.tokens))
    return graph.call_function(aten.mul.Tensor, (value, graph.call_function(aten.sigmoid.default, (gate,))))


def _batch_norm(graph: Graph, node: Node, neurons: Neurons, emit: Emit) -> Node:
    given, call = arguments(node), graph.call_function
    by_channel = Neurons((0,), neurons.index, ())
    variance = call(aten.add.Scalar, (emit(given["running_var"], by_channel), given["eps"]))
    centred = call(aten.sub.Tensor, (emit(given["input"], neurons), emit(given["running_mean"], by_channel)))
    y = call(aten.mul.Tensor, (centred, call(aten.rsqrt.default, (variance,))))
    if given["weight"] is not None:
        y = call(aten.mul.Tensor, (y, emit(given["weight"], by_channel)))
    return y if given["bias"] is None else call(aten.add.Tensor, (y, emit(given["bias"], by_channel)))


def _prelu(graph: Graph, node: Node, neurons: Neurons, emit: Emit) -> Node:
    given, call = arguments(node), graph.call_function
    value, slope = emit(given["self"], neurons), emit(given["weight"], Neurons((0,), neurons.index, ()))
    negative = call(aten.mul.Tensor, (value, slope))
    return call(aten.where.self, (call(aten.gt.Scalar, (value, 0)), value, negative))


def _cast(graph: Graph, node: Node, neurons: Neurons, emit: Emit) -> Node:
    value = fake_tensor(node)
    dtype = None if value is None else value.dtype
    return graph.call_function(aten.to.dtype, (emit(as_node(node.args[0]), neurons), dtype))


DECOMPOSED: Mapping[str, Callable[[Graph, Node, Neurons, Emit], Any]] = {
    "glu": _glu,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "to": _cast,
    "_to_copy": _cast,
    "type_as": _cast,
}
