"""Reads tensors shard by shard in file order, each straight into its own memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dsv4.core.errors import CapacityError, CheckpointError
from dsv4.core.formats import DTYPES
from dsv4.core.safe_files import CHANGED_FIX, Opener, open_file, read_exactly
from dsv4.loader.header import Shard
from dsv4.loader.match import Source

# Called with (done_bytes, total_bytes, shard_index, num_shards); the index counts from 0.
Progress = Callable[[int, int, int, int], None]

_CHUNK = 64 << 20


def source_bytes(sources: Iterable[Source]) -> int:
    """Bytes that loading these takes."""
    return sum(source.spec.nbytes for source in sources)


def read_tensors(
    folder: Path,
    shards: dict[str, Shard],
    sources: Iterable[Source],
    opener: Opener,
    progress: Progress | None = None,
) -> Iterator[tuple[Source, Tensor]]:
    """Yield every source with its tensor, in stored dtype, shape of its spec, on the CPU.

    One file is open at a time. Nothing is kept here, so that the memory is what the caller keeps
    plus one tensor. Raises CheckpointError "read", "truncated" or "changed"; CapacityError when
    a tensor cannot be allocated.
    """
    by_file: defaultdict[str, list[Source]] = defaultdict(list)
    for source in sources:
        by_file[source.stored.file].append(source)
    total = source_bytes(s for group in by_file.values() for s in group)
    done = 0

    def advance(shard_index: int, num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total, shard_index, len(by_file))

    for shard_index, name in enumerate(sorted(by_file)):
        file, identity = open_file(folder, name, opener)
        with file:
            if identity != shards[name].identity:
                detail = "the file is not the one that was opened at first"
                raise CheckpointError("changed", name, "", detail, CHANGED_FIX)
            for source in sorted(by_file[name], key=_position):
                yield source, _read_one(file, source, partial(advance, shard_index))


def _position(source: Source) -> int:
    return source.stored.start + source.index * source.spec.nbytes


def _read_one(file: BinaryIO, source: Source, advance: Callable[[int], None]) -> Tensor:
    spec, stored = source.spec, source.stored
    raw = _allocate(spec.nbytes, spec.name)
    try:
        file.seek(_position(source))
    except OSError as error:
        detail = error.strerror or str(error)
        raise CheckpointError("read", stored.file, spec.name, detail, "check the disk") from None
    buffer = memoryview(raw.numpy())
    for start in range(0, len(buffer), _CHUNK):
        chunk = buffer[start : start + _CHUNK]
        read_exactly(file, chunk, stored.file, spec.name)
        advance(len(chunk))
    return raw.view(DTYPES[spec.dtype]).view(spec.shape)


def _allocate(num_bytes: int, name: str) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise CapacityError(f"memory for {name}", num_bytes, 0) from None
