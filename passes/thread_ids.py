"""Bring what a router reads of every token from an input of the model to its FFNs: an id, a label, or an embedding.

    ids [B, S] beside x [B, S, D] or [B*S, D]  ->  reshape(ids, [-1])                         [T]
    labels [B] or []                           ->  expanded over the tokens, then the same
    embedding [B, S, A], [B, A] or [A]         ->  as ids and labels, to                      [T, A]

The input is one that the model has, or a keyword input that is added to the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree

from sparsify.config import ADDED_INPUTS, SparsifyConfig
from sparsify.errors import SelectionError
from sparsify.passes.find_ffns import FoundFFNs
from sparsify.passes.graph_values import fake_tensor, op_name, shape_of
from sparsify.passes.match_ffn import FFNMatch, Site
from sparsify.passes.token_layout import before_flattening, example_size, leading_sizes

aten = torch.ops.aten
_MOVES = frozenset(
    {"to", "_to_copy", "view", "reshape", "clone", "contiguous", "alias", "detach", "slice", "unsqueeze"}
)


@dataclass(frozen=True)
class IdSource:
    """The input that ids come from: its node, and how many ids its embedding has, None where none reads it.

    `size` is that of an embedding that is read itself, 0 for ids.
    """

    node: str
    num_ids: int | None
    size: int = 0

    def __str__(self) -> str:
        read = f"the {self.size} features" if self.size else "the integers"
        return f"routers read {read} of the input `{self.node}`"


def read_ids(found: FoundFFNs, config: SparsifyConfig, added: Mapping[str, Tensor]) -> IdSource | None:
    """The source of the ids that the router of `config` reads, None if it reads none.

    Args:
        found: the FFNs of the model. Its graph is given the input that `added` holds, in place.
        config: names router and input.
        added: an example of an input that the model does not have; see `split_added`.

    Raises:
        SelectionError: the ids cannot be brought to the FFNs.
    """
    if config.reads is None:
        return None
    if not found.is_whole:
        raise SelectionError(
            f"router={config.router_name!r} reads an input of every token, which does not reach the FFNs of a model "
            "that can be traced in parts only; choose another router"
        )
    (whole,) = found.parts
    embeds = config.reads == "embedding"
    for name, example in added.items():
        add_input(whole.graph_module, name, example, whole.matches[0], features=embeds)
    if embeds:
        return find_embedding(whole.graph_module, config)
    return find_ids(whole.graph_module, config.ids_name, config.router_name)


def split_added(
    model: nn.Module, kwargs: Mapping[str, Any], name: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Divide keyword inputs into those of the model and the one that is to be added to it.

    Args:
        model: its `forward` says which names it has.
        kwargs: as the caller gave them.
        name: of the input that the router reads, or None.
    """
    own = name in inspect.signature(model.forward).parameters
    if name is None or own or not isinstance(kwargs.get(name), Tensor):
        return dict(kwargs), {}
    return {key: value for key, value in kwargs.items() if key != name}, {name: kwargs[name]}


