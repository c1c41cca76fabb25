"""What a user gets from `export_onnx`, and what is left when it fails."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.errors import ExportError, OutputError, VerificationError
from sparsify.passes import export_onnx as stage
from sparsify.passes.export_onnx import export_onnx
from sparsify.passes.lower_onnx import write_files
from sparsify.passes.lower_onnx.lowerings import Lowering, Target
from sparsify.passes.verify_onnx import verify_onnx
from sparsify.sparse_model import SparseModel

Make = Callable[..., SparseModel]


def _domains(path: Path) -> set[str]:
    return {opset.domain for opset in onnx.load(str(path), load_external_data=False).opset_import}


def _axes(values: Any) -> dict[str, list[str | int]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.mark.parametrize(
    ("options", "target", "lowering"),
    [
        ({"activation": F.silu, "gated": True, "bias": False, "top_k": 1}, "ort-cpu", "moe_op"),
        ({"activation": F.gelu, "shared": 8, "top_k": 4}, "portable", "dense_masked"),
        ({"activation": F.gelu}, "portable", "expert_chain"),
    ],
)
def test_writes_a_file_that_equals_the_model(
    sparse_transformer: Make, tmp_path: Path, options: dict, target: Target, lowering: Lowering
) -> None:
    """The promise of the file: right at other shapes, small, readable, and of the allowed domains only."""
    sparse = sparse_transformer(**options)
    before = str(sparse.graph)
    path = tmp_path / "new" / "model.onnx"
    report = export_onnx(sparse, path, target=target, lowering="auto" if lowering == "dense_masked" else lowering)

    assert [layer.name for layer in report.layers] == ["layers.0", "layers.1"]
    assert {layer.lowering for layer in report.layers} == {lowering}
    assert report.parity is not None
    assert len(report.parity.shapes) == 4
    assert report.parity.max_relative_error <= 1e-5
    assert report.parity.expert_id_mismatches == 0
    assert report.load_seconds == report.parity.load_seconds > 0

    assert os.listdir(path.parent) == ["model.onnx"]
    assert report.file_bytes == path.stat().st_size
    bytes_of_parameters = sum(p.numel() * p.element_size() for p in sparse.parameters())
    assert report.file_bytes <= 1.05 * bytes_of_parameters + 20_000  # the nodes of a model this small weigh something
    assert _domains(path) == ({"", "com.microsoft"} if lowering == "moe_op" else {""})

    onnx.checker.check_model(str(path), full_check="com.microsoft" not in _domains(path))  # with shape inference
    model = onnx.load(str(path))
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))
    for part in ("router/TopK", "experts/", "combine/") if lowering == "sorted_split" else ("router/TopK", "experts"):
        assert any(name.startswith(f"/layers.1/{part}") for name in names)
    assert "/layers.0/norm/LayerNormalization" in names
    assert _axes(model.graph.input) == {key: ["batch", "sequence"] for key in ("input_ids", "attention_mask")}
    assert _axes(model.graph.output) == {
        "last_hidden_state": ["batch", "sequence", 16],
        "logits": ["batch", "sequence", 3000],
    }
    assert os.path.dirname(torch.__file__).encode() not in path.read_bytes()  # no stack traces with local paths
    assert str(sparse.graph) == before
    assert json.loads(json.dumps(report.to_json()))["layers"][1]["lowering"] == lowering
    assert f"layers.1: {lowering} (" in str(report)


def test_measures_when_asked(sparse_transformer: Make, tmp_path: Path) -> None:
    """Protects: the winner of the measurement is written, and every time is in the report, printed and as JSON."""
    report = export_onnx(sparse_transformer(), tmp_path / "model.onnx", target_tokens=(3, 17), measure=True)
    for layer in report.layers:
        measured = {time.lowering: time for time in layer.times if time.measured}
        assert set(measured) == {"expert_chain", "sorted_split", "dense_masked", "moe_op"}
        assert layer.lowering == min(measured.values(), key=lambda time: time.score).lowering
    assert "at 3, 17 tokens, as measured" in str(report)
    assert str(report).count("ms measured") == 8
    assert len(json.loads(json.dumps(report.to_json()))["layers"][0]["times"][0]["measured"]) == 2


@pytest.mark.parametrize("opset", [18, 25])
def test_opset_and_names(sparse_layer: Make, tmp_path: Path, opset: int) -> None:
    """Protects: the oldest and newest opset run, with names of the user's choice in both files and at a later check."""
    sparse, path = sparse_layer(), tmp_path / "model.onnx"
    names: Any = {"input_names": ["tokens"], "output_names": ["hidden"]}
    report = export_onnx(sparse, path, opset=opset, dense=_Dense(), **names)
    for file in (path, report.dense_path):
        model = onnx.load(str(file))
        assert list(_axes(model.graph.input)) == ["tokens"]
        assert list(_axes(model.graph.output)) == ["hidden"]
        assert next(entry.version for entry in model.opset_import if entry.domain == "") == opset
    assert verify_onnx(sparse, path).max_relative_error <= 1e-5


