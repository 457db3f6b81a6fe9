"""Trains the MTP block of dsv4-nano on a frozen trunk.

    python -m training.draft --start dsv4/nano --minutes 0.6 --out training/runs/draft

The block learns to say what the trunk will say next: cross entropy with the trunk's own
distribution one token later, on text, needles, tallies and places. Writes draft.pt (the tensors
below "mtp.", FP32) and log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from training.attention import Switches
from training.batches import mix_documents
from training.checkpoint import load_weights, nano_config, rounded_parameters
from training.model import TrainingModel
from training.optimizer import Optimizer, schedule
from training.paths import PACKED
from training.rows import RowMaker, Steps, load_steps

LENGTHS = {512: 0.5, 1024: 0.5}
KINDS = {"text": 0.6, "sentence": 0.1, "digits": 0.1, "tally": 0.1, "place": 0.1}
STREAMS = {"taught": 1.0, "prose": 1.0}
MUON_LR, ADAMW_LR, BIAS_SPEED = 0.015, 3e-3, 0.01
WARMUP, DECAY, ROUNDED_FROM = 20, 0.5, 0.6


def draft_step(model: TrainingModel, ids: Tensor, round_cache: bool) -> tuple[Tensor, ...]:
    """Loss, share of drafts that are the trunk's own next choice, and the block's expert loads.

    ids [B, T + 1]. Row t of the block sees the trunk at t and token t + 1; it is compared with the
    trunk at t + 1.
    """
    switches = Switches(round_cache=round_cache)
    with torch.no_grad():
        streams, _ = model.streams(ids[:, :-1], switches)
        trunk = model.head(model.read(streams))[:, 1:].float()
    hidden, load = model.draft(streams, ids[:, 1:], switches)
    draft = model.head(hidden)[:, :-1].float()
    loss = -(trunk.softmax(-1) * draft.log_softmax(-1)).sum(-1).mean()
    return loss, (draft.argmax(-1) == trunk.argmax(-1)).float().mean(), load


def train(args: argparse.Namespace) -> None:
    """Load, train for the given time, save."""
    device = torch.device(args.device)
    is_gpu = device.type == "cuda"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if is_gpu else torch.float32
    model = TrainingModel(nano_config(mtp=True), dtype).to(device)
    model.load_state_dict(load_weights(args.start), strict=False)
    model.start_draft()
    maker = RowMaker(mix_documents(args.data, STREAMS, seed=1), args.data)
    steps = load_steps(Steps(maker, args.tokens, LENGTHS, KINDS, seed=7), args.workers)
    optimizer = Optimizer(model, MUON_LR, ADAMW_LR)
    args.out.mkdir(parents=True, exist_ok=True)
    began, step = time.time(), 0
    with (args.out / "log.jsonl").open("a", encoding="utf-8") as log:
        while (done := (time.time() - began) / (60 * args.minutes)) < 1 and step != args.steps:
            ids = next(steps)[0].to(device, non_blocking=True)
            rounds = done >= ROUNDED_FROM
            rounding = rounded_parameters(model) if rounds else nullcontext()
            cast = torch.autocast("cuda", torch.bfloat16) if is_gpu else nullcontext()
            with rounding, cast:
                loss, accepted, load = draft_step(model, ids, rounds)
                loss.backward()
            nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
            optimizer.step(schedule(step, done, WARMUP, DECAY))
            model.mtp[0].ffn.update_bias(load, BIAS_SPEED)
            step += 1
            if step % 10 == 1:
                row = {"step": step, "seconds": round(time.time() - began, 1)}
                figures = {"draft_loss": loss.detach(), "accepted": accepted}
                row |= {k: round(float(v), 4) for k, v in figures.items()}
                print(json.dumps(row), flush=True)
                log.write(json.dumps(row) + "\n")
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items() if k.startswith("mtp.")}
    torch.save(weights, args.out / "draft.pt")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", type=Path, required=True, help="weights of the trunk")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, default=PACKED)
    parser.add_argument("--out", type=Path, default=Path("training/runs/draft"))
    parser.add_argument("--minutes", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--tokens", type=int, default=1 << 16, help="tokens a step")
    parser.add_argument("--workers", type=int, default=8)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
