"""Attention of one block: a window of tokens, and compressed entries where the layer has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from dsv4.cache.storage import LayerViews
from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.taps import tap
from dsv4.kernels.common.linear_weights import join_rows
from dsv4.layers.batch import Batch
from dsv4.layers.compressor import Compressor, CompressorRows, Projections
from dsv4.layers.indexer import Indexer, IndexerForm
from dsv4.layers.linear import Fp8Linear
from dsv4.layers.weights import WeightView
from dsv4.ops.attention import (
    kv_step_pack,
    latent_kv_norm_pack,
    sparse_attn_decode,
    sparse_attn_prefill,
)
from dsv4.ops.cache import cache_step_append, compressor_state_append, kv_window_append
from dsv4.ops.norm import inverse_rope, q_norm_rope, rms_norm


@dataclass(frozen=True)
class Attention:
    """SWA, CSA or HCA. Without projections and a compressor for SWA; only CSA has an indexer."""

    config: ModelConfig
    kind: LayerKind
    name: str
    wq_a_wkv: Fp8Linear
    wq_b: Fp8Linear
    wo_a: Fp8Linear
    wo_b: Fp8Linear
    q_norm: Tensor
    kv_norm: Tensor
    sink: Tensor
    projections: Projections | None
    compressor: Compressor | None
    indexer: Indexer | None
    unfused: Collection[str] = ()

    @classmethod
    def of(
        cls, config: ModelConfig, kind: LayerKind, w: WeightView, form: IndexerForm, name: str,
        unfused: Collection[str] = (),
    ) -> Attention:  # fmt: skip
        """The attention whose weights are `w`; `name` ("layers.3.attn") is the prefix of taps."""
        projections = compressor = indexer = None
        if kind is not LayerKind.SWA:
            compressor = Compressor(kind, w["compressor.norm.weight"], config.rms_norm_eps)
            sources, proj = [w.at("compressor")], None
            if kind is LayerKind.CSA:
                indexer = Indexer.of(config, w.at("indexer"), form, f"{name}.indexer", unfused)
                sources.append(w.at("indexer").at("compressor"))
                proj = w["indexer.weights_proj.weight"]
            projections = Projections.of(sources, proj, "joined_wide_linear" not in unfused)
        joined = Fp8Linear.of(join_rows([w.fp8("wq_a"), w.fp8("wkv")]))
        wq_b, wo_b = (Fp8Linear.of(w.fp8(name)) for name in ("wq_b", "wo_b"))
        wo_a = Fp8Linear.of(w.fp8("wo_a"), config.o_groups)
        norms = w["q_norm.weight"], w["kv_norm.weight"]
        return cls(
            config, kind, name, joined, wq_b, wo_a, wo_b, *norms, w["attn_sink"], projections,
            compressor, indexer, unfused,
        )  # fmt: skip

    def __call__(self, x: Tensor, batch: Batch, cache: LayerViews) -> Tensor:
        """x [T, D] after the block's norm -> [T, D]; the cache takes the batch's tokens.

        Order: entries and keys first, because a token may see the entry it completes; the rings
        last, because the inserts and attention still read the rows that they overwrite. Of steps
        that could come in any order, those with much weight stand behind those that wait, during
        which their weight is already on its way.
        """
        new, head_weights = self._compress(x, batch, cache)
        latent, kv, page = self._project(x, batch)
        chosen = None
        if self.indexer is not None:
            assert cache.index_keys is not None
            assert head_weights is not None
            chosen = self.indexer.choose(latent, head_weights, batch, cache.index_keys)
        q = self._query(latent, batch)
        tap(f"{self.name}.q", q)
        o = self._attend(q, page, batch, cache, chosen)
        self._append(kv, new, batch, cache)
        out = self.wo_b(self.wo_a(o.flatten(1)))
        tap(f"{self.name}.out", out)
        return out

    def _project(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> latent [T, L], kv [T, C] after norm and RoPE, its records as a page"""
        rope, position, eps = batch.ropes[self.kind], batch.rows.position, self.config.rms_norm_eps
        both = self.wq_a_wkv(x)
        if "latent_kv_norm_pack" not in self.unfused:
            return latent_kv_norm_pack(
                both, self.q_norm, self.kv_norm, rope.cos, rope.sin, position, eps
            )
        latent, kv = both.split([len(self.q_norm), len(self.kv_norm)], dim=1)
        latent = rms_norm(latent.contiguous(), self.q_norm, eps)
        kv = rms_norm(kv.contiguous(), self.kv_norm, eps)
        inverse_rope(kv[:, None], rope.cos, rope.minus_sin, position)
        return latent, kv, kv_step_pack(kv, self.config.qk_rope_head_dim)

    def _query(self, latent: Tensor, batch: Batch) -> Tensor:
        """latent [T, L] -> heads [T, H, C] after norm and RoPE"""
        rope, position, eps = batch.ropes[self.kind], batch.rows.position, self.config.rms_norm_eps
        q = self.wq_b(latent).unflatten(1, (self.config.num_attention_heads, -1))
        if "q_norm_rope" not in self.unfused:
            return q_norm_rope(q, rope.cos, rope.sin, position, eps)
        q = rms_norm(q, q.new_ones(q.shape[2]), eps)
        inverse_rope(q, rope.cos, rope.minus_sin, position)
        return q

    def _compress(
        self, x: Tensor, batch: Batch, cache: LayerViews
    ) -> tuple[list[CompressorRows], Tensor | None]:
        """Write entries and keys -> rows of each compressor; the indexer's head weights, if any"""
        if self.projections is None or self.compressor is None:
            return [], None
        parts = self.projections(x, batch)
        new = CompressorRows(parts[0], parts[1])
        if self.indexer is None:
            self.compressor.insert_entries(new, batch, cache)
            return [new], None
        index, index_new = self.indexer.compressor, CompressorRows(parts[2], parts[3])
        form = self.indexer.form.keys, self.indexer.form.is_rotated
        if "entry_and_key_insert" in self.unfused:
            self.compressor.insert_entries(new, batch, cache)
            index.insert_keys(index_new, batch, cache, *form)
        else:
            self.compressor.insert_both(new, index, index_new, batch, cache, *form)
        return [new, index_new], parts[4]

    def _append(
        self, kv: Tensor, new: Sequence[CompressorRows], batch: Batch, cache: LayerViews
    ) -> None:
        """Keep what later steps need: the window's rows, and those of each compressor."""
        c, rows = self.config, batch.rows
        at = rows.slot, rows.position, rows.end_position
        ring = c.sliding_window, c.qk_rope_head_dim
        pairs = zip(new, (cache.state, cache.index_state), strict=False)
        states = [(x.kappa, x.gamma, state) for x, state in pairs]
        if "cache_step_append" in self.unfused:
            kv_window_append(kv, cache.window, *at, *ring)
            for state in states:
                compressor_state_append(*state, *at)
            return
        absent = None, None, None
        entries, keys = [*states, absent, absent][:2]
        cache_step_append(kv, cache.window, *entries, *keys, *at, *ring)

    def _attend(
        self, q: Tensor, page: Tensor, batch: Batch, cache: LayerViews, chosen: Tensor | None
    ) -> Tensor:
        """-> [T, H, C], rotated back"""
        c, rows = self.config, batch.rows
        has_entries = cache.entries is not None
        ratio = self.kind.ratio if has_entries else 1
        attend = sparse_attn_prefill if batch.is_prefill else sparse_attn_decode
        is_fused = "sparse_attn_inverse_rope" not in self.unfused
        angles = batch.angles[self.kind] if is_fused else (None, None)
        o = attend(
            q, page, cache.window,
            cache.entries if has_entries else cache.window,
            batch.page_table if has_entries else batch.no_pages, chosen, rows.slot,
            rows.position, rows.first_row, rows.first_position, self.sink,
            *angles, c.head_dim**-0.5, c.sliding_window, c.qk_rope_head_dim,
            ratio, batch.page_tokens // ratio if has_entries else 1,
        )  # fmt: skip
        if not is_fused:
            rope = batch.ropes[self.kind]
            inverse_rope(o, rope.cos, rope.sin, rows.position)
        return o
