"""`spell_attention`: attention of any rank exports, and computes what torch computes."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify import export_onnx, sparsify


class Attends(nn.Module):
    """Attention over windows, then an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 6))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.ffn(F.scaled_dot_product_attention(x, x + 1, x * 2, attn_mask=mask))


@pytest.mark.parametrize("shape", [(3, 5, 6), (2, 3, 5, 6), (2, 2, 3, 5, 6)], ids=["3d", "4d", "5d"])
@pytest.mark.parametrize("kind", ["none", "float", "bool"])
def test_every_rank_and_mask(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    """Protects: the scale, the mask of either kind, the order of the axes."""
    x = torch.randn(shape)
    mask = torch.rand(5, 5) > 0.5 if kind == "bool" else torch.randn(5, 5)
    mask = mask | torch.eye(5, dtype=torch.bool) if kind == "bool" else mask
    args = (x,) if kind == "none" else (x, mask)
    sparse = sparsify(Attends().eval(), args, num_experts=4, top_k=2, select="all", router_hidden_size=4)
    export_onnx(sparse, tmp_path / "m.onnx", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    given = dict(zip(("x", "mask"), (arg.numpy() for arg in args), strict=False))
    (found,) = session.run(None, given)
    torch.testing.assert_close(torch.as_tensor(found), sparse(*args), rtol=1e-5, atol=1e-5)
