"""A captured model with plain tensors as inputs and outputs, each with the name that it has in the ONNX file."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from sparsify.errors import ExportError
from sparsify.passes.graph_values import is_in_place, output_leaves

_CHECKS = (
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.default,
    torch.ops.aten._assert_async.msg,
)

SizeNames = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class FlatGraph:
    """A copy of a graph without pytrees; weights and submodules are shared with the model that it was taken from.

    Attributes:
        graph: the copy. Its placeholders are the tensor inputs; other inputs became constants.
        root: the model; it owns what the graph refers to.
        inputs: the example input tensors, by placeholder name, in order.
        output_names: one name an output.
        size_names: the dynamic dimensions of every input, dimension -> name of its size.
    """

    graph: fx.Graph
    root: fx.GraphModule
    inputs: dict[str, Tensor]
    output_names: tuple[str, ...]
    size_names: dict[str, dict[int, str]]

    def module(self) -> fx.GraphModule:
        """The graph as a module that takes the tensors one by one and returns a tuple."""
        return fx.GraphModule(self.root, self.graph)


def flatten_graph(model: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], sizes: SizeNames) -> FlatGraph:
    """Copy the graph of `model` and take its pytrees apart.

    Args:
        model: a captured model; it is left as it is.
        args: example inputs.
        kwargs: example keyword inputs.
        sizes: per placeholder, its dynamic dimensions and the names of their sizes.

    Raises:
        ExportError: the example inputs do not fit the model, or it returns no tensor.
    """
    leaves = _leaves(model, args, kwargs)
    graph = fx.Graph()
    output = graph.graph_copy(model.graph, copied := {})
    inputs: dict[str, Tensor] = {}
    for node, leaf in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        if isinstance(leaf, Tensor):
            inputs[node.name] = leaf
        else:
            _make_constant(graph, node, leaf)
    for source, node in copied.items():
        node.meta = source.meta.copy()
    named = _named_outputs(model, output, inputs)
    graph.output(_distinct(graph, named.values()))
    _drop_unread(graph)
    graph.lint()
    size_names = {name: dict(sizes.get(name, {})) for name in inputs}
    return FlatGraph(graph, model, inputs, tuple(named), size_names)


def with_names(flat: FlatGraph, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> FlatGraph:
    """The same graph with other names in the ONNX file.

    Args:
        flat: the graph.
        inputs: a name for every input, in order; None to keep those it has.
        outputs: the same for the outputs.

    Raises:
        ValueError: there are more or fewer names than values, or two values would share one.
    """
    old = list(flat.inputs)
    new = _checked_names("input_names", inputs, old)
    new_outputs = _checked_names("output_names", outputs, list(flat.output_names))
    repeated = sorted({name for name in [*new, *new_outputs] if [*new, *new_outputs].count(name) > 1})
    if repeated:
        raise ValueError(f"inputs and outputs need names of their own, got {', '.join(repeated)} more than once")
    pairs = list(zip(old, new, strict=True))
    return dataclasses.replace(
        flat,
        inputs={name: flat.inputs[before] for before, name in pairs},
        output_names=tuple(new_outputs),
        size_names={name: flat.size_names[before] for before, name in pairs},
    )


def _checked_names(option: str, names: Sequence[str] | None, known: list[str]) -> list[str]:
    if names is None:
        return known
    if isinstance(names, str) or len(names) != len(known) or not all(names):
        raise ValueError(
            f"{option} must hold a name for each of {len(known)} values, in the order {', '.join(known)}; got {names!r}"
        )
    return list(names)


def _leaves(model: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The example inputs in the order of the placeholders."""
    try:
        arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ExportError(f"the example inputs do not fit the captured model: {error}") from error
    leaves = pytree.tree_leaves(tuple(arguments.values()))
    placeholders = model.graph.find_nodes(op="placeholder")
    if len(leaves) != len(placeholders):
        raise ExportError(
            f"the example inputs hold {len(leaves)} values, but the captured model takes {len(placeholders)}; "
            "pass the inputs that it was captured with"
        )
    return leaves


def _make_constant(graph: fx.Graph, placeholder: Node, value: object) -> None:
    """Give every reader of a non-tensor input its value: shapes and branches were captured with it anyway."""

    def substitute(argument: Node) -> Any:
        return value if argument is placeholder else argument

    for user in list(placeholder.users):
        user.args = fx.map_arg(user.args, substitute)
        user.kwargs = fx.map_arg(user.kwargs, substitute)
    graph.erase_node(placeholder)


