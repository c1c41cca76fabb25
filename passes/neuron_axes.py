"""Follow the neurons of an FFN backwards through nodes that only arrange numbers: views, transposes, chunks, slices.

`down_proj` reads F neurons along one axis. Where do these lie in the input of a view, and which of them does a slice
take? Tokens must be in their order again at the projections, as experts write in the order in which they read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsify.passes.graph_values import arguments, as_node, op_name, shape_of, sizes_of

_PERMUTATIONS = {"transpose", "permute", "t", "numpy_T", "mT", "movedim", "swapaxes", "swapdims"}
_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
_PIECES = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind"}
_TAKES = {"select", "slice", "narrow"}
# Distinct sizes, so that the shape of the result tells where every dimension went.
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


@dataclass(frozen=True)
class Neurons:
    """Where F neurons lie in a tensor.

    Attributes:
        dims: the dimensions that count neurons, ascending; all others count tokens.
        index: `[F]` int64, the place of each neuron in these dimensions, flattened.
        tokens: for each dimension that counts tokens, its place among them where the walk began.
    """

    dims: tuple[int, ...]
    index: Tensor
    tokens: tuple[int, ...]

    @property
    def key(self) -> tuple[tuple[int, ...], bytes, tuple[int, ...]]:
        """Equal for equal places."""
        return self.dims, self.index.numpy().tobytes(), self.tokens

    def in_order(self, shape: Sequence[int | str]) -> bool:
        """The tokens of a tensor of this shape follow one another as where the walk began."""
        sizes = [size for dim, size in enumerate(shape) if dim not in self.dims]
        long = [token for token, size in zip(self.tokens, sizes, strict=True) if size != 1]
        return long == sorted(long)


def layout_source(node: Node) -> Node | None:
    """The tensor whose numbers the node arranges in another way; None if it does something else."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        pieces = as_node(node.args[0])
        return as_node(pieces.args[0]) if op_name(pieces) in _PIECES else None
    if op_name(node) in _PERMUTATIONS | _VIEWS | _TAKES or _is_idle_expand(node):
        return as_node(node.args[0])
    return None


def follow_back(node: Node, neurons: Neurons) -> Neurons | str:
    """Where the neurons of a layout node lie in its `layout_source`, or why that cannot be said."""
    name = op_name(node)
    if node.target is operator.getitem:
        return _through_piece(as_node(node.args[0]), int(str(node.args[1])), neurons)
    if name in _PERMUTATIONS:
        return _through_permutation(node, neurons)
    if name in _VIEWS:
        return _through_view(node, neurons)
    if name in _TAKES:
        return _through_take(node, neurons)
    return neurons


def _through_permutation(node: Node, neurons: Neurons) -> Neurons | str:
    source = sizes_of(as_node(node.args[0]))
    primes = _PRIMES[: len(source)]
    if not callable(node.target) or len(primes) < len(source):
        return "has too many dimensions to follow"
    moved = node.target(torch.empty(primes, device="meta"), *node.args[1:], **node.kwargs)
    origin = [primes.index(size) for size in moved.shape]
    places = dict(zip([origin[dim] for dim in neurons.dims], _places(sizes_of(node), neurons), strict=True))
    labels = dict(zip((origin[i] for i in range(len(origin)) if i not in neurons.dims), neurons.tokens, strict=True))
    return _at(source, places, tuple(labels[dim] for dim in sorted(labels)))


def _through_take(node: Node, neurons: Neurons) -> Neurons | str:
    """A select, slice or narrow."""
    given, source = arguments(node), sizes_of(as_node(node.args[0]))
    dim = int(given["dim"]) % len(source)
    if op_name(node) == "select":
        return _through_select(source, dim, given["index"], neurons, _places(sizes_of(node), neurons))
    start, step, size = given["start"], given.get("step", 1), source[dim]
    if sizes_of(node)[dim] == size and step == 1:
        return neurons
    stop = given["end"] if op_name(node) == "slice" else _add(start, given["length"])
    if not isinstance(size, int) or not all(isinstance(bound, int | None) for bound in (start, stop, step)):
        return "takes a part of the tokens"
    return _through_range(sizes_of(node), source, dim, range(size)[start:stop:step], neurons)


def _add(start: Any, length: Any) -> Any:
    return start + length if isinstance(start, int) and isinstance(length, int) else length


