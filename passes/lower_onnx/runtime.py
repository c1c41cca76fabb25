"""onnxruntime, behind a few functions; the only file that imports it, and only when it is used."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.cpu.onnx_library import onnx_ops_library
from sparsify.errors import ExportError

Session = Any


def runtime_version() -> tuple[int, ...] | None:
    """The version of onnxruntime, None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:3])


def require_runtime() -> None:
    """Raise `ImportError` where onnxruntime is not installed."""
    if runtime_version() is None:
        raise ImportError(
            "checking an ONNX file needs onnxruntime, which is not installed; run: pip install onnxruntime "
            "(or onnxruntime-gpu), or export with verify=False"
        )


def open_session(
    model: Path | bytes, folder: Path, cuda: bool, spinning: bool = False, own_ops: bool = False
) -> tuple[Session, float]:
    """Load a model; delete the session before another is opened, as idle ones take processor time.

    Args:
        model: a file, or its bytes.
        folder: where external data lies.
        cuda: run on the GPU, in full fp32 precision.
        spinning: let idle threads wait busily, as by default in onnxruntime: faster, and what times are taken with.
        own_ops: the model holds ops of ours; their library is registered.

    Returns:
        The session, and the seconds that it took to load.

    Raises:
        ExportError: onnxruntime refused the model; the message holds its reason.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # The search for buffers compares each value with all that were freed: seconds for hundreds of experts.
    options.enable_mem_reuse = False
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if own_ops:
        options.register_custom_ops_library(onnx_ops_library())
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    gpu = [("CUDAExecutionProvider", {"use_tf32": "0"})] if cuda else []
    source = model if isinstance(model, bytes) else str(model)
    start = time.perf_counter()
    try:
        session = onnxruntime.InferenceSession(source, options, providers=[*gpu, "CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot load the exported model: {_first_line(error)}. If it names "
            "a type, this device has no kernel for the dtype of the model (bfloat16 on the CPU, for one): convert the "
            "model to float32 first, or export with verify=False and run the file elsewhere"
        ) from error
    return session, time.perf_counter() - start


def run_session(session: Session, names: Sequence[str], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Run a model.

    Args:
        session: from `open_session`.
        names: the values to return.
        inputs: by name.

    Returns:
        CPU tensors, in the order of `names`.

    Raises:
        ExportError: onnxruntime failed.
    """
    try:
        feeds = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
        outputs = session.run(list(names), feeds)
    except Exception as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        raise ExportError(
            f"onnxruntime cannot run the exported model on inputs of shapes {shapes}: {_first_line(error)}. PyTorch "
            'can; try lowering="sorted_split" or another opset'
        ) from error
    return [torch.from_numpy(output) for output in outputs]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
