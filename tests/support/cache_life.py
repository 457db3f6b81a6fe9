"""Random lives of requests in a small cache, checked after every operation."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from dsv4.cache.manager import CacheManager
from dsv4.cache.request import CachedRequest, PageDemand, Step
from dsv4.cache.schema import CacheSchema
from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.core.errors import CapacityError
from dsv4.core.kv_layout import IndexKeys
from dsv4.testing.tiny import tiny_config

DRAFTS = 5  # most tokens of a step that verification may reject
OPERATIONS = ("admit", "step", "step", "step", "fork", "preempt", "restore", "release", "keep")


def small_config() -> ModelConfig:
    """One layer of each kind and rows of a few bytes, so that host code is what is timed."""
    return replace(
        tiny_config(),
        num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=0,
        num_nextn_predict_layers=1, head_dim=128, qk_rope_head_dim=64, index_head_dim=64,
        sliding_window=16, max_position_embeddings=2048,
    )  # fmt: skip


def small_manager(
    page_tokens: int = 128, num_pages: int = 12, num_slots: int = 4, canary: bool = False,
    device: str = "cpu", index_keys: IndexKeys = "fp8",
) -> CacheManager:  # fmt: skip
    schema = CacheSchema.of(
        small_config(), num_pages=num_pages, num_slots=num_slots, page_tokens=page_tokens,
        canary=canary, index_keys=index_keys,
    )  # fmt: skip
    return CacheManager(CacheStorage(schema, device), prefix_bytes=300_000, canary=canary)


class Life:
    """Draws operations, keeps the token history of every request, counts what was refused.

    tokens    of each request, as many as it has cached
    upcoming  the token after them: sampled, not cached yet
    """

    def __init__(self, manager: CacheManager, seed: int) -> None:
        self.manager, self.rng = manager, random.Random(seed)
        self.tokens: dict[int, list[int]] = {}
        self.upcoming: dict[int, int] = {}
        self.done: Counter[str] = Counter()

    def run(self, operations: int) -> None:
        for _ in range(operations):
            self.one()
            self.manager.check()

    def one(self) -> None:
        name = self.rng.choice(OPERATIONS)
        try:
            if getattr(self, name)():
                self.done[name] += 1
        except CapacityError:
            self.done[f"{name} refused"] += 1

    def _pick(self, resident: bool) -> CachedRequest | None:
        some = [r for r in self.manager.requests if r.is_resident is resident]
        return self.rng.choice(some) if some else None

    def _history(self, n: int) -> list[int]:
        """Few different histories, so that prefixes are found."""
        first = self.rng.choice([1, 2])
        return [first] * n

    def admit(self) -> bool:
        tokens = self._history(self.rng.choice([0, 1, 129, 257, 300]))
        request = self.manager.admit(tokens)
        self.tokens[request.number] = tokens[: request.length]
        rest = tokens[request.length :]
        self.upcoming[request.number] = rest[0] if rest else self.rng.choice([1, 2])
        self.done["prefix hit"] += request.length > 0
        return True

    def step(self) -> bool:
        resident = [r for r in self.manager.requests if r.is_resident]
        if not resident:
            return False
        chosen = self.rng.sample(resident, self.rng.randint(1, len(resident)))
        batch = []
        for r in chosen:
            n = self.num_new_tokens(r)
            batch.append((r, min(n, self.manager.max_context - r.length)))
        canary = self.manager.canary
        if canary is not None:
            for r, _ in batch:
                canary.check(r.slot, r.pages, self.tokens[r.number])
        demand = self.manager.demand(batch)
        step = self.prepare(batch, demand)
        if self.rng.random() < 0.15:
            self.manager.check()
            step.abort()
            self.done["abort"] += 1
            return True
        accepted = [self._draw(r, n) for r, n in batch]
        self.after_step(step, accepted)
        for (r, _), a in zip(batch, accepted, strict=True):
            del self.tokens[r.number][r.length + a :]
            if canary is not None:
                canary.wrote(r.slot, r.pages, self.tokens[r.number], r.length)
        is_all = all(a == n for (_, n), a in zip(batch, accepted, strict=True))
        step.commit(None if is_all else accepted)
        self.done["draft rejected"] += not is_all
        return True

    def num_new_tokens(self, request: CachedRequest) -> int:
        return self.rng.choice([0, 1, 1, 3, 64, 128 - request.length % 128])

    def num_rows(self, num_tokens: int) -> int:
        return num_tokens + self.rng.choice([0, 0, 3])

    def prepare(self, batch: list[tuple[CachedRequest, int]], demand: PageDemand) -> Step:
        """`prepare`, which must do what `demand` foretold (it may be refused for other reasons)."""
        kept = len(self.manager.prefixes)
        step = self.manager.prepare(batch, self.num_rows(sum(n for _, n in batch)))
        assert demand.fits
        assert (len(self.manager.prefixes) < kept) == (demand.needed > demand.free)
        return step

    def _draw(self, r: CachedRequest, n: int) -> int:
        """Give a request `n` new tokens, the last of them drafts; how many are accepted."""
        own = self.tokens[r.number]
        first = own[0] if own else self.upcoming[r.number]
        odd = self.rng.random() < 0.2
        drawn = [self.rng.randrange(9) if odd else first for _ in range(n)]
        self.tokens[r.number] = own + [self.upcoming[r.number], *drawn][:n]
        if n:
            self.upcoming[r.number] = drawn[-1]
        accepted = n
        if n > 1 and self.rng.random() < 0.3:
            accepted = n - self.rng.randint(1, min(DRAFTS, n - 1))
            self.upcoming[r.number] = self.rng.randrange(9)
        return accepted

    def after_step(self, step: Step, accepted: list[int]) -> None:
        """What the model would write between `prepare` and `commit`."""

    def fork(self) -> bool:
        request = self._pick(resident=True)
        if request is None:
            return False
        child = self.manager.fork(request)
        self.tokens[child.number] = list(self.tokens[request.number])
        self.upcoming[child.number] = self.upcoming[request.number]
        return True

    def preempt(self) -> bool:
        request = self._pick(resident=True)
        if request is None:
            return False
        self.manager.preempt(request)
        return True

    def restore(self) -> bool:
        request = self._pick(resident=False)
        if request is None:
            return False
        self.manager.restore(request)
        return True

    def release(self) -> bool:
        request = self._pick(resident=self.rng.random() < 0.8)
        if request is None:
            return False
        self.manager.release(request)
        del self.tokens[request.number], self.upcoming[request.number]
        return True

    def keep(self) -> bool:
        request = self._pick(resident=True)
        if request is None or not request.length or request.length % 128:
            return False
        number = request.number
        return self.manager.keep_prefix(request, self.tokens[number], self.upcoming[number])
