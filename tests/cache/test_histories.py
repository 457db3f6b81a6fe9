"""Paged cache == contiguous reference cache, bitwise, after random lives of several requests.

The writes go through the oracles of the cache ops for most histories, and through the kernels
under Triton's interpreter for as many shorter ones.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import torch

from dsv4.cache.manager import CacheManager
from dsv4.cache.request import CachedRequest, Step
from dsv4.core.errors import CapacityError
from dsv4.ops import cache as kernel_writes
from dsv4.reference import cache_writes as oracle_writes
from dsv4.testing.cases import DEVICE
from support.cache_history import History
from support.cache_life import small_manager

# Both kinds of machine run them; `make gpu` selects by mark.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

HISTORIES = int(os.environ.get("DSV4_STRESS_HISTORIES", "100"))
KERNEL_HISTORIES = int(os.environ.get("DSV4_STRESS_KERNEL_HISTORIES", "48"))
CHUNK, KERNEL_CHUNK = 50, 12
SMALL = 8 if DEVICE == "cpu" else 2048  # most rows of a step through the kernels
EVENTS = (
    "fork", "preempt", "restore", "release", "keep", "prefix hit", "prefix dropped",
    "copy on write", "fork again", "draft rejected", "abort", "released in a step",
)  # fmt: skip


def crowded(page_tokens: int, device: str = "cpu", **options: Any) -> CacheManager:
    """Room for about three long requests and as many kept prefixes."""
    num_pages = options.pop("num_pages", 1536 // page_tokens + 1)
    return small_manager(
        page_tokens, num_pages, num_slots=6, device=device, prefix_bytes=120_000, **options
    )


class KernelHistory(History):
    """Through the kernels; under the interpreter, longer steps go through the oracles."""

    def __init__(self, manager: CacheManager, seed: int, most: int) -> None:
        super().__init__(manager, seed, kernel_writes)
        self.most = most

    def num_new_tokens(self, request: CachedRequest) -> int:
        return self.rng.choice([0, 1, 1, 2, 3, 5, 8, 128 - request.length % 128])

    def after_step(self, step: Step, accepted: list[int]) -> None:
        is_small = len(step.rows.slot) <= self.most
        self.writes = kernel_writes if is_small else oracle_writes
        self.events["step through kernels"] += is_small
        super().after_step(step, accepted)


def history_through(writes: ModuleType, seed: int, **options: Any) -> History:
    """Of kernels on the device of the tests, of oracles on the CPU."""
    if writes is kernel_writes:
        return KernelHistory(crowded(128, device=DEVICE, **options), seed, SMALL)
    return History(crowded(128, **options), seed, writes)


def live(history: History, operations: int) -> History:
    for k in range(operations):
        history.one()
        history.manager.check()
        if k % 16 == 15:
            history.compare_all()
    history.compare_all()
    for r in [r for r in history.manager.requests if not r.is_resident]:
        with suppress(CapacityError):
            history.manager.restore(r)
    history.compare_all()
    return history


def assert_all_happened(histories: list[History], names: tuple[str, ...] = EVENTS) -> None:
    counts = sum((h.done + h.events for h in histories), Counter())
    for name in names:
        assert counts[name] > 0, f"{name} never happened: {counts}"


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("first", range(0, HISTORIES // 2, CHUNK))
def test_gathered_pages_equal_the_contiguous_cache(page_tokens: int, first: int) -> None:
    seeds = range(first, first + CHUNK)
    done = [live(History(crowded(page_tokens), seed, oracle_writes), 40) for seed in seeds]
    assert sum(h.compared for h in done) > 6 * CHUNK
    if first == 0:  # the rarest event is missing in one of forty chunks
        assert_all_happened(done)


def test_a_page_of_three_quanta() -> None:
    seeds = range(12)
    done = [live(History(crowded(384), seed, oracle_writes), 40) for seed in seeds]
    assert_all_happened(done)


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("first", range(0, KERNEL_HISTORIES // 2, KERNEL_CHUNK))
def test_histories_through_the_kernels(page_tokens: int, first: int) -> None:
    done = []
    for seed in range(first, first + KERNEL_CHUNK):
        manager = crowded(page_tokens, device=DEVICE)
        done.append(live(KernelHistory(manager, seed, SMALL), 40))
    assert sum(h.compared for h in done) > 6 * KERNEL_CHUNK
    assert sum(h.events["step through kernels"] for h in done) > 4 * KERNEL_CHUNK
    if first == 0:  # of twelve histories elsewhere one of these may be missing
        assert_all_happened(done, ("prefix hit", "copy on write", "fork"))


@pytest.mark.parametrize("page_tokens", [128, 256])
def test_long_steps_through_the_kernels(page_tokens: int) -> None:
    done = [live(History(crowded(page_tokens, device=DEVICE), seed, kernel_writes), 10)
            for seed in range(2)]  # fmt: skip
    assert sum(h.compared for h in done) > 1


@pytest.mark.parametrize("writes", [oracle_writes, kernel_writes], ids=["oracle", "kernels"])
def test_histories_with_mxfp4_index_keys(writes) -> None:
    done = [live(history_through(writes, seed, index_keys="mxfp4"), 40) for seed in range(6)]
    assert sum(h.compared for h in done) > 36
    assert sum(h.events["prefix hit"] + h.events["copy on write"] for h in done) > 0


@pytest.mark.parametrize("writes", [oracle_writes, kernel_writes], ids=["oracle", "kernels"])
def test_absurd_page_numbers_where_none_is_used_change_nothing(writes) -> None:
    ends = []
    for poison in (False, True):
        history = history_through(writes, 3)
        history.poison_table = poison
        live(history, 20)
        assert history.compared > 2
        storage = history.manager.storage
        ends.append([v.clone() for v in (*storage.slot_views(), *storage.page_views())])
    for plain, poisoned in zip(*ends, strict=True):
        assert torch.equal(plain, poisoned)


class Collected:
    """The cache ops of a step with their arguments, for later."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append((getattr(kernel_writes, name), args))


