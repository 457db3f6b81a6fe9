"""What compute-sanitizer said, read and shown; part of tools/sanitize.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SUMMARY = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)",
}
CALLS = r"(?m)^ran (\d+) calls$"  # the last line of sanitize_run.py
FINDING = r"Invalid|Misaligned|Error: |Race|Potential"
FAILURE = r"[\w.]*(Error|Unavailable|Iteration|Exception)\b|.*not supported"


@dataclass(frozen=True)
class Result:
    """What one tool found in one family.

    errors, warnings  as the tool counts them; None if it did not come to its summary
    problem           what it said first, or why it did not
    """

    family: str
    tool: str
    errors: int | None
    warnings: int
    calls: int
    seconds: float
    problem: str

    @property
    def is_clean(self) -> bool:
        """Whether all calls ran, and nothing was found."""
        return self.errors == 0 and self.calls > 0

    def __str__(self) -> str:
        warned = f", {self.warnings} warned" if self.warnings else ""
        ran = self.errors is not None and (self.calls or self.errors)
        return f"{self.errors} errors{warned}" if ran else "did not run"


def read_log(family: str, tool: str, log: str, seconds: float, is_over: bool) -> Result:
    """The result that a log tells of; is_over: its time ran out."""
    summary, ran = re.search(SUMMARY[tool], log), re.search(CALLS, log)
    counts = [int(x) for x in summary.groups()] if summary and not is_over else []
    lines = [x for line in log.splitlines() if (x := line.removeprefix("=========").strip())]
    problem = ""
    if is_over:
        problem = "out of time"
    elif sum(counts):
        problem = next((x for x in lines if re.match(FINDING, x)), lines[0])
    elif not summary or not ran:
        failures = [x for x in lines if re.match(FAILURE, x)]
        problem = (failures or lines or ["it said nothing"])[-1]
    errors = counts[0] if counts else None
    calls = int(ran[1]) if ran else 0
    return Result(family, tool, errors, sum(counts[1:]), calls, round(seconds, 1), problem)


def joined(parts: Sequence[Result]) -> list[Result]:
    """One result for each family and tool, of processes that ran side by side."""
    found: dict[tuple[str, str], Result] = {}
    for part in parts:
        before = found.get((part.family, part.tool))
        found[part.family, part.tool] = part if before is None else _both(before, part)
    return list(found.values())


def _both(a: Result, b: Result) -> Result:
    """A family did not run unless all of its parts did."""
    ran = [x.errors for x in (a, b) if x.errors is not None and (x.calls or x.errors)]
    return Result(
        a.family, a.tool, sum(ran) if len(ran) == 2 or any(ran) else None, a.warnings + b.warnings,
        a.calls + b.calls, max(a.seconds, b.seconds), a.problem or b.problem,
    )  # fmt: skip


def table(results: Sequence[Result], tools: Sequence[str]) -> str:
    """Families down, tools across; then what was said first."""
    found = {(r.family, r.tool): r for r in results}
    lines = [f"{'family':14}" + "".join(f"{tool:>24}" for tool in tools) + f"{'seconds':>10}"]
    for family in dict.fromkeys(r.family for r in results):
        row = [found[family, tool] for tool in tools]
        cells = "".join(f"{r!s:>24}" for r in row)
        lines.append(f"{family:14}{cells}{max(r.seconds for r in row):10.0f}")
    problems = [f"{r.family} {r.tool}: {r.problem}" for r in results if r.problem]
    return "\n".join(lines + problems)
