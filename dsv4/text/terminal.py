"""Text of a model made safe to print on a terminal."""

from __future__ import annotations

import json
import re
from typing import Any

# C0 but newline and tab, DEL and C1; then the controls that turn the direction of the text around
_CONTROL = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_STRIP = {c: None for c in _CONTROL if chr(c) not in "\n\t"}
# What json.dumps leaves as it is: the same, and lone surrogates, which no file can hold.
_RAW_IN_JSON = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def strip_control(text: str) -> str:
    """Drop control characters but newline and tab, so that no escape sequence is left.

    C0, DEL, C1, and the bidirectional controls U+202A to U+202E and U+2066 to U+2069, which make
    text read as something else than it is.
    """
    return text.translate(_STRIP)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that people can read and a terminal can show: control characters are escaped in it.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return _RAW_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
