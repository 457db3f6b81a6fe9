"""Two tiers that agree pass, one that errs fails, and near-ties are told from misses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4.nano
from dsv4.layers.moe import SharedExpert
from dsv4.text.tokenizer import Tokenizer
from support.oracle_ops import use_oracles

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import agreement as script
from agreement import Comparison, Miss, compare, prompts_of, report

NANO = ["nano", "--device", "cpu", "--prompts", "3", "--max-new", "4"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(dsv4.nano.path())


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """On the CPU, with oracles in place of the kernels."""
    use_oracles(monkeypatch)
    monkeypatch.setattr(script, "LONGEST", 24)
    return script.main([*NANO, *argv])


def test_nano(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--seed", "1") == 0
    out = capsys.readouterr().out
    assert "questions 2 of 2 answers are equal" in out
    assert out.endswith("PASS\n")


def test_rounding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier 1 with itself: no kernel, no production model."""
    monkeypatch.setattr(script, "LONGEST", 24)
    monkeypatch.setattr(script, "ProductionModel", None)
    assert script.main([*NANO, "--seed", "1", "--rounding"]) == 0
    out = capsys.readouterr().out
    assert "questions 2 of 2 answers are equal" in out
    assert "logits differ by 0.0" in out
    assert "differ by 0.0000" not in out


def test_a_broken_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SharedExpert, "__call__", lambda self, x: 0 * x)
    assert run(monkeypatch) == 1
    assert capsys.readouterr().out.endswith("FAIL\n")


def test_prompts_of_both_kinds(tokenizer: Tokenizer) -> None:
    facts, texts = prompts_of(tokenizer, 200, 0)
    assert (len(facts), len(texts)) == (100, 100)
    assert len({tuple(p) for p in facts + texts}) == 200
    assert all(p[0] == tokenizer.bos_id for p in facts + texts)
    assert 17 <= min(map(len, texts)) < 40 < 150 < max(map(len, texts)) <= 193
    assert prompts_of(tokenizer, 200, 1) != (facts, texts)


class Fixed:
    """A model that knows its logits."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def new_cache(self) -> None:
        """None is needed."""

    def forward(self, ids: Tensor, cache: None) -> Tensor:
        assert ids.tolist() == [5, 6, 1, 2]
        return self.logits


def test_the_first_miss_and_its_margin() -> None:
    wanted = torch.zeros(4, 4)
    for row, token in enumerate((0, 1, 2, 3)):
        wanted[row, token] = 2.0
    wanted[2, 3], wanted[2, 1] = 1.75, 1.0
    models: Any = Fixed(wanted), Fixed(wanted + 0.5)
    same = compare(*models, [5, 6], [1, 2, 3])
    assert same == Comparison(None, 3, 3, 0.25)

    models = Fixed(wanted), Fixed(wanted)
    ids: list[Any] = [[5, 6], [1, 2, 0]]
    assert compare(*models, *ids).miss == Miss((5, 6), 2, 0, 3, 2, 2.0)
    wanted[1] = torch.tensor([0.0, 1.5, 1.75, 2.0])
    assert compare(*models, *ids) == Comparison(Miss((5, 6), 0, 1, 3, 3, 0.5), 1, 3, 0.0)


def agree(count: int, square: float = 0.01) -> list[Comparison]:
    return [Comparison(None, 16, 16, square)] * count


def parts(margin: float, equal: int = 15, square: float = 0.01) -> Comparison:
    return Comparison(Miss((8, 9), 3, 40, 41, 2, margin), equal, 16, square)


@pytest.mark.parametrize(
    ("facts", "texts", "good"),
    [
        (agree(20), agree(20), True),
        ([*agree(19), parts(0.59)], agree(20), True),
        ([*agree(18), parts(0.1), parts(0.1)], agree(20), False),  # 90 % of the questions
        (agree(20), [parts(0.59)] * 12 + agree(8), True),
        (agree(20), [*agree(19), parts(0.61)], False),  # no near-tie
        (agree(20), [parts(0.1, equal=3)] * 2 + agree(18), False),  # 92 % of the tokens
        (agree(20, 0.0), [*agree(19, 0.0), parts(0.1, square=0.0)], False),
    ],
    ids=["all", "a tie", "too many", "texts part", "no tie", "texts part early", "small error"],
)
def test_what_passes(
    facts: list[Comparison], texts: list[Comparison], good: bool, tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert report(facts, texts, tokenizer) is good
    out = capsys.readouterr().out
    assert ("NO" in out) is not good
    assert f"of {len(facts) + len(texts)} answers are equal" in out
