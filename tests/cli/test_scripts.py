"""The two scripts of the tiers are one script but for the model, and both say Paris."""

from __future__ import annotations

import subprocess
import sys
from difflib import unified_diff
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TIER_1, TIER_0 = "single_shot_baseline.py", "tier_0_hf_reference.py"

DIFFERENCES = """\
-from dsv4.reference.model import ReferenceModel
+from dsv4.cli.tier0 import TransformersModel
-parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
+parser.add_argument("--dtype", choices=["float32"], default="float32")
-model = ReferenceModel(checkpoint.config, checkpoint.load(), getattr(torch, args.dtype))
+model = TransformersModel(checkpoint.config, checkpoint.load())  # FP32, dequantised
-    info = DumpInfo(1, args.dtype, name, config, tuple(ids))
+    info = DumpInfo(0, args.dtype, name, config, tuple(ids))
"""


def code_lines(name: str) -> list[str]:
    """The lines below the docstring."""
    text = (SCRIPTS / name).read_text(encoding="utf-8")
    return text.split('"""\n', 1)[1].splitlines()


def test_they_differ_in_the_model_alone() -> None:
    lines = unified_diff(code_lines(TIER_1), code_lines(TIER_0), n=0, lineterm="")
    changed = [x for x in lines if x[0] in "+-" and not x.startswith(("---", "+++"))]
    assert sorted(changed) == sorted(DIFFERENCES.splitlines())


@pytest.mark.parametrize("name", [TIER_1, TIER_0])
def test_nano_says_paris(name: str) -> None:
    command = [sys.executable, str(SCRIPTS / name), "nano", "-n", "4"]
    prompt = ["-p", "The capital of France is", "--expect"]
    run = subprocess.run([*command, *prompt, "Paris"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("PASS: 'The capital of France is' -> ")
    run = subprocess.run([*command, *prompt, "London"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1].startswith("FAIL: ")
