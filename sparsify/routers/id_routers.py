"""Routers that read an integer of every token, its id or a label, beside or instead of its features."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from sparsify.routers.base import Reads, Router


class IdRouter(Router):
    """`forward(x, ids)`. A subclass defines `route_by_id` and `num_ids`, the size of its table."""

    num_ids: int

    @property
    def reads(self) -> Reads | None:
        """Token ids, or other integers of the model's input."""
        return "ids"

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Refuse: there are no ids.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"the router {self.system.name!r} reads an integer of every token: call router(x, ids)")

    def check_ids(self, ids: Tensor) -> None:
        """As `check_ids`, for the ids of the table."""
        check_ids(ids, self.num_ids, self.system.name, self.advice)

    @property
    def advice(self) -> str:
        """What to do about an id outside the table."""
        return "give a larger num_ids in router_options"


class LabelRouter(IdRouter):
    """An `IdRouter` whose ids are labels (a task, a language, a domain): few, and given by the caller."""

    @property
    def reads(self) -> Reads | None:
        """Labels."""
        return "labels"

    @abc.abstractmethod
    def specialised(self, label: int) -> tuple[Router, list[int]]:
        """What is left for one label.

        Args:
            label: below `num_ids`.

        Returns:
            A router that reads no labels, and the experts that it routes to, by their old numbers in its order.
        """

    @property
    def advice(self) -> str:
        """What to do about a label outside the table."""
        return "give num_labels in router_options as large as there are labels, or correct the label"


def check_ids(ids: Tensor, count: int, name: str, advice: str) -> None:
    """Refuse ids that are not below `count`, where their values can be read without waiting for a GPU.

    Raises:
        ValueError: names the router, the id, the size of its table and what to do.
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        if count == 0:
            raise ValueError(
                f"the router {name!r} has no table yet, as no embedding reads its ids: give num_ids in router_options, "
                f"at least {high + 1} for these"
            )
        raise ValueError(f"the router {name!r} knows the ids 0 to {count - 1}, got {wrong}; {advice}")
