"""The cells of `benchmarks/quality.py` as Markdown and as a plot of quality against measured latency."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def tables(table: dict[str, Any], higher_is_better: bool) -> str:
    """One table a budget: mean and spread over the seeds, the best method first."""
    names = list(table["dense"])
    dense = ", ".join(f"{name} {value:.4g}" for name, value in table["dense"].items())
    lines = [f"{table['machine']}", "", f"{table['data']}. Dense: {dense}."]
    for budget in sorted({cell["budget"] for cell in table["cells"]}):
        head = ["method", "FFN FLOPs", *names, "seconds", "peak memory / weights", "ms, dense -> converted"]
        lines += ["", f"### {budget:.1%} of the FFN FLOPs", "", _row(head), _row("---" for _ in head)]
        groups = _groups(cell for cell in table["cells"] if cell["budget"] == budget)
        order = sorted(groups, key=lambda key: _mean(groups[key], names[0]), reverse=higher_is_better)
        lines += [_method_row(key, groups[key], names) for key in order]
    return "\n".join(lines) + "\n"


def plot(table: dict[str, Any], higher_is_better: bool, file: Path) -> None:
    """The first metric against the measured time of a call relative to dense, a line a method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    name = next(iter(table["dense"]))
    figure, axes = pyplot.subplots(figsize=(7, 5))
    by_method: dict[str, list[list[dict[str, Any]]]] = {}
    for budget in sorted({cell["budget"] for cell in table["cells"]}):
        for method, cells in _groups(cell for cell in table["cells"] if cell["budget"] == budget).items():
            by_method.setdefault(method, []).append(cells)
    for method, groups in by_method.items():
        times = [statistics.mean(cell["sparse_ms"] / cell["dense_ms"] for cell in cells) for cells in groups]
        axes.plot(times, [_mean(cells, name) for cells in groups], marker="o", label=method)
    axes.axhline(table["dense"][name], color="grey", linestyle=":", label="dense")
    axes.set(xlabel="time of a call / dense", ylabel=name, title=table["data"][:90])
    if not higher_is_better:
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _groups(cells: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        effort = f", effort {cell['effort']}" if cell.get("effort", 1) > 1 else ""
        parts = f", E={cell['experts']}" if cell.get("experts") else ""
        trained = f" + {cell['minutes']:g} min of distill" if cell["minutes"] else ""
        groups.setdefault(cell["method"] + parts + effort + trained, []).append(cell)
    return groups


def _mean(cells: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(cell["scores"][name] for cell in cells)


def _method_row(method: str, cells: list[dict[str, Any]], names: list[str]) -> str:
    columns = [method, f"{statistics.mean(cell['share'] for cell in cells):.1%}"]
    for name in names:
        scores = [cell["scores"][name] for cell in cells]
        columns.append(f"{statistics.mean(scores):.4g} ({min(scores):.4g}-{max(scores):.4g})")
    columns.append(f"{statistics.mean(cell['seconds'] for cell in cells):.0f}")
    columns.append(f"{max(cell['peak_over_weights'] for cell in cells):.2f}")
    times = [statistics.mean(cell[f"{side}_ms"] for cell in cells) for side in ("dense", "sparse")]
    return _row([*columns, f"{times[0]:.3g} -> {times[1]:.3g}"])


def _row(columns: Iterable[str]) -> str:
    return f"| {' | '.join(columns)} |"
