"""A request's life in the cache: admit, extend, fork, preempt, restore, release.

All of it happens between steps, on the host. A step asks for its pages first (`prepare`), runs,
and then counts (`Step.commit`); nothing is taken or changed when a call is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from dsv4.cache.allocator import PageAllocator
from dsv4.cache.canary import Canary
from dsv4.cache.prefix import PrefixEntry, PrefixStore, extend_chain
from dsv4.cache.request import CachedRequest, PageDemand, Step
from dsv4.cache.snapshot import SlotCopy, Snapshot
from dsv4.cache.step import DEFAULT_MAX_ROWS, StepBuffers
from dsv4.cache.storage import CacheStorage
from dsv4.core.errors import CapacityError, RequestError
from dsv4.core.kv_layout import PAGE_QUANTUM


class CacheManager:
    """Owns the pages and slots of one CacheStorage.

    storage       the device bytes
    max_context   longest request, fixes the width of the page table
    prefix_bytes  host memory for shared prefixes; 0 keeps none
    canary        check owners and poison what is freed; slow, for debugging
    max_rows      most rows of a step, padding included: fixes the size of the step's buffers
    """

    def __init__(
        self,
        storage: CacheStorage,
        max_context: int | None = None,
        prefix_bytes: int = 0,
        canary: bool = False,
        max_rows: int = DEFAULT_MAX_ROWS,
    ) -> None:
        schema = storage.schema
        limit = schema.config.max_position_embeddings
        most = min(limit, schema.page_tokens * (schema.num_pages - 1))
        self.max_context = most if max_context is None else max_context
        if not (_is_count(self.max_context) and 1 <= self.max_context <= limit):
            raise RequestError("max_context", f"1 to {limit}", max_context)
        if not _is_count(prefix_bytes):
            raise RequestError("prefix_bytes", "0 or more", prefix_bytes)
        if not (_is_count(max_rows) and max_rows >= 1):
            raise RequestError("max_rows", "1 or more", max_rows)
        self.storage, self.schema = storage, schema
        self.allocator = PageAllocator(schema.num_pages)
        self.prefixes = PrefixStore(prefix_bytes, with_next_token=schema.num_mtp_windows > 0)
        self.canary = Canary(storage) if canary else None
        self._free_slots = list(range(schema.num_slots - 1, -1, -1))
        self._requests: dict[int, CachedRequest] = {}
        self._dying: dict[int, CachedRequest] = {}  # released in a step that has not ended
        self._next_number = 0
        self.buffers = StepBuffers(
            schema.num_slots, schema.pages_for(self.max_context), max_rows, storage.states.device
        )

    @property
    def page_table(self) -> Tensor:
        """[num_slots, max_pages] int32 on the device, as of the step prepared last."""
        return self.buffers.page_table

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
        with self._new_slot() as slot:
            kept = self.prefixes.find(token_ids)
            entry = self.prefixes[kept[-1]] if kept else None
            if entry is None:
                self.storage.reset_slot(slot)
            else:
                entry.slot.put(self.storage, slot)
        request = CachedRequest(self._next_number, slot=slot, kept=kept)
        if entry is not None:
            self.allocator.retain(entry.pages)
            request.length, request.pages = entry.length, [*entry.pages]
            request.chain, request.oldest = (entry.length, entry.digest), entry.length
        return self._register(request)

    def keep_prefix(
        self, request: CachedRequest, token_ids: Sequence[int], next_token: int | None = None
    ) -> bool:
        """Keep the state of `request` for others that begin with the same tokens.

        token_ids   all tokens of the request, a multiple of 128 of them; blocks of 128 that an
                    earlier call of the request hashed are not looked at again
        next_token  the token after them, for a model with MTP blocks: the last row of their
                    windows was made with it, so the prefix serves only requests that go on so
        ->          False where there was one already, or no room
        """
        self._check_known(request, resident=True)
        if len(token_ids) != request.length or request.length % PAGE_QUANTUM or not token_ids:
            raise RequestError(
                "token_ids", f"the {request.length} ids of the request, a multiple of 128",
                len(token_ids),
            )  # fmt: skip
        self._check_ended(request)
        chain = extend_chain(request.chain, token_ids)
        key = self.prefixes.key(chain[1], next_token)
        is_new = self._keep(request, key, chain)
        request.chain = chain
        request.kept = tuple(k for k in dict.fromkeys((*request.kept, key)) if k in self.prefixes)
        self.prefixes.touch(request.kept)
        return is_new

    def _keep(self, request: CachedRequest, key: bytes, chain: tuple[int, bytes]) -> bool:
        nbytes = self.storage.slot_bytes(at_boundary=True)
        if nbytes > self.prefixes.max_bytes or key in self.prefixes:
            return False
        assert request.slot is not None
        pages = tuple(request.pages[: self.schema.pages_for(request.length)])
        slot = SlotCopy.take(self.storage, request.slot, at_boundary=True)
        self.allocator.retain(pages)
        for old in self.prefixes.add(key, PrefixEntry(request.length, slot, pages, chain[1])):
            self._release_pages(old.pages)
        return True

    def demand(self, batch: Sequence[tuple[CachedRequest, int]]) -> PageDemand:
        """Pages that `prepare(batch)` would take, and what there is; takes nothing.

        Raises RequestError for misuse.
        """
        self._check_batch(batch)
        return self._demand(batch, sum(self._pages_to_add(r, n) for r, n in batch))

    def prepare(
        self, batch: Sequence[tuple[CachedRequest, int]], num_rows: int | None = None
    ) -> Step:
        """Take the pages that `batch` needs and say where its rows go.

        batch     (request, number of new tokens), prefill and decode mixed; a request once
        num_rows  pad the rows to this many, for a captured graph: the step's tensors are then
                  those of every other step with as many rows

        A last page that is partly filled and shared is copied first, so that no shared page is
        ever written. Raises RequestError for misuse, CapacityError if pages run out: then nothing
        has changed.
        """
        self._check_batch(batch)
        num_tokens = sum(n for _, n in batch)
        T, most = num_tokens if num_rows is None else num_rows, self.buffers.max_rows
        if not (_is_count(T) and num_tokens <= T <= most):
            raise RequestError(
                "num_rows", f"at least {num_tokens} tokens, at most max_rows {most}", num_rows
            )
        fresh = [self._pages_to_add(r, n) for r, n in batch]
        copying = self._make_room(batch, sum(fresh))
        before = [(r, r.pages) for r, _ in batch]
        taken = self.allocator.take(sum(fresh) + len(copying))
        try:
            shared = self._attach(batch, fresh, copying, taken)
            spans = [(r.slot, r.length, n) for r, n in batch if r.slot is not None]
            rows = self.buffers.fill(spans, num_rows)
        except BaseException:
            for request, pages in before:
                if request.pages is not pages:
                    request.pages = pages
                    self._write_table(request)
            self._release_pages(taken)
            raise
        self._release_pages(shared)
        step = Step(tuple(batch), rows, self.buffers, self.buffers.serial, self._settle)
        for request, _ in batch:
            request.pending = step
        return step

    def _attach(
        self, batch: Sequence[tuple[CachedRequest, int]], fresh: Sequence[int], copying: set[int],
        taken: Sequence[int],
    ) -> list[int]:  # fmt: skip
        """Give the requests new lists of pages; -> the pages that copies took the place of."""
        pages, shared = iter(taken), []
        for (request, _), n in zip(batch, fresh, strict=True):
            new = list(request.pages)
            if id(request) in copying:
                index = request.length // self.schema.page_tokens
                shared.append(new[index])
                new[index] = next(pages)
                self.storage.copy_page(shared[-1], new[index])
            new += [next(pages) for _ in range(n)]
            if new != request.pages:
                request.pages = new
                self._write_table(request)
        return shared

    def _settle(self, request: CachedRequest, is_trimmed: bool) -> None:
        """A step of `request` ended: free what was released, or what it does not need."""
        if self._dying.pop(request.number, None) is not None:
            request.length = 0
            self._vacate(request)
        elif is_trimmed:
            self._drop_spare_pages(request)

    def _drop_spare_pages(self, request: CachedRequest) -> None:
        """Give back pages beyond those that the request's tokens fill."""
        used = self.schema.pages_for(request.length)
        spare, request.pages = request.pages[used:], request.pages[:used]
        if spare:
            self._release_pages(spare)
            self._write_table(request)

    def fork(self, request: CachedRequest, again: bool = False) -> CachedRequest:
        """A second request with the same past: shares its pages, copies its state.

        again  begin one token earlier: the child's first step computes the last token once more.
               The last row of an MTP window was made with the parent's next token; so a child that
               goes on with another one writes a row of its own. `request` must have computed a
               token since it was admitted or forked: its slot goes back one token, no further.

        Raises CapacityError when no slot is free.
        """
        self._check_known(request, resident=True)
        self._check_ended(request)
        length = request.length - bool(again)
        if length < request.oldest:
            raise RequestError(
                "again", f"a request longer than the {request.oldest} tokens that it began with",
                request.length, "fork it as it is, or admit the tokens anew",
            )  # fmt: skip
        assert request.slot is not None
        with self._new_slot() as slot:
            self.storage.copy_slot(request.slot, slot)
        pages = request.pages[: self.schema.pages_for(length)]
        self.allocator.retain(pages)
        is_hashed = request.chain[0] <= length
        return self._register(
            CachedRequest(
                self._next_number, length, slot, pages,
                oldest=length if again else request.oldest,
                chain=request.chain if is_hashed else (0, b""),
                kept=request.kept if is_hashed else (),
            )
        )  # fmt: skip

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
        with self._new_slot() as slot:
            self._make_room((), request.snapshot.num_pages)
            pages = self.allocator.take(request.snapshot.num_pages)
            try:
                request.snapshot.put(self.storage, slot, pages)
            except BaseException:
                self._release_pages(pages)
                raise
        request.slot, request.pages, request.snapshot = slot, pages, None
        self._write_table(request)

    def release(self, request: CachedRequest) -> None:
        """End a request, resident or preempted; its slot and pages are free afterwards.

        In a step that has not ended, they are free once it ends: until then it may write them.
        """
        self._check_known(request)
        del self._requests[request.number]
        request.snapshot = None
        if request.pending is not None:
            self._dying[request.number] = request
        elif request.is_resident:
            self._vacate(request)

    def check(self) -> None:
        """Assert every invariant of slots, pages and tables."""
        requests = [*self.requests, *self._dying.values()]
        resident = [r for r in requests if r.is_resident]
        owners = [*(r.pages for r in requests), *self.prefixes.page_lists()]
        self.allocator.check(owners)
        slots = [r.slot for r in resident if r.slot is not None]
        assert len(set(slots)) == len(slots), "a slot has two owners"
        assert sorted([*slots, *self._free_slots]) == list(range(self.schema.num_slots))
        table = self.buffers.table.tolist()
        on_device = self.page_table.tolist()
        for r in requests:
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
        for slot in set(range(self.schema.num_slots)) - self.buffers.changed_slots:
            assert table[slot] == on_device[slot], "the device has another page table"

    def _pages_to_add(self, request: CachedRequest, n: int) -> int:
        return max(self.schema.pages_for(request.length + n) - len(request.pages), 0)

    def _copying(
        self, batch: Sequence[tuple[CachedRequest, int]], kept: Mapping[int, int]
    ) -> set[int]:
        """Requests (by id) whose partly filled last page somebody else owns too.

        kept  owners of each page that do not count: prefixes that could be dropped. Of several
              writers of one page that nobody else owns, the last keeps it.
        """
        copying: set[int] = set()
        for page, ids in self._writers(batch).items():
            others = self.allocator.owners(page) - kept.get(page, 0) - len(ids)
            copying.update(ids if others else ids[:-1])
        return copying

    def _writers(self, batch: Sequence[tuple[CachedRequest, int]]) -> dict[int, list[int]]:
        """Requests (by id) that write in each partly filled last page."""
        writers: dict[int, list[int]] = {}
        for request, n in batch:
            index, fill = divmod(request.length, self.schema.page_tokens)
            if n and fill:
                writers.setdefault(request.pages[index], []).append(id(request))
        return writers

    def _demand(self, batch: Sequence[tuple[CachedRequest, int]], fresh: int) -> PageDemand:
        kept = self.prefixes.page_owners
        spare = sum(self.allocator.owners(page) == n for page, n in kept.items())
        needed, least = (fresh + len(self._copying(batch, k)) for k in ({}, kept))
        return PageDemand(needed, self.allocator.num_free, spare, least)

    def _make_room(self, batch: Sequence[tuple[CachedRequest, int]], fresh: int) -> set[int]:
        """Drop kept prefixes until the pages are free; who must copy, by id.

        Least recently used ones go first, but none that frees no page. Raises CapacityError, and
        drops none, if dropping all of them were not enough.
        """
        copying = self._copying(batch, {})
        if fresh + len(copying) <= self.allocator.num_free:
            return copying
        demand = self._demand(batch, fresh)
        if not demand.fits:
            free = demand.free + demand.reclaimable
            raise CapacityError("cache pages", demand.least, free, "release or preempt a request")
        writers = self._writers(batch)
        while True:
            kept = len(self.prefixes)
            for page, n in self.prefixes.ends():
                if self.allocator.owners(page) != n + len(writers.get(page, ())):
                    continue  # dropping these neither frees a page nor saves a copy
                for entry in self.prefixes.drop(page):
                    self._release_pages(entry.pages)
                copying = self._copying(batch, {}) if page in writers else copying
                if fresh + len(copying) <= self.allocator.num_free:
                    return copying
            assert len(self.prefixes) < kept, "no kept prefix frees a page"

    def _release_pages(self, pages: Sequence[int]) -> None:
        freed = self.allocator.release(pages)
        if self.canary is not None:
            self.canary.poison(freed)

    def _register(self, request: CachedRequest) -> CachedRequest:
        self._next_number += 1
        self._requests[request.number] = request
        if request.pages:
            self._write_table(request)
        return request

    @contextmanager
    def _new_slot(self) -> Iterator[int]:
        """A free slot, which goes back if what is done with it fails."""
        if not self._free_slots:
            raise CapacityError("cache slots", 1, 0, "release or preempt a request")
        slot = self._free_slots.pop()
        try:
            yield slot
        except BaseException:
            self._free_slots.append(slot)
            raise

    def _vacate(self, request: CachedRequest) -> None:
        assert request.slot is not None
        self.buffers.set_pages(request.slot, ())
        self._free_slots.append(request.slot)
        self._release_pages(request.pages)
        if self.canary is not None:
            self.canary.poison_slot(request.slot)
        request.slot, request.pages = None, []

    def _write_table(self, request: CachedRequest) -> None:
        assert request.slot is not None
        self.buffers.set_pages(request.slot, request.pages)

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
            if not _is_count(n):
                raise RequestError("batch", "0 or more new tokens", n)
            if request.length + n > self.max_context:
                raise RequestError(
                    "batch", f"at most {self.max_context} tokens in a request", request.length + n
                )


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0
