"""What generation_config.json adds to a checkpoint: more ids that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.core.config import ModelConfig
from dsv4.core.errors import CheckpointError, printable
from dsv4.core.safe_files import has_file, open_folder, read_json

MAX_JSON_BYTES = 1 << 20


def generation_config(folder: Path) -> dict[str, Any] | None:
    """generation_config.json of a checkpoint folder, None without one. Raises CheckpointError."""
    real, name = open_folder(folder), "generation_config.json"
    if not has_file(real, name):
        return None
    raw = read_json(real, name, MAX_JSON_BYTES)
    if not isinstance(raw, dict):
        detail = f"expected an object, got {printable(raw, 60)}"
        raise CheckpointError("json", name, detail=detail, fix="correct or delete the file")
    return raw


def stop_ids(folder: Path, config: ModelConfig) -> frozenset[int]:
    """End of sentence, and the eos_token_id of generation_config.json: an id or a list."""
    more: Any = (generation_config(folder) or {}).get("eos_token_id", [])
    ids: list[Any] = more if isinstance(more, list) else [more]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise CheckpointError(
            "json", "generation_config.json",
            detail=f"eos_token_id: expected ids, got {printable(more)}",
            fix="correct eos_token_id, or delete the file",
        )  # fmt: skip
    return frozenset((config.eos_token_id, *ids))
