"""Put benchmark rows into the baselines of their GPU: `python tools/merge_rows.py ROWS.jsonl ...`

A row takes the place of the one with the same op, shape and state of L2 (a row of another library
has none); numbers are kept to four digits. `--commit` names the commit that brought the measured
code, where the machine that measured had no git.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "baselines"
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file; none of one that is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rounded(value: Any) -> Any:
    """A float to four digits; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def key(row: Row) -> tuple[str, str, str]:
    """What there is one row of."""
    return row["op"], json.dumps(row["shape"], sort_keys=True), row.get("l2", "")


def merged(old: Iterable[Row], new: Iterable[Row], commit: str | None) -> list[Row]:
    """All rows, the newest of each key, in the order in which keys first came."""
    rows = {key(row): row for row in old}
    for row in new:
        about = {"commit": commit} if commit else {}
        rows[key(row)] = {name: rounded(value) for name, value in row.items()} | about
    return list(rows.values())


def file_name(gpu: str) -> str:
    """Of the baselines of a GPU, as torch names it."""
    return gpu.lower().replace(" ", "-") + ".jsonl"


def main() -> None:
    """Merge, and say how many rows came and how many there are."""
    parser = argparse.ArgumentParser(description="Put benchmark rows into the baselines.")
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    by_gpu: dict[str, list[Row]] = {}
    for path in args.rows:
        if not path.exists():
            parser.error(f"{path}: no such file")
        for row in read(path):
            by_gpu.setdefault(row["gpu"], []).append(row)
    for gpu, new in by_gpu.items():
        path = args.folder / file_name(gpu)
        rows = merged(read(path), new, args.commit)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path.name}: {len(new)} rows came, {len(rows)} there are")


if __name__ == "__main__":
    main()
