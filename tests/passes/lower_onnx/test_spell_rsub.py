"""`spell_rsub`: a number minus an integer mask exports, and computes what it did."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsify import export_onnx, sparsify


class Masks(nn.Module):
    """Hides positions by `1.0 - mask`, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.ffn(x) + (1.0 - mask)[..., None] * -3 + (2 - mask)[..., None]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_every_kind_of_mask(dtype: torch.dtype, tmp_path: Path) -> None:
    """Protects: unsigned masks do not wrap around, and floats are exact."""
    mask = torch.tensor([[0, 1, 3], [1, 1, 0]]).to(dtype)
    x = torch.randn(2, 3, 6)
    sparse = sparsify(Masks().eval(), (x, mask), num_experts=4, top_k=2, select="all", router_hidden_size=4)
    export_onnx(sparse, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.as_tensor(found), sparse(x, mask), rtol=1e-5, atol=1e-5)
