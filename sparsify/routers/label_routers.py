"""Routers that go by a label of the token: its task, language or domain.

DEMix (arXiv 2108.05036): the label is the expert. Task-MoE (arXiv 2110.03742): a label has logits of its own. MMoE (Ma
et al., KDD 2018): a label has a gate of its own, which mixes all experts. T tokens, E num_experts, L num_labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, System, WeightRule, require_one, wide
from sparsify.routers.fixed_router import FixedRouter
from sparsify.routers.id_routers import LabelRouter
from sparsify.routers.top_k_router import TopKRouter

_INIT_STD = 0.02


class DEMixRouter(LabelRouter):
    """Expert e for label e, weight 1. Language-specific layers (arXiv 2010.11125) are the same with languages."""

    system = System(
        name="demix",
        paper="DEMix Layers: Disentangling Domains for Modular Language Modeling (arXiv 2108.05036); language-specific "
        "layers (arXiv 2010.11125)",
        mechanism="the label, a domain, language or task, is the expert; weight 1",
        export_form="table",
        needs=("labels",),
    )
    default_top_k = 1

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.num_ids = num_experts

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    @property
    def advice(self) -> str:
        """There are as many labels as experts."""
        return "give num_experts as large as there are labels, or correct the label"

    @property
    def rule(self) -> WeightRule:
        """A single weight of 1."""
        return "one"

    def route_by_id(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """One slot."""
        self.check_ids(ids)
        return x.new_ones(x.shape[0], 1), ids.unsqueeze(-1)

    def specialised(self, label: int) -> tuple[Router, list[int]]:
        """One expert."""
        return FixedRouter(self.hidden_size, 1, 1), [label]


class TaskMoERouter(LabelRouter):
    """The K largest logits of the label, weighted by their softmax: all tokens of a task have the same experts."""

    system = System(
        name="task-moe",
        paper="Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference (arXiv 2110.03742)",
        mechanism="the K largest logits of the label, weighted by their softmax",
        export_form="table",
        needs=("labels",),
    )

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, num_labels: int = 2) -> None:
        """Draw the logits.

        Args:
            num_labels: L.
        """
        super().__init__(hidden_size, num_experts, top_k)
        self.num_labels = self.num_ids = num_labels
        self.weight = nn.Parameter(torch.randn(num_labels, num_experts) * _INIT_STD)

    @property
    def rule(self) -> WeightRule:
        """The weights of a token sum to 1."""
        return "one" if self.weights == "one" else "sum"

    def route_by_id(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """By falling logit."""
        self.check_ids(ids)
        logits = wide(self.weight).to(wide(x).dtype).index_select(0, ids)
        logits, experts = torch.topk(logits, self.top_k, dim=-1)
        return torch.softmax(logits, dim=-1), experts

    def specialised(self, label: int) -> tuple[Router, list[int]]:
        """Its K experts, and their weights."""
        logits, experts = torch.topk(wide(self.weight.detach())[label], self.top_k)
        router = FixedRouter(self.hidden_size, self.top_k, self.top_k)
        router.weight.data.copy_(logits)
        return router, experts.tolist()


class MMoERouter(LabelRouter):
    """All experts run; the gate of the label, linear in the token, mixes them."""

    system = System(
        name="mmoe",
        paper="Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts (KDD 2018)",
        mechanism="all experts, weighted by the softmax of the label's own linear gate",
        export_form="mixing",
        needs=("labels",),
    )
    default_top_k = 4

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, num_labels: int = 2) -> None:
        """Draw the gates.

        Args:
            top_k: E.
            num_labels: L.
        """
        super().__init__(hidden_size, num_experts, top_k)
        self.num_labels = self.num_ids = num_labels
        self.weight = nn.Parameter(torch.randn(num_labels * num_experts, hidden_size) * _INIT_STD)

    def check_top_k(self, top_k: int) -> None:
        """All experts run."""
        super().check_top_k(top_k)
        if top_k != self.num_experts:
            raise ValueError(f"the router 'mmoe' mixes all experts: give top_k={self.num_experts}, got {top_k}")

    @property
    def rule(self) -> WeightRule:
        """The weights of a token sum to 1."""
        return "one" if self.weights == "one" else "sum"

    def route_by_id(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Slot e is expert e."""
        self.check_ids(ids)
        tokens = wide(x)
        logits = nn.functional.linear(tokens, wide(self.weight).to(tokens.dtype))  # of all gates
        logits = logits.view(x.shape[0], self.num_labels, self.num_experts)
        place = ids.view(-1, 1, 1).expand(-1, 1, self.num_experts)
        weights = torch.softmax(logits.gather(1, place).squeeze(1), dim=-1)
        return weights, torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)

    def specialised(self, label: int) -> tuple[Router, list[int]]:
        """All experts, behind one gate."""
        router = TopKRouter(self.hidden_size, self.num_experts, self.num_experts)
        router.weight.data.copy_(self.weight.detach().view(self.num_labels, self.num_experts, -1)[label])
        return router, list(range(self.num_experts))
