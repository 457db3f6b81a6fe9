"""Matrices in the precision they are stored in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.core.formats import BlockScaledTensor
from dsv4.layers.weights import WeightView
from dsv4.ops.linear import linear_fp8, wide_linear


@dataclass(frozen=True)
class Fp8Linear:
    """y = W x with FP8 block-scaled W.

    weight, scale   as the checkpoint stores them
    groups          each group of columns meets its own rows
    quantize_input  round x to FP8 as well (W8A8)
    """

    weight: Tensor
    scale: Tensor
    groups: int = 1
    quantize_input: bool = False

    @classmethod
    def of(cls, weight: BlockScaledTensor, groups: int = 1) -> Fp8Linear:
        """The layer of a stored weight."""
        return cls(weight.data, weight.scale, groups)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, groups K] BF16 -> [T, N] BF16"""
        return linear_fp8(x, self.weight, self.scale, self.groups, self.quantize_input)


@dataclass(frozen=True)
class WideLinear:
    """y = W x with BF16 W and an FP32 result."""

    weight: Tensor

    @classmethod
    def of(cls, w: WeightView, name: str) -> WideLinear:
        """The layer of weight `name`."""
        return cls(w[f"{name}.weight"])

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] BF16 -> [T, N] FP32"""
        return wide_linear(x, self.weight)
