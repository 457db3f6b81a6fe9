"""The typed errors of the package. Each names what was expected, what came, and the way out."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass


def shown(value: object, limit: int = 300) -> str:
    """repr for a message, cut to `limit`; integers of thousands of digits have no repr."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__} too large to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Told(str):
    """What came, as a clause of a message of its own instead of "got" and a value."""


def printable(text: object, limit: int = 120) -> str:
    """`text` for an error message: ASCII without control characters, cut to `limit`."""
    escaped = str(text).encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


class Dsv4Error(Exception):
    """Base of every error a caller can cause. `fix` says what to do about it.

    A traceback shows `fix` below the message; the command line prints it on a line of its own.
    """

    fix: str = ""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix
        if fix:
            self.add_note(f"-> {fix}")


class ConfigError(Dsv4Error, ValueError):
    """A field of config.json, or of a ModelConfig, that cannot be."""

    def __init__(self, field: str, expected: str, got: object, fix: str = "") -> None:
        message = f"config field {field!r}: expected {expected}, got {shown(got)}"
        super().__init__(message, fix or "correct config.json, or fetch it again")
        self.field, self.expected, self.got = field, expected, got


@dataclass(frozen=True)
class CheckpointProblem:
    """One thing that is wrong with a checkpoint.

    kind    a short stable word, "truncated", "missing", "shape", ...
    file    the file's name inside the checkpoint folder, or "" for the folder
    tensor  the tensor's name in the file, or ""
    detail  what was expected and what was found
    fix     what the user can do
    """

    kind: str
    file: str
    tensor: str
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        where = " ".join(x for x in (self.file, self.tensor) if x)
        return f"{self.kind}: {where}: {self.detail}" if where else f"{self.kind}: {self.detail}"


class CheckpointError(Dsv4Error):
    """A checkpoint that is not what its config says. Carries every problem found."""

    def __init__(
        self, kind: str, file: str = "", tensor: str = "", detail: str = "", fix: str = ""
    ) -> None:
        self._set((CheckpointProblem(kind, file, tensor, detail, fix),))

    @classmethod
    def of(cls, problems: Iterable[CheckpointProblem]) -> CheckpointError:
        """Make one error of several problems; `kind`, `file`, ... are those of the first."""
        error = cls.__new__(cls)
        error._set(tuple(problems))
        return error

    def _set(self, problems: tuple[CheckpointProblem, ...]) -> None:
        first, shown = problems[0], 20
        lines = [str(p) for p in problems[:shown]]
        if len(problems) > shown:
            more = len(problems) - shown
            lines.append(f"... and {more} more problem" + ("" if more == 1 else "s"))
        Dsv4Error.__init__(self, "\n".join(lines), first.fix)
        self.problems = problems
        self.kind, self.file, self.tensor = first.kind, first.file, first.tensor
        self.detail = first.detail


class CapacityError(Dsv4Error):
    """Not enough memory, pages or slots: names what is needed and what is free."""

    def __init__(self, what: str, needed: int, free: int, fix: str = "") -> None:
        fix = fix or "shorten the context, lower the batch, or use a larger device"
        super().__init__(f"{what}: needed {needed:,}, free {free:,}", fix)
        self.what, self.needed, self.free = what, needed, free


class DeviceUnavailable(Dsv4Error):
    """A device that this machine does not have, or that this torch cannot use."""

    def __init__(self, device: str, reason: str, fix: str = "") -> None:
        fix = fix or "use --device cpu; `dsv4 doctor` lists the GPUs that torch can use"
        super().__init__(f"device {device}: {reason}", fix)
        self.device = device


class KernelUnavailable(Dsv4Error, NotImplementedError):
    """No kernel supports this problem on this device; the message lists every reason."""


class RequestError(Dsv4Error, ValueError):
    """A prompt or a sampling parameter that cannot be served."""

    def __init__(self, argument: str, expected: str, got: object, fix: str = "") -> None:
        came = got if isinstance(got, Told) else f"got {shown(got)}"
        super().__init__(f"{argument}: expected {expected}, {came}", fix)
        self.argument, self.expected, self.got = argument, expected, got


def install_hint(extra: str) -> str:
    """How to install an extra for the Python that runs."""
    return (
        f"{sys.executable} -m pip install 'dsv4-inference[{extra}]', "
        f"or -e '.[{extra}]' in a checkout"
    )


class MissingExtra(Dsv4Error, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        message = f"{package} is not installed; it comes with the extra '{extra}'"
        super().__init__(message, install_hint(extra))
