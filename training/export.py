"""Writes trained weights as the bundled checkpoint, in the official format.

python -m training.export --weights training/runs/last/model.pt --draft training/runs/draft/draft.pt
python -m training.export --weights training/runs/last/model.pt --unquantised --out /tmp/nano-bf16
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dsv4.loader.checkpoint import Checkpoint
from dsv4.loader.writer import write_checkpoint
from training.checkpoint import load_weights, nano_config, official_weights
from training.model import TrainingModel
from training.paths import NANO

MAX_SHARD_BYTES = 15_500_000
GENERATION = {
    "bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0,
}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="model.pt or folder of pieces")
    parser.add_argument("--draft", type=Path, help="draft.pt of the MTP block; none without it")
    parser.add_argument("--unquantised", action="store_true", help="matrices in BF16")
    parser.add_argument("--out", type=Path, default=NANO)
    args = parser.parse_args()
    model = TrainingModel(nano_config(args.draft is not None, not args.unquantised))
    weights = {k: v for k, v in load_weights(args.weights).items() if not k.startswith("mtp.")}
    model.load_state_dict(weights | (load_weights(args.draft) if args.draft else {}))
    write_checkpoint(
        args.out, model.config, official_weights(model), MAX_SHARD_BYTES,
        generation_config=GENERATION, overwrite=True,
    )  # fmt: skip
    for file in NANO.glob("tokenizer*.json"):
        if args.out.resolve() != NANO:
            shutil.copy(file, args.out)
    checkpoint = Checkpoint.open(args.out)
    problems = checkpoint.verify(deep=True)
    if problems:
        raise SystemExit(f"export: {problems[0]}")
    size = sum(f.stat().st_size for f in args.out.iterdir() if f.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
