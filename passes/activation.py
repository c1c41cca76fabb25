"""The neuron-wise part of an FFN as a graph of its own, and the name of the function that it computes.

F intermediate_size; a, b values of one neuron before the activation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from sparsify.passes.graph_values import as_node, last_size
from sparsify.passes.neuron_wise import out_of_place

_KNOWN: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "squared_relu": lambda a: torch.relu(a).square(),
    "gelu": functional.gelu,
    "gelu_tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": functional.elu,
    "leaky_relu": functional.leaky_relu,
    "hardswish": functional.hardswish,
    "identity": lambda a: a,
}
# Exact and tanh GELU, the closest pair, are 4e-4 apart; a cast to bf16 inside the activation makes it "custom".
_SAME = 1e-5
_FAR = torch.logspace(0.9, 5, 25)  # 8 to 1e5: an activation may be clamped there, as ReLU6 is


@dataclass(frozen=True)
class ActivationName:
    """`gate` is the index of the projection that passes through the activation, None in a plain FFN."""

    name: str
    gate: int | None


def extract_activation(inputs: Sequence[Node], region: Sequence[Node], result: Node) -> GraphModule:
    """Copy the nodes of `region`, which compute `result` from `inputs`, into a module.

    Views are dropped, as they only regroup tokens; in-place ops become functional.

    Args:
        inputs: projections and per-neuron vectors; they become the positional inputs, `[..., F]` each.
        region: the neuron-wise nodes, in the order of the graph.
        result: the input of down_proj, in `region` or (if nothing happens in between) in `inputs`.

    Returns:
        A module from the inputs to `[..., F]`; it works for any number of neurons.
    """
    copy = Graph()
    copied: dict[Node, Node] = {node: copy.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    for node in region:
        if is_view(node):
            copied[node] = copied[as_node(node.args[0])]
            continue
        copied[node] = copy.node_copy(node, copied.__getitem__)
        copied[node].target = out_of_place(node.target)
        copied[node].meta.clear()
    copy.output(copied[result])
    copy.eliminate_dead_code()
    return GraphModule({}, copy)


def is_view(node: Node) -> bool:
    """A node that regroups tokens and keeps the neurons: a view or reshape with the same last dimension."""
    aten = torch.ops.aten
    views = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default)
    if node.target not in (*views, aten.flatten.using_ints, aten.squeeze.dim):
        return False
    before, after = last_size(as_node(node.args[0])), last_size(node)
    return before is not None and before == after


def in_precision(function: GraphModule, dtype: torch.dtype) -> GraphModule:
    """The same function for inputs in `dtype`: changes to another floating precision become changes to this one."""
    copy = Graph()
    copied: dict[Node, Node] = {}
    for node in function.graph.nodes:
        copied[node] = copy.node_copy(node, copied.__getitem__)
        if node.target is torch.ops.aten.to.dtype and cast("torch.dtype", node.args[1]).is_floating_point:
            copied[node].args = (copied[node].args[0], dtype)
    return GraphModule({}, copy)


def name_activation(activation: GraphModule, num_projections: int, num_vectors: int) -> ActivationName:
    """Name the function by its values on a grid, so that every spelling of GELU is GELU.

    Returns:
        A name of the table above, or "custom".
    """
    if num_vectors or num_projections > 2:
        return ActivationName("custom", _first_gate(activation, num_projections))
    grid = torch.cat([torch.linspace(-6, 6, 121), _FAR, -_FAR])
    if num_projections == 1:
        return ActivationName(_match(lambda f: f(grid), _values(activation, grid), torch.zeros(())), None)
    other = torch.linspace(6, -6, len(grid)) * 0.7 + 0.3
    first, second = torch.cat([grid, other]), torch.cat([other, grid])  # either may be the gate
    values = _values(activation, first, second)
    for gate, (a, b) in enumerate(((first, second), (second, first))):
        name = _match(lambda f, a=a, b=b: f(a) * b, values, b)
        if name not in ("custom", "identity"):
            return ActivationName(name, gate)
    return ActivationName("custom", _first_gate(activation, num_projections))


def _values(activation: GraphModule, *inputs: Tensor) -> Tensor | None:
    """None when the activation cannot run on plain vectors (it may rely on a device or a dtype)."""
    with torch.no_grad():
        try:
            return activation(*inputs).float()
        except RuntimeError:
            return None


def _match(expected: Callable[[Callable[[Tensor], Tensor]], Tensor], values: Tensor | None, factor: Tensor) -> str:
    """`factor` is what multiplies the activation and its rounding."""
    if values is None:
        return "custom"
    for name, f in _KNOWN.items():
        wanted = expected(f)
        if ((wanted - values).abs() <= _SAME * (1 + wanted.abs() + factor.abs())).all():
            return name
    return "custom"


def _first_gate(activation: GraphModule, num_projections: int) -> int | None:
    """The first projection that something other than a multiplication reads; 0 if there is none."""
    if num_projections == 1:
        return None
    products = (torch.ops.aten.mul.Tensor, operator.mul)
    placeholders = activation.graph.find_nodes(op="placeholder")[:num_projections]
    read = (i for i, node in enumerate(placeholders) if any(user.target not in products for user in node.users))
    return next(read, 0)
