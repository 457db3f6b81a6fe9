import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.core.errors import RequestError
from dsv4.text.stop import Finish, OutputStream, StopChecker


def oracle(text, stops):
    """Character by character: the first complete stop string, the longest of those at one end."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def run(pieces, stops):
    checker, shown = StopChecker(stops), []
    for piece in pieces:
        shown.append(checker.push(piece))
    return shown, checker


words = st.text("ab\n", max_size=12)


@given(words, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=800, deadline=None)
def test_any_split_gives_the_same_text_and_stop(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, checker = run(pieces, stops)
    expected, stop = oracle(text, stops)
    assert checker.matched == stop
    assert "".join(shown) + checker.flush() == expected


@given(words, st.text("ab\n", min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_only_a_possible_start_is_held_back(text, stop):
    shown, checker = run(text, [stop])
    if checker.matched is None:
        held = text[len("".join(shown)) :]
        assert stop.startswith(held)
        assert len(held) < len(stop)
        longer = (text[-n:] for n in range(len(held) + 1, len(stop)))
        assert not any(stop.startswith(t) and len(t) > len(held) for t in longer)


def test_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match="stop"):
        StopChecker([""])


def outcome(stream, ids):
    text = stream.extend(ids) + stream.close("interrupted")
    return text, stream.finish, stream.num_tokens


@pytest.mark.parametrize(
    ("stops", "ids_of", "limit", "expected"),
    [
        ((), ["Hello", "EOS", "Hello"], None, ("Hello", "stop", "EOS")),
        ((), ["Hello"], None, ("Hello", "interrupted", None)),
        (("lo H",), ["Hello", " Hello"], None, ("Hel", "stop", "lo H")),
        (("loX",), ["Hello", "EOS"], None, ("Hello", "stop", "EOS")),
        (("loX",), ["Hello"], None, ("Hello", "interrupted", None)),
        ((), ["Hello"], 0, ("", "length", None)),
    ],
)
def test_output_stream(small, stops, ids_of, limit, expected):
    ids = [i for w in ids_of for i in ([small.eos_id] if w == "EOS" else small.encode(w))]
    stream = OutputStream(small, StopChecker(stops, {small.eos_id}), limit)
    text, finish, _ = outcome(stream, ids)
    matched = small.eos_id if expected[2] == "EOS" else expected[2]
    assert (text, finish) == (expected[0], Finish(expected[1], matched))


def test_ids_behind_the_end_are_not_counted(small):
    ids = [*small.encode("Hello"), small.eos_id, *small.encode("Hello")]
    stream = OutputStream(small, StopChecker((), {small.eos_id}))
    assert stream.extend(ids) == "Hello"
    assert stream.num_tokens == len(small.encode("Hello")) + 1
    assert stream.push(5) == ""
    assert stream.num_tokens == len(small.encode("Hello")) + 1


def test_length_limit_releases_held_text_and_half_characters(small):
    ids = [*small.encode("x"), next(i for i in range(300) if small.token_bytes(i) == b"\xf0")]
    stream = OutputStream(small, StopChecker(["xy"]), max_tokens=2)
    assert stream.extend(ids) == "x\ufffd"
    assert stream.finish == Finish("length")
    assert stream.num_tokens == 2


def test_stop_string_wins_over_the_length_limit_at_the_same_token(small):
    ids = small.encode("The capital")
    stream = OutputStream(small, StopChecker(["capital"]), max_tokens=len(ids))
    assert stream.extend(ids) == "The "
    assert stream.finish == Finish("stop", "capital")


def test_stop_string_completed_by_a_broken_last_character(small):
    half = next(i for i in range(300) if small.token_bytes(i) == b"\xf0")
    stream = OutputStream(small, StopChecker(["x\ufffd"]))
    assert stream.extend([*small.encode("ax"), half]) + stream.close() == "a"
    assert stream.finish == Finish("stop", "x\ufffd")


def test_text_of_a_stop_id_is_not_shown(small):
    think = small.control_id("</think>")
    stream = OutputStream(small, StopChecker((), {think}))
    assert stream.extend([*small.encode("ab"), think]) == "ab"


def test_negative_limit_is_refused(small):
    with pytest.raises(RequestError, match="max_tokens"):
        OutputStream(small, StopChecker(), -1)
