"""Tier 1 on dsv4-nano on this machine's CPU: tokens/s of prefill and decode, load time, memory.

    python benchmarks/nano_cpu.py [--json FILE]      (`make bench`)

Prefill is one call; decode is timed after contexts of several lengths, so that a cost that grows
with the context shows. Median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import dsv4.nano
from dsv4.loader import Checkpoint
from dsv4.reference.model import ReferenceModel

PREFILL, CONTEXTS, STEPS, REPEATS = (128, 1024, 4096), (128, 1024, 4096), 32, 3


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def row(phase: str, shape: dict[str, int], tps: float) -> dict[str, object]:
    print(f"{phase:8} {shape!s:20} {tps:8.1f} tokens/s")
    return {
        "op": "nano_cpu", "shape": {"phase": phase, **shape}, "tps": round(tps, 1),
        "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="append the rows to this file, one object a line")
    args = parser.parse_args()

    started = time.perf_counter()
    checkpoint = Checkpoint.open(dsv4.nano.path())
    model = ReferenceModel(checkpoint.config, checkpoint.load())
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (max(PREFILL) + STEPS,), generator=rng)
    model.forward(ids[:8], model.new_cache())
    print(f"load and first call {time.perf_counter() - started:.2f} s")
    rows = []
    for n in PREFILL:
        times = [
            seconds(partial(model.forward, ids[:n], model.new_cache(), last_only=True))
            for _ in range(REPEATS)
        ]
        rows.append(row("prefill", {"T": n}, n / statistics.median(times)))
    for n in CONTEXTS:
        cache = model.new_cache()
        model.forward(ids[:n], cache, last_only=True)
        step = partial(model.forward, cache=cache)
        times = [seconds(partial(step, token)) for token in ids[n : n + STEPS].split(1)]
        rows.append(row("decode", {"context": n}, 1 / statistics.median(times)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"peak memory {peak:.0f} MiB, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in rows)


if __name__ == "__main__":
    main()
