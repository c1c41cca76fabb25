"""`balanced_kmeans`: exact sizes, and the best assignment to its centroids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sparsify.passes.split.cluster import assign_balanced, balanced_kmeans


@pytest.mark.parametrize(("points", "clusters"), [(12, 3), (13, 5), (7, 7), (5, 1), (10, 4)])
def test_every_point_once_and_sizes_equal(points: int, clusters: int) -> None:
    """Protects: a partition, with padding where the number does not divide."""
    found = balanced_kmeans(torch.randn(points, 4), clusters, seed=0)
    size = -(-points // clusters)
    assert found.shape == (clusters, size)
    assert sorted(found[found >= 0].tolist()) == list(range(points))
    assert int((found < 0).sum()) == clusters * size - points


def test_sizes_that_are_given() -> None:
    """Protects: every cluster gets as many points as it has places, and the padding of the widest."""
    found = balanced_kmeans(torch.randn(20, 4), 3, seed=0, places=[12, 5, 3])
    assert (found >= 0).sum(1).tolist() == [12, 5, 3]
    assert sorted(found[found >= 0].tolist()) == list(range(20))


def test_finds_clusters_that_are_there() -> None:
    """Protects: points around 4 far centres end up together."""
    centres = torch.eye(4).repeat_interleave(6, dim=0) * 10
    shuffled = torch.randperm(24)
    found = balanced_kmeans((centres + 0.1 * torch.randn(24, 4))[shuffled], 4, seed=0)
    assert sorted(sorted((shuffled[row] // 6).unique().tolist()) for row in found) == [[0], [1], [2], [3]]


def test_is_deterministic() -> None:
    """Protects: same seed, same experts."""
    points = torch.randn(40, 3)
    assert torch.equal(balanced_kmeans(points, 5, seed=3), balanced_kmeans(points, 5, seed=3))
    assert not torch.equal(balanced_kmeans(points, 5, seed=3), balanced_kmeans(points, 5, seed=4))


@pytest.mark.parametrize(("points", "clusters"), [(1, 1), (40, 1), (37, 37), (41, 4), (120, 7), (97, 31)])
@pytest.mark.parametrize("skew", [0.0, 3.0], ids=["even", "one-cluster-is-near-to-all"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("uneven", [False, True])
def test_the_assignment_is_the_best_one(
    points: int, clusters: int, skew: float, ties: bool, scale: float, uneven: bool
) -> None:
    """Protects: the total cost is that of scipy's solver for general costs, however crowded, ties or not."""
    rng = np.random.default_rng(points)
    cost = rng.standard_normal((points, clusters))
    cost[:, 0] -= skew
    cost = scale * (cost.round() if ties else cost)
    sizes = np.full(clusters, -(-points // clusters))
    if uneven:
        sizes = 1 + rng.multinomial(points - clusters, rng.dirichlet(np.ones(clusters)))
    labels = assign_balanced(cost, sizes)
    assert (np.bincount(labels, minlength=clusters) <= sizes).all()
    repeated = np.repeat(cost, sizes, axis=1)
    best = repeated[linear_sum_assignment(repeated)].sum()
    assert cost[np.arange(points), labels].sum() == pytest.approx(best, abs=1e-9 * scale)
