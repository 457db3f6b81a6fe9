"""CacheManager when copies fail, requests end in an open step, or room runs out."""

from __future__ import annotations

from collections import Counter

import pytest

from dsv4.cache.manager import CacheManager
from dsv4.cache.snapshot import SlotCopy, Snapshot
from dsv4.cache.step import StepBuffers
from dsv4.cache.storage import CacheStorage
from dsv4.core.errors import CapacityError, RequestError
from support.cache_life import Life, small_manager

COPIES = [
    (CacheStorage, "reset_slot"), (CacheStorage, "copy_slot"), (CacheStorage, "copy_page"),
    (SlotCopy, "take"), (SlotCopy, "put"), (Snapshot, "take"), (Snapshot, "put"),
    (StepBuffers, "fill"), (CacheManager, "_new_slot"),
]  # fmt: skip


def grow(manager: CacheManager, request, n: int) -> None:
    manager.prepare([(request, n)]).commit()


def roomy(num_pages: int, num_slots: int = 4) -> CacheManager:
    return CacheManager(small_manager(128, num_pages, num_slots).storage, prefix_bytes=1 << 30)


def keep_chain(m: CacheManager, blocks: int, token: int = 1):
    r = m.admit()
    for k in range(1, blocks + 1):
        grow(m, r, 128)
        assert m.keep_prefix(r, [token] * (128 * k), token)
    return r


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_what_a_step_may_write_is_not_free_before_it_ends(end: str) -> None:
    m = small_manager(128, num_pages=4, num_slots=2)
    a, b = m.admit(), m.admit()
    step = m.prepare([(a, 200), (b, 1)])
    slot, pages = a.slot, list(a.pages)
    m.release(a)
    m.check()
    assert a not in m.requests
    assert (m.num_free_slots, m.allocator.num_free, m.buffers.table[slot, 0]) == (0, 0, pages[0])
    with pytest.raises(CapacityError, match="slots"):
        m.admit()
    with pytest.raises(RequestError, match="request: expected"):
        m.release(a)
    getattr(step, end)()
    m.check()
    assert (m.num_free_slots, a.slot, a.length, b.length) == (1, None, 0, int(end == "commit"))
    with pytest.raises(RequestError, match="step: expected one that has not ended"):
        step.abort()


def test_a_step_ends_once_though_its_requests_are_gone() -> None:
    m = small_manager()
    a = m.admit()
    ended = m.prepare([(a, 5)])
    ended.commit()
    m.preempt(a)
    empty = m.prepare([])
    empty.commit()
    for step in (ended, empty):
        with pytest.raises(RequestError, match="step: expected one that has not ended"):
            step.commit()


