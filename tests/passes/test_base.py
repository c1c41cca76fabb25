"""`Pass`, `PassManager`: the contract is checked, not trusted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.fx import GraphModule, symbolic_trace

from sparsify.errors import PassError
from sparsify.passes.base import Pass, PassManager, PassResult


def traced() -> GraphModule:
    """X -> relu(x) + 1."""
    return symbolic_trace(lambda x: torch.relu(x) + 1)


@dataclass(frozen=True)
class Nothing(Pass):
    def call(self, graph_module: GraphModule) -> PassResult:
        return PassResult(graph_module, modified=False)


@dataclass(frozen=True)
class ReluToTanh(Pass):
    modified: bool = True

    def call(self, graph_module: GraphModule) -> PassResult:
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.relu):
            node.target = torch.tanh
            node.name = "tanh_of_it"
        return PassResult(graph_module, self.modified)


@dataclass(frozen=True)
class Fails(Pass):
    def call(self, graph_module: GraphModule) -> PassResult:
        raise KeyError("lost")


def test_recompiles_and_reports() -> None:
    """Protects: after a pass, the module computes what its graph says."""
    result = ReluToTanh()(traced())
    assert result.modified
    torch.testing.assert_close(result.graph_module(torch.tensor(-1.0)), torch.tanh(torch.tensor(-1.0)) + 1)


def test_catches_a_lie_about_modified() -> None:
    """Protects: `modified` is honest, so a loop over passes can stop."""
    with pytest.raises(PassError, match="ReluToTanh changed the graph but reports modified=False"):
        ReluToTanh(modified=False)(traced())


def test_ensures_sees_the_result() -> None:
    """Protects: the postcondition is checked on the new module, not on the input."""
    seen: list[GraphModule] = []

    @dataclass(frozen=True)
    class Fresh(Nothing):
        def call(self, graph_module: GraphModule) -> PassResult:
            return PassResult(traced(), modified=True)

        def ensures(self, graph_module: GraphModule) -> None:
            seen.append(graph_module)

    given = traced()
    assert Fresh()(given).graph_module is seen[0] is not given


def test_manager_names_the_failed_pass_and_those_before() -> None:
    """Protects: an error in a pipeline says where it happened."""
    with pytest.raises(PassError, match=r"Fails failed after \[Nothing, ReluToTanh\].*lost"):
        PassManager((Nothing(), ReluToTanh(), Fails()))(traced())


def test_manager_adds_up_modified() -> None:
    """Protects: a pipeline reports a change of any of its passes."""
    assert PassManager((ReluToTanh(), Nothing()))(traced()).modified
    assert not PassManager((Nothing(),))(traced()).modified
