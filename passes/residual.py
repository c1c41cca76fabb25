"""Find what a residual connection adds to the output of an FFN, so that the refit can aim at the hidden state.

hidden = r + dropout(down_proj(...))         returns (r,);  more terms where several sums follow one another
"""

from __future__ import annotations

from torch.fx import Node

from sparsify.passes.activation import is_view
from sparsify.passes.graph_values import as_node, fake_tensor, op_name, sizes_of
from sparsify.passes.neuron_wise import is_inert


def residual_terms(down: Node) -> tuple[Node, ...]:
    """The values that are added to the output of `down`, whose graph must not have been edited behind it.

    Returns:
        Nodes of the shape of the output, all computed before it; empty where the output goes elsewhere first.
    """
    terms: list[Node] = []
    node = down
    while len(node.users) == 1:
        (reader,) = node.users
        if op_name(reader) == "add" and not reader.kwargs:
            terms += [arg for arg in reader.all_input_nodes if arg is not node and _same_shape(arg, node)]
        elif not is_inert(reader) and not (is_view(reader) and as_node(reader.args[0]) is node):
            break
        node = reader
    return tuple(term for term in terms if term < down)


def _same_shape(a: Node, b: Node) -> bool:
    """What is broadcast is no residual stream. Sizes are compared as text: arithmetic would fix the dynamic ones."""
    return fake_tensor(a) is not None and fake_tensor(b) is not None and sizes_of(a) == sizes_of(b)