@pytest.mark.parametrize(("owner", "name"), COPIES, ids=[n for _, n in COPIES])
def test_fail_at_every_copy(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th call of what takes slots and copies bytes fails; nothing is lost or half done."""
    done = owner.__dict__[name]
    function = done.__func__ if isinstance(done, classmethod) else done
    calls = k = 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == k:
            raise MemoryError
        return function(*args, **kwargs)

    wrapped = classmethod(failing) if isinstance(done, classmethod) else failing
    monkeypatch.setattr(owner, name, wrapped)
    failed = 0
    for seed in range(6, 10):
        for fails_at in range(1, 7):
            calls, k, life = 0, fails_at, Life(small_manager(256, num_pages=7), seed)
            for _ in range(60):
                before = state_of(life.manager)
                try:
                    life.one()
                except MemoryError:
                    failed += 1
                    assert state_of(life.manager) == before
                    assert {r.number for r in life.manager.requests} == set(life.tokens)
                life.manager.check()
    assert failed > 3


def state_of(m: CacheManager) -> tuple:
    """What a failing call must leave, but for prefixes that were dropped to make room."""
    requests = [(r.number, r.length, r.slot, tuple(r.pages), r.chain) for r in m.requests]
    return requests, sorted(m._free_slots), [r.pending is None for r in m.requests]


@pytest.mark.parametrize("num_rows", [8.0, True, "8"])
def test_num_rows_is_a_count(num_rows) -> None:
    m = small_manager(128)
    r = m.admit()
    with pytest.raises(RequestError, match="num_rows: expected"):
        m.prepare([(r, 1)], num_rows)
    assert (r.pages, m.allocator.num_free) == ([], 11)
    m.check()


def test_the_longest_prefix_of_a_chain_goes_first() -> None:
    m = roomy(20)
    m.release(keep_chain(m, 12))
    x = m.admit()
    grow(m, x, 128 * m.allocator.num_free)
    for left in (11, 10, 9):
        grow(m, x, 128)
        assert len(m.prefixes) == left
        hit = m.admit([1] * 1537)
        assert hit.length == 128 * left
        m.release(hit)
    m.check()


def test_prefixes_that_free_no_page_stay() -> None:
    m = roomy(14, num_slots=6)
    running = [keep_chain(m, 1, token) for token in range(4)]
    m.release(keep_chain(m, 1, 8))
    x = m.admit()
    grow(m, x, 128 * m.allocator.num_free)
    grow(m, x, 1)
    assert (len(m.prefixes), len(running)) == (4, 4)
    for token in range(4):
        m.release(m.admit([token] * 129))
    m.check()


def test_prefixes_of_the_same_pages_go_together() -> None:
    """Two next tokens, one state: only dropping both frees the page."""
    m = roomy(3)
    r = m.admit()
    grow(m, r, 128)
    assert m.keep_prefix(r, [1] * 128, 1)
    assert m.keep_prefix(r, [1] * 128, 2)
    m.release(r)
    grow(m, m.admit(), 256)
    assert len(m.prefixes) == 0
    assert not m.prefixes.page_owners
    m.check()


def test_keeping_again_is_a_use_of_the_whole_chain() -> None:
    m = roomy(20)
    chain = keep_chain(m, 2, 1)
    other = keep_chain(m, 1, 2)
    assert not m.keep_prefix(chain, [1] * 256, 1)
    dropped = [m.prefixes.evict() for _ in range(3)]
    assert [e.digest for e in dropped[:2]] == [other.chain[1], chain.chain[1]]
    assert dropped[2].length == 128


def test_dropping_does_not_look_at_every_kept_page(monkeypatch: pytest.MonkeyPatch) -> None:
    m = roomy(20)
    m.release(keep_chain(m, 12))
    monkeypatch.setattr(Counter, "__iadd__", None)
    x = m.admit()
    grow(m, x, 128 * m.allocator.num_free)
    grow(m, x, 300)
    assert set(m.prefixes.page_owners.values()) <= set(range(1, 13))


def test_a_refused_keep_forgets_the_ids() -> None:
    m = small_manager(128)
    r = m.admit()
    grow(m, r, 128)
    with pytest.raises(RequestError, match="next_token: expected"):
        m.keep_prefix(r, [7] * 128)
    assert m.keep_prefix(r, [1] * 128, 1)
    assert m.admit([7] * 128 + [1]).length == 0
    assert m.admit([1] * 129).length == 128


def test_a_refused_admission_hashes_nothing() -> None:
    m = small_manager(128, num_slots=1)
    keep_chain(m, 1)
    with pytest.raises(CapacityError, match="slots"):
        m.admit(["never looked at"] * 300)  # type: ignore[list-item]


def test_requests_are_themselves() -> None:
    m = small_manager()
    a, b = m.admit(), m.admit()
    assert len({a, b, a}) == 2


@pytest.mark.parametrize("bad", [
    {"max_context": True}, {"max_context": 128.5}, {"prefix_bytes": float("nan")},
    {"prefix_bytes": 1e6}, {"max_rows": 2.5}, {"max_rows": 0},
])  # fmt: skip
def test_sizes_are_counts(bad) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(bad))}: expected"):
        CacheManager(small_manager().storage, **bad)
