"""The parameters of a checkpoint in the precision that the reference computes with."""

from __future__ import annotations

from collections.abc import Mapping

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


class Weights:
    """A view of the parameters below one prefix, each converted once when it is first needed.

    stored   official name -> Tensor or BlockScaledTensor, as the loader gives it
    dtype    activation dtype of the GEMMs: float64, float32 or bfloat16
    keep_packed  leave routed experts quantised and dequantise them at every use: slower, but the
                 model takes little more memory than the checkpoint
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor | BlockScaledTensor],
        dtype: torch.dtype,
        keep_packed: bool = False,
        prefix: str = "",
        _ready: dict[str, Tensor] | None = None,
    ) -> None:
        self._stored, self._dtype, self._keep_packed, self._prefix = (
            stored, dtype, keep_packed, prefix,
        )  # fmt: skip
        self._ready = {} if _ready is None else _ready

    def at(self, prefix: str) -> Weights:
        """The parameters below `prefix` of this view."""
        return Weights(
            self._stored, self._dtype, self._keep_packed, f"{self._prefix}{prefix}.", self._ready
        )

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        name = self._prefix + name
        ready = self._ready.get(name)
        if ready is None:
            ready = self._convert(name)
            if not (self._keep_packed and ".experts." in name):
                self._ready[name] = ready
        return ready

    def _convert(self, name: str) -> Tensor:
        stored = self._stored[name]
        if isinstance(stored, BlockScaledTensor):
            return dequantize(stored, self._dtype)
        if not stored.is_floating_point():
            return stored
        return stored.to(self._dtype if is_gemm_weight(name) else wide_dtype(self._dtype))
