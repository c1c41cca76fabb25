"""Which neurons each expert takes: the shared experts take the most important ones, clustering divides the rest.

Neurons are clustered by what they do on a sample of tokens: those that rise and fall together belong together, so that
a router can tell from the token which groups matter (ExpertWeaver, arXiv 2602.15521, clusters mean profiles).

T tokens, F intermediate_size, E num_experts, S of them shared, m = ceil(F / E) neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsify.expert_units import units_of_widths
from sparsify.passes.on_disk import take_rows
from sparsify.passes.split.cluster import balanced_kmeans
from sparsify.passes.split.dense_ffn import DenseFFN

_SAMPLE = 1536


def activation_profiles(dense: DenseFFN, x: Tensor) -> Tensor:
    """`[F, T']`: how every neuron deviates from its mean on at most 1536 evenly spaced tokens of `x`, normalised."""
    hidden = dense.hidden(take_rows(x, torch.arange(0, len(x), -(-len(x) // _SAMPLE))))  # [T', F]
    return functional.normalize((hidden - hidden.mean(0)).t(), dim=1)


def choose_neurons(profiles: Tensor, importance: Tensor, num_experts: int, num_shared: int, seed: int) -> Tensor:
    """Divide the neurons.

    Args:
        profiles: `[F, T']`; neurons with similar rows go together.
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
    clusters = balanced_kmeans(profiles[rest], num_experts - num_shared, seed)
    routed = torch.where(clusters < 0, -1, rest[clusters.clamp(min=0)])
    padding = torch.full((len(routed), size - routed.shape[1]), -1, dtype=torch.int64)
    return torch.cat([shared, torch.cat([routed, padding], dim=1)])


def choose_by_width(
    profiles: Tensor, importance: Tensor, widths: Sequence[int], num_shared: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Divide the neurons among experts of given widths.

    Args:
        profiles: `[F, T']`; neurons with similar rows go together.
        importance: `[F]`.
        widths: neurons of each expert, F in all, shared experts first.
        num_shared: S, below E.
        seed: of the clustering.

    Returns:
        The neurons of the shared experts `[s]`, and of the units of the routed ones `[U, w]`, expert after expert: w is
        the greatest common divisor of their widths. Each neuron appears once.
    """
    num_neurons = sum(widths[:num_shared])
    by_importance = importance.argsort(descending=True, stable=True)
    rest = by_importance[num_neurons:].sort().values
    routed = widths[num_shared:]
    clusters = balanced_kmeans(profiles[rest], len(routed), seed, routed)
    own = torch.cat([row[:width] for row, width in zip(clusters, routed, strict=True)])
    return by_importance[:num_neurons], rest[own].view(-1, units_of_widths(routed)[0])
