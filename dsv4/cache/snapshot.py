"""What a request keeps, copied to host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.storage import CacheStorage

PAGES_AT_ONCE = 32  # bounds the device memory that gathering pages takes


@dataclass(frozen=True)
class SlotCopy:
    """The bytes of one slot on the host: window rings and compressor states of every layer.

    rows         [layers, stride] uint8, one tensor a kind of store
    at_boundary  taken after a multiple of 128 tokens, without the closed windows of HCA

    Copies from and to a GPU are asynchronous, on the current stream and in pinned memory: only
    later work of that stream may read them.
    """

    rows: tuple[Tensor, ...]
    at_boundary: bool = False

    @classmethod
    def take(cls, storage: CacheStorage, slot: int, at_boundary: bool = False) -> SlotCopy:
        """Copy a slot from the device."""
        groups = storage.slot_groups(at_boundary)
        return cls(tuple(_to_host(group[:, slot]) for group in groups), at_boundary)

    def put(self, storage: CacheStorage, slot: int) -> None:
        """Make `slot` what the copied one was."""
        if self.at_boundary:
            storage.reset_slot(slot)
        for group, rows in zip(storage.slot_groups(self.at_boundary), self.rows, strict=True):
            group[:, slot] = rows.to(group.device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Host bytes held."""
        return sum(rows.numel() for rows in self.rows)


@dataclass(frozen=True)
class Snapshot:
    """A preempted request: its slot and its pages.

    pages  for each PAGES_AT_ONCE pages in token order, [layers, n, stride] of each kind of store
    """

    slot: SlotCopy
    pages: tuple[tuple[Tensor, ...], ...]
    num_pages: int

    @classmethod
    def take(cls, storage: CacheStorage, slot: int, pages: Sequence[int]) -> Snapshot:
        """Copy a slot and `pages` from the device."""
        groups, device = storage.page_groups(), storage.pages.device
        data = tuple(
            tuple(_to_host(group.index_select(1, some)) for group in groups)
            for some in _batches(pages, device)
        )
        return cls(SlotCopy.take(storage, slot), data, len(pages))

    def put(self, storage: CacheStorage, slot: int, pages: Sequence[int]) -> None:
        """Copy everything back, to another slot and other pages."""
        self.slot.put(storage, slot)
        batches = _batches(pages, storage.pages.device)
        for some, data in zip(batches, self.pages, strict=True):
            for group, rows in zip(storage.page_groups(), data, strict=True):
                group.index_copy_(1, some, rows.to(group.device, non_blocking=True))


def _batches(pages: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    for first in range(0, len(pages), PAGES_AT_ONCE):
        yield torch.tensor(pages[first : first + PAGES_AT_ONCE], device=device)


def _to_host(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone(memory_format=torch.contiguous_format)
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x.contiguous(), non_blocking=True)
