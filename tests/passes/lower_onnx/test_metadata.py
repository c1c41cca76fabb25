"""What a file says about itself survives the file."""

from __future__ import annotations

import importlib.metadata
import json
from types import SimpleNamespace
from typing import cast

import onnx
import pytest
import torch

from sparsify.errors import LoadError
from sparsify.passes.find_layers import Layer, LayerFacts
from sparsify.passes.lower_onnx.metadata import FileLayer, conversions, metadata, read_layers, read_target
from sparsify.report import FFNReport, Report

FACTS = LayerFacts(4, 2, 8, 8, 4, torch.float32, "relu", False, True, None)


def _model(entries: dict[str, str]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    return model


def test_reads_back_what_was_written() -> None:
    """`verify_onnx` finds layers and target by them."""
    layers = [FileLayer("layers.0", "moe_op", "as asked", "ids"), FileLayer("layers.0", "sorted_split", "why", "ids_1")]
    model = _model(metadata("portable", layers, []))
    assert read_layers(model) == layers
    assert read_target(model) == "portable"


def test_keeps_how_the_model_was_converted() -> None:
    """Protects: receipts and versions travel with the file, and a model without its report says that they are lost."""
    layer = cast(Layer, SimpleNamespace(name="ffn", facts=FACTS))
    ffn = FFNReport("ffn", "plain", "relu", 8, 16, "converted", "pays", 4, 2, 1, receipt=1e-7)
    report = Report((ffn,), (), 0, 0, 0, 0.0, {})
    found = [conversions([layer], given)[0] for given in (report, None)]
    assert [(each.receipt, each.num_shared_experts) for each in found] == [(1e-7, 1), (None, None)]
    entries = metadata("portable", [], found)
    assert json.loads(entries["sparsify.conversion"])[0]["receipt"] == 1e-7
    assert json.loads(entries["sparsify.versions"])["torch"] == importlib.metadata.version("torch")


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
