"""Random models against the compiler: every FFN that should be found is found and exact, no near miss is converted.

    python benchmarks/fuzz.py --examples 10000
    python benchmarks/fuzz.py --seed 4711 --examples 1        # one of them again

Example `i` of a run is made from the seed `seed + i`. A failure is shrunk before it is printed; `check` takes it.
Exit code 1 on any failure.
"""

from __future__ import annotations

import gc
import importlib
import logging
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal
from unittest import mock

import torch
import typer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparsify import SparseModel, sparsify
from sparsify.errors import CaptureError, NoFFNError
from sparsify.models.ffn_recipe import Recipe, fit, sample
from sparsify.models.random_ffn import RandomFFN, example_inputs

Verdict = Literal["ok", "missed", "converted wrongly", "wrong values", "crash", "changed the model", "bad recipe"]

# Largest difference relative to the largest output, with all experts on.
_TOLERANCE = {"float32": 1e-5, "float64": 1e-5, "bfloat16": 16 * 2.0**-8}
_OTHER_SIZES = 1


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe, and the details of a failure."""

    verdict: Verdict
    detail: str = ""

    @property
    def kind(self) -> str:
        """The same for failures that may have one cause."""
        return f"{self.verdict}: {self.detail.partition(':')[0]}" if self.verdict == "crash" else self.verdict


def check(recipe: Recipe) -> Outcome:
    """Build the model of a recipe, convert it, and compare it with itself."""
    model, args = RandomFFN(recipe).eval(), example_inputs(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        sparse = _convert(recipe, model, args)
    except NoFFNError as error:
        return _judge_count(recipe, 0, str(error))
    except CaptureError as error:
        return Outcome("bad recipe", str(error))
    except Exception as error:
        return Outcome("crash", _describe(error))
    if any(not torch.equal(before[name], value) for name, value in model.state_dict().items()):
        return Outcome("changed the model")
    try:
        return _judge(recipe, model, sparse)
    except Exception as error:
        return Outcome("crash", f"the converted model: {_describe(error)}")


def _convert(recipe: Recipe, model: nn.Module, args: tuple[Tensor, ...]) -> SparseModel:
    """Without the refit all experts together are the dense FFN; how well the router routes does not matter here."""
    training = importlib.import_module("sparsify.passes.split.train_router")
    with mock.patch.object(training, "_STEPS", 5):
        return sparsify(
            model,
            _copy(args),
            calibration=[_copy(args)],
            num_experts=recipe.experts,
            top_k=recipe.top_k,
            select="all",
            refit=False,
            router_hidden_size=4,
        )


def _describe(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {where.name}: {error}"


def _copy(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Some recipes write to their inputs."""
    return tuple(arg.clone() for arg in args)


def _judge(recipe: Recipe, model: nn.Module, sparse: SparseModel) -> Outcome:
    found = [ffn.name for ffn in sparse.report.ffns if ffn.action != "rejected"]
    reasons = "; ".join(ffn.reason for ffn in sparse.report.ffns if ffn.action == "rejected")
    outcomes = [_judge_count(recipe, len(found), f"found {found}. {reasons}")]
    if recipe.category == "positive":
        outcomes += [_judge_completeness(recipe, sparse), _judge_sizes(recipe, sparse)]
    outcomes.append(_judge_finite(recipe, sparse))
    sparse.set_top_k(recipe.experts)
    for more in (0, _OTHER_SIZES) if recipe.category == "positive" else (0,):
        outcomes.append(_judge_values(recipe, model, sparse, more))
    bad = [outcome for outcome in outcomes if outcome.verdict != "ok"]
    return next((outcome for outcome in bad if outcome.verdict == "wrong values"), (*bad, Outcome("ok"))[0])


def _judge_count(recipe: Recipe, found: int, reasons: str) -> Outcome:
    least, most = recipe.expected
    if found < least:
        nearest = reasons.partition(" linear layers. ")[2] or reasons
        return Outcome("missed", nearest.removeprefix("The nearest:\n  - "))
    if found > most:
        return Outcome("converted wrongly", f"{recipe.miss or 'a positive'}, {reasons}")
    return Outcome("ok")


def _judge_completeness(recipe: Recipe, sparse: SparseModel) -> Outcome:
    """No call of a converted FFN still reads the dense weights, where nothing else does."""
    left = [name for name, value in sparse.named_parameters() if name.endswith("down.weight") and value.dim() > 1]
    left = [name for name in left if name.split(".")[0] in ("first", "second")]
    return Outcome("missed", f"dense weights are still there: {left}") if left else Outcome("ok")


def _judge_sizes(recipe: Recipe, sparse: SparseModel) -> Outcome:
    """The conversion fixes no dimension that tracing the dense model leaves dynamic."""
    x = example_inputs(recipe)[0]
    features = 1 if recipe.channels_first else x.dim() - 1
    tokens = {dim for dim, size in enumerate(x.shape) if dim != features and size > 1}
    fixed = tokens - set(sparse.dynamic_dims()["x"])
    return Outcome("converted wrongly", f"dimensions {sorted(fixed)} became fixed") if fixed else Outcome("ok")