def _drop_unread(graph: fx.Graph) -> None:
    """Erase assertions, which ONNX lacks, and what nothing reads, so that every layer left is in the file."""
    for node in reversed(list(graph.nodes)):
        is_unread = not node.users and node.op not in ("placeholder", "output") and not is_in_place(node)
        if is_unread or node.target in _CHECKS:
            graph.erase_node(node)


def _named_outputs(model: fx.GraphModule, output: Any, taken: Mapping[str, object]) -> dict[str, Node]:
    """The output tensors by name: the path in the output pytree where it has keys, else `output`, `output_1`, ..."""
    named: dict[str, Node] = {}
    for position, (path, node) in enumerate(output_leaves(model, output)):
        if not isinstance(node, Node):
            continue
        named[_unique(_path_name(path, position), (*taken, *named))] = node
    if not named:
        raise ExportError("the model returns no tensor, so there is nothing to export")
    return named


def _distinct(graph: fx.Graph, outputs: Iterable[Node]) -> tuple[Node, ...]:
    """A value that is returned twice is copied: the exporter gives it one name."""
    found: list[Node] = []
    for node in outputs:
        if node in found:
            copied = graph.call_function(torch.ops.aten.clone.default, (node,))
            copied.meta = node.meta.copy()
            found.append(copied)
        else:
            found.append(node)
    return tuple(found)


def _path_name(path: Sequence[Any], position: int) -> str:
    if all(isinstance(key, pytree.SequenceKey) for key in path):
        return f"output_{position}" if position else "output"
    return "_".join(str(key.key if isinstance(key, pytree.MappingKey) else _plain_key(key)) for key in path)


def _plain_key(key: Any) -> object:
    return key.idx if isinstance(key, pytree.SequenceKey) else key.name


def _unique(name: str, taken: Sequence[str]) -> str:
    """ONNX names every value once, so an output called like an input needs another name."""
    if name not in taken:
        return name
    return next(other for i in range(len(taken) + 1) if (other := f"{name}_out{i or ''}") not in taken)


def axis_names(flat: FlatGraph) -> dict[str, dict[int, str]]:
    """Readable names for the dynamic dimensions: batch, sequence, height, width, else input and dimension."""
    known: dict[str, str] = {}
    named: dict[str, dict[int, str]] = {}
    for name, dims in flat.size_names.items():
        rank = flat.inputs[name].dim()
        for dim, size in dims.items():
            known.setdefault(size, _unique(_axis_name(name, dim, rank), tuple(known.values())))
        named[name] = {dim: known[size] for dim, size in dims.items()}
    return named


def _axis_name(name: str, dim: int, rank: int) -> str:
    if dim == 0:
        return "batch"
    if rank == 4 and dim in (2, 3):
        return ("height", "width")[dim - 2]
    if dim == 1 and rank in (2, 3):
        return "sequence"
    return f"{name}_dim{dim}"


def free_sizes(flat: FlatGraph) -> dict[str, int]:
    """The sizes that may be chosen freely, with their example values; `s0 + 1` is not one, it follows `s0`."""
    sizes: dict[str, int] = {}
    for name, dims in flat.size_names.items():
        for dim, size in dims.items():
            if sympy.sympify(size).is_Symbol:
                sizes.setdefault(size, flat.inputs[name].shape[dim])
    return sizes


def resize_inputs(flat: FlatGraph, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The example inputs at other sizes, cropped or tiled, so that token ids and masks stay valid.

    Args:
        flat: the model and its example inputs.
        sizes: a value for every name of `free_sizes`.

    Returns:
        Tensors by input name.
    """
    values = [(sympy.Symbol(name), value) for name, value in sizes.items()]
    resized: dict[str, Tensor] = {}
    for name, tensor in flat.inputs.items():
        for dim, size in flat.size_names[name].items():
            expression: Any = sympy.sympify(size)
            count = int(expression.subs(values))
            index = torch.arange(count, device=tensor.device) % max(tensor.shape[dim], 1)
            tensor = tensor.index_select(dim, index)
        resized[name] = tensor
    return resized


def with_outputs(flat: FlatGraph, extra: Callable[[fx.Graph], Sequence[Node]]) -> fx.GraphModule:
    """The module with more outputs; `extra` picks the nodes in a copy of the graph."""
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(flat.graph, {})
    graph.output((*outputs, *extra(graph)))
    return fx.GraphModule(flat.root, graph)
