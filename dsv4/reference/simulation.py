"""Which roundings of the quantised runtime the reference imitates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.reference.quant import (
    hadamard,
    simulate_fp8,
    simulate_index_fp8,
    simulate_mxfp4,
    simulate_nvfp4,
)

KV_GROUP = 64  # nope dims that share one scale in a KV record
KV = ("none", "bf16", "fp8", "fp8_record", "fp8_all", "nvfp4_record")
INDEXER = ("none", "mxfp4", "fp8")


@dataclass(frozen=True)
class QuantSimulation:
    """Switches; all off is exact arithmetic on the dequantised weights.

    kv           how window keys and compressed entries are kept, see below
    indexer      "none", "mxfp4" or "fp8": round indexer queries and keys
    hadamard     rotate indexer queries and keys; changes nothing unless they are rounded
    activations  round the input of FP8 and FP4 linears to FP8, per token and 128 channels

    kv               nope dims                     RoPE dims
    "none"           as they are                   as they are
    "bf16"           BF16                          BF16
    "fp8"            FP8, a UE8M0 scale per 64     as they are: the official code
    "fp8_record"     FP8, a UE8M0 scale per 64     BF16: the 584 bytes of the paged cache
    "fp8_all"        FP8, a UE8M0 scale per 64     FP8, one scale
    "nvfp4_record"   NVFP4, one FP32 scale a row   BF16: 384 bytes; no cache here keeps it
    """

    kv: str = "none"
    indexer: str = "none"
    hadamard: bool = False
    activations: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (("kv", self.kv, KV), ("indexer", self.indexer, INDEXER)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")

    @classmethod
    def cache(cls) -> QuantSimulation:
        """The official cache: FP8 keys and values; indexer in MXFP4 after a Hadamard rotation."""
        return cls(kv="fp8", indexer="mxfp4", hadamard=True)

    @classmethod
    def official(cls) -> QuantSimulation:
        """Everything the official runtime rounds: the cache and the inputs of quantised linears."""
        return cls(kv="fp8", indexer="mxfp4", hadamard=True, activations=True)

    def round_kv(self, kv: Tensor, rope_dim: int) -> Tensor:
        """Round a key after norm and RoPE, as `kv` says; the trailing dims are those of RoPE.

        kv [T, C] -> [T, C]
        """
        if self.kv == "none":
            return kv
        if self.kv == "bf16":
            return _bf16(kv)
        nope, rope = kv.split([kv.shape[-1] - rope_dim, rope_dim], dim=-1)
        is_nvfp4 = self.kv == "nvfp4_record"
        nope = simulate_nvfp4(nope) if is_nvfp4 else simulate_fp8(nope, KV_GROUP)
        if self.kv == "fp8_all":
            rope = simulate_fp8(rope, rope_dim)
        elif self.kv.endswith("_record"):
            rope = _bf16(rope)
        return torch.cat((nope, rope), dim=-1)

    def round_index(self, x: Tensor) -> Tensor:
        """Round an indexer query or key after RoPE.

        x [..., J] -> [..., J]
        """
        if self.hadamard:
            x = hadamard(x)
        if self.indexer == "mxfp4":
            return simulate_mxfp4(x)
        return simulate_index_fp8(x) if self.indexer == "fp8" else x


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)
