"""Balanced k-means: Lloyd steps whose assignment gives every cluster exactly the same size, or the one it is to have.

The assignment is the linear assignment problem of points to places, each centroid repeated once per place
(MoEfication, arXiv 2110.01786, section 3.2). As there are few centroids, it is solved exactly as a flow between them:
every point starts at its nearest centroid, and points move from clusters that are too large to others along the
cheapest chains (successive shortest paths: Ahuja, Magnanti and Orlin, Network Flows, section 9.7). A solver for
general costs would need n^2 of memory and some n^3 of time. n points, d features, c clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_MAX_STEPS = 20
_ROUNDING = 1e-12  # of prices, which are differences of costs up to 1: a cycle of zero must not look like a gain
_TINY = 1e-300


def balanced_kmeans(features: Tensor, num_clusters: int, seed: int, places: Sequence[int] | None = None) -> Tensor:
    """Divide points into clusters of `ceil(n / c)` places, or of as many as are given for each.

    Args:
        features: `[n, d]`.
        num_clusters: c, at most n.
        seed: of the first centroids.
        places: of each cluster, n or more in all.

    Returns:
        `[c, m]` int64, m the most places: the points of each cluster in rising order; -1 fills what stays empty.
    """
    sizes = np.array(places or [-(-len(features) // num_clusters)] * num_clusters)
    generator = torch.Generator().manual_seed(seed)
    centroids = features[torch.randperm(len(features), generator=generator)[:num_clusters]]
    if (sizes != sizes[0]).any():
        centroids = _by_size(features, centroids, sizes)
    labels = _nearest(features, centroids, sizes)
    for _ in range(_MAX_STEPS):
        centroids = _means(features, labels, centroids)
        updated = _nearest(features, centroids, sizes)
        if torch.equal(updated, labels):
            break
        labels = updated
    clusters = torch.full((num_clusters, int(sizes.max())), -1, dtype=torch.int64)
    for cluster in range(num_clusters):
        members = (labels == cluster).nonzero().flatten()
        clusters[cluster, : len(members)] = members
    return clusters


def _by_size(points: Tensor, centroids: Tensor, sizes: np.ndarray) -> Tensor:
    """The centroids `[c, d]` in another order: the more points are nearest to one, the more places its cluster has."""
    free = _nearest(points, centroids, np.full(len(sizes), len(points)))
    crowded = torch.bincount(free, minlength=len(sizes)).argsort(descending=True, stable=True)
    ordered = torch.empty_like(centroids)
    ordered[torch.from_numpy(np.argsort(-sizes, kind="stable"))] = centroids[crowded]
    return ordered


def _nearest(points: Tensor, centroids: Tensor, sizes: np.ndarray) -> Tensor:
    """The cluster of each point `[n]`, least total squared distance, no cluster above its size `[c]`."""
    cost = centroids.square().sum(1) - 2 * points @ centroids.t()  # the squared distance but for the point's own norm
    return torch.from_numpy(assign_balanced(cost.double().numpy(), sizes))


def assign_balanced(cost: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Assign points to clusters at the least total cost.

    Args:
        cost: `[n, c]`, of each point in each cluster; finite.
        sizes: `[c]`, places in each cluster, at least n in all.

    Returns:
        `[n]` int64, the cluster of each point; no cluster has more than its size.
    """
    clusters = cost.shape[1]
    cost = cost / max(float(np.abs(cost).max()), _TINY)  # so that rounding errors have one size
    labels = cost.argmin(1)
    counts = np.bincount(labels, minlength=clusters)
    prices = np.full((clusters, clusters), np.inf)  # [a, b]: of moving the cheapest point of a to b
    movers = np.zeros((clusters, clusters), dtype=np.int64)
    _price(cost, labels, range(clusters), prices, movers)
    while (counts > sizes).any():
        path = _cheapest_path(prices, counts > sizes, counts < sizes)
        for a, b in pairwise(path):
            labels[movers[a, b]] = b
        counts[path[0]] -= 1
        counts[path[-1]] += 1
        _price(cost, labels, path, prices, movers)
    return labels


def _price(
    cost: np.ndarray, labels: np.ndarray, changed: Iterable[int], prices: np.ndarray, movers: np.ndarray
) -> None:
    """Bring the rows of the clusters that changed up to date."""
    for a in changed:
        members = np.flatnonzero(labels == a)
        prices[a] = np.inf
        if len(members):
            increase = cost[members] - cost[members, a, None]
            movers[a] = members[increase.argmin(0)]
            prices[a] = increase.min(0)
        prices[a, a] = np.inf


def _cheapest_path(prices: np.ndarray, sources: np.ndarray, sinks: np.ndarray) -> list[int]:
    """From any source to any sink, by Bellman and Ford: prices can be negative, but no cycle of them is."""
    distance = np.where(sources, 0.0, np.inf)
    before = np.full(len(distance), -1)
    for _ in range(len(distance)):
        through = distance[:, None] + prices
        better = through.min(0) < distance - _ROUNDING
        if not better.any():
            break
        before = np.where(better, through.argmin(0), before)
        distance = np.where(better, through.min(0), distance)
    path = [int(np.where(sinks, distance, np.inf).argmin())]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]


def _means(points: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """Centroids `[c, d]`; a cluster without points, possible when there are spare places, keeps its centroid."""
    members = torch.nn.functional.one_hot(labels, len(previous)).to(points.dtype)  # [n, c]
    counts = members.sum(0).unsqueeze(1)
    return torch.where(counts > 0, members.t() @ points / counts.clamp(min=1), previous)
