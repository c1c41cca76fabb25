"""`distill`: the converted model comes closer to the dense one, alone; training can stop and go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import SparseModel, distill, sparsify
from sparsify.models.bert import Bert, BertConfig
from sparsify.models.llama import Llama, LlamaConfig
from sparsify.models.text_encoder import embedding_loss
from sparsify.passes.split.bf16_products import has_bf16_products


@pytest.fixture(scope="module", params=["gated decoder", "post-norm encoder"])
def dense(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return (Llama(LlamaConfig()) if request.param == "gated decoder" else Bert(BertConfig())).eval()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (8, 32), generator=generator) for _ in range(6)]


@pytest.fixture(scope="module")
def folder(dense: nn.Module, batches: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion, saved: every test loads a fresh one, so values are found by name in a loaded model too."""
    options: dict[str, Any] = {"num_experts": 4, "top_k": 2, "num_shared_experts": 0, "select": "all", "refit": False}
    folder = tmp_path_factory.mktemp("converted")
    sparsify(dense, batches[0][:2, :5], calibration=batches, **options).save(folder)
    return folder


def changed(sparse: SparseModel, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in sparse.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("through", ["model", "block"])
def test_comes_closer_and_changes_only_experts(
    dense: nn.Module, batches: list[Tensor], folder: Path, through: str
) -> None:
    """Protects: the aim; weights that the dense model shares stay."""
    sparse = SparseModel.load(folder)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    original = {name: value.clone() for name, value in dense.state_dict().items()}
    wanted_gradients = [parameter.requires_grad for parameter in sparse.parameters()]
    report = distill(sparse, dense, batches, steps=20, through=through)  # type: ignore[arg-type]
    assert sum(report.losses[-6:]) < 0.95 * sum(report.losses[:6])
    assert all(torch.equal(value, original[name]) for name, value in dense.state_dict().items())
    names = changed(sparse, before)
    assert any(".router." in name for name in names)
    assert all(".router." in name or ".experts." in name for name in names)
    assert [parameter.requires_grad for parameter in sparse.parameters()] == wanted_gradients


def test_everything_but_the_dense_model_and_tables_learns(dense: nn.Module, batches: list[Tensor]) -> None:
    """Protects: train="everything" reaches attention and norms, in copies of what the dense model shares."""
    sparse = sparsify(dense, batches[0][:2, :5], num_experts=4, top_k=1, select="all")
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    original = {name: value.clone() for name, value in dense.state_dict().items()}
    distill(sparse, dense, batches, steps=2, train="everything")
    assert all(torch.equal(value, original[name]) for name, value in dense.state_dict().items())
    same = {name for name, value in sparse.state_dict().items() if torch.equal(value, before[name])}
    tables = {name for name, module in dense.named_modules() if isinstance(module, nn.Embedding)}
    assert {name.rpartition(".")[0] for name in same if "embed" in name} == tables
    assert not [name for name in same if "attention" in name or "norm" in name]


class _Named(nn.Module):
    """Logits that are called so."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(ids)}


def test_logits_are_compared_as_probabilities(batches: list[Tensor]) -> None:
    """Protects: they count by their divergence, under no other name; hidden states count alike."""
    torch.manual_seed(0)
    dense = Llama(LlamaConfig()).eval()
    losses: list[float] = []
    for model in (_Named(dense), dense):
        sparse = sparsify(model, batches[0][:2, :5], num_experts=4, top_k=1, select="all")
        with torch.no_grad():
            output = sparse(batches[0])
        losses += distill(sparse, model, batches[:1], steps=1).losses
    with torch.no_grad():
        a, b = dense(batches[0]).double(), output.double()
    p, q = a.softmax(-1), b.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    relative = (a - b).square().sum() / a.square().sum()
    assert losses[0] - losses[1] == pytest.approx(float(divergence - relative), rel=1e-3)


class _Pooled(nn.Module):
    """Returns what sentence encoders return, and takes padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Bert(BertConfig())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.model(input_ids) * attention_mask.unsqueeze(2)}


