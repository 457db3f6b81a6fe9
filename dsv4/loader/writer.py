"""Writes a checkpoint in the official format: config.json, index, shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.config_dialects import parse_config, to_official
from dsv4.core.errors import CheckpointError, ConfigError
from dsv4.core.formats import DTYPE_NAMES, NVFP4, BlockScaledTensor
from dsv4.core.inventory import tensor_specs
from dsv4.loader.folder import CONFIG_FILE, INDEX_FILE
from dsv4.loader.header import ITEM_BYTES, StoredTensor
from dsv4.loader.match import match_tensors
from dsv4.loader.problems import printable

Weight = Tensor | BlockScaledTensor

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

    Everything goes to temporary names first, then is renamed, config and index last. Raises
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
    temporary: list[Path] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        _write_all(target, config, raw, weights, max_shard_bytes, generation_config, old, temporary)
    except OSError as error:
        detail = printable(error.strerror or error)
        raise CheckpointError("write", "", "", detail, "free some disk space") from None
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _write_all(
    target: Path,
    config: ModelConfig,
    raw: dict[str, Any],
    weights: Iterable[tuple[str, Weight]],
    max_shard_bytes: int,
    generation_config: Mapping[str, Any] | None,
    old: list[str],
    temporary: list[Path],
) -> None:
    """Write every file to a name in `temporary`, check the whole, rename."""
    stored: dict[str, StoredTensor] = {}
    for number, tensors in enumerate(_shards(weights, max_shard_bytes)):
        path = target / f".shard-{number}.part"
        temporary.append(path)
        for tensor in _write_shard(path, tensors):
            if tensor.name in stored:
                fix = "give every parameter once"
                raise CheckpointError("duplicate", "", tensor.name, "given twice", fix)
            stored[tensor.name] = tensor
    problems = match_tensors(config, stored, dialect="official").problems
    if problems:
        raise CheckpointError.of(problems)
    parts = list(temporary)
    final = {
        p.name: f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i, p in enumerate(parts, 1)
    }
    index = {
        "metadata": {"total_size": sum(t.end - t.start for t in stored.values())},
        "weight_map": {name: final[t.file] for name, t in sorted(stored.items())},
    }
    texts = {CONFIG_FILE: raw, INDEX_FILE: index}
    if generation_config is not None:
        texts[GENERATION_CONFIG_FILE] = dict(generation_config)
    for name, value in texts.items():
        path = target / f".{name}.part"
        temporary.append(path)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        final[path.name] = name
    # An index without its shards, or the other way round, must never look complete.
    for name in old:
        (target / name).unlink()
    for path in sorted(temporary, key=lambda p: p.name.endswith(f"{INDEX_FILE}.part")):
        path.rename(target / final[path.name])


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
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, x in order:
            flat = x.detach().cpu().contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))
    return stored
