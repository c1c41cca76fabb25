"""The tables and the plot of `onnx_speed.py`, from the times that it took.

`plain` is what the cost model chooses for exactly T tokens in a file for any session, `fused` with
`allow=["fused_op"]`: both compute what the model does. `allowed` is the choice with every leave, to be dense or to take
GELU by tanh. Routers are part of every time but the dense one. `share` is the ratio to dense of `fused` over the ideal
E / K.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sparsify.passes.find_layers import LayerFacts
from sparsify.passes.lower_onnx.choose_lowering import choose_lowering, refusals
from sparsify.passes.lower_onnx.lowerings import Leave

LOADS = {"load_ms": True, "load_ms_without_reuse": False}  # key -> whether onnxruntime looks for buffers to reuse
Result = Mapping[str, Any]
_CELL = ("hidden_size", "num_experts", "top_k", "threads", "tokens", "plain", "fused", "allowed")
_ALLOW: dict[str, tuple[Leave, ...]] = {
    "plain": (),
    "fused": ("fused_op",),
    "allowed": ("dense", "tanh_gelu", "fused_op"),
}
_ROUTER = 64  # hidden size
_LINE = ("threads", "hidden_size", "num_experts", "top_k")
_TICKS = (0.5, 1, 2, 4, 8)


def write_tables(runs: Sequence[Sequence[Result]], folder: Path) -> None:
    """Write onnx.md, onnx.json and, where matplotlib is installed, onnx.png.

    Args:
        runs: for each case one result or several, of which the tables show the first.
        folder: for the files.
    """
    results = [own[0] for own in runs]
    machine = results[0]["machine"]
    title = f"# onnxruntime {machine['onnxruntime']} on {machine['cpu']}\n\nMilliseconds, medians of rounds.\n"
    tables = [_layer_tables(result) if _is_layer(result) else _model_tables(result) for result in results]
    rows = [row for result in results if _is_layer(result) for row in layer_rows(result)]
    spreads = [_spread(own) for own in runs if len(own) > 1]
    _write(folder / "onnx.json", json.dumps({"machine": machine, "results": results, "rows": rows}, indent=1))
    _write(folder / "onnx.md", "\n".join([title, _summary(rows, results), *spreads, *tables]))
    _plot(rows, folder / "onnx.png")


def layer_rows(result: Result) -> list[dict[str, Any]]:
    """One row a number of threads and of tokens: times, our choice, and its ratios."""
    case = result["case"]
    return [
        _row(case, int(threads), size[0], {name: values[i] for name, values in times.items()})
        for threads, times in result["ms"].items()
        for i, size in enumerate(case["sizes"])
    ]


def _row(case: Mapping[str, Any], threads: int, tokens: int, ms: Mapping[str, float]) -> dict[str, Any]:
    experts, top_k, hidden = case["num_experts"], case["top_k"], case["hidden_size"]
    size, router = 4 * hidden // experts, _ROUTER * (hidden + experts)
    facts = LayerFacts(experts, top_k, hidden, hidden, size, torch.float32, "gelu", False, True, None, None, router)
    chosen = {name: _choice(facts, tokens, allow) for name, allow in _ALLOW.items()}
    best = min(ms["dense"], ms["MoE"])
    return {
        "hidden_size": hidden, "num_experts": experts, "top_k": top_k, "threads": threads, "tokens": tokens,
        "ms": dict(ms), **chosen,
        "ratio": {name: ms["dense"] / ms[choice] for name, choice in chosen.items()},
        "against_moe": {name: ms["MoE"] / ms[choice] for name, choice in chosen.items()},
        "against_best": {name: best / ms[choice] for name, choice in chosen.items()},
        "share": ms["dense"] / ms[chosen["fused"]] * top_k / experts,
    }  # fmt: skip


def _choice(facts: LayerFacts, tokens: int, allow: tuple[Leave, ...]) -> str:
    """By the names of the files."""
    name = choose_lowering(refusals(facts, "ort-cpu", None, allow), facts, "ort-cpu", (tokens,))[0]
    return "MoE" if name == "moe_op" else name


def _is_layer(result: Result) -> bool:
    return result["case"]["kind"] == "Layer"


def _layer_tables(result: Result) -> str:
    rows, case = layer_rows(result), result["case"]
    lines: list[str] = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        hidden, of = case["hidden_size"], f"E={case['num_experts']} K={case['top_k']}"
        lines += [f"## D={hidden} F={4 * hidden}, {of}, {_threads(threads)}", ""]
        lines += _table(
            ["T", *rows[0]["ms"], *(head for name in ("plain", "fused") for head in _heads(name)), "share"],
            [_cells(row) for row in rows if row["threads"] == threads],
        )
    return "\n".join([*lines, _footer(result)])


def _heads(name: str) -> list[str]:
    return [name, f"dense / {name}", f"MoE / {name}"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{time:.3f}" for time in row["ms"].values()]
    choices = [
        text
        for name in ("plain", "fused")
        for text in (row[name], f"{row['ratio'][name]:.2f}", f"{row['against_moe'][name]:.2f}")
    ]
    return [str(row["tokens"]), *times, *choices, f"{row['share']:.0%}"]


def _model_tables(result: Result) -> str:
    case, lines = result["case"], list[str]()
    for threads, times in result["ms"].items():
        lines += [f"## {case['name']}, E={case['num_experts']} K={case['top_k']}, {_threads(int(threads))}", ""]
        others = [name for name in times if name != "dense"]
        lines += _table(
            ["batch x sequence", *times, *(f"dense / {name}" for name in others)],
            [
                ["x".join(map(str, size)), *(f"{times[name][i]:.2f}" for name in times)]
                + [f"{times['dense'][i] / times[name][i]:.2f}" for name in others]
                for i, size in enumerate(case["sizes"])
            ],
        )
    return "\n".join([*lines, _footer(result)])


def _spread(runs: Sequence[Result]) -> str:
    """Dense over every file: the median of the runs, and least to most."""
    case, lines = runs[0]["case"], list[str]()
    layer = f"D={case['hidden_size']}" if _is_layer(runs[0]) else case["name"]
    name = f"{layer}, E={case['num_experts']} K={case['top_k']}"
    for threads, times in runs[0]["ms"].items():
        lines += [f"## dense / file, median of {len(runs)} runs: {name}, {_threads(int(threads))}", ""]
        lines += _table(
            ["", *("x".join(map(str, size)) for size in case["sizes"])],
            [[file, *_ratios_of_runs(runs, threads, file)] for file in times if file != "dense"],
        )
    return "\n".join(lines)


def _ratios_of_runs(runs: Sequence[Result], threads: str, file: str) -> list[str]:
    by_run = [np.divide(run["ms"][threads]["dense"], run["ms"][threads][file]) for run in runs]
    return [f"{np.median(own):.2f} ({min(own):.2f} - {max(own):.2f})" for own in zip(*by_run, strict=True)]


def _footer(result: Result) -> str:
    """What does not depend on the size: loading, the file, and memory."""
    parts: list[str] = []
    loads = zip(("load time", "load time, `enable_mem_reuse = False`"), LOADS, strict=True)
    for title, key in (*loads, ("file size", "bytes"), ("peak memory", "peak_bytes")):
        values = result[key]
        if not values:
            continue
        dense = values["dense"]
        absolute = f"{dense:.0f} ms" if key in LOADS else f"{dense / 1e6:.1f} MB"
        ratios = ", ".join(f"{name} {value / dense:.2f}" for name, value in values.items() if name != "dense")
        parts.append(f"{title}: dense {absolute}, over dense: {ratios}")
    return "\n".join([*(f"- {part}" for part in parts), ""])


def _summary(rows: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> str:
    """Where the choices lose."""
    if not rows:
        return ""
    lost = {name: [row for row in rows if row["against_best"][name] < 0.95] for name in _ALLOW}
    fastest = sum(row["ms"]["fused_op"] <= 1.05 * min(row["ms"].values()) for row in rows)
    lines = [
        f"{len(rows)} cells. `fused_op` is the fastest of all files, or within 5 % of it, in {fastest}. "
        "More than 5 % slower than the better of dense and com.microsoft::MoE: "
        + ", ".join(f"`{name}` in {len(rows)}" for name, rows in lost.items())
        + f". Load time over dense: {_loads(results, 'load_ms')}; "
        f"without the search for buffers: {_loads(results, 'load_ms_without_reuse')}.",
        "",
    ]
    if lost["fused"]:
        lines += _table(
            ["D", "E", "K", "threads", "T", *_ALLOW, *(f"better of dense and MoE / {name}" for name in _ALLOW)],
            [
                [*(str(row[key]) for key in _CELL), *(f"{row['against_best'][name]:.2f}" for name in _ALLOW)]
                for row in lost["fused"]
            ],
        )
    return "\n".join(lines)


def _loads(results: Sequence[Result], key: str) -> str:
    """Least to most, by lowering."""
    ratios: dict[str, list[float]] = {}
    for result in results:
        for name, load in result[key].items():
            ratios.setdefault(name, []).append(load / result[key]["dense"])
    return ", ".join(f"{name} {min(own):.2f} to {max(own):.2f}" for name, own in ratios.items() if name != "dense")


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The ratio to dense over T, a row of panels a number of threads, a column a hidden size."""
    if not rows:
        return
    try:
        from matplotlib import pyplot
    except ImportError:
        print("without matplotlib there is no plot")
        return
    sizes, threads = (sorted({row[key] for row in rows}) for key in ("hidden_size", "threads"))
    shape = (4 * len(sizes), 3.2 * len(threads))
    figure, axes = pyplot.subplots(len(threads), len(sizes), figsize=shape, sharey=True, sharex=True, squeeze=False)
    lines = sorted({(row["num_experts"], row["top_k"]) for row in rows})
    for place, axis in np.ndenumerate(axes):
        panel = (threads[place[0]], sizes[place[1]])
        for color, counts in enumerate(lines):
            keys = (*panel, *counts)
            line = [row for row in rows if tuple(row[key] for key in _LINE) == keys]
            tokens, ratios = [row["tokens"] for row in line], [row["ratio"]["fused"] for row in line]
            axis.plot(tokens, ratios, f"C{color}", marker="o", markersize=4, label=f"E={counts[0]} K={counts[1]}")
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set(xscale="log", yscale="log", yticks=_TICKS, title=f"D={panel[1]}, {_threads(panel[0])}")
        axis.set(yticklabels=map(str, _TICKS), xlabel="tokens", ylabel="dense / fused")
        axis.minorticks_off()
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(cast(Sequence[str], line)) + " |" for line in lines), ""]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
