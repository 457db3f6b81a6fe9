"""Requests that come at random times: what an engine gives and how long each has to wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random

from dsv4.core.errors import RequestError
from dsv4.core.numbers import is_finite_number, is_integer
from dsv4.core.sampling import SamplingParams
from dsv4.engine.engine import Engine
from dsv4.engine.request import EngineRequest


@dataclass(frozen=True)
class Load:
    """Poisson arrivals of prompts of random ids, greedy answers that end at their length.

    rate           requests a second
    num_requests   of all
    prompt_tokens  least and most
    new_tokens     least and most

    Raises RequestError for numbers that are none.
    """

    rate: float
    num_requests: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_finite_number(self.rate) or self.rate <= 0:
            raise RequestError("rate", "requests a second, more than 0", self.rate)
        if not is_integer(self.num_requests) or self.num_requests < 1:
            raise RequestError("num_requests", "1 or more", self.num_requests)
        for name in ("prompt_tokens", "new_tokens"):
            low, high = getattr(self, name)
            if not (is_integer(low) and is_integer(high) and 1 <= low <= high):
                raise RequestError(name, "from 1, the least and the most", (low, high))

    @property
    def context(self) -> int:
        """Tokens that the longest request may have."""
        return self.prompt_tokens[1] + self.new_tokens[1]

    def arrivals(self, vocab_size: int) -> list[tuple[float, list[int], int]]:
        """(seconds from the start, prompt, length of the answer) of each request."""
        rng = Random(self.seed)
        due = accumulate(rng.expovariate(self.rate) for _ in range(self.num_requests))
        return [
            (
                at,
                [rng.randrange(vocab_size) for _ in range(rng.randint(*self.prompt_tokens))],
                rng.randint(*self.new_tokens),
            )
            for at in list(due)
        ]


@dataclass(frozen=True)
class Percentiles:
    """Of times in seconds: the least that so many of a hundred do not exceed."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """None where there are no values."""
        if not values:
            return None
        ordered, n = sorted(values), len(values)
        return cls(*(ordered[-(-n * p // 100) - 1] for p in (50, 95, 99)))


@dataclass(frozen=True)
class LoadTimes:
    """How a load was served.

    seconds         from the start to the last token
    tokens          of all answers
    first_token     from the time a request was due to its first token
    between_tokens  from one token of an answer to the next; None where every answer has one
    """

    seconds: float
    tokens: int
    first_token: Percentiles
    between_tokens: Percentiles | None


def time_load(
    engine: Engine, load: Load, clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> LoadTimes:  # fmt: skip
    """Send the requests when they are due, whatever the engine does; run until all are served.

    If a step fails, all of them end: the engine is left without work.
    """
    waiting = deque(load.arrivals(engine.model.config.vocab_size))
    due: dict[EngineRequest, float] = {}
    times: dict[EngineRequest, list[float]] = {}
    start = clock()
    try:
        while waiting or engine.has_work:
            now = clock() - start
            while waiting and waiting[0][0] <= now:
                at, prompt, length = waiting.popleft()
                params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
                request = engine.add(prompt, params)
                due[request], times[request] = at, []
            if not engine.has_work:
                sleep(waiting[0][0] - now)
                continue
            known = engine.step()
            now = clock() - start
            for request, _ in known:
                if request in times:  # else of a load that failed
                    times[request].append(now)
    finally:
        for request in times:
            engine.cancel(request)
    gaps = [b - a for own in times.values() for a, b in pairwise(own)]
    first = Percentiles.of([own[0] - due[request] for request, own in times.items()])
    assert first is not None
    tokens = sum(len(own) for own in times.values())
    return LoadTimes(max(own[-1] for own in times.values()), tokens, first, Percentiles.of(gaps))
