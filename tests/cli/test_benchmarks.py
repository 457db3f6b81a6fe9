"""Benchmarks beside those of kernels, tried at tiny widths."""

import json
import subprocess
import sys
from pathlib import Path

from dsv4.core.config import ModelConfig

ROOT = Path(__file__).parents[2]


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_transformers_step(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    flags = "--device", "cpu", "--tiny", "--context", "130", "--no-compile", "--json", str(rows)
    done = run("transformers_step.py", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert (row["op"], row["baseline"], row["us"]) == ("decode_step", "transformers", None)
    layers = row["layer_us"]
    assert [name.split()[0] for name in layers] == [
        "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
        "compressed_sparse_attention",
    ]  # fmt: skip
    counts = 2, 1, 20, 20
    assert sum(counts) == ModelConfig.flash().num_hidden_layers == row["shape"]["layers"]
    all_layers = sum(n * us for n, us in zip(counts, layers.values(), strict=True))
    assert all_layers < row["baseline_us"] < all_layers + 1e6