def own_inputs(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword inputs of a conversion without the one that was added: what the dense model takes."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    added = set(ADDED_INPUTS.values()) if takes_any else set(kwargs)
    return {name: value for name, value in kwargs.items() if name in parameters or name not in added}


def find_ids(graph_module: GraphModule, name: str | None, router: str) -> IdSource:
    """Find the input.

    Args:
        graph_module: a captured model.
        name: of the input; None for the integers that the largest embedding reads.
        router: its name, for the error messages.

    Raises:
        SelectionError: there is no such input, or no embedding reads an input.
    """
    found: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        source = _read_by_embedding(node)
        if source is not None:
            found[source.name] = max(_rows(node), found.get(source.name, 0))
    inputs = {node.name for node in graph_module.graph.find_nodes(op="placeholder") if _holds_integers(node)}
    if name is not None and name in inputs:
        return IdSource(name, found.get(name))
    if name is not None:
        raise SelectionError(
            f"router={router!r} reads the input {name!r}, and the model has no integer input of that name, only "
            f"{', '.join(sorted(inputs)) or 'none'}. Name one of them with ids_input=, or give an example of a new "
            f"keyword input: kwargs={{{name!r}: torch.zeros(B, dtype=torch.int64)}}, an integer for every sequence, or "
            "[B, S] for every token"
        )
    if not found:
        raise SelectionError(
            f"router={router!r} reads token ids, and no embedding of the model reads an integer input. Name the input "
            f"with ids_input= (integer inputs: {', '.join(sorted(inputs)) or 'none'}), or choose another router"
        )
    best = max(found, key=lambda key: found[key])
    return IdSource(best, found[best])


def find_embedding(graph_module: GraphModule, config: SparsifyConfig) -> IdSource:
    """Find the input that holds the embedding for the router of `config`.

    Raises:
        SelectionError: there is none of its name and size.
    """
    name, size = config.ids_name, config.options["embedding_size"]
    found = {node.name: fake_tensor(node) for node in graph_module.graph.find_nodes(op="placeholder")}
    sizes = {key: shape_of(v)[-1] for key, v in found.items() if v is not None and v.is_floating_point() and v.dim()}
    if name is None or sizes.get(name) != size:
        has = f"that has {sizes[name]}" if name in sizes else "the model has no floating input of that name"
        raise SelectionError(
            f"router={config.router_name!r} reads {size} features of the input {name!r}, and {has}. Name an input with "
            f"ids_input=, correct embedding_size, or give an example of a new keyword input: "
            f"kwargs={{{name!r}: torch.randn(B, {size})}} for every sequence, or [B, S, {size}] for every token"
        )
    return IdSource(name, None, size)


def _rows(embedding: Node) -> int:
    """Rows of the table of an embedding."""
    table = fake_tensor(embedding.all_input_nodes[0])
    return 0 if table is None else int(table.shape[0])


def _read_by_embedding(node: Node) -> Node | None:
    """The integer input that an embedding reads, as it is or moved about."""
    if op_name(node) != "embedding":
        return None
    source = node.args[1]
    while isinstance(source, Node) and op_name(source) in _MOVES:
        source = source.args[0]
    return source if isinstance(source, Node) and source.op == "placeholder" and _holds_integers(source) else None


def _holds_integers(node: Node) -> bool:
    value = fake_tensor(node)
    return value is not None and value.dtype in (torch.int64, torch.int32)


def add_input(
    graph_module: GraphModule, name: str, example: Tensor, match: FFNMatch, *, features: bool = False
) -> None:
    """Give the graph one more keyword input, in place. Its sizes are those of the tokens.

    Args:
        graph_module: a captured model.
        name: of the input.
        example: integers, for every call `[]`, sequence `[B]` or token `[B, S]`.
        match: an FFN, whose input says what may change between calls.
        features: the example holds an embedding, one dimension more.

    Raises:
        SelectionError: the example holds no integers (no floating numbers), or does not fit the tokens.
    """
    _check_dtype(name, example, features)
    graph, site = graph_module.graph, match.sites[0]
    x = before_flattening(_node(graph, site.x), site.x_axis)
    value = fake_tensor(x)
    assert value is not None
    leading = value.movedim(site.x_axis, -1)[..., 0]
    sizes = [example_size(size) for size in leading.shape]
    own = list(example.shape[:-1] if features else example.shape)
    if own != sizes[: len(own)]:
        one = "embedding" if features else "integer"
        raise SelectionError(
            f"the input {name!r} has the shape {list(example.shape)}, and the tokens of {match.name} have {sizes}; "
            f"give one {one} for each sequence, [{sizes[0]}], or for each token, {sizes}"
        )
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    shape = (*leading.shape[: len(own)], *example.shape[len(own) :])
    node.meta["val"] = leading.new_empty(shape, dtype=example.dtype)
    codegen = graph._codegen  # pyright: ignore[reportPrivateUsage]
    assert isinstance(codegen, _PyTreeCodeGen)
    graph.set_codegen(_PyTreeCodeGen(_with_keyword(codegen.pytree_info, name)))
    graph_module.recompile()


def _check_dtype(name: str, example: Tensor, features: bool) -> None:
    if features and not (example.is_floating_point() and example.dim()):
        raise SelectionError(f"the input {name!r} must hold an embedding, floating numbers, got {example.dtype}")
    if not features and example.dtype not in (torch.int64, torch.int32):
        raise SelectionError(f"the input {name!r} must hold integers, got {example.dtype}; use .long()")


def _with_keyword(info: _PyTreeInfo, name: str) -> _PyTreeInfo:
    args, kwargs = pytree.tree_unflatten(list(range(info.in_spec.num_leaves)), info.in_spec)
    _, spec = pytree.tree_flatten((args, {**kwargs, name: -1}))
    return _PyTreeInfo([*info.orig_args, name], spec, info.out_spec)


def thread_ids(graph: Graph, match: FFNMatch, source: IdSource) -> tuple[str, ...]:
    """Add nodes that hold the ids of the tokens of an FFN, `[T]` int64 or `[T, A]`, one for each of its sites.

    Args:
        graph: of the captured model, in place.
        match: the FFN.
        source: of the ids.

    Returns:
        Names of the nodes, in the order of the sites.

    Raises:
        SelectionError: the ids do not fit the tokens.
    """
    return tuple(_thread(graph, match.name, site, source).name for site in match.sites)


def _thread(graph: Graph, name: str, site: Site, source: IdSource) -> Node:
    ids, x = _node(graph, source.node), before_flattening(_node(graph, site.x), site.x_axis)
    value = fake_tensor(ids)
    assert value is not None
    features = [source.size] if source.size else []
    sizes, leading = shape_of(value)[: value.dim() - len(features)], leading_sizes(x, site.x_axis)
    if sizes != leading[: len(sizes)]:
        raise SelectionError(
            f"{name}: its tokens are {leading}, and the input {source.node!r} is {shape_of(value)}, so it has no "
            "integer (or embedding) for each of them; leave the FFN dense with select=, or name another input with "
            "ids_input="
        )
    place = _node(graph, site.x).next
    while place.op == "placeholder":  # the ids may be a later input
        place = place.next
    with graph.inserting_before(place):
        call = graph.call_function
        if len(sizes) < len(leading):
            axes = [axis for axis in range(len(leading) + 1) if axis != (len(leading) + 1 + site.x_axis)]
            shape = [
                size if isinstance(size, int) else call(aten.sym_size.int, (x, axis))
                for size, axis in zip(leading, axes, strict=True)
            ]
            for axis in range(len(sizes), len(leading)):
                ids = call(aten.unsqueeze.default, (ids, axis))
            ids = call(aten.expand.default, (ids, [*shape, *features]))
        ids = call(aten.reshape.default, (ids, [-1, *features]))
        return ids if features or value.dtype == torch.int64 else call(aten.to.dtype, (ids, torch.int64))


def _node(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)
