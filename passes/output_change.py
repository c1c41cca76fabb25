"""How far the outputs of a model moved, as those see it who read them.

    logits      KL(p || q) of softmax distributions, in nats a row: the logarithm of perplexity grows by about that
    others      |difference|^2 / |outputs|^2

Outputs are logits where the model calls them so, as those of transformers do. Of a model that has some, they alone
count: its other outputs are there for other uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from sparsify.passes.graph_values import fake_tensor
from sparsify.passes.split.statistics import chunks

_LOGITS = "logits"


def find_logits(graph_module: GraphModule) -> list[bool]:
    """Which of the floating outputs that have a dimension are logits, in order."""
    (output,) = graph_module.graph.find_nodes(op="output")
    tree: Any = output.args[0]
    pytree_info = getattr(getattr(graph_module.graph, "_codegen", None), "pytree_info", None)
    if pytree_info is not None:
        tree = pytree.tree_unflatten(pytree.tree_leaves(tree), pytree_info.out_spec)
    found: list[bool] = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        value = fake_tensor(leaf) if isinstance(leaf, Node) else None
        if value is not None and value.is_floating_point() and value.dim() > 0:
            found.append(bool(path) and _LOGITS in (getattr(path[-1], "key", None), getattr(path[-1], "name", None)))
    return found


def output_change(outputs: Sequence[Tensor], moved: Sequence[Tensor], are_logits: Sequence[bool]) -> float | None:
    """Measure it.

    Args:
        outputs: of the model, `[..., V]` each.
        moved: the same outputs after a change.
        are_logits: for each of them.

    Returns:
        None where the outputs say nothing: they are zero, or all padding.
    """
    pairs = list(zip(outputs, moved, strict=True))
    logits = [pair for pair, holds in zip(pairs, are_logits, strict=True) if holds and pair[0].numel()]
    if logits:
        return sum(_divergence(*pair) for pair in logits)
    difference = sum(float((b.double() - a.double()).square().sum()) for a, b in pairs)
    size = sum(float(a.double().square().sum()) for a, _ in pairs)
    return difference / size if size else None


def _divergence(logits: Tensor, moved: Tensor) -> float:
    """Mean over the rows."""
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (logits, moved)]
    total = 0.0
    for a, b in zip(*map(chunks, rows), strict=True):
        p, q = a.float().log_softmax(1), b.float().log_softmax(1)
        total += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
    return total / len(rows[0])
