"""Options of `sparsify convert` that do not go together."""

from __future__ import annotations

from pathlib import Path

from sparsify.config import SparsifyConfig
from sparsify.cpu.onnx_library import onnx_ops_library
from sparsify.routers import MLPRouter


def refuse_contradiction(
    no_calibration: bool, calibration: Path | None, budget: str | None, running: int | None
) -> None:
    """Raise `ValueError` for options of which one says what another one does."""
    if budget is not None and running is not None:
        raise ValueError("--budget chooses --top-k and --shared of every FFN; give one or the other")
    if budget is not None and no_calibration:
        raise ValueError("--budget goes by errors on calibration data, so leave out --no-calibration")
    if no_calibration and calibration is not None:
        raise ValueError("--no-calibration and --calibration FILE contradict each other; give one of them")


def refuse_distill(steps: int, no_calibration: bool, config: SparsifyConfig) -> None:
    """Raise `ValueError` where light training could not learn: before the conversion, which takes minutes."""
    if steps and no_calibration:
        raise ValueError("--distill trains on calibration data, so leave out --no-calibration")
    if steps and config.router_name != MLPRouter.system.name:
        raise ValueError(
            f"--distill teaches the router {MLPRouter.system.name}, whose experts all count 1, not "
            f"{config.router_name}; train that one in a loop of your own, or leave out --distill"
        )


def refuse_options_of_file(onnx: bool, target: str, *, routing_outputs: bool, fused_op: bool) -> None:
    """Raise `ValueError` for options of a file that is not written, or of another runtime; before the conversion."""
    if routing_outputs and not onnx:
        raise ValueError("--routing-outputs are outputs of the ONNX file, which --no-onnx leaves out; give one of them")
    if not fused_op:
        return
    if not onnx:
        raise ValueError("--fused-op is how the ONNX file is written, which --no-onnx leaves out; give one of them")
    if target != "ort-cpu":
        raise ValueError(f"--fused-op runs in onnxruntime on the CPU, so leave it out for --target {target}")
    onnx_ops_library()
