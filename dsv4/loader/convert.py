"""Checkpoint to checkpoint: cut to fewer layers or experts, dequantise, rename for transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.formats import BlockScaledTensor
from dsv4.core.inventory import tensor_specs
from dsv4.loader.checkpoint import Checkpoint
from dsv4.loader.names import stacked_experts, to_transformers
from dsv4.loader.writer import MAX_SHARD_BYTES, write_checkpoint

Weight = Tensor | BlockScaledTensor

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_BLOCK = re.compile(r"(?:layers|mtp)\.\d+\.")


def slice_config(config: ModelConfig, num_layers: int, num_experts: int) -> ModelConfig:
    """The config of the first `num_layers` layers and `num_experts` experts. DSpark is left out.

    Raises RequestError when there are not that many, or fewer experts than a token uses.
    """
    c = config
    if not 1 <= num_layers <= c.num_hidden_layers:
        raise RequestError("layers", f"1 to {c.num_hidden_layers}", num_layers)
    if not c.num_experts_per_tok <= num_experts <= c.n_routed_experts:
        what = f"{c.num_experts_per_tok} (experts of a token) to {c.n_routed_experts}"
        raise RequestError("experts", what, num_experts)
    return replace(
        c,
        num_hidden_layers=num_layers,
        compress_ratios=c.compress_ratios[:num_layers],
        num_hash_layers=min(c.num_hash_layers, num_layers),
        n_routed_experts=num_experts,
        num_nextn_predict_layers=0 if c.dspark_block_size else c.num_nextn_predict_layers,
        dspark_block_size=0,
    )


def slice_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ModelConfig:
    """Write the first layers and experts of `source` as an official checkpoint; return its config.

    Memory: one layer and one shard. The result runs, and is a fair object for timing and for
    comparing implementations; what it says makes no sense. Raises RequestError for counts that
    the model does not have or a target that is the source, and what Checkpoint and
    write_checkpoint raise.
    """
    ck = Checkpoint.open(source)
    c = ck.config
    _check_target(ck, target)
    config = slice_config(
        c,
        c.num_hidden_layers if num_layers is None else num_layers,
        c.n_routed_experts if num_experts is None else num_experts,
    )
    weights = (
        (name, _first_experts(name, weight, config.n_routed_experts))
        for name, weight in _by_block(ck, config)
    )
    write_checkpoint(
        target, config, weights, max_shard_bytes,
        generation_config=generation_config, overwrite=overwrite,
    )  # fmt: skip
    return config


def dequantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dequantize: Callable[[BlockScaledTensor], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ModelConfig:
    """Write `source` without quantised tensors, in BF16; return the new config.

    dequantize  gives the [out, in] values of a quantised matrix; they are rounded to BF16, which
                for FP8, MXFP4 and NVFP4 with power-of-two scales loses nothing

    Memory: one layer and one shard. Plain tensors keep their dtype. DSpark stages are left out.
    Raises RequestError for a target that is the source.
    """
    ck = Checkpoint.open(source)
    _check_target(ck, target)
    config = slice_config(ck.config, ck.config.num_hidden_layers, ck.config.n_routed_experts)
    config = replace(config, expert_format="bfloat16", linear_format="bfloat16")
    weights = (
        (name, dequantize(w).bfloat16() if isinstance(w, BlockScaledTensor) else w)
        for name, w in _by_block(ck, config)
    )
    write_checkpoint(
        target, config, weights, max_shard_bytes,
        generation_config=generation_config, overwrite=overwrite,
    )  # fmt: skip
    return config


def transformers_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of transformers' DeepseekV4ForCausalLM from plain official weights.

    Experts are stacked, the MTP block is left out. Every weight must be a Tensor: dequantise
    first. Dtypes stay as they are.
    """
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        theirs = to_transformers(name)
        if theirs is None:
            continue
        if _EXPERT.search(name):
            stacks.setdefault(theirs, {})[name] = weight
        else:
            out[theirs] = weight
    for theirs, parts in stacks.items():
        num_experts = 1 + max(int(m[1]) for m in map(_EXPERT.search, parts) if m)
        rows = [parts[name] for name in stacked_experts(theirs, num_experts)]
        out[theirs] = torch.cat(rows).view(num_experts, -1, rows[0].shape[1])
    return out


def _check_target(ck: Checkpoint, target: str | os.PathLike[str]) -> None:
    """The source is read while the target is written: they must be two folders."""
    if os.path.exists(target) and os.path.samefile(ck.folder, target):
        raise RequestError(
            "out", "another folder than the source", os.fspath(target), "choose another folder"
        )


def _by_block(ck: Checkpoint, config: ModelConfig) -> Iterator[tuple[str, Weight]]:
    """The parameters of `config` out of `ck`, loaded a layer at a time, in inventory order."""
    specs = tensor_specs(config)
    blocks: dict[str, dict[str, str]] = {}
    for spec in specs.values():
        block = _BLOCK.match(spec.parameter)
        wanted = blocks.setdefault(block[0] if block else spec.parameter, {})
        wanted.setdefault(spec.parameter, spec.dtype)
    for wanted in blocks.values():
        loaded = ck.load(keep=wanted.__contains__)
        for name, dtype in wanted.items():
            yield name, _official_dtype(loaded.pop(name), dtype)


def _official_dtype(weight: Weight, dtype: str) -> Weight:
    """transformers stores norms in F32; give back the BF16 of the release where it is exact."""
    if isinstance(weight, BlockScaledTensor):
        return weight
    if weight.dtype == torch.float32 and dtype == "BF16":
        narrow = weight.bfloat16()
        return narrow if torch.equal(narrow.float(), weight) else weight
    return weight


def _first_experts(name: str, weight: Weight, num_experts: int) -> Weight:
    """Cut router tensors to `num_experts`; tid2eid rows with an expert beyond get neighbours."""
    if isinstance(weight, BlockScaledTensor) or ".ffn.gate." not in name:
        return weight
    if not name.endswith(".tid2eid"):
        return weight[:num_experts]
    run = (weight[:, :1] + torch.arange(weight.shape[1])) % num_experts
    return torch.where((weight < num_experts).all(dim=1, keepdim=True), weight, run)
