"""Which roundings of the quantised runtime the reference imitates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.reference.quant import hadamard, simulate_fp8, simulate_index_fp8, simulate_mxfp4

KV_GROUP = 64  # nope dims that share one scale in a KV record


@dataclass(frozen=True)
class QuantSimulation:
    """Switches; all off is exact arithmetic on the dequantised weights.

    kv           round the nope dims of window keys and compressed entries to FP8 (as the cache)
    indexer      "none", "mxfp4" or "fp8": round indexer queries and keys
    hadamard     rotate indexer queries and keys; changes nothing unless they are rounded
    activations  round the input of FP8 and FP4 linears to FP8, per token and 128 channels
    """

    kv: bool = False
    indexer: str = "none"
    hadamard: bool = False
    activations: bool = False

    def __post_init__(self) -> None:
        if self.indexer not in ("none", "mxfp4", "fp8"):
            raise ValueError(f"indexer: expected 'none', 'mxfp4' or 'fp8', got {self.indexer!r}")

    @classmethod
    def cache(cls) -> QuantSimulation:
        """The official cache: FP8 keys and values; indexer in MXFP4 after a Hadamard rotation."""
        return cls(kv=True, indexer="mxfp4", hadamard=True)

    @classmethod
    def official(cls) -> QuantSimulation:
        """Everything the official runtime rounds: the cache and the inputs of quantised linears."""
        return cls(kv=True, indexer="mxfp4", hadamard=True, activations=True)

    def round_kv(self, kv: Tensor, rope_dim: int) -> Tensor:
        """Round a key after norm and RoPE; the trailing rope dims stay as they are.

        kv [T, C] -> [T, C]
        """
        if not self.kv:
            return kv
        nope, rope = kv.split([kv.shape[-1] - rope_dim, rope_dim], dim=-1)
        return torch.cat((simulate_fp8(nope, KV_GROUP), rope), dim=-1)

    def round_index(self, x: Tensor) -> Tensor:
        """Round an indexer query or key after RoPE.

        x [..., J] -> [..., J]
        """
        if self.hadamard:
            x = hadamard(x)
        if self.indexer == "mxfp4":
            return simulate_mxfp4(x)
        return simulate_index_fp8(x) if self.indexer == "fp8" else x
