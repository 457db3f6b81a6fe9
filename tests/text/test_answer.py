import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.text.answer import AnswerStream
from dsv4.text.chat import split_reasoning
from dsv4.text.stop import Finish


def run(stream, ids):
    pieces = [p for i in ids for p in stream.push(i)] + stream.close("interrupted")
    joined = {"reasoning": "", "text": ""}
    for kind, text in pieces:
        assert text
        joined[kind] += text
    return joined["reasoning"], joined["text"]


@pytest.fixture
def end(small):
    return small.control_id("</think>")


def test_reasoning_and_text_come_apart(small, end):
    stream = AnswerStream(small, (), {small.eos_id}, thinking=True)
    ids = [*small.encode("Hm. é"), end, *small.encode("Paris."), small.eos_id, 5]
    assert run(stream, ids) == ("Hm. é", "Paris.")
    assert stream.finish == Finish("stop", small.eos_id)
    assert stream.num_tokens == len(ids) - 1


def test_stop_strings_count_in_the_text_only(small, end):
    stream = AnswerStream(small, ["an"], {small.eos_id}, thinking=True)
    ids = [*small.encode("an answer"), end, *small.encode("The assistant"), small.eos_id]
    assert run(stream, ids) == ("an answer", "The assist")
    assert stream.finish == Finish("stop", "an")


def test_limit_counts_reasoning_its_end_and_text(small, end):
    ids = [*small.encode("ab"), end, *small.encode("cdef")]
    for limit in range(len(ids)):
        stream = AnswerStream(small, (), (), limit, thinking=True)
        reasoning, text = run(stream, ids)
        assert (reasoning, text) == split_reasoning(small, ids[:limit], thinking=True)
        assert (stream.finish, stream.num_tokens) == (Finish("length"), limit)


def test_limit_at_the_end_of_reasoning(small, end):
    stream = AnswerStream(small, (), (), 1, thinking=True)
    assert run(stream, [end, 70]) == ("", "")
    assert stream.finish == Finish("length")


def test_eos_inside_the_reasoning_ends_the_answer(small):
    stream = AnswerStream(small, (), {small.eos_id}, thinking=True)
    assert run(stream, [*small.encode("Hm"), small.eos_id, 70]) == ("Hm", "")
    assert stream.finish == Finish("stop", small.eos_id)


def test_interrupted(small):
    stream = AnswerStream(small, ["loX"])
    assert run(stream, small.encode("Hello")) == ("", "Hello")
    assert stream.finish == Finish("interrupted")
    assert stream.close() == []


@given(st.lists(st.integers(0, 478), max_size=30), st.booleans())
@settings(max_examples=300, deadline=None)
def test_without_stops_it_equals_split_reasoning(small, ids, thinking):
    assert run(AnswerStream(small, thinking=thinking), ids) == split_reasoning(small, ids, thinking)
