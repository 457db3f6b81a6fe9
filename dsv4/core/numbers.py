"""What counts as a number in a file or a request."""

from __future__ import annotations

from sys import float_info
from typing import Any


def is_integer(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """An int or a float, no bool, that a float can hold: no NaN, no infinity, no 10^400."""
    return (is_integer(value) or isinstance(value, float)) and abs(value) <= float_info.max
