"""What a file says about itself survives the file."""

from __future__ import annotations

import onnx
import pytest

from sparsify.errors import LoadError
from sparsify.passes.lower_onnx.metadata import FileLayer, metadata, read_layers, read_target


def _model(entries: dict[str, str]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    return model


def test_reads_back_what_was_written() -> None:
    """`verify_onnx` finds layers and target by them."""
    layers = [FileLayer("layers.0", "moe_op", "as asked", "ids"), FileLayer("layers.0", "sorted_split", "why", "ids_1")]
    model = _model(metadata("portable", layers))
    assert read_layers(model) == layers
    assert read_target(model) == "portable"


def test_a_foreign_file_has_no_layers() -> None:
    """Any ONNX file may be given to `verify_onnx`."""
    assert read_layers(_model({})) == []
    assert read_target(_model({})) == ""


@pytest.mark.parametrize("entry", ['[{"name": "layers.0"}]', '[{"name": "a", "kind": "split"}]', "[1]", "no JSON"])
def test_a_file_of_another_version(entry: str) -> None:
    """Protects: other fields than ours say which version wrote them, and what to do."""
    model = _model({"sparsify.version": "0.0.1", "sparsify.layers": entry})
    with pytest.raises(LoadError, match=r"written by version 0\.0\.1 of sparsify.*export the model again"):
        read_layers(model)
