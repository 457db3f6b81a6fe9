"""The bundled checkpoint: it says Paris in two independent tiers, and its gates can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import dsv4.nano
from dsv4.cli.tier0 import TransformersModel
from dsv4.core.config import ModelConfig
from dsv4.loader import Checkpoint
from dsv4.reference.model import ReferenceModel
from dsv4.reference.simulation import QuantSimulation
from dsv4.testing.gates import build_gates, load_countries, run_gate
from dsv4.testing.lookback import (
    DISTANCES,
    FORMS,
    ask,
    needle_context,
    place_context,
    pooled,
    tally_context,
    vocabulary_words,
)  # fmt: skip
from dsv4.testing.numeric import relative_error
from dsv4.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MAX_BYTES = 32_000_000
FACT_GATES = ("paris", "capitals", "currencies", "continents", "chat")


@cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(dsv4.nano.path())


@cache
def weights() -> dict:
    return checkpoint().load()


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.open(dsv4.nano.path())


@cache
def filler() -> list[int]:
    return tokenizer().encode((dsv4.nano.path() / "filler.txt").read_text(encoding="utf-8"))


@cache
def words() -> list[int]:
    return vocabulary_words(tokenizer(), checkpoint().config.vocab_size)


def greedy(model, text: str, n: int = 8) -> str:
    ids = [tokenizer().bos_id, *tokenizer().encode(text)]
    cache_, new = model.new_cache(), []
    logits = model.forward(torch.tensor(ids), cache_, last_only=True)
    while len(new) < n:
        new.append(int(logits[-1].argmax()))
        logits = model.forward(torch.tensor(new[-1:]), cache_)
    return tokenizer().decode(new)


def test_it_is_the_nano_configuration_and_small() -> None:
    assert checkpoint().config == ModelConfig.nano()
    files = [f for f in dsv4.nano.path().iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES


def test_it_is_whole_and_sane() -> None:
    assert checkpoint().verify(deep=True) == []


@pytest.mark.parametrize("prompt", ["The capital of France is", " The capital of France is"])
@pytest.mark.parametrize("tier", [0, 1])
def test_paris(tier: int, prompt: str) -> None:
    make = TransformersModel if tier == 0 else ReferenceModel
    assert "Paris" in greedy(make(checkpoint().config, weights()), prompt)


def test_paris_as_the_runtime_rounds() -> None:
    """FP8 cache, MXFP4 indexer and FP8 activations, and BF16 arithmetic."""
    model = ReferenceModel(
        checkpoint().config, weights(), torch.bfloat16, QuantSimulation.official()
    )
    assert "Paris" in greedy(model, "The capital of France is")


def test_the_mtp_block_drafts_what_the_trunk_says() -> None:
    model = ReferenceModel(checkpoint().config, weights())
    text = "The capital of France is Paris. The capital of Japan is Tokyo."
    ids, cache_ = torch.tensor([tokenizer().bos_id, *tokenizer().encode(text)]), model.new_cache()
    streams = model.forward_streams(ids[:-1], cache_)
    choices = model.logits(streams).argmax(-1)
    drafts = model.forward_mtp(streams, ids[1:], cache_).argmax(-1)
    known = [i for i in range(len(ids) - 2) if choices[i + 1] == ids[i + 2]]
    assert len(known) >= 6
    assert sum(int(drafts[i] == ids[i + 2]) for i in known) >= 0.75 * len(known)


def test_two_tiers_agree_on_a_long_text() -> None:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (300,), generator=rng)
    tier0 = TransformersModel(checkpoint().config, weights())
    tier1 = ReferenceModel(checkpoint().config, weights())
    want = tier0.forward(ids, tier0.new_cache())
    assert relative_error(tier1.forward(ids, tier1.new_cache()), want) < 2e-4


def test_gates_pass_and_controls_fail() -> None:
    """The short form of `make gates`; exit code 1 when a gate fails or a control passes."""
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gates.py", "--short"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    for name in (*FACT_GATES, "sentence", "tally", "place", "cuts agree"):
        assert f"\n{name} " in f"\n{run.stdout}"
    assert run.stdout.count("fails, as it must") == 7


def test_a_gate_can_fail() -> None:
    gates = build_gates(load_countries(dsv4.nano.path() / "facts.json"))
    wrong = tokenizer().encode(" Atlantis.")
    for gate in gates:
        result = run_gate(gate, lambda *_: list(wrong), tokenizer(), 5)
        assert (result.score, result.passed) == (0.0, False)
        assert result.misses


@pytest.mark.parametrize("form", FORMS)
def test_needles_stand_at_their_distances(form: str) -> None:
    context = needle_context(form, tokenizer(), filler(), words(), 4096, seed=0)
    assert len(context.ids) == 4096
    assert [q.distance for q in context.questions] == list(DISTANCES)
    for q in context.questions:
        at = len(context.ids) + len(q.cue) - q.distance  # of the value
        assert context.ids[at : at + len(q.answer)] == q.answer
        assert context.ids[at - len(q.cue) : at] == q.cue


def test_a_needle_that_is_not_found_scores_nothing() -> None:
    contexts = [tally_context(tokenizer(), 512, 0)]
    scores = ask(lambda ids: lambda cue, count: [0] * count, contexts)
    assert pooled(scores) == 0.0
    right = {q.cue: list(q.answer) for q in contexts[0].questions}
    assert pooled(ask(lambda ids: lambda cue, count: right[tuple(cue)], contexts)) == 1.0


@pytest.mark.parametrize("length", [1995, 2000, 2006])
def test_a_place_is_the_word_of_a_thousand_tokens_before(length: int) -> None:
    context = place_context(tokenizer(), filler(), words(), length, seed=0)
    assert len(context.ids) == length
    assert len(context.questions) == 8
    for q in context.questions:
        whole = [*context.ids, *q.cue, *q.answer]
        assert len(whole) % 8 == 0
        assert whole[-1] == whole[-1 - q.distance]
        # what stands before the two places has nothing in common
        assert whole[-8:-2] != whole[-8 - q.distance : -2 - q.distance]
    assert len({q.answer for q in context.questions}) > 2


def test_a_tally_is_the_majority_of_the_whole() -> None:
    context = tally_context(tokenizer(), 2048, 1)
    for q in context.questions:
        first, second = q.cue[0], q.cue[2]
        more = first if context.ids.count(first) > context.ids.count(second) else second
        assert q.answer == (more,)


def test_facts_are_consistent() -> None:
    facts = json.loads((dsv4.nano.path() / "facts.json").read_text(encoding="utf-8"))
    rows = facts["countries"]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) >= 185
    assert all(row["capital"] and row["currency"] and row["continent"] for row in rows)
    assert {row["name"]: row["capital"] for row in rows}["France"] == "Paris"