def test_handles_a_router_of_its_own(sparse_layer: Make, skipping_router: Any, tmp_path: Path) -> None:
    """Unused slots, weights other than one, per-neuron vectors and N != D all pass through the sorted split."""
    sparse = sparse_layer(router=skipping_router(), out=11, vector=True, size=7)
    report = export_onnx(sparse, tmp_path / "model.onnx", target="ort-cuda")
    assert "also reads values of its own" in report.layers[0].reason
    assert report.parity is not None
    assert report.parity.max_relative_error <= 1e-5


def test_half_precision(sparse_transformer: Make, tmp_path: Path) -> None:
    """fp16 is exported and held to its own bound; bf16, which onnxruntime cannot run on the CPU, leaves no file."""
    report = export_onnx(sparse_transformer(dtype=torch.float16), tmp_path / "half.onnx")
    assert report.parity is not None
    assert 1e-6 < report.parity.max_relative_error <= 1e-2
    with pytest.raises(ExportError, match=r"cannot load the exported model.*bfloat16"):
        export_onnx(sparse_transformer(dtype=torch.bfloat16), tmp_path / "brain.onnx")
    assert os.listdir(tmp_path) == ["half.onnx"]


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def test_writes_the_dense_model_beside_it(sparse_layer: Make, tmp_path: Path) -> None:
    """The two files take the same inputs, so they can be timed against each other."""
    report = export_onnx(sparse_layer(), tmp_path / "model.onnx", dense=_Dense())
    assert report.dense_path == tmp_path / "model.dense.onnx"
    sparse, dense = (onnx.load(str(path)) for path in (report.path, report.dense_path))
    assert _axes(sparse.graph.input) == _axes(dense.graph.input)
    assert _axes(dense.graph.output) == {"output": ["batch", "sequence", 16]}
    assert {node.op_type for node in dense.graph.node} >= {"Gelu"}
    assert report.file_bytes == report.path.stat().st_size


def test_refuses_moe_op_where_it_is_wrong(sparse_transformer: Make, tmp_path: Path) -> None:
    """The user who insists learns the layer and the reason, and gets no inexact file."""
    with pytest.raises(ExportError, match=r'layers\.0 cannot be lowered as "moe_op": its GELU'):
        export_onnx(sparse_transformer(activation=F.gelu), tmp_path / "model.onnx", lowering="moe_op")
    assert os.listdir(tmp_path) == []


