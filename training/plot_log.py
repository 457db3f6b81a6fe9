"""Draws the curves of one training log: losses on the left, gate accuracies on the right.

python -m training.plot_log training/logs/facts.jsonl      # writes facts.png beside it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LOSSES = ("loss", "answers", "indexer_kl")
NOT_GATES = {*LOSSES, "step", "seconds", "norm", "imbalance", "tokens_per_second", "final"}


def curve(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have `key`."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [value for _, value in points]


def main() -> None:
    """Command line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.log.read_text().splitlines()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5), dpi=110)
    for key in LOSSES:
        left.plot(*curve(rows, key), label=key)
    left.set(xlabel="step", title="losses", yscale="log")
    for key in sorted({k for row in rows for k in row} - NOT_GATES):
        right.plot(*curve(rows, key), marker="o", markersize=3, label=key)
    right.set(xlabel="step", title="gates during training", ylim=(-0.02, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(args.log.with_suffix(".png"))


if __name__ == "__main__":
    main()
