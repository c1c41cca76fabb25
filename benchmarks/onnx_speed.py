"""One FFN layer in onnxruntime on this CPU: dense, `com.microsoft.MoE`, and the file that `export_onnx` chooses.

    python benchmarks/onnx_speed.py                all shapes, 1 and 2 threads, about twenty minutes
    python benchmarks/onnx_speed.py --quick        D=768 F=3072, 16 experts of which 4 run, under two minutes

One session is alive at a time, as the threads of an idle one take the cores; the files take turns, round after round,
and the median of the rounds counts. `ours` is the lowering that the cost model chooses for exactly T tokens; the router
is part of it. GELU is the exact one, but in the MoE op, which has the tanh form alone. `share` is the ratio to dense
over the ideal E / K, `load` the time to make a session over that of the dense file. Tables go to out/onnx.md, .json.
"""

from __future__ import annotations

import json
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import onnxruntime
import torch
import typer
from torch import Tensor, fx, nn

from sparsify import SparseModel, export_onnx
from sparsify.cpu.cost_model import processor_name
from sparsify.passes.find_layers import find_layers
from sparsify.passes.fuse_moe import MOE_FFN, unfuse_moe
from sparsify.passes.lower_onnx.choose_lowering import choose_lowering, refusals
from sparsify.passes.lower_onnx.lowerings import Lowering
from sparsify.routers import MLPRouter
from sparsify.sparse_model import SIZES_KEY, SparseModelInfo

_TOKENS = (1, 4, 16, 64, 128, 512, 2048)
_EXACT: tuple[Lowering, ...] = ("expert_chain", "sorted_split", "dense_masked")
_ROUTER = 64  # hidden size, the default of the config


class Case(NamedTuple):
    """A layer, and the threads it runs on."""

    hidden_size: int
    num_experts: int
    top_k: int
    threads: int

    def __str__(self) -> str:
        sizes = f"D={self.hidden_size} F={4 * self.hidden_size}, E={self.num_experts} K={self.top_k}"
        return f"{sizes}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class _Dense(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.up = nn.Linear(case.hidden_size, 4 * case.hidden_size)
        self.down = nn.Linear(4 * case.hidden_size, case.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class _Experts(nn.Module):
    """The neurons of a dense layer in equal parts, in their order: times depend on no better division."""

    def __init__(self, dense: _Dense, case: Case) -> None:
        super().__init__()
        experts, hidden = case.num_experts, case.hidden_size
        width = 4 * hidden // experts
        self.up_proj = nn.Parameter(dense.up.weight.detach().reshape(experts, width, hidden))
        self.up_proj_bias = nn.Parameter(dense.up.bias.detach().reshape(experts, width))
        down = dense.down.weight.detach().reshape(hidden, experts, width).transpose(0, 1)
        self.down_proj = nn.Parameter(down.contiguous())
        self.bias = dense.down.bias


def main(
    quick: Annotated[bool, typer.Option(help="one shape, two threads")] = False,
    rounds: Annotated[int, typer.Option(help="how often every file is loaded and timed")] = 3,
    seconds: Annotated[float, typer.Option(help="at least so long per file, round and number of tokens")] = 0.1,
    output: Annotated[Path, typer.Option(help="folder of the tables")] = Path("out"),
) -> None:
    """Time all layers and write the tables."""
    machine = {"cpu": processor_name(), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    results: list[dict[str, Any]] = []
    for case in _cases(quick):
        results.append(_measure(case, rounds, seconds))
        print(_table(results[-1]), flush=True)
    title = f"# One FFN layer in onnxruntime {machine['onnxruntime']} on {machine['cpu']}\n\nMilliseconds, medians.\n"
    _write(output / "onnx.json", json.dumps({"machine": machine, "results": results}, indent=1))
    _write(output / "onnx.md", "\n".join([title, *map(_table, results)]))


def _cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(768, 16, 4, 2)]
    experts = [(8, 2), (16, 4), (64, 16), (8, 1), (16, 2), (64, 8)]
    return [Case(size, *numbers, threads) for threads in (2, 1) for size in (384, 768, 2048) for numbers in experts]


def _measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = _Dense(case).eval()
    sparse = _sparse(dense, case, "gelu")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("dense", "MoE", *_EXACT)}
        for name in _EXACT:
            export_onnx(sparse, files[name], lowering=name, verify=name == "expert_chain")
        export_onnx(_sparse(dense, case, "gelu_tanh"), files["MoE"], lowering="moe_op", dense=dense, verify=False)
        os.replace(files["MoE"].with_name("MoE.dense.onnx"), files["dense"])
        size = files["expert_chain"].stat().st_size / files["dense"].stat().st_size
        turns = [{name: _time(file, case, seconds) for name, file in files.items()} for _ in range(rounds)]
    loads = {name: statistics.median(turn[name][0] for turn in turns) for name in files}
    medians = [
        {name: statistics.median(turn[name][1][i] for turn in turns) * 1e3 for name in files}
        for i in range(len(_TOKENS))
    ]
    rows = [_row(sparse, case, tokens, times) for tokens, times in zip(_TOKENS, medians, strict=True)]
    load = {name: loads[name] / loads["dense"] for name in files}
    return {"case": str(case), "rows": rows, "load": load, "file_size": size}


