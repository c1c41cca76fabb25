"""The border to onnxruntime."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch

from sparsify.errors import ExportError
from sparsify.passes.lower_onnx.runtime import open_session, require_runtime, run_session, runtime_version


def _model(op: str) -> bytes:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node(op, ["x"], ["y"])], "g", [x], [y])
    imports = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def test_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Onnxruntime is an extra, so people meet this message first."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert runtime_version() is None
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        require_runtime()


def test_runs_a_model() -> None:
    """Tensors in, tensors out, and the time to load."""
    session, seconds = open_session(_model("Neg"), Path(), cuda=False)
    (y,) = run_session(session, ["y"], {"x": torch.ones(3, 2)})
    assert torch.equal(y, -torch.ones(3, 2))
    assert seconds > 0
    assert not session.get_session_options().enable_mem_reuse  # or files of many experts would take seconds to load


def test_says_that_a_model_does_not_load() -> None:
    """The reason of onnxruntime is in the message."""
    with pytest.raises(ExportError, match=r"cannot load the exported model: .*NoSuchOp"):
        open_session(_model("NoSuchOp"), Path(), cuda=False)


def test_says_that_a_model_does_not_run() -> None:
    """A kernel may fail after a clean load; the shapes are in the message."""
    session, _ = open_session(_model("Neg"), Path(), cuda=False)
    with pytest.raises(ExportError, match=r"shapes \{'x': \(3, 5\)\}"):
        run_session(session, ["y"], {"x": torch.ones(3, 5)})
