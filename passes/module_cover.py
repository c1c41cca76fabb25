"""Find the modules of the original model whose calls together are one FFN, so that experts can take their place.

The nodes of the FFN must fall into whole modules: one (`mlp`), or several called one after the other (`intermediate`,
then `output.dense`). Whatever else such a module does must change no value: regroup tokens, drop out in training.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from sparsify.passes.activation import is_view
from sparsify.passes.constants import is_constant
from sparsify.passes.graph_values import fake_tensor, op_name
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.neuron_wise import is_inert


@dataclass(frozen=True)
class ModuleCover:
    """Where experts can be put back.

    Attributes:
        modules: paths of the modules in the order of their calls; the first reads the input of the FFN, the last
            returns its output. Empty where there are none.
        obstacle: why there are none, or "".
        x_axis: of the features in the input of the first, counted from the end.
        down_axis: of the features in the output of the last.
    """

    modules: tuple[str, ...]
    obstacle: str
    x_axis: int
    down_axis: int


def cover_with_modules(graph_module: GraphModule, match: FFNMatch) -> ModuleCover:
    """The modules that are the FFN and nothing else.

    Args:
        graph_module: where `match` was found, not yet edited; its nodes carry `nn_module_stack`.
        match: an FFN.
    """
    site = match.sites[0]
    inside = {name for site in match.sites for name in (*site.interior, site.down)}
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    foreign = {path for node in calls if not _may_vanish(node, inside) for path in _modules_of(node)}
    found: dict[str, None] = {}
    for node in calls:
        if node.name not in inside or is_constant(node) or fake_tensor(node) is None:
            continue
        pure = next((path for path in _modules_of(node) if path not in foreign), None)
        if pure is not None:
            found[pure] = None
        elif not _changes_nothing(node):
            owner = next(reversed(_modules_of(node)), "")
            obstacle = f"`{op_name(node)}` is code of {owner or 'the model itself'}, not a module that can be replaced"
            return ModuleCover((), obstacle, site.x_axis, site.down_axis)
    return ModuleCover(tuple(found), "", site.x_axis, site.down_axis)


def _modules_of(node: Node) -> list[str]:
    """Paths of the modules that were being called, the outermost first, the model itself left out."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]).partition("@")[0] for entry in stack.values()]
    return [path for path in paths if path]


def _may_vanish(node: Node, inside: set[str]) -> bool:
    return node.name in inside or is_constant(node) or fake_tensor(node) is None or _changes_nothing(node)


def _changes_nothing(node: Node) -> bool:
    """No value, and no token's place among the others."""
    return is_view(node) or is_inert(node)
