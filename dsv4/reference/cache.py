"""The contiguous cache of the reference: what a paged cache has to mean."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.reference.compressor import CompressorState


@dataclass
class LayerCache:
    """What one layer remembers of one sequence.

    length       tokens seen
    window       [n, C] keys of the last min(length, window - 1) tokens, after norm, RoPE, quantiser
    entries      [S, C] compressed entries, S = length // ratio; None for SWA
    compressor   rows of the open window; None for SWA
    index_keys   [S, J] indexer keys, CSA only
    index_compressor  state of the indexer's own compressor, CSA only
    """

    window: Tensor
    length: int = 0
    entries: Tensor | None = None
    compressor: CompressorState | None = None
    index_keys: Tensor | None = None
    index_compressor: CompressorState | None = None

    @classmethod
    def empty(
        cls, config: ModelConfig, kind: LayerKind, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """A layer that has seen nothing."""
        C, J = config.head_dim, config.index_head_dim
        rows = torch.zeros(0, C, dtype=dtype, device=device)
        if kind is LayerKind.SWA:
            return cls(rows)
        if kind is LayerKind.HCA:
            return cls(rows, entries=rows, compressor=CompressorState.empty(C, rows))
        return cls(
            rows,
            entries=rows,
            compressor=CompressorState.empty(2 * C, rows),
            index_keys=torch.zeros(0, J, dtype=dtype, device=device),
            index_compressor=CompressorState.empty(2 * J, rows),
        )

    def extend_window(self, kv: Tensor, window: int) -> tuple[Tensor, int]:
        """Append the keys of new tokens; return the rows they may look at and row 0's position.

        kv [T, C] -> rows [n + T, C]; the cache keeps the last window - 1 of them.
        """
        rows = torch.cat((self.window, kv))
        first = self.length - len(self.window)
        self.window = rows[max(len(rows) - (window - 1), 0) :].clone()  # not a view of all rows
        self.length += len(kv)
        return rows, first


@dataclass
class ModelCache:
    """The caches of all trunk layers and MTP blocks of one sequence; both grow by concatenation."""

    layers: list[LayerCache]
    mtp: list[LayerCache] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens the trunk has seen."""
        return self.layers[0].length
