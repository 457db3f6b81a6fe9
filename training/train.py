"""Trains dsv4-nano, one stage a run; stops early when every gate holds.

    python -m training.train --stage smoke --device cpu
    python -m training.train --stage facts --minutes 8 --out training/runs/facts
    python -m training.train --stage polish --resume training/runs/facts/checkpoint.pt

Writes model.pt (FP32 weights), checkpoint.pt (weights, optimiser, step; resumable) and log.jsonl
into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.core.config import ModelConfig
from dsv4.testing.gates import build_gates, load_countries
from dsv4.text.tokenizer import Tokenizer
from training.attention import Switches
from training.batches import Batches, mix_documents
from training.checkpoint import rounded_parameters
from training.evaluate import GateTokens, gate_accuracies
from training.model import Losses, TrainingModel
from training.optimizer import Optimizer, schedule
from training.paths import NANO, PACKED

PLAIN_WEIGHT = 0.3  # loss weight of a token that is not part of an answer
BALANCE_WEIGHT = 1e-4


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    length, tokens   tokens a row and a step
    steps            length of the learning-rate schedule
    shares           stream -> repetitions in the mix
    sparse_from      share of the steps after which CSA sees the indexer's top-k only
    indexer_from     share of the steps after which the indexer is trained
    rounded_from     share of the steps after which weights and keys are rounded as in the file
    """

    length: int
    tokens: int
    steps: int
    shares: tuple[tuple[str, float], ...] = (("taught", 1.0), ("prose", 1.0), ("copies", 1.0))
    muon_lr: float = 0.01
    adamw_lr: float = 2e-3
    bias_speed: float = 0.01
    sparse_from: float = 0.1
    indexer_from: float = 0.0
    rounded_from: float = 0.85


STAGES = {
    "smoke": Stage(length=128, tokens=512, steps=6, sparse_from=0.3, indexer_from=0.2),
    "facts": Stage(length=512, tokens=1 << 16, steps=1500),
    "polish": Stage(
        length=512, tokens=1 << 16, steps=300, muon_lr=0.003, adamw_lr=6e-4, bias_speed=0.001,
        sparse_from=0.0, indexer_from=0.0, rounded_from=0.0,
    ),
}  # fmt: skip


