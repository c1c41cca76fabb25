"""`measure_choices`: what every number of parts costs, with shared ones much as a conversion would have them."""

from __future__ import annotations

import torch
from torch import nn

from sparsify import SparsifyConfig
from sparsify.passes.calibrate import Call
from sparsify.passes.capture_parts import capture_parts
from sparsify.passes.choices import Choice
from sparsify.passes.find_ffns import find_ffns
from sparsify.passes.measure_choices import measure_choices
from sparsify.passes.plan import make_plan


def choices_of(num_experts: int) -> tuple[Choice, ...]:
    """Of an FFN of 24 features and 96 neurons."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)).eval(), torch.randn(64, 24)
    (part,) = find_ffns(model, capture_parts(model, (x,), {}), (x,), {}).parts
    config = SparsifyConfig(num_experts=num_experts, select="all", top_k=1)
    plan = make_plan(part.matches, config)
    (found,) = measure_choices(part.graph_module, part.matches, plan, config, [Call((x,), {}, None)])
    return found.sparse


def test_every_number_of_parts_is_offered_once_a_way() -> None:
    """Protects: no number is lost between the clusterings; at least one part is routed beside the shared ones."""
    for num_experts in (2, 3, 8, 24):
        found = choices_of(num_experts)
        routed = [choice.top_k for choice in found if choice.way == "routed"]
        assert routed == list(range(min(2, num_experts - 1), num_experts))
        assert [choice.top_k for choice in found if choice.way == "pruned"] == list(range(1, num_experts))


def test_the_more_runs_the_more_is_shared() -> None:
    """Protects: what a budget is spent by is what the conversion then does, to an eighth of the parts."""
    for choice in choices_of(24):
        default = SparsifyConfig(num_experts=24, top_k=choice.top_k).shared
        assert choice.way == "pruned" or 0 <= default - choice.num_shared < 24 / 8


def test_errors_fall_with_the_parts_that_run() -> None:
    """Protects: errors belong to their parts: more of the same parts lose less, and choosing by token loses less."""
    found = choices_of(8)
    pruned = [choice.error for choice in found if choice.way == "pruned"]
    assert pruned == sorted(pruned, reverse=True)
    for choice in found:
        if choice.way == "routed":
            assert choice.error < pruned[choice.top_k - 1]


class Reads(nn.Module):
    """Two FFNs of 24 features on a residual stream, of which only the first 12 are read in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        return (x + self.second(x))[..., :12]


def test_an_error_counts_by_what_it_does_to_the_outputs() -> None:
    """Protects: no budget is spent on an FFN whose errors nothing reads, however large they are."""
    torch.manual_seed(0)
    model, x = Reads().eval(), torch.randn(4, 16, 24)
    model.second.get_parameter("2.weight").data[:12] = 0
    (part,) = find_ffns(model, capture_parts(model, (x,), {}), (x,), {}).parts
    config = SparsifyConfig(num_experts=8, select="all", top_k=1)
    plan = make_plan(part.matches, config)
    first, second = measure_choices(part.graph_module, part.matches, plan, config, [Call((x,), {}, None)])
    assert all(choice.error > 0 for choice in first.sparse)
    assert all(choice.error == 0 for choice in second.sparse)
    half = next(choice for choice in first.sparse if choice.way == "pruned" and choice.top_k == 4)
    assert 0.001 < half.error < 1


class Shifts(nn.Module):
    """Two FFNs of which the second adds the same number to all outputs, which have a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.first, self.second = (nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)) for _ in range(2))
        last = self.second.get_parameter("2.weight").data
        last[:] = last[:1]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x + self.first(x)
        return {self.name: x + self.second(x), "mean": x.mean(-1)}


def test_logits_count_by_their_probabilities() -> None:
    """Protects: what moves all logits alike moves no probability; outputs of another name count as they are."""
    x, config = torch.randn(4, 16, 24), SparsifyConfig(num_experts=8, select="all", top_k=1)
    errors: dict[str, list[float]] = {}
    for name in ("logits", "features"):
        torch.manual_seed(0)
        model = Shifts(name).eval()
        (part,) = find_ffns(model, capture_parts(model, (x,), {}), (x,), {}).parts
        plan = make_plan(part.matches, config)
        found = measure_choices(part.graph_module, part.matches, plan, config, [Call((x,), {}, None)])
        errors[name] = [choices.sparse[-4].error for choices in found]
    assert errors["logits"][1] < 1e-5 * errors["logits"][0]
    assert errors["features"][1] > 0.1 * errors["features"][0]
