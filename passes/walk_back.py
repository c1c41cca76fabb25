"""Walk back from a linear layer to the projections that feed it, through neuron-wise nodes only.

The walk writes down the function of one neuron as it goes: a graph from projections and per-neuron vectors to the value
that the layer reads. F intermediate_size: the input width of the layer where the walk starts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from sparsify.passes.constants import is_constant
from sparsify.passes.ffn_region import FOREIGN, Part, Region, Vector
from sparsify.passes.graph_values import as_node, fake_tensor, op_name, size_at, sizes_of
from sparsify.passes.linear_layer import LinearLayer, read_grouped, read_linear
from sparsify.passes.neuron_axes import Neurons, follow_back, layout_source
from sparsify.passes.neuron_wise import DECOMPOSED, is_neuron_wise, out_of_place

# No activation function has as many nodes; a residual stream has.
_MOST_NODES = 80


def find_region(down: LinearLayer) -> Region:
    """Collect the region above `down`; it is empty where the number of input features is not fixed."""
    region = Region(down)
    width = size_at(down.x, down.axis)
    if width is None:
        return region
    rank = len(sizes_of(down.x))
    neurons = Neurons((rank + down.axis,), torch.arange(width), tuple(range(rank - 1)))
    walk = _Walk(region)
    walk.finish(walk.emit(down.x, neurons))
    return region


@dataclass
class _Walk:
    region: Region
    graph: Graph = field(default_factory=Graph)
    emitted: dict[tuple[Node, object], Node] = field(default_factory=lambda: {})
    visited: set[Node] = field(default_factory=set[Node])
    inputs: dict[Part | Vector, Node] = field(default_factory=lambda: {})

    def emit(self, node: Node, neurons: Neurons) -> Node:
        """The node of the new graph that holds `node` at these neurons."""
        key = (node, neurons.key)
        if key not in self.emitted:
            self.visited.add(node)
            self.emitted[key] = self._emit(node, neurons)
        return self.emitted[key]

    def _emit(self, node: Node, neurons: Neurons) -> Node:
        if len(self.visited) > _MOST_NODES or fake_tensor(node) is None:
            return self._foreign(node, "ends a long chain of sums")
        if is_constant(node):
            return self._emit_constant(node, neurons)
        layer = read_linear(node) or read_grouped(node)
        if layer is not None:
            return self._emit_layer(layer, neurons)
        source = layout_source(node)
        if source is not None:
            return self._emit_layout(node, source, neurons)
        if not is_neuron_wise(node, neurons.dims):
            return self._emit_blocked(node, neurons)
        self.region.interior.add(node)
        decompose = DECOMPOSED.get(op_name(node))
        if decompose is not None:
            return decompose(self.graph, node, neurons, self.emit)
        copied = self.graph.node_copy(node, lambda argument: self._emit_operand(node, argument, neurons))
        copied.target = out_of_place(node.target)
        copied.meta.clear()
        return copied

    def _emit_layer(self, layer: LinearLayer, neurons: Neurons) -> Node:
        """A projection, or something else that a linear layer does."""
        node = layer.node
        axis = len(sizes_of(node)) + layer.axis
        if axis not in neurons.dims:
            reason = f"`{node.name}` mixes tokens between the projections, so a token is not processed by itself"
            return self._look_behind(node, neurons, reason)
        if neurons.dims != (axis,):
            return self._foreign(node, "is read across tokens")
        if not neurons.in_order(sizes_of(node)):
            return self._foreign(node, "is read with its tokens in another order")
        if read_linear(node) is None:
            reason = f"`{node.name}` has one matrix per group or expert, as experts of a Mixture-of-Experts layer have"
            self.region.blocked.append((node, reason))
        self.region.interior.add(node)
        return self._input(Part(layer, tuple(neurons.index.tolist())))

    def _emit_constant(self, node: Node, neurons: Neurons) -> Node:
        sizes = sizes_of(node)
        varying = {dim for dim, size in enumerate(sizes) if size != 1}
        if not varying:
            return self._input(Vector(node, (), ()))
        if not varying <= set(neurons.dims):
            self.region.blocked.append((node, f"`{node.name}` differs by token, mixed in between the projections"))
            return self._placeholder()
        dims = tuple(dim - len(sizes) for dim in neurons.dims)
        return self._input(Vector(node, dims, tuple(neurons.index.tolist())))

    def _emit_layout(self, node: Node, source: Node, neurons: Neurons) -> Node:
        before = follow_back(node, neurons)
        if isinstance(before, str):
            return self._foreign(node, before)
        self.region.interior |= {node, as_node(node.args[0])} if node.target is operator.getitem else {node}
        return self.emit(source, before)

    def _emit_operand(self, node: Node, operand: Node, neurons: Neurons) -> Node:
        """An operand of a pointwise node, its dimensions aligned from the right as broadcasting does."""
        shape, sizes = sizes_of(node), sizes_of(operand)
        shift = len(shape) - len(sizes)
        if is_constant(operand):
            return self.emit(operand, _broadcast(neurons, shape, [1] * shift + sizes, shift))
        dims = tuple(dim - shift for dim in neurons.dims)
        if any(dim < 0 or sizes[dim] != shape[dim + shift] for dim in dims):
            reason = f"`{operand.name}` is one value per token, mixed in between the projections"
            self.region.blocked.append((node, reason))
            return self._placeholder()
        padded = [1] * shift + sizes
        # Equal sizes that may change can be written differently: only a 1 is broadcast.
        if any(padded[dim] == 1 != size for dim, size in enumerate(shape) if dim not in neurons.dims):
            reason = f"`{node.name}` broadcasts over tokens, so a token is not processed by itself"
            self.region.blocked.append((node, reason))
        return self.emit(operand, Neurons(dims, neurons.index, neurons.tokens[shift:]))

    def _emit_blocked(self, node: Node, neurons: Neurons) -> Node:
        if node.op == "placeholder":
            self.region.blocked.append((node, f"the input `{node.name}` is mixed in between the projections"))
            return self._placeholder()
        if op_name(node) in ("index", "index_select", "embedding") and is_constant(node.all_input_nodes[0]):
            self.region.blocked.append((node, f"`{node.name}` takes parameters that the input selects, as routers do"))
            return self.graph.placeholder(f"selected_{len(self.graph.nodes)}")
        if op_name(node) == "cat":
            self.region.blocked.append((node, f"`{node.name}` joins neurons with other values"))
            return self._placeholder()
        varying = [argument for argument in node.all_input_nodes if not is_constant(argument)]
        if len([argument for argument in varying if fake_tensor(argument) is not None]) != 1:
            return self._foreign(node, "mixes in values from elsewhere")
        reason = "stands between the projections and is not neuron-wise, so neurons cannot be divided"
        return self._look_behind(node, neurons, f"`{op_name(node)}` {reason}")

    def _look_behind(self, node: Node, neurons: Neurons, reason: str) -> Node:
        """Go on behind a norm, reduction or convolution, to tell a refused FFN from something else."""
        self.region.blocked.append((node, reason))
        source = next((argument for argument in node.all_input_nodes if fake_tensor(argument) is not None), node)
        after, before = sizes_of(node), sizes_of(source)
        if len(after) != len(before) or any(after[dim] != before[dim] for dim in neurons.dims) or is_constant(source):
            return self._placeholder()
        return self.emit(source, neurons)

    def _foreign(self, node: Node, reason: str) -> Node:
        self.region.is_foreign = True
        self.region.blocked.append((node, f"`{node.name}` {reason}"))
        return self._placeholder()

    def _placeholder(self) -> Node:
        """Stands for a value that no projection feeds."""
        node = self.graph.placeholder(f"{FOREIGN}_{len(self.graph.nodes)}")
        node.meta[FOREIGN] = True
        return node

    def _input(self, source: Part | Vector) -> Node:
        if source not in self.inputs:
            self.inputs[source] = self.graph.placeholder(f"input_{len(self.inputs)}")
        return self.inputs[source]

    def finish(self, result: Node) -> None:
        """Put the inputs of the function in order: projections as in the graph of the model, then vectors.

        Its nodes are named for their ops, so that equal functions have equal code.
        """
        region = self.region
        parts = [source for source in self.inputs if isinstance(source, Part)]
        region.parts = sorted(parts, key=lambda part: (part.layer.node, part.rows))
        region.vectors = [source for source in self.inputs if isinstance(source, Vector)]
        sources: list[Part | Vector] = [*region.parts, *region.vectors]
        inputs = [*(self.inputs[source] for source in sources), *self.graph.find_nodes(op="placeholder")]
        ordered = Graph()
        copied: dict[Node, Node] = {}
        for node in dict.fromkeys(inputs):
            copied[node] = ordered.placeholder(f"input_{len(copied)}")
            copied[node].meta.update(node.meta)
        for node in self.graph.nodes:
            if node not in copied:
                args, kwargs = map_arg((node.args, node.kwargs), copied.__getitem__)
                copied[node] = ordered.call_function(node.target, args, kwargs, name=op_name(node))
        ordered.output(copied[result])
        region.function = GraphModule({}, ordered)


def _broadcast(neurons: Neurons, shape: Sequence[int | str], sizes: Sequence[int | str], shift: int) -> Neurons:
    """Where the neurons lie in a constant operand, whose `sizes` (padded to the rank of `shape`) may be 1 anywhere."""
    places = torch.unravel_index(neurons.index, [int(shape[dim]) for dim in neurons.dims])
    index = torch.zeros_like(neurons.index)
    for dim, place in zip(neurons.dims, places, strict=True):
        index = index * int(sizes[dim]) + (place if sizes[dim] != 1 else 0)
    return Neurons(tuple(dim - shift for dim in neurons.dims if dim >= shift), index, ())
