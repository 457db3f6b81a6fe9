"""Cosines and sines of every position, made once: kernels look them up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.rope import layer_frequencies, rope_angles


@dataclass(frozen=True)
class RopeTable:
    """FP32 tables of the layers of one kind, R rotated dims.

    cos, sin  [S, R/2]  row p is for position p
    minus_sin [S, R/2]  what makes an inverse rotation a forward one
    entry_cos, entry_sin  [S / ratio, R/2]  row w is for position w * ratio; None for SWA
    """

    cos: Tensor
    sin: Tensor
    minus_sin: Tensor
    entry_cos: Tensor | None
    entry_sin: Tensor | None

    @classmethod
    def of(
        cls, config: ModelConfig, kind: LayerKind, max_context: int, device: torch.device | str
    ) -> RopeTable:
        """The table for positions 0 .. max_context - 1."""
        position = torch.arange(max_context, device=device)
        angles = rope_angles(position, layer_frequencies(config, kind))
        cos, sin = angles.cos().float(), angles.sin().float()
        if kind is LayerKind.SWA:
            return cls(cos, sin, -sin, None, None)
        entries = cos[:: kind.ratio].contiguous(), sin[:: kind.ratio].contiguous()
        return cls(cos, sin, -sin, *entries)


class RopeTables:
    """A table for each kind of layer that a model has; CSA and HCA share their angles."""

    def __init__(
        self, config: ModelConfig, max_context: int, device: torch.device | str = "cpu"
    ) -> None:
        count = config.num_hidden_layers
        kinds = {LayerKind.SWA, *(config.layer_kind(j) for j in range(count))}
        self.max_context = max_context
        self._tables = {k: RopeTable.of(config, k, max_context, device) for k in kinds}

    def __getitem__(self, kind: LayerKind) -> RopeTable:
        return self._tables[kind]

    def __iter__(self):
        return iter(self._tables)
