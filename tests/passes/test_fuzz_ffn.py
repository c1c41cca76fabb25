"""The compiler against random models: a bounded run of what `benchmarks/fuzz.py` does without end."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sparsify import SparseModel
from sparsify.errors import NoFFNError
from sparsify.models.ffn_recipe import NEAR_MISSES, OPTIONS, Recipe, fit
from sparsify.models.random_ffn import RandomFFN, example_inputs


def _load_fuzz() -> ModuleType:
    """Tests cannot import benchmarks, which are no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("sparsify_benchmarks_fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzz = _load_fuzz()

# Each field keeps its default half of the time: a failure in a plain recipe says more.
RECIPES = st.builds(
    Recipe, **{name: st.one_of(st.just(values[0]), st.sampled_from(values)) for name, values in OPTIONS.items()}
).map(fit)


# A failure is shrunk by the fuzzer, which needs fewer conversions for it than hypothesis.
@settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(recipe=RECIPES)
def test_random_models(recipe: Recipe) -> None:
    """Protects: what should be found is found and exact, near misses are left alone, nothing crashes."""
    outcome = fuzz.check(recipe)
    if outcome.verdict != "ok":
        smallest = fuzz.shrink(recipe, lambda other: fuzz.check(other).kind == outcome.kind)
        pytest.fail(f"{outcome.verdict}: {outcome.detail}\nfuzz.check({smallest!r}), found in {recipe!r}")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_builds_and_runs(name: str) -> None:
    """Protects: the generator, so that what fails above is the compiler; a recipe prints as what makes it."""
    for value in OPTIONS[name]:
        for layout in OPTIONS["layout"]:
            recipe = fit(replace(Recipe(layout=layout), **{name: value}))
            assert fit(recipe) == recipe
            assert eval(repr(recipe)) == recipe
            outputs = RandomFFN(recipe).eval()(*example_inputs(recipe))
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                assert torch.isfinite(output).all()


# Tokens that are swapped back after down_proj change nothing.
@pytest.mark.parametrize("miss", [miss for miss in NEAR_MISSES if miss != "swap_tokens"])
def test_every_near_miss_computes_something_else(miss: str) -> None:
    """Protects: that a near miss is really written into the model."""
    recipe = fit(Recipe(miss=miss))
    plain = fit(replace(recipe, miss=""))
    model, args = RandomFFN(recipe).eval(), example_inputs(recipe)
    with torch.no_grad():
        expected = RandomFFN(plain).eval()(example_inputs(recipe)[0])
        outputs = model(*args)
    assert isinstance(outputs, tuple) or outputs.shape != expected.shape or not torch.allclose(outputs, expected)


def test_the_check_sees_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the check itself."""

    def spoiled(*args: object, **kwargs: object) -> SparseModel:
        sparse = convert(*args, **kwargs)
        with torch.no_grad():
            sparse.get_parameter("first.experts.down_proj")[-1, 0] += 1e-3
        return sparse

    convert = fuzz.sparsify
    monkeypatch.setattr(fuzz, "sparsify", spoiled)
    assert fuzz.check(Recipe()).verdict == "wrong values"


def test_the_check_sees_what_is_missed_and_what_is_converted_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the check itself."""
    assert fuzz.check(Recipe()).verdict == "ok"
    monkeypatch.setattr(Recipe, "expected", (0, 0))
    assert fuzz.check(Recipe()).verdict == "converted wrongly"
    monkeypatch.undo()

    def refuse(*args: object, **kwargs: object) -> None:
        raise NoFFNError("none")

    monkeypatch.setattr(fuzz, "sparsify", refuse)
    assert fuzz.check(Recipe()).verdict == "missed"
    assert fuzz.check(fit(Recipe(miss="softmax"))).verdict == "ok"


def test_shrinking() -> None:
    """Protects: only what matters is left of a failing recipe."""
    recipe = Recipe(cut="chunk", up="conv", norm=True, seed=2)
    assert fuzz.shrink(recipe, lambda other: other.up == "conv") == Recipe(up="conv")
