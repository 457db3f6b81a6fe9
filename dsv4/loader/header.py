"""The safetensors header: read by our own parser first, so that nothing odd gets any further.

A file is: 8 bytes little-endian header length n, n bytes of JSON, then the tensors back to back.
On top of what the safetensors library checks: caps that bound time and memory, no duplicate keys,
no blanks before the brace, printable names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

from dsv4.core.errors import CheckpointError, CheckpointProblem, printable
from dsv4.core.safe_files import (
    DOWNLOAD_FIX,
    FileIdentity,
    Opener,
    open_file,
    read_exactly,
)
from dsv4.core.strict_json import parse_json, unique_keys
from dsv4.loader.problems import limited

# The largest published model in the largest format (Pro, NVFP4) has 285,660 tensors in all.
MAX_TENSORS = 300_000
MAX_HEADER_BYTES = 32 << 20
MAX_RANK, MAX_NAME = 8, 256
_NATURALS_END = 1 << 63

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor as a shard's header describes it; `start` and `end` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


class _Entry(NamedTuple):
    """A tensor's object in the header as it came: a third of the memory of its dict."""

    dtype: Any
    shape: Any
    data_offsets: Any


_ENTRY_KEYS = set(_Entry._fields)


@dataclass(frozen=True)
class Shard:
    """One safetensors file, its tensors by name, and the identity it had when it was read."""

    file: str
    identity: FileIdentity
    tensors: dict[str, StoredTensor]


def read_shard(folder: Path, name: str, opener: Opener) -> Shard:
    """Read and check the header of one shard.

    Raises CheckpointError with every problem of that header: "truncated", "extended", "too_large",
    "header", "json", "duplicate", "dtype", "hole", "overlap", "empty", and those of `open_file`.
    """
    file, identity = open_file(folder, name, opener)
    with file:
        if identity.size < 8:
            detail = f"{identity.size} bytes; a safetensors file starts with an 8-byte length"
            raise CheckpointError("truncated", name, "", detail, DOWNLOAD_FIX)
        length_bytes = bytearray(8)
        read_exactly(file, memoryview(length_bytes), name)
        length = int.from_bytes(length_bytes, "little")
        if length > MAX_HEADER_BYTES:
            detail = f"the header says {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read"
            fix = "this is no safetensors file, or a damaged one; " + DOWNLOAD_FIX
            raise CheckpointError("too_large", name, "", detail, fix)
        if 8 + length > identity.size:
            detail = f"the header alone needs {8 + length:,} bytes, the file has {identity.size:,}"
            raise CheckpointError("truncated", name, "", detail, DOWNLOAD_FIX)
        buffer = bytearray(length)
        read_exactly(file, memoryview(buffer), name)
    tensors = parse_header(buffer, name, identity.size)
    return Shard(name, identity, tensors)


def parse_header(data: bytes | bytearray, file: str, file_bytes: int) -> dict[str, StoredTensor]:
    """The tensors a header describes, by name. Raises CheckpointError with all that is wrong."""
    _check_caps(data, file)
    raw = parse_json(data, file, _make_entry)
    problems: list[CheckpointProblem] = []
    if not _is_text_map(raw.pop("__metadata__", {})):
        detail = "__metadata__: expected an object of strings"
        problems.append(CheckpointProblem("header", file, "", detail, DOWNLOAD_FIX))
    data_start = 8 + len(data)
    tensors: dict[str, StoredTensor] = {}
    problems += limited(_parse_entries(raw, file, data_start, tensors))
    if not tensors and not problems:
        problems.append(CheckpointProblem("empty", file, "", "holds no tensors", DOWNLOAD_FIX))
    if not problems:  # offsets of a header with bad entries would only repeat the news
        problems += limited(_layout_problems(tensors, file, data_start, file_bytes))
    if problems:
        raise CheckpointError.of(problems)
    return tensors


