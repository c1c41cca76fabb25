"""`sparsify()` and `inspect()`: what a user relies on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify as package
from sparsify import ConversionPlan, SparseModel, inspect, sparsify
from sparsify.errors import CalibrationError, CaptureError, NoFFNError, SelectionError
from sparsify.models.bert import Bert, BertConfig
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.llama import Llama, LlamaConfig

IDS = torch.randint(0, 256, (2, 9))
OPTIONS: dict[str, Any] = {"num_experts": 8, "top_k": 3, "num_shared_experts": 1, "router_hidden_size": 8}
MODELS = {
    "bert": lambda: Bert(BertConfig()),
    "gpt": lambda: GPT(GPTConfig()),
    "llama": lambda: Llama(LlamaConfig()),
    "llama, fused gate and up": lambda: Llama(LlamaConfig(fused_gate_up=True)),
}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (4, 16), generator=generator) for _ in range(8)]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_public_names() -> None:
    """Protects: `__all__` is the public API; every name is documented."""
    assert all(getattr(package, name).__doc__ for name in package.__all__)


@pytest.mark.parametrize("name", MODELS)
def test_all_experts_on_is_the_dense_model(name: str) -> None:
    """Protects: promise 1, end to end, at sizes that were not traced."""
    model = MODELS[name]().eval()
    sparse = sparsify(model, (IDS,), num_experts=8, top_k=8, calibration=batches())
    assert [ffn.action for ffn in sparse.report.ffns] == ["converted"] * 2
    assert sparse.report.max_receipt <= 1e-5
    for shape in ((2, 9), (1, 1), (3, 17)):
        ids = torch.randint(0, 256, shape)
        assert relative(sparse(ids), model(ids)) <= 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_model_stays_bit_identical(dtype: torch.dtype, training: bool) -> None:
    """Protects: sparsify never changes the model it was given, under no_grad, in any mode and dtype, twice in a row."""
    model = Bert(BertConfig()).to(dtype).train(training)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first = sparsify(model, (IDS,), calibration=batches(), **OPTIONS)
    second = sparsify(model, (IDS,), calibration=batches(), **OPTIONS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert all(module.training == training for module in model.modules())
    assert first.training == training
    assert all(p.dtype == dtype for name, p in first.named_parameters() if "router" not in name)
    assert torch.equal(first(IDS), second(IDS))
    assert torch.isfinite(first(IDS)).all()


def test_calibration_helps_and_the_report_says_so() -> None:
    """Protects: real tokens beat the weights alone, and a conversion without them says what it is."""
    model = Bert(BertConfig()).eval()
    with_data = sparsify(model, (IDS,), calibration=batches(), **OPTIONS)
    without = sparsify(model, (IDS,), **OPTIONS)
    assert with_data.report.output_error < without.report.output_error
    assert with_data.report.calibration_tokens == 8 * 64
    assert without.report.calibration_tokens == 0
    assert any("no calibration data" in note for note in without.report.notes)
    assert not with_data.report.notes


def test_report_counts() -> None:
    """Protects: FLOPs, parameters, loads, stages."""
    model = Bert(BertConfig()).eval()
    sparse = sparsify(model, (IDS,), calibration=batches(), **OPTIONS)
    report, ffn = sparse.report, sparse.report.ffns[0]
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == sum(p.numel() for p in sparse.parameters())
    assert ffn.flops_before == 2 * 2 * 64 * 256
    assert ffn.flops_after == ffn.flops_before * 3 // 8 + 2 * (64 * 8 + 8 * 7)
    assert ffn.parameters_before == 2 * 64 * 256 + 256 + 64
    assert sum(ffn.tokens_per_expert) == 2 * sum(1 for i in range(8 * 64) if i % 10 != 9)
    assert set(report.seconds) == {"capture", "match", "convert", "verify"}


def test_padding_does_not_count() -> None:
    """Protects: batches of a Hugging Face tokenizer, as they come."""
    model = Bert(BertConfig()).eval()
    mask = torch.ones(4, 16)
    mask[:, 10:] = 0
    example = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    calibration = [{"input_ids": ids, "attention_mask": mask} for ids in batches()]
    sparse = sparsify(model, (), example, calibration=calibration, **OPTIONS)
    assert sparse.report.calibration_tokens == 8 * 4 * 10


def test_neurons_that_do_not_divide() -> None:
    """Protects: 256 neurons on 7 experts become experts of 37 with 3 of padding, exact with all of them on."""
    model = Bert(BertConfig()).eval()
    sparse = sparsify(model, (IDS,), num_experts=7, top_k=7, calibration=batches())
    assert "3 of them padding" in sparse.report.ffns[0].reason
    assert relative(sparse(IDS), model(IDS)) <= 1e-5


def test_set_top_k() -> None:
    """Protects: the dial at run time; without a refit all experts on is dense again; a bad value changes nothing."""
    model = Bert(BertConfig()).eval()
    sparse = sparsify(model, (IDS,), calibration=batches(), refit=False, **OPTIONS)
    assert relative(sparse(IDS), model(IDS)) > 1e-3
    with pytest.raises(ValueError, match=r"top_k must be between 2 and 8 for layers\.0"):
        sparse.set_top_k(9)
    sparse.set_top_k(8)
    assert relative(sparse(IDS), model(IDS)) <= 1e-5


def test_training_the_sparse_model() -> None:
    """Protects: gradients reach the experts, and leave the converted weights of the dense model alone."""
    model = Bert(BertConfig())
    sparse = sparsify(model, (IDS,), calibration=batches(), **OPTIONS)
    sparse(IDS).square().mean().backward()
    grads = {name: p.grad for name, p in sparse.named_parameters() if p.requires_grad}
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values())
    assert not any("router" in name for name in grads)


def test_copies() -> None:
    """Protects: a deep copy is a SparseModel of its own, with its report."""
    sparse = sparsify(Bert(BertConfig()).eval(), (IDS,), calibration=batches(), **OPTIONS)
    twin = copy.deepcopy(sparse)
    assert isinstance(twin, SparseModel)
    assert twin.report == sparse.report
    assert torch.equal(twin(IDS), sparse(IDS))


def test_progress() -> None:
    """Protects: every stage is announced and finished, layers one by one."""
    calls: list[tuple[str, int, int]] = []
    model = Bert(BertConfig()).eval()
    sparsify(model, (IDS,), calibration=batches(), progress=lambda *call: calls.append(call), **OPTIONS)
    assert [call for call in calls if call[0] == "convert" and call[2] == 2] == [("convert", i, 2) for i in range(3)]
    assert {stage for stage, done, total in calls if done == total} == {"capture", "match", "convert", "verify"}


def test_a_model_without_ffn() -> None:
    """Protects: the message counts what was looked at and lists the nearest rejections with their reasons."""
    near_miss = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 8))
    with pytest.raises(NoFFNError, match=r"(?s)among 2 linear layers\. The nearest:\n  - model: `layer_norm` stands"):
        sparsify(near_miss, torch.randn(2, 8))
    with pytest.raises(NoFFNError, match=r"among 1 linear layers\. None of them feeds another"):
        sparsify(nn.Linear(8, 8), torch.randn(2, 8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, ValueError, "top_k must be between 1 and num_experts"),
        ({"calibration": [], "num_experts": 8}, CalibrationError, "calibration data is empty"),
        ({"calibration": ["text"], "num_experts": 8}, CalibrationError, "got str"),
        ({"num_expert": 4}, TypeError, "num_expert"),
    ],
)
def test_bad_input_leaves_the_model_alone(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Protects: nothing is lost when a conversion is refused, half way or before."""
    model = Bert(BertConfig()).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        sparsify(model, (IDS,), **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.training


def test_a_name_that_sparse_model_needs() -> None:
    """Protects: a submodule called `report` would be hidden by the property."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.report = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.report(x)

    with pytest.raises(CaptureError, match=r"members called \['report'\]"):
        sparsify(Named(), torch.randn(2, 8), num_experts=2, top_k=1)


def test_fixed_sizes_are_noted() -> None:
    """Protects: a batch of one in the example is no silent restriction."""
    sparse = sparsify(Bert(BertConfig()).eval(), (IDS[:1],), **OPTIONS)
    assert any("`input_ids` has a fixed size of 1 in dimension 0" in note for note in sparse.report.notes)


def test_nothing_pays() -> None:
    """Protects: a model whose FFNs stay dense comes back as it is, with a note, not an error."""
    model = Bert(BertConfig()).eval()
    sparse = sparsify(model, (IDS,), num_experts=64, top_k=4)
    assert [ffn.action for ffn in sparse.report.ffns] == ["dense"] * 2
    assert any("nothing was converted" in note for note in sparse.report.notes)
    torch.testing.assert_close(sparse(IDS), model(IDS))


def test_inspect() -> None:
    """Protects: every legal site and every near miss, without an error where there is none."""
    assert [ffn.name for ffn in inspect(Bert(BertConfig()), (IDS,)).ffns] == ["layers.0.ffn", "layers.1.ffn"]
    assert inspect(nn.Linear(8, 8), (torch.randn(2, 8),)).ffns == []


def expert_banks(sparse: SparseModel) -> list[tuple[int, int, int]]:
    """Per converted FFN: routed experts of the weights in the graph and of the router, and how many of them run."""
    banks = [sparse.get_submodule(f"{name}.experts").get_parameter("up_proj").shape[0] for name in sparse.routers]
    return [(bank, r.num_experts, r.top_k) for bank, r in zip(banks, sparse.routers.values(), strict=True)]


def test_overrides_end_to_end() -> None:
    """Protects: each layer of the graph has its own experts, they are exact, and the report has its own numbers."""
    model = Bert(BertConfig()).eval()
    overrides = {"*.1.*": {"num_experts": 4, "top_k": 2, "num_shared_experts": 0}}
    sparse = sparsify(model, (IDS,), calibration=batches(), refit=False, overrides=overrides, **OPTIONS)
    assert expert_banks(sparse) == [(7, 7, 2), (4, 4, 2)]
    first, second = sparse.report.ffns
    assert (first.num_experts, first.top_k, first.num_shared_experts) == (8, 3, 1)
    assert (second.num_experts, second.top_k, second.num_shared_experts) == (4, 2, 0)
    assert len(second.tokens_per_expert) == 4
    assert second.flops_after == second.flops_before * 2 // 4 + 2 * (64 * 8 + 8 * 4)
    assert sparse.report.max_receipt <= 1e-5
    with pytest.raises(ValueError, match=r"top_k must be between 1 and 4 for layers\.1"):
        sparse.set_top_k(5)
    sparse.set_top_k(4)
    assert [router.top_k for router in sparse.routers.values()] == [3, 4]


def test_select_end_to_end() -> None:
    """Protects: a number converts the last FFN only; the first says why it stays dense."""
    sparse = sparsify(Bert(BertConfig()).eval(), (IDS,), select=1, **OPTIONS)
    assert list(sparse.routers) == ["layers.1.ffn"]
    assert [ffn.action for ffn in sparse.report.ffns] == ["dense", "converted"]
    assert sparse.report.ffns[0].reason == "select=1 leaves it dense"


def test_a_plan_is_edited_and_applied() -> None:
    """Protects: the plan of `inspect`, through JSON and an edit, is what happens; one of another model is refused."""
    model = Bert(BertConfig()).eval()
    document = inspect(model, (IDS,)).plan(num_experts=8, top_k=3, num_shared_experts=1).to_json()
    document["layers"][0]["num_experts"] = 0
    document["layers"][1] |= {"num_experts": 4, "top_k": 2}
    plan = ConversionPlan.from_json(document)
    sparse = sparsify(model, (IDS,), plan=plan, router_hidden_size=8, calibration=batches())
    assert expert_banks(sparse) == [(3, 3, 1)]
    assert [ffn.reason for ffn in sparse.report.ffns] == [
        "left dense by plan=",
        "converted by plan=; experts of 64 neurons",
    ]
    with pytest.raises(SelectionError, match=r"does not name h\.0\.mlp, h\.1\.mlp; it names, .* layers\.0\.ffn, "):
        sparsify(GPT(GPTConfig()).eval(), (IDS,), plan=plan)
    with pytest.raises(ValueError, match=r"plan= already says what top_k, select would"):
        sparsify(model, (IDS,), plan=plan, top_k=2, select="all")


def test_what_does_not_pay_is_listed_and_not_rejected() -> None:
    """Protects: a head and a small FFN are legal: listed, left dense with a reason, converted on demand."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 8))
            self.small = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
            self.head = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.body(x)
            return self.head(x + self.small(x))

    model, x = Classifier().eval(), torch.randn(16, 8)
    found = inspect(model, (x,))
    assert [ffn.name for ffn in found.ffns] == ["body", "small", "head"]
    assert found.rejected == []
    body, small, head = found.plan(num_experts=8, top_k=2).layers
    assert (body.converts, small.converts, head.converts) == (True, False, False)
    assert "too small to pay" in small.reason
    assert "not the FFN of a block" in head.reason
    for select, names in (("all", ["body", "small", "head"]), (["head", "small"], ["small", "head"])):
        sparse = sparsify(model, x, select=select, **OPTIONS)
        assert [ffn.name for ffn in sparse.report.converted] == names


def test_consuming_the_model_frees_its_ffn_weights() -> None:
    """Protects: dense weights are gone as soon as they are not needed, and the result is the same."""
    model = Llama(LlamaConfig()).eval()
    expected = sparsify(copy.deepcopy(model), IDS, calibration=[IDS], **OPTIONS)(IDS)
    sparse = sparsify(model, IDS, calibration=[IDS], consume_model=True, **OPTIONS)
    assert torch.equal(sparse(IDS), expected)
    emptied = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    assert len(emptied) == 6  # gate, up and down of two layers
