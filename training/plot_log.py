"""Draws the curves of training logs, one after the other: losses, facts gates, looking back.

python -m training.plot_log training/logs/facts.jsonl      # writes facts.png beside it
python -m training.plot_log training/logs/{near,middle,far_first,far,careful,last}.jsonl \
    --out training/logs/lookback.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LOSSES = ("loss", "answers", "indexer_kl", "needles", "tally_loss", "place_loss")
FACTS = ("paris", "capitals", "currencies", "continents", "chat")
FORMS = ("direct", "shifted", "sentence", "digits", "tally", "tally, HCA empty", "place")


def read_logs(paths: list[Path]) -> list[dict[str, Any]]:
    """Rows of all logs; the steps of each go on from the last of the one before."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        start = rows[-1]["step"] if rows else 0
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows.append(row | {"step": row["step"] + start})
    return rows


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
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--out", help="file name beside the first log")
    args = parser.parse_args()
    rows = read_logs(args.logs)
    panels = [("losses", LOSSES), ("gates during training", FACTS)]
    if any("needles" in row for row in rows):
        panels.append(("found, beyond 768 tokens", FORMS))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), dpi=110)
    for ax, (title, keys) in zip(axes, panels, strict=True):
        for key in keys:
            if any(key in row for row in rows):
                ax.plot(*curve(rows, key), marker="" if title == "losses" else ".", label=key)
        ax.set(xlabel="step", title=title)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    axes[0].set_yscale("log")
    figure.tight_layout()
    figure.savefig(args.logs[0].with_name(args.out or args.logs[0].stem + ".png"))


if __name__ == "__main__":
    main()
