#!/usr/bin/env python3
"""Measures what each rounding costs dsv4-nano, and prints the tables of docs/numerics.md.

python scripts/numerics.py --jobs 2     # all variants and gates
python scripts/numerics.py --quick      # a few variants, one short text, few questions
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from drafts import shuffled_gates
from gate_measures import FAR, TALLY
from numerics_measures import BLOCKS, Figures, measure, texts
from numerics_variants import FULL, IN_QUICK, QUICK, REFERENCE, VARIANTS, Amount, Variant

Rows = Sequence[tuple[Variant, Figures]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def error_table(rows: Rows, title: str, shown: Callable[[float], str], is_cosine: bool) -> str:
    """A line for each variant, a column for each kind of block: worst / median."""

    def cell(found: Figures, block: str) -> str:
        values = [cosine if is_cosine else rms for cosine, rms in found.errors[block]]
        worst = min(values) if is_cosine else max(values)
        return f"{shown(worst)} / {shown(median(values))}"

    body = [[v.name, *(cell(f, b) for b in BLOCKS)] for v, f in rows if v is not REFERENCE]
    return table([title, *BLOCKS], body)


def whole_table(rows: Rows) -> str:
    """What comes out: choices of the indexer, best words, KL, loss."""
    base = rows[0][1].loss
    body = [
        [v.name, f"{min(f.chosen):.3f} / {median(f.chosen):.3f}", f"{100 * f.same_word:.2f} %",
         number(f.kl), f"{100 * (f.loss / base - 1):+.2f} %"] for v, f in rows
    ]  # fmt: skip
    return table(["the whole", "same top-k", "same best word", "KL, nats", "loss"], body)


def gate_table(rows: Rows) -> str:
    """Right answers; what misses the gate's limit is bold."""
    counts = {name: score.count for name, score in rows[0][1].gates.items()}
    needs = {g.name: g.threshold for g in shuffled_gates(0)} | {"tally": TALLY}

    def cell(found: Figures, name: str) -> str:
        score = found.gates[name]
        return str(score.right) if score.share >= needs.get(name, FAR) else f"**{score.right}**"

    head = ["right answers", *(f"{name} (of {count})" for name, count in counts.items())]
    body = [[v.name, *(cell(f, name) for name in counts)] for v, f in rows if v.is_asked]
    return table(head, body)


def number(x: float) -> str:
    """Two digits."""
    return f"{x:.1e}" if abs(x) > 1e-12 else "0"


def measured(variants: Sequence[Variant], amount: Amount, jobs: int) -> Rows:
    """The figures of every variant, in processes if `jobs` is more than one."""
    run, rows, began = partial(measure, amount=amount), [], time.perf_counter()
    with ExitStack() as stack:
        each: Any = map
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            each = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=context)).map
        for variant, found in zip(variants, each(run, variants), strict=True):
            rows.append((variant, found))
            print(f"{time.perf_counter() - began:6.0f} s  {variant.name}", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few variants and questions")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args(argv)
    amount = QUICK if args.quick else FULL
    variants = [v for v in VARIANTS if not args.quick or v.name.startswith(IN_QUICK)]
    rows = measured(variants, amount, args.jobs)
    sizes = ", ".join(f"{name} {len(ids)}" for name, ids in texts(amount).items())
    print(f"Texts, tokens: {sizes}. Cells: worst / median over layers and texts.")
    print("\n" + error_table(rows, "relative rms error", number, is_cosine=False))
    print("\n" + error_table(rows, "cosine", "{:.6f}".format, is_cosine=True))
    print("\n" + whole_table(rows))
    print("\n" + gate_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
