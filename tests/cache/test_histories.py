"""Paged cache == contiguous reference cache, bitwise, after random lives of several requests.

The writes go through the oracles of the cache ops for most histories, and through the kernels
under Triton's interpreter for as many shorter ones.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import pytest
import torch

from dsv4.core.errors import CapacityError
from dsv4.ops import cache as kernel_writes
from dsv4.reference import cache_writes as oracle_writes
from dsv4.testing.cases import DEVICE
from support.cache_history import History
from support.cache_life import small_manager

# Both kinds of machine run them; `make gpu` selects by mark.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

HISTORIES = int(os.environ.get("DSV4_STRESS_HISTORIES", "100"))
KERNEL_HISTORIES = int(os.environ.get("DSV4_STRESS_KERNEL_HISTORIES", "100"))
CHUNK = 10


def live(page_tokens: int, seed: int, writes, operations: int) -> History:
    device = DEVICE if writes is kernel_writes else "cpu"
    manager = small_manager(page_tokens, num_pages=2048 // page_tokens, device=device)
    history = History(manager, seed, writes)
    for _ in range(operations):
        history.one()
        history.manager.check()
    history.compare_all()
    for r in [r for r in history.manager.requests if not r.is_resident]:
        with suppress(CapacityError):
            history.manager.restore(r)
    history.compare_all()
    return history


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("first", range(0, HISTORIES // 2, CHUNK))
def test_gathered_pages_equal_the_contiguous_cache(page_tokens: int, first: int) -> None:
    done = [live(page_tokens, seed, oracle_writes, 40) for seed in range(first, first + CHUNK)]
    assert sum(h.compared for h in done) > CHUNK
    assert sum(h.done["fork"] for h in done) > 0
    assert sum(h.done["restore"] for h in done) > 0


def test_a_page_of_three_quanta() -> None:
    done = [live(384, seed, oracle_writes, 40) for seed in range(6)]
    assert sum(h.compared for h in done) > 6


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("first", range(0, KERNEL_HISTORIES // 2, CHUNK))
def test_histories_through_the_kernels(page_tokens: int, first: int) -> None:
    operations = 12 if DEVICE == "cpu" else 40
    seeds = range(first, first + CHUNK)
    done = [live(page_tokens, seed, kernel_writes, operations) for seed in seeds]
    assert sum(h.compared for h in done) >= 1


@pytest.mark.parametrize("writes", [oracle_writes, kernel_writes], ids=["oracle", "kernels"])
def test_histories_with_mxfp4_index_keys(writes) -> None:
    device = DEVICE if writes is kernel_writes else "cpu"
    compared = 0
    for seed in range(4):
        history = History(small_manager(128, device=device, index_keys="mxfp4"), seed, writes)
        for _ in range(18):
            history.one()
        history.compare_all()
        compared += history.compared
    assert compared >= 3


@pytest.mark.parametrize("writes", [oracle_writes, kernel_writes], ids=["oracle", "kernels"])
def test_absurd_page_numbers_where_none_is_used_change_nothing(writes) -> None:
    ends = []
    for poison in (False, True):
        device = DEVICE if writes is kernel_writes else "cpu"
        history = History(small_manager(128, device=device), 3, writes)
        history.poison_table = poison
        for _ in range(14):
            history.one()
        history.compare_all()
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
