"""`dsv4 diff`: the first activation in which two dumps, two tiers, or kernels and parts differ."""

from __future__ import annotations

import re
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from dsv4.cli import dump
from dsv4.cli.model import (
    NAMES,
    PUBLISHED,
    add_slice_arguments,
    check_kernel_device,
    check_prompt,
    context_limit,
    device_name,
    model_config,
    slice_config,
)
from dsv4.cli.terminal import Terminal
from dsv4.cli.tier2 import add_fusion_argument, split_fusions
from dsv4.core.errors import RequestError

# Of --no-fusion: kernels of prompts and of decode both run. The second step after 382 tokens
# completes a window of CSA and of HCA, the third reads what the others wrote.
DECODE_STEPS, RANDOM_TOKENS = 3, 385


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("a", metavar="A", help="dump to compare with: the trusted one; or MODEL")
    parser.add_argument("b", metavar="B", nargs="?", help="dump to judge, if A is a dump")
    parser.add_argument("--tiers", type=two_tiers, metavar="1,2",
                        help="run MODEL on -p TEXT in two tiers and compare them")  # fmt: skip
    add_fusion_argument(parser, "run MODEL twice in tier 2 and compare: as it is, and then ")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="text to run MODEL on")
    parser.add_argument("--tokens", type=int, metavar="N", help="N random ids instead of -p "
                        f"(flash and pro: {RANDOM_TOKENS})")  # fmt: skip
    add_slice_arguments(parser)
    parser.add_argument("--device", type=device_name, default="cpu", metavar="cpu|cuda|cuda:N",
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
    runs = _runs(args)
    if not runs:
        return _compare(args, terminal, args.a, args.b)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{which}.safetensors") for which in "AB"]
        dumps = [_parse(args, [*f, "--out", p]) for f, p in zip(runs, paths, strict=True)]
        _check(args, dumps)
        for each in dumps:
            dump.run(each, terminal)
        return _compare(args, terminal, *paths)


def _runs(args: Namespace) -> list[list[str]]:
    """Flags of the two runs to compare; none where A and B are dumps. Raises RequestError."""
    is_run = args.tiers is not None or args.no_fusion
    settings = args.prompt, args.tokens, args.layers, args.experts
    if not is_run and (args.b is None or any(x is not None for x in settings)):
        expected = "a second dump, or --tiers 1,2 or --no-fusion NAME with -p TEXT"
        raise RequestError("B", expected, args.b)
    if not is_run:
        return []
    flag = "--tiers" if args.tiers is not None else "--no-fusion"
    if args.tiers is not None and args.no_fusion:
        raise RequestError("--tiers", "no --no-fusion beside it", args.no_fusion)
    if args.a in PUBLISHED:
        _check_random(args)
        args.tokens = RANDOM_TOKENS if args.tokens is None else args.tokens
    if args.b is not None or (args.prompt is None) == (args.tokens is None):
        raise RequestError(flag, "MODEL and one of -p TEXT and --tokens N beside it", args.b)
    on = ["--device", args.device]
    if args.tiers is not None:
        return [["--tier", str(n), *(on if n == 2 else ())] for n in args.tiers]
    parts = ",".join(split_fusions(args.no_fusion))
    run = ["--tier", "2", "--decode", str(DECODE_STEPS), *on]
    return [run, [*run, "--no-fusion", parts]]


def _check_random(args: Namespace) -> None:
    """Raises RequestError for what a model of random weights does not take."""
    if args.tiers is not None:
        expected = f"a checkpoint: {args.a} has random weights, which only tier 2 takes"
        raise RequestError("--tiers", expected, args.a, "use --no-fusion, or a checkpoint")
    if args.prompt is not None:
        raise RequestError("-p", f"--tokens N: {args.a} has no tokenizer here", args.prompt)


def _check(args: Namespace, dumps: list[Namespace]) -> None:
    """Raise what a run would, before the first one, in words of this verb."""
    if any(each.tier == 2 for each in dumps):
        check_kernel_device(args.device, has_other_tiers=False)
    config = slice_config(dumps[0], model_config(args.a, names=NAMES))
    ids, flag, fix = dump.token_ids(dumps[0], config), "-p", "shorten the prompt"
    if args.tokens is not None:
        flag, fix = "--tokens", "lower --tokens"
    check_prompt(ids, min(context_limit(each, config) for each in dumps), fix)
    decode = dumps[0].decode
    if decode >= len(ids):
        expected = f"{decode + 1} tokens or more, because the last {decode} are decode steps"
        raise RequestError(flag, expected, len(ids))


def _parse(args: Namespace, words: list[str]) -> Namespace:
    """What `dsv4 dump` makes of `words` and of the flags that it shares, with its defaults."""
    from dsv4.core import env

    parser = ArgumentParser()
    dump.add_arguments(parser, env.read())
    for name in ("prompt", "tokens", "layers", "experts", "taps"):
        if (value := getattr(args, name)) is not None:
            words = [*words, f"--{name}={value}"]
    return parser.parse_args([args.a, *words])


def _is_exact(args: Namespace) -> bool:
    """Whether all parts that are compared give the bits of their whole."""
    if not args.no_fusion:
        return False
    from dsv4.model.block import EXACT

    return set(split_fusions(args.no_fusion)) <= set(EXACT)


def _compare(args: Namespace, terminal: Terminal, a: str, b: str) -> int:
    from dsv4.diff.compare import compare_dumps
    from dsv4.diff.dump import TapDump
    from dsv4.diff.limits import BITWISE, DEFAULT, Limits
    from dsv4.diff.report import to_json, to_summary, to_text

    is_exact = _is_exact(args) and args.limits is None
    limits = BITWISE if is_exact else Limits.load(args.limits or DEFAULT)
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
