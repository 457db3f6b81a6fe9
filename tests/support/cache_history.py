"""Random histories whose bytes are checked: paged cache against the contiguous reference cache.

The rows a layer writes are a function of the token ids alone, so that forks and shared prefixes
mean what they mean in a model. Scores are 0 or so low that softmax drops them and values lie on a
coarse grid: all FP32 arithmetic is exact, and every comparison is bitwise.
"""

from __future__ import annotations

import zlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dsv4.cache.manager import CachedRequest, CacheManager
from dsv4.cache.schema import LayerSchema
from dsv4.cache.step import StepRows
from dsv4.core.config import LayerKind
from dsv4.core.kv_layout import IndexRecord, KvRecord
from dsv4.reference import cache_writes
from dsv4.reference.compressor import CompressorState, compress
from dsv4.reference.kv_records import index_record_pack_fp8, index_record_pack_mxfp4, kv_record_pack
from dsv4.reference.norm import rms_norm
from dsv4.reference.rope import apply_rope, layer_frequencies, rope_cos_sin
from support.cache_life import Life

VOCAB, TURNS, EPS, DTYPE = 9, 5, 1e-6, torch.bfloat16


@cache
def bank(name: str, layer: int, width: int) -> Tensor:
    """[VOCAB, TURNS, width] FP32 rows, exact in BF16: what token t at position p contributes."""
    rng = torch.Generator().manual_seed(zlib.crc32(f"{name} {layer} {width}".encode()))
    rows = torch.randint(-8, 9, (VOCAB, width), generator=rng) / 4.0
    return torch.stack([rows.roll(turn, dims=1) for turn in range(TURNS)], dim=1)


def rows_of(name: str, layer: int, width: int, tokens: list[int], start: int) -> Tensor:
    """Rows of tokens start .. len(tokens) - 1."""
    position = torch.arange(start, len(tokens))
    return bank(name, layer, width)[torch.tensor(tokens[start:]).long(), position % TURNS]


def scores_of(width: int, start: int, end: int) -> Tensor:
    """Scores of tokens start .. end - 1: channel i keeps the tokens with p mod 4 == i mod 4.

    So every window keeps a power of two of them, and softmax weights are exact.
    """
    keeps = torch.arange(start, end)[:, None] % 4 == torch.arange(width) % 4
    return torch.where(keeps, 0.0, -1e30)


@cache
def tables(config, kind: LayerKind, entries: int) -> tuple[Tensor, Tensor]:
    position = torch.arange(entries) * kind.ratio
    return rope_cos_sin(position, layer_frequencies(config, kind), torch.float32)


