"""The picture of a bench: what it shows, and what happens without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsv4.core.errors import MissingExtra
from dsv4.engine.bench import KernelTime, StepTime
from dsv4.engine.plot import SHOWN_KERNELS, Point, draw_roofline, save_roofline


def step(us: float, count: int = 3) -> StepTime:
    return StepTime(us, tuple(KernelTime(f"kernel_{i}", i + 1, us / 2**i) for i in range(count)))


SERIES = {
    "context 128": [Point(8, step(90.0), 40.0), Point(1, step(50.0), 25.0)],
    "context 4,096": [Point(1, step(60.0), 30.0), Point(8, step(120.0), 55.0)],
}


def test_times_floors_and_the_slowest_step() -> None:
    over, bar = draw_roofline(SERIES, "batch", "a title").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in over.lines}
    assert drawn == {
        "context 128": [[1, 50], [8, 90]],
        "context 128: floor": [[1, 25], [8, 40]],
        "context 4,096": [[1, 60], [8, 120]],
        "context 4,096: floor": [[1, 30], [8, 55]],
    }
    assert (over.get_xscale(), over.get_yscale()) == ("log", "log")
    assert (over.get_xlabel(), over.get_title()) == ("batch", "a title")
    assert [p.get_height() for p in bar.patches] == [120, 60, 30]
    assert [p.get_y() for p in bar.patches] == [0, 120, 180]
    lines = {line.get_label(): line.get_ydata()[0] for line in bar.lines}
    assert lines == {"step: 120.0": 120.0, "floor: 55.0": 55.0}
    assert "kernel_1 x2: 60.0" in bar.get_legend_handles_labels()[1]


def test_many_kernels_become_others() -> None:
    times = step(64.0, SHOWN_KERNELS + 5)
    _, bar = draw_roofline({"": [Point(1, times, 1.0)]}, "context", "").axes
    assert len(bar.patches) == SHOWN_KERNELS + 1
    total = sum(p.get_height() for p in bar.patches)
    assert total == pytest.approx(sum(k.us for k in times.kernels))
    assert any(label.startswith("5 others") for label in bar.get_legend_handles_labels()[1])


def test_it_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "steps.png"
    save_roofline(path, SERIES, "batch", "a title")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="'plot'"):
        draw_roofline(SERIES, "batch", "")
