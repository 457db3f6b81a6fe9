"""Writes trained weights as the bundled checkpoint, in the official format.

python -m training.export --weights training/runs/facts/model.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4.core.config import ModelConfig
from dsv4.loader.checkpoint import Checkpoint
from dsv4.loader.writer import write_checkpoint
from training.checkpoint import load_weights, official_weights
from training.model import TrainingModel
from training.paths import NANO

MAX_SHARD_BYTES = 15_000_000
GENERATION = {
    "bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0,
}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="model.pt or folder of pieces")
    parser.add_argument("--out", type=Path, default=NANO)
    args = parser.parse_args()
    model = TrainingModel(ModelConfig.nano())
    model.load_state_dict(load_weights(args.weights))
    write_checkpoint(
        args.out, model.config, official_weights(model), MAX_SHARD_BYTES,
        generation_config=GENERATION, overwrite=True,
    )  # fmt: skip
    checkpoint = Checkpoint.open(args.out)
    problems = checkpoint.verify(deep=True)
    if problems:
        raise SystemExit(f"export: {problems[0]}")
    size = sum(f.stat().st_size for f in args.out.iterdir() if f.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
