"""Where output goes: data to stdout, everything else to stderr, colour and bars to terminals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dsv4.text.terminal import strip_control, to_json

Progress = Callable[[int, int, int, int], None]


class Terminal:
    """The two output streams of one command.

    quiet         no notes, no progress
    keep_control  print control characters of the model's text as they are
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.keep_control = False

    def data(self, text: str, end: str = "\n") -> None:
        """Print a result to stdout."""
        text = text if self.keep_control else strip_control(text)
        print(text, end=end, flush=True)

    def json(self, value: Any) -> None:
        """Print a result as JSON to stdout. NaN and infinity are refused."""
        print(to_json(value, indent=2), flush=True)

    def note(self, text: str) -> None:
        """Print something about the run to stderr, unless quiet."""
        if not self.quiet:
            print(strip_control(text), file=sys.stderr, flush=True)

    def reasoning(self, text: str) -> None:
        """Print a piece of the model's reasoning to stderr, dimmed on a terminal."""
        if self.quiet:
            return
        from rich.console import Console

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        text = text if self.keep_control else strip_control(text)
        console.print(text, style="dim", end="", markup=False, emoji=False)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress | None]:
        """A bar "title, shard i of n, GB/s" on stderr; None when there is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
                   TransferSpeedColumn())  # fmt: skip
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None)

            def update(done: int, total: int, shard: int, num_shards: int) -> None:
                text = f"{title}, shard {shard + 1} of {num_shards}"
                bar.update(task, completed=done, total=total, description=text)

            yield update


class AnswerView:
    """Shows an answer while it arrives, text on stdout and reasoning on stderr, and keeps both.

    silent           show nothing
    reasoning, text  what has arrived
    """

    def __init__(self, terminal: Terminal, silent: bool = False) -> None:
        self.reasoning = self.text = ""
        self._terminal, self._silent = terminal, silent

    def show(self, pieces: Iterable[tuple[str, str]]) -> None:
        """Take pieces as AnswerStream gives them; a line break parts reasoning from text."""
        for kind, piece in pieces:
            if kind == "reasoning":
                self.reasoning += piece
                if not self._silent:
                    self._terminal.reasoning(piece)
                continue
            is_first, self.text = not self.text, self.text + piece
            if self._silent:
                continue
            if is_first and self.reasoning:
                self._terminal.reasoning("\n")
            self._terminal.data(piece, end="")


def count(number: int, noun: str) -> str:
    """ "1 tap", "54 taps"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def gib(num_bytes: float) -> str:
    """Bytes as GiB, as MiB below a tenth of one, as KiB below a tenth of that."""
    for bits, unit in ((30, "GiB"), (20, "MiB")):
        if num_bytes >= 2**bits / 10:
            return f"{num_bytes / 2**bits:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
