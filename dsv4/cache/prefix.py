"""Prefixes that several requests share: snapshots at multiples of 128 tokens, found by content."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from dsv4.cache.snapshot import SlotCopy
from dsv4.core.errors import RequestError
from dsv4.core.kv_layout import PAGE_QUANTUM


@dataclass(frozen=True)
class PrefixEntry:
    """The state after `length` tokens, and the pages that hold their entries."""

    length: int
    slot: SlotCopy
    pages: tuple[int, ...]


class PrefixStore:
    """Snapshots by content, least recently used first.

    A key is the digest of the digest before and the next 128 token ids, so that equal keys mean
    equal prefixes. The store keeps bytes and page numbers; whoever calls it counts their owners.

    max_bytes    host memory for window rings and compressor states
    page_owners  how many snapshots hold each page
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._entries: OrderedDict[bytes, PrefixEntry] = OrderedDict()
        self.page_owners: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, token_ids: Sequence[int]) -> bool:
        """Whether exactly these tokens, a multiple of 128, have a snapshot."""
        return len(token_ids) % PAGE_QUANTUM == 0 and _last(token_ids) in self._entries

    def page_lists(self) -> list[tuple[int, ...]]:
        """The pages of each snapshot: every one of them is an owner."""
        return [entry.pages for entry in self._entries.values()]

    def find(self, token_ids: Sequence[int]) -> PrefixEntry | None:
        """The longest snapshot of a proper prefix: at least one token is left to compute."""
        best = None
        for length, key in _keys(token_ids) if self._entries else ():
            if length < len(token_ids) and key in self._entries:
                best = key
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best]

    def add(self, token_ids: Sequence[int], entry: PrefixEntry) -> list[PrefixEntry]:
        """Keep `entry` for exactly these tokens; return the entries that had to go for it.

        An entry larger than the store comes back at once.
        """
        if entry.slot.nbytes > self.max_bytes:
            return [entry]
        self._entries[_last(token_ids)] = entry
        self.page_owners.update(entry.pages)
        self.nbytes += entry.slot.nbytes
        gone = []
        while self.nbytes > self.max_bytes:
            gone.append(self.evict())
        return gone

    def evict(self) -> PrefixEntry:
        """Drop the least recently used snapshot and return it."""
        _, entry = self._entries.popitem(last=False)
        self.nbytes -= entry.slot.nbytes
        self.page_owners.subtract(entry.pages)
        self.page_owners += Counter()  # forgets pages without an owner
        return entry


def _keys(token_ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """(length, digest) of every prefix of whole blocks, shortest first."""
    digest = b""
    for end in range(PAGE_QUANTUM, len(token_ids) + 1, PAGE_QUANTUM):
        try:
            block = array("q", token_ids[end - PAGE_QUANTUM : end])
        except (TypeError, OverflowError) as e:
            raise RequestError("token_ids", "integers below 2^63", str(e)) from e
        digest = sha256(digest + block.tobytes()).digest()
        yield end, digest


def _last(token_ids: Sequence[int]) -> bytes:
    return max(_keys(token_ids))[1]
