"""`spell_size_ratios`: positions scaled by a ratio of dynamic sizes export."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from sparsify import export_onnx, sparsify


class Scales(nn.Module):
    """Relative positions of two sequences of different lengths, as in pooled attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 6))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        ratio = other.shape[1] / x.shape[1]
        positions = torch.arange(x.shape[1]) * ratio + torch.arange(x.shape[1]).float() / ratio
        return self.ffn(x) + positions[:, None]


def test_ratios_follow_the_inputs(tmp_path: Path) -> None:
    """Protects: the ratio is computed in the file, for sizes other than the example's."""
    x, other = torch.randn(2, 4, 6), torch.randn(2, 7, 6)
    sparse = sparsify(Scales().eval(), (x, other), num_experts=4, top_k=2, select="all", router_hidden_size=4)
    export_onnx(sparse, tmp_path / "m.onnx", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for lengths in ((4, 7), (9, 2)):
        args = tuple(torch.randn(2, length, 6) for length in lengths)
        (found,) = session.run(None, dict(zip(("x", "other"), (arg.numpy() for arg in args), strict=True)))
        torch.testing.assert_close(torch.as_tensor(found), sparse(*args), rtol=1e-5, atol=1e-5)
