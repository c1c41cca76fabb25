"""What lies between the projections of an FFN and `down`: parts, per-neuron vectors, and the function of one neuron.

F intermediate_size. `walk_back.py` collects it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import Graph, GraphModule, Node

from sparsify.passes.graph_values import op_name
from sparsify.passes.linear_layer import LinearLayer
from sparsify.passes.neuron_wise import is_linear_op

FOREIGN = "foreign"


@dataclass(frozen=True)
class Part:
    """The rows of one linear layer that the neurons read: `rows[j]` is the row of neuron j."""

    layer: LinearLayer
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Vector:
    """A constant that varies with the neuron at most.

    Attributes:
        node: holds it.
        dims: its dimensions that count neurons, counted from the end; () for a single number.
        index: `[F]`, the place of each neuron in these dimensions, flattened; () for a single number.
    """

    node: Node
    dims: tuple[int, ...]
    index: tuple[int, ...]


@dataclass
class Region:
    """What lies between the projections and `down`.

    Attributes:
        down: the layer where the walk started.
        parts: the projections, in graph order.
        vectors: per-neuron vectors and single numbers.
        interior: every node that vanishes with the FFN, projections included, `down` not.
        blocked: nodes that are not neuron-wise, with the reason.
        function: from parts, vectors and what is blocked (in this order) to the input of `down`.
        is_foreign: values from somewhere else are mixed in, as attention does: this is no FFN at all.
    """

    down: LinearLayer
    parts: list[Part] = field(default_factory=list[Part])
    vectors: list[Vector] = field(default_factory=list[Vector])
    interior: set[Node] = field(default_factory=set[Node])
    blocked: list[tuple[Node, str]] = field(default_factory=list[tuple[Node, str]])
    function: GraphModule = field(default_factory=lambda: GraphModule({}, Graph()))
    is_foreign: bool = False

    @property
    def has_activation(self) -> bool:
        """A neuron-wise node that is not linear, or a product of two values that depend on projections."""
        fed = self._fed()
        return any(_is_activation(node, fed) for node in fed if node.op == "call_function")

    @property
    def is_residual_stream(self) -> bool:
        """A projection is added to something that no projection feeds, or one projection feeds another."""
        fed = self._fed()
        for node in fed:
            sums = op_name(node) in ("add", "add_", "sub")
            if sums and any(FOREIGN in argument.meta for argument in node.all_input_nodes if argument not in fed):
                return True
        nodes = {part.layer.node for part in self.parts}
        return len(nodes) > 1 and any(_depends_on(part.layer.x, nodes) for part in self.parts)

    def _fed(self) -> set[Node]:
        """The nodes of the function that depend on a projection."""
        fed = set(self.function.graph.find_nodes(op="placeholder")[: len(self.parts)])
        for node in self.function.graph.nodes:
            if any(argument in fed for argument in node.all_input_nodes):
                fed.add(node)
        return fed


def _is_activation(node: Node, fed: set[Node]) -> bool:
    if op_name(node) in ("mul", "mul_") and sum(argument in fed for argument in node.args) == 2:
        return True
    return not is_linear_op(node)


def _depends_on(node: Node, sources: set[Node]) -> bool:
    """Something in `sources` was needed to compute `node`."""
    return any(ancestor in sources for ancestor in _ancestors(node, first=min(sources)))


def _ancestors(node: Node, first: Node) -> Iterator[Node]:
    """`node` and what it is computed from, but nothing that stands before `first` in the graph."""
    stack, seen = [node], set[Node]()
    while stack:
        current = stack.pop()
        if current in seen or current < first:
            continue
        seen.add(current)
        stack.extend(current.all_input_nodes)
        yield current
