"""What make does before anything is installed."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WANTED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
# A Python that says it is of `version`, and makes no environment: it leaves a file and fails.
STAND_IN = """#!/bin/sh
[ "$1" = -c ] || {{ touch asked; exit 7; }}
exec {python} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
"""


def make_demo(folder: Path, version: tuple) -> subprocess.CompletedProcess[str]:
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable, version=version))
    stand_in.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), "demo", f"PYTHON={stand_in}"]
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    (folder / "pyproject.toml").touch()
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("version", [(3, 10, 14), (2, 7, 18)])
def test_an_old_python_is_refused_before_an_environment_is_made(tmp_path, version):
    done = make_demo(tmp_path, version)
    assert done.returncode != 0
    least = WANTED.removeprefix(">=")
    assert f"needs Python {least} or newer: make demo PYTHON=python3.12" in done.stderr
    assert not (tmp_path / "asked").exists()


def test_the_oldest_python_that_the_package_takes_is_not_refused(tmp_path):
    oldest = tuple(map(int, WANTED.removeprefix(">=").split(".")))
    done = make_demo(tmp_path, (*oldest, 0))
    assert "needs Python" not in done.stderr
    assert (tmp_path / "asked").exists()
