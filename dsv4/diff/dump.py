"""Tap dumps on disk: one safetensors file, names in execution order in its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dsv4.core.errors import RequestError

SCHEMA = 1
MAX_METADATA = 1 << 24  # bytes of a file that may hold the metadata of a dump
DTYPES = ("float64", "float32", "bfloat16")  # finest first


@dataclass(frozen=True)
class DumpInfo:
    """What a dump was made of.

    tier    0 or 1 (2: production)
    dtype   one of DTYPES: activations of the run
    model   name of the checkpoint, for people
    config  short hash of the normalised config
    ids     token ids that were run
    quant   roundings imitated, "" for none
    parts   fused kernels that were run as their parts
    """

    tier: int
    dtype: str
    model: str
    config: str
    ids: tuple[int, ...]
    quant: str = ""
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RequestError("dtype", f"one of {DTYPES}", self.dtype)


def ids_hash(ids: Sequence[int]) -> str:
    """First 16 hex digits of the sha256 of the comma-joined ids."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def check_output(path: str | Path) -> None:
    """Raise RequestError unless `path` is a new name or a dump that may be replaced.

    A device would be replaced by a file, a checkpoint's shard would be lost.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise RequestError("out", "a file in a folder that exists", str(path))
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_file():
        raise RequestError("out", "a new name or a regular file", str(path), "give another name")
    if not _is_dump(path):
        raise RequestError(
            "out", "a new name or an older dump", f"{path}, which is neither", "give another name"
        )


def _is_dump(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(MAX_METADATA)
    return b'"dsv4-taps"' in head


def write_dump(path: str | Path, tensors: Mapping[str, Tensor], info: DumpInfo) -> None:
    """Write `tensors`, in the order of the mapping, with `info` to a safetensors file.

    Raises RequestError where `check_output` does.
    """
    from safetensors.torch import save_file

    check_output(path)
    metadata = {
        "format": "dsv4-taps", "schema": str(SCHEMA), "tier": str(info.tier), "dtype": info.dtype,
        "model": info.model, "config": info.config, "ids": ",".join(map(str, info.ids)),
        "ids_hash": ids_hash(info.ids), "quant": info.quant, "parts": ",".join(info.parts),
        "order": json.dumps([*tensors]),
    }  # fmt: skip
    save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    Path(path).chmod(0o666 & ~mask)  # safetensors makes its files private


class TapDump:
    """A dump opened for reading; tensors are read one at a time.

    info, names  what it is and its taps in execution order
    """

    def __init__(self, path: str | Path) -> None:
        """Open `path`. Raises RequestError when it is no tap dump of this schema."""
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            self._file = safe_open(str(path), framework="pt")
            metadata = self._file.metadata() or {}
            stored = set(self._file.keys())
        except (OSError, SafetensorError) as e:
            raise _no_dump(path, str(e)) from e
        if metadata.get("format") != "dsv4-taps" or metadata.get("schema") != str(SCHEMA):
            raise _no_dump(path, f"metadata {metadata.get('format')!r}, {metadata.get('schema')!r}")
        try:
            self.names: list[str] = json.loads(metadata["order"])
            self.info = DumpInfo(
                int(metadata["tier"]), metadata["dtype"], metadata["model"], metadata["config"],
                tuple(int(i) for i in metadata["ids"].split(",") if i), metadata["quant"],
                tuple(name for name in metadata.get("parts", "").split(",") if name),
            )  # fmt: skip
        except (KeyError, ValueError, TypeError) as e:
            raise _no_dump(path, f"metadata: {e}") from e
        if not isinstance(self.names, list) or sorted(self.names) != sorted(stored):
            raise _no_dump(path, "its 'order' names other tensors than it holds")

    def tensor(self, name: str) -> Tensor:
        """Read one tap."""
        return self._file.get_tensor(name)


def _no_dump(path: str | Path, got: str) -> RequestError:
    return RequestError(
        "dump", f"a tap dump of schema {SCHEMA} at {path}", got[:200], "write it with: dsv4 dump"
    )