class History(Life):
    """A Life that writes bytes through `writes`: dsv4.ops.cache, or the oracles of these ops."""

    def __init__(self, manager: CacheManager, seed: int, writes: ModuleType) -> None:
        super().__init__(manager, seed)
        self.writes, self.compared = writes, 0
        self.poison_table, self.device = False, manager.page_table.device
        for view in (*manager.storage.slot_views(), *manager.storage.page_views()):
            view.fill_(0xFF)  # what nobody wrote must not matter

    def page_table(self) -> Tensor:
        """The manager's table; on request with absurd page numbers wherever none is in use."""
        table = self.manager.page_table
        return table.where(table > 0, 2**31 - 1) if self.poison_table else table

    def after_step(self, batch: list[tuple[CachedRequest, int]], rows: StepRows) -> None:
        for layer in self.manager.schema.layers:
            self._write(layer, batch, rows)

    def _joined(self, name: str, layer: int, width: int, batch, num_rows: int) -> Tensor:
        parts = [rows_of(name, layer, width, self.tokens[r.number], r.length) for r, _ in batch]
        return _padded(parts, width, num_rows).to(self.device)

    def _write(self, layer: LayerSchema, batch, rows: StepRows) -> None:
        c, T, w = self.manager.schema.config, len(rows.slot), self.writes
        views = self.manager.storage.layers[layer.layer]
        kv = self._joined("kv", layer.layer, c.head_dim, batch, T).to(DTYPE)
        w.kv_window_append(
            kv, views.window, rows.slot, rows.position, rows.end_position, c.sliding_window,
            c.qk_rope_head_dim,
        )  # fmt: skip
        if views.entries is None or views.state is None:
            return
        self._insert(layer, batch, rows, "", views.state, views.entries, c.head_dim)
        if views.index_state is not None and views.index_keys is not None:
            index = views.index_state, views.index_keys
            self._insert(layer, batch, rows, "index", *index, c.index_head_dim)

    def _insert(
        self, layer: LayerSchema, batch, rows: StepRows, which: str, state: Tensor, pages: Tensor,
        dim: int,
    ) -> None:  # fmt: skip
        c, T, w = self.manager.schema.config, len(rows.slot), self.writes
        width = state.shape[3]
        kappa = self._joined(f"{which}kappa", layer.layer, width, batch, T)
        scores = [scores_of(width, r.length, r.length + n) for r, n in batch]
        gamma = _padded(scores, width, T).to(self.device)
        cos, sin = tables(c, layer.kind, c.max_position_embeddings // layer.kind.ratio)
        args = (
            kappa, gamma, state, torch.ones(dim, device=self.device), cos.to(self.device),
            sin.to(self.device), pages, self.page_table(),
            rows.slot, rows.position, rows.first_row, rows.first_position, layer.kind.ratio,
            layer.entries_per_page, EPS, DTYPE,
        )  # fmt: skip
        if which:
            w.index_key_insert(*args, self.manager.schema.index_keys, True)
        else:
            w.compressor_insert(*args)
        w.compressor_state_append(kappa, gamma, state, rows.slot, rows.position, rows.end_position)

    def compare_all(self) -> None:
        """Every resident request, every layer, every byte that a later step could read."""
        for r in self.manager.requests:
            if r.is_resident and r.length:
                for layer in self.manager.schema.layers:
                    self._compare(r, self.tokens[r.number], layer)
                self.compared += 1

    def _compare(self, r: CachedRequest, tokens: list[int], layer: LayerSchema) -> None:
        c, n = self.manager.schema.config, len(tokens)
        assert n == r.length
        views = self.manager.storage.layers[layer.layer]
        record, W = KvRecord.of(c), c.sliding_window
        position = torch.arange(max(n - W, 0), n)
        slot = torch.full_like(position, r.slot)
        got = cache_writes.gather_records(
            views.window.cpu(), slot, position % W, W, record.data_bytes, record.scale_bytes
        )
        kv = rows_of("kv", layer.layer, c.head_dim, tokens, 0).to(DTYPE)
        assert torch.equal(got, kv_record_pack(kv, c.qk_rope_head_dim)[position]), "window"
        if views.entries is None or views.state is None:
            return
        self._compare_store(r, tokens, layer, "", views.state, views.entries, c.head_dim)
        if views.index_state is not None and views.index_keys is not None:
            index = views.index_state, views.index_keys
            self._compare_store(r, tokens, layer, "index", *index, c.index_head_dim)

    def _compare_store(
        self, r: CachedRequest, tokens: list[int], layer: LayerSchema, which: str, state: Tensor,
        pages: Tensor, dim: int,
    ) -> None:  # fmt: skip
        c, kind, width = self.manager.schema.config, layer.kind, state.shape[3]
        kappa = rows_of(f"{which}kappa", layer.layer, width, tokens, 0)
        gamma = scores_of(width, 0, len(tokens))
        pooled, open_rows = compress(CompressorState.empty(width, kappa), kappa, gamma, kind)
        x = rms_norm(pooled.to(DTYPE), torch.ones(dim), EPS)
        cos, sin = tables(c, kind, c.max_position_embeddings // kind.ratio)
        x = apply_rope(x, cos[: len(x)], sin[: len(x)])
        if which:
            x = cache_writes.hadamard(x)
            keys = self.manager.schema.index_keys
            pack = index_record_pack_fp8 if keys == "fp8" else index_record_pack_mxfp4
            record, want = IndexRecord.of(c, keys), pack(x)
            sizes = record.value_bytes, record.scale_bytes
        else:
            kv_record, want = KvRecord.of(c), kv_record_pack(x, c.qk_rope_head_dim)
            sizes = kv_record.data_bytes, kv_record.scale_bytes
        entry = torch.arange(len(x))
        page = torch.tensor(r.pages)[entry // layer.entries_per_page]
        row = entry % layer.entries_per_page
        got = cache_writes.gather_records(pages.cpu(), page, row, layer.entries_per_page, *sizes)
        assert torch.equal(got, want), f"{which or 'main'} entries of layer {layer.layer}"
        at = torch.arange(open_rows.start, open_rows.length) % state.shape[2]
        kept = state[r.slot].cpu()
        assert torch.equal(kept[0, at], open_rows.kappa), "state, values"
        assert torch.equal(kept[1, at], open_rows.gamma), "state, scores"


def _padded(parts: list[Tensor], width: int, num_rows: int) -> Tensor:
    """Rows of all requests; padding rows are poison."""
    out = torch.full((num_rows, width), float("nan"))
    filled = torch.cat([out[:0], *parts])
    out[: len(filled)] = filled
    return out
