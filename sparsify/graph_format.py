"""Graphs as JSON and back: what `serialize` writes to `graph.json`.

A file may only compute. fx compiles Python source from names and constants, so every name is checked against a pattern
before it enters a graph, every value is one of the few kinds below, and functions come from `FUNCTIONS` or from the
dispatcher namespaces of `_OP`, never from an attribute path in the file.
"""

from __future__ import annotations

import importlib
import json
import keyword
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree

import sparsify.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  # puts torch.ops.sparsify into the dispatcher
from sparsify.expert_units import ExpertUnits
from sparsify.routers import Router
from sparsify.sparse_model import SIZES_KEY, input_sizes

_OPERATORS = (
    "add sub mul truediv floordiv mod pow neg pos abs and_ or_ xor invert not_ eq ne lt le gt ge getitem lshift rshift"
)
_HIGHER_ORDER = "wrap_with_set_grad_enabled wrap_with_autocast cond"

# No attrgetter, methodcaller or call: with those a graph could reach any Python object.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"math.{name}": value for name, value in vars(math).items() if callable(value) and name[0] != "_"},
    **{f"torch.{name}": value for name, value in vars(torch).items() if name.startswith(("sym_", "_sym_"))},
    **{f"torch.ops.higher_order.{name}": getattr(torch.ops.higher_order, name) for name in _HIGHER_ORDER.split()},
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
_CONSTANT_TYPES = (torch.dtype, torch.layout, torch.memory_format)
_CONSTANTS = {str(value): value for value in vars(torch).values() if isinstance(value, _CONSTANT_TYPES)}
_NON_FINITE = {str(value): value for value in (math.inf, -math.inf, math.nan)}

