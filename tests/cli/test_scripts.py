"""The two scripts of the tiers are one script but for the model, and both say Paris."""

from __future__ import annotations

import os
import subprocess
import sys
from difflib import unified_diff
from pathlib import Path

import pytest

from dsv4.cli.main import HARDWARE, INVALID, USAGE, tell_errors
from dsv4.core.errors import RequestError

SCRIPTS = Path(__file__).parents[2] / "scripts"
ON_GPUS = {
    "single_shot_production.py": ["nano"], "agreement.py": [], "soak.py": [],
    "gates.py": ["--tier", "2"], "gates.py --jobs 2": ["--tier", "2", "--jobs", "2"],
}  # fmt: skip
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


def run_without_gpu(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPTS / name.split()[0]), *ON_GPUS[name], *words]
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", ON_GPUS)
def test_without_a_gpu_they_end_as_the_command_line_does(name: str) -> None:
    run = run_without_gpu(name)
    assert (run.returncode, run.stdout) == (HARDWARE, "")
    error, fix = run.stderr.splitlines()
    assert error == "error: device cuda: torch finds no CUDA device"
    assert fix.startswith("fix: ")
    assert "TRITON_INTERPRET=1" in fix


@pytest.mark.parametrize("name", ["soak.py", "gates.py"])
def test_kernels_that_cannot_run_are_told_alike(name: str) -> None:
    run = run_without_gpu(name, "--device", "cpu")
    assert run.returncode == HARDWARE
    assert run.stderr.startswith("error: ")
    assert "TRITON_INTERPRET=1" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", ON_GPUS)
def test_their_help_says_that_they_need_a_gpu(name: str) -> None:
    assert "needs a GPU" in " ".join(run_without_gpu(name, "--help").stdout.split())


@pytest.mark.parametrize("tier", ["single_shot_baseline.py", "single_shot_production.py"])
def test_a_wrong_folder_is_told_as_the_command_line_tells_it(tier: str) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / tier), "nowhere", "-n", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode in (INVALID, HARDWARE)  # no GPU may be told first
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr


def test_a_traceback_is_of_defects_and_of_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", None)
    tell_errors()
    error, defect = RequestError("a", "b", "c"), ZeroDivisionError("no")
    with pytest.raises(SystemExit) as ended:
        sys.excepthook(RequestError, error, None)
    assert ended.value.code == USAGE
    assert capsys.readouterr().err == "error: a: expected b, got 'c'\n"
    sys.excepthook(ZeroDivisionError, defect, None)
    assert capsys.readouterr().err == "ZeroDivisionError: no\n"
    monkeypatch.setenv("DSV4_DEBUG", "1")
    with pytest.raises(SystemExit):
        sys.excepthook(RequestError, error, None)
    assert capsys.readouterr().err.startswith("dsv4.core.errors.RequestError: a")
