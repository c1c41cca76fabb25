"""What calibration and the refit are worth on a real model: the task metric of several conversions of the same size.

    python benchmarks/quality.py minilm --experts 16 --top-k 4

Prints a Markdown table with the name of the machine.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from sparsify import sparsify
from sparsify.bench import describe_machine, read_machine
from sparsify.models.load import load

# What differs from a conversion with all defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "calibrated, no shared expert": {"num_shared_experts": 0},
    "calibrated, no refit": {"refit": False},
    "weights only": {"calibration": None},
}


def main(
    model: Annotated[str, typer.Argument(help="As `sparsify convert` takes it; it must have a metric.")],
    experts: int = 16,
    top_k: int = 4,
) -> None:
    """Convert in every way and measure."""
    dense = load(model)
    if dense.metric is None or dense.calibration is None:
        raise typer.BadParameter(f"{model} has no metric or no calibration data of its own")
    print(f"{model}: E={experts} K={top_k}, {dense.data}\n{describe_machine(read_machine(with_onnxruntime=False))}\n")
    print(f"| conversion | {dense.metric.name} | output error | seconds |\n| --- | --- | --- | --- |")
    print(f"| dense | {dense.metric.evaluate(dense.model):.4f} | 0 | |", flush=True)
    for name, options in VARIANTS.items():
        start = time.perf_counter()
        given: dict[str, Any] = {"calibration": dense.calibration(), "num_experts": experts, "top_k": top_k, **options}
        sparse = sparsify(dense.model, dense.args, dense.kwargs, **given)
        seconds = time.perf_counter() - start
        score, error = dense.metric.evaluate(sparse), sparse.report.output_error
        print(f"| {name} | {score:.4f} | {error:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
