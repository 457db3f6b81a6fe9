"""Names in a checkpoint folder."""

from __future__ import annotations

import os
from pathlib import Path

from dsv4.core.errors import CheckpointError, CheckpointProblem, printable
from dsv4.core.safe_files import reason

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def list_names(folder: Path) -> list[str]:
    """Names in the folder, sorted. Raises CheckpointError "folder" when it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        fix = "check the permissions of the folder"
        raise CheckpointError("folder", "", "", reason(error), fix) from None


def shard_name_problem(name: object) -> CheckpointProblem | None:
    """Why `name`, read from an index, cannot be a shard of this folder; None if it can."""
    shown = printable(name)
    fix = "fetch model.safetensors.index.json again from a source you trust"
    if not isinstance(name, str):
        return CheckpointProblem("index", INDEX_FILE, "", f"shard name is not text: {shown}", fix)
    if "/" in name or "\\" in name or name in (".", "..") or ":" in name:
        detail = f"shard {shown} is not a plain file name"
        return CheckpointProblem("path", INDEX_FILE, "", detail, fix)
    if not name.isascii() or not name.isprintable() or not 0 < len(name) <= 255:
        detail = f"shard {shown}: expected printable ASCII, at most 255 characters"
        return CheckpointProblem("path", INDEX_FILE, "", detail, fix)
    if not name.endswith(".safetensors"):
        detail = f"shard {shown} is not a .safetensors file"
        return CheckpointProblem("path", INDEX_FILE, "", detail, fix)
    return None
