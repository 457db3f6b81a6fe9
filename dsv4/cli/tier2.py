"""Tier 2 behind the command line: the production path, one sequence at a time."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from dsv4.core.errors import DeviceUnavailable, RequestError

if TYPE_CHECKING:
    from dsv4.engine.single import SingleSequence
    from dsv4.loader.checkpoint import Checkpoint


def check_production(args: Namespace) -> None:
    """Raises RequestError for flags of tier 1, DeviceUnavailable where no kernel can run.

    Settles `args.dtype`, which is not tier 2's to choose: activations are bfloat16.
    """
    for flag, is_set in (
        ("--simulate-kv-quant on", args.simulate_kv_quant == "on"),
        ("--keep-packed", args.keep_packed),
        (f"--dtype {args.dtype}", args.dtype == "float64"),
    ):
        if is_set:
            raise RequestError("tier", f"1 for {flag}", 2, "use --tier 1")
    args.dtype = "bfloat16"
    from dsv4.kernels.common.launch import INTERPRETED

    if args.device == "cpu" and not INTERPRETED:
        error = DeviceUnavailable("cpu", "tier 2 is made of GPU kernels")
        error.fix = (
            "use --device cuda; or set TRITON_INTERPRET=1, which runs the kernels on the CPU, "
            "thousands of times slower"
        )
        raise error


def load_production(args: Namespace, checkpoint: Checkpoint, progress: Any) -> SingleSequence:
    """Copy the checkpoint to the device, tensor by tensor, and allocate the cache."""
    from dsv4.engine.model import EngineLimits, ProductionModel
    from dsv4.engine.single import SingleSequence

    stored = checkpoint.stream(progress, keep=lambda name: not name.startswith("mtp."))
    limits = EngineLimits(max_context=args.max_context)
    return SingleSequence(ProductionModel(checkpoint.config, stored, args.device, limits))
