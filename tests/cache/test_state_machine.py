"""CacheManager under hypothesis: any order of operations, invariants after each one."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsv4.core.errors import CapacityError
from support.cache_life import small_manager

PROMPTS = st.sampled_from([0, 1, 129, 257, 300])
SIZES = st.sampled_from([0, 1, 2, 3, 63, 127, 128, 129])


class CacheLife(RuleBasedStateMachine):
    """Requests by number against a plain dictionary of their token histories."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = small_manager(page_tokens=128, num_pages=9, num_slots=3, canary=True)
        assert self.manager.canary is not None
        self.canary = self.manager.canary
        self.tokens: dict[int, list[int]] = {}

    def pick(self, data, resident: bool):
        some = [r for r in self.manager.requests if r.is_resident is resident]
        return data.draw(st.sampled_from(some)) if some else None

    @rule(n=PROMPTS, first=st.sampled_from([1, 2]))
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

    @rule(data=st.data(), n=SIZES, token=st.sampled_from([1, 2]), rejected=st.integers(0, 6))
    def extend(self, data, n: int, token: int, rejected: int) -> None:
        """A step whose last tokens are drafts, some of which verification rejects."""
        request = self.pick(data, resident=True)
        if request is None or request.length + n > self.manager.max_context:
            return
        before = (request.length, list(request.pages), self.manager.allocator.num_free)
        own = self.tokens[request.number]
        self.canary.check(request.slot, request.pages, own)
        try:
            step = self.manager.prepare([(request, n)])
        except CapacityError:
            now = (request.length, request.pages, self.manager.allocator.num_free)
            assert now == before
            return
        accepted = n - min(rejected, max(n - 1, 0))
        self.tokens[request.number] = own + [token] * accepted
        self.canary.wrote(request.slot, request.pages, self.tokens[request.number], len(own))
        step.commit([accepted])

    @rule(data=st.data())
    def fork(self, data) -> None:
        request = self.pick(data, resident=True)
        if request is not None and self.manager.num_free_slots:
            child = self.manager.fork(request)
            self.tokens[child.number] = list(self.tokens[request.number])

    @rule(data=st.data())
    def preempt(self, data) -> None:
        request = self.pick(data, resident=True)
        if request is not None:
            self.manager.preempt(request)

    @precondition(lambda self: any(not r.is_resident for r in self.manager.requests))
    @rule(data=st.data())
    def restore(self, data) -> None:
        request = self.pick(data, resident=False)
        try:
            self.manager.restore(request)
        except CapacityError:
            assert request.snapshot is not None

    @rule(data=st.data(), resident=st.booleans())
    def release(self, data, resident: bool) -> None:
        request = self.pick(data, resident)
        if request is not None:
            self.manager.release(request)
            del self.tokens[request.number]

    @rule(data=st.data())
    def keep(self, data) -> None:
        request = self.pick(data, resident=True)
        if request is not None and request.length and request.length % 128 == 0:
            self.manager.keep_prefix(request, self.tokens[request.number], 1)

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


CacheLife.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestCacheLife = CacheLife.TestCase
