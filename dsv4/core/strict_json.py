"""JSON from untrusted files: size-capped by the caller, duplicate keys and NaN refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dsv4.core.errors import CheckpointError, printable

_FIX = "fetch this file again"


class _DuplicateKeyError(ValueError):
    pass


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object. Raises a ValueError that parse_json reports for a repeated key."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return out


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def parse_json(
    data: bytes | bytearray,
    file: str,
    make_object: Callable[[list[tuple[str, Any]]], Any] = unique_keys,
) -> Any:
    """The value of UTF-8 JSON `data`; every object in it is what `make_object` makes of its pairs.

    Raises CheckpointError: "duplicate" for a repeated key, "json" for anything else that is not
    plain JSON, nesting too deep for the parser included.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=make_object, parse_constant=_no_constant
        )
    except _DuplicateKeyError as error:
        key = printable(error)
        raise CheckpointError("duplicate", file, key, "the key appears twice", _FIX) from None
    except RecursionError:
        raise CheckpointError("json", file, "", "nested too deeply", _FIX) from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, over-long integers
        raise CheckpointError(
            "json", file, "", f"not valid JSON: {printable(error)}", _FIX
        ) from None