_OP = re.compile(r"torch\.ops\.(aten|prims|sparsify)\.(\w+)\.(\w+)", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_HF_OUTPUT = re.compile(r"(transformers(?:\.\w+)*\.(?:modeling_\w+|cache_utils))\.\w+", re.ASCII)


class FormatError(ValueError):
    """A graph holds what the format has no words for, or a file what no graph may hold. The message says what."""


def check_path(path: object) -> str:
    """Return `path` if it is a dotted name of letters, digits, `_` and `-`.

    Raises:
        FormatError: it is anything else.
    """
    if isinstance(path, str) and _PATH.fullmatch(path):
        return path
    raise FormatError(f"{path!r} is no dotted name of letters, digits, '_' and '-'")


def encode_value(value: object) -> Any:
    """Encode an argument of a node as JSON.

    Raises:
        FormatError: it is no None, bool, int, float, complex, str, list, tuple, dict with string keys, slice, node,
            dtype, device, layout or memory format.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case complex():
            return {"complex": [encode_value(value.real), encode_value(value.imag)]}
        case list():
            return [encode_value(item) for item in value]
        case tuple():
            return {"tuple": [encode_value(item) for item in value]}
        case dict() if all(isinstance(key, str) for key in value):
            return {"dict": {key: encode_value(item) for key, item in value.items()}}
        case slice():
            return {"slice": [encode_value(part) for part in (value.start, value.stop, value.step)]}
        case fx.Node():
            return {"node": value.name}
        case torch.device():
            return {"device": str(value)}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {"constant": str(value)}
        case _:
            raise FormatError(f"a value of type {type(value).__name__} ({value!r:.80}) has no place in the format")


def decode_value(data: Any, nodes: dict[str, fx.Node]) -> Any:
    """Undo `encode_value`; `nodes` are the nodes that the value may refer to.

    Raises:
        FormatError: `data` is nothing that `encode_value` writes, or refers to a node that is not there.
    """
    match data:
        case None | bool() | int() | float() | str():
            return data
        case list():
            return [decode_value(item, nodes) for item in data]
        case {"tuple": list(items)}:
            return tuple(decode_value(item, nodes) for item in items)
        case {"dict": dict(items)}:
            return {key: decode_value(item, nodes) for key, item in items.items()}
        case {"slice": [start, stop, step]}:
            return slice(decode_value(start, nodes), decode_value(stop, nodes), decode_value(step, nodes))
        case {"node": str(name)} if name in nodes:
            return nodes[name]
        case {"device": str(name)}:
            return torch.device(name)
        case {"constant": str(name)} if name in _CONSTANTS:
            return _CONSTANTS[name]
        case {"float": str(name)} if name in _NON_FINITE:
            return _NON_FINITE[name]
        case {"complex": [real, imag]}:
            return complex(decode_value(real, nodes), decode_value(imag, nodes))
        case _:
            raise FormatError(f"the argument {data!r:.80} is no value, or a node that is not defined before its use")


def encode_tree_spec(spec: pytree.TreeSpec) -> Any:
    """Encode the structure of inputs or outputs as JSON.

    Raises:
        FormatError: it holds a container that cannot be restored.
    """
    try:
        data = json.loads(pytree.treespec_dumps(spec))
        restored = decode_tree_spec(data)
    except (NotImplementedError, TypeError) as error:
        raise FormatError(f"the structure {spec} cannot be written: {error}") from error
    if restored != spec:
        raise FormatError(f"the structure {spec} would be read back as {restored}; use strings and integers as keys")
    return data


def decode_tree_spec(data: Any) -> pytree.TreeSpec:
    """Undo `encode_tree_spec`. Imports a module of transformers when the structure holds one of its output classes.

    Raises:
        FormatError: a container type is unknown here, or the file asks for an import.
    """
    _, root = data
    _check_tree(root)
    return pytree.treespec_loads(json.dumps(data))


def encode_graph(graph: fx.Graph, owner: torch.nn.Module) -> dict[str, Any]:
    """Encode the graph of `owner` as JSON, and read it back to be sure.

    Raises:
        FormatError: something in it has no place in the format.
    """
    data = {"signature": _encode_signature(graph), "nodes": [_encode_node(node) for node in graph.nodes]}
    if str(decode_graph(data, owner)) != str(graph):
        raise FormatError("the graph would be read back with another text; it holds values that only look like data")
    return data


def decode_graph(data: Any, owner: torch.nn.Module) -> fx.Graph:
    """Undo `encode_graph`. `owner` holds the parameters, buffers, graph modules and routers that the graph names.

    Raises:
        FormatError: a name, function or value is none that a graph may hold.
    """
    owned = {
        "get_attr": {
            *(name for name, _ in owner.named_parameters(remove_duplicate=False)),
            *(name for name, _ in owner.named_buffers(remove_duplicate=False)),
            *_modules_of(fx.GraphModule, owner),
        },
        "call_module": {*_modules_of(Router, owner), *_modules_of(ExpertUnits, owner)},
    }
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        node = _decode_node(graph, item, nodes, owned)
        nodes[node.name] = node
    graph.set_codegen(_decode_signature(data["signature"]))
    return graph


def _modules_of(kind: type[torch.nn.Module], owner: torch.nn.Module) -> list[str]:
    return [name for name, module in owner.named_modules(remove_duplicate=False) if isinstance(module, kind)]


def _encode_node(node: fx.Node) -> dict[str, Any]:
    data = {
        "op": node.op,
        "name": node.name,
        "target": _encode_target(node),
        "args": [encode_value(value) for value in node.args],
        "kwargs": {key: encode_value(value) for key, value in node.kwargs.items()},
    }
    sizes = input_sizes(node) if node.op == "placeholder" else None
    return data if sizes is None else {**data, "sizes": list(sizes)}


def _decode_node(graph: fx.Graph, data: Any, nodes: dict[str, fx.Node], owned: dict[str, set[str]]) -> fx.Node:
    name = _check_identifier(data["name"])
    if name in nodes:
        raise FormatError(f"two nodes are called {name}")
    args = tuple(decode_value(value, nodes) for value in data["args"])
    kwargs = {_check_identifier(key): decode_value(value, nodes) for key, value in data["kwargs"].items()}
    node = graph.create_node(data["op"], _decode_target(data["op"], data["target"], owned), args, kwargs, name)
    node.name = name  # fx renames what shadows a builtin, but torch.export names inputs as the model does: `input`
    if "sizes" in data:
        node.meta[SIZES_KEY] = _check_sizes(data["sizes"])
    return node


def _encode_target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, OpOverload):
        return f"torch.ops.{node.target}"
    if node.target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[node.target]
    raise FormatError(
        f"node {node.name} calls {node.target}, which is no aten, prims or sparsify op and none of the functions that "
        "a file may call"
    )


def _decode_target(op: object, target: object, owned: dict[str, set[str]]) -> str | Callable[..., Any]:
    match op:
        case "placeholder":
            return _check_identifier(target)
        case "call_function":
            return _decode_function(target)
        case "get_attr" | "call_module":
            return _check_owned(target, owned[str(op)])
        case "output" if target == "output":
            return "output"
        case _:
            raise FormatError(f"a node of kind {op!r} with target {target!r} has no place in the format")


def _check_owned(target: object, owned: set[str]) -> str:
    path = check_path(target)
    if path not in owned:
        raise FormatError(f"{path} is used but is no parameter, buffer, graph module, router or its units")
    return path


def _decode_function(target: object) -> Callable[..., Any]:
    if not isinstance(target, str):
        raise FormatError(f"{target!r} is no name of a function")
    if target in FUNCTIONS:
        return FUNCTIONS[target]
    match = _OP.fullmatch(target)
    if match is None:
        raise FormatError(f"{target!r} is no aten, prims or sparsify op and none of the functions that a file may call")
    namespace, packet, overload = match.groups()
    op = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(op, OpOverload):
        raise FormatError(f"{target} is not known to torch {torch.__version__}")
    if not _only_computes(op):
        raise FormatError(f"{target} is an op that a file may not call")
    return op


def _only_computes(op: OpOverload) -> bool:
    """Whether `op` leaves files alone: `aten.from_file` maps one, `aten.save` (TorchScript's, no kernel) writes one."""
    has_kernel = torch._C._dispatch_has_kernel(op.name())  # pyright: ignore[reportPrivateUsage]
    arguments = op._schema.arguments  # pyright: ignore[reportPrivateUsage]
    return has_kernel and all(argument.name != "filename" for argument in arguments)


def _encode_signature(graph: fx.Graph) -> dict[str, Any] | None:
    codegen = graph._codegen  # pyright: ignore[reportPrivateUsage]
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise FormatError(f"inputs and outputs are handled by a {type(codegen).__name__}, not a _PyTreeCodeGen")
    info = codegen.pytree_info
    return {
        "arguments": list(info.orig_args),
        "in_spec": encode_tree_spec(info.in_spec),
        "out_spec": None if info.out_spec is None else encode_tree_spec(info.out_spec),
    }


def _decode_signature(data: Any) -> CodeGen:
    if data is None:
        return CodeGen()
    in_spec = decode_tree_spec(data["in_spec"])
    out_spec = None if data["out_spec"] is None else decode_tree_spec(data["out_spec"])
    arguments = [_check_identifier(name) for name in data["arguments"]]
    for child in in_spec.children():
        for key in child.context if child.type is dict else ():
            _check_identifier(key)  # fx writes the names of keyword arguments into source, in quotes
    return _PyTreeCodeGen(_PyTreeInfo(arguments, in_spec, out_spec))


def _check_tree(data: Any) -> None:
    if data["type"] is not None:
        _check_tree_type(data["type"])
        _check_context(data["type"], data["context"])
    for child in data["children_spec"]:
        _check_tree(child)


def _check_tree_type(name: str) -> None:
    if name == "collections.defaultdict":
        raise FormatError("a defaultdict in inputs or outputs names a function to import; use a dict")
    match = _HF_OUTPUT.fullmatch(name)
    if match is not None and name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        _import_transformers(match[1], name)
    if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise FormatError(
            f"inputs or outputs are of the container type {name!r}, which torch does not know here; import the module "
            "that registers it (torch.utils._pytree.register_pytree_node) first"
        )


def _import_transformers(module: str, name: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise FormatError(
            f"inputs or outputs are a {name}, and the package transformers that defines it cannot be imported here "
            f"({error}); install it with `pip install transformers`"
        ) from error


def _check_context(type_name: str, context: Any) -> None:
    """Refuse enumeration members as keys: torch would import the module that the file names."""
    if type_name == "collections.namedtuple" or not isinstance(context, str):
        return
    objects: list[dict[str, Any]] = []
    json.loads(context, object_hook=objects.append)
    if any("__enum__" in item for item in objects):
        raise FormatError(f"the keys {context:.80} of a {type_name} are no plain strings and integers")


def _check_identifier(name: object) -> str:
    if isinstance(name, str) and _IDENTIFIER.fullmatch(name) and not keyword.iskeyword(name):
        return name
    raise FormatError(f"{name!r} is no plain identifier")


def _check_sizes(sizes: Any) -> tuple[int | str, ...]:
    if isinstance(sizes, list) and all(isinstance(size, int | str) for size in sizes):
        return tuple(sizes)
    raise FormatError(f"{sizes!r} are no sizes of an input")
