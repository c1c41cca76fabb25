"""Static pruning: the neurons that add the most variance to the output run for every token, the others never.

This is WIFV with the mean of what is dropped in the bias (FLAP, arXiv 2312.11983), and down_proj refitted. It needs no
router, so at the same FLOPs it keeps more neurons than experts do, and sometimes that is better.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts, divide
from sparsify.passes.split.statistics import importance, measure_neurons


def prune(dense: DenseFFN, x: torch.Tensor, num_experts: int, kept: int) -> tuple[Experts, torch.Tensor]:
    """Keep a part of the neurons.

    Args:
        dense: the FFN.
        x: tokens `[T, D]`, T > 0.
        num_experts: parts of the neurons, E, m neurons each.
        kept: how many of them stay.

    Returns:
        The kept neurons as one shared expert, with the mean of the others in the bias and no routed expert; and the
        mean of the kept neurons `[kept * m]`.
    """
    statistics = measure_neurons(dense, x)
    order = importance(dense, statistics).argsort(descending=True, stable=True)
    size = -(-len(order) // num_experts)
    stay, go = order[: kept * size], order[kept * size :]
    dropped = dense.down.weight[:, go].double() @ statistics.mean[go]
    bias = dropped if dense.down.bias is None else dense.down.bias.double() + dropped
    padded = torch.cat([stay, stay.new_full((kept * size - len(stay),), -1)])
    experts = divide(dense, padded.view(kept, size), kept)
    mean = statistics.mean[padded.clamp(min=0)]
    return replace(experts, bias=bias.to(dense.down.weight.dtype)), mean
