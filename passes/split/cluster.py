"""Balanced k-means: Lloyd steps whose assignment gives every cluster exactly the same size.

The assignment is the linear assignment problem of points to places, each centroid repeated once per place
(MoEfication, arXiv 2110.01786, section 3.2, with an exact solver). n points, d features, c clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_MAX_STEPS = 20


def balanced_kmeans(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Divide points into clusters of `ceil(n / c)` places.

    Args:
        features: `[n, d]`.
        num_clusters: c, at most n.
        seed: of the first centroids.

    Returns:
        `[c, ceil(n / c)]` int64: the points of each cluster in rising order; -1 fills the places that stay empty.
    """
    size = -(-len(features) // num_clusters)
    points = features.double()
    generator = torch.Generator().manual_seed(seed)
    centroids = points[torch.randperm(len(points), generator=generator)[:num_clusters]]
    labels = _assign(points, centroids, size)
    for _ in range(_MAX_STEPS):
        centroids = _means(points, labels, centroids)
        updated = _assign(points, centroids, size)
        if torch.equal(updated, labels):
            break
        labels = updated
    clusters = torch.full((num_clusters, size), -1, dtype=torch.int64)
    for cluster in range(num_clusters):
        members = (labels == cluster).nonzero().flatten()
        clusters[cluster, : len(members)] = members
    return clusters


def _assign(points: Tensor, centroids: Tensor, size: int) -> Tensor:
    """The cluster of each point `[n]`, least total squared distance, no cluster above `size`."""
    cost = torch.cdist(points, centroids).square().numpy()
    _, place = linear_sum_assignment(np.repeat(cost, size, axis=1))
    return torch.from_numpy(place // size)


def _means(points: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """Centroids `[c, d]`; a cluster without points, possible when there are spare places, keeps its centroid."""
    sums = torch.zeros_like(previous).index_add_(0, labels, points)
    counts = torch.bincount(labels, minlength=len(previous)).unsqueeze(1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), previous)
