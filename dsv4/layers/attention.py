"""Attention of one block: a window of tokens, and compressed entries where the layer has them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.cache.storage import LayerViews
from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.taps import tap
from dsv4.layers.batch import Batch
from dsv4.layers.compressor import Compressor
from dsv4.layers.indexer import Indexer, IndexerForm
from dsv4.layers.linear import Fp8Linear
from dsv4.layers.weights import WeightView
from dsv4.ops.attention import kv_step_pack, sparse_attn_decode, sparse_attn_prefill
from dsv4.ops.cache import kv_window_append
from dsv4.ops.norm import inverse_rope, q_norm_rope, rms_norm


@dataclass(frozen=True)
class Attention:
    """SWA, CSA or HCA. `compressor` is None for SWA; only CSA has an indexer."""

    config: ModelConfig
    kind: LayerKind
    name: str
    wq_a: Fp8Linear
    wq_b: Fp8Linear
    wkv: Fp8Linear
    wo_a: Fp8Linear
    wo_b: Fp8Linear
    q_norm: Tensor
    kv_norm: Tensor
    sink: Tensor
    compressor: Compressor | None
    indexer: Indexer | None

    @classmethod
    def of(
        cls, config: ModelConfig, kind: LayerKind, w: WeightView, form: IndexerForm, name: str
    ) -> Attention:
        """The attention whose weights are `w`; `name` ("layers.3.attn") is the prefix of taps."""
        compressor = indexer = None
        if kind is not LayerKind.SWA:
            compressor = Compressor.of(w.at("compressor"), kind, config.rms_norm_eps)
        if kind is LayerKind.CSA:
            indexer = Indexer.of(config, w.at("indexer"), form, f"{name}.indexer")
        wq_a, wq_b, wkv, wo_b = (Fp8Linear.of(w.fp8(m)) for m in ("wq_a", "wq_b", "wkv", "wo_b"))
        wo_a = Fp8Linear.of(w.fp8("wo_a"), config.o_groups)
        norms = w["q_norm.weight"], w["kv_norm.weight"]
        return cls(
            config, kind, name, wq_a, wq_b, wkv, wo_a, wo_b, *norms, w["attn_sink"], compressor,
            indexer,
        )  # fmt: skip

    def __call__(self, x: Tensor, batch: Batch, cache: LayerViews) -> Tensor:
        """x [T, D] after the block's norm -> [T, D]; the cache takes the batch's tokens.

        Order: entries and keys first, because a token may see the entry it completes; the rings
        last, because attention still reads the rows that they overwrite.
        """
        c, eps = self.config, self.config.rms_norm_eps
        rope, rows = batch.ropes[self.kind], batch.rows
        latent = rms_norm(self.wq_a(x), self.q_norm, eps)
        q = self.wq_b(latent).unflatten(1, (c.num_attention_heads, -1))
        q = q_norm_rope(q, rope.cos, rope.sin, rows.position, eps)
        kv = rms_norm(self.wkv(x), self.kv_norm, eps)
        inverse_rope(kv[:, None], rope.cos, rope.minus_sin, rows.position)
        tap(f"{self.name}.q", q)
        o = self._attend(x, latent, q, kv, batch, cache)
        kv_window_append(
            kv, cache.window, rows.slot, rows.position, rows.end_position, c.sliding_window,
            c.qk_rope_head_dim,
        )  # fmt: skip
        out = self.wo_b(self.wo_a(o.flatten(1)))
        tap(f"{self.name}.out", out)
        return out

    def _attend(
        self, x: Tensor, latent: Tensor, q: Tensor, kv: Tensor, batch: Batch, cache: LayerViews
    ) -> Tensor:
        """-> [T, H, C], rotated back"""
        chosen, appends, per_page = None, [], 0
        if self.compressor is not None:
            assert cache.state is not None
            assert cache.entries is not None
            per_page = batch.page_tokens // self.kind.ratio
            new = self.compressor.rows(x, batch)
            self.compressor.insert_entries(new, batch, cache.state, cache.entries, per_page)
            appends.append((self.compressor, new, cache.state))
        if self.indexer is not None:
            assert cache.index_state is not None
            assert cache.index_keys is not None
            new = self.indexer.compressor.rows(x, batch)
            chosen = self.indexer.choose(
                x, latent, batch, new, cache.index_state, cache.index_keys, per_page
            )
            appends.append((self.indexer.compressor, new, cache.index_state))
        for compressor, new, state in appends:
            compressor.append(new, batch, state)
        return self._attend_rows(q, kv, batch, cache, chosen, per_page)

    def _attend_rows(
        self, q: Tensor, kv: Tensor, batch: Batch, cache: LayerViews, chosen: Tensor | None,
        per_page: int,
    ) -> Tensor:  # fmt: skip
        c, rows = self.config, batch.rows
        has_entries = cache.entries is not None
        attend = sparse_attn_prefill if batch.is_prefill else sparse_attn_decode
        return attend(
            q, kv_step_pack(kv, c.qk_rope_head_dim), cache.window,
            cache.entries if has_entries else cache.window,
            batch.page_table if has_entries else batch.no_pages, chosen, rows.slot,
            rows.position, rows.first_row, rows.first_position, self.sink,
            *batch.angles[self.kind], c.head_dim**-0.5, c.sliding_window, c.qk_rope_head_dim,
            self.kind.ratio if has_entries else 1, per_page if has_entries else 1,
        )  # fmt: skip
