"""Training rows: needles and places stand where their marks say, tallies are counted right."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import dsv4.nano
from training.needles import FORMS, MIN_DISTANCE, NUM_DIGITS, NeedleWriter, Row, _log_uniform
from training.places import DISTANCE, PLACE, STRIDE, PlaceWriter
from training.prepare_data import copy_documents
from training.rows import Steps
from training.tally import TALLY, TallyWriter
from training.tokenizer import open_tokenizer


@cache
def writer() -> NeedleWriter:
    tokenizer = open_tokenizer(dsv4.nano.path())
    text = (dsv4.nano.path() / "filler.txt").read_text(encoding="utf-8")
    return NeedleWriter(tokenizer, np.array(tokenizer.encode(text, add_special_tokens=False).ids))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_every_mark_is_the_distance_to_the_same_value(form: str, seed: int) -> None:
    row = writer().row(np.random.default_rng(seed), 1024, form)
    marked = np.flatnonzero(row.marks)
    assert len(marked) >= 4
    assert row.ids[0] == 0
    assert len(row.ids) == len(row.marks) == 1024
    for at in marked:
        distance = row.marks[at]
        assert row.ids[at] == row.ids[at - distance]
        # the key before the value is repeated too, or an earlier digit is
        assert row.ids[at - 1] == row.ids[at - 1 - distance]


def test_one_answer_for_each_needle_when_each_is_asked_once() -> None:
    row = writer().ask_at_end(np.random.default_rng(0), 2048, "digits", 8, each_once=True)
    assert (row.marks > 0).sum() == 8 * NUM_DIGITS
    assert row.marks[row.marks > 0].min() >= MIN_DISTANCE


def test_queries_are_drawn_with_replacement() -> None:
    """With each key asked once, answering an unused value would be a good guess."""
    rows = [writer().ask_at_end(np.random.default_rng(s), 1024, "direct", 8) for s in range(8)]
    answers = [row.ids[row.marks > 0].tolist() for row in rows]
    assert any(len(set(a)) < len(a) for a in answers)


def test_distances_reach_far() -> None:
    rows = [writer().row(np.random.default_rng(s), 4096, "direct") for s in range(16)]
    marks = np.concatenate([row.marks[row.marks > 0] for row in rows])
    assert (marks > 2000).sum() >= 4
    assert (marks < 128).sum() >= 4


@pytest.mark.parametrize("seed", range(4))
def test_tally_answers_are_the_majority(seed: int) -> None:
    tally = TallyWriter(open_tokenizer(dsv4.nano.path()))
    row = tally.row(np.random.default_rng(seed), 512)
    marked = np.flatnonzero(row.marks == TALLY)
    assert len(marked) >= 3
    for at in marked:
        first, second = row.ids[at - 4], row.ids[at - 2]
        # a question names both words once, and answers only add to the majority
        counts = [(row.ids[: at - 4] == word).sum() for word in (first, second)]
        assert row.ids[at] == (first if counts[0] > counts[1] else second)


def test_near_keys_share_a_word() -> None:
    """Distractors: "red house", "red river", "old house"; one word of a key is not enough."""
    w, rng = writer(), np.random.default_rng(0)
    _, free = w.fill(rng, 1024)
    keys = [tuple(key) for key, _ in w.needles(rng, free, 8, "sentence", two_words=True)]
    assert len(set(keys)) == 8
    assert len({a for a, _ in keys}) < 8
    assert len({b for _, b in keys}) < 8


def test_distances_are_log_uniform() -> None:
    """As many in each octave between the shortest and the longest."""
    rng = np.random.default_rng(0)
    drawn = np.array([_log_uniform(rng, 16, 4096) for _ in range(8000)])
    counts = np.histogram(np.log2(drawn + 0.5), bins=np.arange(4, 13))[0]
    assert counts.min() > 0.85 * 1000
    assert counts.max() < 1.15 * 1000


@pytest.mark.parametrize("seed", range(4))
def test_a_place_repeats_after_exactly_its_distance(seed: int) -> None:
    row = PlaceWriter(writer()).row(np.random.default_rng(seed), 2049)
    marked = np.flatnonzero(row.marks == PLACE)
    assert len(marked) == (2049 - DISTANCE) // STRIDE
    assert (marked % STRIDE == STRIDE - 1).all()
    assert (row.ids[marked] == row.ids[marked - DISTANCE]).all()
    assert len(set(row.ids[marked].tolist())) > 12
    # the text before the two places differs, so that only the position tells
    same = row.ids[marked - 3] == row.ids[marked - 3 - DISTANCE]
    assert same.mean() < 0.2


def test_a_copy_comes_back_after_other_text() -> None:
    paragraphs = [" ".join(f"{name}{i}" for i in range(60)) for name in "abcdef"]
    for span, middle, again, _ in copy_documents(paragraphs, 20, seed=0):
        assert again == (f" {span[0]}", True)
        assert not span[1]
        assert not middle[1]
        assert len(span[0].split()) >= 8


def test_steps_mix_kinds_and_lengths() -> None:
    class Maker:
        """Rows that say what they are."""

        def __init__(self) -> None:
            self.needles, self.tally, self.place = writer(), None, None

        def text(self, rng: np.random.Generator, length: int) -> Row:
            return Row(np.zeros(length, np.int64), np.ones(length, np.int32))

    steps = Steps(Maker(), 2048, {256: 0.5, 512: 0.5}, {"text": 0.5, "direct": 0.5}, seed=0)  # type: ignore[arg-type]
    shapes, texts = set(), 0
    for _, (ids, marks) in zip(range(8), steps, strict=False):
        shapes.add(tuple(ids.shape))
        texts += int((marks == 1).all(1).sum())
    assert shapes == {(8, 257), (4, 513)}
    assert 8 < texts < 40
