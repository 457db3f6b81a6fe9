"""The two device allocations of the cache and typed views into them. Views never copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.schema import CacheSchema, LayerSchema, Region, StateShape
from dsv4.core.config import LayerKind


@dataclass(frozen=True)
class LayerViews:
    """What the kernels of one layer read and write; None where the kind has no such store.

    window       uint8 [num_slots, stride]
    state        float32 [num_slots, 2, rows, width]: kappa, then gamma
    index_state  float32 [num_slots, 2, rows, width] (CSA)
    entries      uint8 [num_pages, stride]
    index_keys   uint8 [num_pages, stride] (CSA)
    """

    window: Tensor
    state: Tensor | None
    index_state: Tensor | None
    entries: Tensor | None
    index_keys: Tensor | None


class CacheStorage:
    """Owns the bytes that a CacheSchema describes.

    device  where they live; the meta device lays out without memory
    pages   uint8 [schema.page_bytes]
    states  uint8 [schema.state_bytes]
    layers  views, one LayerViews for each layer and MTP block
    ring_tags, entry_tags  int64 views of the canary's tags, None without one
    """

    def __init__(self, schema: CacheSchema, device: torch.device | str = "cpu") -> None:
        self.schema = schema
        self.pages = torch.zeros(schema.page_bytes, dtype=torch.uint8, device=device)
        self.states = torch.zeros(schema.state_bytes, dtype=torch.uint8, device=device)
        self.layers = tuple(self._views(layer) for layer in schema.layers)
        tags = schema.ring_tags, schema.entry_tags
        self.ring_tags = _rows(self.states, tags[0]).view(torch.int64) if tags[0] else None
        self.entry_tags = _rows(self.pages, tags[1]).view(torch.int64) if tags[1] else None

    def reset_slot(self, slot: int) -> None:
        """Make a slot what it is before the first token: kappa 0, gamma -inf.

        The window ring keeps its bytes; a row is read only after its token was written.
        """
        for views in self.layers:
            for state in (views.state, views.index_state):
                if state is not None:
                    state[slot, 0] = 0
                    state[slot, 1] = float("-inf")
        if self.ring_tags is not None:
            self.ring_tags[slot] = -1

    def copy_slot(self, source: int, target: int) -> None:
        """Copy everything one slot remembers to another."""
        for view in self.slot_views():
            view[target] = view[source]

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of every layer."""
        for view in self.page_views():
            view[target] = view[source]

    def slot_views(self, at_boundary: bool = False) -> list[Tensor]:
        """Byte views [num_slots, stride] of every region of the state allocation.

        at_boundary  leave out what a request does not need after a multiple of 128 tokens: the
                     window of HCA is closed then, and its rows are written before they are read
        """
        views = []
        for x in self.schema.layers:
            closed = at_boundary and x.kind is LayerKind.HCA
            regions = (x.window, None if closed else x.state, x.index_state)
            views += [_rows(self.states, r) for r in regions if r is not None]
        tags = self.schema.ring_tags
        return [*views, _rows(self.states, tags)] if tags else views

    def page_views(self) -> list[Tensor]:
        """Byte views [num_pages, stride] of every region of the paged allocation."""
        stores = [r for x in self.schema.layers for r in (x.entries, x.index_keys)]
        return [_rows(self.pages, r) for r in (*stores, self.schema.entry_tags) if r]

    def fill_pages(self, pages: Sequence[int], byte: int) -> None:
        """Overwrite whole pages of every layer, for debugging."""
        for view in self.page_views():
            view[list(pages)] = byte

    def _views(self, layer: LayerSchema) -> LayerViews:
        return LayerViews(
            _rows(self.states, layer.window),
            _state(self.states, layer.state, layer.state_shape),
            _state(self.states, layer.index_state, layer.index_state_shape),
            _rows(self.pages, layer.entries) if layer.entries else None,
            _rows(self.pages, layer.index_keys) if layer.index_keys else None,
        )


def _rows(allocation: Tensor, region: Region) -> Tensor:
    return allocation[region.offset : region.end].view(region.count, region.stride)


def _state(allocation: Tensor, region: Region | None, shape: StateShape | None) -> Tensor | None:
    if region is None or shape is None:
        return None
    rows = allocation[region.offset : region.end].view(torch.float32)
    return rows.view(region.count, 2, shape.rows, shape.width)
