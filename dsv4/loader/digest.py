"""The files of a checkpoint against a sha256 manifest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dsv4.core.errors import CheckpointError, CheckpointProblem, printable
from dsv4.core.safe_files import DOWNLOAD_FIX, Opener, open_file, read_exactly

_MAX_MANIFEST_BYTES, _CHUNK = 1 << 20, 8 << 20
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def digest_problems(
    folder: Path, shards: Iterable[str], manifest: str | os.PathLike[str], opener: Opener
) -> list[CheckpointProblem]:
    """Files whose SHA-256 differs from the manifest's or that are missing; shards not in it.

    The manifest's own line in it, made while it was empty, is passed over.

    manifest  a local file, one "<64 hex digits>  <file name>" a line, as sha256sum writes it
    Raises CheckpointError "sha256" for a manifest that cannot be read.
    """
    expected = _read_manifest(manifest)
    problems, names = [], list(shards)
    for name in dict.fromkeys((*names, *expected)):
        if name not in expected:
            detail = "the manifest does not name this shard"
            problems.append(CheckpointProblem("sha256", name, "", detail, "use its own manifest"))
            continue
        try:
            if name not in names and _is_same_file(folder / name, manifest):
                continue
            got = _digest(folder, name, opener)
        except CheckpointError as error:
            problems += [replace(p, file=printable(name)) for p in error.problems]
            continue
        if got != expected[name]:
            detail = f"expected {expected[name]}, got {got}"
            problems.append(CheckpointProblem("sha256", printable(name), "", detail, DOWNLOAD_FIX))
    return problems


def _is_same_file(a: Path, b: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return False


def _read_manifest(path: str | os.PathLike[str]) -> dict[str, str]:
    name = printable(os.path.basename(os.fspath(path)))
    fix = "make it in the folder with: sha256sum *.json *.safetensors > SUMS"
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_MANIFEST_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError("sha256", name, "", printable(error), fix) from None
    expected = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None or len(text) > _MAX_MANIFEST_BYTES:
            detail = f"not a line of a manifest: {printable(line, 80)}"
            raise CheckpointError("sha256", name, "", detail, fix)
        expected[match[2].removeprefix("./")] = match[1].lower()
    return expected


def _digest(folder: Path, name: str, opener: Opener) -> str:
    parts = name.split("/")
    if not all(parts) or ".." in parts:
        fix = "name files below the folder only"
        raise CheckpointError("path", printable(name), "", "not a name in the folder", fix)
    # A folder that is a link leads to a real path elsewhere, and open_file refuses that.
    file, identity = open_file(folder.joinpath(*parts[:-1]), parts[-1], opener)
    digest, left = hashlib.sha256(), identity.size
    buffer = memoryview(bytearray(min(_CHUNK, left)))
    with file:
        while left:
            chunk = buffer[: min(left, len(buffer))]
            read_exactly(file, chunk, name)
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
