"""One FFN layer on this CPU: dense, and as experts of which a quarter runs, ours against other implementations.

    python benchmarks/cpu.py                 all layers, 1 and 2 threads, about six minutes
    python benchmarks/cpu.py --quick         the GELU layers, fp32, half a minute
    python benchmarks/cpu.py --train         forward and backward, fp32, a minute; to out/cpu_training.md

All columns of a row are timed in turns within one run, each round with other tokens and another routing, so that no
column finds its weights in a cache that the others do not have; the median counts. `dense packed` has its weights
packed by oneDNN, as an inference engine does. `share` is the ratio to the faster dense layer over the ideal E / K. The
tables go to out/cpu.md and out/cpu.json.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as functional
import typer
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from sparsify.cpu import kernel_status, packed
from sparsify.cpu.cost_model import processor_name
from sparsify.cpu.experts import Experts
from sparsify.cpu.forms import sorted_linears
from sparsify.cpu.run import choose_form
from sparsify.kernels.pairs import sort_pairs
from sparsify.ops import moe_ffn

_TOKENS = (1, 4, 16, 64, 256, 1024)
_TRAINABLE = ("loop", "HF grouped_mm", "grouped_mm", "ours")  # beside dense
_VARIANTS = 16  # of tokens and routing
_BATCHED_MM_TOKENS = 16  # it copies the weights for every pair: beyond, it takes seconds
Column = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """A layer, and the threads it runs on."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    gated: bool
    dtype: torch.dtype
    threads: int

    def __str__(self) -> str:
        kind, dtype = "SwiGLU" if self.gated else "GELU", str(self.dtype).removeprefix("torch.")
        experts = f"E={self.num_experts} K={self.top_k}"
        sizes = f"D={self.hidden_size} F={self.intermediate_size}"
        return f"{dtype}, {kind}, {sizes}, {experts}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def main(
    quick: Annotated[bool, typer.Option(help="the GELU layers, fp32, as many threads as torch has")] = False,
    train: Annotated[bool, typer.Option(help="with the gradients of tokens, routing weights and experts")] = False,
    seconds: Annotated[float, typer.Option(help="at least so long per row of a table")] = 2.0,
    output: Annotated[Path, typer.Option(help="folder of the tables")] = Path("out"),
) -> None:
    """Time all layers and write the tables."""
    results: list[dict[str, Any]] = []
    for case in _training_cases() if train else _cases(quick):
        torch.set_num_threads(case.threads)
        rows = [_row(case, tokens, seconds, train) for tokens in ((64, 512, 2048) if train else _TOKENS)]
        results.append({"case": str(case), "experts": case.num_experts, "top_k": case.top_k, "rows": rows})
        print(_table(results[-1]), flush=True)
    machine = {"cpu": processor_name(), "torch": torch.__version__, "kernel": kernel_status().available}
    title = f"# One FFN layer on {machine['cpu']}\n"
    text = f"{title}\ntorch {machine['torch']}, microseconds, medians of interleaved rounds\n"
    name = "cpu_training" if train else "cpu"
    _write(output / f"{name}.json", json.dumps({"machine": machine, "results": results}, indent=1))
    _write(output / f"{name}.md", "\n".join([text, *map(_table, results)]))


def _cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(768, 3072, *parts, False, torch.float32, torch.get_num_threads()) for parts in ((8, 2), (16, 4))]
    layers = [(768, 3072, 8, 2, False), (768, 3072, 16, 4, False), (576, 1536, 8, 2, True), (576, 1536, 16, 4, True)]
    dtypes = (torch.float32, torch.bfloat16)
    return [Case(*layer, dtype, threads) for threads in (2, 1) for dtype in dtypes for layer in layers]


def _training_cases() -> list[Case]:
    sizes = [(768, 3072, 8, 2), (768, 3072, 16, 4), (384, 1536, 16, 4), (384, 1536, 48, 12), (384, 1536, 192, 48)]
    return [Case(*parts, False, torch.float32, torch.get_num_threads()) for parts in sizes]


