"""What the numerics study compares: ways to round, and how much is asked of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dsv4.loader.checkpoint import Checkpoint
from dsv4.nano import path as nano_path
from dsv4.reference.expert_formats import requantize_experts
from dsv4.reference.model import ReferenceModel
from dsv4.reference.simulation import QuantSimulation as Rounds


@dataclass(frozen=True)
class Variant:
    """One way to round; the default rounds nothing.

    experts, is_rotated  as `requantize_experts` takes them; "" leaves the experts as stored
    is_asked  whether the gates are asked too: not where a coarser variant answers for this one
    """

    name: str
    rounds: Rounds = field(default_factory=Rounds)
    dtype: torch.dtype = torch.float32
    experts: str = ""
    is_rotated: bool = False
    is_asked: bool = True


@dataclass(frozen=True)
class Amount:
    """How much is asked: tokens of a text, questions of a fact gate (None: all), contexts."""

    length: int
    facts: int | None
    sentences: int
    digits: int
    tallies: int
    places: int


FULL = Amount(length=2304, facts=None, sentences=3, digits=1, tallies=3, places=1)
QUICK = Amount(length=320, facts=1, sentences=1, digits=0, tallies=0, places=0)

REFERENCE = Variant("reference, FP32, nothing rounded")
FP8_KEYS = {"indexer": "fp8", "hadamard": True}
BF16 = torch.bfloat16
VARIANTS = (
    REFERENCE,
    Variant("KV: BF16", Rounds(kv="bf16")),
    Variant("KV: FP8, RoPE part BF16 (584 B)", Rounds(kv="fp8_record")),
    Variant("KV: FP8, RoPE part too", Rounds(kv="fp8_all"), is_asked=False),
    Variant("KV: NVFP4, RoPE part BF16 (384 B)", Rounds(kv="nvfp4_record")),
    Variant("experts: NVFP4, cast", experts="nvfp4_cast", is_asked=False),
    Variant("experts: NVFP4, made anew", experts="nvfp4"),
    Variant("experts: FP8 block", experts="fp8", is_asked=False),
    Variant("experts off the grid: MXFP4", experts="mxfp4", is_rotated=True),
    Variant("experts off the grid: NVFP4", experts="nvfp4", is_rotated=True, is_asked=False),
    Variant("experts off the grid: FP8 block", experts="fp8", is_rotated=True, is_asked=False),
    Variant("activations: 16 bit (all in BF16)", dtype=BF16, is_asked=False),
    Variant("activations: 8 bit (FP8, 1 x 128)", Rounds(activations=True)),
    Variant("index keys: FP8", Rounds(indexer="fp8"), is_asked=False),
    Variant("index keys: FP8, Hadamard", Rounds(**FP8_KEYS), is_asked=False),
    Variant("index keys: MXFP4", Rounds(indexer="mxfp4")),
    Variant("index keys: MXFP4, Hadamard", Rounds(indexer="mxfp4", hadamard=True), is_asked=False),
    Variant("together: tier 2", Rounds(kv="fp8_record", **FP8_KEYS), BF16),
    Variant("together: the official code", Rounds.official(), BF16),
)
IN_QUICK = ("reference", "KV: FP8, RoPE part BF16", "KV: NVFP4", "index keys: MXFP4, Hadamard")


def build(variant: Variant) -> ReferenceModel:
    """nano as the variant computes it."""
    checkpoint = Checkpoint.open(nano_path())
    weights = checkpoint.load()
    if variant.experts:
        weights = requantize_experts(weights, variant.experts, variant.is_rotated)
    return ReferenceModel(checkpoint.config, weights, variant.dtype, variant.rounds)
