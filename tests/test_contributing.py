"""The router that CONTRIBUTING.md writes out is complete: it converts, trains, routes as it says and exports."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify import export_onnx, sparsify
from sparsify.routers import ROUTERS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class in the first block of code that defines one, in the catalogue."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(LinearRouter)" in block)
    path = tmp_path / "temperature_router.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("temperature_router", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "temperature_router", module)
    spec.loader.exec_module(module)
    made = module.TemperatureRouter
    monkeypatch.setattr("sparsify.routers.catalogue.ROUTERS", (*ROUTERS, made))
    return made


def test_the_example_works(router: Any, tmp_path: Path) -> None:
    """Protects: adding a router takes one file and one line."""
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    options: dict[str, Any] = {"router": router.system.name, "router_options": {"temperature": 2.0}}
    dense = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    sparse = sparsify(dense, (x,), start="upcycle", num_experts=4, top_k=2, select="all", **options)
    (made,) = sparse.routers.values()
    probabilities = torch.softmax(made.logits(x) / 2, -1)  # pyright: ignore[reportCallIssue]
    assert torch.equal(made(x)[1], probabilities.topk(2).indices)
    sparse.train()(x)
    assert sparse.aux_loss().item() > 0
    export_onnx(sparse.eval(), tmp_path / "model.onnx")