def _check_caps(data: bytes | bytearray, file: str) -> None:
    """Bound what parsing can cost. Counting bytes is some 1000 times cheaper than parsing them."""
    if not data.startswith(b"{"):
        raise CheckpointError("header", file, "", "does not start with '{'", DOWNLOAD_FIX)
    for byte, limit, what in (
        (b"{", MAX_TENSORS + 2, "objects"),
        (b"[", 2 * MAX_TENSORS, "lists"),
        (b",", (3 + 2 + MAX_RANK) * MAX_TENSORS, "items"),
    ):
        count = data.count(byte)
        if count > limit:
            detail = f"the header has {count:,} {what}, at most {limit:,} are read"
            raise CheckpointError(
                "too_large", file, "", detail, "this is no DeepSeek-V4 checkpoint"
            )


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _make_entry(pairs: list[tuple[str, Any]]) -> Any:
    if len(pairs) == 3:  # the usual order, without a dict: 300,000 of them are felt
        (a, dtype), (b, shape), (c, offsets) = pairs
        if (a, b, c) == _Entry._fields:
            return _Entry(dtype, shape, offsets)
    value = unique_keys(pairs)
    return _Entry(**value) if value.keys() == _ENTRY_KEYS else value


def _parse_entries(
    raw: dict[str, Any], file: str, data_start: int, tensors: dict[str, StoredTensor]
) -> Iterator[CheckpointProblem]:
    """Empty `raw` into `tensors`; yield what is wrong with the others."""
    for name in list(raw):
        entry = raw.pop(name)  # two copies of a long header would be felt
        fault = _fault(name, entry)
        if fault is not None:
            yield CheckpointProblem(fault[0], file, printable(name), fault[1], DOWNLOAD_FIX)
            continue
        begin, end = entry.data_offsets
        shape, dtype = tuple(entry.shape), intern(entry.dtype)
        tensors[name] = StoredTensor(name, dtype, shape, file, data_start + begin, data_start + end)


def _fault(name: str, entry: Any) -> tuple[str, str] | None:
    """Problem kind and detail of one header entry, None for a sound one."""
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= MAX_NAME):
        return "header", f"expected a printable ASCII name of at most {MAX_NAME} characters"
    if not isinstance(entry, _Entry):
        return "header", "expected an object with dtype, shape and data_offsets"
    dtype, shape, offsets = entry
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return "dtype", f"unknown dtype {printable(dtype, 40)}"
    if not _is_naturals(shape) or len(shape) > MAX_RANK:
        return "header", f"shape: expected up to {MAX_RANK} sizes, got {printable(shape, 60)}"
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "header", f"data_offsets: expected [begin, end], got {printable(offsets, 60)}"
    nbytes, span = prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if nbytes != span:
        shown = printable(shape, 60)
        return "header", f"{dtype} {shown} is {nbytes:,} bytes, its offsets span {span:,}"
    return None


def _is_naturals(value: Any) -> bool:
    """A list of integers from 0 to 2^63 - 1; bool is not an integer here."""
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - the fastest way for the one to four items of a tensor
        if type(item) is not int or not 0 <= item < _NATURALS_END:
            return False
    return True


def _layout_problems(
    tensors: dict[str, StoredTensor], file: str, data_start: int, file_bytes: int
) -> Iterator[CheckpointProblem]:
    """Tensors must cover the data without hole or overlap, and the file must end with the last."""
    position = data_start
    for t in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if t.start != position:
            kind = "hole" if t.start > position else "overlap"
            detail = (
                f"starts at byte {t.start:,} of the file, the tensor before ends at {position:,}"
            )
            yield CheckpointProblem(kind, file, t.name, detail, DOWNLOAD_FIX)
        position = max(position, t.end)
    if position == file_bytes:
        return
    detail = f"file is {file_bytes:,} bytes, its header describes {position:,}"
    if file_bytes < position:
        cause, kind = "; likely cause: interrupted download", "truncated"
        first = min((t for t in tensors.values() if t.end > file_bytes), key=lambda t: t.start)
        yield CheckpointProblem(kind, file, "", detail + cause, DOWNLOAD_FIX)
        yield CheckpointProblem(kind, file, first.name, "the first tensor cut off", DOWNLOAD_FIX)
    else:
        cause = "; likely cause: two downloads written to one file"
        yield CheckpointProblem("extended", file, "", detail + cause, DOWNLOAD_FIX)