def _row(case: Case, tokens: int, seconds: float, train: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    experts = _experts(case, train)
    columns = _columns(case, experts, tokens)
    if train:
        columns = {name: _with_gradients(columns[name], experts) for name in _TRAINABLE}
        dense, weights = _dense(experts, functional.linear, lambda weight: weight.detach().requires_grad_())
        columns["dense"] = _with_gradients(dense, (*weights, *experts))
    batches = [_batch(case, tokens) for _ in range(_VARIANTS)]
    times: dict[str, list[float]] = {name: [] for name in columns}
    with torch.inference_mode(not train):
        _agree(columns, batches[0])
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or done < 5:
            for name in _rotated(list(columns), done):
                begin = time.perf_counter()
                columns[name](*batches[done % _VARIANTS])
                times[name].append(time.perf_counter() - begin)
            done += 1
        form = choose_form(batches[0][0], batches[0][2], experts, blocks=not train)
    medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    ratio = min(medians["dense"], medians.get("dense packed", medians["dense"])) / medians["ours"]
    return {"tokens": tokens, "rounds": done, "microseconds": medians, "form": form, "ratio": ratio,
            "share": ratio * case.top_k / case.num_experts}  # fmt: skip


def _agree(columns: dict[str, Column], batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """All columns of experts compute the same, or the figures mean nothing."""
    expected = columns["ours"](*batch).float()
    for name, column in columns.items():
        if name.startswith("dense"):
            column(*batch)
            continue
        error = float((column(*batch).float() - expected).abs().max() / expected.abs().max())
        assert error < 0.05, f"{name} computes something else: relative error {error:.1e}"


def _with_gradients(column: Column, parts: Iterable[object]) -> Column:
    """Forward and backward, to the tokens, the routing weights and those of `parts` that want it."""
    trained = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = column(x.requires_grad_(), weights.requires_grad_(), ids)
        torch.autograd.grad(y, (x, weights, *trained), torch.ones_like(y), allow_unused=True)
        return y.detach()

    return run


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _batch(case: Case, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(tokens, case.num_experts).argsort(1)[:, : case.top_k].contiguous()
    return torch.randn(tokens, case.hidden_size).to(case.dtype), torch.rand(tokens, case.top_k).to(case.dtype), ids


def _experts(case: Case, trained: bool) -> Experts:
    """Weights as the converter leaves them; biases where the layer is not gated, as in BERT and Llama."""
    width = case.intermediate_size // case.num_experts

    def random(*shape: int) -> Tensor:
        weight = (torch.randn(case.num_experts, *shape) / shape[-1] ** 0.5).to(case.dtype)
        return nn.Parameter(weight, requires_grad=trained)

    up, down = random(width, case.hidden_size), random(case.hidden_size, width)
    if case.gated:
        return Experts(up, None, random(width, case.hidden_size), None, down, None, "silu")
    return Experts(up, random(width), None, None, down, random(case.hidden_size), "gelu")


def _columns(case: Case, experts: Experts, tokens: int) -> dict[str, Column]:
    hugging_face = _hugging_face(case, experts)
    columns: dict[str, Column] = {
        "dense": _dense(experts, functional.linear, lambda weight: weight)[0],
        "loop": lambda x, weights, ids: sorted_linears(x, weights, ids, experts),
        "HF grouped_mm": lambda x, weights, ids: grouped_mm_experts_forward(hugging_face, x, ids, weights),
        "grouped_mm": lambda x, weights, ids: _grouped_mm(x, weights, ids, experts),
        "ours": lambda x, weights, ids: moe_ffn(x, weights, ids, *experts),
    }
    if packed.supported(case.dtype):
        pack = lambda weight: packed.pack(weight, weight.shape, tokens)  # noqa: E731
        columns["dense packed"] = _dense(experts, packed.apply, pack)[0]
    if case.gated:
        columns["HF eager"] = lambda x, weights, ids: MixtralExperts.forward(hugging_face, x, ids, weights)
    if tokens <= _BATCHED_MM_TOKENS:
        columns["HF batched_mm"] = lambda x, weights, ids: batched_mm_experts_forward(hugging_face, x, ids, weights)
    return columns


def _dense(
    experts: Experts, linear: Callable[..., Tensor], prepare: Callable[[Tensor], Tensor]
) -> tuple[Column, list[Tensor]]:
    """The layer before its conversion, and its weights."""
    up = prepare(experts.up_proj.flatten(0, 1))
    gate = None if experts.gate_proj is None else prepare(experts.gate_proj.flatten(0, 1))
    down = prepare(experts.down_proj.transpose(0, 1).flatten(1).contiguous())
    up_bias = None if experts.up_bias is None else experts.up_bias.flatten()
    down_bias = None if experts.down_bias is None else experts.down_bias[0]

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gated = None if gate is None else linear(x, gate, None)
        return linear(experts.activate(linear(x, up, up_bias), gated), down, down_bias)

    return run, [up, down] if gate is None else [up, gate, down]


def _hugging_face(case: Case, experts: Experts) -> Any:
    """What the experts of transformers look like to their forward functions."""
    gate_up = None if experts.gate_proj is None else torch.cat([experts.gate_proj, experts.up_proj], 1)
    act = functional.silu if case.gated else functional.gelu

    def apply_gate(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return act(gate) * up

    return SimpleNamespace(
        num_experts=case.num_experts, has_gate=case.gated, has_bias=experts.up_bias is not None, is_transposed=False,
        has_post_expert_norm=False, _is_expert_parallel=False, gate_up_proj=gate_up, up_proj=experts.up_proj,
        up_proj_bias=experts.up_bias, down_proj=experts.down_proj, down_proj_bias=experts.down_bias, act_fn=act,
        _apply_gate=apply_gate, config=SimpleNamespace(_experts_implementation="eager"),
    )  # fmt: skip


def _grouped_mm(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts) -> Tensor:
    """Sorted rows through `torch.nn.functional.grouped_mm`."""
    pairs = sort_pairs(ids, len(experts.up_proj))
    counts = torch.tensor(pairs.counts)
    offsets = counts.cumsum(0).to(torch.int32)

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = functional.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
        return out if bias is None else out.add_(bias.repeat_interleave(counts, 0))

    rows = x.index_select(0, pairs.tokens)
    gate = None if experts.gate_proj is None else product(rows, experts.gate_proj, experts.gate_bias)
    hidden = experts.activate(product(rows, experts.up_proj, experts.up_bias), gate)
    out = product(hidden, experts.down_proj, experts.down_bias)
    by_slot = torch.empty_like(out).index_copy_(0, pairs.pairs, out).view(*ids.shape, -1)
    return (by_slot * weights.unsqueeze(-1)).sum(1)


def _table(result: dict[str, Any]) -> str:
    names = ["dense", "dense packed", "loop", "HF eager", "HF batched_mm", "HF grouped_mm", "grouped_mm", "ours"]
    names = [name for name in names if any(name in row["microseconds"] for row in result["rows"])]
    lines = [f"## {result['case']}", "", "| T | " + " | ".join(names) + " | form | ratio | share |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for row in result["rows"]:
        cells = [f"{row['microseconds'][name]:.0f}" if name in row["microseconds"] else "-" for name in names]
        end = [row["form"], f"{row['ratio']:.2f}", f"{row['share']:.0%}"]
        lines.append("| " + " | ".join([str(row["tokens"]), *cells, *end]) + " |")
    return "\n".join([*lines, ""])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


if __name__ == "__main__":
    typer.run(main)