def _sparse(dense: _Dense, case: Case, activation: str) -> SparseModel:
    """A converted model that is one layer, without the training of its router."""
    root = nn.Module()
    root.experts = _Experts(dense, case)
    root.router = MLPRouter(case.hidden_size, case.num_experts, case.top_k, _ROUTER)
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[SIZES_KEY] = ("tokens", case.hidden_size)
    routed = graph.call_module("router", (x,))
    weights, ids = (graph.call_function(operator.getitem, (routed, i)) for i in range(2))
    parameters = [graph.get_attr(f"experts.{name}") for name in ("up_proj", "up_proj_bias", "down_proj")]
    y = graph.call_function(MOE_FFN, (x, weights, ids, *parameters[:2], None, None, parameters[2], None, activation))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (y, graph.get_attr("experts.bias"))))
    sparse = SparseModel(root, graph)
    sparse.info = SparseModelInfo((torch.randn(8, case.hidden_size),), {}, {}, None)
    return sparse


def _time(file: Path, case: Case, seconds: float) -> tuple[float, list[float]]:
    """Seconds to load, and median seconds of a call at every number of tokens."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - start
    name = session.get_inputs()[0].name
    random = np.random.default_rng(0)
    times: list[float] = []
    for tokens in _TOKENS:
        batches = [random.standard_normal((tokens, case.hidden_size), np.float32) for _ in range(8)]
        times.append(_median(lambda x: session.run(None, {name: x}), batches, seconds))
    return load, times


def _median(run: Callable[[Any], object], batches: Sequence[Any], seconds: float) -> float:
    run(batches[-1])
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run(batches[len(times) % len(batches)])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _row(sparse: SparseModel, case: Case, tokens: int, times: dict[str, float]) -> dict[str, Any]:
    graph = fx.Graph()
    graph.output(graph.graph_copy(sparse.graph, {}))
    unfuse_moe(sparse, graph)
    facts = find_layers(sparse, graph)[0].facts
    chosen, _, _ = choose_lowering(refusals(facts, "ort-cpu", None), facts, "ort-cpu", (tokens,))
    ratio = times["dense"] / times[chosen]
    best = min(_EXACT, key=lambda name: times[name])
    return {"tokens": tokens, "ms": times, "choice": chosen, "fastest": best, "ratio": ratio,
            "against_moe": times["MoE"] / times[chosen], "share": ratio * case.top_k / case.num_experts}  # fmt: skip


def _table(result: dict[str, Any]) -> str:
    names = list(result["rows"][0]["ms"])
    lines = [f"## {result['case']}", ""]
    lines.append("| T | " + " | ".join(names) + " | ours | fastest | dense / ours | MoE / ours | share |")
    lines.append("|---" * (len(names) + 6) + "|")
    for row in result["rows"]:
        cells = [str(row["tokens"]), *(f"{row['ms'][name]:.3f}" for name in names), row["choice"], row["fastest"]]
        cells += [f"{row['ratio']:.2f}", f"{row['against_moe']:.2f}", f"{row['share']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    loads = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["load"].items())
    return "\n".join([*lines, "", f"load: {loads}; file size over dense: {result['file_size']:.3f}", ""])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


if __name__ == "__main__":
    typer.run(main)
