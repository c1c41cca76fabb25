"""Adaptive average pooling of an image of any size -> products with two averaging matrices.

torch.onnx.export would write the windows of the example's size into the file. Row i of a matrix averages the pixels
floor(i n / out) to ceil((i + 1) n / out), the windows that `torch.nn.AdaptiveAvgPool2d` takes.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from sparsify.passes.graph_values import fake_tensor, fixed_size

aten = torch.ops.aten


def spell_adaptive_pool(graph: Graph) -> None:
    """Rewrite in place where a size is dynamic and the output is more than one pixel (which is a plain mean)."""
    for node in graph.find_nodes(op="call_function", target=aten.adaptive_avg_pool2d.default):
        image, sizes = node.args
        assert isinstance(image, Node)
        value = fake_tensor(image)
        if value is None or all(fixed_size(size) is not None for size in value.shape[-2:]) or list(sizes) == [1, 1]:
            continue
        with graph.inserting_before(node):
            rows, columns = (_averages(graph, image, axis, size) for axis, size in zip((-2, -1), sizes, strict=True))
            pooled = graph.call_function(aten.matmul.default, (rows, image))
            pooled = graph.call_function(aten.matmul.default, (pooled, _transposed(graph, columns)))
        pooled.meta = node.meta.copy()
        node.replace_all_uses_with(pooled)
        graph.erase_node(node)


def _averages(graph: Graph, image: Node, axis: int, out: int) -> Node:
    """`[out, n]`, in the dtype of the image: each row sums to 1."""
    call = graph.call_function
    size = call(aten.sym_size.int, (image, axis))
    start = _edges(graph, size, 0, 0, out)
    end = _edges(graph, size, 1, out - 1, out)
    pixel = call(aten.arange.default, (size,))
    inside = call(aten.logical_and.default, (call(aten.ge.Tensor, (pixel, start)), call(aten.lt.Tensor, (pixel, end))))
    width = call(aten.sub.Tensor, (end, start))
    return call(aten.div.Tensor, (call(aten.type_as.default, (inside, image)), width))


def _edges(graph: Graph, size: Node, first: int, rounding: int, out: int) -> Node:
    """`[out, 1]` int64: `((i + first) n + rounding) // out` for every i."""
    call = graph.call_function
    steps = call(aten.arange.start, (first, first + out))
    scaled = call(aten.add.Tensor, (call(aten.mul.Tensor, (steps, size)), rounding))
    edges = call(aten.div.Tensor_mode, (scaled, out), {"rounding_mode": "floor"})
    return call(aten.unsqueeze.default, (edges, 1))


def _transposed(graph: Graph, matrix: Node) -> Node:
    return graph.call_function(aten.transpose.int, (matrix, -2, -1))
