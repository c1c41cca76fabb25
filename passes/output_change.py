"""How far the outputs of a model moved, as those see it who read them.

    logits      KL(p || q) of softmax distributions, in nats a row: the logarithm of perplexity grows by about that
    others      |difference|^2 / |outputs|^2

Outputs are logits where the model calls them so, as those of transformers do. Of a model that has some, they alone
count: its other outputs are there for other uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from sparsify.passes.graph_values import fake_tensor, output_leaves

_LOGITS = "logits"
_AT_ONCE = 2**22  # logits: 17 MB of each distribution


def find_logits(graph_module: GraphModule) -> list[bool]:
    """Which of the floating outputs that have a dimension are logits, in order."""
    (output,) = graph_module.graph.find_nodes(op="output")
    found: list[bool] = []
    for path, leaf in output_leaves(graph_module, output.args[0]):
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
        return sum(float(divergence(*pair)) for pair in logits)
    return relative_difference(pairs) ** 2 if any(a.any() for a, _ in pairs) else None


def relative_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`|b - a| / |a|`, L2 over all pairs of an output and the same one after a change; of the same shapes."""
    difference, size = 0.0, 0.0
    for a, b in pairs:
        difference += float((b.double() - a.double()).square().sum())
        size += float(a.double().square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5


def divergence(logits: Tensor, moved: Tensor) -> Tensor:
    """KL(p || q) of the distributions of `logits` and `moved`, `[..., V]` each: mean over the rows, fp64, `[]`."""
    size = logits.shape[-1]
    rows = [tensor.reshape(-1, size).split(max(1, _AT_ONCE // size)) for tensor in (logits, moved)]
    total = logits.new_zeros((), dtype=torch.float64)
    for a, b in zip(*rows, strict=True):
        p, q = a.float().log_softmax(1), b.float().log_softmax(1)
        total = total + functional.kl_div(q, p, log_target=True, reduction="sum")
    return total * size / logits.numel()
