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
    layers  views, one LayerViews for each layer and MTP block. Each is a tensor of its own for
            PyTorch, which else refuses to compile writes to two dtypes of one allocation
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
        csa_states = schema.groups("state", LayerKind.CSA) + schema.groups("index_state")
        hca_states = schema.groups("state", LayerKind.HCA)
        open_regions = schema.groups("window") + csa_states + [(r,) for r in tags[:1] if r]
        page_regions = schema.groups("entries", LayerKind.CSA) + schema.groups("index_keys")
        page_regions += schema.groups("entries", LayerKind.HCA) + [(r,) for r in tags[1:] if r]
        self._open = [_group(self.states, g) for g in open_regions]
        self._closed = [_group(self.states, g) for g in hca_states]
        self._paged = [_group(self.pages, g) for g in page_regions]
        states = [_group(self.states, g) for g in csa_states + hca_states]
        self._resettable = [g.view(torch.float32).unflatten(2, (2, -1)) for g in states]

    def reset_slot(self, slot: int) -> None:
        """Make a slot what it is before the first token: kappa 0, gamma -inf.

        The window ring keeps its bytes; a row is read only after its token was written.
        """
        for group in self._resettable:
            group[:, slot, 0] = 0
            group[:, slot, 1] = float("-inf")
        if self.ring_tags is not None:
            self.ring_tags[slot] = -1

    def copy_slot(self, source: int, target: int) -> None:
        """Copy everything one slot remembers to another."""
        for group in self.slot_groups():
            group[:, target] = group[:, source]

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of every layer."""
        for group in self._paged:
            group[:, target] = group[:, source]

    def slot_groups(self, at_boundary: bool = False) -> list[Tensor]:
        """Views of the state allocation, uint8 [layers, num_slots, stride], one a kind of store.

        at_boundary  leave out what a request does not need after a multiple of 128 tokens: the
                     window of HCA is closed then, and its rows are written before they are read
        """
        return self._open if at_boundary else [*self._open, *self._closed]

    def page_groups(self) -> list[Tensor]:
        """Views of the paged allocation, uint8 [layers, num_pages, stride], one a kind of store."""
        return self._paged

    def slot_bytes(self, at_boundary: bool = False) -> int:
        """Bytes of one slot in `slot_groups`."""
        return sum(g.shape[0] * g.shape[2] for g in self.slot_groups(at_boundary))

    def slot_views(self, at_boundary: bool = False) -> list[Tensor]:
        """Views [num_slots, stride] of each single region of `slot_groups`."""
        return [view for group in self.slot_groups(at_boundary) for view in group]

    def page_views(self) -> list[Tensor]:
        """Views [num_pages, stride] of each single region of `page_groups`."""
        return [view for group in self._paged for view in group]

    def fill_pages(self, pages: Sequence[int], byte: int) -> None:
        """Overwrite whole pages of every layer, for debugging."""
        for group in self._paged:
            group[:, list(pages)] = byte

    def fill_slot(self, slot: int, byte: int) -> None:
        """Overwrite a whole slot of every layer, for debugging."""
        for group in self.slot_groups():
            group[:, slot] = byte

    def _views(self, layer: LayerSchema) -> LayerViews:
        return LayerViews(
            _detached(_rows(self.states, layer.window)),
            _state(self.states, layer.state, layer.state_shape),
            _state(self.states, layer.index_state, layer.index_state_shape),
            _detached(_rows(self.pages, layer.entries)) if layer.entries else None,
            _detached(_rows(self.pages, layer.index_keys)) if layer.index_keys else None,
        )


def _rows(allocation: Tensor, region: Region) -> Tensor:
    return allocation[region.offset : region.end].view(region.count, region.stride)


def _state(allocation: Tensor, region: Region | None, shape: StateShape | None) -> Tensor | None:
    if region is None or shape is None:
        return None
    rows = allocation[region.offset : region.end].view(torch.float32)
    return _detached(rows.view(region.count, 2, shape.rows, shape.width))


def _group(allocation: Tensor, regions: Sequence[Region]) -> Tensor:
    """Regions that lie equally apart as [regions, count, stride]."""
    first, apart = regions[0], 0
    if len(regions) > 1:
        apart = regions[1].offset - first.offset
    assert all(
        (r.offset, r.stride, r.count) == (first.offset + i * apart, first.stride, first.count)
        for i, r in enumerate(regions)
    )
    size, strides = (len(regions), first.count, first.stride), (apart, first.stride, 1)
    return allocation.as_strided(size, strides, first.offset)


def _detached(view: Tensor) -> Tensor:
    """The same bytes as a tensor that PyTorch does not know to be part of another."""
    return view if view.is_meta else torch.from_dlpack(view)
