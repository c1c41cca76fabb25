"""`spell_adaptive_pool`: the file pools images of any size as torch does."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsify import export_onnx, sparsify


class Pools(nn.Module):
    """Pools, then an FFN over the channels."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(size)
        self.ffn = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 6))

    def forward(self, image: Tensor) -> Tensor:
        return self.ffn(self.pool(image).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("size", [(3, 2), (7, 7), (1, 1)])
def test_sizes_that_do_not_divide(size: tuple[int, int], tmp_path: Path) -> None:
    """Protects: windows that overlap, that repeat pixels, and that are the whole image."""
    image = torch.randn(2, 6, 12, 14)
    sparse = sparsify(Pools(size).eval(), (image,), num_experts=4, top_k=2, select="all", router_hidden_size=4)
    export_onnx(sparse, tmp_path / "m.onnx", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for height, width in ((12, 14), (5, 9), (2, 31)):
        image = torch.randn(3, 6, height, width)
        (found,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.as_tensor(found), sparse(image), rtol=1e-5, atol=1e-5)
