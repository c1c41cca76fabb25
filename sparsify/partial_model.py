"""The result for a model that cannot be traced as a whole: the model itself, with experts in modules of parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import fx, nn

from sparsify.errors import OutputError
from sparsify.routers import Router
from sparsify.sparse_model import SparseModel, SparseModelInfo

_CALL = "call"


class PartialSparseModel(SparseModel):
    """A `SparseModel` whose graph is one call: of a copy of the dense model that experts were grafted into.

    It computes, trains and grafts as any other. It cannot be saved as a graph or exported, as its graph hides the code
    that could not be traced; keep the state dict of `original` instead.
    """

    @classmethod
    def around(cls, original: nn.Module, info: SparseModelInfo) -> PartialSparseModel:
        """Wrap a model with grafted experts.

        Args:
            original: where the experts of `info.covers` are.
            info: as in any `SparseModel`.
        """
        graph = fx.Graph()
        args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
        graph.output(graph.call_module(_CALL, (args, kwargs)))
        root = nn.Module()
        root.add_module(_CALL, _Call(original))
        root.training = original.training  # of the whole; submodules keep their own
        partial = cls(root, graph)
        partial.info = info
        return partial

    @property
    def original(self) -> nn.Module:
        """The model of the original class, experts in it."""
        return self.get_submodule(f"{_CALL}.model")

    @property
    def routers(self) -> dict[str, Router]:
        """The router of every converted FFN, by the name of the FFN."""
        return {name: self._module_of(name).router for name in self.info.covers}

    def expert_module(self, name: str, parameter: str = "x") -> fx.GraphModule:
        """The experts of one converted FFN: the module that stands in `original`."""
        return self._module_of(name)

    def save(self, path: str | Path) -> None:
        """Refuse: there is no graph of the whole model.

        Raises:
            OutputError: always.
        """
        raise OutputError(
            f"{type(self.original).__name__} was not traced as a whole (see the notes of the report), so it has no "
            f"graph to save to {path}. Save sparse.original.state_dict(); to read it, convert the dense model again "
            "with the same options and load it into the new sparse.original."
        )

    def to_dense(self) -> fx.GraphModule:
        """Refuse: there is no graph of the whole model.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self.original).__name__} was not traced as a whole (see the notes of the report), so it cannot be "
            "rewritten as a dense model; keep the dense model that was converted"
        )

    def _module_of(self, name: str) -> Any:
        return self.original.get_submodule(self.info.covers[name].modules[0])


class _Call(nn.Module):
    """Calls the model with arguments that a graph cannot unpack."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model(*args, **kwargs)


def copy_modules(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model that shares its parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