class Trainer:
    """One stage: model, optimiser, data, gates and log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        stage = STAGES[args.stage]
        self.stage = replace(stage, steps=args.steps) if args.steps else stage
        self.is_gpu = self.device.type == "cuda"
        torch.manual_seed(args.seed)
        dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.model = TrainingModel(ModelConfig.nano(), dtype).to(self.device)
        stream = mix_documents(Path(args.data), dict(self.stage.shares), args.seed)
        self.batches = Batches(stream, self.device, args.seed)
        self.model.fill_hash_tables(self.batches.frequency(self.model.config.vocab_size))
        self.optimizer = Optimizer(self.model, self.stage.muon_lr, self.stage.adamw_lr)
        self.step, self.start = 0, time.time()
        if args.resume:
            self._resume(torch.load(args.resume, map_location=self.device, weights_only=True))
        if args.compile:
            for layer in self.model.layers:
                layer.compile(dynamic=False)
        tokenizer = Tokenizer.open(NANO)
        countries = load_countries(NANO / "facts.json")
        gates = build_gates(countries[:: 1 if self.is_gpu else 24])  # a CPU run is a smoke test
        self.gates = [GateTokens(g, tokenizer, self.device) for g in gates]
        self.thresholds = {g.name: g.threshold for g in gates}
        args.out.mkdir(parents=True, exist_ok=True)
        self.log_file = (args.out / "log.jsonl").open("a", encoding="utf-8")

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if state["stage"] == self.args.stage:
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def log(self, **row: Any) -> None:
        """Print one row and append it to log.jsonl."""
        row = {"step": self.step, "seconds": round(time.time() - self.start, 1)} | row
        text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        print(text, flush=True)
        self.log_file.write(text + "\n")
        self.log_file.flush()

    def autocast(self) -> Any:
        """BF16 products on the GPU, FP32 elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.is_gpu else nullcontext()

    def switches(self) -> Switches:
        """What this step computes."""
        done, stage = self.step / self.stage.steps, self.stage
        return Switches(
            sparse=done >= stage.sparse_from,
            indexer_loss=done >= stage.indexer_from,
            round_cache=done >= stage.rounded_from,
        )

    def loss(self, switches: Switches) -> tuple[Tensor, Tensor, Tensor, Losses]:
        """Total loss, cross entropy over all tokens and over answers, and the auxiliary losses."""
        rows = max(1, self.stage.tokens // self.stage.length)
        ids, targets, is_answer = self.batches.next(rows, self.stage.length)
        with self.autocast():
            hidden, extra = self.model.hidden(ids, switches)
            logits = self.model.head(hidden)
        ce = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        weight = torch.where(is_answer.flatten(), 1.0, PLAIN_WEIGHT)
        total = (ce * weight).sum() / weight.sum() + extra.indexer + BALANCE_WEIGHT * extra.balance
        answers = ce[is_answer.flatten()].mean()
        return total, ce.mean().detach(), answers.detach(), extra

    def train_step(self) -> dict[str, Tensor]:
        """Forward, backward and update; returns what to log, still on the device."""
        switches = self.switches()
        rounding = rounded_parameters(self.model) if switches.round_cache else nullcontext()
        with rounding:
            total, ce, answers, extra = self.loss(switches)
            total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(schedule(self.step, self.stage.steps))
        self.model.update_router_bias(extra.loads, self.stage.bias_speed)
        imbalance = torch.stack([load.max() / load.mean() for load in extra.loads]).max()
        self.step += 1
        return {
            "loss": ce, "answers": answers, "indexer_kl": extra.indexer.detach(), "norm": norm,
            "imbalance": imbalance,
        }  # fmt: skip

    def evaluate(self) -> dict[str, float]:
        """Gate accuracies with the numbers of the file: rounded weights, sparse CSA."""
        with rounded_parameters(self.model), self.autocast():
            return gate_accuracies(self.model, self.gates, Switches(sparse=True))

    def run(self) -> None:
        """Train until the schedule, the time or, with --stop-at-gates, the gates end it."""
        deadline = self.start + 60 * self.args.minutes
        tokens, began = 0, time.time()
        while self.step < self.stage.steps and time.time() < deadline:
            row = self.train_step()
            tokens += self.stage.tokens
            if self.step in (1, 5) or self.step % self.args.log_every == 0:
                rate = tokens / (time.time() - began)
                self.log(**{k: float(v) for k, v in row.items()}, tokens_per_second=round(rate))
            if self.step == 5:  # leave compilation and warm-up out of the rate
                tokens, began = 0, time.time()
            if self.step % self.args.evaluate_every == 0:
                scores = self.evaluate()
                self.log(**scores)
                if self.args.stop_at_gates and all(scores.values()) and self._hold(scores):
                    break
        self.log(final=True, **self.evaluate())
        self.save()

    def _hold(self, scores: dict[str, float]) -> bool:
        return all(scores[name] >= needed for name, needed in self.thresholds.items())

    def save(self) -> None:
        """Write model.pt and checkpoint.pt."""
        weights = {k: v.detach().cpu() for k, v in self.model.state_dict().items()}
        torch.save(weights, self.args.out / "model.pt")
        state = {
            "model": weights, "optimizer": self.optimizer.state_dict(), "step": self.step,
            "stage": self.args.stage,
        }  # fmt: skip
        torch.save(state, self.args.out / "checkpoint.pt")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, default=PACKED)
    parser.add_argument("--out", type=Path, default=Path("training/runs/nano"))
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of the stage's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--stop-at-gates", action="store_true")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--evaluate-every", type=int, default=100)
    Trainer(parser.parse_args()).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
