"""Many requests at once: each gets the tokens that it would get alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.cache.request import Step
from dsv4.core.errors import CapacityError, DeviceUnavailable, RequestError
from dsv4.core.sampling import SamplingParams
from dsv4.engine.engine import Engine
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.request import EngineRequest
from dsv4.engine.stepper import Pending
from dsv4.layers import moe
from dsv4.reference.sampler import TokenRng, sample
from support.oracle_ops import use_oracles
from support.production import production, random_ids, random_weights, reference, served_config

CONFIG = served_config(num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
WEIGHTS = random_weights(CONFIG)
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(autouse=True)
def oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_oracles(monkeypatch)


def limits(**fields: int) -> EngineLimits:
    return EngineLimits(**{"max_context": 512, "max_requests": 4, "max_rows": 64} | fields)


def run(engine: Engine, most: int = 10_000) -> None:
    """Step until nothing is left to do; every cache invariant holds after each step."""
    for _ in range(most):
        if not engine.has_work:
            return
        engine.step()
        engine.model.cache.check()
    raise AssertionError("the engine does not come to an end")


def prompts(count: int, longest: int = 150) -> list[list[int]]:
    rng = random.Random(count)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [random_ids(CONFIG, n, seed=i).tolist() for i, n in enumerate(lengths)]


def alone(prompt: Sequence[int], params: SamplingParams, stops: frozenset[int] = frozenset()):
    """The answer of a fresh engine that serves nothing else."""
    engine = Engine(production(CONFIG, WEIGHTS, limits=limits()), stop_ids=stops)
    request = engine.add(prompt, params)
    run(engine)
    return request.tokens, request.finish_reason


def leaves_nothing(model: ProductionModel) -> None:
    cache = model.cache
    assert cache.num_free_slots == cache.schema.num_slots
    assert cache.allocator.num_free == cache.schema.num_pages - 1


def test_greedy_tokens_are_those_of_the_reference() -> None:
    model = reference(CONFIG, WEIGHTS)
    for prompt in prompts(3, 60):
        cache, ids, expected = model.new_cache(), torch.tensor(prompt), []
        for _ in range(GREEDY.max_tokens):
            expected.append(int(model.forward(ids, cache)[-1].argmax()))
            ids = torch.tensor(expected[-1:])
        assert alone(prompt, GREEDY) == (expected, "length")


def test_sampled_tokens_are_those_of_the_reference() -> None:
    params = SamplingParams(temperature=1.3, top_p=0.9, top_k=40, seed=(1 << 64) - 7, max_tokens=5)
    model, prompt = reference(CONFIG, WEIGHTS), prompts(1, 30)[0]
    cache, ids, expected = model.new_cache(), torch.tensor(prompt), []
    for i in range(params.max_tokens):
        rng = TokenRng.for_request(params).at(len(prompt) + i)
        expected.append(sample(model.forward(ids, cache)[-1], params, rng))
        ids = torch.tensor(expected[-1:])
    assert alone(prompt, params)[0] == expected


def test_neighbours_change_nothing() -> None:
    params = [
        GREEDY, SamplingParams(seed=5, max_tokens=9), SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=2.0, min_p=0.1, seed=1, max_tokens=4),
    ]  # fmt: skip
    work = [(p, params[i % 4]) for i, p in enumerate(prompts(9))]
    engine = Engine(production(CONFIG, WEIGHTS, limits=limits()))
    requests = [engine.add(prompt, params) for prompt, params in work]
    run(engine)
    for request, (prompt, own) in zip(requests, work, strict=True):
        assert (request.tokens, request.finish_reason) == alone(prompt, own)
    leaves_nothing(engine.model)


def test_requests_that_come_late_and_leave_early() -> None:
    engine = Engine(production(CONFIG, WEIGHTS, limits=limits(max_requests=2)))
    long = SamplingParams(temperature=0, max_tokens=40)
    first, second = (engine.add(p, long) for p in prompts(2, 30))
    for _ in range(8):
        engine.step()
    engine.cancel(first)
    third = engine.add([1, 2, 3], GREEDY)
    waiting = engine.add([4, 5], GREEDY)
    engine.cancel(waiting)
    run(engine)
    assert first.finish_reason == waiting.finish_reason == "cancelled"
    assert 0 < len(first.tokens) < 40
    assert not waiting.tokens
    assert (second.tokens, second.finish_reason) == alone(second.prompt, long)
    assert (third.tokens, third.finish_reason) == alone([1, 2, 3], GREEDY)
    engine.cancel(third)
    assert third.finish_reason == "length"
    leaves_nothing(engine.model)


def test_too_few_pages_preempt_and_change_nothing() -> None:
    """Four requests that grow to two pages each, and pages for five."""
    params = SamplingParams(temperature=0, max_tokens=30)
    few = limits(page_tokens=128, max_tokens=128)
    model = production(CONFIG, WEIGHTS, limits=few)
    assert model.cache.schema.num_pages - 1 == 5
    work = [random_ids(CONFIG, 110 + i, seed=i).tolist() for i in range(4)]
    engine = Engine(model)
    preempted = []
    preempt = model.cache.preempt
    model.cache.preempt = lambda request: (preempted.append(request), preempt(request))[1]
    requests = [engine.add(prompt, params) for prompt in work]
    run(engine)
    assert 1 <= len(preempted) <= 6  # moved out and back now and then, not every step
    for request, prompt in zip(requests, work, strict=True):
        assert request.tokens == alone(prompt, params)[0]
    leaves_nothing(model)


def test_a_stop_id_ends_the_answer_and_is_part_of_it() -> None:
    prompt = prompts(1, 30)[0]
    tokens, _ = alone(prompt, GREEDY)
    stop = tokens[2]
    expected = tokens[: tokens.index(stop) + 1], "stop"
    assert alone(prompt, GREEDY, frozenset({stop})) == expected
    own = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(stop,))
    assert alone(prompt, own) == expected
    on = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert alone(prompt, on, frozenset({stop})) == (tokens, "length")


def test_kept_prefixes_save_work_and_change_nothing() -> None:
    model = production(CONFIG, WEIGHTS, limits=limits(prefix_bytes=1 << 30, page_tokens=128))
    engine, shared = Engine(model), random_ids(CONFIG, 256, seed=3).tolist()
    work = [shared + tail for tail in ([1, 2], [1, 2], [9], [], [7] * 40)]
    fed: list[int] = []
    prefill = engine.stepper.prefill

    def counting(step: Step, ids: Sequence[int], *rest: Sequence[int]) -> Pending:
        fed.append(len(ids))
        return prefill(step, ids, *rest)

    engine.stepper.prefill = counting  # type: ignore[method-assign]
    for prompt in work:
        request = engine.add(prompt, GREEDY)
        run(engine)
        assert request.tokens == alone(prompt, GREEDY)[0]
    assert sum(fed) == 258 + 2 + 1 + 256 + 40  # of 256 tokens, 128 could have been kept


def test_padding_rows_reach_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    oracle = moe.moe_routed

    def watching(x: Tensor, ids: Tensor, *rest: object) -> Tensor:
        seen.append(ids.clone())
        return oracle(x, ids, *rest)

    monkeypatch.setattr(moe, "moe_routed", watching)
    engine = Engine(production(CONFIG, WEIGHTS, limits=limits()))
    for prompt in prompts(3, 5):
        engine.add(prompt, GREEDY)
    run(engine)
    decode = [ids for ids in seen if len(ids) == 4]
    assert decode
    for ids in decode:  # hash layers and score layers alike
        live = (ids >= 0).all(dim=1)
        assert torch.equal(live, (ids >= 0).any(dim=1))
        assert live.tolist() == sorted(live.tolist(), reverse=True)
    assert any(int((ids[:, 0] >= 0).sum()) == 3 for ids in decode)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [([], RequestError), ([96], RequestError), ([-1], RequestError), ([True], RequestError),
     ([1] * 512, RequestError), (["a"], RequestError)],
)  # fmt: skip
def test_bad_prompts_are_refused(prompt: list, error: type) -> None:
    engine = Engine(production(CONFIG, WEIGHTS, limits=limits()))
    with pytest.raises(error, match="prompt"):
        engine.add(prompt, GREEDY)
    assert not engine.has_work


def test_a_prompt_beyond_all_pages_is_refused() -> None:
    few = limits(page_tokens=128, max_tokens=128, max_requests=1)
    engine = Engine(production(CONFIG, WEIGHTS, limits=few))
    with pytest.raises(CapacityError, match="cache tokens: needed 257, free 256"):
        engine.add([1] * 256, GREEDY)
    request: EngineRequest = engine.add([1] * 250, SamplingParams(temperature=0, max_tokens=100))
    run(engine)
    assert (len(request.tokens), request.finish_reason) == (6, "length")


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_step_that_fails_ends_its_requests_alone(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third layer's experts run out of memory once; who was not in the step goes on."""
    engine = Engine(production(CONFIG, WEIGHTS, limits=limits(max_requests=2)))
    work = prompts(3, 40)
    requests = [engine.add(prompt, GREEDY) for prompt in work]
    if when == "decode":
        while not all(r.tokens for r in requests[:2]):
            engine.step()
    calls, oracle = [], moe.moe_routed

    def failing(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return oracle(*args)

    monkeypatch.setattr(moe, "moe_routed", failing)
    with pytest.raises(MemoryError):
        run(engine)
    run(engine)
    assert [r.finish_reason for r in requests[:2]] == ["error", "error"]
    assert (requests[2].tokens, requests[2].finish_reason) == alone(work[2], GREEDY)
    leaves_nothing(engine.model)


def test_a_failure_after_a_launch_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping a prefix fails; the step before it counts all the same."""
    fields = {"prefix_bytes": 1 << 30, "page_tokens": 128, "max_rows": 256}
    engine = Engine(production(CONFIG, WEIGHTS, limits=limits(**fields)))
    short, long = prompts(1, 30)[0], random_ids(CONFIG, 140).tolist()
    requests = [engine.add(short, GREEDY), engine.add(long, GREEDY)]
    keep = engine.model.cache.keep_prefix
    failures = [MemoryError("no pinned memory")]

    def failing(*args: Any) -> bool:
        if failures:
            raise failures.pop()
        return keep(*args)

    monkeypatch.setattr(engine.model.cache, "keep_prefix", failing)
    with pytest.raises(MemoryError):
        run(engine)
    run(engine)
    for request, prompt in zip(requests, (short, long), strict=True):
        assert (request.tokens, request.finish_reason) == alone(prompt, GREEDY)


@pytest.mark.parametrize(
    "params", [{"top_k": 1 << 40}, {"temperature": 1e300}, {"seed": (1 << 64) - 1}], ids=str
)
def test_extreme_parameters_are_served(params: dict) -> None:
    tokens, reason = alone([1, 2, 3], SamplingParams(max_tokens=4, **params))
    assert (len(tokens), reason) == (4, "length")


@pytest.mark.parametrize(
    "fields",
    [{"max_requests": 0}, {"max_requests": 65}, {"max_context": 1}, {"max_tokens": 0},
     {"max_rows": 0}, {"prefix_bytes": -1}, {"max_context": "512"}, {"max_rows": True}],
    ids=str,
)  # fmt: skip
def test_limits_that_cannot_be(fields: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        EngineLimits(**fields)


def test_devices_that_there_are_not() -> None:
    for name in ("gpu", "cuda:99") if torch.cuda.is_available() else ("gpu", "cuda", "cuda:1"):
        with pytest.raises(DeviceUnavailable, match=name):
            production(CONFIG, WEIGHTS, limits=limits(), device=name)
