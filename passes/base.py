"""Everything about being a pass: `Pass`, `PassResult`, `PassManager`.

A pass is one transformation of a graph. A stage that returns a value (match, plan) is a plain function instead.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from sparsify.errors import PassError


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the graph module, and whether its graph was changed."""

    graph_module: GraphModule
    modified: bool


class Pass(abc.ABC):
    """One transformation. Its options are the fields of a frozen dataclass; `requires` and `ensures` are optional."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Check `requires`, transform, check what was declared, and check `ensures` on the result.

        Raises:
            PassError: the pass changed the graph but reports that it did not, or left a graph that is not valid.
        """
        before = str(graph_module.graph)
        self.requires(graph_module)
        result = self.call(graph_module)
        if not result.modified and str(result.graph_module.graph) != before:
            raise PassError(f"{type(self).__name__} changed the graph but reports modified=False; report what it did")
        result.graph_module.graph.lint()
        result.graph_module.recompile()
        self.ensures(result.graph_module)
        return result

    @abc.abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult:
        """Transform the graph, in place or into a new module."""

    def requires(self, graph_module: GraphModule) -> None:
        """Raise `PassError` if the pass cannot work on this graph."""

    def ensures(self, graph_module: GraphModule) -> None:
        """Raise `PassError` if the result is not what the pass promises."""


@dataclass(frozen=True)
class PassManager:
    """Runs passes in the order given."""

    passes: Sequence[Pass]

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Run all passes.

        Raises:
            PassError: a pass failed; the message names it and those that ran before it.
        """
        modified = False
        done: list[str] = []
        for step in self.passes:
            name = type(step).__name__
            try:
                result = step(graph_module)
            except Exception as error:
                raise PassError(f"{name} failed after [{', '.join(done)}]: {error}") from error
            graph_module, modified = result.graph_module, modified or result.modified
            done.append(name)
        return PassResult(graph_module, modified)
