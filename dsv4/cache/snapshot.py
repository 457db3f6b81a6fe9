"""What a request keeps, copied to host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsv4.cache.storage import CacheStorage


@dataclass(frozen=True)
class SlotCopy:
    """The bytes of one slot on the host: window rings and compressor states of every layer.

    rows         one [stride] uint8 tensor for each region
    at_boundary  taken after a multiple of 128 tokens, without the closed windows of HCA
    """

    rows: tuple[Tensor, ...]
    at_boundary: bool = False

    @classmethod
    def take(cls, storage: CacheStorage, slot: int, at_boundary: bool = False) -> SlotCopy:
        """Copy a slot from the device."""
        views = storage.slot_views(at_boundary)
        return cls(tuple(view[slot].to("cpu", copy=True) for view in views), at_boundary)

    def put(self, storage: CacheStorage, slot: int) -> None:
        """Make `slot` what the copied one was."""
        storage.reset_slot(slot)
        for view, row in zip(storage.slot_views(self.at_boundary), self.rows, strict=True):
            view[slot] = row.to(view.device)

    @property
    def nbytes(self) -> int:
        """Host bytes held."""
        return sum(row.numel() for row in self.rows)


@dataclass(frozen=True)
class Snapshot:
    """A preempted request: its slot, and its pages [n, stride] of each region in token order."""

    slot: SlotCopy
    pages: tuple[Tensor, ...]
    num_pages: int

    @classmethod
    def take(cls, storage: CacheStorage, slot: int, pages: Sequence[int]) -> Snapshot:
        """Copy a slot and `pages` from the device."""
        data = tuple(view[list(pages)].to("cpu", copy=True) for view in storage.page_views())
        return cls(SlotCopy.take(storage, slot), data, len(pages))

    def put(self, storage: CacheStorage, slot: int, pages: Sequence[int]) -> None:
        """Copy everything back, to another slot and other pages."""
        self.slot.put(storage, slot)
        for view, data in zip(storage.page_views(), self.pages, strict=True):
            view[list(pages)] = data.to(view.device)
