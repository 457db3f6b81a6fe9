"""The lightning indexer of a CSA layer: which entries each query attends to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.kv_layout import IndexKeys
from dsv4.core.taps import tap
from dsv4.layers.batch import Batch
from dsv4.layers.compressor import Compressor
from dsv4.layers.linear import Fp8Linear
from dsv4.layers.weights import WeightView
from dsv4.ops.indexer import indexer_scores_topk
from dsv4.ops.norm import inverse_rope


@dataclass(frozen=True)
class IndexerForm:
    """How keys and queries are kept.

    keys        "fp8" or "mxfp4", as the cache stores them
    is_rotated  Hadamard before the rounding
    is_rounded  whether queries are rounded like the keys
    """

    keys: IndexKeys = "fp8"
    is_rotated: bool = True
    is_rounded: bool = True


@dataclass(frozen=True)
class Indexer:
    """Queries from the latent, head weights from the hidden state, keys from its compressor."""

    config: ModelConfig
    name: str
    form: IndexerForm
    wq_b: Fp8Linear
    compressor: Compressor
    is_fused: bool = True

    @classmethod
    def of(
        cls, config: ModelConfig, w: WeightView, form: IndexerForm, name: str,
        unfused: Collection[str] = (),
    ) -> Indexer:  # fmt: skip
        """The indexer whose weights are `w`; `name` is the prefix of its taps."""
        compressor = Compressor(LayerKind.CSA, w["compressor.norm.weight"], config.rms_norm_eps)
        wq_b, is_fused = Fp8Linear.of(w.fp8("wq_b")), "index_query_rope" not in unfused
        return cls(config, name, form, wq_b, compressor, is_fused)

    def choose(self, latent: Tensor, head_weights: Tensor, batch: Batch, pages: Tensor) -> Tensor:
        """Pick each query's entries by their keys, those that the batch completes among them.

        latent        [T, L]
        head_weights  [T, I] FP32 without the factor 1 / sqrt(I J), which changes no order
        ->            [T, topk] int32, ascending, -1 after the last
        """
        c, form, rows = self.config, self.form, batch.rows
        ratio = LayerKind.CSA.ratio
        q = self.wq_b(latent).unflatten(1, (c.index_n_heads, -1))
        rope = batch.ropes[LayerKind.CSA]
        angles = rope.cos, rope.sin
        if not self.is_fused:
            inverse_rope(q, rope.cos, rope.minus_sin, rows.position)
            angles = None, None
        chosen = indexer_scores_topk(
            q, head_weights, pages, batch.page_table, rows.slot, rows.position,
            ratio, batch.page_tokens // ratio, c.index_topk, form.keys, form.is_rotated,
            form.is_rounded, *angles,
        )  # fmt: skip
        tap(f"{self.name}.topk", chosen)
        return chosen
