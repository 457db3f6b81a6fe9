"""Checkpoint: open a folder, know everything about it, load it, verify it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv4.core.config_dialects import parse_config
from dsv4.core.errors import CapacityError, CheckpointError, CheckpointProblem, printable
from dsv4.core.formats import BlockScaledTensor
from dsv4.core.inventory import TensorSpec
from dsv4.core.safe_files import (
    Opener,
    changed_problem,
    open_folder,
    open_regular,
    read_json,
    read_small_file,
)
from dsv4.core.strict_json import parse_json
from dsv4.loader.checks import deep_problems, value_problems
from dsv4.loader.digest import digest_problems
from dsv4.loader.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    list_names,
    shard_name_problem,
)
from dsv4.loader.header import MAX_TENSORS, Shard, read_shard
from dsv4.loader.match import Match, Source, match_tensors
from dsv4.loader.memory import free_memory
from dsv4.loader.problems import limited
from dsv4.loader.stream import Progress, read_tensors, source_bytes

Weight = Tensor | BlockScaledTensor

_MAX_CONFIG_BYTES, _MAX_INDEX_BYTES, _MAX_SHARDS = 1 << 20, 64 << 20, 2000
_REFETCH = "fetch model.safetensors.index.json and the shards again, of one revision"


class Checkpoint:
    """A checkpoint folder whose files, headers and tensor list have been found right.

    config   ModelConfig, MTP blocks taken out where the file has none by design
    dialect  "official" or "transformers": whose tensor names the files have
    notices  what was skipped or ignored, for the user to read
    folder   the real path

    Make one with `open`. Tensor bytes are read by `load` and `verify(deep=True)` only.
    """

    def __init__(
        self,
        folder: Path,
        match: Match,
        shards: dict[str, Shard],
        notices: list[str],
        opener: Opener,
        memory: Callable[[], int],
    ) -> None:
        self.folder, self.config, self.dialect = folder, match.config, match.dialect
        self.notices = notices
        self._sources, self._shards = match.sources, shards
        self._opener, self._memory = opener, memory

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        opener: Opener = open_regular,
        memory: Callable[[], int] = free_memory,
    ) -> Checkpoint:
        """Read config, index and headers, and check all that needs no tensor bytes.

        opener  opens a resolved path as an unbuffered binary file
        memory  tells the bytes that a load may take

        Raises ConfigError for a config.json that cannot be; CheckpointError with every problem
        found otherwise.
        """
        with _paused_collector():
            return cls._open(path, opener, memory)

    @classmethod
    def _open(
        cls, path: str | os.PathLike[str], opener: Opener, memory: Callable[[], int]
    ) -> Checkpoint:
        folder = open_folder(path)
        names = list_names(folder)
        parsed = parse_config(read_json(folder, CONFIG_FILE, _MAX_CONFIG_BYTES, opener))
        notices = [f"config.json: key {printable(k)} not understood" for k in parsed.unknown_keys]
        shards = _read_shards(folder, names, opener, notices)
        stored = {name: t for shard in shards.values() for name, t in shard.tensors.items()}
        match = match_tensors(parsed.config, stored)
        if match.problems:
            raise CheckpointError.of(match.problems)
        return cls(folder, match, shards, notices + match.notices, opener, memory)

    @property
    def num_tensors(self) -> int:
        """Tensors of the model, scales counted."""
        return len(self._sources)

    @property
    def num_bytes(self) -> int:
        """Bytes of the model's tensors, which is what a load takes."""
        return source_bytes(self._sources.values())

    @property
    def shards(self) -> tuple[str, ...]:
        """File names of the shards, sorted."""
        return tuple(sorted(self._shards))

    def tensors(self) -> Iterator[tuple[str, TensorSpec, str]]:
        """(official name, spec with the stored dtype, shard file) in inventory order."""
        for name, source in self._sources.items():
            yield name, source.spec, source.stored.file

    def load(
        self, progress: Progress | None = None, keep: Callable[[str], bool] | None = None
    ) -> dict[str, Weight]:
        """Read the weights: official parameter names, inventory order, CPU, stored dtypes.

        A quantised parameter is one BlockScaledTensor, its scales inside. `keep` picks parameters
        by name. Memory: the result plus one tensor.

        Raises CapacityError before the first read if the memory is short; CheckpointError with
        every problem of the values read ("scale", "value"), or for a file that cannot be read or
        changed on the way. Nothing partial is ever returned.
        """
        sources = [s for s in self._sources.values() if keep is None or keep(s.spec.parameter)]
        needed, free = source_bytes(sources), self._memory()
        if needed > free:
            fix = "close other programs, use a larger machine, or slice the checkpoint"
            raise CapacityError("memory for the weights, in bytes", needed, free, fix)
        tensors: dict[str, Tensor] = {}
        problems: list[CheckpointProblem] = []
        try:
            for source, x in self._read(sources, progress):
                problems += value_problems(source, x, self.config)
                tensors[source.spec.name] = x
        except CheckpointError as error:
            problems += error.problems
        problems += self._changes(problems)
        if problems:
            raise CheckpointError.of(problems)
        return _assemble(sources, tensors)

    def stream(
        self, progress: Progress | None = None, keep: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors one by one, official names, CPU: for who copies them to a device.

        Memory: one tensor. `keep` picks parameters by name. Raises CheckpointError as `load` does,
        at the end for bad values: what came before is not to be used then.
        """
        sources = [s for s in self._sources.values() if keep is None or keep(s.spec.parameter)]
        problems: list[CheckpointProblem] = []
        for source, x in self._read(sources, progress):
            problems += value_problems(source, x, self.config)
            yield source.spec.name, x
        problems += self._changes(problems)
        if problems:
            raise CheckpointError.of(problems)

    def verify(
        self,
        deep: bool = False,
        sha256: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> list[CheckpointProblem]:
        """Problems found beyond what `open` has already refused; an empty list is a sound file.

        deep    read all bytes: scales, tid2eid, NaN and Inf in plain tensors and FP8 payloads
        sha256  manifest with one "<64 hex digits>  <file name>" a line, as sha256sum writes it
        """
        problems: list[CheckpointProblem] = []
        if deep:
            try:
                for source, x in self._read(self._sources.values(), progress):
                    problems += value_problems(source, x, self.config) + deep_problems(source, x)
            except CheckpointError as error:
                problems += error.problems
        if sha256 is not None:
            problems += digest_problems(self.folder, self.shards, sha256, self._opener)
        return problems + self._changes(problems)

    def _read(
        self, sources: Iterable[Source], progress: Progress | None
    ) -> Iterator[tuple[Source, Tensor]]:
        return read_tensors(self.folder, self._shards, sources, self._opener, progress)

    def _changes(self, known: list[CheckpointProblem]) -> list[CheckpointProblem]:
        found = [
            changed_problem(self.folder, name, shard.identity)
            for name, shard in self._shards.items()
        ]
        reported = {p.file for p in known if p.kind == "changed"}
        return [p for p in found if p is not None and p.file not in reported]


@contextmanager
def _paused_collector() -> Iterator[None]:
    """No cyclic garbage collection: it finds nothing here and takes 70 % of a large open."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_shards(
    folder: Path, names: list[str], opener: Opener, notices: list[str]
) -> dict[str, Shard]:
    """The headers of all shards. Raises CheckpointError with the problems of all of them."""
    weight_map = _read_index(folder, opener, notices) if INDEX_FILE in names else None
    wanted = sorted(set(weight_map.values())) if weight_map else [SINGLE_FILE]
    _sort_out_other_files(names, wanted, notices)
    shards: dict[str, Shard] = {}
    problems: list[CheckpointProblem] = []
    num_tensors = 0
    for name in wanted:
        try:
            shards[name] = read_shard(folder, name, opener)
        except CheckpointError as error:
            problems += error.problems
            continue
        num_tensors += len(shards[name].tensors)
        if num_tensors > MAX_TENSORS:
            detail = f"more than {MAX_TENSORS:,} tensors up to this shard"
            problems.append(CheckpointProblem("too_large", name, "", detail, _REFETCH))
            break
    else:
        if weight_map is not None:
            problems += limited(_index_problems(weight_map, shards))
    if problems:
        raise CheckpointError.of(problems)
    return shards


