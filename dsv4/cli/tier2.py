"""Tier 2 behind the command line: the production path, one sequence at a time."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from dsv4.core.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from dsv4.core.config import ModelConfig
    from dsv4.engine.single import SingleSequence
    from dsv4.loader.checkpoint import Checkpoint


def add_fusion_argument(group: Any, tiers: str = "") -> None:
    """--no-fusion, with the `tiers` that know it in front of its help."""
    group.add_argument("--no-fusion", default="", metavar="NAME[,NAME]",
                       help=f"{tiers}run these fused kernels as their parts, or all; "
                       "names: docs/engine.md")  # fmt: skip


def split_fusions(text: str) -> list[str]:
    """The names in a value of --no-fusion. Raises RequestError for one that there is not."""
    from dsv4.model.block import FUSED, check_unfused

    names = [word.strip() for word in text.split(",")] if text else []
    if names == ["all"]:
        return list(FUSED)
    return sorted(check_unfused(names), key=FUSED.index)


def check_production(args: Namespace) -> None:
    """Raises RequestError for flags of tier 1.

    Settles `args.dtype`, which is not tier 2's to choose: activations are bfloat16.
    """
    for flag, is_set in (
        ("--simulate-kv-quant on", args.simulate_kv_quant == "on"),
        ("--keep-packed", args.keep_packed),
        (f"--dtype {args.dtype}", args.dtype == "float64"),
    ):
        if is_set:
            raise RequestError("tier", f"1 for {flag}", 2, "use --tier 1")
    split_fusions(args.no_fusion)  # refused before weights are read
    args.dtype = "bfloat16"


def load_production(
    args: Namespace, checkpoint: Checkpoint, progress: Any, will_generate: bool
) -> SingleSequence:
    """Copy the checkpoint to the device, tensor by tensor, and allocate the cache.

    will_generate  on a GPU, record the decode step as a CUDA graph
    """
    from dsv4.core.inventory import of_trunk

    stored = checkpoint.stream(progress, keep=of_trunk)
    one = _production(args, checkpoint.config, stored)
    if will_generate and one.device.type == "cuda":
        one.capture()
    return one


def load_random(args: Namespace, config: ModelConfig) -> SingleSequence:
    """A model of random weights, made on the device: the same for the same config."""
    from dsv4.engine.synthetic import synthetic_tensors

    return _production(args, config, synthetic_tensors(config, args.device))


def _production(
    args: Namespace, config: ModelConfig, stored: Iterable[tuple[str, Tensor]]
) -> SingleSequence:
    from dsv4.engine.model import EngineLimits, ProductionModel
    from dsv4.engine.single import SingleSequence

    limits, unfused = EngineLimits(max_context=args.max_context), split_fusions(args.no_fusion)
    model = ProductionModel(config, stored, args.device, limits, unfused=unfused)
    return SingleSequence(model)
