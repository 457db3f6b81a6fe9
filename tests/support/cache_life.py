"""Random lives of requests in a small cache, checked after every operation."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from dsv4.cache.manager import CachedRequest, CacheManager
from dsv4.cache.schema import CacheSchema
from dsv4.cache.step import StepRows
from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.core.errors import CapacityError
from dsv4.core.kv_layout import IndexKeys
from dsv4.testing.tiny import tiny_config

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
    """Draws operations, keeps the token history of every request, counts what was refused."""

    def __init__(self, manager: CacheManager, seed: int) -> None:
        self.manager, self.rng = manager, random.Random(seed)
        self.tokens: dict[int, list[int]] = {}
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
        self.done["prefix hit"] += request.length > 0
        return True

    def step(self) -> bool:
        resident = [r for r in self.manager.requests if r.is_resident]
        if not resident:
            return False
        chosen = self.rng.sample(resident, self.rng.randint(1, len(resident)))
        batch = []
        for r in chosen:
            n = self.rng.choice([0, 1, 1, 3, 64, 128 - r.length % 128])
            batch.append((r, min(n, self.manager.max_context - r.length)))
        canary = self.manager.canary
        if canary is not None:
            for r, _ in batch:
                canary.check(r.slot, r.pages, self.tokens[r.number])
        padding = self.rng.choice([0, 0, 3])
        step = self.manager.prepare(batch, sum(n for _, n in batch) + padding)
        if self.rng.random() < 0.15:
            self.manager.check()
            step.abort()
            self.done["abort"] += 1
            return True
        for r, n in batch:
            own = self.tokens[r.number]
            first = own[0] if own else self.rng.choice([1, 2])
            odd = self.rng.random() < 0.2
            self.tokens[r.number] = own + [
                self.rng.randrange(9) if odd else first for _ in range(n)
            ]
            if canary is not None:
                canary.wrote(r.slot, r.pages, self.tokens[r.number], r.length)
        self.after_step(batch, step.rows)
        step.commit()
        return True

    def after_step(self, batch: list[tuple[CachedRequest, int]], rows: StepRows) -> None:
        """What the model would write between `prepare` and `commit`."""

    def fork(self) -> bool:
        request = self._pick(resident=True)
        if request is None:
            return False
        child = self.manager.fork(request)
        self.tokens[child.number] = list(self.tokens[request.number])
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
        del self.tokens[request.number]
        return True

    def keep(self) -> bool:
        request = self._pick(resident=True)
        if request is None or not request.length or request.length % 128:
            return False
        return self.manager.keep_prefix(request, self.tokens[request.number])
