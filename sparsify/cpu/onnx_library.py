"""The compiled kernel as a library of ops for onnxruntime: what a file with `ai.sparsify::MoE` needs."""

from __future__ import annotations

import atexit
import contextlib
import functools

from sparsify.cpu.build import BuildError, library
from sparsify.cpu.kernel import kernel_status
from sparsify.errors import ExportError


def onnx_ops_library() -> str:
    """Compile the ops that `export_onnx(..., allow=["fused_op"])` writes, for the processor of this machine.

    A session registers it before it loads such a file:

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(sparsify.onnx_ops_library())
        session = onnxruntime.InferenceSession("model.onnx", options)

    It is compiled once and kept in the cache folder (`$XDG_CACHE_HOME/sparsify` or `~/.cache/sparsify`). It needs no
    Python when it runs, so it may be copied to machines with the same kind of processor.

    Returns:
        The path of the library.

    Raises:
        ExportError: there is no C compiler, or what it made is wrong.
    """
    status = kernel_status()
    if not status.available:
        raise ExportError(
            f"the library of ops cannot be made ({status.reason}); install a C compiler, such as gcc, or write the "
            "file without fused_op"
        )
    try:
        return _kept()
    except BuildError as failure:
        raise ExportError(f"the library of ops cannot be made ({failure})") from failure


@functools.cache
def _kept() -> str:
    """Its path, for as long as the process runs, also where it lies in a temporary folder."""
    stack = contextlib.ExitStack()
    path = stack.enter_context(library())
    atexit.register(stack.close)
    return str(path)
