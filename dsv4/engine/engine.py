"""Continuous batching: requests of any length come and go, each gets what it would get alone.

A step is all prefill or all decode. The host is one step behind the device: it queues a step, then
looks at the tokens of the step before. A request that turns out to have ended has then run once
more than it needed; that token is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from dsv4.cache.request import CachedRequest, Step
from dsv4.core.errors import CapacityError, RequestError
from dsv4.core.kv_layout import PAGE_QUANTUM
from dsv4.core.sampling import SamplingParams
from dsv4.engine.model import ProductionModel
from dsv4.engine.request import EngineRequest
from dsv4.engine.stepper import Pending, Stepper

Launch = tuple[list[EngineRequest], Pending]
Update = tuple[EngineRequest, int]


class Engine:
    """Serves requests with one model.

    model    whose cache the engine takes over
    stepper  runs its steps; one with CUDA graphs is made on a GPU
    stop_ids ids that end any answer, unless its parameters say ignore_eos

    num_preemptions  how often a request made room for others

    On a GPU all kernels are compiled here, none later.
    """

    def __init__(
        self, model: ProductionModel, stepper: Stepper | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.model, self.stop_ids = model, stop_ids
        self.stepper = Stepper(model) if stepper is None else stepper
        self.stepper.capture()
        if model.device.type == "cuda":
            self.stepper.warm_up()
        self._waiting: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []
        self._in_flight: deque[Launch] = deque()  # oldest first; two while a step is queued
        self._known: list[Update] = []  # tokens that `step` has not returned yet
        self._prefilled_last = False
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._running or self._in_flight)

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None) -> EngineRequest:
        """Queue a request. Raises RequestError for a prompt that cannot be served."""
        params = params or SamplingParams()
        V, limit = self.model.config.vocab_size, self.model.max_context
        if not 1 <= len(prompt) < limit:
            raise RequestError("prompt", f"1 to {limit - 1:,} ids", len(prompt), "shorten it")
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < V:
                raise RequestError("prompt", f"ids from 0 to {V - 1}", token)
        schema = self.model.cache.schema
        held = (schema.num_pages - 1) * schema.page_tokens  # by a request that is alone
        if len(prompt) >= held:
            raise CapacityError("cache tokens", len(prompt) + 1, held, "shorten the prompt")
        stops = frozenset(params.stop_token_ids)
        stops |= frozenset() if params.ignore_eos else self.stop_ids
        room = min(params.max_tokens, limit - len(prompt), held - len(prompt))
        request = EngineRequest(tuple(prompt), params, stops, room)
        self._waiting.append(request)
        return request

    def cancel(self, request: EngineRequest) -> None:
        """End a request now; one that has ended already stays as it is."""
        if not request.is_finished:
            request.finish_reason = "cancelled"
            self._drop(request)

    def step(self) -> list[Update]:
        """Queue one step, and return (request, token) for what became known of the step before."""
        before = len(self._in_flight)
        self._launch()
        for _ in range(min(before, len(self._in_flight))):
            self._collect()
        known, self._known = self._known, []
        return known

    def _launch(self) -> None:
        """Prefill and decode take turns while there is work for both."""
        turns = [self._prefill, self._decode]
        if self._prefilled_last:
            turns.reverse()
        for turn in turns:
            if turn():
                self._prefilled_last = turn == self._prefill
                return
        if len(self._running) > 1 and not self._in_flight:
            self._preempt_newest()  # all wait for pages that the others hold

    def _collect(self) -> None:
        """Look at the tokens of the oldest step in flight; requests that have ended leave."""
        if not self._in_flight:
            return
        requests, pending = self._in_flight.popleft()
        for request, token in zip(requests, pending.wait(), strict=True):
            if request.is_finished:
                continue
            request.take(token)
            self._known.append((request, token))
            if request.is_finished:
                self._drop(request)

    def _drop(self, request: EngineRequest) -> None:
        if request.cached is not None:
            self.model.cache.release(request.cached)
            request.cached = None
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    # ---- prefill

    def _prefill(self) -> bool:
        """A chunk of each request that has ids to feed, as many as fit in a step."""
        self._admit()
        room = self.model.limits.max_rows
        batch: list[tuple[EngineRequest, int]] = []
        for request in self._running:
            n = min(self._chunk(request), room)
            if n and (pair := self._fitting(request, n, batch)) is not None:
                batch.append(pair)
                room -= n
        if not batch:
            return False
        num_rows = self.stepper.padded_prompt(sum(n for _, n in batch))
        step = self.model.prepare(_spans(batch), num_rows)
        ids, following, last, done = [], [], [], []
        for request, n in batch:
            held = _cached(request).length
            ids += request.prompt[held : held + n]
            following += (*request.prompt[held + 1 : held + n + 1], -1)[:n]
            if held + n == len(request.prompt):
                last.append(len(ids) - 1)
                done.append(request)
        everybody = [request for request, _ in batch]
        with self._all_or_none(step, everybody):
            pending = self.stepper.prefill(step, ids, following, last)
        step.commit()
        self._queue(done, pending)
        for request in everybody:
            self._keep_prefix(request)
        return True

    def _chunk(self, request: EngineRequest) -> int:
        """Ids to feed next; a chunk stops where the prefix of the prompt is to be kept."""
        left = 0 if request.num_sampled else request.num_to_feed
        held, boundary = _cached(request).length, self._boundary(request)
        if held < boundary:
            left = min(left, boundary - held)
        return min(left, self.model.limits.max_rows)

    def _boundary(self, request: EngineRequest) -> int:
        """Tokens of the prompt that are kept as a prefix: all whole blocks before its last id."""
        if not self.model.limits.prefix_bytes:
            return 0
        return (len(request.prompt) - 1) // PAGE_QUANTUM * PAGE_QUANTUM

    def _keep_prefix(self, request: EngineRequest) -> None:
        n = self._boundary(request)
        if n and _cached(request).length == n:
            self.model.cache.keep_prefix(_cached(request), request.prompt[:n], request.prompt[n])

    def _admit(self) -> None:
        """Give slots to waiting requests, first come first served."""
        cache = self.model.cache
        while self._waiting and cache.num_free_slots:
            request = self._waiting[0]
            if request.cached is not None:
                if not self._try_restore(request):
                    return
            else:
                request.cached = cache.admit(request.prompt)
            slot = _cached(request).slot
            assert slot is not None
            token = request.tokens[-1] if request.tokens else 0
            self.stepper.table.set(slot, request.params, request.seed, token)
            self._waiting.popleft()
            self._running.append(request)

    def _try_restore(self, request: EngineRequest) -> bool:
        """Bring a request back once all could grow by a page: else it would soon be out again."""
        cache, cached = self.model.cache, _cached(request)
        assert cached.snapshot is not None
        demand = cache.demand([])
        spare = demand.free + demand.reclaimable - cached.snapshot.num_pages
        if self._running and spare <= len(self._running):
            return False
        cache.restore(cached)
        return True

    def _fitting(
        self, request: EngineRequest, n: int, batch: Sequence[tuple[EngineRequest, int]]
    ) -> tuple[EngineRequest, int] | None:
        """The pair, if its pages fit beside those of `batch`."""
        pair = request, n
        return pair if self._fits(_spans([*batch, pair])) else None

    def _fits(self, spans: Sequence[tuple[CachedRequest, int]]) -> bool:
        """Whether a step would get its pages; they are counted only where there are few."""
        cache = self.model.cache
        # of each request the pages that it begins, and a copy of a shared one
        most = sum(n // cache.schema.page_tokens + 2 for _, n in spans)
        return most <= cache.allocator.num_free or cache.demand(spans).fits

    # ---- decode

    def _decode(self) -> bool:
        """One more token for every request whose prompt is fed, or two where a draft is right."""
        each = self.stepper.rows_each
        while each > 1 and self._in_flight:
            self._collect()  # how many tokens count must be known before the next step
        ready = [r for r in self._running if r.num_sampled and r.wants_more]
        while ready and not self._fits(_spans([(r, each) for r in ready])):
            if self._in_flight:
                self._collect()  # somebody may have ended
            else:
                self._preempt_newest()
            ready = [r for r in ready if r in self._running and r.wants_more]
        if not ready:
            return False
        num_rows = each * self.stepper.padded(len(ready))
        step = self.model.prepare(_spans([(r, each) for r in ready]), num_rows)
        is_filtered = any(_has_filter(r.params) for r in ready)

        with self._all_or_none(step, ready):
            pending = self.stepper.decode(step, len(ready), is_filtered)
            accepted = pending.wait() if each > 1 else None
        if accepted is None:
            step.commit()
            self._queue(ready, pending)
        else:
            first, second, counts = accepted
            step.commit(counts)
            self._take_accepted(ready, zip(first, second, strict=True), counts)
        return True

    def _take_accepted(
        self, requests: Sequence[EngineRequest], tokens: Iterable[tuple[int, int]],
        counts: Sequence[int],
    ) -> None:  # fmt: skip
        for request, pair, count in zip(requests, tokens, counts, strict=True):
            request.num_sampled += count
            for token in pair[:count]:
                if not request.is_finished:
                    request.take(token)
                    self._known.append((request, token))
            if request.is_finished:
                self._drop(request)

    def _preempt_newest(self) -> None:
        """Let the request that came last wait on the host. Its tokens are all known."""
        assert not self._in_flight
        assert len(self._running) > 1, "a request that is alone always fits"
        newest = self._running.pop()
        self.model.cache.preempt(_cached(newest))
        self.num_preemptions += 1
        self._waiting.appendleft(newest)

    @contextmanager
    def _all_or_none(self, step: Step, requests: Sequence[EngineRequest]) -> Iterator[None]:
        """End the requests of a step that fails: their rings may be half written."""
        try:
            yield
        except BaseException:
            step.abort()
            for request in requests:
                request.finish_reason = "error"
                self._drop(request)
            raise

    def _queue(self, requests: list[EngineRequest], pending: Pending) -> None:
        for request in requests:
            request.num_sampled += 1
        self._in_flight.append((requests, pending))


def _cached(request: EngineRequest) -> CachedRequest:
    assert request.cached is not None
    return request.cached


def _spans(batch: Sequence[tuple[EngineRequest, int]]) -> list[tuple[CachedRequest, int]]:
    return [(_cached(request), n) for request, n in batch]


def _has_filter(params: SamplingParams) -> bool:
    return bool(not params.is_greedy and (params.top_k or params.top_p < 1 or params.min_p))
