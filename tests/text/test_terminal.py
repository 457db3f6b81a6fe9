import sys

from dsv4.text.terminal import strip_control


def test_escape_sequences_lose_their_escape():
    assert strip_control("a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\x7f\x00b\n\tc") == (
        "a[31mred]0;title2Jb\n\tc"
    )


def test_exactly_the_control_characters_go():
    dropped = {c for c in map(chr, range(sys.maxunicode + 1)) if not strip_control(c)}
    assert dropped == {chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))}
