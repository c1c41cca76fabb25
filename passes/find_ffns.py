"""Model -> the FFNs of its graph, or of the graphs of its parts where it cannot be traced as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from sparsify.errors import CaptureError
from sparsify.passes.calibrate import Call, as_call
from sparsify.passes.capture_parts import NOT_CALLED, CapturedPart, CapturedParts, SkippedPart
from sparsify.passes.graph_values import tensor_leaves
from sparsify.passes.match_ffn import FFNMatch, Rejection, match_ffn
from sparsify.passes.module_calls import misfit, observe_calls
from sparsify.passes.module_cover import ModuleCover, cover_with_modules
from sparsify.passes.normalize_linear import NormalizeLinearPass

CANNOT_GO_BACK = "cannot be put back into a model that was traced in parts"
_IS_EXPERT = (
    "is an expert of an MoE layer that the model has already: modules like it stand beside it and get other tokens"
)


@dataclass(frozen=True)
class FFNPart:
    """One graph.

    Attributes:
        name: path of the module that was traced, "" for the whole model.
        graph_module: its graph, normalised.
        example: the inputs that it was traced with.
        matches: its FFNs, with the names that they have in the whole model.
        covers: by the name of the FFN, the modules of the whole model that it can be grafted into.
    """

    name: str
    graph_module: GraphModule
    example: Call
    matches: tuple[FFNMatch, ...]
    covers: dict[str, ModuleCover]


@dataclass(frozen=True)
class FoundFFNs:
    """All graphs of a model, the near misses in them, and the modules whose code is in none."""

    parts: tuple[FFNPart, ...]
    rejections: tuple[Rejection, ...]
    skipped: tuple[SkippedPart, ...]

    @property
    def matches(self) -> list[FFNMatch]:
        """Of all parts, in order."""
        return [match for part in self.parts for match in part.matches]

    @property
    def is_whole(self) -> bool:
        """The model was traced as a whole."""
        return not self.skipped


def find_ffns(model: nn.Module, captured: CapturedParts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FoundFFNs:
    """Match the FFNs of every graph.

    Where there are parts, the converted FFNs have to go back into modules: those that cannot are near misses.

    Args:
        model: what was captured.
        captured: its graphs.
        args: example inputs.
        kwargs: example keyword inputs.

    Raises:
        CaptureError: only parts could be traced, and no FFN or near miss is in them.
    """
    found = [_match(part) for part in captured.parts]
    parts = [part for part, _ in found]
    rejections = [rejection for _, rejected in found for rejection in rejected]
    if captured.error is None:
        return FoundFFNs(tuple(parts), tuple(rejections), ())
    covers = [cover for part in parts for cover in part.covers.values()]
    calls = observe_calls(model, args, kwargs, covers)
    misfits = {name: misfit(cover, calls) for part in parts for name, cover in part.covers.items()}
    reasons = {name: f"{CANNOT_GO_BACK}: {reason}" for name, reason in misfits.items() if reason}
    reasons |= dict.fromkeys(_experts(model, parts, captured.skipped), _IS_EXPERT)
    stuck = [match for part in parts for match in part.matches if match.name in reasons]
    rejections += [Rejection(match.name, reasons[match.name], match.sites[0].down) for match in stuck]
    parts = [_keep(part, [match for match in part.matches if match.name not in reasons]) for part in parts]
    if not any(part.matches for part in parts) and not rejections:
        raise CaptureError(f"{captured.error} No part of it that can be traced holds an FFN.") from captured.error
    return FoundFFNs(tuple(parts), tuple(rejections), captured.skipped)


def _match(part: CapturedPart) -> tuple[FFNPart, list[Rejection]]:
    graph_module = NormalizeLinearPass()(part.graph_module).graph_module
    matches, rejections = match_ffn(graph_module)
    covers = {match.name: cover_with_modules(graph_module, match) for match in matches}
    # A mask that a module is given may mean anything; only that of the model itself marks padding.
    example = Call(part.args, part.kwargs, None) if part.name else as_call((part.args, part.kwargs))
    return FFNPart(part.name, graph_module, example, tuple(matches), covers), rejections


def _experts(model: nn.Module, parts: Sequence[FFNPart], skipped: Sequence[SkippedPart]) -> list[str]:
    """FFNs that are a part each and have twins beside them that get other numbers of tokens, or none."""
    alone = [part for part in parts if any(cover.modules == (part.name,) for cover in part.covers.values())]
    given = [tensor_leaves((part.example.args, part.example.kwargs)) for part in alone]
    fed = [(_kind(model, part.name), _shapes(tensors)) for part, tensors in zip(alone, given, strict=True)]
    fed += [(_kind(model, part.name), "nothing") for part in skipped if part.reason == NOT_CALLED]
    inputs: dict[tuple[str, str], set[str]] = {}
    for kind, shapes in fed:
        inputs.setdefault(kind, set()).add(shapes)
    return [match.name for part in alone if len(inputs[_kind(model, part.name)]) > 1 for match in part.matches]


def _kind(model: nn.Module, name: str) -> tuple[str, str]:
    """Twins stand in the same module and have weights of the same shapes."""
    return name.rpartition(".")[0], _shapes(model.get_submodule(name).parameters())


def _shapes(tensors: Iterable[Tensor]) -> str:
    return str([list(tensor.shape) for tensor in tensors])


def _keep(part: FFNPart, matches: Sequence[FFNMatch]) -> FFNPart:
    return replace(part, matches=tuple(matches), covers={match.name: part.covers[match.name] for match in matches})
