"""`SparseModel.graft`: experts in the original modules compute what the converted model computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsify import SparseModel, sparsify
from sparsify.errors import GraftError
from sparsify.models.bert import Bert, BertConfig
from sparsify.models.dense_model import DenseModel
from sparsify.models.llama import Llama, LlamaConfig

IDS = torch.randint(0, 256, (2, 5))
OPTIONS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "select": "all", "router_hidden_size": 4}


class Channels(nn.Module):
    """Residual 1x1 convolutions: the FFN is three modules, its features are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Conv2d(6, 13, 1), nn.GELU(), nn.Conv2d(13, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Functional(nn.Module):
    """The activation is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(6, 13), nn.Linear(13, 6), Channels()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.down(F.relu(self.up(x.movedim(1, -1)))).movedim(-1, 1))


class Twice(nn.Module):
    """One FFN at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x + self.ffn(x))


def test_whole_modules() -> None:
    """Protects: a module that is an FFN is replaced, at any size; parameters are shared; names are its own."""
    model = Llama(LlamaConfig()).eval()
    names = {name for name, _ in model.named_parameters()}
    sparse = sparsify(model, IDS, **OPTIONS)
    grafted = copy.deepcopy(model)
    report = sparse.graft(grafted)
    assert not report.skipped
    assert len(report.grafted) == 2
    for shape in ((2, 5), (1, 1), (3, 11), (0, 4)):
        ids = torch.randint(0, 256, shape)
        torch.testing.assert_close(grafted(ids), sparse(ids), rtol=1e-5, atol=1e-5)
    (path,) = next(iter(report.grafted.values()))
    new = {name for name, _ in grafted.named_parameters()} - names
    assert {name.removeprefix(f"{path}.") for name in new if name.startswith(path)} >= {
        "experts.up_proj",
        "experts.gate_proj",
        "experts.down_proj",
        "shared.up_proj",
        "router.hidden.weight",
    }
    assert grafted.get_parameter(f"{path}.experts.up_proj") is sparse.get_parameter(f"{path}.experts.up_proj")
    sparse.set_top_k(3)
    torch.testing.assert_close(grafted(IDS), sparse(IDS), rtol=1e-5, atol=1e-5)


class TwoNames(nn.Module):
    """One FFN under two names, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.again(x + self.first(x))


@pytest.mark.parametrize(
    "build", [Channels, Twice, TwoNames, lambda: Bert(BertConfig())], ids=["channels", "twice", "two-names", "bert"]
)
def test_several_modules_and_sites(build: type[nn.Module]) -> None:
    """Protects: an FFN that is several modules in a row, features that are channels, one FFN at two places."""
    model = build().eval()
    x = IDS if isinstance(model, Bert) else torch.randn(2, 6, 5, 6)
    sparse = sparsify(model, (x,), **OPTIONS)
    report = sparse.graft(model)
    assert not report.skipped
    torch.testing.assert_close(model(x), sparse(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_grafted_is_listed() -> None:
    """Protects: an FFN whose activation is code of the parent stays dense there, with the reason."""
    model, x = Functional().eval(), torch.randn(2, 6, 3, 4)
    sparse = sparsify(model, (x,), **OPTIONS)
    report = sparse.graft(model)
    assert report.grafted == {"other": ("other.up", "other.act", "other.down")}
    assert list(report.skipped) == ["ffn0"]
    assert "`relu` is code of the model itself" in report.skipped["ffn0"]
    assert isinstance(model.up, nn.Linear)
    assert "left dense" in str(report)


class Peeks(nn.Module):
    """Reads a weight of its FFN from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x.to(self.ffn.get_parameter("0.weight").dtype))


def test_a_parent_that_reads_the_dense_weights() -> None:
    """Protects: where the model cannot run without a dense module, the module is put back and the reason given."""
    model, x = Peeks().eval(), torch.randn(2, 6)
    before = model(x)
    report = sparsify(model, (x,), **OPTIONS).graft(model)
    assert "raises" in report.skipped["ffn"]
    torch.testing.assert_close(model(x), before)


def test_a_model_that_is_another_one() -> None:
    """Protects: other modules, other inputs or other weights are refused, and the model is left as it was."""
    model = Llama(LlamaConfig()).eval()
    sparse = sparsify(model, IDS, **OPTIONS)
    with pytest.raises(GraftError, match="has no module"):
        sparse.graft(Bert(BertConfig()))
    other = Llama(LlamaConfig()).eval()
    before = other(IDS)
    with pytest.raises(GraftError, match="its weights are not those that were converted"):
        sparse.graft(other)
    torch.testing.assert_close(other(IDS), before)


def test_state_dict_round_trip(tmp_path: Path) -> None:
    """Protects: weights of a grafted model load into another one that was grafted; so do saved ones."""
    model = Llama(LlamaConfig()).eval()
    sparse = sparsify(model, IDS, **OPTIONS)
    fresh = copy.deepcopy(model)
    sparse.graft(model)
    with torch.no_grad():
        model.get_parameter(next(name for name in model.state_dict() if name.endswith("experts.up_proj"))).mul_(2)
    expected = model(IDS)
    save_file(model.state_dict(), tmp_path / "grafted.safetensors")
    sparse.save(tmp_path / "sparse")
    loaded = SparseModel.load(tmp_path / "sparse")
    loaded.graft(fresh)
    fresh.load_state_dict(load_file(tmp_path / "grafted.safetensors"))
    torch.testing.assert_close(fresh(IDS), expected)


def test_save_pretrained_and_from_pretrained(tmp_path: Path) -> None:
    """Protects: the Hugging Face way to keep weights: saved from the grafted class, read back by it, grafted again."""
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 99, (2, 7))
    sparse = sparsify(model, kwargs={"input_ids": ids, "use_cache": False}, **OPTIONS)
    sparse.graft(model)
    model.save_pretrained(tmp_path)
    again: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    sparse.graft(again)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


def test_training_reaches_the_experts() -> None:
    """Protects: a plain training loop lowers the loss through the experts; routers are frozen and stay as they are."""
    model = Llama(LlamaConfig()).eval()
    sparsify(model, IDS, **OPTIONS).graft(model)
    model.train()
    routers = {name: p.clone() for name, p in model.named_parameters() if ".router." in name}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert routers
    assert not [name for name, _ in trained if ".router." in name]
    optimizer = torch.optim.Adam([p for _, p in trained], lr=1e-2)
    losses: list[float] = []
    for _ in range(4):
        loss = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert [name for name, p in trained if p.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in routers.items())


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Protects: every parameter that DDP waits for gets a gradient, step after step."""
    model = Llama(LlamaConfig()).eval()
    sparsify(model, IDS, **OPTIONS).graft(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            parallel(IDS).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_minilm_embeds_sentences(minilm: DenseModel) -> None:
    """Protects: a sentence-embedding loop written for the Hugging Face class, on a grafted model."""
    model = copy.deepcopy(minilm.model)
    sparse = sparsify(model, minilm.args, minilm.kwargs, num_experts=4, top_k=4, refit=False, router_hidden_size=4)
    report = sparse.graft(model)
    assert len(report.grafted) == 6
    assert minilm.calibration is not None
    for batch in [next(iter(minilm.calibration()))]:
        with torch.no_grad():
            ours, dense = (
                F.normalize((m(**batch).last_hidden_state * batch["attention_mask"][..., None]).sum(1), dim=-1)
                for m in (model, minilm.model)
            )
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)
