"""Between the training model and the official checkpoint: names, dtypes, quantisation.

`official_weights` is what `export` writes, and what the last training stage computes with, so
that training sees exactly the numbers of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.formats import DTYPES, FP8_BLOCK128, MXFP4, BlockScaledTensor
from dsv4.core.inventory import TensorSpec, tensor_specs
from dsv4.loader.checkpoint import Checkpoint
from dsv4.reference.quant import dequantize, fp8_block_quantize, mxfp4_quantize
from training.model import TrainingModel

PIECE_BYTES = 15_000_000
QUANTISERS = {FP8_BLOCK128.name: fp8_block_quantize, MXFP4.name: mxfp4_quantize}


def nano_config(mtp: bool = False, quantised: bool = True) -> ModelConfig:
    """dsv4-nano's configuration, with or without its MTP block, or with matrices in BF16."""
    config = replace(ModelConfig.nano(), num_nextn_predict_layers=int(mtp))
    if quantised:
        return config
    return replace(config, expert_format="bfloat16", linear_format="bfloat16")


def parameter_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Official parameter name -> the spec of its payload."""
    return {s.name: s for s in tensor_specs(config).values() if s.name == s.parameter}


def split_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split stacked experts; every other name is official already."""
    out = {}
    for name, value in state.items():
        if ".experts." in name:
            prefix, leaf = name.rsplit(".", 1)
            out |= {f"{prefix}.{e}.{leaf}.weight": value[e] for e in range(len(value))}
        else:
            out[name] = value
    return out


def stack_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `split_names`."""
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in weights.items():
        if ".experts." in name:
            prefix, rest = name.split(".experts.")
            expert, leaf, _ = rest.split(".")
            stacks.setdefault(f"{prefix}.experts.{leaf}", {})[int(expert)] = value
        else:
            out[name] = value
    for name, parts in stacks.items():
        out[name] = torch.stack([parts[e] for e in range(len(parts))])
    return out


def as_stored(value: Tensor, spec: TensorSpec) -> Tensor | BlockScaledTensor:
    """One parameter in the form its spec asks for."""
    if spec.format is not None:
        return QUANTISERS[spec.format.name](value.float())
    return value.to(DTYPES[spec.dtype])


def official_weights(model: TrainingModel) -> dict[str, Tensor | BlockScaledTensor]:
    """Every parameter of the checkpoint, quantised, under its official name.

    Raises KeyError if the model lacks a parameter of its config or has one too many.
    """
    values = split_names(model.state_dict())
    specs = parameter_specs(model.config)
    if set(values) != set(specs):
        raise KeyError(f"parameters: {sorted(set(values) ^ set(specs))[:5]} differ from the config")
    return {name: as_stored(values[name].detach().cpu(), spec) for name, spec in specs.items()}


def save_pieces(weights: dict[str, Tensor], folder: Path) -> None:
    """Save a state dict as files of at most PIECE_BYTES; matrices become BF16."""
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in weights.items():
        value = value.bfloat16() if value.is_floating_point() and value.dim() > 1 else value
        if size + value.nbytes > PIECE_BYTES:
            pieces.append({})
            size = 0
        pieces[-1][name] = value.clone()
        size += value.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for i, piece in enumerate(pieces):
        torch.save(piece, folder / f"piece{i}.pt")


def load_weights(path: Path) -> dict[str, Tensor]:
    """State dict of the training model.

    path  a model.pt, a folder of pieces, or an official checkpoint folder
    """
    pieces = sorted(path.glob("piece*.pt"))
    if pieces:
        return {
            k: v.float() if v.is_floating_point() else v
            for piece in pieces
            for k, v in torch.load(piece, map_location="cpu", weights_only=True).items()
        }
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    weights = Checkpoint.open(path).load()
    values = {
        k: dequantize(v) if isinstance(v, BlockScaledTensor) else v for k, v in weights.items()
    }
    return stack_names(values)


def _rounded(value: Tensor, spec: TensorSpec) -> Tensor:
    stored = as_stored(value, spec)
    return dequantize(stored) if isinstance(stored, BlockScaledTensor) else stored.to(value.dtype)


@contextmanager
def rounded_parameters(model: TrainingModel) -> Iterator[None]:
    """Compute with the numbers the checkpoint will hold, keep the FP32 masters.

    Gradients taken inside belong to the rounded values; the optimiser applies them to the masters:
    the straight-through estimator, without a line of it in the model.
    """
    specs = parameter_specs(model.config)
    masters = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            prefix, leaf = name.rsplit(".", 1) if ".experts." in name else (name, "")
            spec = specs[f"{prefix}.0.{leaf}.weight" if leaf else name]
            masters[name] = parameter.detach().clone()
            rows = parameter.detach().flatten(0, -2) if parameter.dim() == 3 else parameter.detach()
            parameter.copy_(_rounded(rows, spec).view_as(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
