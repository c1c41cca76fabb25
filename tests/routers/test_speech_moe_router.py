"""`SpeechMoERouter` against loops in fp64, and its embedding on the way through a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import SparseModel, export_onnx, sparsify
from sparsify.errors import SelectionError
from sparsify.routers.speech_moe_router import SpeechMoERouter

A = 3
OPTIONS: dict[str, Any] = {
    "start": "upcycle",
    "router": "speech-moe",
    "num_experts": 4,
    "top_k": 1,
    "select": "all",
    "router_options": {"embedding_size": A},
    "exact_start": True,
}


class Model(nn.Module):
    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.flat = nn.Linear(8, 24), nn.Linear(24, 8), flat

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, 8) if self.flat else x
        return x + self.down(torch.relu(self.up(y))).view(x.shape)


@pytest.mark.parametrize("size", [0, A])
def test_routes_and_losses(size: int) -> None:
    """Protects: the logits of token and embedding together, the weight p, both losses."""
    torch.manual_seed(0)
    router = SpeechMoERouter(5, 4, 1, embedding_size=size).double()
    for parameter in router.parameters():
        parameter.data.normal_()
    x, embedding = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, size, dtype=torch.float64)
    weights, ids = router(x, embedding) if size else router(x)
    rows: list[list[float]] = []
    for t in range(11):
        logits = [float(router.weight[e].detach() @ x[t]) for e in range(4)]
        if size:
            logits = [v + float(router.embedding_weight[e].detach() @ embedding[t]) for e, v in enumerate(logits)]
        total = sum(math.exp(v) for v in logits)
        rows.append([math.exp(v) / total for v in logits])
    assert ids[:, 0].tolist() == [row.index(max(row)) for row in rows]
    torch.testing.assert_close(weights[:, 0], torch.tensor([max(row) for row in rows]).double())
    sparsity = sum(1 / math.sqrt(sum(p * p for p in row)) for row in rows) / 11
    importance = 4 * sum((sum(column) / 11) ** 2 for column in zip(*rows, strict=True))
    assert router.aux_loss().item() == pytest.approx(0.1 * sparsity + 0.1 * importance, rel=1e-9)


def test_gradients() -> None:
    """Protects: the losses reach both weights and the embedding, so that its own network learns."""
    router = SpeechMoERouter(5, 4, 1, embedding_size=A).double()
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 5), (4, A), (6, A))]
    x = torch.randn(6, 5, dtype=torch.float64)

    def run(weight: Tensor, embedding_weight: Tensor, embedding: Tensor) -> Tensor:
        weights = {"weight": weight, "embedding_weight": embedding_weight}
        torch.func.functional_call(router, weights, (x, embedding))
        return router.aux_loss()

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(("by", "flat"), [("call", False), ("entry", False), ("entry", True), ("token", True)])
def test_embedding_is_an_added_input(by: str, flat: bool, tmp_path: Path) -> None:
    """Protects: one for a call, a sequence or a token, spread over the tokens; it chooses the expert; in files too."""
    shape = {"call": (A,), "entry": (2, A), "token": (2, 6, A)}[by]
    model, x, embedding = Model(flat).eval(), torch.randn(2, 6, 8), torch.randn(shape)
    sparse = sparsify(model, (x,), {"expert_embedding": embedding}, **OPTIONS)
    torch.testing.assert_close(sparse(x, expert_embedding=embedding), model(x), rtol=1e-5, atol=1e-5)
    (router,) = sparse.routers.values()
    for parameter in router.parameters():
        parameter.data.normal_()
    seen: list[Tensor] = []
    router.register_forward_hook(lambda _module, inputs, _route: seen.extend(inputs))
    sparse(x, expert_embedding=embedding)
    spread = embedding if by != "entry" else embedding.unsqueeze(1)
    assert torch.equal(seen[1], spread.expand(2, 6, A).reshape(-1, A))
    report = export_onnx(sparse, tmp_path / "model.onnx")
    assert report.parity is not None
    assert len(report.parity.shapes) > 1
    sparse.save(tmp_path / "saved")
    again = SparseModel.load(tmp_path / "saved")(x, expert_embedding=embedding)
    assert torch.equal(again, sparse(x, expert_embedding=embedding))


def test_calibrates_and_trains() -> None:
    """Protects: calibration batches bring their own embeddings; the losses reach the network of the embedding."""
    model, x, given = Model().eval(), torch.randn(2, 6, 8), {"expert_embedding": torch.randn(2, A)}
    batches = [((torch.randn(3, 7, 8),), {"expert_embedding": torch.randn(3, A)})]
    sparse = sparsify(model, (x,), given, calibration=batches, **OPTIONS)
    assert sparse.report.calibration_tokens == 21
    embedding = torch.randn(2, A, requires_grad=True)
    sparse.train()(x, expert_embedding=embedding)
    sparse.aux_loss().backward()
    assert embedding.grad is not None
    assert embedding.grad.abs().sum() > 0


def test_refuses() -> None:
    """Protects: an embedding that is missing or does not fit is told with what to give."""
    model, x = Model().eval(), torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match="reads an embedding of 3 features of every token: call router"):
        SpeechMoERouter(5, 4, 1, embedding_size=A)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="embedding_size is a number of features, or 0 for no embedding, got -1"):
        SpeechMoERouter(5, 4, 1, embedding_size=-1)
    with pytest.raises(SelectionError, match=r"no floating input of that name.*torch.randn\(B, 3\)"):
        sparsify(model, (x,), **OPTIONS)
    with pytest.raises(SelectionError, match=r"reads 3 features of the input .expert_embedding., and that has 2"):
        sparsify(model, (x,), {"expert_embedding": torch.randn(2, 2)}, **OPTIONS)
    with pytest.raises(SelectionError, match=r"must hold an embedding, floating numbers, got torch.int64"):
        sparsify(model, (x,), {"expert_embedding": torch.zeros(2, A).long()}, **OPTIONS)
    with pytest.raises(SelectionError, match=r"give one embedding for each sequence, \[2\]"):
        sparsify(model, (x,), {"expert_embedding": torch.randn(3, A)}, **OPTIONS)