def _read_index(folder: Path, opener: Opener, notices: list[str]) -> dict[str, str]:
    """weight_map of the index, each shard name a plain file name."""
    data = read_small_file(folder, INDEX_FILE, _MAX_INDEX_BYTES, opener)
    quotes = data.count(b'"')
    if quotes > 4 * MAX_TENSORS + 1000 or data.count(b"{") + data.count(b"[") > 1000:
        detail = f"names more than {MAX_TENSORS:,} tensors, or is no index"
        raise CheckpointError("too_large", INDEX_FILE, "", detail, _REFETCH)
    raw: Any = parse_json(data, INDEX_FILE)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        detail = "expected an object with a weight_map that is not empty"
        raise CheckpointError("index", INDEX_FILE, "", detail, _REFETCH)
    shard_names = {v if isinstance(v, str) else printable(v): v for v in weight_map.values()}
    problems = [p for p in map(shard_name_problem, shard_names.values()) if p is not None]
    if len(shard_names) > _MAX_SHARDS:
        detail = f"{len(shard_names):,} shards, at most {_MAX_SHARDS:,} are read"
        problems.append(CheckpointProblem("too_large", INDEX_FILE, "", detail, _REFETCH))
    if problems:
        raise CheckpointError.of(limited(problems))
    return weight_map


