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


class RopeTables:
    """A table for each kind of layer that a model has; CSA and HCA share their angles."""

    def __init__(
        self, config: ModelConfig, max_context: int, device: torch.device | str = "cpu"
    ) -> None:
        count = config.num_hidden_layers
        kinds = {config.layer_kind(j) for j in range(count)} - {LayerKind.SWA}
        self.max_context = max_context
        plain = _tables(config, LayerKind.SWA, max_context, device)
        self._tables = {LayerKind.SWA: RopeTable(*plain, None, None)}
        if not kinds:
            return
        cos, sin, minus_sin = _tables(config, LayerKind.CSA, max_context, device)
        for kind in kinds:
            entries = cos[:: kind.ratio].contiguous(), sin[:: kind.ratio].contiguous()
            self._tables[kind] = RopeTable(cos, sin, minus_sin, *entries)

    def angles(self, position: Tensor) -> dict[LayerKind, tuple[Tensor, Tensor]]:
        """cos, sin [T, R/2] of positions [T] for each kind; kinds that share a table share them."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for table in self._tables.values():
            if id(table.cos) not in found:
                found[id(table.cos)] = table.cos[position], table.sin[position]
        return {kind: found[id(table.cos)] for kind, table in self._tables.items()}

    def __getitem__(self, kind: LayerKind) -> RopeTable:
        return self._tables[kind]


def _tables(
    config: ModelConfig, kind: LayerKind, max_context: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin and -sin of positions 0 .. max_context - 1."""
    position = torch.arange(max_context, device=device)
    angles = rope_angles(position, layer_frequencies(config, kind))
    cos, sin = angles.cos().float(), angles.sin().float()
    return cos, sin, -sin
