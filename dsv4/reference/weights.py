"""The parameters of a checkpoint in the precision that the reference computes with."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from dsv4.core.formats import BlockScaledTensor
from dsv4.reference.precision import wide_dtype
from dsv4.reference.quant import dequantize

# Parameters that enter GEMMs in the activation dtype; everything else is used in FP32.
_GEMM_LEAVES = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj",
                "weights_proj", "embed")  # fmt: skip


def is_gemm_weight(name: str) -> bool:
    """Whether parameter `name` multiplies in the activation dtype; the others stay FP32."""
    if ".compressor." in name or not name.endswith(".weight"):
        return False
    return name.split(".")[-2] in _GEMM_LEAVES


def resident_bytes(
    stored: Mapping[str, Tensor | BlockScaledTensor], dtype: torch.dtype, keep_packed: bool = False
) -> int:
    """Memory that a model needs for `stored` once every parameter has been used."""
    total = 0
    for name, value in stored.items():
        if isinstance(value, BlockScaledTensor):
            rows, columns = value.shape
            is_packed = keep_packed and ".experts." in name
            total += value.nbytes if is_packed else rows * columns * dtype.itemsize
        else:
            size = _target(name, value, dtype).itemsize
            total += value.numel() * size
    return total


class Weights:
    """A view of the parameters below one prefix, each converted once when it is first needed.

    stored   official name -> Tensor or BlockScaledTensor, as the loader gives it
    dtype    activation dtype of the GEMMs: float64, float32 or bfloat16
    keep_packed  leave routed experts quantised and dequantise them at every use: slower, but the
                 model takes little more memory than the checkpoint
    device   where the model computes
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor | BlockScaledTensor],
        dtype: torch.dtype,
        keep_packed: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        # Shared by all views; what has been converted is let go: no parameter is held twice.
        self._stored, self._ready = dict(stored), dict[str, Tensor]()
        self._dtype, self._keep_packed, self._prefix = dtype, keep_packed, ""
        self._device = torch.device(device)

    def at(self, prefix: str) -> Weights:
        """The parameters below `prefix` of this view."""
        view = copy(self)
        view._prefix = f"{self._prefix}{prefix}."
        return view

    def __contains__(self, name: str) -> bool:
        name = self._prefix + name
        return name in self._ready or name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        name = self._prefix + name
        ready = self._ready.get(name)
        if ready is None:
            ready = self._convert(name)
            if not (self._keep_packed and ".experts." in name):
                self._ready[name] = ready
                del self._stored[name]
        return ready

    def _convert(self, name: str) -> Tensor:
        stored = self._stored[name]
        if isinstance(stored, BlockScaledTensor):
            return dequantize(_on(stored, self._device), self._dtype)
        return stored.to(device=self._device, dtype=_target(name, stored, self._dtype))


def _target(name: str, stored: Tensor, dtype: torch.dtype) -> torch.dtype:
    if not stored.is_floating_point():
        return stored.dtype
    return dtype if is_gemm_weight(name) else wide_dtype(dtype)


def _on(t: BlockScaledTensor, device: torch.device) -> BlockScaledTensor:
    share = None if t.global_scale is None else t.global_scale.to(device)
    return replace(t, data=t.data.to(device), scale=t.scale.to(device), global_scale=share)
