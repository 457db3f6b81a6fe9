"""The golden checkpoint and results of the official code, for the tests of the oracles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4.core.taps import capture
from dsv4.loader import Checkpoint
from dsv4.reference.model import ReferenceModel
from dsv4.reference.simulation import QuantSimulation

FOLDER = Path(__file__).parents[1] / "data" / "golden_small"
PREFILL, STRIDE = 130, 7  # decode_logits: prefill of 130 tokens, then every 7th step


@dataclass(frozen=True)
class Run:
    """What one model makes of the golden ids."""

    logits: Tensor  # [300, V]
    mtp_logits: Tensor  # [60, V], positions 0, 5, 10, ...
    taps: dict[str, Tensor]


@cache
def golden(name: str) -> dict[str, Tensor]:
    """The tensors of golden_<name>.safetensors."""
    return load_file(FOLDER / f"golden_{name}.safetensors")


@cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(FOLDER)


@cache
def stored_weights() -> dict:
    return checkpoint().load()


def model(
    simulate: QuantSimulation | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ReferenceModel:
    return ReferenceModel(checkpoint().config, stored_weights(), dtype, simulate, device=device)


def run(m: ReferenceModel) -> Run:
    """One prefill of the golden ids, and the MTP block on its streams."""
    ids = golden("exact")["ids"]
    cache_ = m.new_cache()
    with capture(["layers.*.streams"]) as cap:
        streams = m.forward_streams(ids, cache_)
        logits = m.logits(streams)
        mtp = m.forward_mtp(streams[:-1], ids[1:], cache_)
    return Run(logits, mtp[::5], cap.tensors())


def decode(m: ReferenceModel, steps: int = 170) -> Tensor:
    """Prefill of 130 tokens, then one token a step; every 7th step's logits."""
    ids = golden("exact")["ids"]
    cache_ = m.new_cache()
    m.forward(ids[:PREFILL], cache_, last_only=True)
    rows = [m.forward(ids[p : p + 1], cache_) for p in range(PREFILL, PREFILL + steps)]
    return torch.cat(rows[::STRIDE])
