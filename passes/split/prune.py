"""Static pruning: the neurons that add the most variance to the output run for every token, the others never.

This is WIFV with the mean of what is dropped in the bias (FLAP, arXiv 2312.11983). Training and refit follow, as for
experts. It needs no router, so at the same FLOPs it keeps more neurons than experts do, and sometimes that is better.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts, divide
from sparsify.passes.split.statistics import importance, measure_neurons


def prune(dense: DenseFFN, x: torch.Tensor, kept: int) -> tuple[Experts, torch.Tensor]:
    """Keep a part of the neurons.

    Args:
        dense: the FFN.
        x: tokens `[T, D]`, T > 0.
        kept: how many neurons stay, at least 1; all where there are fewer.

    Returns:
        The kept neurons as one shared expert, with the mean of the others in the bias and no routed expert; and the
        mean of the kept neurons `[kept]`.
    """
    statistics = measure_neurons(dense, x)
    order = importance(dense, statistics).argsort(descending=True, stable=True)
    stay, go = order[:kept], order[kept:]
    dropped = dense.down.weight[:, go].double() @ statistics.mean[go]
    bias = dropped if dense.down.bias is None else dense.down.bias.double() + dropped
    experts = divide(dense, stay.unsqueeze(0), num_shared=1)
    return replace(experts, bias=bias.to(dense.down.weight.dtype)), statistics.mean[stay]
