"""select= -> which FFNs.

Presets and numbers choose among the FFNs that "auto" takes, patterns and predicates among all.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from sparsify.config import Select
from sparsify.errors import SelectionError
from sparsify.passes.match_ffn import FFNMatch

# Which of n FFNs, counted from 0. What each is good for, and where it comes from, stands at `SparsifyConfig.select`.
_PLACEMENTS: dict[str, Callable[[int], Iterable[int]]] = {
    "auto": range,
    "every-other": lambda n: range(1, n, 2),
    "every-fourth": lambda n: range(3, n, 4),
    "last-half": lambda n: range(n // 2, n),
    "later": lambda n: (*range(3, n // 2, 4), *range(n // 2, n)),
}
PRESETS = ("all", *_PLACEMENTS)


def selects_what_pays(select: Select) -> bool:
    """`select` chooses among what "auto" takes: a preset other than "all", or a number."""
    return isinstance(select, (int, float)) or (isinstance(select, str) and select in _PLACEMENTS)


def select_ffns(matches: Sequence[FFNMatch], select: Select, pays: Sequence[bool]) -> set[str]:
    """Choose.

    Args:
        matches: every FFN, in graph order.
        select: as in `SparsifyConfig`.
        pays: for each FFN, whether "auto" takes it.

    Returns:
        The names of the chosen FFNs. With a preset, none may be left because none pays.

    Raises:
        SelectionError: a pattern, a predicate or a preset selects nothing, or there are fewer FFNs than asked for.
    """
    if not matches or select == "all":
        return {match.name for match in matches}
    if selects_what_pays(select):
        paying = [match.name for match, takes in zip(matches, pays, strict=True) if takes]
        return {paying[i] for i in _places(cast("str | float", select), len(paying), len(matches))}
    if callable(select):
        return _predicate(matches, select)
    patterns = (select,) if isinstance(select, str) else cast("Sequence[str]", select)
    for pattern in patterns:
        require_match(matches, pattern, "select", f". Presets are {', '.join(PRESETS)}; one stands alone")
    return {match.name for match in matches if any(fnmatch.fnmatchcase(match.name, pattern) for pattern in patterns)}


def require_match(matches: Sequence[FFNMatch], pattern: str, option: str, hint: str = "") -> None:
    """Refuse a glob pattern that fits no name: a typing error is no silent no-op.

    Raises:
        SelectionError: names the option and lists the names, `hint` at the end.
    """
    if any(fnmatch.fnmatchcase(match.name, pattern) for match in matches):
        return
    names = ", ".join(match.name for match in matches)
    raise SelectionError(f"{option}={pattern!r} matches none of the {len(matches)} FFNs: {names}{hint}")


def _places(select: str | float, n: int, total: int) -> Iterable[int]:
    """Which of the n FFNs that pay, of all in the model."""
    if isinstance(select, str):
        places = list(_PLACEMENTS[select](n))
        if n and not places:
            raise SelectionError(
                f"select={select!r} takes none of the {n} FFNs that 'auto' takes, as they are too few; give another "
                "preset, a number or names"
            )
        return places
    # A product such as 0.07 * 100 that is above 7 by rounding alone is no eighth FFN.
    count = select if isinstance(select, int) else max(1, math.ceil(select * n - 1e-9))
    if isinstance(select, int) and count > n:
        raise SelectionError(
            f"select={select} asks for the last {select} FFNs, but 'auto' takes only {n} of the {total} in the model; "
            "give a smaller number, names or 'all'"
        )
    return range(max(0, n - count), n)


def _predicate(matches: Sequence[FFNMatch], predicate: Callable[[FFNMatch], bool]) -> set[str]:
    found = {match.name for match in matches if predicate(match)}
    if found:
        return found
    names = ", ".join(match.name for match in matches)
    raise SelectionError(f"the predicate select={predicate!r} is true of none of the {len(matches)} FFNs: {names}")
