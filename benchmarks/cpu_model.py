"""The whole of MiniLM in PyTorch on this CPU, dense and as experts, beside what Amdahl's law allows.

    python benchmarks/cpu_model.py           4 of 16 experts, two minutes

`bound` is the dense model's time over the same time less what its FFNs save, each timed alone, router included. All of
it takes turns, round after round, and a round gives one figure of each. Of the speedup of the model, `reached` is the
share of that bound.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
import typer
from torch import nn

from sparsify import SparsifyConfig, inspect, sparsify
from sparsify.bench import describe_machine, read_machine
from sparsify.models.load import load
from sparsify.passes.layer_times import layer_calls

Call = Callable[[torch.Tensor], object]

SIZES = ((8, 64), (32, 128))  # texts, tokens of each
CONFIG = SparsifyConfig(num_experts=16, top_k=4, select="all", distill_steps=0)


class Round(NamedTuple):
    """Milliseconds: both models, and their FFNs alone, one after the other."""

    dense: float
    sparse: float
    dense_ffns: float
    sparse_ffns: float

    @property
    def bound(self) -> float:
        """The speedup that is left of that of the FFNs."""
        return self.dense / (self.dense - self.dense_ffns + self.sparse_ffns)


def _milliseconds(calls: Sequence[Call], x: torch.Tensor) -> float:
    start = time.perf_counter()
    for call in calls:
        call(x)
    return 1e3 * (time.perf_counter() - start)


def _run(model: nn.Module, inputs: dict[str, torch.Tensor], _: torch.Tensor) -> None:
    model(**inputs)


@torch.no_grad()
def main(rounds: Annotated[int, typer.Option(help="turns of all that is timed")] = 15) -> None:
    """Convert without training, time, and print a table."""
    loaded = load("minilm")
    batches = None if loaded.calibration is None else loaded.calibration()
    sparse = sparsify(loaded.model, loaded.args, loaded.kwargs, calibration=batches, config=CONFIG)
    matches = inspect(loaded.model, loaded.args, loaded.kwargs).ffns
    calls = [layer_calls(match, CONFIG) for match in matches]
    dense_ffns, sparse_ffns = [dense for dense, _ in calls], [experts for _, experts in calls]
    print(f"{describe_machine(read_machine(with_onnxruntime=False))}\n")
    print("| tokens | dense ms | sparse ms | speedup | FFNs alone, ms | bound | reached |")
    print("|---" * 7 + "|")
    for batch, length in SIZES:
        ids = torch.randint(1000, 20000, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        x = torch.randn(batch * length, matches[0].hidden_size)
        models = (functools.partial(_run, model, inputs) for model in (loaded.model, sparse))
        timed: list[Sequence[Call]] = [*([model] for model in models), dense_ffns, sparse_ffns]
        found = [Round(*(_milliseconds(calls, x) for calls in timed)) for _ in range(rounds + 1)][1:]
        median = Round(*map(statistics.median, zip(*found, strict=True)))
        bound = statistics.median(each.bound for each in found)
        speedup = statistics.median(each.dense / each.sparse for each in found)
        cells = [f"{batch}x{length}", f"{median.dense:.1f}", f"{median.sparse:.1f}", f"{speedup:.2f}",
                 f"{median.dense_ffns:.1f} -> {median.sparse_ffns:.1f}", f"{bound:.2f}",
                 f"{speedup / bound:.0%}"]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
