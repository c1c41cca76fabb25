"""Light training of a converted model towards the dense one, without labels.

Both models run on the same batches. At every converted FFN the hidden state behind it is compared with that of the
dense model, token by token and relative to the size of the hidden state. Outputs that the model calls logits are
compared by the divergence of their probabilities (Hinton, 1503.02531), others as a whole, or by a loss of yours. All
weights but those of routers follow the gradient of the sum; each router learns which experts its own layer was better
off with (`passes/split/choice_loss.py`), as chosen ids pass no gradient.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from torch.fx import GraphModule

from sparsify.distill_checkpoint import load_checkpoint, save_checkpoint
from sparsify.distill_losses import DistillLoss, layer_losses, output_loss, own_loss
from sparsify.errors import CalibrationError
from sparsify.passes.calibrate import Call, flat_inputs, read_batches
from sparsify.passes.capture import capture
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.learning_rate import share_of_rate
from sparsify.passes.training_graph import RoutedFFN, TracingInterpreter, routed_ffns
from sparsify.routers import UnitRouter
from sparsify.sparse_model import SparseModel

_EVERY = 50  # steps between checkpoints
_MOST_BATCH_TOKENS = 2**62

Trained = Literal["experts", "routers", "everything"]
# Called as progress(step, steps, loss).
DistillProgress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class DistillReport:
    """What a training did.

    Attributes:
        losses: of every step of this call: mean over the converted FFNs of the squared error of the hidden state,
            relative to its size, plus that of the outputs, or the divergence of logits in nats a token, or your loss.
        first_step: where it began; above 0 where a checkpoint was resumed.
        seconds: wall-clock time.
    """

    losses: tuple[float, ...]
    first_step: int
    seconds: float

    def __str__(self) -> str:
        if not self.losses:
            return f"nothing to do: {self.first_step} steps were done before"
        tenth = max(1, len(self.losses) // 10)
        first, last = (sum(part) / tenth for part in (self.losses[:tenth], self.losses[-tenth:]))
        return f"{len(self.losses)} steps in {self.seconds:.0f} s: loss {first:.4f} -> {last:.4f}"


def distill(
    sparse: SparseModel,
    dense: nn.Module,
    batches: Iterable[object],
    *,
    steps: int,
    train: Trained = "experts",
    through: Literal["model", "block"] = "model",
    loss: DistillLoss | None = None,
    learning_rate: float = 5e-5,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: DistillProgress | None = None,
) -> DistillReport:
    """Train `sparse`, in place, to give the hidden states and outputs of `dense`, which stays as it is.

    Args:
        sparse: a converted model, captured as a whole.
        dense: the model that it was made from; it is not changed.
        batches: as `calibration=` of `sparsify` takes them; read once, then used in a new random order each time
            around. Positions where a keyword `attention_mask` is 0 do not count.
        steps: batches to train on.
        train: "experts" and their routers, or "routers" alone, which leave the weights that both models share as they
            are; or "everything" but embedding tables, of which a step sees few rows: `sparse` gets copies of what it
            shares, which takes memory, a third of the learning rate, and can no longer be grafted into `dense`.
        through: "model" lets an error reach the experts of all layers before it; "block" only those of its own layer,
            which needs less memory and time.
        loss: takes the place of the comparison of the outputs, where what is read off them is known, as the embedding
            of a sentence: `loss(ours, theirs, batch)` of what the two models return for a batch, as they return it,
            and the batch as `batches` gives it, to a scalar of about the size of a relative squared error. Hidden
            states count as ever.
        learning_rate: of the experts, with Adam, rising over a twentieth of the steps, then falling by a square root;
            routers take three times as much.
        seed: of the order of the batches.
        checkpoint: a safetensors file, written every 50 steps and at the end; where it is there, training goes on from
            it, to the same result. It must be of the same call.
        progress: called after each step.

    Returns:
        The losses and the time.

    Raises:
        TypeError: `sparse` is no graph, as a model that could not be traced as a whole.
        ValueError: an option is not valid, `dense` is another model, `loss` returns no scalar with a gradient, or the
            checkpoint is of another training.
        CalibrationError: the batches are empty or do not fit the model.
    """
    _check(sparse, steps, train, through, learning_rate)
    start = time.perf_counter()
    reference = _capture(dense, sparse)
    if train == "everything":
        _own_weights(sparse, dense)
    given = list(batches)
    numbered = list(enumerate(zip(read_batches(given, _MOST_BATCH_TOKENS), given, strict=True)))
    ffns = routed_ffns(sparse, reference)
    _require_same(ffns, reference)
    groups = _parameters(sparse, train)
    rates = (learning_rate, 3 * learning_rate, learning_rate / 3)
    optimizer = torch.optim.Adam(
        [{"params": p, "rate": r} for p, r in zip(groups, rates, strict=True) if p], fused=True
    )
    file = None if checkpoint is None else Path(checkpoint)
    names = {id(parameter): name for name, parameter in sparse.named_parameters()}
    settings = f"{steps} steps, train={train}, through={through}, learning_rate={learning_rate}, seed={seed}"
    settings += "" if loss is None else f", loss={getattr(loss, '__qualname__', type(loss).__name__)}"
    first = 0 if file is None else load_checkpoint(file, optimizer, names, settings)
    trained = [parameter for group in groups for parameter in group]
    before = {id(parameter): parameter.requires_grad for parameter in sparse.parameters()}
    losses: list[float] = []
    try:
        for parameter in sparse.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        for step in range(first, steps):
            batch = numbered[_order(len(numbered), step, seed)]
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share_of_rate(step, steps)
            losses.append(_step(sparse, reference, ffns, batch, through, loss, optimizer))
            if file is not None and ((step + 1) % _EVERY == 0 or step + 1 == steps):
                save_checkpoint(file, optimizer, names, step + 1, settings)
            if progress is not None:
                progress(step + 1, steps, losses[-1])
    finally:
        for parameter in sparse.parameters():
            parameter.requires_grad_(before[id(parameter)])
            parameter.grad = None
    return DistillReport(tuple(losses), first, time.perf_counter() - start)


def _check(sparse: object, steps: int, train: str, through: str, learning_rate: float) -> None:
    if not isinstance(sparse, SparseModel):
        raise TypeError(
            f"distill needs a SparseModel, got {type(sparse).__name__}; a model that was converted in parts has no "
            "graph: train it as any other module"
        )
    others = {name: router.system.name for name, router in sparse.routers.items() if not isinstance(router, UnitRouter)}
    if others:
        raise ValueError(
            f"distill teaches routers that give every chosen expert the weight 1, as 'mlp' does, not {others}; their "
            "routing weights pass a gradient on, so train them in a loop of your own: loss + sparse.aux_loss()"
        )
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if train not in get_args(Trained):
        raise ValueError(f"train must be one of {', '.join(get_args(Trained))}, got {train!r}")
    if through not in ("model", "block"):
        raise ValueError(f'through must be "model" or "block", got {through!r}')
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}")


def _capture(dense: nn.Module, sparse: SparseModel) -> GraphModule:
    """In the same way as at the conversion, so that nodes have the same names."""
    return NormalizeLinearPass()(capture(dense, sparse.info.args, sparse.info.kwargs)).graph_module


def _require_same(ffns: Sequence[RoutedFFN], reference: GraphModule) -> None:
    if not ffns:
        raise ValueError("the model has no routed experts to train; convert it first")
    known = {node.name for node in reference.graph.nodes}
    lost = [ffn.name for ffn in ffns if ffn.hidden.name not in known]
    if lost:
        raise ValueError(
            f"dense is not the model that was converted: it has no value `{ffns[0].hidden.name}` as behind "
            f"{', '.join(lost)}; give the model that sparsify() was called with"
        )


def _parameters(sparse: SparseModel, train: Trained) -> tuple[list[nn.Parameter], ...]:
    """Of the experts, of the routers, and of all else; shared modules count once."""
    experts: dict[int, nn.Parameter] = {}
    routers: dict[int, nn.Parameter] = {}
    for name, router in sparse.routers.items():
        for child, module in sparse.get_submodule(name).named_children():
            if child in ("experts", "shared"):
                experts |= {id(p): p for p in module.parameters() if p.is_floating_point()}
        routers |= {id(p): p for p in router.parameters()}
    kept = experts.keys() | routers.keys() | {id(table) for table in _embedding_tables(sparse)}
    others = [p for p in sparse.parameters() if p.is_floating_point() and id(p) not in kept]
    return (
        list(experts.values()) if train != "routers" else [],
        list(routers.values()),
        others if train == "everything" else [],
    )


def _embedding_tables(sparse: SparseModel) -> list[nn.Parameter]:
    """What `embedding` looks up rows of."""
    tables = {
        str(source.target)
        for node in sparse.graph.nodes
        if node.target is torch.ops.aten.embedding.default
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }
    return [parameter for name, parameter in sparse.named_parameters(remove_duplicate=False) if name in tables]


def _own_weights(sparse: SparseModel, dense: nn.Module) -> None:
    """Give `sparse` copies of the weights that it shares with `dense`; what it shares with itself stays shared."""
    shared = {parameter.untyped_storage().data_ptr() for parameter in dense.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in sparse.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.untyped_storage().data_ptr() in shared:
                copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, copies.setdefault(id(parameter), copy))


def _order(count: int, step: int, seed: int) -> int:
    """The batch of a step: every time around in another order, whatever was done before."""
    around, place = divmod(step, count)
    return random.Random(f"{seed}-{around}").sample(range(count), count)[place]


def _step(
    sparse: SparseModel,
    reference: GraphModule,
    ffns: Sequence[RoutedFFN],
    numbered: tuple[int, tuple[Call, object]],
    through: str,
    loss: DistillLoss | None,
    optimizer: torch.optim.Optimizer,
) -> float:
    index, (call, batch) = numbered
    hidden = [ffn.hidden.name for ffn in ffns]
    teacher = TracingInterpreter(reference, hidden, rounds=True)
    flat = flat_inputs(reference, call, index)
    with torch.no_grad():
        wanted = teacher.run(*flat, enable_io_processing=False)
    inputs = [ffn.router_call.all_input_nodes[0].name for ffn in ffns]
    student = TracingInterpreter(
        sparse,
        [*hidden, *inputs],
        detach=hidden if through == "block" else (),
        rounds=True,
        teaches=True,
    )
    with torch.enable_grad():
        outputs = student.run(*flat, enable_io_processing=False)
        if loss is None:
            total = output_loss(reference, outputs, wanted, call.mask)
        else:
            returned = (sparse.graph.process_outputs(outputs), reference.graph.process_outputs(wanted))
            total = own_loss(loss, *returned, batch)
        lesson = torch.zeros(())
        for ffn in ffns:
            own, of_router = layer_losses(sparse, ffn, student, teacher.kept[ffn.hidden.name], call)
            total, lesson = total + own / len(ffns), lesson + of_router / len(ffns)
        optimizer.zero_grad()
        (total + lesson).backward()
    value = float(total.detach())
    if value != value:  # NaN
        raise CalibrationError("the loss is NaN: a batch leads to values that are not finite, or lower learning_rate")
    optimizer.step()
    return value
