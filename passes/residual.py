"""Find what a residual connection adds to the output of an FFN, so that the refit can aim at the hidden state.

hidden = r + dropout(down_proj(...))         returns (r,);  more terms where several sums follow one another
"""

from __future__ import annotations

import itertools

from torch.fx import Node

from sparsify.passes.activation import is_view
from sparsify.passes.graph_values import as_node, fake_tensor, op_name, sizes_of
from sparsify.passes.neuron_wise import is_inert


def residual_terms(down: Node) -> tuple[Node, ...]:
    """The values that are added to the output of `down`, whose graph must not have been edited behind it.

    Returns:
        Nodes of the shape of the output, all computed before it; empty where the output goes elsewhere first.
    """
    chain = _chain(down)
    terms = [
        arg
        for node, reader in itertools.pairwise(chain)
        if op_name(reader) == "add"
        for arg in reader.all_input_nodes
        if arg is not node and _same_shape(arg, node)
    ]
    return tuple(term for term in terms if term < down)


def sums_behind(down: Node) -> list[Node]:
    """What follows `down` one after the other and needs nothing else that is computed after it.

    The last of them is the hidden state, unless another branch has to be added first.
    """
    found: list[Node] = []
    for node, reader in itertools.pairwise(_chain(down)):
        if not all(arg is node or arg < down for arg in reader.all_input_nodes):
            break
        found.append(reader)
    return found


def _chain(down: Node) -> list[Node]:
    """`down` and what follows it one after the other: sums, and what leaves the values as they are."""
    chain = [down]
    while len(chain[-1].users) == 1:
        node, (reader,) = chain[-1], chain[-1].users
        adds = op_name(reader) == "add" and not reader.kwargs
        if not adds and not is_inert(reader) and not (is_view(reader) and as_node(reader.args[0]) is node):
            break
        chain.append(reader)
    return chain


def _same_shape(a: Node, b: Node) -> bool:
    """What is broadcast is no residual stream. Sizes are compared as text: arithmetic would fix the dynamic ones."""
    return fake_tensor(a) is not None and fake_tensor(b) is not None and sizes_of(a) == sizes_of(b)
