"""Opt-in debugging of the cache: a tag beside every row, poison on free, no read before a write.

A tag is a hash of all tokens of a request up to the row's last one. Tags lie in the cache's own
allocations, so forks, copies on write, preemption and prefixes carry them along with the bytes
they stand for. Before a step, every row that a request is about to read must carry its tag.

Whoever runs the steps calls `check` and `wrote`: tags follow the bookkeeping of slots and pages,
not what kernels did with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.cache.schema import TAG_TOKENS
from dsv4.cache.storage import CacheStorage

POISON = 0xFF  # NaN in E4M3, in UE8M0 and, four of them, in FP32; -1 as a tag: never written
_PRIME, _FACTOR = (1 << 61) - 1, 0x5DEECE66D


class CacheCorruptionError(AssertionError):
    """A row that a request is about to read was not written by the request's own tokens."""


def history_tags(token_ids: Sequence[int]) -> list[int]:
    """Tag of each position: a polynomial hash, modulo 2^61 - 1, of the tokens up to it."""
    tags, tag = [], 0
    for token in token_ids:
        tag = (tag * _FACTOR + token + 1) % _PRIME
        tags.append(tag)
    return tags


class Canary:
    """The tags of one CacheStorage whose schema was laid out with `canary=True`."""

    def __init__(self, storage: CacheStorage) -> None:
        if storage.ring_tags is None or storage.entry_tags is None:
            raise ValueError("storage: expected a schema laid out with canary=True")
        self.storage = storage
        self._ring, self._entries = storage.ring_tags, storage.entry_tags
        self._ring.fill_(-1)
        self._entries.fill_(-1)

    def wrote(self, slot: int, pages: Sequence[int], token_ids: Sequence[int], start: int) -> None:
        """Tag the rows of tokens `start` .. len(token_ids) - 1, which a step just wrote."""
        tags = torch.tensor(history_tags(token_ids), dtype=torch.int64)
        ring, entries = self._rows_of(slot, pages, range(start, len(token_ids)))
        W = self.storage.schema.config.sliding_window
        kept = range(max(start, len(token_ids) - W), len(token_ids))
        self._ring[slot, [p % W for p in kept]] = tags[kept.start : kept.stop].to(ring.device)
        done = [p for p in range(start, len(token_ids)) if (p + 1) % TAG_TOKENS == 0]
        self._entries[entries[0], entries[1]] = tags[done].to(self._entries.device)

    def check(self, slot: int, pages: Sequence[int], token_ids: Sequence[int]) -> None:
        """Raise CacheCorruptionError unless all the next token reads belongs to `token_ids`."""
        n, W = len(token_ids), self.storage.schema.config.sliding_window
        tags = history_tags(token_ids)
        seen = range(max(n - W + 1, 0), n)
        ring, _ = self._rows_of(slot, pages, seen)
        self._compare(ring.tolist(), tags, seen, f"slot {slot}")
        _, (page, row) = self._rows_of(slot, pages, range(n))
        done = [p for p in range(n) if (p + 1) % TAG_TOKENS == 0]
        self._compare(self._entries[page, row].tolist(), tags, done, f"pages {list(pages)}")

    def _rows_of(
        self, slot: int, pages: Sequence[int], positions: range
    ) -> tuple[Tensor, tuple[list[int], list[int]]]:
        """Tags of ring rows, and (page, row) of the finished groups of these positions."""
        W, P = self.storage.schema.config.sliding_window, self.storage.schema.page_tokens
        ring = self._ring[slot, [p % W for p in positions]]
        done = [p for p in positions if (p + 1) % TAG_TOKENS == 0]
        return ring, ([pages[p // P] for p in done], [p % P // TAG_TOKENS for p in done])

    @staticmethod
    def _compare(
        got: Sequence[int], tags: Sequence[int], positions: Sequence[int], where: str
    ) -> None:
        for tag, position in zip(got, positions, strict=True):
            if tag == -1:
                raise CacheCorruptionError(f"{where}: token {position} is read unwritten")
            if tag != tags[position]:
                raise CacheCorruptionError(f"{where}: token {position} is of another history")

    def poison_slot(self, slot: int) -> None:
        """Overwrite a freed slot, tags included."""
        self.storage.fill_slot(slot, POISON)

    def poison(self, pages: Sequence[int]) -> None:
        """Overwrite freed pages, tags included, with a byte that no valid read can overlook."""
        if pages:
            self.storage.fill_pages(pages, POISON)
