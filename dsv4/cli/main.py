"""The entry point: parse, run one verb, turn errors into one or two lines and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from types import TracebackType
from typing import Any

from dsv4 import __version__
from dsv4.cli.prompt import expand_stdin
from dsv4.cli.terminal import Terminal
from dsv4.core import env
from dsv4.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DeviceUnavailable,
    Dsv4Error,
    KernelUnavailable,
)

OK, FAILED, USAGE, INVALID, HARDWARE, MEMORY, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

VERBS = {
    "generate": "continue one prompt, streamed",
    "chat": "hold a conversation",
    "inspect": "what is in a checkpoint: layers, ratios, dtypes, bytes",
    "verify": "is a checkpoint whole and sane",
    "plan": "does it fit: memory of weights and KV cache",
    "doctor": "will this machine run it",
    "dump": "write named activations to a file",
    "diff": "the first activation in which two dumps differ",
    "bench": "how long a step takes on a GPU, and how far that is from the limit",
    "convert": "write a checkpoint as BF16, or a slice of it",
}
EPILOG = """\
MODEL is the folder of a checkpoint, or the word nano: the small model in the package.
exit codes: 0 ok, 1 check failed, 2 usage, 3 model or checkpoint invalid, 4 hardware cannot,
            5 out of memory, 130 interrupted
"""


class Parser(argparse.ArgumentParser):
    """argparse says nothing when help cannot be written; this one raises the OSError."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


class VerbParser(Parser):
    """Refuses what it does not know itself, with its own usage; argparse leaves it to `dsv4`."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        known, rest = super().parse_known_args(*args, **kwargs)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return known, rest


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs. Imports no torch. Variables without meaning are not yet refused."""
    defaults = env.read(strict=False)
    parser = Parser(
        "dsv4", description="DeepSeek-V4 inference.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dsv4 {__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, parser_class=VerbParser
    )
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=f"{text[0].upper()}{text[1:]}.")
        import_module(f"dsv4.cli.{verb}").add_arguments(sub, defaults)
        sub.add_argument("--quiet", action="store_true", default=defaults["DSV4_QUIET"],
                         help="no progress and no statistics")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        for name, close in env.unknown().items():
            hint = f"; did you mean {close}?" if close else ""
            _say(f"warning: {name} is no variable of dsv4{hint}")
        words = sys.argv[1:] if argv is None else list(argv)
        if words[:1] in (["generate"], ["dump"]):
            words = expand_stdin(words)
        args = build_parser().parse_args(words)
        env.read()  # refused only here: help and version need no variables
        return import_module(f"dsv4.cli.{args.verb}").run(args, Terminal(args.quiet))
    except SystemExit as e:  # argparse: help, version or usage
        return e.code if isinstance(e.code, int) else USAGE
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has gone; nothing can be written any more
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until exit
        return FAILED
    except Exception as e:
        code = exit_code(e)
        if code is None:
            raise
        _report(e)
        return code


def tell_errors() -> None:
    """End a script with an error of the package as `dsv4` ends: one or two lines, and its code."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or (code := exit_code(error)) is None:
            sys.__excepthook__(kind, error, trace)
            return
        _report(error)
        sys.exit(code)

    sys.excepthook = hook


def exit_code(error: Exception) -> int | None:
    """The exit code of an error; None for one that is a defect of the program."""
    if isinstance(error, (ConfigError, CheckpointError)):
        return INVALID
    if isinstance(error, (KernelUnavailable, DeviceUnavailable)):
        return HARDWARE
    if isinstance(error, (CapacityError, MemoryError)) or _is_out_of_memory(error):
        return MEMORY
    return USAGE if isinstance(error, (Dsv4Error, OSError)) else None


def console() -> None:
    """What the command `dsv4` runs."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode gets escapes, no error
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = main()
    try:
        sys.stdout.flush()
    except OSError as e:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        is_gone = isinstance(e, BrokenPipeError)
        if not is_gone and code == OK:
            _say(f"error: stdout: {e.strerror or e}")
        code = code or (FAILED if is_gone else USAGE)
    sys.exit(code)


def _is_out_of_memory(error: Exception) -> bool:
    """torch raises RuntimeError for the CPU and a subclass named OutOfMemoryError for a GPU."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    )


def _report(error: Exception) -> None:
    if os.environ.get("DSV4_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    text = str(error)
    fix = getattr(error, "fix", "")
    if not isinstance(error, Dsv4Error) and exit_code(error) == MEMORY:
        text = f"out of memory: {text}" if text else "out of memory"
        fix = "shorten the context, use a smaller --dtype or --keep-packed, or a larger machine"
    _say(f"error: {text}")
    if fix:
        _say(f"fix: {fix}")


def _say(text: str) -> None:
    from dsv4.text.terminal import strip_control

    print(strip_control(text), file=sys.stderr, flush=True)