def test_a_compiled_step_writes_every_store() -> None:
    """All writes of a step in one graph, bytes and FP32 of one allocation among them.

    PyTorch refuses that for tensors it knows to be views of one.
    """
    collected = Collected()
    h = History(small_manager(128, device=DEVICE), 3, collected)  # type: ignore[arg-type]
    r = h.manager.admit()
    step = h.manager.prepare([(r, 12)])
    h.tokens[r.number], h.upcoming[r.number] = [k % 7 for k in range(12)], 2
    h.after_step(step, [12])
    step.commit()
    with pytest.raises(AssertionError):
        h.compare_all()

    @torch.compile(fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    def run() -> None:
        for op, args in collected.calls:
            op(*args)

    run()
    h.compare_all()
    assert h.compared == 1


@pytest.mark.parametrize("page_tokens", [128, 256])
def test_a_prefix_hit_equals_a_cold_prefill(page_tokens: int) -> None:
    """Prefill in two requests with one prefix: the second starts from the kept state."""
    history = History(small_manager(page_tokens), 0, oracle_writes)
    m, tokens = history.manager, [k % 7 for k in range(300)]

    def feed(request, upto: int, size: int) -> None:
        while request.length < upto:
            n = min(size, upto - request.length)
            step = m.prepare([(request, n)])
            history.tokens[request.number] = tokens[: request.length + n]
            history.upcoming[request.number] = [*tokens, 4][request.length + n]
            history.after_step(step, [n])
            step.commit()

    first = m.admit(tokens)
    assert first.length == 0
    for boundary in (128, 256):
        feed(first, boundary, 64)
        assert m.keep_prefix(first, tokens[:boundary], tokens[boundary])
    feed(first, 300, 7)
    second = m.admit(tokens)
    assert second.length == 256
    history.tokens[second.number], history.upcoming[second.number] = tokens[:256], tokens[256]
    history.compare_all()
    feed(second, 300, 11)
    history.compare_all()
    assert history.compared == 4


def test_the_comparison_can_fail() -> None:
    history = History(small_manager(128), 1, oracle_writes)
    m = history.manager
    r = m.admit()
    step = m.prepare([(r, 140)])
    history.tokens[r.number], history.upcoming[r.number] = [k % 5 for k in range(140)], 3
    history.after_step(step, [140])
    step.commit()
    history.compare_all()
    stores = [(r.slot, view) for view in m.storage.slot_views()]
    for row, view in stores + [(r.pages[0], view) for view in m.storage.page_views()]:
        kept = view[row].clone()
        view[row] += 1
        with pytest.raises(AssertionError):
            history.compare_all()
        view[row] = kept
    history.compare_all()


def test_unwritten_bytes_do_not_matter() -> None:
    """Two caches, one poisoned with 0xFF and one with zeros, hold the same records."""
    ends = []
    for byte in (0xFF, 0x00):
        history = History(small_manager(128), 5, oracle_writes)
        for view in (*history.manager.storage.slot_views(), *history.manager.storage.page_views()):
            view.fill_(byte)
        for _ in range(40):
            history.one()
        history.compare_all()
        ends.append([(r.number, r.length) for r in history.manager.requests])
    assert ends[0] == ends[1]
    assert ends[0]
