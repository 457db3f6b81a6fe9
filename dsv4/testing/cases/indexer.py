"""Inputs of the indexer kernels: index keys of whole requests in pages, and query tokens.

Bytes no kernel may read are poison: 0xFF is NaN as an E4M3 value, as an FP32 and an E8M0 scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dsv4.core.kv_layout import IndexKeys, IndexRecord

RATIO = 4


@dataclass(frozen=True)
class IndexerCase:
    """Queries of several requests, one after the other, and the keys they look at.

    num_entries  of each slot; the rest of its last page is poison
    """

    q: Tensor
    head_weights: Tensor
    pages: Tensor
    page_table: Tensor
    slot: Tensor
    position: Tensor
    entries_per_page: int
    topk: int
    keys: IndexKeys
    is_rotated: bool
    is_rounded: bool
    num_entries: tuple[int, ...]
    cos: Tensor | None = None
    sin: Tensor | None = None

    def args(self) -> dict[str, Any]:
        """Arguments of the op and of its oracle."""
        named = {k: v for k, v in vars(self).items() if k != "num_entries"}
        return {**named, "ratio": RATIO}

    def to(self, device: str) -> IndexerCase:
        """A copy on `device`."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def rows(self, rows: Sequence[int] | Tensor) -> IndexerCase:
        """Only these query tokens."""
        at = torch.as_tensor(rows, device=self.q.device)
        names = ("q", "head_weights", "slot", "position")
        return replace(self, **{name: getattr(self, name)[at].contiguous() for name in names})


def indexer_case(
    spans: Sequence[tuple[int, int]], topk: int, keys: IndexKeys = "fp8", *, num_heads: int = 8,
    entries_per_page: int = 32, max_pages: int | None = None, padding: int = 0,
    is_rotated: bool = True, is_rounded: bool = True, dtype: torch.dtype = torch.bfloat16,
    levels: int = 0, rope_dim: int = 0, seed: int = 0, device: str = "cpu",
) -> IndexerCase:  # fmt: skip
    """Requests with queries at positions [start, start + n) for (start, n) in `spans`.

    levels   draw keys from this many different ones, which makes scores tie; 0 for all different
    padding  rows with slot -1 at the end
    rope_dim dims of a query that are still to be rotated
    """
    g = Generator(device).manual_seed(seed)
    num_entries = tuple((start + n) // RATIO for start, n in spans)
    used = [-(-n // entries_per_page) for n in num_entries]
    width = max([*used, 1]) if max_pages is None else max_pages
    record = IndexRecord(128, keys)
    num_pages = sum(used) + 2
    stride = record.page_bytes(entries_per_page)
    pages = torch.full((num_pages, stride), 0xFF, dtype=torch.uint8, device=device)
    order = torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(seed)) + 1
    table = torch.zeros(len(spans), width, dtype=torch.int32)
    taken = 0
    for s, (count, entries) in enumerate(zip(used, num_entries, strict=True)):
        own = order[taken : taken + count]
        table[s, :count] = own.to(torch.int32)
        taken += count
        fill_pages(pages, own.to(device), entries, entries_per_page, record, levels, g)
    position = torch.cat([torch.arange(a, a + n) for a, n in spans] + [torch.zeros(padding)])
    slot = torch.cat([torch.full((n,), s) for s, (_, n) in enumerate(spans)])
    slot = torch.cat([slot, torch.full((padding,), -1)]).to(torch.int64)
    T = len(slot)
    q = torch.randn(T, num_heads, 128, generator=g, device=device).to(dtype)
    weights = torch.randn(T, num_heads, generator=g, device=device) * (128 * num_heads) ** -0.5
    return IndexerCase(
        q, weights, pages, table.to(device), slot.to(device),
        position.to(torch.int64).to(device), entries_per_page, topk, keys, is_rotated,
        is_rounded, num_entries, *_angles(int(position.max()) + 1, rope_dim, device),
    )  # fmt: skip


def _angles(
    num_positions: int, rope_dim: int, device: str
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if rope_dim == 0:
        return None, None
    freqs = 1e4 ** -(torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * freqs
    return angles.cos().float().to(device), angles.sin().float().to(device)


def fill_pages(
    pages: Tensor, own: Tensor, num_entries: int, entries_per_page: int, record: IndexRecord,
    levels: int, g: Generator,
) -> None:  # fmt: skip
    """Random keys in the first entries of pages `own`; what is left of the last stays poison."""
    n, per_page = num_entries, entries_per_page
    device, values = pages.device, record.value_bytes
    shape = n, record.value_bytes
    value = torch.randint(0, 256, shape, generator=g, device=device, dtype=torch.uint8)
    exponent = torch.randint(118, 124, (n, 4), generator=g, device=device)
    if record.keys == "fp8":
        # Values of up to 8 in size, no NaN, and a power of two in FP32.
        value = (value & 0x80) | (value & 0x7F) % 0x58
        scale = (exponent[:, 0].to(torch.int32) << 23).view(torch.uint8).view(n, 4)
    else:
        scale = exponent.to(torch.uint8)
    if levels:
        same = torch.randint(0, min(levels, max(n, 1)), (n,), generator=g, device=device)
        value, scale = value[same], scale[same]
    entry = torch.arange(n, device=device)
    page, row = own.to(torch.int64)[entry // per_page], entry % per_page
    stride = pages.shape[1]
    by_value = pages.as_strided((len(pages), per_page, values), (stride, values, 1))
    by_scale = pages.as_strided((len(pages), per_page, 4), (stride, 4, 1), per_page * values)
    by_value[page, row], by_scale[page, row] = value, scale


def select_scores(T: int, S: int, levels: int = 0, seed: int = 0) -> Tensor:
    """Scores [T, S], normal, or from `levels` different values."""
    g = Generator().manual_seed(seed)
    if levels:
        return torch.randint(-levels, levels, (T, S), generator=g) / 4
    return torch.randn(T, S, generator=g)


def aot_calls() -> dict[str, dict[str, Any]]:
    """Decode and prefill of Flash and Pro with both key formats, and a general choice."""
    calls: dict[str, dict[str, Any]] = {}
    for name, topk, spans in (
        ("flash", 512, [(4095, 1), (40, 2)]), ("pro", 1024, [(8191, 1)]),
        ("prefill", 512, [(4096, 256)]),
    ):  # fmt: skip
        for keys in ("fp8", "mxfp4"):
            case = indexer_case(spans, topk, keys, num_heads=64, entries_per_page=64, rope_dim=64)
            calls[f"indexer_scores_topk/{name}_{keys}"] = case.args()
    long = indexer_case([(40000, 1)], 512, num_heads=64, entries_per_page=64, max_pages=256)
    calls["indexer_scores_topk/long"] = long.args()
    plain = indexer_case([(4095, 1)], 512, num_heads=64, is_rotated=False, is_rounded=False)
    calls["indexer_scores_topk/bf16"] = plain.args()
    nano = indexer_case([(700, 1)], 32, num_heads=8)
    calls["indexer_scores_topk/nano"] = nano.args()
    for S in (8192, 65536):
        calls[f"topk_select/{S}"] = {
            "scores": select_scores(2, S), "lengths": torch.tensor([S, 1000]), "topk": 512,
        }  # fmt: skip
    return calls