def test_keeps_no_file_that_is_wrong(sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowering with a defect is caught by the comparison; the file that was there stays."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    lower = stage.lower_placeholders

    def lower_wrongly(model: onnx_ir.Model) -> None:
        lower(model)
        first = next(node for node in model.graph if node.op_type == "Gemm" and "experts" in str(node.inputs[1]))
        first.attributes["alpha"] = onnx_ir.AttrFloat32("alpha", 1.01)

    monkeypatch.setattr(stage, "lower_placeholders", lower_wrongly)
    with pytest.raises(VerificationError, match="output output differs by"):
        export_onnx(sparse_layer(), path, lowering="sorted_split")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("interrupted", ["trace_onnx", "verify_written"])
def test_an_interrupt_leaves_the_old_file(
    sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """Ctrl-C in the middle of an export must cost nothing."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(sparse_layer(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.onnx"]


def _never(*args: object) -> None:
    raise AssertionError("the work began before the folder was tested")


def test_tests_the_folder_first(sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of work must not end in a folder that cannot be written."""
    monkeypatch.setattr(stage, "trace_onnx", _never)
    sparse = sparse_layer()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*model.onnx: .*Choose a folder"):
        export_onnx(sparse, tmp_path / "file" / "model.onnx")
    with pytest.raises(OutputError, match="it is a folder"):
        export_onnx(sparse, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual way not to be allowed to write."""
    monkeypatch.setattr(stage, "trace_onnx", _never)
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        export_onnx(sparse_layer(), tmp_path / "model.onnx")


def test_a_full_disk(sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half-written file goes, the cause is named."""

    def full(model: onnx_ir.Model, path: Path, external_data: str | None) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stage.ir, "save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_onnx(sparse_layer(), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as above for those who run tests as root."""

    def refuse(**options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(stage, "trace_onnx", _never)
    monkeypatch.setattr(write_files.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(OutputError, match=r"Permission denied\. Choose a folder"):
        export_onnx(sparse_layer(), tmp_path / "model.onnx")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file sizes")
@pytest.mark.parametrize("largest", [1000, 2**31])
def test_a_disk_that_ends_in_a_file(
    sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    """Protects: writes that really fail half-way, inside the file and outside, keep the old file and leave nothing."""
    import resource

    sparse, path = sparse_layer(hidden=64, size=64), tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(write_files, "_LARGEST_FILE", largest)
    save, before = stage.ir.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args: Any, **options: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            save(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(stage.ir, "save", limited)
    with pytest.raises(OutputError, match=r"cannot write .*model.onnx: File too large"):
        export_onnx(sparse, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_an_interrupt_between_two_files(sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: new data never stays with an old model; the old pair goes on working."""
    monkeypatch.setattr(write_files, "_LARGEST_FILE", 1000)
    path, old = tmp_path / "model.onnx", sparse_layer(hidden=32)
    export_onnx(old, path)
    replace = os.replace

    def interrupt(source: Path, place: Path) -> None:
        if place == path and source.parent.name != "kept":
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr(write_files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(sparse_layer(hidden=32), path)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert verify_onnx(old, path).max_relative_error <= 1e-5


def test_large_weights_go_outside(sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model file ends at 2 GB; the data file must be found from where both end up, and while it is checked."""
    monkeypatch.setattr(write_files, "_LARGEST_FILE", 1000)
    path = tmp_path / "model.onnx"
    sparse = sparse_layer(hidden=32)
    report = export_onnx(sparse, path)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert report.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert verify_onnx(sparse, path).max_relative_error <= 1e-5


@pytest.mark.parametrize("tampering", ["escape", "absolute", "missing", "truncated"])
def test_refuses_external_data_that_was_tampered_with(
    sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tampering: str
) -> None:
    """Protects: a file from elsewhere must not read outside its folder; one without weights gives no receipt."""
    monkeypatch.setattr(write_files, "_LARGEST_FILE", 1000)
    folder = tmp_path / "model"
    sparse = sparse_layer(hidden=32)
    report = export_onnx(sparse, folder / "model.onnx", lowering="expert_chain")
    data = folder / "model.onnx.data"
    if tampering in ("escape", "absolute"):
        data.rename(tmp_path / "secret")
        place = "../secret" if tampering == "escape" else str(tmp_path / "secret")
        model = onnx.load(str(report.path), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = place if entry.key == "location" else entry.value
        report.path.write_bytes(model.SerializeToString())
    elif tampering == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ExportError, match=r"onnxruntime .* cannot load"):
        verify_onnx(sparse, report.path)


def test_works_without_onnxruntime(sparse_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing needs no runtime; checking says at once what to install."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        export_onnx(sparse_layer(), tmp_path / "model.onnx")
    report = export_onnx(sparse_layer(), tmp_path / "model.onnx", verify=False)
    assert report.parity is None
    assert report.load_seconds is None
    assert "not checked in onnxruntime" in str(report)
    onnx.checker.check_model(str(report.path))


@pytest.mark.parametrize("option", [{"target": "tpu"}, {"lowering": "loop"}])
def test_refuses_unknown_options(sparse_layer: Make, tmp_path: Path, option: dict) -> None:
    """A typo must not fall back to a default."""
    with pytest.raises(ValueError, match="must be one of"):
        export_onnx(sparse_layer(), tmp_path / "model.onnx", **option)
