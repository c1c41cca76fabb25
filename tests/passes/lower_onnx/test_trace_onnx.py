"""torch.onnx.export, with its errors made short."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import ExportError
from sparsify.passes.capture import capture
from sparsify.passes.lower_onnx.flat_graph import flatten_graph
from sparsify.passes.lower_onnx.trace_onnx import trace_onnx
from sparsify.sparse_model import SparseModel, SparseModelInfo


@torch.library.custom_op("sparsify_test::foreign", mutates_args=())
def _foreign(x: Tensor) -> Tensor:
    return x.clone()


@_foreign.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.sparsify_test.foreign(x)


def test_names_an_op_that_onnx_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    """The exporter wraps the cause in pages; one line names the op, and nothing is printed."""
    x = torch.randn(2, 3)
    flat = flatten_graph(capture(_Foreign(), (x,)), (x,), {}, {})
    with pytest.raises(ExportError, match=r"torch.onnx.export failed: .*sparsify_test\.foreign") as caught:
        trace_onnx(flat, 20)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.head = nn.Embedding(90, 64), nn.Linear(64, 64), nn.Linear(64, 90, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.linear(self.linear(self.embed(ids))))


def test_stores_a_shared_weight_once() -> None:
    """A weight read at many places, or also as an embedding, must not be stored again in transposed form."""
    model, ids = _Shared(), torch.zeros(2, 3, dtype=torch.int64)
    traced = trace_onnx(flatten_graph(capture(model, (ids,)), (ids,), {}, {}), 20)
    stored = sum(value.const_value.nbytes for value in traced.graph.initializers.values() if value.const_value)
    assert stored <= sum(p.numel() * p.element_size() for p in model.parameters()) + 100


@pytest.mark.parametrize(("opset", "reason"), [(5, "ask for opset 20"), (99, "may know no opset as new as 99")])
def test_refuses_an_opset_that_it_did_not_write(opset: int, reason: str) -> None:
    """The exporter falls back to another opset in silence."""
    model, ids = _Shared(), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ExportError, match=reason):
        trace_onnx(flatten_graph(capture(model, (ids,)), (ids,), {}, {}), opset)


class _Patches(nn.Module):
    """Its channels are fixed by a product of sizes that the capture cannot solve."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3 * 4, 8)

    def forward(self, image: Tensor) -> Tensor:
        b, c, h, w = image.shape
        patches = image.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return self.project(patches.reshape(b, (h // 2) * (w // 2), 4 * c).flatten(2))


def test_sizes_that_only_the_exporter_finds_fixed() -> None:
    """Such a dimension is fixed in the file, and the others stay free."""
    image = torch.randn(2, 3, 4, 6)
    graph_module = capture(_Patches().eval(), (image,))
    sparse = SparseModel(graph_module, graph_module.graph)
    sparse.info = SparseModelInfo((image,), {}, {}, None)
    assert 1 in sparse.dynamic_dims()["image"]  # else nothing is tested here
    model = trace_onnx(flatten_graph(sparse, (image,), {}, sparse.dynamic_dims()), 20)
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["batch", "3", "height", "width"]
