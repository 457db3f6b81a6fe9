"""Pictures of measured steps: time over size beside the physical floor, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.core.errors import MissingExtra

if TYPE_CHECKING:
    from dsv4.engine.bench import StepTime

SHOWN_KERNELS, NAME_WIDTH = 12, 48
SIZE, DPI = (13.0, 6.0), 120


@dataclass(frozen=True)
class Point:
    """A step that was measured.

    x         batch, context or rows
    floor_us  the least that its bytes take
    """

    x: int
    times: StepTime
    floor_us: float


def require_matplotlib() -> None:
    """Raises MissingExtra where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "plot") from None


def draw_roofline(series: Mapping[str, Sequence[Point]], x_name: str, title: str) -> Any:
    """A matplotlib Figure: on the left measured times and floors, on the right the slowest step.

    series  label -> points, one line and one floor each

    Raises MissingExtra.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    over, bar = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (label, points) in enumerate(series.items()):
        points, colour = sorted(points, key=lambda p: p.x), f"C{i}"
        x = [p.x for p in points]
        over.plot(x, [p.times.us for p in points], "o-", color=colour, label=label)
        over.plot(x, [p.floor_us for p in points], "--", color=colour, label=f"{label}: floor")
    over.set(xscale="log", yscale="log", xlabel=x_name, ylabel="microseconds a step", title=title)
    over.set_xticks(ticks := sorted({p.x for own in series.values() for p in own}), ticks)
    over.xaxis.minorticks_off()
    for set_format in (over.yaxis.set_major_formatter, over.yaxis.set_minor_formatter):
        set_format("{x:,.0f}")
    over.grid(alpha=0.3)
    over.legend()
    every = [(label, p) for label, own in series.items() for p in own]
    label, slowest = max(every, key=lambda pair: pair[1].times.us)
    _stack(bar, slowest, f"{x_name} {slowest.x}, {label}")
    return figure


def save_roofline(
    path: Path, series: Mapping[str, Sequence[Point]], x_name: str, title: str
) -> None:
    """`draw_roofline` into a PNG file."""
    draw_roofline(series, x_name, title).savefig(path, dpi=DPI, format="png")


def _stack(axes: Any, point: Point, name: str) -> None:
    """One bar of all kernels, the slowest at the bottom, beside the measured time and the floor."""
    kernels = point.times.kernels
    rest = kernels[SHOWN_KERNELS:]
    pieces = [(k.name[:NAME_WIDTH], k.launches, k.us) for k in kernels[:SHOWN_KERNELS]]
    if rest:
        launches, us = sum(k.launches for k in rest), sum(k.us for k in rest)
        pieces.append((f"{len(rest)} others", launches, us))
    bottom = 0.0
    for i, (kernel, launches, us) in enumerate(pieces):
        label = f"{kernel} x{launches}: {us:,.1f}"
        axes.bar([name], [us], bottom=bottom, width=0.5, color=f"C{i % 10}",
                 edgecolor="white", hatch="//" if i >= 10 else None, label=label)  # fmt: skip
        bottom += us
    axes.axhline(point.times.us, color="black", label=f"step: {point.times.us:,.1f}")
    axes.axhline(point.floor_us, color="black", ls="--", label=f"floor: {point.floor_us:,.1f}")
    axes.set(xlim=(-0.5, 0.5), ylabel="microseconds", title="kernels of the slowest step")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize="x-small", loc="upper left",
                bbox_to_anchor=(1.0, 1.0))  # fmt: skip
