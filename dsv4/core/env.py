"""Every DSV4_* environment variable: its name, type and meaning, read and checked in one place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from dsv4.core.config import MAX_CONTEXT
from dsv4.core.errors import RequestError

PREFIX = "DSV4_"
# OpenMP takes the process down where it cannot start as many threads as it was told.
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))
# Variables of the test suite, which reads them itself.
_OF_TESTS = (f"{PREFIX}ORACLE_", f"{PREFIX}STRESS_")


@dataclass(frozen=True)
class Variable:
    """One variable. `parse` reads its text; its ValueError says what the variable takes."""

    name: str
    default: Any
    meaning: str
    parse: Callable[[str], Any]


def _flag(text: str) -> bool:
    if text.lower() not in ("0", "1", "on", "off", "true", "false"):
        raise ValueError("0 or 1")
    return text.lower() in ("1", "on", "true")


def _one_of(*legal: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in legal:
            raise ValueError(f"one of {', '.join(legal)}")
        return text

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        is_short = len(text) < 100  # longer ones are no number to Python
        if not (text.isascii() and text.isdigit() and is_short and low <= int(text) <= high):
            raise ValueError(f"an integer from {low:,} to {high:,}")
        return int(text)

    return parse


_VARIABLES = (
    Variable("DSV4_DEBUG", False, "show the traceback of an error", _flag),
    Variable("DSV4_QUIET", False, "as --quiet: no progress, no statistics", _flag),
    Variable("DSV4_TIER", 1, "as --tier", lambda text: int(_one_of("0", "1", "2")(text))),
    Variable(
        "DSV4_DTYPE", "float32", "as --dtype", _one_of("float32", "bfloat16", "float64")
    ),
    Variable("DSV4_MAX_CONTEXT", None, "as --max-context, in tokens", _integer(1, MAX_CONTEXT)),
    Variable(
        "DSV4_THREADS", None, "as --threads: CPU threads of torch", _integer(1, MAX_THREADS)
    ),
)  # fmt: skip
VARIABLES = {v.name: v for v in _VARIABLES}


def read(environ: Mapping[str, str] | None = None, strict: bool = True) -> dict[str, Any]:
    """The value of every variable, its default where it is unset or empty.

    Raises RequestError naming the variable whose text has no meaning; its default if not `strict`.
    """
    environ = os.environ if environ is None else environ
    values = {}
    for v in _VARIABLES:
        text = environ.get(v.name, "")
        try:
            values[v.name] = v.parse(text) if text else v.default
        except ValueError as e:
            values[v.name] = v.default
            if strict:
                raise RequestError(v.name, str(e), text, f"correct or unset {v.name}") from e
    return values


def unknown(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """DSV4_* names that are set but that nothing reads -> the closest known name, or "".

    Those of the test suite are left out.
    """
    environ = os.environ if environ is None else environ
    names = sorted(
        n for n in environ
        if n.startswith(PREFIX) and not n.startswith(_OF_TESTS) and n not in VARIABLES
    )  # fmt: skip
    return {n: next(iter(get_close_matches(n, VARIABLES, 1)), "") for n in names}
