"""`dsv4 diff`: the first activation in which two dumps differ."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from dsv4.cli.terminal import Terminal


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("a", metavar="A", help="dump to compare with: the trusted one")
    parser.add_argument("b", metavar="B", help="dump to judge")
    parser.add_argument("--taps", default="*", metavar="GLOB[,GLOB]", help="(default all)")
    parser.add_argument("--limits", metavar="FILE", help="another table than diff/limits.toml")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--all", action="store_true",
                       help="the full table even when every tap is within its limit")  # fmt: skip
    shown.add_argument("--failures", action="store_true", help="show only what diverged")
    parser.add_argument("--require-all", action="store_true",
                        help="a tap that only one dump has is a failure")  # fmt: skip
    parser.add_argument("--json", action="store_true")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code: 0 when every tap is within its limit, else 1."""
    from dsv4.diff.compare import compare_dumps
    from dsv4.diff.dump import TapDump
    from dsv4.diff.limits import DEFAULT, Limits
    from dsv4.diff.report import to_json, to_summary, to_text

    limits = Limits.load(args.limits or DEFAULT)
    globs = [g.strip() for g in args.taps.split(",")]
    report = compare_dumps(TapDump(args.a), TapDump(args.b), limits, globs)
    if args.json:
        terminal.json(to_json(report))
    elif report.first_divergence or args.all:
        terminal.data(to_text(report, args.failures))
    else:
        terminal.data(to_summary(report))
    missing = args.require_all and (report.only_a or report.only_b)
    return 1 if report.first_divergence or missing else 0
