"""Text of a model made safe to print on a terminal."""

from __future__ import annotations

_STRIP = {c: None for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}


def strip_control(text: str) -> str:
    """Drop C0, DEL and C1 characters but newline and tab, so that no escape sequence is left."""
    return text.translate(_STRIP)
