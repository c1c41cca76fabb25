"""Other ways to group neurons, to compare with ours: each takes the place of `activation_profiles`.

A clustering is what it calls similar: it gives every neuron a row, and balanced k-means joins neurons of similar rows.
T tokens, D hidden_size, F intermediate_size, D_out output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from quality_subjects import Subject
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from sparsify.passes.calibrate import as_call, flat_inputs, select_tokens
from sparsify.passes.capture import capture
from sparsify.passes.graph_values import tensor_leaves
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.dense_ffn import DenseFFN, read_ffn
from sparsify.passes.split.fold_vectors import fold_vectors
from sparsify.passes.split.split_ffn import SplitResult, split_ffn

Profiles = Callable[[DenseFFN, Tensor], Tensor]

_SAMPLE = 1536  # tokens
_SKETCH = 2048  # random features of a product of two
_BATCHES = 12  # that gradients are taken on


def clustered_by(profiles: Profiles) -> Callable[..., SplitResult]:
    """Our split, by another similarity."""

    def split(*args: Any, **kwargs: Any) -> SplitResult:
        with mock.patch("sparsify.passes.split.split_ffn.activation_profiles", profiles):
            return split_ffn(*args, **kwargs)

    return split


def weights(dense: DenseFFN, x: Tensor) -> Tensor:
    """`[F, D]` or twice as wide: directions of the rows of the projections (MoEfication, arXiv 2110.01786)."""
    return torch.cat([functional.normalize(project.weight, dim=1) for project in dense.projections], dim=1)


def magnitude(dense: DenseFFN, x: Tensor) -> Tensor:
    """`[F, T]`: as ours, of the distance from the mean without its sign, which is what the norm of an expert sees."""
    size = _deviations(dense, x).abs()  # [T, F]
    return functional.normalize((size - size.mean(0)).t(), dim=1)


def output(dense: DenseFFN, x: Tensor) -> Tensor:
    """`[F, 2048]`: neurons whose contributions `h_j(t) W[:, j]` to the output are similar, over tokens and features.

    Their inner product is that of the activations times that of the columns: random features of both, multiplied.
    """
    hidden = _deviations(dense, x).t()  # [F, T]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(hidden.shape[1], _SKETCH, generator=generator)
    features = torch.randn(len(dense.down.weight), _SKETCH, generator=generator)
    return functional.normalize((hidden @ tokens) * (dense.down.weight.t() @ features), dim=1)


class Fisher:
    """What a neuron changes in the output of the model: `h_j(t) <W[:, j], g(t)>`, g the gradient at the FFN's output.

    The loss is that of outputs drawn around those of the model, with unit variance: its gradient is a random direction
    of the outputs, taken back by `torch.func.vjp`.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Tensor, Tensor]] = []

    def measure(self, subject: Subject, batches: list[Any]) -> None:
        """Keep inputs and gradients of every FFN of the dense model."""
        graph_module = NormalizeLinearPass()(capture(subject.model, (), subject.example)).graph_module
        matches, _ = match_ffn(graph_module)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {match.name: [] for match in matches}
        generator = torch.Generator().manual_seed(0)
        for index, batch in enumerate(batches[:_BATCHES]):
            call = as_call(batch)
            inputs = flat_inputs(graph_module, call, index)
            read, written = ([getattr(match.sites[0], end) for match in matches] for end in ("x", "down"))
            seen: dict[str, Tensor] = {}
            _Moved(graph_module, {}, {*read, *written}, seen).run(*inputs)
            zeros = {name: torch.zeros_like(seen[name]) for name in written}

            def outputs(moved: Mapping[str, Tensor], inputs: list[Any] = inputs) -> Tensor:
                found = _Moved(graph_module, moved, set(), {}).run(*inputs)
                return next(tensor for tensor in tensor_leaves(found) if tensor.is_floating_point())

            value, back, *_ = torch.func.vjp(outputs, zeros)
            (gradients,) = back(torch.randn(value.shape, generator=generator))
            for match in matches:
                x, g = seen[match.sites[0].x], gradients[match.sites[0].down]
                pair = (select_tokens(x, call.mask), select_tokens(g.reshape(*x.shape[:-1], -1), call.mask))
                found[match.name].append(pair)
        for match in matches:
            _, dense = fold_vectors(match, read_ffn(graph_module, match))
            x, gradient = (torch.cat(column) for column in zip(*found[match.name], strict=True))
            self._known.append((dense.down.weight, x, gradient))

    def __call__(self, dense: DenseFFN, x: Tensor) -> Tensor:
        """`[F, T]`."""
        weight = dense.down.weight
        _, x, gradient = next(known for known in self._known if torch.equal(known[0], weight))
        step = -(-len(x) // _SAMPLE)
        return functional.normalize((_deviations(dense, x) * (gradient[::step] @ weight)).t(), dim=1)


class _Moved(Interpreter):
    """Runs a graph, adds a tensor to some values, and puts some into `seen`."""

    def __init__(
        self, graph_module: GraphModule, moved: Mapping[str, Tensor], wanted: set[str], seen: dict[str, Tensor]
    ) -> None:
        super().__init__(graph_module)
        self._moved, self._wanted, self._seen = moved, wanted, seen

    def run_node(self, n: Node) -> Any:
        """One value."""
        value = super().run_node(n)
        if n.name in self._moved:
            value = value + self._moved[n.name]
        if n.name in self._wanted:
            self._seen[n.name] = value.detach()
        return value


def _deviations(dense: DenseFFN, x: Tensor) -> Tensor:
    """`[T', F]`: from the mean, on at most 1536 evenly spaced tokens."""
    hidden = dense.hidden(x[:: -(-len(x) // _SAMPLE)])
    return hidden - hidden.mean(0)
