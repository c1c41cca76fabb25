"""Routers that read an integer of every token, its id or a label, beside or instead of its features."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from sparsify.routers.base import Router


class IdRouter(Router):
    """`forward(x, ids)`. A subclass defines `route_by_id` and `num_ids`, the size of its table."""

    reads_ids: ClassVar[bool] = True
    num_ids: int

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Refuse: there are no ids.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"the router {self.system.name!r} reads an integer of every token: call router(x, ids)")

    def check_ids(self, ids: Tensor) -> None:
        """Refuse ids outside the table, where their values can be read without waiting for a GPU.

        Raises:
            ValueError: names the id and the size of the table.
        """
        if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
            return
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= self.num_ids:
            wrong = low if low < 0 else high
            raise ValueError(
                f"the router {self.system.name!r} knows the ids 0 to {self.num_ids - 1}, got {wrong}; {self.advice}"
            )

    @property
    def advice(self) -> str:
        """What to do about an id outside the table."""
        return "give a larger num_ids in router_options"


class LabelRouter(IdRouter):
    """An `IdRouter` whose ids are labels (a task, a language, a domain): few, and given by the caller."""

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
