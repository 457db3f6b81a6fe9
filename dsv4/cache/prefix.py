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
    """The state after `length` tokens, the pages that hold their entries, their digest."""

    length: int
    slot: SlotCopy
    pages: tuple[int, ...]
    digest: bytes


class PrefixStore:
    """Snapshots by content, least recently used first.

    A digest is that of the digest before and the next 128 token ids, so that equal digests mean
    equal prefixes. The store keeps bytes and page numbers; whoever calls it counts their owners.

    max_bytes        host memory for window rings and compressor states
    with_next_token  whether a key is the digest and the token after the prefix: what MTP blocks
                     keep of a prefix depends on it
    page_owners      how many snapshots hold each page
    """

    def __init__(self, max_bytes: int, with_next_token: bool = False) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self.with_next_token = with_next_token
        self._entries: OrderedDict[bytes, PrefixEntry] = OrderedDict()
        self.page_owners: Counter[int] = Counter()
        self._ends: dict[int, dict[bytes, None]] = {}  # by last page, in the order of `add`

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def __getitem__(self, key: bytes) -> PrefixEntry:
        """The snapshot of this key."""
        return self._entries[key]

    def __contains__(self, key: bytes) -> bool:
        """Whether there is a snapshot of this key."""
        return key in self._entries

    def key(self, digest: bytes, next_token: int | None) -> bytes:
        """What the snapshot of a prefix is found by.

        Raises RequestError where the next token matters and is not given.
        """
        if not self.with_next_token:
            return digest
        if next_token is None:
            raise RequestError(
                "next_token", "the token after the prefix", None,
                "the MTP blocks of this model made the last row of their windows with it",
            )  # fmt: skip
        return digest + _bytes([next_token])

    def page_lists(self) -> list[tuple[int, ...]]:
        """The pages of each snapshot: every one of them is an owner."""
        return [entry.pages for entry in self._entries.values()]

    def find(self, token_ids: Sequence[int]) -> tuple[bytes, ...]:
        """Keys of all snapshots of proper prefixes, shortest first; they are used now.

        Proper: at least one token is left to compute.
        """
        found = []
        for length, digest in _digests((0, b""), token_ids) if self._entries else ():
            if length < len(token_ids):
                key = self.key(digest, token_ids[length])
                found += [key] if key in self._entries else []
        self.touch(found)
        return tuple(found)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Make those of `keys` that are kept the most recently used, the first of them the last.

        keys  of one chain, shortest first: then a snapshot is older than those it goes on from
        """
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    def add(self, key: bytes, entry: PrefixEntry) -> list[PrefixEntry]:
        """Keep `entry`; return the least recently used entries, which had to go for it.

        An entry larger than the store comes back at once.
        """
        if entry.slot.nbytes > self.max_bytes:
            return [entry]
        gone = []
        while self.nbytes + entry.slot.nbytes > self.max_bytes:
            gone.append(self.evict())
        self._entries[key] = entry
        self._ends.setdefault(entry.pages[-1], {})[key] = None
        self.page_owners.update(entry.pages)
        self.nbytes += entry.slot.nbytes
        return gone

    def evict(self) -> PrefixEntry:
        """Drop the least recently used snapshot and return it."""
        return self._remove(next(iter(self._entries)))

    def ends(self) -> Iterator[tuple[int, int]]:
        """(page, number of snapshots whose last page it is), least recently used first.

        Whoever owns a page owns those before it too: only once the last page of a snapshot would
        be free can dropping it free any. Snapshots may be dropped meanwhile.
        """
        for key in list(self._entries):
            if key in self._entries:
                page = self._entries[key].pages[-1]
                yield page, len(self._ends[page])

    def drop(self, page: int) -> list[PrefixEntry]:
        """Drop the snapshots whose last page is `page` and return them."""
        return [self._remove(key) for key in list(self._ends[page])]

    def _remove(self, key: bytes) -> PrefixEntry:
        entry = self._entries.pop(key)
        self.nbytes -= entry.slot.nbytes
        for page in entry.pages:
            self.page_owners[page] -= 1
            if not self.page_owners[page]:
                del self.page_owners[page]
        last = entry.pages[-1]
        del self._ends[last][key]
        if not self._ends[last]:
            del self._ends[last]
        return entry


def extend_chain(chain: tuple[int, bytes], token_ids: Sequence[int]) -> tuple[int, bytes]:
    """(length, digest) of all whole blocks of `token_ids`, of which the first are in `chain`."""
    return max([chain, *_digests(chain, token_ids)])


def _digests(chain: tuple[int, bytes], token_ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """(length, digest) of every prefix of whole blocks beyond `chain`, shortest first."""
    start, digest = chain
    for end in range(start + PAGE_QUANTUM, len(token_ids) + 1, PAGE_QUANTUM):
        digest = sha256(digest + _bytes(token_ids[end - PAGE_QUANTUM : end])).digest()
        yield end, digest


def _bytes(token_ids: Sequence[int]) -> bytes:
    try:
        return array("q", token_ids).tobytes()
    except (TypeError, OverflowError) as e:
        raise RequestError("token_ids", "integers below 2^63", str(e)) from e
