"""Random histories whose bytes are checked: paged cache against the contiguous reference cache.

The rows a layer writes are a function of the token ids alone, so that forks and shared prefixes
mean what they mean in a model. Scores are 0 or so low that softmax drops them and values lie on a
coarse grid: all FP32 arithmetic is exact, and every comparison is bitwise.
"""

from __future__ import annotations

import random
import zlib
from functools import cache
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from dsv4.cache.manager import CacheManager
from dsv4.cache.request import CachedRequest, Step
from dsv4.cache.schema import LayerSchema
from dsv4.cache.step import StepRows
from dsv4.core.config import LayerKind
from dsv4.core.kv_layout import IndexRecord, KvRecord
from dsv4.reference import cache_writes
from dsv4.reference.compressor import CompressorState, compress
from dsv4.reference.kv_records import index_record_pack_fp8, index_record_pack_mxfp4, kv_record_pack
from dsv4.reference.norm import rms_norm
from dsv4.reference.rope import apply_rope, layer_frequencies, rope_cos_sin
from support.cache_life import LONG, Life

VOCAB, TURNS, EPS, DTYPE = 9, 5, 1e-6, torch.bfloat16


@cache
def texts() -> tuple[list[int], ...]:
    """Texts of random tokens: two with 256 tokens in common, a third with 128 of these."""
    rng = random.Random(0)
    a, b, c, d = ([rng.randrange(VOCAB) for _ in range(LONG)] for _ in range(4))
    return a, a[:256] + b[256:], a[:128] + c[128:], d


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


def mtp_rows_of(layer: int, width: int, tokens: list[int], start: int) -> Tensor:
    """Window KV of an MTP block for tokens start .. len(tokens) - 2: the token after takes part."""
    position = torch.arange(start, len(tokens) - 1)
    pairs = [(3 * a + b) % VOCAB for a, b in pairwise(tokens[start:])]
    return bank("mtp", layer, width)[torch.tensor(pairs).long(), position % TURNS]


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
        self.writes, self.compared, self.texts = writes, 0, list(texts())
        self.poison_table, self.device = False, manager.page_table.device
        for view in (*manager.storage.slot_views(), *manager.storage.page_views()):
            view.fill_(0xFF)  # what nobody wrote must not matter

    def page_table(self) -> Tensor:
        """The manager's table; on request with absurd page numbers wherever none is in use."""
        table = self.manager.page_table
        return table.where(table > 0, 2**31 - 1) if self.poison_table else table

    def after_step(self, step: Step, accepted: list[int]) -> None:
        """What an engine does: every layer inserts, verification, every layer appends.

        The tokens after the accepted ones are drafts that were rejected: they have inserted
        entries, which later ones overwrite, but are not appended.
        """
        batch, rows = list(step.spans), step.rows
        for layer in self.trunk():
            self.insert(layer, batch, rows)
        self.verify(batch, rows, accepted)
        for layer in self.trunk():
            self.append(layer, batch, rows)
        for layer in self.manager.schema.layers[len(self.trunk()) :]:
            self.append_mtp(layer, batch, rows, accepted)

    def trunk(self) -> tuple[LayerSchema, ...]:
        schema = self.manager.schema
        return schema.layers[: schema.config.num_hidden_layers]

    def verify(self, batch, rows: StepRows, accepted: list[int]) -> None:
        """Lower the end of every request to what is accepted of it."""
        ends = [r.length + a for (r, n), a in zip(batch, accepted, strict=True) for _ in range(n)]
        rows.end_position[: len(ends)] = torch.tensor(ends, device=self.device).long()

    def _joined(self, name: str, layer: int, width: int, batch, num_rows: int) -> Tensor:
        parts = [rows_of(name, layer, width, self.tokens[r.number], r.length) for r, _ in batch]
        return _padded(parts, width, num_rows).to(self.device)

    def append(self, layer: LayerSchema, batch, rows: StepRows) -> None:
        c, T = self.manager.schema.config, len(rows.slot)
        kv = self._joined("kv", layer.layer, c.head_dim, batch, T).to(DTYPE)
        self._append_window(layer, kv, rows)
        views = self.manager.storage.layers[layer.layer]
        for which, state in (("", views.state), ("index", views.index_state)):
            if state is not None:
                pair = self._state_rows(layer, batch, which, state.shape[3], T)
                at = rows.slot, rows.position, rows.end_position
                self.writes.compressor_state_append(*pair, state, *at)

    def append_mtp(self, layer: LayerSchema, batch, rows: StepRows, accepted: list[int]) -> None:
        """Rows of the accepted tokens, each made with the token that follows."""
        C, parts = self.manager.schema.config.head_dim, []
        for (r, n), a in zip(batch, accepted, strict=True):
            tokens = [*self.tokens[r.number][: r.length + a], self.upcoming[r.number]]
            parts.append(mtp_rows_of(layer.layer, C, tokens, r.length))
            parts.append(torch.full((n - a, C), float("nan")))
        kv = _padded(parts, C, len(rows.slot)).to(self.device, DTYPE)
        self._append_window(layer, kv, rows)

    def _append_window(self, layer: LayerSchema, kv: Tensor, rows: StepRows) -> None:
        c, window = self.manager.schema.config, self.manager.storage.layers[layer.layer].window
        at = rows.slot, rows.position, rows.end_position
        self.writes.kv_window_append(kv, window, *at, c.sliding_window, c.qk_rope_head_dim)

    def _state_rows(
        self, layer: LayerSchema, batch, which: str, width: int, T: int
    ) -> tuple[Tensor, Tensor]:
        kappa = self._joined(f"{which}kappa", layer.layer, width, batch, T)
        scores = [scores_of(width, r.length, r.length + n) for r, n in batch]
        return kappa, _padded(scores, width, T).to(self.device)

    def insert(self, layer: LayerSchema, batch, rows: StepRows) -> None:
        c, views = self.manager.schema.config, self.manager.storage.layers[layer.layer]
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
        c, w = self.manager.schema.config, self.writes
        kappa, gamma = self._state_rows(layer, batch, which, state.shape[3], len(rows.slot))
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
        # A fork that computes its last token again has that one's row in place of the oldest.
        position = torch.arange(max(n - W + (n == r.oldest), 0), n)
        slot = torch.full_like(position, r.slot)
        got = cache_writes.gather_records(
            views.window.cpu(), slot, position % W, W, record.data_bytes, record.scale_bytes
        )
        if layer in self.trunk():
            kv = rows_of("kv", layer.layer, c.head_dim, tokens, 0).to(DTYPE)
        else:
            known = [*tokens, self.upcoming[r.number]]
            kv = mtp_rows_of(layer.layer, c.head_dim, known, 0).to(DTYPE)
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
