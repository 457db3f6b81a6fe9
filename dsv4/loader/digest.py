"""Shards against a sha256 manifest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dsv4.core.errors import CheckpointError, CheckpointProblem, printable
from dsv4.core.safe_files import DOWNLOAD_FIX, Opener, open_file, read_exactly

_MAX_MANIFEST_BYTES, _CHUNK = 1 << 20, 8 << 20
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def digest_problems(
    folder: Path, shards: Iterable[str], manifest: str | os.PathLike[str], opener: Opener
) -> list[CheckpointProblem]:
    """Shards whose SHA-256 differs from the manifest's, or that it does not name.

    manifest  a local file, one "<64 hex digits>  <file name>" a line, as sha256sum writes it
    Raises CheckpointError "sha256" for a manifest that cannot be read.
    """
    expected = _read_manifest(manifest)
    problems = []
    for name in shards:
        if name not in expected:
            detail = "the manifest does not name this shard"
            problems.append(CheckpointProblem("sha256", name, "", detail, "use its own manifest"))
            continue
        try:
            got = _digest(folder, name, opener)
        except CheckpointError as error:
            problems += error.problems
            continue
        if got != expected[name]:
            detail = f"expected {expected[name]}, got {got}"
            problems.append(CheckpointProblem("sha256", name, "", detail, DOWNLOAD_FIX))
    return problems


def _read_manifest(path: str | os.PathLike[str]) -> dict[str, str]:
    name = printable(os.path.basename(os.fspath(path)))
    fix = "make it with: sha256sum *.safetensors"
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
        expected[match[2]] = match[1].lower()
    return expected


def _digest(folder: Path, name: str, opener: Opener) -> str:
    file, identity = open_file(folder, name, opener)
    digest, left = hashlib.sha256(), identity.size
    buffer = memoryview(bytearray(min(_CHUNK, left)))
    with file:
        while left:
            chunk = buffer[: min(left, len(buffer))]
            read_exactly(file, chunk, name)
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
