"""Arrivals at random times against an engine, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest

from dsv4.core.errors import RequestError
from dsv4.engine.engine import Engine
from dsv4.engine.load import Load, Percentiles, time_load
from dsv4.engine.model import EngineLimits
from support.oracle_ops import use_oracles
from support.production import production, random_weights, served_config

CONFIG = served_config(num_hidden_layers=2, compress_ratios=(0, 4), num_hash_layers=1)
STEP_S = 0.01


class Clock:
    """Goes on by what is slept, and by STEP_S a step."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept, step = 100.0, [0.0], engine.step

        def timed() -> Any:
            self.now += STEP_S
            return step()

        monkeypatch.setattr(engine, "step", timed)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + 1e-6  # a sum of small numbers may not move it
        self.slept.append(seconds)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Engine, Clock]]:
    use_oracles(monkeypatch)

    def run(load: Load, max_requests: int = 4) -> tuple[Any, Engine, Clock]:
        limits = EngineLimits(load.context, max_requests, max_rows=64)
        engine = Engine(production(CONFIG, random_weights(CONFIG), limits=limits))
        clock = Clock(engine, monkeypatch)
        return time_load(engine, load, clock, clock.sleep), engine, clock

    return run


def test_seldom_requests_wait_for_nobody(timed: Any) -> None:
    times, engine, clock = timed(Load(0.1, 6, (2, 9), (3, 5)))
    load = Load(0.1, 6, (2, 9), (3, 5))
    arrivals = load.arrivals(CONFIG.vocab_size)
    assert times.tokens == sum(length for _, _, length in arrivals)
    # a step to run it, and one more until the host looks
    assert times.first_token.p50 == pytest.approx(2 * STEP_S, abs=1e-5)
    assert times.first_token.p99 == pytest.approx(2 * STEP_S, abs=1e-5)
    assert times.between_tokens.p50 == pytest.approx(STEP_S, abs=1e-5)
    last, _, length = arrivals[-1]
    assert times.seconds == pytest.approx(last + (length + 1) * STEP_S, abs=1e-4)
    assert sum(clock.slept) == pytest.approx(last, abs=1.0)
    assert not engine.has_work


def test_a_crowd_waits_for_a_slot(timed: Any) -> None:
    times, _, _ = timed(Load(1e5, 12, (1, 4), (4, 4)), 2)
    assert times.tokens == 48
    assert times.first_token.p99 > 10 * STEP_S
    assert times.first_token.p50 < times.first_token.p95 <= times.first_token.p99
    assert times.seconds > 12 * STEP_S


def test_answers_of_one_token(timed: Any) -> None:
    times, _, _ = timed(Load(50.0, 3, (1, 2), (1, 1)))
    assert (times.tokens, times.between_tokens) == (3, None)


def test_a_load_that_fails_leaves_nothing_to_the_next(
    timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Load(1e5, 9, (1, 4), (4, 6))
    alone, engine, clock = timed(load, 2)
    step, left = engine.step, iter(range(5))

    def fails_once() -> Any:
        known = step()
        if next(left, None) == 4:
            engine._known += known  # as where a step fails that has looked at the one before
            raise RuntimeError("out of memory")
        return known

    monkeypatch.setattr(engine, "step", fails_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        time_load(engine, load, clock, clock.sleep)
    assert not engine._waiting
    assert not engine._running
    again = time_load(engine, load, clock, clock.sleep)
    assert (again.tokens, again.first_token.p99) == (
        alone.tokens, pytest.approx(alone.first_token.p99, abs=2 * STEP_S)
    )  # fmt: skip


def test_arrivals_are_poisson_and_repeatable() -> None:
    load = Load(20.0, 4000, (5, 9), (1, 3), seed=1)
    arrivals = load.arrivals(100)
    due = [at for at, _, _ in arrivals]
    gaps = [b - a for a, b in zip([0.0, *due], due, strict=False)]
    assert mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert mean(g * g for g in gaps) == pytest.approx(2 / 20**2, rel=0.15)  # of an exponential
    assert {len(prompt) for _, prompt, _ in arrivals} == {5, 6, 7, 8, 9}
    assert {n for _, _, n in arrivals} == {1, 2, 3}
    assert all(0 <= token < 100 for _, prompt, _ in arrivals for token in prompt)
    assert arrivals == Load(20.0, 4000, (5, 9), (1, 3), seed=1).arrivals(100)
    assert arrivals != Load(20.0, 4000, (5, 9), (1, 3), seed=2).arrivals(100)


def test_percentiles() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([7.0]) == Percentiles(7.0, 7.0, 7.0)
    assert Percentiles.of([float(n) for n in range(200, 0, -1)]) == Percentiles(100, 190, 198)
    assert Percentiles.of([1.0, 2.0, 3.0]) == Percentiles(2.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rate", 0.0), ("rate", float("nan")), ("rate", -1), ("num_requests", 0),
     ("prompt_tokens", (0, 4)), ("prompt_tokens", (5, 4)), ("new_tokens", (0, 0))],
    ids=str,
)  # fmt: skip
def test_loads_that_cannot_be(name: str, value: Any) -> None:
    fields = {"rate": 1.0, "num_requests": 1, "prompt_tokens": (1, 1), "new_tokens": (1, 1)}
    with pytest.raises(RequestError, match=name):
        Load(**fields | {name: value})
