"""How much the converted FFNs may cost, or how much the model may lose: what `budget=` says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_FORMS = (
    "budget=0.5 or '50%' is a share of the multiply-adds of the FFNs, budget='12ms' the time of their calls together, "
    "and budget='error<=0.1' the relative L2 difference of the outputs to those of the dense model"
)
_NUMBER = r"(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)"
_SHARE = re.compile(_NUMBER)
_PERCENT = re.compile(rf"{_NUMBER}\s*%")
_MILLISECONDS = re.compile(rf"{_NUMBER}\s*ms")
_ERROR = re.compile(rf"error\s*<=\s*{_NUMBER}")


@dataclass(frozen=True)
class Budget:
    """A bound.

    Attributes:
        unit: "share" of the multiply-adds of the converted FFNs for a token, routers included; "ms", milliseconds that
            their calls take together; "error", the relative L2 difference of the outputs to those of the dense model.
        most: that is allowed.
    """

    unit: Literal["share", "ms", "error"]
    most: float

    def say(self, amount: float) -> str:
        """An amount of the unit, for people."""
        return {"share": f"{100 * amount:.3g}%", "ms": f"{amount:.3g}ms", "error": f"{amount:.3g}"}[self.unit]

    def __str__(self) -> str:
        return f"error<={self.most:g}" if self.unit == "error" else self.say(self.most)


def read_budget(given: object) -> Budget:
    """Read `budget=`.

    Args:
        given: a number, or text such as "50%", "12ms" or "error<=0.1".

    Raises:
        ValueError: says what was given and what is allowed.
    """
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return _share(float(given), given)
    if not isinstance(given, str):
        raise ValueError(f"budget must be a number or text, got {given!r}: {_FORMS}")
    text = given.strip()
    if found := _SHARE.fullmatch(text):
        return _share(float(found[1]), given)
    if found := _PERCENT.fullmatch(text):
        return _share(float(found[1]) / 100, given)
    found, unit = (_MILLISECONDS.fullmatch(text), "ms") if text.endswith("ms") else (_ERROR.fullmatch(text), "error")
    if found is None or not float(found[1]) > 0:
        raise ValueError(f"budget={given!r} is none of what budget can be: {_FORMS}; each above 0")
    return Budget("ms" if unit == "ms" else "error", float(found[1]))


def _share(share: float, given: object) -> Budget:
    if not 0 < share < 1:
        raise ValueError(f"budget as a share of the multiply-adds must be between 0 and 1, got {given!r}; {_FORMS}")
    return Budget("share", share)
