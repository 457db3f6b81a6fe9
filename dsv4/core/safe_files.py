"""Files of a folder that is not trusted: which may be opened, and how, without leaving it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dsv4.core.errors import CheckpointError, CheckpointProblem, printable
from dsv4.core.strict_json import parse_json

Opener = Callable[[str], BinaryIO]

DOWNLOAD_FIX = "delete the file and download it again"
MISSING_FIX = "download it into this folder"
CHANGED_FIX = "wait for the writer to finish, then try again"


@dataclass(frozen=True)
class FileIdentity:
    """What must not change between opening a checkpoint and the end of the load."""

    size: int
    mtime_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileIdentity:
        """The identity in a stat result."""
        return cls(info.st_size, info.st_mtime_ns, info.st_dev, info.st_ino)


def open_regular(path: str) -> BinaryIO:
    """Open an already resolved path for unbuffered reading; never follows a link, never blocks."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.fdopen(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb", buffering=0)


def open_folder(path: str | os.PathLike[str]) -> Path:
    """The real path of a checkpoint folder. Raises CheckpointError "folder" if it is none."""
    text = os.fspath(path)
    try:
        real = Path(text).resolve(strict=True)
        is_folder = real.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        detail = f"cannot be opened: {printable(text)}: {reason(error)}"
        raise CheckpointError("folder", "", "", detail, "give the path of a model folder") from None
    if not is_folder:
        fix = "give the folder that holds config.json and the *.safetensors files"
        raise CheckpointError("folder", "", "", f"{printable(text)} is not a folder", fix)
    return real


def resolve_file(folder: Path, name: str) -> str:
    """The real path of `folder`/`name`, checked without opening it.

    It must be a regular file inside the folder, or, where the folder is snapshots/<revision> of a
    Hugging Face cache, one in the blobs folder of the same repository.
    Raises CheckpointError "missing_file", "path" or "file_type".
    """
    try:
        real = os.path.realpath(os.path.join(folder, name), strict=True)
        mode = os.stat(real).st_mode
    except FileNotFoundError:
        raise CheckpointError("missing_file", name, "", "not in the folder", MISSING_FIX) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("read", name, "", reason(error), DOWNLOAD_FIX) from None
    parents = [folder]
    if folder.parent.name == "snapshots":
        parents.append(folder.parent.parent / "blobs")
    if Path(real).parent not in parents:
        fix = "replace the link by the file itself"
        raise CheckpointError("path", name, "", "the link leads outside the folder", fix)
    if not stat.S_ISREG(mode):
        fix = "remove it and fetch the file again"
        raise CheckpointError("file_type", name, "", "not a regular file", fix)
    return real


def open_file(folder: Path, name: str, opener: Opener) -> tuple[BinaryIO, FileIdentity]:
    """Open `name` for reading after `resolve_file`, and tell its identity."""
    real = resolve_file(folder, name)
    try:
        file = opener(real)
    except OSError as error:
        raise CheckpointError("read", name, "", reason(error), "check its permissions") from None
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode):
        file.close()
        raise CheckpointError("file_type", name, "", "not a regular file", DOWNLOAD_FIX)
    return file, FileIdentity.of(info)


def has_file(folder: Path, name: str) -> bool:
    """Whether the folder has an entry `name`, be it a link that leads nowhere."""
    return os.path.lexists(folder / name)


def read_small_file(
    folder: Path, name: str, max_bytes: int, opener: Opener = open_regular
) -> bytearray:
    """All bytes of `folder`/`name`; the folder is a real path, as `open_folder` gives it.

    Raises CheckpointError "too_large" past `max_bytes`, and what `open_file` raises.
    """
    file, identity = open_file(folder, name, opener)
    with file:
        if identity.size > max_bytes:
            detail = f"{identity.size:,} bytes, at most {max_bytes:,} are read"
            raise CheckpointError("too_large", name, "", detail, DOWNLOAD_FIX)
        buffer = bytearray(identity.size)
        read_exactly(file, memoryview(buffer), name)
    return buffer


def read_json(folder: Path, name: str, max_bytes: int, opener: Opener = open_regular) -> Any:
    """The value of a JSON file, read by `read_small_file` and `parse_json`."""
    return parse_json(read_small_file(folder, name, max_bytes, opener), name)


def read_exactly(file: BinaryIO, buffer: memoryview, name: str, tensor: str = "") -> None:
    """Fill `buffer` from the current position. Raises CheckpointError "read" or "truncated"."""
    done = 0
    while done < len(buffer):
        try:
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        except OSError as error:
            fix = "check the disk, then download the file again"
            raise CheckpointError("read", name, tensor, reason(error), fix) from None
        if not count:
            detail = f"the file ended {len(buffer) - done:,} bytes early while it was read"
            raise CheckpointError("truncated", name, tensor, detail, DOWNLOAD_FIX)
        done += count


def changed_problem(folder: Path, name: str, before: FileIdentity) -> CheckpointProblem | None:
    """The problem of a file that is no longer the one that was opened, or None."""
    try:
        now = FileIdentity.of(os.stat(resolve_file(folder, name)))
    except CheckpointError as error:
        return error.problems[0]
    except OSError as error:
        return CheckpointProblem("read", name, "", reason(error), DOWNLOAD_FIX)
    if now == before:
        return None
    detail = f"the file changed while it was in use: {before.size:,} bytes, now {now.size:,}"
    return CheckpointProblem("changed", name, "", detail, CHANGED_FIX)


def reason(error: BaseException) -> str:
    """What the system says, printable."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(text or type(error).__name__)
