"""Windows of tokens into compressed entries, in pages: of the attention, and of the indexer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.storage import LayerViews
from dsv4.core.config import LayerKind
from dsv4.core.kv_layout import IndexKeys
from dsv4.layers.batch import Batch
from dsv4.layers.weights import WeightView
from dsv4.ops.cache import compressor_insert, entry_and_key_insert, index_key_insert
from dsv4.ops.linear import joined_wide_linear, wide_linear


@dataclass(frozen=True)
class CompressorRows:
    """What each token contributes: kappa (values) and gamma (scores), [T, width] FP32."""

    kappa: Tensor
    gamma: Tensor


@dataclass(frozen=True)
class Projections:
    """The BF16 matrices that share the hidden state, as one: compressors, index head weights.

    weight  [N, D] wkv and wgate of each compressor, then weights_proj
    bias    [r, N] FP32: `ape` for the rows of wgate, zeros elsewhere
    parts   rows of each
    """

    weight: Tensor
    bias: Tensor
    parts: list[int]
    is_fused: bool

    @classmethod
    def of(
        cls, compressors: Sequence[WeightView], weights_proj: Tensor | None, is_fused: bool
    ) -> Projections:
        """Of one compressor (HCA), or of two and the head weights (CSA)."""
        matrices, biases = [], []
        for w in compressors:
            matrices += [w["wkv.weight"], w["wgate.weight"]]
            biases += [torch.zeros_like(w["ape"]), w["ape"]]
        if weights_proj is not None:
            matrices.append(weights_proj)
            biases.append(biases[0].new_zeros(len(biases[0]), len(weights_proj)))
        parts = [len(m) for m in matrices]
        return cls(torch.cat(matrices), torch.cat(biases, dim=1), parts, is_fused)

    def __call__(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """x [T, D] -> [T, rows] FP32 of each part"""
        position = batch.rows.position
        if self.is_fused:
            flat = joined_wide_linear(x, self.weight, self.bias, position, self.parts)
            cuts = flat.split([len(x) * rows for rows in self.parts])
            return [part.view(len(x), -1) for part in cuts]
        bias = self.bias[position % len(self.bias)].split(self.parts, dim=1)
        weights = self.weight.split(self.parts)
        return [wide_linear(x, w) + b for w, b in zip(weights, bias, strict=True)]


@dataclass(frozen=True)
class Compressor:
    """Norm and pages of what the projections give; the same for entries and for index keys."""

    kind: LayerKind
    norm: Tensor
    eps: float

    def insert_entries(self, new: CompressorRows, batch: Batch, cache: LayerViews) -> None:
        """Write the entry of every window that a token of the batch completes."""
        own, angles, at = self._own(new, cache.state), self._angles(batch), self._at(batch)
        compressor_insert(*own, *angles, cache.entries, *at)

    def insert_keys(
        self, new: CompressorRows, batch: Batch, cache: LayerViews, keys: IndexKeys,
        is_rotated: bool,
    ) -> None:  # fmt: skip
        """Write the indexer's key of every window that a token of the batch completes."""
        own, angles, at = self._own(new, cache.index_state), self._angles(batch), self._at(batch)
        index_key_insert(*own, *angles, cache.index_keys, *at, keys, is_rotated)

    def insert_both(
        self, new: CompressorRows, index: Compressor, index_new: CompressorRows, batch: Batch,
        cache: LayerViews, keys: IndexKeys, is_rotated: bool,
    ) -> None:  # fmt: skip
        """`insert_entries` of this one and `insert_keys` of `index`, at once."""
        entry_and_key_insert(
            *self._own(new, cache.state), cache.entries,
            *index._own(index_new, cache.index_state), cache.index_keys,
            *self._angles(batch), *self._at(batch), keys, is_rotated,
        )  # fmt: skip

    def _own(self, new: CompressorRows, state: Tensor | None) -> tuple:
        return new.kappa, new.gamma, state, self.norm

    def _angles(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rope = batch.ropes[self.kind]
        return rope.entry_cos, rope.entry_sin

    def _at(self, batch: Batch) -> tuple:
        rows, ratio = batch.rows, self.kind.ratio
        return (
            batch.page_table, rows.slot, rows.position, rows.first_row, rows.first_position,
            ratio, batch.page_tokens // ratio, self.eps, batch.dtype,
        )  # fmt: skip
