"""One architecture: is what it holds found, converted exactly, and exported? `coverage.py` runs this, once for each.

python benchmarks/coverage_check.py bert row.json
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECEIPT_BOUND = 1e-5
OUTPUT_BOUND = 1e-4


@dataclass(frozen=True)
class Expectation:
    """What an architecture holds, by its configuration.

    Attributes:
        ffns: weight banks of the FFNs of its blocks.
        other: other legal subgraphs of that shape, such as heads and squeeze-excitation.
        refused: near misses that must not be converted.
        why: how the numbers follow.
    """

    ffns: int
    other: int
    refused: int
    why: str


@dataclass
class Row:
    """What was found in an architecture.

    Attributes:
        name: of the architecture.
        expected: legal FFNs, those outside of blocks included.
        must_refuse: near misses.
        matched: FFNs that `inspect` finds.
        refused: near misses that it refuses.
        converted: FFNs that became experts.
        receipt: the largest of the conversion.
        output_error: of all outputs with every expert on, relative to the dense model.
        onnx_error: as `export_onnx` reports it.
        seconds: wall-clock time.
        failures: reasons, by column.
        rejections: what was refused, and why.
        trace: the end of the traceback, where a step raised.
    """

    name: str
    expected: int
    must_refuse: int
    matched: int | None = None
    refused: int | None = None
    converted: int | None = None
    receipt: float | None = None
    output_error: float | None = None
    onnx_error: float | None = None
    seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict[str, str])
    rejections: list[str] = field(default_factory=list[str])
    trace: list[str] = field(default_factory=list[str])

    @property
    def passes(self) -> bool:
        """In every column."""
        return not self.failures

    @classmethod
    def empty(cls, name: str, expected: Expectation) -> Row:
        """Before anything was done."""
        return cls(name, expected.ffns + expected.other, expected.refused)


def read_expectations() -> dict[str, Expectation]:
    """`coverage_expected.json`."""
    document = json.loads((HERE / "coverage_expected.json").read_text(encoding="utf-8"))
    return {name: Expectation(**entry) for name, entry in document.items()}


def write(path: Path, text: str) -> None:
    """Under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check(name: str) -> Row:
    """Build, inspect, convert, convert exactly, export; what raises ends it."""
    row = Row.empty(name, read_expectations()[name])
    start = time.perf_counter()
    state: dict[str, Any] = {}
    steps: dict[str, Callable[[Row, dict[str, Any]], None]] = {
        "matched": _inspect,
        "converted": _convert,
        "all experts": _compare,
        "onnx": _export,
    }
    for column, step in steps.items():
        try:
            step(row, state)
        except Exception as error:
            row.failures[column] = f"{type(error).__name__}: {error}"
            row.trace = [line.strip() for line in traceback.format_exc().splitlines()[-24:]]
            break
        if not row.matched:
            break
    row.seconds = time.perf_counter() - start
    return row


def _inspect(row: Row, state: dict[str, Any]) -> None:
    from coverage_models import build

    from sparsify import inspect

    model, args, kwargs = build(row.name)
    state["model"], state["given"] = model, (args, kwargs)
    found = inspect(model, args, kwargs)
    row.matched, row.refused = len(found.ffns), len(found.rejected)
    row.rejections = [str(rejection) for rejection in found.rejected]
    if row.matched != row.expected:
        names = ", ".join(ffn.name for ffn in found.ffns)
        row.failures["matched"] = f"{row.matched} FFNs matched, {row.expected} expected; matched: {names or 'none'}"
    if row.refused < row.must_refuse:
        row.failures["refused"] = f"{row.refused} near misses refused, {row.must_refuse} expected"
    if not row.matched:
        row.converted = _convert_nothing(model, args, kwargs)


def _convert_nothing(model: Any, args: Any, kwargs: Any) -> int:
    """0, if the conversion says that there is no FFN."""
    from sparsify import sparsify
    from sparsify.errors import NoFFNError

    try:
        return len(sparsify(model, args, kwargs, select="all", num_experts=4, top_k=2).report.converted)
    except NoFFNError:
        return 0


def _convert(row: Row, state: dict[str, Any]) -> None:
    from sparsify import sparsify

    sparse = sparsify(state["model"], *state["given"], select="all", num_experts=4, top_k=2)
    state["sparse"] = sparse
    row.converted, row.receipt = len(sparse.report.converted), sparse.report.max_receipt
    if row.converted != row.matched:
        row.failures["converted"] = f"{row.converted} of {row.matched} FFNs converted"
    if not row.receipt <= RECEIPT_BOUND:
        row.failures["receipt"] = f"{row.receipt:.1e} is above {RECEIPT_BOUND:.0e}"


def _compare(row: Row, state: dict[str, Any]) -> None:
    """Every expert on: the outputs are those of the dense model."""
    import torch
    from torch.utils import _pytree as pytree

    from sparsify import sparsify
    from sparsify.passes.capture import same_random_numbers

    model, (args, kwargs) = state["model"], state["given"]
    exact = sparsify(model, args, kwargs, select="all", num_experts=4, top_k=4)
    with torch.no_grad():
        with same_random_numbers():
            expected = pytree.tree_leaves(model(*args, **kwargs))
        with same_random_numbers():
            pairs = zip(expected, pytree.tree_leaves(exact(*args, **kwargs)), strict=True)
        row.output_error = max(_difference(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
    if not row.output_error <= OUTPUT_BOUND:
        row.failures["all experts"] = f"outputs differ by {row.output_error:.1e}, above {OUTPUT_BOUND:.0e}"


def _difference(expected: Any, found: Any) -> float:
    """The largest difference relative to the largest value; infinite where other elements are finite."""
    expected, found = expected.double(), found.double()
    finite = expected.isfinite()
    if not bool((finite == found.isfinite()).all()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(expected[finite].abs().max()) or 1.0
    return float((expected - found)[finite].abs().max()) / scale


def _export(row: Row, state: dict[str, Any]) -> None:
    from sparsify import export_onnx

    with tempfile.TemporaryDirectory(prefix="sparsify-coverage-") as folder:
        parity = export_onnx(state["sparse"], Path(folder) / "m.onnx").parity
    row.onnx_error = parity.max_relative_error if parity else None


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    write(Path(sys.argv[2]), json.dumps(asdict(check(sys.argv[1]))))
