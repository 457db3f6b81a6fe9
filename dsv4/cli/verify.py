"""`dsv4 verify`: is a checkpoint whole and sane."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import Any

from dsv4.cli.model import model_folder, open_tokenizer
from dsv4.cli.terminal import Terminal, count
from dsv4.core.errors import CheckpointError, CheckpointProblem

SCHEMA = 1
MAX_SHOWN = 50


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or nano")
    parser.add_argument("--deep", action="store_true",
                        help="read all bytes: NaN, Inf, scales, expert tables")  # fmt: skip
    parser.add_argument("--sha256", metavar="FILE",
                        help="compare the files with a sha256sum list; it must name every shard"
                        )  # fmt: skip
    parser.add_argument("--json", action="store_true")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code: 0, or 3 when there is a problem. Raises ConfigError for config.json."""
    num_tensors, problems, notices = _verify(args, terminal)
    if args.json:
        terminal.json({
            "schema": SCHEMA, "ok": not problems, "num_tensors": num_tensors, "deep": args.deep,
            "problems": [asdict(p) for p in problems], "notices": notices,
        })  # fmt: skip
        return 3 if problems else 0
    for notice in notices:
        terminal.note(f"note: {notice}")
    for p in problems[:MAX_SHOWN]:
        where = " ".join(x for x in (p.file, p.tensor) if x)
        terminal.data(f"FAIL  {p.kind}  {where}  {p.detail}")
        if p.fix:
            terminal.data(f"      fix: {p.fix}")
    if len(problems) > MAX_SHOWN:
        terminal.data(f"... and {len(problems) - MAX_SHOWN:,} more")
    verdict = f"{count(len(problems), 'problem')} (exit 3)" if problems else "ok"
    read = ", all bytes read" if args.deep else ""
    terminal.data(f"{count(num_tensors, 'tensor')} checked{read}, {verdict}")
    return 3 if problems else 0


def _verify(args: Namespace, terminal: Terminal) -> tuple[int, list[CheckpointProblem], list[str]]:
    from dsv4.loader import Checkpoint

    problems: list[CheckpointProblem] = []
    folder = model_folder(args.model)
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as e:
        return 0, list(e.problems), []
    try:
        open_tokenizer(args.model, checkpoint.config)
    except CheckpointError as e:
        problems += e.problems
    with terminal.progress("reading") as progress:
        problems += checkpoint.verify(args.deep, args.sha256, progress)
    return checkpoint.num_tensors, problems, checkpoint.notices
