"""The receipt of an ONNX file must be impossible to get for a file that computes something else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparsify import sparsify
from sparsify.errors import ExportError, LoadError, VerificationError
from sparsify.passes.export_onnx import export_onnx
from sparsify.passes.verify_onnx import verify_onnx
from sparsify.sparse_model import SparseModel


@pytest.fixture(scope="module")
def written(
    sparse_transformer: Callable[..., SparseModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SparseModel, Path]:
    """A small model and its file, which was not checked yet; made once."""
    torch.manual_seed(0)
    sparse = sparse_transformer(vocabulary=100)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(sparse, path, lowering="sorted_split", verify=False)
    return sparse, path


@pytest.fixture
def exported(written: tuple[SparseModel, Path], tmp_path: Path) -> tuple[SparseModel, Path]:
    """Copies, to be spoilt."""
    sparse, path = written
    return copy.deepcopy(sparse), Path(shutil.copy(path, tmp_path))


def _negate(path: Path, initializer: str) -> None:
    model = onnx.load(str(path))
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == initializer]
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), initializer))
    onnx.save(model, str(path))


def test_tells_a_right_file_from_wrong_ones(
    exported: tuple[SparseModel, Path], sparse_layer: Callable[..., SparseModel]
) -> None:
    """One export, then: the right file passes; each kind of wrong file is refused for its own reason."""
    sparse, path = exported
    parity = verify_onnx(sparse, path)
    assert len(parity.shapes) == 4
    assert parity.max_relative_error <= 1e-5
    assert parity.expert_id_mismatches == 0
    tokens = sum(shape["batch"] * shape["sequence"] for shape in parity.shapes)
    assert parity.tokens_checked == 2 * tokens
    assert json.loads(json.dumps(parity.to_json()))["tokens_checked"] == 2 * tokens
    assert f"expert ids equal in {2 * tokens} decisions" in str(parity)

    with pytest.raises(VerificationError, match="was not exported from"):
        verify_onnx(sparse_layer(), path)

    _negate(path, "layers.1.experts.down_proj.2")
    with pytest.raises(VerificationError, match=r"differs by .* between onnxruntime and PyTorch at"):
        verify_onnx(sparse, path)

    _negate(path, "layers.1.router.output.weight")
    with pytest.raises(VerificationError, match=r"layers.1: \d+ of \d+ tokens go to other experts"):
        verify_onnx(sparse, path)

    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(LoadError, match="is damaged"):
        verify_onnx(sparse, path)


def test_a_near_tie_is_no_error(exported: tuple[SparseModel, Path]) -> None:
    """Where all experts score alike the runtimes may choose differently; then there is nothing to compare."""
    sparse, path = exported
    for name in ("layers.0", "layers.1"):
        bias = sparse.get_parameter(f"{name}.router.output.bias")
        with torch.no_grad():
            sparse.get_parameter(f"{name}.router.output.weight").zero_()
            bias.fill_(1.0)
            bias[0] += 1e-6
    with pytest.raises(VerificationError, match="some experts score alike"):
        verify_onnx(sparse, path)


class Noisy(nn.Module):
    """Draws noise in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 6))

    def forward(self, x: Tensor, normal: Tensor) -> Tensor:
        return self.ffn(x + torch.rand_like(x) + normal)


class Named(Noisy):
    """Has an input with the name of a draw."""

    def forward(self, x: Tensor, normal: Tensor) -> Tensor:
        return self.ffn(x + normal)


def test_a_random_model_cannot_be_compared(tmp_path: Path) -> None:
    """Protects: the message names the draw, before any work; without the comparison the file is written."""
    noisy, plain = (
        sparsify(model.eval(), (torch.randn(3, 6),) * 2, num_experts=4, top_k=2, select="all", router_hidden_size=4)
        for model in (Noisy(), Named())
    )
    assert export_onnx(plain, tmp_path / "named.onnx").parity is not None
    with pytest.raises(ExportError, match="draws random numbers"):
        export_onnx(noisy, tmp_path / "m.onnx")
    export_onnx(noisy, tmp_path / "m.onnx", verify=False)
    assert (tmp_path / "m.onnx").exists()
