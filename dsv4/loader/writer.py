"""Writes a checkpoint in the official format: config.json, index, shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.config_dialects import parse_config, to_official
from dsv4.core.errors import CheckpointError, ConfigError, printable
from dsv4.core.formats import DTYPE_NAMES, NVFP4, BlockScaledTensor
from dsv4.core.inventory import tensor_specs
from dsv4.loader.folder import CONFIG_FILE, INDEX_FILE
from dsv4.loader.header import ITEM_BYTES, StoredTensor
from dsv4.loader.match import match_tensors

Weight = Tensor | BlockScaledTensor
Buffer = bytes | bytearray | memoryview

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, Weight] | Iterator[tuple[str, Weight]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    generation_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write `weights` as an official checkpoint of `config`; the same input gives the same bytes.

    weights  official parameter names; exactly the inventory of `config`, in its dtypes. A mapping
             is written in inventory order; (name, weight) pairs in theirs, one shard in memory
    max_shard_bytes  tensor bytes of one shard; a parameter larger than that has its own

    Everything goes to a temporary folder inside first, then is renamed, config last; files of an
    old checkpoint are removed after that. No link in the folder is ever written through. Raises
    CheckpointError "exists" if the folder holds a checkpoint and overwrite is False, "write" when
    the disk refuses, and the kinds of `match_tensors` when the weights are not those of `config`;
    ConfigError when config.json cannot express `config`.
    """
    target = Path(folder)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    raw = _config_json(config)
    if isinstance(weights, Mapping):
        weights = _in_inventory_order(config, weights)
    old = _existing_files(target)
    if old and not overwrite:
        detail = f"{printable(target)} already holds {old[0]}"
        raise CheckpointError("exists", "", "", detail, "choose an empty folder, or overwrite it")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".writing-", dir=target, ignore_cleanup_errors=True) as work:
            final = _write_all(Path(work), config, raw, weights, max_shard_bytes, generation_config)
            _replace(target, Path(work), final, old)
    except OSError as error:
        detail = printable(error.strerror or error)
        raise CheckpointError("write", "", "", detail, "free some disk space") from None


def write_new_file(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write a file that must not exist yet; a link at `path` is an error and is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666), "wb") as file:
        for chunk in chunks:
            file.write(chunk)


def write_file(folder: Path, name: str, data: Buffer) -> None:
    """Put `data` at `folder`/`name`, at once and in place of whatever is there, links included."""
    with TemporaryDirectory(prefix=".writing-", dir=folder, ignore_cleanup_errors=True) as work:
        write_new_file(Path(work) / name, [data])
        os.replace(Path(work) / name, folder / name)


def _write_all(
    work: Path,
    config: ModelConfig,
    raw: dict[str, Any],
    weights: Iterable[tuple[str, Weight]],
    max_shard_bytes: int,
    generation_config: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Write every file to the folder `work` and check the whole: names there -> final names."""
    stored: dict[str, StoredTensor] = {}
    shards: list[str] = []
    for number, tensors in enumerate(_shards(weights, max_shard_bytes)):
        shards.append(f"shard-{number}")
        for tensor in _write_shard(work / shards[-1], tensors):
            if tensor.name in stored:
                fix = "give every parameter once"
                raise CheckpointError("duplicate", "", tensor.name, "given twice", fix)
            stored[tensor.name] = tensor
    problems = match_tensors(config, stored, dialect="official").problems
    if problems:
        raise CheckpointError.of(problems)
    final = {
        name: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, name in enumerate(shards, 1)
    }
    index = {
        "metadata": {"total_size": sum(t.end - t.start for t in stored.values())},
        "weight_map": {name: final[t.file] for name, t in sorted(stored.items())},
    }
    texts = {INDEX_FILE: index, CONFIG_FILE: raw}
    if generation_config is not None:
        texts = {GENERATION_CONFIG_FILE: dict(generation_config), **texts}
    for name, value in texts.items():
        text = json.dumps(value, indent=2) + "\n"
        write_new_file(work / name, [text.encode()])
        final[name] = name
    return final


def _replace(target: Path, work: Path, final: Mapping[str, str], old: list[str]) -> None:
    """Move the files of `work` into place, then remove those of the old checkpoint.

    config.json goes first and comes last: a folder in which old and new are mixed has none.
    """
    (target / CONFIG_FILE).unlink(missing_ok=True)
    for name, final_name in final.items():
        os.replace(work / name, target / final_name)
    for name in set(old) - set(final.values()):
        (target / name).unlink()


def _config_json(config: ModelConfig) -> dict[str, Any]:
    raw = to_official(config)
    if parse_config(raw).config != config:
        formats = (config.linear_format, config.expert_format)
        raise ConfigError("linear_format, expert_format", "a pair that config.json has", formats)
    return raw


def _existing_files(target: Path) -> list[str]:
    if not target.exists():
        return []
    if not target.is_dir():
        detail = f"{printable(target)} is not a folder"
        raise CheckpointError("exists", "", "", detail, "choose another name")
    return sorted(
        p.name
        for p in target.iterdir()
        if p.name in (CONFIG_FILE, INDEX_FILE, GENERATION_CONFIG_FILE)
        or (p.name.startswith("model") and p.name.endswith(".safetensors"))
    )


def _in_inventory_order(
    config: ModelConfig, weights: Mapping[str, Weight]
) -> Iterator[tuple[str, Weight]]:
    order = {spec.parameter: None for spec in tensor_specs(config).values()}
    yield from ((name, weights[name]) for name in order if name in weights)
    yield from ((name, weight) for name, weight in weights.items() if name not in order)


def stored_parts(name: str, weight: Weight) -> dict[str, Tensor]:
    """The tensors of one parameter under the names that the official format gives them."""
    if isinstance(weight, Tensor):
        return {name: weight}
    base = name.removesuffix(".weight")
    is_nvfp4 = weight.format.name == NVFP4.name
    parts = {
        name: weight.data,
        f"{base}.weight_scale" if is_nvfp4 else f"{base}.scale": weight.scale,
        f"{base}.weight_scale_2": weight.global_scale,
        f"{base}.input_scale": weight.input_scale,
    }
    return {name: x for name, x in parts.items() if x is not None}


def _shards(
    weights: Iterable[tuple[str, Weight]], max_shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, weight in weights:
        parts = stored_parts(name, weight)
        num_bytes = sum(x.nbytes for x in parts.values())
        if shard and filled + num_bytes > max_shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard |= parts
        filled += num_bytes
    yield shard


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> list[StoredTensor]:
    """One safetensors file; wide elements first, so that every tensor is aligned."""
    for name, x in tensors.items():
        if x.dtype not in DTYPE_NAMES:
            detail = f"{x.dtype} is not a dtype of a checkpoint"
            raise CheckpointError("dtype", "", name, detail, "cast the tensor first")
    order = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored, end = [], 0
    for name, x in order:
        start, end = end, end + x.nbytes
        dtype, shape = DTYPE_NAMES[x.dtype], tuple(x.shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        stored.append(StoredTensor(name, dtype, shape, path.name, start, end))
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % max(ITEM_BYTES.values()))
    write_new_file(path, chain([len(text).to_bytes(8, "little") + text], _payloads(order)))
    return stored


def _payloads(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Buffer]:
    for _, x in tensors:
        flat = x.detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())
