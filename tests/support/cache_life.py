"""Random lives of requests in a small cache, checked after every operation."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from dsv4.cache.manager import CacheManager
from dsv4.cache.request import CachedRequest, Step
from dsv4.cache.schema import CacheSchema
from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.core.errors import CapacityError
from dsv4.core.kv_layout import IndexKeys
from dsv4.testing.tiny import tiny_config

DRAFTS = 5  # most tokens of a step that verification may reject
OPERATIONS = (
    *["admit"] * 4, *["step"] * 5, "fork", "preempt", "restore", "restore", *["release"] * 3,
    *["keep"] * 4,
)  # fmt: skip
LONG = 2200  # tokens of a text, more than any request has
Batch = list[tuple[CachedRequest, int]]


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
    device: str = "cpu", index_keys: IndexKeys = "fp8", prefix_bytes: int = 300_000,
) -> CacheManager:  # fmt: skip
    schema = CacheSchema.of(
        small_config(), num_pages=num_pages, num_slots=num_slots, page_tokens=page_tokens,
        canary=canary, index_keys=index_keys,
    )  # fmt: skip
    return CacheManager(CacheStorage(schema, device), prefix_bytes=prefix_bytes, canary=canary)


class Life:
    """Draws operations, keeps the token history of every request, counts what was refused.

    texts     what requests are about: few, so that kept prefixes are found
    about     text of each request; it may stray from it
    tokens    of each request, as many as it has cached
    upcoming  the token after them: sampled, not cached yet
    done      operations that succeeded, by name
    events    "... refused" for want of room, and what else came to pass
    """

    def __init__(self, manager: CacheManager, seed: int) -> None:
        self.manager, self.rng = manager, random.Random(seed)
        self.texts = [[1] * LONG, [2] * LONG]
        self.about: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.upcoming: dict[int, int] = {}
        self.done: Counter[str] = Counter()
        self.events: Counter[str] = Counter()

    @property
    def succeeded(self) -> int:
        """Operations that were not refused."""
        return sum(self.done.values())

    def run(self, operations: int) -> None:
        for _ in range(operations):
            self.one()
            self.manager.check()

    def one(self) -> None:
        """One operation; another is drawn while there is no request for it."""
        kept, name = set(self.manager.prefixes), self.rng.choice(OPERATIONS)
        try:
            while not getattr(self, name)():
                name = self.rng.choice(OPERATIONS)
            self.done[name] += 1
        except CapacityError:
            self.events[f"{name} refused"] += 1
        self.events["prefix dropped"] += not kept <= set(self.manager.prefixes)

    def _pick(self, resident: bool) -> CachedRequest | None:
        some = [r for r in self.manager.requests if r.is_resident is resident]
        return self.rng.choice(some) if some else None

    def admit(self) -> bool:
        about = self.rng.randrange(len(self.texts))
        tokens = self.texts[about][: self.rng.choice([0, 1, 129, 257, 300, 400])]
        request = self.manager.admit(tokens)
        self.about[request.number] = about
        self.tokens[request.number] = tokens[: request.length]
        self.upcoming[request.number] = self.texts[about][request.length]
        self.events["prefix hit"] += request.length > 0
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
        step = self.prepare(batch)
        gone = [self.rng.choice(batch)[0]] if self.rng.random() < 0.05 else []
        for r in gone:  # the step goes on writing its rows
            self.manager.release(r)
            assert r.is_resident
            self.events["released in a step"] += 1
        self.manager.check()
        if self.rng.random() < 0.1:
            step.abort()
            self.events["abort"] += 1
        else:
            self._run(step, batch)
        for r in gone:
            assert not r.is_resident
            self._forget(r)
        return True

    def _run(self, step: Step, batch: Batch) -> None:
        accepted = [self._draw(r, n) for r, n in batch]
        self.after_step(step, accepted)
        for (r, _), a in zip(batch, accepted, strict=True):
            del self.tokens[r.number][r.length + a :]
            if (canary := self.manager.canary) is not None:
                canary.wrote(r.slot, r.pages, self.tokens[r.number], r.length)
        is_all = all(a == n for (_, n), a in zip(batch, accepted, strict=True))
        step.commit(None if is_all else accepted)
        self.events["draft rejected"] += not is_all

    def _forget(self, r: CachedRequest) -> None:
        del self.tokens[r.number], self.upcoming[r.number], self.about[r.number]

    def num_new_tokens(self, request: CachedRequest) -> int:
        to_boundary = 128 - request.length % 128
        return self.rng.choice([0, 1, 1, 3, 64, to_boundary, to_boundary])

    def num_rows(self, num_tokens: int) -> int:
        return num_tokens + self.rng.choice([0, 0, 3])

    def prepare(self, batch: Batch) -> Step:
        """`prepare`, which must do what `demand` foretold (it may be refused for other reasons)."""
        demand, kept = self.manager.demand(batch), len(self.manager.prefixes)
        before = [list(r.pages) for r, _ in batch]
        step = self.manager.prepare(batch, self.num_rows(sum(n for _, n in batch)))
        assert demand.fits
        assert (len(self.manager.prefixes) < kept) == (demand.needed > demand.free)
        for (r, _), pages in zip(batch, before, strict=True):
            self.events["copy on write"] += r.pages[: len(pages)] != pages
        return step

    def _draw(self, r: CachedRequest, n: int) -> int:
        """Give a request `n` new tokens, the last of them drafts; how many are accepted.

        A request goes on with its text, unless it strays; drafts that are rejected are not of it.
        """
        own, text, is_odd = self.tokens[r.number], self.texts[self.about[r.number]], False
        if self.rng.random() < 0.1:
            is_odd = True
            self.events["stray"] += n > 0
        accepted = n
        if n > 1 and self.rng.random() < 0.3:
            accepted = n - self.rng.randint(1, min(DRAFTS, n - 1))
        after = [
            self.rng.randrange(9) if is_odd or k >= accepted else text[len(own) + 1 + k]
            for k in range(n)
        ]  # the token after each new one
        if accepted:
            self.tokens[r.number] = own + [self.upcoming[r.number], *after][:n]
            self.upcoming[r.number] = text[len(own) + accepted] if not is_odd else after[-1]
        return accepted

    def after_step(self, step: Step, accepted: list[int]) -> None:
        """What the model would write between `prepare` and `commit`."""

    def fork(self) -> bool:
        """A child with the parent's next token, or one that computes its last token again."""
        request = self._pick(resident=True)
        if request is None:
            return False
        again = request.length > request.oldest and self.rng.random() < 0.5
        child = self.manager.fork(request, again=again)
        self.tokens[child.number] = self.tokens[request.number][: child.length]
        self.about[child.number] = self.about[request.number]
        own, upcoming = self.tokens[request.number], self.upcoming[request.number]
        self.upcoming[child.number] = own[-1] if again else upcoming
        self.events["fork again"] += again
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
        self._forget(request)
        return True

    def keep(self) -> bool:
        some = [r for r in self.manager.requests if r.is_resident and r.length]
        some = [r for r in some if r.length % 128 == 0]
        if not some:
            return False
        number = (request := self.rng.choice(some)).number
        self.manager.keep_prefix(request, self.tokens[number], self.upcoming[number])
        return True
