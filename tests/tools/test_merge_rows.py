"""tools/merge_rows.py: the newest row of each key, nothing else lost."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOL = Path(__file__).resolve().parents[2] / "tools" / "merge_rows.py"
GPU = "NVIDIA H200"


def row(op: str, us: float, l2: str = "cold", **shape: Any) -> dict[str, Any]:
    return {"op": op, "shape": shape, "us": us, "l2": l2, "gpu": GPU, "commit": "unknown"}


def merge(folder: Path, new: list[dict], *flags: str) -> list[dict]:
    path = folder / "new.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in new))
    call = [sys.executable, str(TOOL), str(path), "--folder", str(folder), *flags]
    subprocess.run(call, check=True, capture_output=True)
    lines = (folder / "nvidia-h200.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_newest_row_of_each_key_stays(tmp_path: Path) -> None:
    merge(tmp_path, [row("a", 1.0, T=1), row("a", 2.0, T=8), row("a", 3.0, "warm", T=1)])
    rows = merge(tmp_path, [row("a", 9.87654, T=1), row("b", 4.0, T=1)], "--commit", "abc")
    assert [(r["op"], r["shape"], r["l2"], r["us"]) for r in rows] == [
        ("a", {"T": 1}, "cold", 9.877), ("a", {"T": 8}, "cold", 2.0), ("a", {"T": 1}, "warm", 3.0),
        ("b", {"T": 1}, "cold", 4.0),
    ]  # fmt: skip
    assert [r["commit"] for r in rows] == ["abc", "unknown", "unknown", "abc"]


def test_the_order_of_a_shape_is_no_key(tmp_path: Path) -> None:
    merge(tmp_path, [row("a", 1.0, M=1, name="x")])
    assert len(merge(tmp_path, [row("a", 2.0, name="x", M=1)])) == 1


def test_a_row_of_another_library_has_no_state_of_l2(tmp_path: Path) -> None:
    other = {"op": "a", "shape": {"T": 1, "mode": "eager"}, "us": None, "gpu": GPU}
    assert merge(tmp_path, [row("a", 1.0, T=1), other, other])[1:] == [other]


def test_the_baselines_on_file_are_merged_already(tmp_path: Path) -> None:
    file = TOOL.parents[1] / "benchmarks" / "baselines" / "nvidia-h200.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert merge(tmp_path, rows) == rows
