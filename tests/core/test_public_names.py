"""`import dsv4` is cheap and offers what the README names."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dsv4


def test_public_names_resolve() -> None:
    for name in dsv4.__all__:
        assert getattr(dsv4, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = dsv4.Nonsense


def test_import_does_not_pull_torch() -> None:
    code = "import sys, dsv4; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
