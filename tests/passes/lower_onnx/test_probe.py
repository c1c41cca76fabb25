"""The PyTorch side of a comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.passes.capture import capture
from sparsify.passes.find_layers import find_layers
from sparsify.passes.lower_onnx.flat_graph import FlatGraph, flatten_graph
from sparsify.passes.lower_onnx.probe import references
from sparsify.sparse_model import SparseModel


def _flat(sparse: SparseModel) -> FlatGraph:
    return flatten_graph(sparse, sparse.info.args, sparse.info.kwargs, sparse.dynamic_dims())


def test_changes_every_size(sparse_transformer) -> None:
    """A file that is right at the traced sizes only must not pass: 1, a prime and a larger value, for every size."""
    flat = _flat(sparse_transformer())
    found = list(references(flat, find_layers(flat.root, flat.graph)))[:4]
    assert found[0].sizes == {"batch": 2, "sequence": 5}
    for name in ("batch", "sequence"):
        values = [reference.sizes[name] for reference in found]
        assert len(set(values)) == 4
        assert {1, 7} < set(values)
    assert all(len(reference.outputs) == 2 for reference in found)


def test_keeps_ids_and_gaps(sparse_transformer) -> None:
    """The gap is what decides whether a difference is a near tie."""
    sparse = sparse_transformer()
    flat = _flat(sparse)
    layers = find_layers(flat.root, flat.graph)
    reference = next(iter(references(flat, layers)))
    inputs: list[Tensor] = []
    router = sparse.get_submodule("layers.0.router")
    router.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    sparse(*sparse.info.args, **sparse.info.kwargs)
    logits = router.logits(inputs[0])
    ranked = logits.sort(-1, descending=True)
    assert torch.equal(reference.expert_ids[0], ranked.indices[:, :2])
    gaps = (ranked.values[:, 1] - ranked.values[:, 2]) / logits.abs().max(-1).values
    torch.testing.assert_close(reference.gaps[0], gaps.detach())


class _Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unfold(0, 4, 4).sum(-1)


def test_leaves_out_sizes_that_the_model_refuses() -> None:
    """PyTorch decides what is a valid input; larger sizes are tried then."""
    model = capture(_Picky(), (torch.randn(8, 2),))
    flat = flatten_graph(model, (torch.randn(8, 2),), {}, {"x": {0: "s0"}})
    found = [reference.sizes["batch"] for reference in references(flat, [])]
    assert min(found) >= 4
    assert len(found) >= 4
