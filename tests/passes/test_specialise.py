"""A model for one label: equal output, the experts of the label alone, no label input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import Tensor, nn

from sparsify import SparseModel, export_onnx, sparsify

LABELS = torch.tensor([0, 2])


class Model(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.embed, self.act = nn.Embedding(30, 8), activation
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return x + self.down(self.act(self.up(x)))


def converted(router: str, activation: nn.Module | None = None, **options: Any) -> SparseModel:
    given: dict[str, Any] = {"start": "upcycle", "num_experts": 4, "top_k": 1, "select": "all", **options}
    if router != "demix":
        given["router_options"] = {"num_labels": 3}
    model, ids = Model(activation or nn.ReLU()).eval(), torch.randint(0, 30, (2, 5))
    sparse = sparsify(model, (ids,), {"expert_labels": LABELS}, router=router, **given)
    for name, parameter in sparse.named_parameters():
        if ".experts." in name or ".router." in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return sparse


def expert_bytes(sparse: SparseModel) -> int:
    return sum(p.numel() * p.element_size() for n, p in sparse.named_parameters() if ".experts." in n and p.dim() == 3)


@pytest.mark.parametrize(
    ("router", "options", "share"),
    [
        ("demix", {}, 1 / 4),
        ("task-moe", {"top_k": 2}, 2 / 4),
        ("mmoe", {"top_k": 4}, 1),
        ("demix", {"start": "split"}, 1 / 4),
    ],
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softplus()], ids=["fused", "chain"])
def test_equal_output_and_its_own_experts(
    router: str, options: dict[str, Any], share: float, activation: nn.Module
) -> None:
    """Protects: claim 18 in PyTorch, for fused layers and chains; the general model is left as it is."""
    sparse = converted(router, activation, num_shared_experts=0, **options)
    ids, before = torch.randint(0, 30, (3, 7)), expert_bytes(sparse)
    for label in (0, 2):
        special = sparse.specialise(label)
        expected = sparse(ids, expert_labels=torch.full((3,), label))
        torch.testing.assert_close(special(ids), expected, rtol=1e-5, atol=1e-6)
        assert expert_bytes(special) == share * before
    assert expert_bytes(sparse) == before
    assert sparse(ids, expert_labels=torch.tensor([0, 1, 2])).shape == (3, 7, 8)


def weight_bytes(file: Path) -> int:
    """Of the floating matrices of a file."""
    arrays = [to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    return sum(array.nbytes for array in arrays if array.ndim > 1 and array.dtype == "float32")


def test_the_files_are_those_of_a_smaller_model(tmp_path: Path) -> None:
    """Protects: claim 18 in ONNX: 1/E of the expert bytes, and a saved model without the label."""
    sparse = converted("demix")
    special = sparse.specialise(2)
    whole = export_onnx(sparse, tmp_path / "all.onnx").file_bytes
    alone = export_onnx(special, tmp_path / "one.onnx").file_bytes
    missing = expert_bytes(sparse) * 3 / 4
    assert weight_bytes(tmp_path / "all.onnx") - weight_bytes(tmp_path / "one.onnx") == missing
    assert whole - alone > missing
    special.save(tmp_path / "saved")
    ids = torch.randint(0, 30, (2, 3))
    assert torch.equal(SparseModel.load(tmp_path / "saved")(ids), special(ids))


def test_trains_on_its_own() -> None:
    """Protects: experts that were taken out are no views of the bank."""
    sparse = converted("demix")
    before = [parameter.clone() for name, parameter in sparse.named_parameters() if ".experts." in name]
    special = sparse.specialise(1)
    for name, parameter in special.named_parameters():
        if ".experts." in name and not name.endswith("experts.bias"):
            parameter.data.zero_()
    after = [parameter for name, parameter in sparse.named_parameters() if ".experts." in name]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_refusals() -> None:
    """Protects: a label outside the table, and models that go by none."""
    with pytest.raises(ValueError, match="knows the ids 0 to 3, got 4"):
        converted("demix").specialise(4)
    plain = sparsify(Model(nn.ReLU()).eval(), (torch.randint(0, 30, (2, 5)),), start="upcycle", select="all")
    with pytest.raises(ValueError, match="no router of this model goes by labels"):
        plain.specialise(0)