def _sort_out_other_files(names: list[str], wanted: list[str], notices: list[str]) -> None:
    """Notice files that are not read; refuse a folder that has nothing but them."""
    pickles = [n for n in names if n.lower().endswith(PICKLE_SUFFIXES)]
    others = [n for n in names if n.endswith(".safetensors") and n not in wanted]
    if not any(n in names for n in wanted):
        if others and wanted == [SINGLE_FILE]:
            detail = f"not in the folder, and no {SINGLE_FILE} either, beside {len(others)} shards"
            raise CheckpointError("missing_file", INDEX_FILE, "", detail, _REFETCH)
        if pickles:
            detail = "pickle files can run code and are never opened"
            fix = "convert them to safetensors where you trust them, or fetch a safetensors copy"
            raise CheckpointError("format", printable(pickles[0]), "", detail, fix)
    if pickles:
        notices.append(f"ignored, not safetensors: {printable(', '.join(pickles))}")
    if others:
        notices.append(f"ignored, not shards of the index: {printable(', '.join(others))}")


def _index_problems(
    weight_map: dict[str, str], shards: dict[str, Shard]
) -> Iterator[CheckpointProblem]:
    """Index and headers must name the same tensors in the same files, each in one only.

    Shards whose header could not be read are not in `shards`; they have been reported.
    """
    for tensor, file in weight_map.items():
        if file in shards and tensor not in shards[file].tensors:
            detail = f"the index puts {printable(tensor)} here, the file does not have it"
            yield CheckpointProblem("index", file, printable(tensor), detail, _REFETCH)
    for file, shard in shards.items():
        for tensor in shard.tensors:
            indexed = weight_map.get(tensor)
            if indexed is None:
                detail = "the index does not name this tensor"
                yield CheckpointProblem("index", file, tensor, detail, _REFETCH)
            elif indexed != file and indexed in shards and tensor in shards[indexed].tensors:
                detail = f"also in {indexed}"
                yield CheckpointProblem("duplicate", file, tensor, detail, _REFETCH)
            elif indexed != file:
                detail = f"the index puts this tensor into {indexed}"
                yield CheckpointProblem("index", file, tensor, detail, _REFETCH)


def _assemble(sources: Iterable[Source], tensors: dict[str, Tensor]) -> dict[str, Weight]:
    """Parameters of their tensors: payload, scale and scalars become one BlockScaledTensor."""
    weights: dict[str, Weight] = {}
    for spec in (source.spec for source in sources):
        if spec.name != spec.parameter:
            continue
        x = tensors[spec.name]
        if spec.format is None:
            weights[spec.name] = x
            continue
        base = spec.name.removesuffix(".weight")
        scale = tensors.get(f"{base}.scale", tensors.get(f"{base}.weight_scale"))
        assert scale is not None  # match_tensors has seen to it
        weights[spec.name] = BlockScaledTensor(
            spec.format,
            x,
            scale,
            tensors.get(f"{base}.weight_scale_2"),
            tensors.get(f"{base}.input_scale"),
        )
    return weights
