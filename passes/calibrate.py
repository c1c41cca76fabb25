"""Run calibration batches through the graph piece by piece, and hand over the tokens that an FFN reads.

The graph may be edited ahead of the point that was reached: what is converted early feeds what is converted late. Only
the values that are still needed are kept for each batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from sparsify.errors import CalibrationError

_MASK = "attention_mask"  # the keyword of Hugging Face tokenizers; 0 marks padding, which no statistic should see


class CalibrationStream:
    """Batches on their way through a graph module. Not finite values and batches that do not fit are refused."""

    def __init__(self, graph_module: GraphModule, batches: Iterable[object], max_tokens: int) -> None:
        """Flatten the batches to the inputs of the graph.

        Args:
            graph_module: a captured model.
            batches: `(args, kwargs)`, tuples of arguments, dicts of keyword arguments, or single tensors.
            max_tokens: no further batch is read once this many tokens were seen.

        Raises:
            CalibrationError: there is no batch, or one does not fit the model, or holds values that are not finite.
        """
        self._graph_module = graph_module
        self._interpreter = Interpreter(graph_module, garbage_collect_values=False)
        self._executed: set[Node] = set()
        self._environments: list[dict[Node, Any]] = []
        self._masks: list[Tensor | None] = []
        inputs = graph_module.graph.find_nodes(op="placeholder")
        for index, batch in enumerate(_read(batches, max_tokens)):
            args, kwargs = as_call(batch)
            values = _flatten(graph_module, args, kwargs, index)
            _check_finite(inputs, values, index)
            self._environments.append(dict(zip(inputs, values, strict=True)))
            self._masks.append(_token_mask(kwargs))
        if not self._environments:
            raise CalibrationError(
                "the calibration data is empty: no batch came out of it. Pass an iterable of batches (a generator can "
                "be read only once), or calibration=None for a conversion from the weights alone."
            )
        self._executed.update(inputs)

    def tokens_at(self, node: Node, name: str) -> Tensor:
        """Run every batch up to `node` `[..., D]`.

        Args:
            node: the input of an FFN.
            name: of the FFN, for the error message.

        Returns:
            `[T, D]`, the tokens of all batches without padding, fp32 (fp64 in an fp64 model).

        Raises:
            CalibrationError: a token is not finite, or no token is left.
        """
        self._advance(node)
        found: list[Tensor] = []
        for index, (environment, mask) in enumerate(zip(self._environments, self._masks, strict=True)):
            tokens = _select(environment[node], mask)
            if not torch.isfinite(tokens).all():
                raise CalibrationError(
                    f"calibration batch {index} leads to NaN or infinite values at the input of {name}; remove that "
                    "batch, or check that the model itself runs on it (fp16 overflows above 65504)."
                )
            found.append(tokens)
        tokens = torch.cat(found)
        if not len(tokens):
            raise CalibrationError(f"no calibration token reaches {name}: every batch is empty or masked out.")
        return tokens if tokens.dtype == torch.float64 else tokens.float()

    def _advance(self, node: Node) -> None:
        """Execute, in graph order, what lies before `node` and `node` itself; forget what nobody needs any more."""
        todo: list[Node] = []
        for candidate in self._graph_module.graph.nodes:
            todo += [candidate] if candidate not in self._executed else []
            if candidate is node:
                break
        for environment in self._environments:
            self._run(todo, environment)
        self._executed.update(todo)
        for environment in self._environments:
            for value in [v for v in environment if v is not node and self._executed.issuperset(v.users)]:
                del environment[value]

    def _run(self, nodes: Sequence[Node], environment: dict[Node, Any]) -> None:
        last_use = {arg: node for node in nodes for arg in node.all_input_nodes}
        self._interpreter.env = environment
        for node in nodes:
            environment[node] = self._interpreter.run_node(node)
            spent = (arg for arg in node.all_input_nodes if last_use[arg] is node)
            for arg in [arg for arg in spent if self._executed.union(nodes).issuperset(arg.users)]:
                del environment[arg]


def as_call(batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The `(args, kwargs)` of a batch in any of its accepted forms."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    if not isinstance(batch, (tuple, list)):
        raise CalibrationError(
            f"a calibration batch must be (args, kwargs), a tuple, a dict or a tensor, got {type(batch).__name__}"
        )
    is_call = len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], Mapping)
    return (tuple(batch[0]), dict(batch[1])) if is_call else (tuple(batch), {})


def _read(batches: Iterable[object], max_tokens: int) -> Iterator[object]:
    """Batches until `max_tokens`; a batch counts the positions of its mask, or of its first tensor."""
    seen = 0
    for batch in batches:
        yield batch
        args, kwargs = as_call(batch)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mask = _token_mask(kwargs)
        seen += int(mask.sum()) if mask is not None else _positions(tensors[0]) if tensors else 0
        if seen >= max_tokens:
            return


def _positions(tensor: Tensor) -> int:
    """Token ids count each; of floating features the last dimension is the features."""
    return tensor.numel() // (tensor.shape[-1] if tensor.is_floating_point() and tensor.dim() > 1 else 1)


def _token_mask(kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = kwargs.get(_MASK)
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _select(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """`[..., D]` to `[T, D]`, without the padding where the mask speaks of these tokens."""
    if mask is not None and tokens.shape[:-1] == mask.shape:
        return tokens[mask]
    return tokens.reshape(-1, tokens.shape[-1])


def _flatten(graph_module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> list[Any]:
    spec: pytree.TreeSpec = getattr(graph_module, "_in_spec")  # noqa: B009 - no public way to it
    names = list(spec.children()[1].context or ())
    if set(names) == set(kwargs):
        kwargs = {name: kwargs[name] for name in names}
    values, given = pytree.tree_flatten((args, kwargs))
    if given != spec:
        raise CalibrationError(
            f"calibration batch {index} has {len(args)} positional inputs and the keywords {list(kwargs)}, but the "
            f"model was captured with {spec.children()[0].num_children} and {names}; give both the same structure."
        )
    return values


def _check_finite(inputs: Sequence[Node], values: Sequence[object], index: int) -> None:
    for node, value in zip(inputs, values, strict=True):
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise CalibrationError(f"input `{node.name}` of calibration batch {index} holds NaN or infinite values.")
