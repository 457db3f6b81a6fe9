#!/usr/bin/env python3
"""Runs the gates of a checkpoint, then damages the model and shows that they fail.

python scripts/gates.py                     # dsv4-nano on tier 1: gates and negative controls
python scripts/gates.py --jobs 2            # the same in two processes
python scripts/gates.py --short             # fewer questions, contexts of 2048 tokens
python scripts/gates.py --seed 1            # other contexts, other facts where not all are asked
python scripts/gates.py MODEL --tier 0      # transformers, fewer contexts, no controls
python scripts/gates.py --tier 2 --device cuda   # the production path, with its own controls
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import production_gates
import torch
from damage import MISTAKES
from drafts import completer, show_drafts, shuffled_gates
from gate_measures import FACTS, FEW, FULL, SHORT, Model
from lookback_gates import LookBack
from torch import Tensor

from dsv4.cli.main import tell_errors
from dsv4.cli.model import check_kernel_device
from dsv4.cli.tier0 import TransformersModel
from dsv4.core.config import ModelConfig
from dsv4.core.formats import BlockScaledTensor
from dsv4.loader.checkpoint import Checkpoint
from dsv4.nano import path as nano_path
from dsv4.reference.model import ReferenceModel
from dsv4.reference.simulation import QuantSimulation
from dsv4.testing.gates import build_gates, format_results, load_countries, run_gate
from dsv4.text.tokenizer import Tokenizer

Weights = Mapping[str, Tensor | BlockScaledTensor]


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


def fact_controls(config: ModelConfig, weights: Weights, tokenizer: Tokenizer) -> bool:
    """Damage what every layer has; the capitals must be lost. Returns whether they all were."""
    gate = next(g for g in build_gates(load_countries(FACTS)) if g.name == "capitals")

    def score(damaged: Weights) -> float:
        return run_gate(gate, completer(ReferenceModel(config, damaged)), tokenizer, 24).score

    scores = {"intact": score(weights), "experts swapped": score(swapped_experts(config, weights))}
    with MISTAKES["mHC comb uniform"]():
        scores["mHC comb uniform"] = score(weights)
    print("\nnegative controls (capitals, 24 questions)")
    good = True
    for name, value in scores.items():
        passes = value >= gate.threshold
        expected = passes == (name == "intact")
        good &= expected
        verdict = "passes" if passes else "fails"
        print(f"{name:<24}{value:>7.3f}  {verdict}{', as it must' if expected else ': WRONG'}")
    return good


class Gates:
    """One checkpoint and what is asked of it; the parts print their tables and return a verdict."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.size = SHORT if args.short else FULL if args.tier else FEW
        self.seed, checkpoint = args.seed, Checkpoint.open(args.model)
        self.config = checkpoint.config
        self.weights = checkpoint.load() if args.tier < 2 else {}
        self.tokenizer = Tokenizer.open(args.model)
        torch.manual_seed(args.seed)  # of the random control
        self.model: Model
        own: dict[str, Any] = {}
        if args.tier == 0:
            self.model = TransformersModel(self.config, self.weights)
        elif args.tier == 1:
            simulate = QuantSimulation.cache() if args.simulate_kv_quant else QuantSimulation()
            self.model = ReferenceModel(self.config, self.weights, simulate=simulate)
        else:
            self.model = production_gates.ProductionGatesModel(checkpoint, args)
            own = {"blind": production_gates.BLIND, "dense": production_gates.dense,
                   "cuts_agree": production_gates.BF16_CUTS_AGREE}  # fmt: skip
        self.look_back = LookBack(self.model, self.tokenizer, self.size, self.seed, **own)

    def facts(self) -> bool:
        """The fact gates."""
        results = [
            run_gate(gate, completer(self.model), self.tokenizer, self.size.facts)
            for gate in shuffled_gates(self.seed)
        ]
        print(format_results(results))
        for result in results:
            for miss in result.misses:
                print(f"  {result.name}: {miss}")
        return all(r.passed for r in results)

    def looking_back(self) -> bool:
        """Needles, tallies, places and cuts."""
        self.look_back.gates()
        return self.look_back.good

    def controls(self) -> bool:
        """Attention that cannot look back, mistakes, and damage to what every layer has."""
        self.look_back.controls()
        good = not self.weights or fact_controls(self.config, self.weights, self.tokenizer)
        return good and self.look_back.good

    def mistakes(self) -> bool:
        """Mistakes an implementation could make; and how good the drafts of the MTP block are."""
        self.look_back.mistakes()
        if isinstance(self.model, ReferenceModel) and self.model.mtp:
            show_drafts(self.model, self.tokenizer, self.look_back)
        return self.look_back.good


def run_part(name: str, args: argparse.Namespace) -> tuple[str, bool]:
    """What a part prints, and its verdict; for a process of its own."""
    out = StringIO()
    with redirect_stdout(out):
        good = getattr(Gates(args), name)()
    return out.getvalue(), good


def main() -> int:
    """Command line; the exit code is 1 unless every gate passes and every control fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=nano_path())
    parser.add_argument("--short", action="store_true", help="fewer questions, shorter contexts")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="other contexts and orders")
    parser.add_argument("--tier", type=int, choices=(0, 1, 2), default=1,
                        help="0: transformers, 2: the production path")  # fmt: skip
    parser.add_argument("--device", default="cuda", help="of tier 2, which needs a GPU "
                        "(default cuda); cpu under TRITON_INTERPRET=1, very slowly")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--simulate-kv-quant", action="store_true", help="as the official cache")
    args, began = parser.parse_args(), time.perf_counter()
    if args.tier == 2:
        check_kernel_device(args.device, has_other_tiers=True)
    parts = ["facts", "looking_back"]
    if args.tier and not args.no_controls:
        parts += ["controls"] if args.short or args.tier == 2 else ["controls", "mistakes"]
    good = True
    if args.jobs == 1:
        gates = Gates(args)
        for part in parts:
            good &= getattr(gates, part)()
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            for future in [pool.submit(run_part, part, args) for part in parts]:
                text, passed = future.result()
                print(text, end="", flush=True)
                good &= passed
    print(f"\n{time.perf_counter() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    tell_errors()
    sys.exit(main())
