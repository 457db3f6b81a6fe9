"""`dsv4 diff`: the first activation in which two dumps, or two tiers, differ."""

from __future__ import annotations

import re
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from dsv4.cli.terminal import Terminal
from dsv4.core.errors import RequestError


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("a", metavar="A", help="dump to compare with: the trusted one; or MODEL")
    parser.add_argument("b", metavar="B", nargs="?", help="dump to judge; none beside --tiers")
    parser.add_argument("--tiers", type=two_tiers, metavar="1,2",
                        help="run MODEL on -p TEXT in two tiers and compare them")  # fmt: skip
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="text for --tiers")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda|cuda:N",
                        help="of tier 2 (default cpu)")  # fmt: skip
    parser.add_argument("--taps", default="*", metavar="GLOB[,GLOB]", help="(default all)")
    parser.add_argument("--limits", metavar="FILE", help="another table than diff/limits.toml")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--all", action="store_true",
                       help="the full table even when every tap is within its limit")  # fmt: skip
    shown.add_argument("--failures", action="store_true", help="show only what diverged")
    parser.add_argument("--require-all", action="store_true",
                        help="a tap that only one dump has is a failure")  # fmt: skip
    parser.add_argument("--json", action="store_true")


def two_tiers(text: str) -> tuple[int, int]:
    """The value of --tiers."""
    if not re.fullmatch("[012],[012]", text) or text[0] == text[2]:
        raise ArgumentTypeError(f"expected two of 0, 1 and 2, as in 1,2, got {text!r}")
    return int(text[0]), int(text[2])


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code: 0 when every tap is within its limit, else 1."""
    if args.tiers is None:
        if args.b is None or args.prompt is not None:
            raise RequestError("B", "a second dump, or --tiers 1,2 and -p TEXT", args.b)
        return _compare(args, terminal, args.a, args.b)
    if args.b is not None or args.prompt is None:
        raise RequestError("--tiers", "MODEL and -p TEXT beside it", args.b)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"tier{tier}.safetensors") for tier in args.tiers]
        for tier, path in zip(args.tiers, paths, strict=True):
            _dump(args, terminal, tier, path)
        return _compare(args, terminal, *paths)


def _dump(args: Namespace, terminal: Terminal, tier: int, path: str) -> None:
    """Run `dsv4 dump` as a user would, with its defaults."""
    from dsv4.cli import dump
    from dsv4.core import env

    parser = ArgumentParser()
    dump.add_arguments(parser, env.read())
    words = [args.a, f"--prompt={args.prompt}", f"--taps={args.taps}"]
    words += ["--tier", str(tier), "--out", path]
    words += ["--device", args.device] if tier == 2 else []
    dump.run(parser.parse_args(words), terminal)


def _compare(args: Namespace, terminal: Terminal, a: str, b: str) -> int:
    from dsv4.diff.compare import compare_dumps
    from dsv4.diff.dump import TapDump
    from dsv4.diff.limits import DEFAULT, Limits
    from dsv4.diff.report import to_json, to_summary, to_text

    limits = Limits.load(args.limits or DEFAULT)
    globs = [g.strip() for g in args.taps.split(",")]
    report = compare_dumps(TapDump(a), TapDump(b), limits, globs)
    if args.json:
        terminal.json(to_json(report))
    elif report.first_divergence or args.all:
        terminal.data(to_text(report, args.failures))
    else:
        terminal.data(to_summary(report))
    missing = args.require_all and (report.only_a or report.only_b)
    return 1 if report.first_divergence or missing else 0
