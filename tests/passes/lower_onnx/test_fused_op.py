"""Files with one op of ours a layer: chosen by leave alone, exact, and refused where they could not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from sparsify import onnx_ops_library, verify_onnx
from sparsify.cpu.kernel import kernel_status
from sparsify.errors import ExportError
from sparsify.passes import export_onnx as export_file
from sparsify.passes.export_onnx import export_onnx

pytestmark = pytest.mark.skipif(not kernel_status().available, reason=kernel_status().reason)


def _ops(path: Path) -> list[str]:
    return [f"{node.domain}::{node.op_type}" for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": True},
        {"bias": False, "shared": 8},
        {"bias": False, "shared": 8, "out": 67},
        {"out": 20},
        {"size": 24, "gated": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", [F.relu, F.silu, F.gelu], ids=lambda f: f.__name__)
def test_agrees_with_the_model(sparse_layer: Any, tmp_path: Path, activation: Any, options: dict[str, Any]) -> None:
    """Protects: exact activations, gate, biases, shared experts and another width, at sizes that were not traced."""
    path = tmp_path / "m.onnx"
    report = export_onnx(sparse_layer(activation=activation, **options), path, lowering="fused_op")
    assert report.parity is not None
    assert report.parity.max_relative_error < 1e-5
    graph = onnx.load(path).graph
    [op] = [node for node in graph.node if node.op_type == "MoE"]
    assert op.domain == "ai.sparsify"
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    lies = 4 if "size" in options else 3  # in blocks; projections of eight neurons in rows
    assert [ranks[op.input[place]] for place in (3, 7)] == [lies, 4]
    added = [*op.input, "", ""][9:11]  # empty names at the end may be left out
    assert [bool(name) for name in added] == [True, "shared" in options]  # the bias and the shared expert


def test_weights_and_unused_slots(sparse_layer: Any, skipping_router: Any, tmp_path: Path) -> None:
    """Protects: routing weights of any size and slots of id -1."""
    sparse = sparse_layer(router=skipping_router())
    parity = export_onnx(sparse, tmp_path / "m.onnx", lowering="fused_op").parity
    assert parity is not None
    assert parity.max_relative_error < 1e-5


def test_a_whole_model_runs_in_a_plain_session(sparse_transformer: Any, tmp_path: Path) -> None:
    """Protects: what the README tells a user to do, and the check of a file later."""
    sparse, path = sparse_transformer(hidden=64, size=64, activation=F.gelu), tmp_path / "m.onnx"
    report = export_onnx(sparse, path, allow=["fused_op"], target_tokens=64)
    assert [layer.lowering for layer in report.layers] == ["fused_op"] * 2
    assert "sessions need onnx_ops_library()" in report.layers[0].reason
    assert report.deviation is None
    verify_onnx(sparse, path)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnx_ops_library())
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = torch.randint(0, 50, (3, 7))
    mask = torch.ones(3, 7)
    found = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), sparse(ids, mask)["logits"], rtol=1e-4, atol=1e-4)


def test_is_timed_beside_the_others(sparse_layer: Any, tmp_path: Path) -> None:
    """Protects: `measure=True` registers the library for the candidate that needs it."""
    [layer] = export_onnx(sparse_layer(), tmp_path / "m.onnx", allow=["fused_op"], measure=True).layers
    [time] = [time for time in layer.times if time.lowering == "fused_op"]
    assert time.measured is not None
    assert all(seconds > 0 for seconds in time.measured)


def test_only_by_leave(sparse_layer: Any, tmp_path: Path) -> None:
    """Protects: nobody gets a file that a plain session cannot load without having asked for it."""
    sparse = sparse_layer(hidden=64, size=64, activation=F.gelu)
    assert export_onnx(sparse, tmp_path / "m.onnx", allow=["fused_op"]).layers[0].lowering == "fused_op"
    export_onnx(sparse, tmp_path / "m.onnx")
    assert not any(op.startswith("ai.sparsify") for op in _ops(tmp_path / "m.onnx"))
    assert "ai.sparsify" not in [entry.domain for entry in onnx.load(tmp_path / "m.onnx").opset_import]


@pytest.mark.parametrize(
    ("options", "target", "reason"),
    [
        ({}, "portable", "in onnxruntime on the CPU alone"),
        ({"activation": F.elu}, "ort-cpu", "no kernel for the activation"),
        ({"vector": True}, "ort-cpu", "cannot be lowered"),
    ],
)
def test_refuses_what_it_cannot_run(
    sparse_layer: Any, tmp_path: Path, options: dict[str, Any], target: Any, reason: str
) -> None:
    """Protects: the reason instead of a file that does not load; by `auto` another lowering is taken."""
    sparse, path = sparse_layer(**options), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=reason):
        export_onnx(sparse, path, target=target, lowering="fused_op")
    assert not path.exists()
    export_onnx(sparse, path, target=target, allow=["fused_op"])
    assert not any(op.startswith("ai.sparsify") for op in _ops(path))


def test_half_precision_is_refused(sparse_transformer: Any, tmp_path: Path) -> None:
    """Protects: the kernel is for fp32."""
    with pytest.raises(ExportError, match="no kernel for float16"):
        export_onnx(sparse_transformer(torch.float16), tmp_path / "m.onnx", lowering="fused_op")


def test_says_before_any_work_that_there_is_no_library(
    sparse_layer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a missing compiler is known before the export; unchecked, the file is written all the same."""

    def missing() -> str:
        raise ExportError("no C compiler")

    monkeypatch.setattr(export_file, "onnx_ops_library", missing)
    with pytest.raises(ExportError, match="no C compiler"):
        export_onnx(sparse_layer(), tmp_path / "m.onnx", allow=["fused_op"])
    export_onnx(sparse_layer(), tmp_path / "m.onnx", lowering="fused_op", verify=False)
    assert "ai.sparsify::MoE" in _ops(tmp_path / "m.onnx")