def _judge_finite(recipe: Recipe, sparse: SparseModel) -> Outcome:
    outputs = _run(sparse, example_inputs(recipe))
    finite = all(bool(torch.isfinite(output).all()) for output in outputs)
    return Outcome("ok") if finite else Outcome("wrong values", f"not finite with top_k={recipe.top_k}")


def _judge_values(recipe: Recipe, model: nn.Module, sparse: SparseModel, more: int) -> Outcome:
    args = example_inputs(recipe, more)
    for expected, actual in zip(_run(model, args), _run(sparse, args), strict=True):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return Outcome("wrong values", f"{_form(actual)} instead of {_form(expected)}")
        size = max(float(expected.double().abs().max()), 1e-30)
        error = float((expected.double() - actual.double()).abs().max()) / size
        if not error <= _TOLERANCE[recipe.dtype]:
            place = "at other sizes" if more else "on the example"
            return Outcome("wrong values", f"{recipe.miss or 'a positive'} {place}: relative error {error:.1e}")
    return Outcome("ok")


def _form(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"


@torch.no_grad()
def _run(model: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and inputs after the call; random numbers are the same in every call."""
    args = _copy(args)
    torch.manual_seed(0)
    output = model(*args)
    return [*(output if isinstance(output, tuple) else (output,)), *args]


def shrink(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """Set fields back to their defaults, one after another, while it still fails."""
    for field in fields(Recipe):
        simpler = fit(replace(recipe, **{field.name: field.default}))
        if len(simpler.changes) < len(recipe.changes) and fails(simpler):
            return shrink(simpler, fails)
    return recipe


@dataclass
class Failure:
    """A kind of failure: the plainest recipe that has it, and the seeds of others that contain this recipe."""

    outcome: Outcome
    recipe: Recipe
    seeds: list[int]

    def explains(self, outcome: Outcome, recipe: Recipe) -> bool:
        """Everything that makes this one fail is also in the other recipe."""
        return outcome.kind == self.outcome.kind and self.recipe.changes.items() <= recipe.changes.items()


def main(
    examples: Annotated[int, typer.Option(help="How many recipes.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the first recipe; the next has the next one.")] = 0,
    only: Annotated[str, typer.Option(help="Only this category: positive, near miss or hazard.")] = "",
    shrunk: Annotated[int, typer.Option(help="Kinds of failures to shrink at most; others are printed as found.")] = 50,
) -> None:
    """Check random recipes."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[Failure] = []
    start = told = time.monotonic()
    for index in range(seed, seed + examples):
        recipe = sample(random.Random(index))
        if only not in ("", recipe.category):
            continue
        outcome = check(recipe)
        counts[recipe.category, outcome.verdict] += 1
        if outcome.verdict != "ok":
            _file(failures, index, recipe, outcome, may_shrink=len(failures) < shrunk)
        if index % 100 == 0:
            _forget_traces()
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{index - seed + 1}/{examples}, {told - start:.0f} s: {_say(counts)}", flush=True)
    for failure in sorted(failures, key=lambda failure: -len(failure.seeds)):
        seeds = " ".join(map(str, failure.seeds[:5]))
        print(f"\n{len(failure.seeds)} times {failure.outcome.verdict}, seeds {seeds}")
        print(f"  {failure.outcome.detail}\n  check({failure.recipe!r})")
    print(f"\n{counts.total()} recipes in {time.monotonic() - start:.0f} s: {_say(counts)}")
    raise typer.Exit(1 if failures else 0)


def _file(failures: list[Failure], index: int, recipe: Recipe, outcome: Outcome, *, may_shrink: bool) -> None:
    """Count a failure with those of the same cause, or shrink it and print it."""
    known = next((failure for failure in failures if failure.explains(outcome, recipe)), None)
    if known is not None:
        known.seeds.append(index)
        return
    smallest = shrink(recipe, lambda other: check(other).kind == outcome.kind) if may_shrink else recipe
    failure = Failure(check(smallest), smallest, [index])
    failures.append(failure)
    print(f"seed {index}: {failure.outcome.kind}: check({smallest!r})", flush=True)


def _forget_traces() -> None:
    """Torch 2.14 keeps 0.4 MB of every model that it traced: in caches, and in cycles that pass through C++."""
    FakeTensorMode.cache_clear()
    for function in vars(ShapeEnv).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    for environment in [value for value in gc.get_objects() if type(value) is ShapeEnv]:
        environment.fake_tensor_cache.clear()
        if environment.tracked_fakes is not None:
            environment.tracked_fakes.clear()
    gc.collect()


def _say(counts: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{category} {verdict} {number}" for (category, verdict), number in sorted(counts.items()))


if __name__ == "__main__":
    typer.run(main)
