"""The numerics study: its short form runs, its measures measure, its page is up to date."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import dsv4.nano
from dsv4.testing.gates import build_gates, load_countries, run_gate
from dsv4.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import numerics
from numerics_gates import answering
from numerics_measures import BLOCKS, distance, same_choice
from numerics_variants import REFERENCE, VARIANTS

PAGE = Path(__file__).resolve().parents[2] / "docs/numerics.md"
FP8, NVFP4 = "KV: FP8, RoPE part BF16 (584 B)", "KV: NVFP4, RoPE part BF16 (384 B)"
KEYS = "index keys: MXFP4, Hadamard"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.open(dsv4.nano.path())


def tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Title of a Markdown table -> row -> column -> cell."""
    found = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [
            [c.strip() for c in line.strip("|").split("|")] for line in block.splitlines()
        ]
        found[head[0]] = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    return found


def test_the_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a rounding acts its error shows, and nowhere else; a coarser one makes a larger one."""
    assert numerics.main(["--quick"]) == 0
    errors, cosines, whole, gates = tables(capsys.readouterr().out).values()
    assert list(errors) == list(cosines) == [FP8, NVFP4, KEYS]
    assert list(whole) == [REFERENCE.name, FP8, NVFP4, KEYS]
    assert list(gates) == [REFERENCE.name, FP8, NVFP4]
    assert list(errors[FP8]) == list(BLOCKS)
    worst = {v: {b: float(cell.split(" / ")[0]) for b, cell in errors[v].items()} for v in errors}
    for block in ("KV vectors", "SWA", "CSA", "HCA", "streams", "logits"):
        assert 2e-3 < worst[FP8][block] < worst[NVFP4][block] < 0.15, block
    assert {b for b, e in worst[FP8].items() if not e} == {"experts"}
    assert {b for b, e in worst[KEYS].items() if not e} == {"KV vectors", "SWA", "HCA", "experts"}
    for variant in errors:
        for block, e in worst[variant].items():
            cosine, middle = map(float, cosines[variant][block].split(" / "))
            assert cosine <= middle
            assert cosine == pytest.approx(1 - e**2 / 2, abs=0.6 * e**2 + 1e-6), (variant, block)
    assert set(whole[REFERENCE.name].values()) == {"1.000 / 1.000", "100.00 %", "0", "+0.00 %"}
    assert whole[FP8]["same top-k"] == "1.000 / 1.000"  # the indexer has its own keys
    assert 0.9 < float(whole[KEYS]["same top-k"].split(" / ")[0]) < 1
    assert 0 < float(whole[FP8]["KL, nats"]) < float(whole[NVFP4]["KL, nats"]) < 0.1
    for row in gates.values():
        assert set(row.values()) == {"1"}


def test_the_page_shows_every_variant_that_the_script_measures() -> None:
    errors, cosines, whole, gates = [
        rows for title, rows in tables(PAGE.read_text(encoding="utf-8")).items()
        if title in ("relative rms error", "cosine", "the whole", "right answers")
    ]  # fmt: skip
    names = [v.name for v in VARIANTS]
    assert list(whole) == names
    assert list(gates) == [v.name for v in VARIANTS if v.is_asked]
    assert list(errors) == list(cosines) == names[1:]
    assert len(set(names)) == len(names)


def test_distance() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert distance(x, x) == (1.0, 0.0)
    assert distance(2 * x, x) == pytest.approx((1.0, 1.0))
    assert distance(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), x) == pytest.approx(
        (9 / 25, 32**0.5 / 5)
    )


def test_same_choice_counts_queries_that_have_a_choice() -> None:
    """k = 2: from token 11 on a query sees three entries; what comes before is no choice."""
    want = torch.tensor([[-1, -1]] * 11 + [[0, 1], [1, 2], [0, -1]])
    got = torch.tensor([[0, 0]] * 11 + [[0, 1], [0, 2], [1, -1]])
    assert same_choice(want[:13], want[:13]) == 1.0
    assert same_choice(got, want) == pytest.approx((1 + 0.5 + 0) / 3)


class Parrot:
    """Says the words of `answer` after the prompt, whatever it is fed; counts its calls."""

    def __init__(self, answer: str) -> None:
        self.words, self.calls = tokenizer().encode(answer), 0

    def new_cache(self) -> list[int]:
        return []

    def forward(self, ids: torch.Tensor, cache: list[int], last_only: bool = False) -> torch.Tensor:
        self.calls += 1
        cache.extend(ids.tolist())
        prompt = len(tokenizer().encode("The capital of France is")) + 1
        logits = torch.zeros(len(cache), 4096)
        for place in range(len(cache)):
            said = place + 1 - prompt
            logits[place, self.words[said] if 0 <= said < len(self.words) else 0] = 1
        return logits[-1:] if last_only else logits[-len(ids) :]


@pytest.mark.parametrize(("answer", "right"), [(" Paris.", 1), (" Rome.", 0), (" the Paris.", 1)])
def test_a_draft_changes_no_answer(answer: str, right: int) -> None:
    """The taught answer costs one forward; any other is decoded word by word."""
    gate = build_gates(load_countries(dsv4.nano.path() / "facts.json"))[0]
    model = Parrot(answer)
    result = run_gate(gate, answering(model, tokenizer(), gate), tokenizer())
    assert result.score == right
    assert model.calls == 1 + (0 if answer == " Paris." else len(tokenizer().encode(answer)))
