"""Every bug of support/planted_bugs.py turns a golden check red, by a wide margin."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter

import pytest
import torch

from dsv4.reference.simulation import QuantSimulation
from dsv4.testing.numeric import relative_error
from support import golden, w4a8
from support.planted_bugs import BUGS, Bug

CAUGHT = 1e-4  # the golden tests pass below 1e-5


def plant(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> None:
    """Replace the bug's target, a function of a module or a method of a class."""
    module, name = bug.target, ""
    while True:
        module, _, leaf = module.rpartition(".")
        name = f"{leaf}.{name}" if name else leaf
        try:
            owner = import_module(module)
            break
        except ModuleNotFoundError:
            continue
    holder, _, attribute = name.rpartition(".")
    target = attrgetter(holder)(owner) if holder else owner
    monkeypatch.setattr(target, attribute, bug.make(getattr(target, attribute)))


def deviation(check: str) -> float:
    """How far the checked result is from the golden one; 0 .. 1 for kvquant, a share of rows."""
    if check == "w4a8":
        return w4a8.deviation()
    if check == "decode":
        return relative_error(golden.decode(golden.model(), 60), golden_decode(60))
    if check == "kvquant":
        want = golden.golden("kvquant")["logits"]
        got = golden.run(golden.model(QuantSimulation.cache())).logits
        rows = (got - want).abs().amax(dim=1) / want.abs().max()
        return float((rows[:100] >= 1e-3).float().mean())
    got, want = golden.run(golden.model()), golden.golden("exact")
    if check == "mtp":
        return relative_error(got.mtp_logits, want["mtp_logits"])
    return relative_error(got.logits, want["logits"])


def golden_decode(steps: int) -> torch.Tensor:
    return golden.golden("exact")["decode_logits"][: -(-steps // golden.STRIDE)]


@pytest.mark.parametrize("check", ["prefill", "decode", "mtp", "kvquant", "w4a8"])
def test_the_checks_pass_without_a_bug(check: str) -> None:
    assert deviation(check) < 1e-5


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name)
def test_planted_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, bug)
    error = deviation(bug.check)
    assert error > CAUGHT or error != error, f"{bug.name}: deviation only {error:.1e}"


def test_names_are_unique() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 20
