"""The promises of a conversion: its receipts are read, its ONNX file is run and compared again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsify.conversion_folder import ONNX, Conversion, worst_receipt
from sparsify.errors import VerificationError
from sparsify.passes.verify import RECEIPT_BOUND
from sparsify.sparse_model import SparseModel


@dataclass(frozen=True)
class Promise:
    """What is promised, what was found, and whether that keeps it; `kept` is None where nothing could be checked."""

    promise: str
    found: str
    kept: bool | None


def check_split(folder: Path) -> Promise:
    """With all experts on, every split FFN is the dense one: the receipts that the conversion took.

    Raises:
        LoadError: the report is missing or damaged.
    """
    worst = worst_receipt(folder)
    found = f"worst receipt {worst:.1e}, bound {RECEIPT_BOUND:.0e}"
    return Promise("with all experts on, every split FFN equals the dense FFN", found, worst <= RECEIPT_BOUND)


def check_onnx(sparse: SparseModel, folder: Path, record: Conversion) -> Promise:
    """The ONNX file computes what the saved model does, at other sizes than the traced ones too.

    Raises:
        ExportError: onnxruntime cannot load or run the file.
        ImportError: onnxruntime is not installed.
    """
    promise = "model.onnx chooses the same experts as the saved model, and gives the same outputs"
    if ONNX not in record.files:
        return Promise(promise, "not checked: converted with --no-onnx", None)
    if not (folder / ONNX).is_file():
        return Promise(promise, f"{ONNX} is gone", False)
    from sparsify.passes.verify_onnx import verify_onnx

    try:
        return Promise(promise, str(verify_onnx(sparse, folder / ONNX)), True)
    except VerificationError as error:
        return Promise(promise, str(error), False)
