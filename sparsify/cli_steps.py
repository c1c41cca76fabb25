"""What the commands do between reading their options and printing results, each step under a progress bar."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from sparsify import conversion_folder as files
from sparsify.api import sparsify
from sparsify.bench import BenchReport, bench
from sparsify.config import SparsifyConfig
from sparsify.console import Stages, bad_input
from sparsify.distillation import distill
from sparsify.errors import CalibrationError
from sparsify.report import MetricReport, Report
from sparsify.sparse_model import SparseModel

if TYPE_CHECKING:
    from sparsify.models.dense_model import DenseModel
    from sparsify.passes.export_onnx import ExportReport
    from sparsify.passes.lower_onnx.lowerings import Target


def load_model(spec: str, calibration: Path | None, stages: Stages) -> DenseModel:
    """Loads the dense model; a bad `spec` ends the program with a message.

    Args:
        spec: as `sparsify.models.load` takes it.
        calibration: a text file, or None for the text that comes with the model.
        stages: shows the progress.
    """
    from sparsify.models.load import load

    with stages.running("load"), bad_input():
        return load(spec, calibration_text=calibration)


def convert_model(
    dense: DenseModel, config: SparsifyConfig, distill_steps: int, *, calibrates: bool, stages: Stages
) -> tuple[SparseModel, Report]:
    """Converts, trains for so many steps, and measures the metric of the model before and after where it has one."""
    if distill_steps and dense.calibration is None:
        raise CalibrationError(f"--distill trains on calibration data, and {dense.name} comes without any")
    batches = dense.calibration() if calibrates and dense.calibration is not None else None
    model = (dense.model, dense.args, dense.kwargs)  # the results are files, which need the whole graph
    sparse = sparsify(*model, config=config, calibration=batches, allow_parts=False, progress=stages)
    report = sparse.report
    if distill_steps and report.converted:
        report = _distilled(sparse, dense, distill_steps, stages)
    if dense.metric is None or not report.converted:
        return sparse, report
    stages("metric", 0, 2)
    before = dense.metric.evaluate(dense.model)
    stages("metric", 1, 2)
    after = dense.metric.evaluate(sparse)
    stages("metric", 2, 2)
    metric = MetricReport(dense.metric.name, dense.metric.higher_is_better, before, after)
    return sparse, dataclasses.replace(report, metric=metric)


def _distilled(sparse: SparseModel, dense: DenseModel, steps: int, stages: Stages) -> Report:
    """Trains `sparse` in place; its report then says so, as the errors in it are those of before."""
    assert dense.calibration is not None

    def progress(done: int, total: int, loss: float) -> None:
        stages("distill", done, total)

    done = distill(sparse, dense.model, dense.calibration(), steps=steps, loss=dense.loss, progress=progress)
    return dataclasses.replace(sparse.report, notes=(*sparse.report.notes, f"then trained as a whole: {done}"))


@dataclass(frozen=True)
class FileOptions:
    """Of the ONNX file: what runs it, with how many tokens a call (by default several numbers), and what is in it."""

    target: Target
    tokens: tuple[int, ...]
    routing_outputs: bool
    fused_op: bool


def export_model(
    sparse: SparseModel,
    dense: DenseModel,
    folder: Path,
    options: FileOptions,
    stages: Stages,
) -> ExportReport:
    """Writes both ONNX files, and checks the converted one."""
    from sparsify.passes.export_onnx import export_onnx
    from sparsify.passes.lower_onnx.choose_lowering import DEFAULT_TOKENS

    with stages.running("export"):
        return export_onnx(
            sparse,
            folder / files.ONNX,
            target=options.target,
            target_tokens=options.tokens or DEFAULT_TOKENS,
            allow=["fused_op"] if options.fused_op else [],
            routing_outputs=options.routing_outputs,
            dense=dense.model,
        )


def time_models(
    dense: nn.Module,
    sparse: SparseModel,
    onnx_folder: Path | None,
    target: str,
    stages: Stages,
    sizes: Sequence[Sequence[int]] = (),
) -> BenchReport:
    """Times both models, and their ONNX files where there are any; a bad size ends the program with a message."""
    has_onnx = onnx_folder is not None and (onnx_folder / files.DENSE_ONNX).exists()
    with bad_input():
        return bench(
            dense,
            sparse,
            sizes=sizes,
            dense_onnx=onnx_folder / files.DENSE_ONNX if onnx_folder and has_onnx else None,
            sparse_onnx=onnx_folder / files.ONNX if onnx_folder and has_onnx else None,
            provider="CUDAExecutionProvider" if target == "ort-cuda" else "CPUExecutionProvider",
            progress=stages,
        )


def write_reports(folder: Path, report: Report, export: ExportReport | None, timed: BenchReport | None) -> str | None:
    """Writes the report as JSON and as a web page.

    Returns:
        Why the page was left out; None if it was written.
    """
    files.write_json(folder / files.REPORT, report.to_json())
    from sparsify.report_html import write_html

    try:
        write_html(report, folder / files.PAGE, export, timed)
    except ImportError as error:
        return f"{files.PAGE} was left out: {error}"
    return None


def model_bytes(model: nn.Module) -> int:
    """What the parameters and buffers of a model take."""
    return sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
