"""Windows of tokens into compressed entries, in pages: of the attention, and of the indexer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.core.config import LayerKind
from dsv4.core.kv_layout import IndexKeys
from dsv4.layers.batch import Batch
from dsv4.layers.linear import WideLinear
from dsv4.layers.weights import WeightView
from dsv4.ops.cache import compressor_insert, compressor_state_append, index_key_insert


@dataclass(frozen=True)
class CompressorRows:
    """What each token contributes: kappa (values) and gamma (scores), [T, width] FP32."""

    kappa: Tensor
    gamma: Tensor


@dataclass(frozen=True)
class Compressor:
    """wkv and wgate share their input; `ape` is the score's bias by place in the window."""

    kind: LayerKind
    wkv: WideLinear
    wgate: WideLinear
    ape: Tensor
    norm: Tensor
    eps: float

    @classmethod
    def of(cls, w: WeightView, kind: LayerKind, eps: float) -> Compressor:
        """The compressor whose weights are `w`."""
        wkv, wgate = WideLinear.of(w, "wkv"), WideLinear.of(w, "wgate")
        return cls(kind, wkv, wgate, w["ape"], w["norm.weight"], eps)

    def rows(self, x: Tensor, batch: Batch) -> CompressorRows:
        """x [T, D] -> the rows of the batch's tokens."""
        bias = self.ape[batch.rows.position % self.kind.ratio]
        return CompressorRows(self.wkv(x), self.wgate(x) + bias)

    def insert_entries(
        self, new: CompressorRows, batch: Batch, state: Tensor, pages: Tensor, per_page: int
    ) -> None:
        """Write the entry of every window that a token of the batch completes."""
        compressor_insert(*self._args(new, batch, state, pages, per_page))

    def insert_keys(
        self, new: CompressorRows, batch: Batch, state: Tensor, pages: Tensor, per_page: int,
        keys: IndexKeys, is_rotated: bool,
    ) -> None:  # fmt: skip
        """Write the indexer's key of every window that a token of the batch completes."""
        args = self._args(new, batch, state, pages, per_page)
        index_key_insert(*args, keys, is_rotated)

    def append(self, new: CompressorRows, batch: Batch, state: Tensor) -> None:
        """Keep the rows for later windows: after the inserts, which read what this overwrites."""
        rows = batch.rows
        compressor_state_append(
            new.kappa, new.gamma, state, rows.slot, rows.position, rows.end_position
        )

    def _args(
        self, new: CompressorRows, batch: Batch, state: Tensor, pages: Tensor, per_page: int
    ) -> tuple:
        rows, rope = batch.rows, batch.ropes[self.kind]
        return (
            new.kappa, new.gamma, state, self.norm, rope.entry_cos, rope.entry_sin, pages,
            batch.page_table, rows.slot, rows.position, rows.first_row, rows.first_position,
            self.kind.ratio, per_page, self.eps, batch.dtype,
        )  # fmt: skip
