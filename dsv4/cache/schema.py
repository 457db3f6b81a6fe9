"""Where every byte of the cache lies: offsets and strides per layer, from the config alone."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.kv_layout import (
    DEFAULT_PAGE_TOKENS,
    FP32_BYTES,
    LAYOUT_VERSION,
    IndexKeys,
    IndexRecord,
    KvRecord,
    check_index_keys,
    check_page_tokens,
)

TAG_TOKENS = LayerKind.CSA.ratio  # tokens behind one canary tag of a page
ALIGNMENT = 128  # bytes; every region starts on one, so that any vector load is aligned
MAX_PAGES = 2**31  # page tables are int32


@dataclass(frozen=True)
class Region:
    """`count` rows of `stride` bytes from `offset` in one of the two allocations."""

    offset: int
    stride: int
    count: int

    @property
    def end(self) -> int:
        """First byte after the region."""
        return self.offset + self.stride * self.count


@dataclass(frozen=True)
class StateShape:
    """FP32 rows of a compressor: [2 (kappa, gamma), rows, width] for each slot.

    rows   2 r for CSA (the previous and the open window), r for HCA; token p is row p mod rows
    width  channels of a row, both halves for CSA
    """

    rows: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of one slot."""
        return 2 * self.rows * self.width * FP32_BYTES


@dataclass(frozen=True)
class LayerSchema:
    """The regions of one layer; those a kind does not have are None.

    layer        0 .. L - 1 for the trunk, then the MTP blocks
    window       states: ring of `sliding_window` KV records for each slot; token p is row p mod W
    state        states: rows of the main compressor for each slot
    index_state  states: rows of the indexer's compressor (CSA)
    entries      pages: KV records of compressed entries, `entries_per_page` in each
    index_keys   pages: indexer keys (CSA), as many
    """

    layer: int
    kind: LayerKind
    window: Region
    entries_per_page: int
    state: Region | None = None
    state_shape: StateShape | None = None
    index_state: Region | None = None
    index_state_shape: StateShape | None = None
    entries: Region | None = None
    index_keys: Region | None = None


