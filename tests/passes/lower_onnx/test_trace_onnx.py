"""torch.onnx.export, with its errors made short."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import ExportError
from sparsify.passes.capture import capture
from sparsify.passes.lower_onnx.flat_graph import flatten_graph
from sparsify.passes.lower_onnx.trace_onnx import trace_onnx


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
