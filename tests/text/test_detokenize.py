import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust

from dsv4.text.detokenize import Detokenizer


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


@given(st.lists(st.integers(0, 129279), max_size=40))
@settings(max_examples=300, deadline=None)
def test_stream_joins_to_the_full_decode(official, rust, ids):
    assert "".join(stream(official, ids)) == official.decode(ids)
    assert official.decode(ids) == rust.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def rust(official_folder) -> Rust:
    return Rust.from_file(str(official_folder / "tokenizer.json"))


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_byte_tokens_of_any_text_never_show_a_broken_character(small, text):
    byte_ids = [i for c in text for b in c.encode() for i in [id_of_byte(small, b)]]
    pieces = stream(small, byte_ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


def id_of_byte(tokenizer, byte):
    if not hasattr(tokenizer, "by_byte"):
        table = {tokenizer.token_bytes(i): i for i in range(3, 300)}
        tokenizer.by_byte = [table[bytes([b])] for b in range(256)]
    return tokenizer.by_byte[byte]


@given(st.binary(max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_bytes_stream_as_they_decode(small, data):
    ids = [id_of_byte(small, b) for b in data]
    assert "".join(stream(small, ids)) == data.decode("utf-8", "replace")


def test_a_character_appears_with_its_last_byte(small):
    ids = [id_of_byte(small, b) for b in "é🙂".encode()]
    assert stream(small, ids) == ["", "é", "", "", "", "🙂", ""]


def test_flush_of_half_a_character_gives_one_replacement(small):
    ids = [id_of_byte(small, b) for b in "🙂".encode()[:3]]
    assert stream(small, ids) == ["", "", "", "\ufffd"]


def test_a_control_token_inside_a_character_breaks_only_that_character(small):
    first, *_ = (id_of_byte(small, b) for b in "é".encode())
    ids = [first, small.control_id("<think>"), *small.encode("ok")]
    assert "".join(stream(small, ids)) == "\ufffd<think>ok"


def test_flush_makes_it_new(small):
    detokenizer = Detokenizer(small)
    detokenizer.push(id_of_byte(small, 0xF0))
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(id_of_byte(small, ord("a"))) == "a"
