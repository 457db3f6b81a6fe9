import json
import sys

import pytest

from dsv4.text.terminal import strip_control, to_json


def test_escape_sequences_lose_their_escape():
    assert strip_control("a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\x7f\x00b\n\tc") == (
        "a[31mred]0;title2Jb\n\tc"
    )


def test_exactly_the_control_characters_go():
    dropped = {c for c in map(chr, range(sys.maxunicode + 1)) if not strip_control(c)}
    assert dropped == {chr(c) for c in (
        *range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A),
    )}  # fmt: skip


def test_json_holds_no_control_character_and_stays_readable():
    every = " ".join(map(chr, range(sys.maxunicode + 1)))  # two surrogates would make a character
    text = to_json({"Grüße, 日本語": every})
    assert json.loads(text) == {"Grüße, 日本語": every}
    assert strip_control(text) == text
    assert "Grüße, 日本語" in text
    text.encode()  # lone surrogates are escaped too
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(float("nan"))
