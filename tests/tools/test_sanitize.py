"""The sanitizer's tool: every kernel has calls that its checks let through, and logs are read."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.tools import TOOLS, tool

CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\nran 12 calls\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "ran 12 calls\n"
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}
# Every kernel's own `launch`, stopped where it would start the device function.
LAUNCHES = """
import json
from unittest import mock
import sanitize_run as run
from triton.runtime.jit import JITFunction
from dsv4.testing.small_calls import FAMILIES
modules, seen, wrong, started = run.kernels(), {}, [], []
with mock.patch.object(JITFunction, "run", lambda fn, *args, **kwargs: started.append(fn)):
    for family in FAMILIES.values():
        for tokens in family.tokens:
            for call, module, args in run.family_calls(family, tokens, modules):
                seen.setdefault(module.SPEC.name, set()).add(tokens)
                if not hasattr(module, "sources"):
                    started.clear()
                    run.launch(module, args)
                    wrong += [] if started else [call]
                for fn in started:
                    seen.setdefault(fn.__name__, set()).add(tokens)
seen["moe_routed/sm90"] -= set(range(65, 1000))  # more than it takes
missing = {m.SPEC.name for group in modules.values() for m in group} - set(seen)
one = "moe_with_shared/sm90"  # for one token; its calls are of three shapes
few = [name for name, tokens in seen.items() if len(tokens) < 3 and name != one]
print(json.dumps([wrong, sorted(missing), few]))
"""

report = tool("sanitize_report")
sanitize = tool("sanitize")


def test_every_kernel_is_called_with_what_it_takes_of_three_sizes() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(TOOLS)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], [], []]


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_log(name: str) -> None:
    found = report.read_log("router", name, CLEAN[name], 3.04, is_over=False)
    assert found == report.Result("router", name, 0, 0, 12, 3.0, "")
    assert found.is_clean


@pytest.mark.parametrize(
    ("name", "log", "counts", "problem"),
    [
        ("memcheck", "========= Invalid __global__ write of size 4 bytes\n========= at k\n"
         "ran 12 calls\n========= ERROR SUMMARY: 3 errors\n", (3, 0), "Invalid __global__ write"),
        ("memcheck", "========= Invalid __global__ read of size 2 bytes\n"
         "torch.AcceleratorError: CUDA error: unspecified launch failure\n"
         "========= ERROR SUMMARY: 1 error\n", (1, 0), "Invalid __global__ read"),
        ("racecheck", "========= Warning: Race reported between Write and Read\nran 2 calls\n"
         "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", (0, 1), ""),
        ("memcheck", "========= Error: Device not supported\nTraceback\n", (None, 0),
         "Error: Device not supported"),
        ("memcheck", "ValueError: q: expected\n========= ERROR SUMMARY: 0 errors\n", (0, 0),
         "ValueError: q: expected"),
        ("racecheck", "", (None, 0), "it said nothing"),
    ],
)  # fmt: skip
def test_a_log_with_something_in_it(
    name: str, log: str, counts: tuple[int | None, int], problem: str
) -> None:
    found = report.read_log("router", name, log, 1.0, is_over=False)
    assert (found.errors, found.warnings) == counts
    assert problem in found.problem
    assert found.is_clean == (counts == (0, 1))


def test_out_of_time() -> None:
    found = report.read_log("router", "memcheck", CLEAN["memcheck"], 9.0, is_over=True)
    assert (found.errors, found.problem, found.is_clean) == (None, "out of time", False)


def stand_in(folder: Path, text: str) -> None:
    """A compute-sanitizer that runs `text` of shell instead."""
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_a_table_and_a_file_of_all_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, log in CLEAN.items():
        (tmp_path / name).write_text(log.replace("(0 errors", "(2 errors"))
    stand_in(tmp_path, f'cat "{tmp_path}/$2"; echo "$@" > "{tmp_path}/command"')
    rows = tmp_path / "rows.json"
    told = tmp_path / "log"
    flags = ["--family", "router", "quant", "--jobs", "2", "--json", str(rows), "--log", str(told)]
    assert sanitize.main(flags) == 1
    assert "==== router racecheck, 1 tokens\n" in told.read_text()
    assert " memcheck" not in told.read_text()  # all well there
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split()[:5] == ["router", "0", "errors", "10", "errors"]
    assert lines[-3].split()[:5] == ["quant", "0", "errors", "6", "errors"]
    assert sum(row["errors"] for row in json.loads(rows.read_text())) == 16
    assert sanitize.main([*flags, "--tool", "memcheck"]) == 0
    assert "--report-api-errors no" in (tmp_path / "command").read_text()
    flags = ["--family", "quant", "--tool", "memcheck", "--tokens", "7", "--jobs", "1"]
    assert sanitize.main(flags) == 0
    assert (tmp_path / "command").read_text().split()[-2:] == ["quant", "7"]


def test_processes_are_spread_over_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    stand_in(tmp_path, f'echo "$CUDA_VISIBLE_DEVICES" >> "{tmp_path}/seen"')
    sanitize.main(["--family", "router", "quant", "--tool", "memcheck", "--tokens", "1", "2"])
    assert sorted((tmp_path / "seen").read_text().split()) == ["2", "2", "5", "5"]


@pytest.mark.parametrize(
    ("parts", "counts", "problem"),
    [
        ([(0, 0, 4, ""), (0, 1, 5, "a race"), (0, 0, 6, "")], (0, 1, 15), "a race"),
        ([(0, 0, 4, ""), (None, 0, 0, "out of time"), (0, 0, 6, "")], (None, 0, 10), "out of time"),
        ([(0, 0, 4, ""), (0, 0, 0, "ValueError")], (None, 0, 4), "ValueError"),
        ([(2, 0, 4, "Invalid"), (None, 0, 0, "killed"), (1, 0, 4, "more")], (3, 0, 8), "Invalid"),
    ],
)
def test_what_ran_side_by_side_is_one_result(
    parts: list[tuple], counts: tuple[int | None, int, int], problem: str
) -> None:
    made = [report.Result("x", "memcheck", e, w, n, 1.0 + n, p) for e, w, n, p in parts]
    other = report.Result("y", "memcheck", 0, 0, 3, 1.0, "")
    found, same = report.joined([*made, other])
    assert same == other
    assert ((found.errors, found.warnings, found.calls), found.problem) == (counts, problem)
    assert found.seconds == max(r.seconds for r in made)
    assert found.is_clean == (counts[0] == 0)


def test_a_process_is_ended_with_what_it_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stand_in(tmp_path, "sleep 30 & sleep 30")
    start = time.monotonic()
    flags = ["--family", "router", "--tool", "memcheck", "--limit", "0.5"]
    assert sanitize.main(flags) == 1
    assert time.monotonic() - start < 10


def test_without_the_sanitizer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitize, "PLACES", ())
    assert sanitize.main([]) == 2
    assert "compute-sanitizer: expected on PATH" in capsys.readouterr().err
