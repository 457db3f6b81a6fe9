"""The README: its snippet runs, its figures are filled in, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.oracle_ops import use_oracles

ROOT = Path(__file__).parents[2]
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "scripts/README.md",
         ROOT / "training/README.md", ROOT / "dsv4/nano/MODEL_CARD.md"]  # fmt: skip


def snippets() -> tuple[str, str]:
    """The one for any machine, and the one for a GPU."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    anywhere, on_gpu = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return anywhere, on_gpu


def test_the_snippet_says_paris() -> None:
    code, _ = snippets()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "Paris"


def test_the_snippet_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, but on the CPU and with oracles in place of the kernels."""
    use_oracles(monkeypatch)
    _, code = snippets()
    assert 'LLM("nano", ' in code
    exec(code.replace('LLM("nano", ', 'LLM("nano", device="cpu", '), {})  # noqa: S102 - our own text
    out = capsys.readouterr().out
    assert "Rome" in out
    assert "Lima" in out


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_placeholders(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z]+@", text)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