def _through_piece(pieces: Node, index: int, neurons: Neurons) -> Neurons | str:
    """Item `index` of a chunk, split or unbind."""
    source = sizes_of(as_node(pieces.args[0]))
    dim = int(arguments(pieces).get("dim", 0)) % len(source)
    values: list[Any] = pieces.meta["val"]
    if op_name(pieces) == "unbind":
        return _through_select(source, dim, index, neurons, _places(shape_of(values[index]), neurons))
    widths = [value.shape[dim] for value in values[: index + 1]]
    if not isinstance(source[dim], int):
        return "takes a part of the tokens"
    start = sum(int(width) for width in widths[:-1])
    return _through_range(shape_of(values[index]), source, dim, range(start, start + int(widths[-1])), neurons)


def _through_select(
    source: Sequence[int | str], dim: int, index: Any, neurons: Neurons, places: Sequence[Tensor]
) -> Neurons | str:
    """The dimension that was dropped counted neurons, or a later step finds that it counted tokens."""
    size = source[dim]
    if not isinstance(size, int) or not isinstance(index, int):
        return "takes a part of the tokens"
    before = [d if d < dim else d + 1 for d in neurons.dims]
    found = dict(zip(before, places, strict=True))
    found[dim] = torch.full_like(neurons.index, index % size)
    return _at(source, found, neurons.tokens)


def _through_range(
    shape: Sequence[int | str], source: Sequence[int | str], dim: int, taken: range, neurons: Neurons
) -> Neurons | str:
    places = dict(zip(neurons.dims, _places(shape, neurons), strict=True))
    if dim not in places and len(taken) != 1:
        return "takes a part of the tokens"
    others = [d for d in range(len(shape)) if d not in neurons.dims]
    tokens = tuple(token for token, d in zip(neurons.tokens, others, strict=True) if d != dim)
    old = places.get(dim, torch.zeros_like(neurons.index))
    places[dim] = taken.start + taken.step * old
    return _at(source, places, tokens)


def _through_view(node: Node, neurons: Neurons) -> Neurons | str:
    """The same numbers in row-major order: find the dimensions that hold the block of neurons."""
    source, shape = sizes_of(as_node(node.args[0])), sizes_of(node)
    first, last = neurons.dims[0], neurons.dims[-1]
    if neurons.dims != tuple(range(first, last + 1)) or not neurons.in_order(shape):
        return "mixes neurons with tokens"
    count = math.prod(int(shape[dim]) for dim in neurons.dims)
    dims = _block_before(source, shape[last + 1 :], count) or _block_after(source, shape[:first], count)
    if not dims:
        return "mixes neurons with tokens"
    return Neurons(dims, neurons.index, tuple(range(len(source) - len(dims))))


def _block_before(source: list[int | str], after: list[int | str], count: int) -> tuple[int, ...] | None:
    """Adjacent dimensions of `count` neurons that end where the dimensions `after` begin."""
    for stop in range(len(source), 0, -1):
        if _long(source[stop:]) == _long(after) and source[stop - 1] != 1:
            return _take_block(source, range(stop - 1, -1, -1), count)
    return None


def _block_after(source: list[int | str], before: list[int | str], count: int) -> tuple[int, ...] | None:
    """Adjacent dimensions of `count` neurons that begin where the dimensions `before` end."""
    for start in range(len(source)):
        if _long(source[:start]) == _long(before) and source[start] != 1:
            return _take_block(source, range(start, len(source)), count)
    return None


def _take_block(source: list[int | str], order: range, count: int) -> tuple[int, ...] | None:
    taken: list[int] = []
    product = 1
    for dim in order:
        size = source[dim]
        if product == count or not isinstance(size, int):
            break
        taken.append(dim)
        product *= size
    return tuple(sorted(taken)) if product == count else None


def _long(sizes: Sequence[int | str]) -> list[int | str]:
    return [size for size in sizes if size != 1]


def _places(shape: Sequence[int | str], neurons: Neurons) -> list[Tensor]:
    """The place of every neuron in each of the dimensions, `[F]` each."""
    sizes = [int(shape[dim]) for dim in neurons.dims]
    return list(torch.unravel_index(neurons.index, sizes))


def _at(shape: Sequence[int | str], places: dict[int, Tensor], tokens: tuple[int, ...]) -> Neurons:
    """Flatten places, given by dimension, into an index."""
    dims = tuple(sorted(places))
    index = torch.zeros_like(next(iter(places.values())))
    for dim in dims:
        index = index * int(shape[dim]) + places[dim]
    return Neurons(dims, index, tokens)


def _is_idle_expand(node: Node) -> bool:
    if op_name(node) not in ("expand", "expand_as", "broadcast_to"):
        return False
    return sizes_of(as_node(node.args[0])) == sizes_of(node)
