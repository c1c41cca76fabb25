"""`select_ffns`: patterns, predicates, numbers and presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn, randn

from sparsify.errors import SelectionError
from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import FFNMatch, match_ffn
from sparsify.passes.select_ffns import PRESETS, select_ffns, selects_what_pays


@pytest.fixture(scope="module")
def match() -> FFNMatch:
    """One FFN, to be copied under other names."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    return match_ffn(capture(model, (randn(2, 4),)))[0][0]


def chosen(match: FFNMatch, count: int, select: Any, dense: tuple[int, ...] = ()) -> list[int]:
    """The places, counted from 1, of the chosen ones among `count` FFNs; `dense` are places that do not pay."""
    places = range(1, count + 1)
    matches = [replace(match, name=f"layers.{place}.ffn") for place in places]
    found = select_ffns(matches, select, [place not in dense for place in places])
    return [place for place in places if f"layers.{place}.ffn" in found]


@pytest.mark.parametrize(
    ("count", "select", "places"),
    [
        (3, "auto", [1, 2, 3]),
        (6, "every-other", [2, 4, 6]),
        (5, "every-other", [2, 4]),
        (12, "every-fourth", [4, 8, 12]),
        (7, "every-fourth", [4]),
        (6, "last-half", [4, 5, 6]),
        (5, "last-half", [3, 4, 5]),
        (1, "last-half", [1]),
        (12, "later", [4, 7, 8, 9, 10, 11, 12]),
        (17, "later", [4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]),
        (2, "later", [2]),
        (5, 0.5, [3, 4, 5]),
        (5, 0.01, [5]),
        (5, 1.0, [1, 2, 3, 4, 5]),
        (100, 0.07, [94, 95, 96, 97, 98, 99, 100]),
        (5, 1, [5]),
        (5, 4, [2, 3, 4, 5]),
        (5, 5, [1, 2, 3, 4, 5]),
    ],
)
def test_placements(match: FFNMatch, count: int, select: Any, places: list[int]) -> None:
    """Protects: which FFNs a preset or a number takes, in even and odd numbers of them."""
    assert chosen(match, count, select) == places


@pytest.mark.parametrize(
    ("select", "places"), [("every-other", [3, 6]), (2, [5, 6]), (0.5, [5, 6]), ("auto", [2, 3, 5, 6])]
)
def test_placements_count_only_what_pays(match: FFNMatch, select: Any, places: list[int]) -> None:
    """Protects: a classification head at the end is not "the last FFN", and an FFN that does not pay is no step."""
    assert chosen(match, 7, select, dense=(1, 4, 7)) == places


@pytest.mark.parametrize(
    ("select", "places"),
    [
        ("all", [1, 2, 3]),
        ("*.[23].*", [2, 3]),
        (("*.1.*", "layers.3.ffn"), [1, 3]),
        (lambda match: match.name > "layers.2", [2, 3]),
    ],
)
def test_names_take_what_does_not_pay(match: FFNMatch, select: Any, places: list[int]) -> None:
    """Protects: "all", globs, several globs and predicates choose among all legal FFNs."""
    assert chosen(match, 3, select, dense=(1, 2, 3)) == places


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("every-second", r"'every-second' matches none of the 3 FFNs: layers\.1\.ffn, .*Presets are all, auto, ev"),
        (("*.1.*", "*.9.*"), r"select='\*\.9\.\*' matches none of the 3 FFNs"),
        (("*.1.*", "later"), r"select='later' matches none .* one stands alone"),
        ("every-fourth", "select='every-fourth' takes none of the 3 FFNs that 'auto' takes"),
        (4, "select=4 asks for the last 4 FFNs, but 'auto' takes only 3 of the 3"),
        (lambda match: False, r"the predicate select=<function .* is true of none of the 3 FFNs: layers\.1\.ffn, "),
    ],
)
def test_a_selection_of_nothing(match: FFNMatch, select: Any, message: str) -> None:
    """Protects: a typing error is no silent no-op; the message lists what there is."""
    with pytest.raises(SelectionError, match=message):
        chosen(match, 3, select)


def test_no_ffn_pays(match: FFNMatch) -> None:
    """Protects: presets and fractions leave all dense, as "auto" does; a number that was asked for is missed."""
    for preset in PRESETS[1:]:
        assert chosen(match, 2, preset, dense=(1, 2)) == []
    assert chosen(match, 2, 0.5, dense=(1, 2)) == []
    with pytest.raises(SelectionError, match="'auto' takes only 0 of the 2 in the model"):
        chosen(match, 2, 1, dense=(1, 2))


@pytest.mark.parametrize("select", ["auto", "later", "layers.*", 2, lambda match: True])
def test_a_model_without_ffns(match: FFNMatch, select: Any) -> None:
    """Protects: an empty plan, not an error: `sparsify` says itself that there is nothing."""
    assert chosen(match, 0, select) == []


def test_who_asks_what_pays() -> None:
    """Protects: what was asked for by name is converted though it does not pay; a preset and a number ask first."""
    assert [selects_what_pays(select) for select in ("auto", "later", 2, 0.5)] == [True] * 4
    assert [selects_what_pays(select) for select in ("all", "a.*", ("auto",), lambda match: True)] == [False] * 4
