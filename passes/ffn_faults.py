"""Why something that resembles an FFN cannot be split: the first fault of a region, and the node to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.fx import Node

from sparsify.passes.ffn_region import Region
from sparsify.passes.graph_values import as_node, is_in_place, op_name, sizes_of
from sparsify.passes.linear_layer import read_linear
from sparsify.passes.neuron_axes import Neurons, follow_back, layout_source
from sparsify.passes.neuron_wise import is_inert


def find_fault(region: Region, taken: Mapping[Node, str]) -> tuple[Node, str] | None:
    """The node to blame and the reason, or None where the FFN can be split.

    Args:
        region: of something that resembles an FFN.
        taken: the nodes of FFNs that were matched before, with their names.
    """
    faults = (region.blocked, _layer_faults(region), _input_faults(region), _reader_faults(region))
    found = (fault for kind in (*faults, _in_place_faults(region), _overlaps(region, taken)) for fault in kind)
    return next(iter(found), None)


def _layer_faults(region: Region) -> Iterator[tuple[Node, str]]:
    for layer in (*(part.layer for part in region.parts), region.down):
        if layer.fault is not None:
            yield layer.node, layer.fault
    if read_linear(region.down.node) is None:
        yield region.down.node, f"`{region.down.node.name}` has one matrix per group or expert"


def _input_faults(region: Region) -> Iterator[tuple[Node, str]]:
    first = region.parts[0].layer
    for layer in (part.layer for part in region.parts[1:]):
        if _tokens_of(layer.x, layer.axis) == _tokens_of(first.x, first.axis):
            continue
        if read_linear(_uncopied(layer.x)) is not None:
            yield layer.node, "a low-rank adapter adds to its projection: merge the adapter into the weight first"
        yield layer.node, "its projections read different inputs"


def _reader_faults(region: Region) -> Iterator[tuple[Node, str]]:
    inside = {*region.interior, region.down.node}
    for node in sorted(region.interior):
        for reader in node.users:
            if reader not in inside and _reads_values(reader):
                yield reader, f"`{reader.name}` also reads the intermediate values, so neurons cannot be divided"


def _in_place_faults(region: Region) -> Iterator[tuple[Node, str]]:
    """Writing in place is harmless where nobody else reads what is overwritten."""
    for node in sorted(region.interior):
        if is_in_place(node) and not _owns(as_node(node.args[0])):
            yield node, f"`{node.name}` overwrites values that are also read elsewhere"
    x, first = _storage(region.parts[0].layer.x), min(part.layer.node for part in region.parts)
    for node in region.down.node.graph.nodes:
        if first < node < region.down.node and is_in_place(node) and _storage(as_node(node.args[0])) is x:
            yield node, f"`{node.name}` overwrites the input of the FFN before down_proj"


def _overlaps(region: Region, taken: Mapping[Node, str]) -> Iterator[tuple[Node, str]]:
    for node in sorted({*region.interior, region.down.node}):
        if node in taken:
            yield region.down.node, f"a linear layer of it belongs to the FFN {taken[node]}"


def _reads_values(reader: Node) -> bool:
    if op_name(reader) == "sym_size":
        return False
    return bool(reader.users) or reader.op == "output" or is_in_place(reader)


def _owns(node: Node) -> bool:
    """Only one node reads the storage of `node`, be it through views."""
    while True:
        if len([reader for reader in node.users if _reads_values(reader)]) != 1:
            return False
        source = layout_source(node)
        if source is None:
            return True
        node = source


def _storage(node: Node) -> Node:
    """The node whose memory `node` may show."""
    while node.op == "call_function":
        source = as_node(node.args[0]) if is_in_place(node) else layout_source(node)
        if source is None and op_name(node) in ("contiguous", "to", "alias", "detach", "dropout", "expand"):
            source = as_node(node.args[0])
        if source is None:
            return node
        node = source
    return node


def _tokens_of(x: Node, axis: int) -> tuple[Node, object]:
    """Equal for values that hold the same tokens, whatever arranges them: where the features lie in their source."""
    sizes = sizes_of(x)
    neurons = Neurons((len(sizes) + axis,), torch.arange(int(sizes[axis])), tuple(range(len(sizes) - 1)))
    while True:
        x = _uncopied(x)
        source = layout_source(x)
        before = None if source is None else follow_back(x, neurons)
        if source is None or before is None or isinstance(before, str):
            return x, neurons.key
        x, neurons = source, before


def _uncopied(node: Node) -> Node:
    """The value before it was copied."""
    while is_inert(node):
        node = as_node(node.args[0])
    return node
