"""The gates of looking back can go red: each fails for a model that is wrong in its way.

What damaged weights or a damaged engine do to the trained checkpoint is shown by `make gates`;
here are the mechanics, on a tiny random model and on made-up answers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import dsv4.nano
from dsv4.reference.model import ReferenceModel
from dsv4.testing.lookback import Score
from dsv4.testing.tiny import random_weights, tiny_config
from dsv4.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from damage import BLIND, DENSE, MISTAKES
from gate_measures import CUTS_AGREE, SHORT, STEPS_AFTER, Measures, needles_pass
from lookback_gates import LookBack

GOOD = Measures(needles=1.0, tallies=1.0, places=1.0, cuts=5e-7, loss=2.0)


def look_back(dtype: torch.dtype = torch.float64) -> LookBack:
    config = tiny_config(vocab_size=4096, num_nextn_predict_layers=0)
    model = ReferenceModel(config, random_weights(config), dtype)
    tested = LookBack(model, Tokenizer.open(dsv4.nano.path()), SHORT)
    ids = tested.text()[: 2 * 128 + STEPS_AFTER]
    tested.text = lambda: ids  # shorter, for speed
    return tested


def test_cuts_agree_on_a_sound_model() -> None:
    assert look_back().cuts()[0] < CUTS_AGREE


@pytest.mark.parametrize("cut", [1, 2])
def test_nan_in_any_cut_is_no_agreement(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tested, calls = look_back(), []
    whole = tested._in_parts

    def in_parts(ids: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        calls.append(sizes)
        logits = whole(ids, [len(ids)])
        return logits * torch.nan if len(calls) == cut + 1 else logits

    monkeypatch.setattr(tested, "_in_parts", in_parts)
    assert not tested.cuts()[0] < CUTS_AGREE


@pytest.mark.parametrize("name", ["entries one step early", "open window forgotten"])
def test_cuts_disagree_on_a_broken_one(name: str) -> None:
    tested = look_back()
    with MISTAKES[name]():
        assert tested.cuts()[0] > 10 * CUTS_AGREE


@pytest.mark.parametrize("name", [*BLIND, *MISTAKES])
def test_every_damage_changes_the_logits_and_ends_with_its_block(name: str) -> None:
    damage, tested = (BLIND | MISTAKES)[name], look_back()
    ids = tested.text()[:150]
    # forgetting shows after a call that leaves a window open
    sizes = [67, len(ids) - 67]
    sound = tested._in_parts(ids, sizes)
    with damage():
        assert not torch.equal(tested._in_parts(ids, sizes), sound)
    assert torch.equal(tested._in_parts(ids, sizes), sound)


def test_dense_attention_sees_more_than_the_top_k() -> None:
    tested = look_back()
    ids = tested.text()[:150]
    with DENSE():
        dense = tested._in_parts(ids, [len(ids)])
    assert not torch.equal(dense, tested._in_parts(ids, [len(ids)]))


@pytest.mark.parametrize(
    ("name", "value", "broken"),
    [
        ("needles", 0.94, "needles"), ("tallies", 0.79, "tally"), ("places", 0.94, "place"),
        ("cuts", 2e-5, "cuts"), ("cuts", float("nan"), "cuts"), ("loss", 2.11, "loss"),
        ("loss", float("nan"), "loss"),
    ],
)  # fmt: skip
def test_a_measure_beyond_its_limit_is_named(name: str, value: float, broken: str) -> None:
    assert GOOD.broken(GOOD) == []
    measures = Measures(**{**GOOD.__dict__, name: value})
    assert measures.broken(GOOD) == [broken]


def test_a_mistake_that_nothing_notices_is_a_failure(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = look_back()
    monkeypatch.setattr("lookback_gates.ask", lambda *_: {1000: Score(9, 9)})
    monkeypatch.setattr(tested, "cuts", lambda: (0.0, 2.0))
    tested.mistakes()
    lines = capsys.readouterr().out.splitlines()
    assert not tested.good
    assert sum(line.endswith("FAIL") for line in lines) == len(MISTAKES)


@pytest.mark.parametrize("right", [0, 7])
def test_gates_fail_when_answers_are_wrong(
    right: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = look_back()
    scores = dict.fromkeys((64, 120, 256, 512, 1024), Score(right, 8))
    monkeypatch.setattr("lookback_gates.ask", lambda *_: scores)
    monkeypatch.setattr(tested, "cuts", lambda: (1.0, 2.0))
    tested.gates()
    rows = [x for x in capsys.readouterr().out.splitlines() if x.endswith(("pass", "FAIL"))]
    assert not tested.good
    assert [row.split()[0] for row in rows if row.endswith("FAIL")] == [
        "sentence", "tally", "place", "cuts",
    ]  # fmt: skip


def test_one_distance_that_fails_fails_the_needles() -> None:
    scores = {64: Score(20, 20), 256: Score(20, 20), 2048: Score(18, 20)}
    assert not needles_pass(scores, 20)
    assert needles_pass(scores | {2048: Score(19, 20)}, 20)
    assert not needles_pass(scores | {64: Score(15, 20), 2048: Score(20, 20)}, 20)
