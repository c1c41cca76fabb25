"""Run calibration batches through the graph piece by piece, and hand over the tokens that an FFN reads.

The graph may be edited ahead of the point that was reached: what is converted early feeds what is converted late. Only
the values that are still needed are kept for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from sparsify.errors import CalibrationError
from sparsify.passes.graph_values import floating_leaves, tensor_leaves
from sparsify.passes.heap import trim_at_times, trim_heap
from sparsify.passes.on_disk import all_to_disk, drop_pages
from sparsify.passes.token_layout import before_flattening

_MASK = "attention_mask"  # the keyword of Hugging Face tokenizers; 0 marks padding, which no statistic should see


@dataclass(frozen=True)
class Call:
    """A batch.

    Attributes:
        args: what the model is called with.
        kwargs: the keyword inputs.
        mask: which tokens are no padding, bool; None if all of them count.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None


class CalibrationStream:
    """Batches on their way through a graph module. Not finite values and batches that do not fit are refused."""

    def __init__(self, graph_module: GraphModule, batches: Sequence[Call], *, on_disk: bool = False) -> None:
        """Flatten the batches to the inputs of the graph.

        Args:
            graph_module: a captured model.
            batches: see `read_batches`.
            on_disk: keep the values that later nodes need in temporary files.

        Raises:
            CalibrationError: a batch does not fit the model, or holds values that are not finite.
        """
        self._graph_module = graph_module
        self._on_disk = on_disk
        self._interpreter = Interpreter(graph_module, garbage_collect_values=False)
        self._executed: set[Node] = set()
        self._environments: list[dict[Node, Any]] = []
        self._masks: list[Tensor | None] = []
        inputs = graph_module.graph.find_nodes(op="placeholder")
        for index, batch in enumerate(batches):
            values = flat_inputs(graph_module, batch, index)
            _check_finite(inputs, values, index)
            self._environments.append(dict(zip(inputs, values, strict=True)))
            self._masks.append(batch.mask)
        self._executed.update(inputs)

    def tokens_at(self, places: Sequence[tuple[str, int]], name: str, ids: Sequence[str] = ()) -> list[Tensor]:
        """Run every batch as far as needed to know some nodes.

        Args:
            places: names of nodes, the input of an FFN and others that were not passed yet, each with the axis of its
                features, counted from the end.
            name: of the FFN, for the error message.
            ids: names of nodes that hold an integer, or an embedding, for every token.

        Returns:
            `[T, D]` per node: the tokens of all batches without padding, fp32 (fp64 in an fp64 model); then `[T]` int64
            or `[T, A]` for each of `ids`.

        Raises:
            CalibrationError: a token is not finite, or no token is left.
        """
        parts = list(self.batches_at(places, name, ids))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def batches_at(
        self, places: Sequence[tuple[str, int]], name: str, ids: Sequence[str] = ()
    ) -> Iterator[list[Tensor]]:
        """As `tokens_at`, batch after batch, so that not all tokens need be held at once. A batch may hold no token."""
        by_name = {node.name: node for node in self._graph_module.graph.nodes}
        wanted = [(by_name[node], axis) for node, axis in places]
        id_nodes = [by_name[node] for node in ids]
        self._advance([*(node for node, _ in wanted), *id_nodes])
        self._require_tokens(wanted[0], name)
        for index, (environment, mask) in enumerate(zip(self._environments, self._masks, strict=True)):
            tokens = [_read_tokens(environment[node], axis, mask, index, name) for node, axis in wanted]
            yield [*tokens, *(_read_ids(environment[node], mask) for node in id_nodes)]
            for node, _ in wanted:
                drop_pages(environment[node])

    def pass_by(self, names: Sequence[str]) -> None:
        """Execute these nodes, whose inputs are held, and no others; hold no value that only they still had to read."""
        by_name = {node.name: node for node in self._graph_module.graph.nodes}
        self._execute([by_name[name] for name in names], ())

    def value(self, name: str, index: int) -> Tensor:
        """Of a node that `tokens_at` was just asked for, in one batch."""
        return next(value for node, value in self._environments[index].items() if node.name == name)

    def outputs(self, index: int, replaced: str = "", by: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Run one batch to its end; the stream stays where it is.

        Args:
            index: of the batch.
            replaced: the name of a node that was not passed yet.
            by: what its value is replaced by.

        Returns:
            The floating outputs of the graph that have a dimension, without padding.
        """
        environment = dict(self._environments[index])
        self._interpreter.env = environment
        todo = [node for node in self._graph_module.graph.nodes if node not in self._executed]
        last_use = {arg: node for node in todo for arg in node.all_input_nodes}
        result: Any = None
        for node in todo:
            result = environment[node] = self._interpreter.run_node(node)
            if by is not None and node.name == replaced:
                environment[node] = by(result)
            for arg in [arg for arg in node.all_input_nodes if last_use[arg] is node]:
                environment.pop(arg, None)
        return [select_tokens(tensor, self._masks[index]) for tensor in floating_leaves(result)]

    def has_passed(self, name: str) -> bool:
        """The node was executed for every batch, so what it reads is not needed any more."""
        return any(node.name == name for node in self._executed)

    def _require_tokens(self, place: tuple[Node, int], name: str) -> None:
        node, axis = place
        pairs = zip(self._environments, self._masks, strict=True)
        if not any(len(select_tokens(environment[node].movedim(axis, -1), mask)) for environment, mask in pairs):
            raise CalibrationError(f"no calibration token reaches {name}: every batch is empty or masked out.")

    def _advance(self, wanted: Sequence[Node]) -> None:
        """Execute, in graph order, all up to the last of `wanted`; forget what neither it nor a later node needs."""
        order = list(self._graph_module.graph.nodes)
        last = max(order.index(node) for node in wanted)
        self._execute([node for node in order[: last + 1] if node not in self._executed], wanted)

    def _execute(self, todo: Sequence[Node], wanted: Sequence[Node]) -> None:
        self._executed.update(todo)
        order = self._graph_module.graph.nodes
        needed = {node for node in order if node in wanted or not self._executed.issuperset(node.users)}
        needed |= {node for node in order if node.op == "placeholder"}  # experts may read sizes off inputs
        needed |= {before_flattening(node, -1) for node in wanted}  # which routers of groups read
        last_use = {arg: node for node in todo for arg in node.all_input_nodes}
        held = [*self._graph_module.parameters(), *self._graph_module.buffers()]
        weights = {tensor.untyped_storage().data_ptr() for tensor in held}
        # The largest first: what is freed then serves the others.
        for index, environment in enumerate(sorted(self._environments, key=_size, reverse=True)):
            self._run(todo, environment, last_use, needed)
            if self._on_disk:
                _move_to_disk(environment, weights)
            trim_at_times(index)
        trim_heap()

    def _run(
        self, todo: Sequence[Node], environment: dict[Node, Any], last_use: Mapping[Node, Node], needed: set[Node]
    ) -> None:
        self._interpreter.env = environment
        for node in todo:
            environment[node] = self._interpreter.run_node(node)
            for arg in [arg for arg in node.all_input_nodes if last_use[arg] is node and arg not in needed]:
                del environment[arg]
        for value in [value for value in environment if value not in needed]:
            del environment[value]


def _size(environment: Mapping[Node, Any]) -> int:
    return sum(tensor.numel() for tensor in tensor_leaves(list(environment.values())))


def _move_to_disk(environment: dict[Node, Any], weights: set[int]) -> None:
    """Values that were computed; neither `weights`, by the addresses of their memory, nor views of them."""
    computed = [(node, value) for node, value in environment.items() if node.op != "placeholder" and _is_plain(value)]
    own = [(node, value) for node, value in computed if value.untyped_storage().data_ptr() not in weights]
    environment.update(zip([node for node, _ in own], all_to_disk([value for _, value in own]), strict=True))


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """All of it is in its memory: it is not sparse, of a subclass, or read with another sign."""
    if type(value) is not Tensor or not value.is_floating_point():
        return False
    return value.layout == torch.strided and not value.is_neg()


def _read_ids(value: Tensor, mask: Tensor | None) -> Tensor:
    """`[T]` of integers, `[T, A]` of embeddings."""
    selected = select_tokens(value if value.dim() > 1 else value.unsqueeze(-1), mask)
    return selected.view(-1, *value.shape[1:])


def _read_tokens(value: Tensor, axis: int, mask: Tensor | None, index: int, name: str) -> Tensor:
    tokens = select_tokens(value.movedim(axis, -1), mask)
    if tokens.numel() and not torch.isfinite(torch.stack(torch.aminmax(tokens))).all():  # a tenth of the time of all
        raise CalibrationError(
            f"calibration batch {index} leads to NaN or infinite values at the input of {name}; remove that "
            "batch, or check that the model itself runs on it (fp16 overflows above 65504)."
        )
    return tokens if tokens.dtype == torch.float64 else tokens.float()


def as_call(batch: object) -> Call:
    """A batch in any of its accepted forms; a keyword `attention_mask` of two dimensions says what is padding.

    Raises:
        CalibrationError: it is of another type.
    """
    if isinstance(batch, Call):
        return batch
    args, kwargs = _arguments(batch)
    return Call(args, kwargs, _token_mask(kwargs))


def _arguments(batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def read_batches(batches: Iterable[object], max_tokens: int) -> list[Call]:
    """Read batches until enough tokens were seen.

    Args:
        batches: `(args, kwargs)`, tuples of arguments, dicts of keyword arguments, or single tensors.
        max_tokens: no further batch is read then. A batch counts the positions that its `attention_mask` shows, or
            those of its first tensor.

    Raises:
        CalibrationError: there is no batch, or one is of another type.
    """
    found: list[Call] = []
    seen = 0
    for batch in batches:
        found.append(as_call(batch))
        seen += count_tokens(found[-1])
        if seen >= max_tokens:
            break
    if not found:
        raise CalibrationError(
            "the calibration data is empty: no batch came out of it. Pass an iterable of batches (a generator can be "
            "read only once), or calibration=None for a conversion from the weights alone."
        )
    return found


def count_tokens(call: Call) -> int:
    """The positions that its mask shows, or those of its first tensor."""
    if call.mask is not None:
        return int(call.mask.sum())
    tensors = tensor_leaves((call.args, call.kwargs))
    if not tensors:
        return 0
    # Token ids count each; the last dimension of floating tensors holds features.
    has_features = tensors[0].is_floating_point() and tensors[0].dim() > 1
    return tensors[0].numel() // (tensors[0].shape[-1] if has_features else 1)


def without_padding(tensor: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """`[..., D]` to `[T, D]`, without the positions that a keyword `attention_mask` of these tokens hides."""
    return select_tokens(tensor, _token_mask(kwargs))


def _token_mask(kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = kwargs.get(_MASK)
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def select_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """`[..., D]` to `[T, D]`, without the padding where the mask speaks of these tokens."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    if mask is not None and tokens.shape[:-1] in (mask.shape, (mask.numel(),)):  # as it is, or flattened before
        return flat[mask.flatten()]
    return flat


def flat_inputs(graph_module: GraphModule, batch: Call, index: int) -> list[Any]:
    """The values of a batch for the inputs of a captured graph.

    Raises:
        CalibrationError: batch number `index` has another structure than the example inputs had.
    """
    args, kwargs = batch.args, batch.kwargs
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
