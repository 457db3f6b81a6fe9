"""A request's life in the cache: admit, extend, fork, preempt, restore, release.

All of it happens between steps, on the host. A step asks for its pages first (`prepare`), runs,
and then counts (`Step.commit`); nothing is taken or changed when a call is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4.cache.allocator import NULL_PAGE, PageAllocator
from dsv4.cache.canary import Canary
from dsv4.cache.prefix import PrefixEntry, PrefixStore
from dsv4.cache.snapshot import SlotCopy, Snapshot
from dsv4.cache.step import StepRows
from dsv4.cache.storage import CacheStorage
from dsv4.core.errors import CapacityError, RequestError
from dsv4.core.kv_layout import PAGE_QUANTUM


@dataclass
class CachedRequest:
    """One request as the cache knows it.

    number    given at admission, never used again
    length    tokens the cache holds
    slot      row of the state stores; None while preempted and after release
    pages     page numbers in order of tokens; the last one may be partly filled
    snapshot  what a preempted request left on the host
    pending   a step that was prepared and is neither committed nor aborted
    """

    number: int
    length: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    snapshot: Snapshot | None = None
    pending: Step | None = field(default=None, repr=False)

    @property
    def is_resident(self) -> bool:
        """Whether the request can take part in a step."""
        return self.slot is not None


@dataclass(frozen=True, eq=False)
class Step:
    """A prepared step: pages are attached, tables written. It ends in `commit` or in `abort`.

    rows        metadata of the token rows
    page_table  [num_slots, max_pages] int32, the manager's own: valid until the next prepare
    """

    rows: StepRows
    page_table: Tensor
    spans: tuple[tuple[CachedRequest, int], ...]
    manager: CacheManager = field(repr=False)

    def commit(self) -> None:
        """Count the tokens of the step as cached, after the step ran.

        A request released meanwhile is left out. Raises RequestError the second time.
        """
        for request, n in self._end():
            request.length += n

    def abort(self) -> None:
        """Give back what `prepare` took: the step did not run, or its results are dropped.

        Ring and state rows that a step did write stay written: abort before it runs, or release
        the request.
        """
        for request, _ in self._end():
            self.manager.drop_spare_pages(request)

    def _end(self) -> list[tuple[CachedRequest, int]]:
        mine = [(r, n) for r, n in self.spans if r.pending is self]
        if self.spans and not mine and any(r.slot is not None for r, _ in self.spans):
            raise RequestError("step", "one that has not ended", "a committed or aborted step")
        for request, _ in mine:
            request.pending = None
        return mine


class CacheManager:
    """Owns the pages and slots of one CacheStorage.

    storage       the device bytes
    max_context   longest request, fixes the width of the page table
    prefix_bytes  host memory for shared prefixes; 0 keeps none
    canary        check owners and poison what is freed; slow, for debugging
    """

    def __init__(
        self,
        storage: CacheStorage,
        max_context: int | None = None,
        prefix_bytes: int = 0,
        canary: bool = False,
    ) -> None:
        schema = storage.schema
        limit = schema.config.max_position_embeddings
        most = min(limit, schema.page_tokens * (schema.num_pages - 1))
        self.max_context = most if max_context is None else max_context
        if not 1 <= self.max_context <= limit:
            raise RequestError("max_context", f"1 to {limit}", max_context)
        if prefix_bytes < 0:
            raise RequestError("prefix_bytes", "0 or more", prefix_bytes)
        self.storage, self.schema = storage, schema
        self.allocator = PageAllocator(schema.num_pages)
        self.prefixes = PrefixStore(prefix_bytes)
        self.canary = Canary(storage) if canary else None
        self._free_slots = list(range(schema.num_slots - 1, -1, -1))
        self._requests: dict[int, CachedRequest] = {}
        self._next_number = 0
        self.page_table = torch.full(
            (schema.num_slots, schema.pages_for(self.max_context)),
            NULL_PAGE,
            dtype=torch.int32,
            device=storage.states.device,
        )

    @property
    def requests(self) -> tuple[CachedRequest, ...]:
        """All requests that are neither released nor unknown, preempted ones included."""
        return tuple(self._requests.values())

    @property
    def num_free_slots(self) -> int:
        """Requests that could be admitted now."""
        return len(self._free_slots)

    def admit(self, token_ids: Sequence[int] = ()) -> CachedRequest:
        """Start a request; `length` of it is already there if a kept prefix of the ids fits.

        Raises CapacityError when no slot is free.
        """
        entry = self.prefixes.find(token_ids)
        slot = self._take_slot()
        try:
            if entry is None:
                self.storage.reset_slot(slot)
            else:
                entry.slot.put(self.storage, slot)
        except BaseException:
            self._free_slots.append(slot)
            raise
        request = self._register(CachedRequest(self._next_number, slot=slot))
        if entry is not None:
            self.allocator.retain(entry.pages)
            request.length, request.pages = entry.length, [*entry.pages]
            self._write_table(request)
        return request

    def keep_prefix(self, request: CachedRequest, token_ids: Sequence[int]) -> bool:
        """Keep the state of `request` for others that begin with the same tokens.

        token_ids  all tokens of the request, a multiple of 128 of them
        ->         False where there was one already, or no room
        """
        self._check_known(request, resident=True)
        if len(token_ids) != request.length or request.length % PAGE_QUANTUM or not token_ids:
            raise RequestError(
                "token_ids", f"the {request.length} ids of the request, a multiple of 128",
                len(token_ids),
            )  # fmt: skip
        self._check_ended(request)
        views = self.storage.slot_views(at_boundary=True)
        if sum(v.shape[1] for v in views) > self.prefixes.max_bytes or token_ids in self.prefixes:
            return False
        assert request.slot is not None
        pages = tuple(request.pages[: self.schema.pages_for(request.length)])
        slot = SlotCopy.take(self.storage, request.slot, at_boundary=True)
        entry = PrefixEntry(request.length, slot, pages)
        self.allocator.retain(pages)
        gone = self.prefixes.add(token_ids, entry)
        for old in gone:
            self._release_pages(old.pages)
        return all(old is not entry for old in gone)

    def prepare(
        self, batch: Sequence[tuple[CachedRequest, int]], num_rows: int | None = None
    ) -> Step:
        """Take the pages that `batch` needs and say where its rows go.

        batch     (request, number of new tokens), prefill and decode mixed; a request once
        num_rows  pad the rows to this many, for a captured graph

        A last page that is partly filled and shared is copied first, so that no shared page is
        ever written. Raises RequestError for misuse, CapacityError if pages run out: then nothing
        has changed.
        """
        self._check_batch(batch)
        num_tokens = sum(n for _, n in batch)
        if num_rows is not None and num_rows < num_tokens:
            raise RequestError("num_rows", f"at least {num_tokens}", num_rows)
        fresh = {id(r): self._pages_to_add(r, n) for r, n in batch}
        copying = self._make_room(batch, sum(fresh.values()))
        taken = iter(self.allocator.take(sum(fresh.values()) + len(copying)))
        for request, _ in batch:
            if id(request) in copying:
                self._replace_last_page(request, next(taken))
            request.pages += [next(taken) for _ in range(fresh[id(request)])]
            if fresh[id(request)] or id(request) in copying:
                self._write_table(request)
        spans = [(r.slot, r.length, n) for r, n in batch if r.slot is not None]
        rows = StepRows.build(spans, num_rows, self.page_table.device)
        step = Step(rows, self.page_table, tuple(batch), self)
        for request, _ in batch:
            request.pending = step
        return step

    def drop_spare_pages(self, request: CachedRequest) -> None:
        """Give back pages beyond those that the request's tokens fill."""
        used = self.schema.pages_for(request.length)
        spare, request.pages = request.pages[used:], request.pages[:used]
        if spare:
            self._release_pages(spare)
            self._write_table(request)

    def fork(self, request: CachedRequest) -> CachedRequest:
        """A second request with the same past: shares its pages, copies its state.

        Raises CapacityError when no slot is free.
        """
        self._check_known(request, resident=True)
        self._check_ended(request)
        slot = self._take_slot()
        child = CachedRequest(self._next_number, request.length, slot, [*request.pages])
        self.allocator.retain(child.pages)
        self._register(child)
        assert request.slot is not None
        self.storage.copy_slot(request.slot, slot)
        self._write_table(child)
        return child

    def preempt(self, request: CachedRequest) -> None:
        """Move a request to host memory and free its slot and pages."""
        self._check_known(request, resident=True)
        self._check_ended(request)
        assert request.slot is not None
        request.snapshot = Snapshot.take(self.storage, request.slot, request.pages)
        self._vacate(request)

    def restore(self, request: CachedRequest) -> None:
        """Bring a preempted request back, byte for byte, to whatever slot and pages are free.

        Raises CapacityError when they are not: the request stays preempted.
        """
        self._check_known(request, resident=False)
        assert request.snapshot is not None
        slot = self._take_slot()
        try:
            self._make_room((), request.snapshot.num_pages)
            pages = self.allocator.take(request.snapshot.num_pages)
        except BaseException:
            self._free_slots.append(slot)
            raise
        try:
            request.snapshot.put(self.storage, slot, pages)
        except BaseException:
            self._free_slots.append(slot)
            self._release_pages(pages)
            raise
        request.slot, request.pages, request.snapshot = slot, pages, None
        self._write_table(request)

    def release(self, request: CachedRequest) -> None:
        """End a request, resident or preempted; its slot and pages are free afterwards."""
        self._check_known(request)
        if request.is_resident:
            self._vacate(request)
        request.snapshot = request.pending = None
        del self._requests[request.number]

    def check(self) -> None:
        """Assert every invariant of slots, pages and tables."""
        resident = [r for r in self.requests if r.is_resident]
        owners = [*(r.pages for r in self.requests), *self.prefixes.page_lists()]
        self.allocator.check(owners)
        slots = [r.slot for r in resident if r.slot is not None]
        assert len(set(slots)) == len(slots), "a slot has two owners"
        assert sorted([*slots, *self._free_slots]) == list(range(self.schema.num_slots))
        table = self.page_table.tolist()
        for r in self.requests:
            used = self.schema.pages_for(r.length) if r.is_resident else 0
            assert len(r.pages) == used or (r.pending is not None and len(r.pages) > used)
            assert (r.snapshot is None) == r.is_resident
            if r.pending is not None and any(n for q, n in r.pending.spans if q is r):
                written = r.pages[r.length // self.schema.page_tokens :]
                assert all(self.allocator.owners(page) == 1 for page in written)
        for r in resident:
            assert r.slot is not None
            row = table[r.slot]
            assert row[: len(r.pages)] == r.pages, "page table and request differ"
            assert not any(row[len(r.pages) :]), "stale pages in a table"
        for slot in self._free_slots:
            assert not any(table[slot]), "stale pages in the table of a free slot"

    def _pages_to_add(self, request: CachedRequest, n: int) -> int:
        return max(self.schema.pages_for(request.length + n) - len(request.pages), 0)

    def _copying(
        self, batch: Sequence[tuple[CachedRequest, int]], kept: Mapping[int, int]
    ) -> set[int]:
        """Requests (by id) whose partly filled last page somebody else owns too.

        kept  owners of each page that do not count: prefixes that could be dropped. Of several
              writers of one page that nobody else owns, the last keeps it.
        """
        writers: dict[int, list[int]] = {}
        for request, n in batch:
            index, fill = divmod(request.length, self.schema.page_tokens)
            if n and fill:
                writers.setdefault(request.pages[index], []).append(id(request))
        copying: set[int] = set()
        for page, ids in writers.items():
            others = self.allocator.owners(page) - kept.get(page, 0) - len(ids)
            copying.update(ids if others else ids[:-1])
        return copying

    def _make_room(self, batch: Sequence[tuple[CachedRequest, int]], fresh: int) -> set[int]:
        """Drop kept prefixes until the pages are free; who must copy, by id.

        Raises CapacityError, and drops none, if dropping all of them were not enough.
        """
        copying = self._copying(batch, {})
        if fresh + len(copying) <= self.allocator.num_free:
            return copying
        kept = self.prefixes.page_owners
        spare = sum(self.allocator.owners(page) == n for page, n in kept.items())
        needed, free = fresh + len(self._copying(batch, kept)), self.allocator.num_free + spare
        if needed > free:
            raise CapacityError("cache pages", needed, free, "release or preempt a request")
        while fresh + len(copying) > self.allocator.num_free:
            self._release_pages(self.prefixes.evict().pages)
            copying = self._copying(batch, {})
        return copying

    def _replace_last_page(self, request: CachedRequest, page: int) -> None:
        index = request.length // self.schema.page_tokens
        old, request.pages[index] = request.pages[index], page
        self.storage.copy_page(old, page)
        self._release_pages([old])

    def _release_pages(self, pages: Sequence[int]) -> None:
        freed = self.allocator.release(pages)
        if self.canary is not None:
            self.canary.poison(freed)

    def _register(self, request: CachedRequest) -> CachedRequest:
        self._next_number += 1
        self._requests[request.number] = request
        return request

    def _take_slot(self) -> int:
        if not self._free_slots:
            raise CapacityError("cache slots", 1, 0, "release or preempt a request")
        return self._free_slots.pop()

    def _vacate(self, request: CachedRequest) -> None:
        assert request.slot is not None
        self.page_table[request.slot] = NULL_PAGE
        self._free_slots.append(request.slot)
        self._release_pages(request.pages)
        if self.canary is not None:
            self.canary.poison_slot(request.slot)
        request.slot, request.pages = None, []

    def _write_table(self, request: CachedRequest) -> None:
        assert request.slot is not None
        pages = torch.tensor(request.pages, dtype=torch.int32)
        row = self.page_table[request.slot]
        row[len(pages) :] = NULL_PAGE
        row[: len(pages)] = pages.to(row.device)

    def _check_known(self, request: CachedRequest, resident: bool | None = None) -> None:
        if self._requests.get(request.number) is not request:
            raise RequestError("request", "one that this manager admitted", request.number)
        if resident is not None and request.is_resident is not resident:
            state = "resident" if resident else "preempted"
            raise RequestError("request", f"a {state} request", request.number)

    def _check_ended(self, request: CachedRequest) -> None:
        if request.pending is not None:
            raise RequestError(
                "request", "one without an open step", request.number, "commit or abort the step"
            )

    def _check_batch(self, batch: Sequence[tuple[CachedRequest, int]]) -> None:
        seen: set[int] = set()
        for request, n in batch:
            self._check_known(request, resident=True)
            self._check_ended(request)
            if request.number in seen:
                raise RequestError("batch", "each request once", request.number)
            seen.add(request.number)
            if isinstance(n, bool) or not isinstance(n, int) or n < 0:
                raise RequestError("batch", "0 or more new tokens", n)
            if request.length + n > self.max_context:
                raise RequestError(
                    "batch", f"at most {self.max_context} tokens in a request", request.length + n
                )
