"""`RoutingStats` as a picture: loads by layer and expert, and which experts run for the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsify.routing_stats import LayerRouting, RoutingStats


def plot_routing(stats: RoutingStats) -> Figure:
    """One row of cells a layer, a cell per expert, as dark as its share of the assignments; below, a map per layer.

    A map per layer shows, for the tokens of one expert (row), how many also have another one (column).

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install matplotlib") from error
    widest = max((len(layer.tokens_per_expert) for layer in stats.layers), default=1)
    shares = torch.full((max(len(stats.layers), 1), widest), torch.nan)  # [layers, E]; NaN stays white
    for row, layer in enumerate(stats.layers):
        loads = torch.tensor(layer.tokens_per_expert, dtype=torch.float32)
        shares[row, : len(loads)] = loads / loads.sum().clamp(min=1)
    heights = (1.5 + 0.3 * len(stats.layers), 3.0)
    figure = Figure(figsize=(max(6.0, 2.5 * len(stats.layers)), sum(heights)), layout="constrained")
    subfigures: Any = figure.subfigures(2, 1, height_ratios=heights)
    top, bottom = subfigures
    axes = top.subplots()
    image = axes.imshow(shares.numpy(), aspect="auto", vmin=0, cmap="Blues")
    axes.set_yticks(range(len(stats.layers)), [layer.name for layer in stats.layers])
    axes.set_xlabel("expert")
    axes.set_title("share of the assignments")
    top.colorbar(image, ax=axes)
    for cell, layer in zip(bottom.subplots(1, max(len(stats.layers), 1), squeeze=False)[0], stats.layers, strict=True):
        cell.imshow(_conditional(layer).numpy(), vmin=0, vmax=1, cmap="Blues")
        cell.set_title(layer.name, fontsize="small")
    bottom.suptitle("tokens of an expert (row) that also have another one (column)", fontsize="medium")
    return figure


def _conditional(layer: LayerRouting) -> torch.Tensor:
    """`[E, E]`: share of the tokens of a row's expert that have the column's, the expert itself left white."""
    together = layer.together.float()
    shares = together / together.diagonal().clamp(min=1).unsqueeze(1)
    return shares.fill_diagonal_(torch.nan)
