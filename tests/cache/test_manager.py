"""CacheManager: a request's life, its refusals, and that a refusal changes nothing."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch

from dsv4.cache.allocator import PageAllocator
from dsv4.cache.canary import CacheCorruptionError
from dsv4.cache.manager import CacheManager
from dsv4.cache.schema import CacheSchema
from dsv4.cache.snapshot import PAGES_AT_ONCE, SlotCopy
from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.core.errors import CapacityError, RequestError
from support.cache_life import Life, small_config, small_manager

OPERATIONS = int(os.environ.get("DSV4_STRESS_OPERATIONS", "50000"))


def grow(manager: CacheManager, request, n: int) -> None:
    manager.prepare([(request, n)]).commit()


@pytest.mark.parametrize("page_tokens", [128, 256])
def test_random_lives(page_tokens: int) -> None:
    """Half of OPERATIONS that succeed for each page size, invariants after each; refused ones
    come on top. Every life has at least one of each kind."""
    started, done, refused, seed = time.perf_counter(), 0, 0, 0
    while done < OPERATIONS // 2:
        life = Life(small_manager(page_tokens, num_pages=1536 // page_tokens), seed)
        while life.succeeded < 2500:
            life.run(100)
        done, seed = done + life.succeeded, seed + 1
        refused += sum(n for name, n in life.events.items() if name.endswith("refused"))
        counts = life.done + life.events
        names = (
            "step", "fork", "preempt", "restore", "release", "keep", "step refused", "abort",
            "draft rejected", "prefix hit", "prefix dropped", "copy on write", "fork again",
            "released in a step",
        )  # fmt: skip
        for name in names:
            assert counts[name] > 0, f"{name} never happened: {counts}"
    seconds = time.perf_counter() - started
    print(
        f"pages of {page_tokens}: {done} operations succeeded, {refused} were refused, "
        f"{done / seconds:.0f} successful ones a second with every invariant checked"
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_lives_with_the_canary(seed: int) -> None:
    Life(small_manager(128, canary=True), seed).run(600)


def test_pages_are_taken_as_tokens_come() -> None:
    m = small_manager(page_tokens=128)
    r = m.admit()
    assert m.allocator.num_free == 11
    grow(m, r, 128)
    assert len(r.pages) == 1
    grow(m, r, 1)
    assert len(r.pages) == 2
    grow(m, r, 127)
    assert len(r.pages) == 2
    assert r.length == 256
    m.release(r)
    assert m.allocator.num_free == 11
    m.check()


def test_a_refused_step_changes_nothing() -> None:
    m = small_manager(page_tokens=128, num_pages=4)
    a, b = m.admit(), m.admit()
    grow(m, a, 200)
    before = (list(a.pages), list(b.pages), m.buffers.table.copy(), m.allocator.num_free)
    with pytest.raises(CapacityError, match="cache pages: needed 2, free 1"):
        m.prepare([(a, 100), (b, 1)])
    assert (a.pages, b.pages) == before[:2]
    assert (m.buffers.table == before[2]).all()
    assert (m.allocator.num_free, a.length, b.length) == (before[3], 200, 0)
    m.check()


def test_slots_run_out() -> None:
    m = small_manager(num_slots=2)
    a, _ = m.admit(), m.admit()
    for refused in (m.admit, lambda: m.fork(a)):
        with pytest.raises(CapacityError, match="cache slots: needed 1, free 0"):
            refused()
    m.check()
    m.preempt(a)
    c = m.admit()
    with pytest.raises(CapacityError, match="cache slots"):
        m.restore(a)
    assert a.snapshot is not None
    m.release(c)
    m.restore(a)
    m.check()


def test_a_fork_shares_pages_until_one_writes() -> None:
    m = small_manager(page_tokens=128)
    a = m.admit()
    grow(m, a, 200)
    m.storage.fill_pages(a.pages, 7)
    b = m.fork(a)
    assert b.pages == a.pages
    grow(m, b, 1)
    assert b.pages[0] == a.pages[0]
    assert b.pages[1] != a.pages[1]
    for view in m.storage.page_views():
        assert torch.equal(view[a.pages[1]], view[b.pages[1]])
    grow(m, a, 1)  # the only owner left: no copy
    assert m.allocator.owners(a.pages[1]) == 1
    m.check()


def test_a_full_page_is_shared_for_good() -> None:
    m = small_manager(page_tokens=128)
    a = m.admit()
    grow(m, a, 128)
    b = m.fork(a)
    grow(m, a, 10)
    grow(m, b, 10)
    assert a.pages[0] == b.pages[0]
    assert a.pages[1] != b.pages[1]
    assert m.allocator.owners(a.pages[0]) == 2


def test_fork_copies_the_state() -> None:
    m = small_manager()
    a = m.admit()
    for k, view in enumerate(m.storage.slot_views()):
        view[a.slot] = k + 1
    b = m.fork(a)
    for view in m.storage.slot_views():
        assert torch.equal(view[a.slot], view[b.slot])


def random_bytes(m: CacheManager, request, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for view in m.storage.slot_views():
        row = view[request.slot]
        row.copy_(torch.randint(0, 256, row.shape, generator=rng, dtype=torch.uint8))
    for view in m.storage.page_views():
        shape = (len(request.pages), view.shape[1])
        view[request.pages] = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)


def bytes_of(m: CacheManager, request) -> list[torch.Tensor]:
    slots = [v[request.slot].clone() for v in m.storage.slot_views()]
    return slots + [v[request.pages].clone() for v in m.storage.page_views()]


@pytest.mark.parametrize("page_tokens", [128, 256])
def test_preempt_and_restore_at_every_offset(page_tokens: int) -> None:
    """Byte for byte, though slot and pages are others and were used by others meanwhile."""
    for length in range(301):
        m = small_manager(page_tokens, num_pages=6, num_slots=2)
        r = m.admit()
        grow(m, r, length)
        random_bytes(m, r, length)
        want = bytes_of(m, r)
        m.preempt(r)
        other = m.admit()
        grow(m, other, 10)
        random_bytes(m, other, 1000 + length)
        m.restore(r)
        assert r.length == length
        for got, wanted in zip(bytes_of(m, r), want, strict=True):
            assert torch.equal(got, wanted)
        m.check()


def test_a_new_request_never_sees_old_state() -> None:
    m = small_manager(num_slots=1)
    a = m.admit()
    grow(m, a, 50)
    random_bytes(m, a, 0)
    m.release(a)
    b = m.admit()
    for views in m.storage.layers:
        for state in (views.state, views.index_state):
            if state is not None:
                assert not state[b.slot, 0].any()
                assert state[b.slot, 1].isneginf().all()
    assert not m.buffers.table[b.slot].any()


def test_prefix_is_found_by_content_and_leaves_one_token() -> None:
    m = small_manager(page_tokens=128)
    ids = list(range(256))
    a = m.admit()
    grow(m, a, 128)
    assert m.keep_prefix(a, ids[:128], 128)
    grow(m, a, 128)
    assert m.keep_prefix(a, ids, 5)
    assert not m.keep_prefix(a, ids, 5)
    random_bytes(m, a, 3)
    m.release(a)
    m.check()
    for prompt, hit in ((ids, 128), ([*ids, 5], 256), (ids[:128], 0), ([9, *ids], 0),
                        (ids[:129], 128), ([*ids[:127], 99, 1], 0)):  # fmt: skip
        r = m.admit(prompt)
        assert r.length == hit, len(prompt)
        m.check()
        m.release(r)


def test_prefix_restores_window_and_open_windows() -> None:
    m = small_manager(page_tokens=256)
    a = m.admit()
    grow(m, a, 128)
    random_bytes(m, a, 1)
    want = [v[a.slot].clone() for v in m.storage.slot_views(at_boundary=True)]
    m.keep_prefix(a, list(range(128)), 128)
    b = m.admit(range(129))
    assert b.length == 128
    for got, wanted in zip(m.storage.slot_views(at_boundary=True), want, strict=True):
        assert torch.equal(got[b.slot], wanted)
    hca = m.storage.layers[2].state
    assert hca is not None
    assert hca[b.slot, 1].isneginf().all()
    shared = b.pages[0]
    grow(m, b, 1)  # the page is half full and shared: copied before it is written
    assert b.pages[0] != shared
    m.check()


def test_kept_prefixes_make_room_but_only_if_it_is_enough() -> None:
    m = small_manager(page_tokens=128, num_pages=4)
    a = m.admit()
    grow(m, a, 128)
    m.keep_prefix(a, [1] * 128, 1)
    m.release(a)
    b, c = m.admit([2]), m.admit([3])
    grow(m, c, 1)
    with pytest.raises(CapacityError, match="needed 3, free 2"):
        m.prepare([(b, 300)])
    assert len(m.prefixes) == 1
    grow(m, b, 200)
    assert len(m.prefixes) == 0
    m.check()


def test_prefix_memory_is_bounded() -> None:
    m = small_manager(page_tokens=128, num_pages=40)
    per = None
    for k in range(20):
        r = m.admit()
        grow(m, r, 128)
        m.keep_prefix(r, [k] * 128, k)
        m.release(r)
        per = per or m.prefixes.nbytes
        assert m.prefixes.nbytes <= m.prefixes.max_bytes
    assert len(m.prefixes) == m.prefixes.max_bytes // per
    assert m.admit([19] * 129).length == 128
    assert m.admit([0] * 129).length == 0  # the oldest went first
    m.check()


def test_demand_foretells_a_step() -> None:
    m = small_manager(page_tokens=128, num_pages=6)
    a = m.admit()
    grow(m, a, 100)
    b = m.fork(a)
    d = m.demand([(a, 1), (b, 100)])  # one copy of the shared page, one new page
    assert (d.needed, d.free, d.reclaimable, d.fits) == (2, 4, 0, True)
    assert m.demand([]).needed == m.demand([(a, 0), (b, 28)]).needed - 1 == 0
    grow(m, b, 28)
    m.keep_prefix(b, [1] * 128, 1)
    m.release(b)
    c = m.admit()
    d = m.demand([(a, 500), (c, 1)])
    assert (d.needed, d.free, d.reclaimable, d.fits) == (5, 3, 1, False)
    d = m.demand([(a, 500)])
    assert (d.needed, d.fits) == (4, True)
    free = m.allocator.num_free
    assert len(m.prefixes) == 1
    grow(m, a, 500)
    assert (free, len(m.prefixes), m.allocator.num_free) == (3, 0, 0)
    with pytest.raises(RequestError, match="batch: expected"):
        m.demand([(a, -1)])


def test_a_chain_is_hashed_once() -> None:
    m = small_manager(page_tokens=128, num_pages=40)
    ids = [k % 5 for k in range(700)]
    r = m.admit(ids)
    for boundary in range(128, 641, 128):
        grow(m, r, 128)
        seen = [None] * (boundary - 128) + ids[boundary - 128 : boundary]
        assert m.keep_prefix(r, seen, ids[boundary])  # old blocks are not looked at
    child = m.fork(r)
    assert not m.keep_prefix(child, [None] * 640, ids[640])
    assert m.keep_prefix(child, [None] * 640, 99)
    hit = m.admit([*ids[:640], 99, 1])
    assert hit.length == 640
    grow(m, hit, 128)
    assert m.keep_prefix(hit, [None] * 640 + [99] * 128, 1)
    assert m.admit([*ids[:640], *[99] * 128, 1]).length == 768


@pytest.mark.parametrize("bad", ["twice", "negative", "long", "foreign", "preempted", "released"])
def test_misuse_is_refused(bad: str) -> None:
    m, other = small_manager(), small_manager()
    r = m.admit()
    batch = {
        "twice": [(r, 1), (r, 1)],
        "negative": [(r, -1)],
        "long": [(r, m.max_context + 1)],
        "foreign": [(other.admit(), 1)],
    }.get(bad, [(r, 1)])
    if bad == "preempted":
        m.preempt(r)
    if bad == "released":
        m.release(r)
    with pytest.raises(RequestError, match="expected"):
        m.prepare(batch)
    m.check()
    with pytest.raises(RequestError, match="token_ids: expected|request: expected"):
        m.keep_prefix(r, [1, 2])


def test_a_step_ends_once() -> None:
    m = small_manager(page_tokens=128)
    r = m.admit()
    step = m.prepare([(r, 10)])
    for refused in (
        lambda: m.prepare([(r, 1)]), lambda: m.fork(r), lambda: m.preempt(r),
        lambda: m.keep_prefix(r, [1] * 128, 1),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="expected"):
            refused()
    step.commit()
    assert r.length == 10
    for again in (step.commit, step.abort):
        with pytest.raises(RequestError, match="step: expected one that has not ended"):
            again()
    assert r.length == 10
    m.check()


def test_an_aborted_step_gives_its_pages_back() -> None:
    m = small_manager(page_tokens=128)
    r = m.admit()
    grow(m, r, 100)
    before = (list(r.pages), m.buffers.table.copy(), m.allocator.num_free)
    step = m.prepare([(r, 300)])
    assert len(r.pages) == 4
    step.abort()
    assert (r.pages, m.allocator.num_free, r.length) == (before[0], before[2], 100)
    assert (m.buffers.table == before[1]).all()
    m.check()


def test_a_request_released_in_a_step_is_left_out_of_it() -> None:
    m = small_manager()
    a, b = m.admit(), m.admit()
    step = m.prepare([(a, 5), (b, 7)])
    m.release(a)
    step.commit()
    assert (a.length, b.length) == (0, 7)
    m.check()


def test_bad_arguments_take_nothing() -> None:
    m = small_manager()
    r = m.admit()
    free = (m.allocator.num_free, m.num_free_slots)
    with pytest.raises(RequestError, match="num_rows: expected at least 300"):
        m.prepare([(r, 300)], num_rows=10)
    grow(m, r, 128)
    m.keep_prefix(r, [1] * 128, 1)
    for ids in (["x"] * 200, [2**70] * 200, [1.5] * 129):
        with pytest.raises(RequestError, match="token_ids: expected"):
            m.admit(ids)
    assert m.num_free_slots == free[1]
    m.check()
    with pytest.raises(RequestError, match="prefix_bytes: expected"):
        CacheManager(m.storage, prefix_bytes=-1)


@pytest.mark.parametrize("what", ["restore", "admit"])
def test_a_failing_copy_leaves_everything_as_it_was(what: str, monkeypatch) -> None:
    m = small_manager(page_tokens=128)
    r = m.admit()
    grow(m, r, 128)
    m.keep_prefix(r, [1] * 128, 1)
    m.preempt(r)
    free = (m.allocator.num_free, m.num_free_slots)

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(SlotCopy, "put", no_memory)
    with pytest.raises(MemoryError):
        m.restore(r) if what == "restore" else m.admit([1] * 129)
    assert (m.allocator.num_free, m.num_free_slots) == free
    m.check()
    monkeypatch.undo()
    m.restore(r)
    m.check()


def test_a_kept_prefix_never_stands_in_the_way_of_its_own_request() -> None:
    m = small_manager(page_tokens=256, num_pages=2)
    r = m.admit()
    grow(m, r, 128)
    assert m.keep_prefix(r, [1] * 128, 1)
    grow(m, r, 1)  # no page is free for a copy: the prefix goes
    assert len(m.prefixes) == 0
    m.check()


def test_of_two_writers_of_a_page_one_keeps_it() -> None:
    m = small_manager(page_tokens=128, num_pages=3)
    a = m.admit()
    grow(m, a, 100)
    b = m.fork(a)
    m.prepare([(a, 1), (b, 1)]).commit()
    assert len({a.pages[0], b.pages[0]}) == 2
    m.check()


def test_the_least_recently_used_prefix_goes_first() -> None:
    m = small_manager(page_tokens=128, num_pages=40)
    for k in range(9):
        r = m.admit()
        grow(m, r, 128)
        m.keep_prefix(r, [k] * 128, k)
        m.release(r)
        if k:
            hit = m.admit([0] * 129)
            assert hit.length == 128, f"prefix 0 was dropped at {k}"
            m.release(hit)
    assert m.admit([1] * 129).length == 0


def test_stores_of_one_kind_are_copied_together() -> None:
    """Every byte of the schema is in one group; Flash has few groups, whatever its layers."""
    schema = CacheSchema.of(ModelConfig.flash(), num_pages=3, num_slots=2, canary=True)
    storage = CacheStorage(schema, "meta")
    assert len(storage.slot_groups()) == 5
    assert len(storage.page_groups()) == 4
    assert sum(g.shape[0] * g.shape[2] for g in storage.slot_groups()) == schema.slot_stride
    assert sum(g.shape[0] * g.shape[2] for g in storage.page_groups()) == schema.page_stride
    small = small_manager(canary=True).storage
    small.pages.zero_()
    small.states.zero_()
    for number, view in enumerate((*small.slot_views(), *small.page_views()), 1):
        assert not view.any()  # no two overlap
        view.fill_(number)
    for layer in small.layers:
        for view in vars(layer).values():
            assert view is None or view.contiguous().view(torch.uint8).unique().numel() == 1


@pytest.mark.parametrize("fault", ["alias", "stale", "unwritten"])
def test_the_canary_sees_planted_faults(fault: str) -> None:
    m = small_manager(page_tokens=128, canary=True)
    assert m.canary is not None
    a, b = m.admit(), m.admit()
    for r, tokens in ((a, [1] * 140), (b, [2] * 140)):
        step = m.prepare([(r, 140)])
        m.canary.wrote(r.slot, r.pages, tokens, 0)
        step.commit()
        m.canary.check(r.slot, r.pages, tokens)
    if fault == "alias":
        a.pages[0] = b.pages[0]
    elif fault == "stale":
        a.slot = b.slot
    else:
        grow(m, a, 4)
        with pytest.raises(CacheCorruptionError, match="read unwritten|another history"):
            m.canary.check(a.slot, a.pages, [1] * 144)
        return
    with pytest.raises(CacheCorruptionError, match="of another history"):
        m.canary.check(a.slot, a.pages, [1] * 140)


@pytest.mark.parametrize("length", [3, 16, 140])
def test_the_canary_looks_at_every_row_the_next_token_reads(length: int) -> None:
    m = small_manager(page_tokens=128, canary=True)
    assert m.canary is not None
    a, tokens, W = m.admit(), [k % 7 for k in range(length)], 16
    grow(m, a, length)
    m.canary.wrote(a.slot, a.pages, tokens, 0)
    rings, entries = m.storage.ring_tags, m.storage.entry_tags
    assert rings is not None
    assert entries is not None
    first = max(length - W + 1, 0)  # with itself the window has W tokens
    rows = [rings[a.slot, p % W] for p in range(first, length)]
    rows += [entries[a.pages[p // 128], p % 128 // 4] for p in range(3, length, 4)]
    for row in rows:
        tag = row.clone()
        for wrong in (-1, 5):
            row.fill_(wrong)
            with pytest.raises(CacheCorruptionError):
                m.canary.check(a.slot, a.pages, tokens)
        row.copy_(tag)
    if length >= W:
        rings[a.slot, length % W] = -1  # the next token takes this place
    m.canary.check(a.slot, a.pages, tokens)


@pytest.mark.parametrize("end", ["release", "preempt", "release in a step"])
def test_freed_pages_and_slots_are_poisoned(end: str) -> None:
    m = small_manager(canary=True)
    a, b = m.admit(), m.admit()
    for r in (a, b):
        grow(m, r, 10)
        random_bytes(m, r, 0)
    slot, page, others = a.slot, a.pages[0], bytes_of(m, b)
    step = m.prepare([(a, 1)]) if end == "release in a step" else None
    m.preempt(a) if end == "preempt" else m.release(a)
    if step is not None:
        step.commit()
    assert all((view[page] == 0xFF).all() for view in m.storage.page_views())
    assert all((view[slot] == 0xFF).all() for view in m.storage.slot_views())
    assert all(torch.equal(x, y) for x, y in zip(bytes_of(m, b), others, strict=True))


def test_a_reset_slot_has_no_tags() -> None:
    storage = small_manager(canary=True).storage
    assert storage.ring_tags is not None
    storage.ring_tags.fill_(5)
    storage.reset_slot(1)
    assert (storage.ring_tags == torch.tensor([[5], [-1], [5], [5]])).all()


@pytest.mark.parametrize("num_pages", [1, 31, 32, 33, 64, 65])
def test_many_pages_leave_and_return(num_pages: int) -> None:
    """They are copied PAGES_AT_ONCE at a time: none, one or some are left for the last copy."""
    assert PAGES_AT_ONCE == 32
    schema = CacheSchema.of(
        replace(small_config(), max_position_embeddings=1 << 14), num_pages=num_pages + 3,
        num_slots=2, page_tokens=128,
    )  # fmt: skip
    m = CacheManager(CacheStorage(schema))
    r = m.admit()
    for _ in range(num_pages):
        grow(m, r, 127)
    random_bytes(m, r, num_pages)
    want = bytes_of(m, r)
    m.preempt(r)
    other = m.admit()
    grow(m, other, 200)  # the pages that come back are others, in another order
    m.storage.pages.fill_(3)
    m.restore(r)
    assert len(r.pages) == num_pages
    assert all(torch.equal(x, y) for x, y in zip(bytes_of(m, r), want, strict=True))
    rest = sorted(set(range(schema.num_pages)) - set(r.pages))
    assert all((view[rest] == 3).all() for view in m.storage.page_views())
    m.check()


@pytest.mark.parametrize("seed", range(20))
def test_fail_at_every_allocation(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scenario of 80 operations, again and again, its k-th taking of pages refused, for all k."""
    take, calls, k = PageAllocator.take, 0, -1

    def refusing(self: PageAllocator, n: int) -> list[int]:
        nonlocal calls
        calls += n > 0
        if n > 0 and calls == k:
            raise CapacityError("cache pages", n, 0)
        return take(self, n)

    monkeypatch.setattr(PageAllocator, "take", refusing)
    refused = 0
    while True:
        calls, k = 0, k + 1
        life = Life(small_manager(128), seed)
        life.run(80)  # checks every invariant after every operation
        refused += sum(n for name, n in life.events.items() if name.endswith("refused"))
        done, calls, m = calls < k, k, life.manager  # from here on nothing is refused
        for r in m.requests:
            m.release(r)
        grow(m, m.admit(), 200)  # the next request is served
        m.check()
        while len(m.prefixes):
            m._release_pages(m.prefixes.evict().pages)
        m.release(m.requests[0])
        assert m.allocator.num_free == m.schema.num_pages - 1
        if done:
            break
    assert k > 3
    assert refused >= k - 1


def test_max_context_is_checked() -> None:
    schema = CacheSchema.of(small_config(), num_pages=2, num_slots=1)
    with pytest.raises(RequestError, match="max_context: expected 1 to 2048"):
        CacheManager(CacheStorage(schema), max_context=4096)
