"""CacheManager under hypothesis: any order of operations, invariants after each one.

Steps stay open while other requests go on; what a step writes, it writes when it ends, to the
slots and pages of requests that were released meanwhile too. The canary tells whose rows are whose.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsv4.cache.request import CachedRequest, Step
from dsv4.core.errors import CapacityError, RequestError
from support.cache_life import small_manager

PROMPTS = st.sampled_from([0, 1, 129, 257, 300])
SIZES = st.sampled_from([0, 1, 2, 3, 63, 129])  # 0: up to the next multiple of 128
TOKENS = st.sampled_from([1, 2])


class CacheLife(RuleBasedStateMachine):
    """Requests by number against a plain dictionary of their token histories."""

    page_tokens = 128

    def __init__(self) -> None:
        super().__init__()
        num_pages = 1152 // self.page_tokens + 1
        self.manager = small_manager(self.page_tokens, num_pages, num_slots=4, canary=True)
        assert self.manager.canary is not None
        self.canary = self.manager.canary
        self.tokens: dict[int, list[int]] = {}
        self.open: list[Step] = []

    def state(self) -> tuple:
        """All that a refused operation must leave as it was."""
        m = self.manager
        requests = [(r.number, r.length, r.slot, tuple(r.pages), r.pending) for r in m.requests]
        return requests, m.allocator.num_free, m.num_free_slots, m.buffers.table.tobytes()

    def some(self, resident: bool = True, is_open: bool = False) -> list[CachedRequest]:
        return [
            r for r in self.manager.requests
            if r.is_resident is resident and (r.pending is not None) is is_open
        ]  # fmt: skip

    def pick(self, data, resident: bool = True, is_open: bool = False) -> CachedRequest:
        return data.draw(st.sampled_from(self.some(resident, is_open)))

    def at_boundary(self) -> list[CachedRequest]:
        return [r for r in self.some() if r.length and r.length % 128 == 0]

    @rule(n=PROMPTS, first=TOKENS)
    def admit(self, n: int, first: int) -> None:
        free = self.manager.num_free_slots
        try:
            request = self.manager.admit([first] * n)
        except CapacityError:
            assert free == 0
            return
        assert request.length % 128 == 0
        assert request.length < max(n, 1)
        self.tokens[request.number] = [first] * request.length

    @precondition(lambda self: self.some())
    @rule(data=st.data(), sizes=st.lists(SIZES, min_size=1, max_size=3))
    def begin(self, data, sizes: list[int]) -> None:
        chosen = data.draw(st.permutations(self.some()))
        batch = [
            (r, min(n or 128 - r.length % 128, self.manager.max_context - r.length))
            for r, n in zip(chosen, sizes, strict=False)
        ]
        for request, _ in batch:
            self.canary.check(request.slot, request.pages, self.tokens[request.number])
        before = self.state()
        try:
            self.open.append(self.manager.prepare(batch))
        except CapacityError:
            assert self.state() == before

    def drawn(self, data) -> Step:
        return self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), token=TOKENS, rejected=st.integers(0, 6))
    def commit(self, data, token: int, rejected: int) -> None:
        """The last tokens of each request are drafts, some of which verification rejects."""
        step, accepted = self.drawn(data), []
        for request, n in step.spans:
            accepted.append(n - min(rejected, max(n - 1, 0)))
            own = self.tokens.get(request.number, [3] * request.length)
            now = own + [token] * accepted[-1]
            self.canary.wrote(request.slot, request.pages, now, len(own))
            if request.number in self.tokens:
                self.tokens[request.number] = now
        step.commit(accepted)
        for request, _ in step.spans:
            assert request.is_resident is (request.number in self.tokens)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data) -> None:
        step = self.drawn(data)
        step.abort()
        for request, _ in step.spans:
            assert request.is_resident is (request.number in self.tokens)
        with pytest.raises(RequestError, match="step: expected one that has not ended"):
            step.commit()

    @precondition(lambda self: self.some())
    @rule(data=st.data(), again=st.booleans())
    def fork(self, data, again: bool) -> None:
        request = self.pick(data)
        again, free = again and request.length > request.oldest, self.manager.num_free_slots
        try:
            child = self.manager.fork(request, again=again)
        except CapacityError:
            assert free == 0
            return
        own = self.tokens[request.number]
        self.tokens[child.number] = own[: len(own) - again]

    @precondition(lambda self: self.some())
    @rule(data=st.data())
    def preempt(self, data) -> None:
        self.manager.preempt(self.pick(data))

    @precondition(lambda self: self.some(resident=False))
    @rule(data=st.data())
    def restore(self, data) -> None:
        request, before = self.pick(data, resident=False), self.state()
        try:
            self.manager.restore(request)
        except CapacityError:
            assert request.snapshot is not None
            assert self.state() == before

    @precondition(lambda self: self.manager.requests)
    @rule(data=st.data())
    def release(self, data) -> None:
        """Resident, preempted, or in an open step."""
        request = data.draw(st.sampled_from(self.manager.requests))
        is_open = request.pending is not None
        self.manager.release(request)
        del self.tokens[request.number]
        assert request.is_resident is is_open

    @precondition(lambda self: self.at_boundary())
    @rule(data=st.data())
    def keep(self, data) -> None:
        request = data.draw(st.sampled_from(self.at_boundary()))
        own = self.tokens[request.number]
        self.manager.keep_prefix(request, own, own[-1])

    @precondition(lambda self: self.some(is_open=True))
    @rule(data=st.data())
    def touch_an_open_request(self, data) -> None:
        request, before = self.pick(data, is_open=True), self.state()
        m, own = self.manager, self.tokens[request.number]
        for refused in (
            lambda: m.prepare([(request, 1)]), lambda: m.fork(request), lambda: m.preempt(request),
            lambda: m.keep_prefix(request, own, 1),
        ):  # fmt: skip
            with pytest.raises(RequestError, match="expected"):
                refused()
        assert self.state() == before

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.manager.check()
        assert {r.number for r in self.manager.requests} == set(self.tokens)
        for r in self.manager.requests:
            assert r.length == len(self.tokens[r.number])

    @invariant()
    def what_is_read_was_written(self) -> None:
        for r in self.manager.requests:
            if r.is_resident:
                self.canary.check(r.slot, r.pages, self.tokens[r.number])


class CacheLifeInLongPages(CacheLife):
    page_tokens = 256


for machine in (CacheLife, CacheLifeInLongPages):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestCacheLife, TestCacheLifeInLongPages = CacheLife.TestCase, CacheLifeInLongPages.TestCase
