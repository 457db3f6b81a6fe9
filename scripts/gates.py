#!/usr/bin/env python3
"""Runs the gates of a checkpoint on tier 1, then damages the model and shows that they fail.

python scripts/gates.py                     # dsv4-nano: gates and negative controls
python scripts/gates.py MODEL --no-controls
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.formats import BlockScaledTensor
from dsv4.loader.checkpoint import Checkpoint
from dsv4.nano import path as nano_path
from dsv4.reference import layer as reference_layer
from dsv4.reference.model import ReferenceModel
from dsv4.reference.simulation import QuantSimulation
from dsv4.testing.gates import Gate, build_gates, format_results, load_countries, run_gate
from dsv4.text.tokenizer import Tokenizer

Weights = Mapping[str, Tensor | BlockScaledTensor]
CONTROL_GATE = "capitals"
CONTROL_PROMPTS = 24  # an even sample is enough to show that a broken model fails


def completer(model: ReferenceModel) -> Callable[..., list[int]]:
    """Greedy decoding on tier 1, one token a step after the prefill."""

    def complete(
        prompt: list[int], max_new: int, stop: Callable[[Sequence[int]], bool]
    ) -> list[int]:
        cache, new, ids = model.new_cache(), [], prompt
        while len(new) < max_new:
            logits = model.forward(torch.tensor(ids), cache, last_only=True)
            new.append(int(logits[-1].argmax()))
            if stop(new):
                break
            ids = new[-1:]
        return new

    return complete


@contextmanager
def patched(name: str, replacement: Any) -> Iterator[None]:
    """Replace one function that the reference layer calls."""
    original = getattr(reference_layer, name)
    setattr(reference_layer, name, replacement)
    try:
        yield
    finally:
        setattr(reference_layer, name, original)


def uniform_comb(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """mHC that mixes all streams equally."""
    pre, post, comb = _MHC(*args)
    return pre, post, torch.full_like(comb, 1 / comb.shape[-1])


def reversed_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """RoPE that turns the other way, for queries, keys, entries and the output alike."""
    return _ROPE(x, cos, sin, not inverse)


def swapped_experts(config: ModelConfig, weights: Weights) -> dict[str, Any]:
    """Every routed expert in the place of its neighbour."""
    out = {}
    for name, value in weights.items():
        if ".experts." in name:
            prefix, rest = name.split(".experts.")
            expert, leaf = rest.split(".", 1)
            name = f"{prefix}.experts.{(int(expert) + 1) % config.n_routed_experts}.{leaf}"
        out[name] = value
    return out


_MHC, _ROPE = reference_layer.mhc_split_sinkhorn, reference_layer.apply_rope


def run_controls(config: ModelConfig, weights: Weights, gate: Gate, tokenizer: Tokenizer) -> bool:
    """Damage the model in each way; every gate must fail. Returns whether they all did."""

    def score(damaged: Weights) -> float:
        complete = completer(ReferenceModel(config, damaged))
        return run_gate(gate, complete, tokenizer, CONTROL_PROMPTS).score

    scores = {"intact": score(weights)}
    with patched("mhc_split_sinkhorn", uniform_comb):
        scores["mHC comb uniform"] = score(weights)
    scores["experts swapped"] = score(swapped_experts(config, weights))
    with patched("apply_rope", reversed_rope):
        scores["RoPE sign flipped"] = score(weights)
    print(f"\nnegative controls ({gate.name}, {CONTROL_PROMPTS} questions)")
    good = True
    for name, value in scores.items():
        passes = value >= gate.threshold
        expected = passes == (name == "intact")
        good &= expected
        verdict = "passes" if passes else "fails"
        print(f"{name:<20}{value:>8.3f}  {verdict}{', as it must' if expected else ': WRONG'}")
    return good


def main() -> int:
    """Command line; the exit code is 1 unless every gate passes and every control fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=nano_path())
    parser.add_argument("--limit", type=int, help="questions of each gate (default: all)")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--simulate-kv-quant", action="store_true", help="as the official cache")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    weights, tokenizer = checkpoint.load(), Tokenizer.open(args.model)
    simulate = QuantSimulation.cache() if args.simulate_kv_quant else QuantSimulation()
    complete = completer(ReferenceModel(checkpoint.config, weights, simulate=simulate))
    gates = build_gates(load_countries(nano_path() / "facts.json"))
    began = time.perf_counter()
    results = [run_gate(gate, complete, tokenizer, args.limit) for gate in gates]
    print(format_results(results))
    print(f"{sum(r.count for r in results)} questions in {time.perf_counter() - began:.0f} s")
    for result in results:
        for miss in result.misses:
            print(f"  {result.name}: {miss}")
    passed = all(r.passed for r in results)
    if not args.no_controls:
        gate = next(g for g in gates if g.name == CONTROL_GATE)
        passed &= run_controls(checkpoint.config, weights, gate, tokenizer)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
