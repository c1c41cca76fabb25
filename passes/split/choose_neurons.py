"""Which neurons each expert takes: the shared experts take the most important ones, clustering divides the rest.

F intermediate_size, E num_experts, S of them shared, m = ceil(F / E) neurons of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsify.passes.split.cluster import balanced_kmeans
from sparsify.passes.split.dense_ffn import DenseFFN


def choose_neurons(dense: DenseFFN, importance: Tensor, num_experts: int, num_shared: int, seed: int) -> Tensor:
    """Divide the neurons.

    Args:
        dense: the FFN.
        importance: `[F]`.
        num_experts: E, at most F.
        num_shared: S, below E.
        seed: of the clustering.

    Returns:
        `[E, m]` int64, shared experts first; each neuron appears once, -1 pads where E does not divide F.
    """
    size = -(-len(importance) // num_experts)
    by_importance = importance.argsort(descending=True, stable=True)
    shared = by_importance[: num_shared * size].reshape(num_shared, size)
    rest = by_importance[num_shared * size :].sort().values
    clusters = balanced_kmeans(_features(dense)[rest], num_experts - num_shared, seed)
    routed = torch.where(clusters < 0, -1, rest[clusters.clamp(min=0)])
    padding = torch.full((len(routed), size - routed.shape[1]), -1, dtype=torch.int64)
    return torch.cat([shared, torch.cat([routed, padding], dim=1)])


def _features(dense: DenseFFN) -> Tensor:
    """`[F, D]`: the direction that switches a neuron on, i.e. its row of gate_proj, of up_proj in a plain FFN."""
    gate = next((p for p in dense.projections if p.role == "gate_proj"), dense.projections[0])
    return functional.normalize(gate.weight, dim=1)
