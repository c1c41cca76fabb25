"""A file for the target portable in the runtimes that it names: OpenVINO, and the reference evaluator of ONNX.

T tokens, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from sparsify.passes.export_onnx import export_onnx
from sparsify.passes.lower_onnx.lowerings import Lowering
from sparsify.passes.lower_onnx.metadata import read_layers
from sparsify.sparse_model import SparseModel

Make = Callable[..., SparseModel]
Run = Callable[[Tensor], list[np.ndarray]]
LOWERINGS: tuple[Lowering, ...] = ("expert_chain", "sorted_split", "dense_masked")
SHAPES = ((0, 3), (1, 1), (2, 3), (5, 4))  # batch, sequence; (2, 3) was traced


def _reference(file: Path) -> Run:
    evaluator = ReferenceEvaluator(str(file))
    return lambda x: [np.asarray(value) for value in evaluator.run(None, {"x": x.numpy()})]  # pyright: ignore[reportGeneralTypeIssues]


def _openvino(file: Path) -> Run:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: list(model(x.numpy()).values())


def _with_ids(file: Path) -> Path:
    """The file with the expert ids as an output more."""
    model = onnx.load(str(file))
    (layer,) = read_layers(model)
    model.graph.output.append(onnx.helper.make_tensor_value_info(layer.expert_ids, onnx.TensorProto.INT64, None))
    onnx.save(model, str(file))
    return file


def _expected(sparse: SparseModel, x: Tensor) -> Sequence[Tensor]:
    routed: list[Tensor] = []
    router: Any = sparse.get_submodule("layers.0.router")
    handle = router.register_forward_hook(lambda module, args, output: routed.append(output[1]))
    try:
        with torch.no_grad():
            return sparse(x), routed[0]
    finally:
        handle.remove()


@pytest.fixture(scope="module", params=[(name, own) for name in LOWERINGS for own in (False, True)], ids=str)
def written(
    request: pytest.FixtureRequest,
    sparse_layer: Make,
    skipping_router: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[SparseModel, Path]:
    """A layer and its file, written once; half of the routers weigh experts by any number and leave slots unused."""
    lowering, own_router = request.param
    router = skipping_router() if own_router else None
    sparse = sparse_layer(activation=torch.nn.functional.gelu, router=router)
    path = tmp_path_factory.mktemp("portable") / "model.onnx"
    export_onnx(sparse, path, target="portable", lowering=lowering, verify=False)
    return sparse, _with_ids(path)


@pytest.mark.parametrize("open_file", [_reference, _openvino])
def test_equals_the_model(written: tuple[SparseModel, Path], open_file: Callable[[Path], Run]) -> None:
    """Protects: no token, one, and numbers that were not traced give the ids and outputs of PyTorch."""
    sparse, path = written
    run = open_file(path)
    for shape in SHAPES:
        x = torch.randn(*shape, 16)
        y, ids = _expected(sparse, x)
        found, found_ids = run(x)
        assert found_ids.tolist() == ids.tolist()
        assert found.shape == tuple(y.shape)
        assert not y.numel() or np.abs(found - y.numpy()).max() <= 1e-5 * y.abs().max()