@dataclass(frozen=True)
class CacheSchema:
    """Byte layout of a whole cache.

    num_pages    pages, the null page included; one page number covers `page_tokens` tokens of
                 every layer
    num_slots    requests that can be resident at once
    page_bytes   size of the paged allocation
    state_bytes  size of the state allocation
    ring_tags, entry_tags  canary tags (int64), one a ring row and one per 4 tokens of a page
    """

    config: ModelConfig
    num_pages: int
    num_slots: int
    page_tokens: int
    index_keys: IndexKeys
    layers: tuple[LayerSchema, ...]
    page_bytes: int
    state_bytes: int
    ring_tags: Region | None = None
    entry_tags: Region | None = None
    layout_version: int = LAYOUT_VERSION

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        num_pages: int,
        num_slots: int,
        page_tokens: int = DEFAULT_PAGE_TOKENS,
        index_keys: IndexKeys = "fp8",
        canary: bool = False,
    ) -> CacheSchema:
        """Lay out a cache; `canary` adds debugging tags, which cost 8 bytes a row.

        Raises RequestError for a page size or key format that is not served.
        """
        check_page_tokens(page_tokens)
        check_index_keys(index_keys)
        for name, value in (("num_pages", num_pages), ("num_slots", num_slots)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(name, "a positive integer", value)
        pages, states = _Allocation(num_pages), _Allocation(num_slots)
        blocks = 0 if config.dspark_block_size else config.num_nextn_predict_layers
        layers = _lay_out(
            config, config.num_hidden_layers + blocks, page_tokens, index_keys, pages, states
        )
        ring_tags = states.region(8 * config.sliding_window) if canary else None
        entry_tags = pages.region(8 * page_tokens // TAG_TOKENS) if canary else None
        return cls(
            config, num_pages, num_slots, page_tokens, index_keys, layers, pages.end, states.end,
            ring_tags, entry_tags,
        )  # fmt: skip

    @classmethod
    def pages_within(
        cls,
        config: ModelConfig,
        *,
        nbytes: int,
        num_slots: int,
        page_tokens: int = DEFAULT_PAGE_TOKENS,
        index_keys: IndexKeys = "fp8",
        canary: bool = False,
    ) -> int:
        """The most `num_pages`, null page included, of a cache that takes at most `nbytes` bytes.

        0 when one page and the slots already take more; MAX_PAGES for a model of windows alone,
        whose pages have no bytes. Raises RequestError as `of` does.
        """
        if isinstance(nbytes, bool) or not isinstance(nbytes, int):
            raise RequestError("nbytes", "an integer", nbytes)

        def size(num_pages: int) -> int:
            return cls.of(
                config, num_pages=num_pages, num_slots=num_slots, page_tokens=page_tokens,
                index_keys=index_keys, canary=canary,
            ).nbytes  # fmt: skip

        return bisect_right(range(1, MAX_PAGES + 1), nbytes, key=size)

    @property
    def num_mtp_windows(self) -> int:
        """MTP blocks with a window; their rows depend on the token that follows."""
        return len(self.layers) - self.config.num_hidden_layers

    def groups(self, name: str, kind: LayerKind | None = None) -> list[tuple[Region, ...]]:
        """The regions of one kind of store, equally far apart: a list of one tuple, or of none.

        name  attribute of LayerSchema
        kind  of the layers: stores of the same name differ in size from one kind to another
        """
        layers = [x for x in self.layers if kind in (None, x.kind)]
        regions = tuple(r for x in layers if (r := getattr(x, name)) is not None)
        return [regions] if regions else []

    @property
    def nbytes(self) -> int:
        """Bytes of both allocations."""
        return self.page_bytes + self.state_bytes

    @property
    def page_stride(self) -> int:
        """Bytes that one page number stands for, over all layers."""
        stores = [r for x in self.layers for r in (x.entries, x.index_keys)]
        return sum(r.stride for r in (*stores, self.entry_tags) if r is not None)

    @property
    def slot_stride(self) -> int:
        """Bytes that one slot stands for, over all layers."""
        stores = [r for x in self.layers for r in (x.window, x.state, x.index_state)]
        return sum(r.stride for r in (*stores, self.ring_tags) if r is not None)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    def request_bytes(self, tokens: int) -> int:
        """Bytes of one request of `tokens` tokens: its pages and its slot."""
        return self.pages_for(tokens) * self.page_stride + self.slot_stride


class _Allocation:
    """Hands out aligned regions one after the other."""

    def __init__(self, count: int) -> None:
        self.count, self.end = count, 0

    def region(self, stride: int) -> Region:
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        region = Region(offset, stride, self.count)
        self.end = region.end
        return region


def _lay_out(
    config: ModelConfig, num_layers: int, page_tokens: int, index_keys: IndexKeys,
    pages: _Allocation, states: _Allocation,
) -> tuple[LayerSchema, ...]:  # fmt: skip
    """Regions of one kind of store after another, so that one copy can take all its layers."""
    record, kinds = KvRecord.of(config), [config.layer_kind(j) for j in range(num_layers)]

    def regions(allocation: _Allocation, nbytes: int, *of: LayerKind) -> dict[int, Region]:
        return {j: allocation.region(nbytes) for j, kind in enumerate(kinds) if kind in of}

    C, J = config.head_dim, config.index_head_dim
    CSA, HCA = LayerKind.CSA, LayerKind.HCA
    shapes = {CSA: StateShape(2 * CSA.ratio, 2 * C), HCA: StateShape(HCA.ratio, C)}
    index_shape = StateShape(2 * CSA.ratio, 2 * J)
    per_page = {kind: page_tokens // kind.ratio for kind in (CSA, HCA)}
    window = regions(states, record.page_bytes(config.sliding_window), *LayerKind)
    state = {}
    entries = {}
    for kind in (CSA, HCA):
        state |= regions(states, shapes[kind].nbytes, kind)
        entries |= regions(pages, record.page_bytes(per_page[kind]), kind)
    index_state = regions(states, index_shape.nbytes, CSA)
    keys = regions(pages, IndexRecord.of(config, index_keys).page_bytes(per_page[CSA]), CSA)
    return tuple(
        LayerSchema(
            j, kind, window[j], per_page.get(kind, 0), state.get(j), shapes.get(kind),
            index_state.get(j), index_shape if j in index_state else None, entries.get(j),
            keys.get(j),
        )
        for j, kind in enumerate(kinds)
    )  # fmt: skip
