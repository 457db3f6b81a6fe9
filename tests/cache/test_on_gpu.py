"""A captured graph over the life of a cache; a prepare that neither allocates nor waits."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.cache.manager import CacheManager
from dsv4.cache.request import CachedRequest, Step
from dsv4.cache.schema import CacheSchema
from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.ops import cache as ops
from support.cache_history import History
from support.cache_life import small_manager

pytestmark = pytest.mark.gpu

ROWS = 8  # of the captured step


class Replay:
    """The cache ops: run and captured the first time, replayed on new inputs from then on."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.next = self.replays = 0

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name)

    def _call(self, name: str, *args: Any) -> None:
        if self.graph is None:
            self.calls.append((name, args))
            return
        captured, old = self.calls[self.next]
        assert captured == name
        self.next += 1
        for into, x in zip(old, args, strict=True):
            if isinstance(x, Tensor) and x.data_ptr() != into.data_ptr():
                into.copy_(x)

    def finish(self) -> None:
        if self.graph is not None:
            assert self.next == len(self.calls)
            self.graph.replay()
            self.next, self.replays = 0, self.replays + 1
            return
        for name, args in self.calls:
            getattr(ops, name)(*args)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for name, args in self.calls:
                getattr(ops, name)(*args)


class GraphHistory(History):
    """Steps of up to ROWS tokens go through one graph, longer ones (prompts) do not."""

    def __init__(self, manager: CacheManager, seed: int, replay: Replay | None) -> None:
        super().__init__(manager, seed, ops)
        self.replay = replay

    def num_new_tokens(self, request: CachedRequest) -> int:
        return self.rng.choice([0, 1, 1, 1, 1, 2, 2, 3, 128 - request.length % 128])

    def num_rows(self, num_tokens: int) -> int:
        return max(ROWS, num_tokens)

    def after_step(self, step: Step, accepted: list[int]) -> None:
        is_small = self.replay is not None and len(step.rows.slot) == ROWS
        self.writes = self.replay if is_small else ops
        super().after_step(step, accepted)
        if is_small:
            self.replay.finish()


@pytest.mark.parametrize("index_keys", ["fp8", "mxfp4"])
@pytest.mark.parametrize("page_tokens", [128, 256])
def test_a_graph_replays_while_requests_pages_and_padding_change(
    page_tokens: int, index_keys: Any
) -> None:
    """As many bits as the same life written eagerly, and as the contiguous cache."""
    lives = []
    for replay in (Replay(), None):
        m = small_manager(
            page_tokens, num_pages=1536 // page_tokens, device="cuda", index_keys=index_keys
        )
        life = GraphHistory(m, 18, replay)
        tables = set()
        for k in range(400):
            life.one()
            m.check()
            tables.add(m.buffers.table.tobytes())
            if k % 50 == 49:
                life.compare_all()
        assert len(tables) > 40
        for name in ("fork", "preempt", "restore", "release", "prefix hit", "draft rejected"):
            assert life.done[name] + life.events[name] > 0, name
        lives.append((life, m))
    (first, graphed), (_, eager) = lives
    assert first.replay.replays > 60
    assert torch.equal(graphed.storage.states, eager.storage.states)
    assert torch.equal(graphed.storage.pages, eager.storage.pages)
    assert torch.equal(graphed.page_table, eager.page_table)


def test_prepare_neither_allocates_nor_waits() -> None:
    m = small_manager(128, num_pages=40, device="cuda")
    requests = [m.admit() for _ in range(4)]
    m.prepare([(r, 100) for r in requests]).commit()  # the first fork copies on write below
    m.release(requests.pop())
    requests.append(m.fork(requests[0]))
    m.prepare([(requests[1], 1)], 8).commit()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(60):
            m.prepare([(r, 1) for r in requests], 8).commit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert len({tuple(r.pages) for r in requests}) == 4


def test_the_host_may_run_ahead_of_the_device() -> None:
    """Two steps are prepared while the device is busy; the third waits, not to spoil one."""
    m = small_manager(128, num_pages=40, device="cuda")
    r = m.admit()
    m.prepare([(r, 1)], 4).commit()
    torch.cuda.synchronize()
    seen, took = [], []
    torch.cuda._sleep(400_000_000)  # some 0.2 s
    for _ in range(5):
        started = time.perf_counter()
        step = m.prepare([(r, 127)], 128)
        took.append(time.perf_counter() - started)
        seen.append((step.rows.position.clone(), step.page_table.clone(), r.length, len(r.pages)))
        step.commit()
    torch.cuda.synchronize()
    assert max(took[:2]) < 0.05
    assert max(took[2:]) > 0.05
    for position, table, length, pages in seen:
        assert position[:127].tolist() == list(range(length, length + 127))
        assert int((table > 0).sum()) == pages


def test_moving_a_request_of_flash() -> None:
    """Fork, preemption and restoring at the sizes of Flash: bytes, and the time of each."""
    config = ModelConfig.flash()
    schema = CacheSchema.of(config, num_pages=140, num_slots=3)
    storage = CacheStorage(schema, "cuda")
    m = CacheManager(storage, max_context=1 << 14, prefix_bytes=1 << 30)
    for group in (*storage.slot_groups(), *storage.page_groups()):
        group.random_(0, 256)

    def content(r: CachedRequest) -> list[Tensor]:
        slots = [g[:, r.slot].clone() for g in storage.slot_groups()]
        return slots + [g[:, r.pages].clone() for g in storage.page_groups()]

    def us(name: str, call: Any) -> Any:
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = call()
        host = time.perf_counter() - started
        torch.cuda.synchronize()
        print(f"{name}: host {1e6 * host:.0f} us, done {1e6 * (time.perf_counter() - started):.0f}")
        return result

    r = m.admit()
    for chunk in (8192, 8192 - 100):
        m.prepare([(r, chunk)]).commit()
    want = content(r)
    for _ in range(2):  # the first time takes pinned memory
        us("preempt 16K tokens", lambda: m.preempt(r))
        for group in (*storage.slot_groups(), *storage.page_groups()):
            group.fill_(3)
        us("restore 16K tokens", lambda: m.restore(r))
        m.check()
        assert all(torch.equal(a, b) for a, b in zip(content(r), want, strict=True))
        child = us("fork", lambda: m.fork(r))
        assert all(torch.equal(a, b) for a, b in zip(content(child), want, strict=True))
        us("copy on write", lambda c=child: m.prepare([(c, 1)], 1).commit())
        m.release(child)