def test_a_loss_of_yours_takes_the_place_of_the_outputs(batches: list[Tensor]) -> None:
    """Protects: it is given what the models return and the batch; its value counts as it is, its gradient trains.

    Where no gradient reaches the outputs it is no error.
    """
    dense = _Pooled().eval()
    masks = [torch.ones_like(ids).tril(8) for ids in batches]
    given = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(batches, masks, strict=True)]
    example = {name: value[:2, :5] for name, value in given[0].items()}
    options: dict[str, Any] = {"num_experts": 4, "top_k": 1, "select": "all", "refit": False}
    sparse = [sparsify(dense, (), example, calibration=given, **options) for _ in range(2)]
    with torch.no_grad():
        expected = embedding_loss(sparse[0](**given[0]), dense(**given[0]), given[0])
    seen: list[float] = []

    def loss(ours: Any, theirs: Any, batch: Any) -> Tensor:
        assert batch is given[0]
        value = embedding_loss(ours, theirs, batch)
        seen.append(value.item())
        return value

    distill(copy.deepcopy(sparse[0]), dense, given[:1], steps=1, loss=embedding_loss, train="routers")
    distill(copy.deepcopy(sparse[0]), dense, given[:1], steps=1, loss=embedding_loss, through="block")
    with_it = distill(sparse[0], dense, given[:1], steps=12, loss=loss)
    rounded = has_bf16_products(torch.device("cpu"), torch.float32)
    assert seen[0] == pytest.approx(float(expected), rel=1e-2 if rounded else 1e-4)
    assert with_it.losses[0] > seen[0]  # hidden states count as well
    without = distill(sparse[1], dense, given[:1], steps=12, loss=lambda ours, *_: 0 * ours["last_hidden_state"].sum())
    assert with_it.losses[0] - without.losses[0] == pytest.approx(seen[0], rel=1e-3)
    with torch.no_grad():
        ours, others = (float(embedding_loss(model(**given[0]), dense(**given[0]), given[0])) for model in sparse)
    assert ours < others


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda ours, theirs, batch: ours - theirs, r"loss must return a scalar tensor, got a tensor of shape \[8, 32"),
        (lambda ours, theirs, batch: 0.5, "loss must return a scalar tensor, got float"),
        (lambda ours, theirs, batch: (ours.detach() - theirs).sum(), "without a gradient.*without detach"),
    ],
)
def test_a_loss_that_cannot_be_followed_is_refused(batches: list[Tensor], loss: Any, reason: str) -> None:
    """Protects: a clear error before any weight changes."""
    torch.manual_seed(0)
    dense = Bert(BertConfig()).eval()
    sparse = sparsify(dense, batches[0][:2, :5], num_experts=4, top_k=2, select="all")
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        distill(sparse, dense, batches, steps=1, loss=loss)
    assert not changed(sparse, before)


@pytest.mark.parametrize("rows", [1, 1 << 13])
def test_routers_alone(
    dense: nn.Module, batches: list[Tensor], folder: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: train="routers" leaves the experts alone; routers learn even where one token is all that is run."""
    monkeypatch.setattr("sparsify.distill_losses._ROUTED_ROWS", rows)
    monkeypatch.setattr("sparsify.passes.training_graph.run_taught", lambda *_: None)
    sparse = SparseModel.load(folder)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    distill(sparse, dense, batches, steps=5, train="routers")
    names = changed(sparse, before)
    assert names
    assert all(".router." in name for name in names)


def test_goes_on_from_a_checkpoint_to_the_same_weights(
    dense: nn.Module, batches: list[Tensor], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: moments, order of the batches and learning rate are restored; nothing is pickled."""
    monkeypatch.setattr("sparsify.distillation._EVERY", 4)
    whole, broken = SparseModel.load(folder), SparseModel.load(folder)
    distill(whole, dense, batches, steps=7)
    file = tmp_path / "training.safetensors"

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(broken, dense, batches, steps=7, checkpoint=file, progress=stop)
    again = SparseModel.load(folder)
    report = distill(again, dense, batches, steps=7, checkpoint=file)
    assert report.first_step == 4
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(ValueError, match="is of another training"):
        distill(again, dense, batches, steps=8, checkpoint=file)


def test_refusals(dense: nn.Module, batches: list[Tensor], folder: Path) -> None:
    """Protects: what cannot work is refused with a reason."""
    sparse = SparseModel.load(folder)
    with pytest.raises(TypeError, match="needs a SparseModel, got"):
        distill(dense, dense, batches, steps=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train must be one of experts, routers, everything"):
        distill(sparse, dense, batches, steps=1, train="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        distill(sparse, dense, batches, steps=1, learning_rate=0.0)
    copies = sparsify(dense, batches[0][:2, :5], start="upcycle", router="switch", num_experts=2, top_k=1, select="all")
    with pytest.raises(ValueError, match=r"weight 1, as 'mlp' does, not {.*'switch'.*loss \+ sparse.aux_loss"):
        distill(copies, dense, batches, steps=1)
    with pytest.raises(ValueError, match="is not the model that was converted"):
        distill(sparse, nn.Embedding(256, 4), batches, steps=1)
