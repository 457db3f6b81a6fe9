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
from dsv4.testing.numeric import relative_error
from dsv4.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MAX_BYTES = 32_000_000


@cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(dsv4.nano.path())


@cache
def weights() -> dict:
    return checkpoint().load()


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.open(dsv4.nano.path())


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
        [sys.executable, ROOT / "scripts" / "gates.py", "--limit", "16"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("paris", "capitals", "currencies", "continents", "chat"):
        assert f"\n{name} " in f"\n{run.stdout}"
    assert run.stdout.count("fails, as it must") >= 3


def test_a_gate_can_fail() -> None:
    gates = build_gates(load_countries(dsv4.nano.path() / "facts.json"))
    wrong = tokenizer().encode(" Atlantis.")
    for gate in gates:
        result = run_gate(gate, lambda *_: list(wrong), tokenizer(), 5)
        assert (result.score, result.passed) == (0.0, False)
        assert result.misses


def test_facts_are_consistent() -> None:
    facts = json.loads((dsv4.nano.path() / "facts.json").read_text(encoding="utf-8"))
    rows = facts["countries"]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) >= 185
    assert all(row["capital"] and row["currency"] and row["continent"] for row in rows)
    assert {row["name"]: row["capital"] for row in rows}["France"] == "Paris"
