"""Experts from several dense models, against models that are put together by hand from their state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import average_models, export_onnx, sparsify

LABELS = torch.tensor([1, 0])


class Model(nn.Module):
    """A gated FFN with output bias and a number for every neuron, between other weights."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.gate, self.up, self.down = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 6)
        self.beta = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        gate = self.gate(x)
        return self.last(x + self.down(gate * torch.sigmoid(self.beta * gate) * self.up(x)))


def branches(count: int = 3) -> list[Model]:
    return [Model().eval() for _ in range(count)]


def with_ffn_of(models: list[Model], index: int) -> nn.Module:
    """The mean of all weights, but for the FFN, which is that of one branch."""
    made = average_models(models)
    own = {name: value for name, value in models[index].state_dict().items() if name[:4] in ("gate", "down", "beta")}
    own |= {name: value for name, value in models[index].state_dict().items() if name.startswith("up")}
    made.load_state_dict(own, strict=False)
    return made


def convert(models: list[Model], x: Tensor, **options: Any) -> Any:
    given: dict[str, Any] = {"start": "upcycle", "select": "all", "top_k": 1, **options}
    return sparsify(models[0], (x,), branches=models, **given)


@pytest.mark.parametrize(("granularity", "router"), [(1, "demix"), (1, "hash"), (2, "top-k")])
def test_each_expert_is_a_branch(granularity: int, router: str) -> None:
    """Protects: Branch-Train-MiX: the expert of a branch is its FFN, bias and all, and the rest is the mean."""
    models, x = branches(), torch.randn(2, 5, 6)
    given: dict[str, Any] = {"kwargs": {"expert_labels": LABELS}} if router == "demix" else {}
    if router == "hash":
        given = {"kwargs": {"ids": LABELS}, "ids_input": "ids", "router_options": {"num_ids": 3}}
    sparse = convert(models, x, granularity=granularity, top_k=granularity, router=router, **given)
    (routed,) = sparse.routers.values()
    (ffn,) = sparse.report.converted
    assert ffn.num_experts == 3 * granularity
    assert ffn.receipt < 1e-5
    assert any("FFNs of 3 branches" in note for note in sparse.report.notes)
    for i in range(3):
        if router == "demix":
            found = sparse(x, expert_labels=torch.full((2,), i))
        elif router == "hash":
            routed.table.fill_(i)
            found = sparse(x, ids=LABELS)
        else:  # logits that choose the shards of one branch
            routed.forward = lambda x, ids=None, i=i: (
                x.new_full((len(x), 2), 0.5),
                torch.tensor([2 * i, 2 * i + 1]).expand(len(x), 2),
            )
            found = sparse(x)
        torch.testing.assert_close(found, with_ffn_of(models, i)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["top-k", "mmoe", "switch", "smear"])
def test_equal_branches_are_the_dense_model(router: str) -> None:
    """Protects: with branches that are all alike every exact router starts as that model, output bias included."""
    model, x = Model().eval(), torch.randn(2, 5, 6)
    given: dict[str, Any] = {"kwargs": {"expert_labels": LABELS}} if router == "mmoe" else {}
    top_k = {"mmoe": 3, "top-k": 2}.get(router, 1)
    sparse = convert([model] * 3, x, router=router, top_k=top_k, exact_start=router == "switch", **given)
    torch.testing.assert_close(sparse(x, **given.get("kwargs", {})), model(x), rtol=1e-5, atol=1e-5)


def test_merged_again_they_are_the_manual_average() -> None:
    """Protects: Branch-Train-Merge: `to_dense` of the experts is the model with the mean of all weights."""
    models, x = branches(), torch.randn(4, 6)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    sparse = convert(models, x, granularity=2, top_k=4)
    torch.testing.assert_close(sparse.to_dense()(x), average_models(models)(x), rtol=1e-5, atol=1e-5)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_export(tmp_path: Path) -> None:
    """Protects: the output bias of every expert reaches the file."""
    report = export_onnx(convert(branches(), torch.randn(2, 5, 6), top_k=2), tmp_path / "model.onnx")
    assert report.parity is not None


def test_refuses() -> None:
    """Protects: what does not fit is named, with what to give."""
    models, x = branches(2), torch.randn(4, 6)
    with pytest.raises(ValueError, match="is start='upcycle', not start='split'"):
        convert(models, x, start="split")
    with pytest.raises(ValueError, match=r"have 4 experts, and the branches make 2, .* give num_experts=2"):
        convert(models, x, num_experts=4)
    with pytest.raises(ValueError, match=r"model 2 does not fit model 0: beta has the shape \(9,\) there and \(8,\)"):
        convert([models[0], Model(9).eval()], x)
    other = Model().eval()
    other.forward = lambda x: other.last(other.down(torch.relu(other.up(other.first(x)))))  # pyright: ignore
    with pytest.raises(ValueError, match=r"branch 1 computes something else at .* than the model does"):
        convert([models[0], other], x)
