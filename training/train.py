"""Trains dsv4-nano, one stage a run; stops early when every gate holds.

    python -m training.train --stage smoke --device cpu
    python -m training.train --stage facts --minutes 8 --out training/runs/facts
    python -m training.train --stage near --start training/runs/facts/model.pt

A stage ends with its steps or its minutes, whichever is first; its learning rate and its switches
follow the larger of the two shares. Writes model.pt (FP32 weights), checkpoint.pt (weights,
optimiser, step; for --resume) and log.jsonl into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.testing.gates import build_gates, load_countries
from dsv4.text.tokenizer import Tokenizer
from training.attention import Switches
from training.batches import mix_documents, token_frequency
from training.checkpoint import load_weights, nano_config, rounded_parameters, save_pieces
from training.evaluate import GateTokens, LookupTokens, gate_accuracies
from training.mhc import compile_streams
from training.model import Losses, TrainingModel
from training.optimizer import Optimizer, schedule
from training.paths import NANO, PACKED
from training.places import PLACE
from training.rows import RowMaker, Steps, evaluation_rows, load_steps
from training.tally import TALLY

PLAIN_WEIGHT = 0.3  # loss weight of a token that is not part of an answer
FILLER_WEIGHT = 0.1  # of any token of a needle or tally row, whose answers have a term of their own
BALANCE_WEIGHT = 1e-4
TALLY_WEIGHT = 0.5
PLACE_WEIGHT = 0.5


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    lengths          tokens a row -> share of the steps
    tokens           tokens a step
    steps            most steps
    kinds            kind of row -> share: "text", "tally", "place", and the forms of needles
    streams          stream -> repetitions in the text
    sparse_from      share of the stage after which CSA sees the indexer's top-k only
    indexer_from     share of the stage after which the indexer is trained
    rounded_from     share of the stage after which weights and keys are rounded as in the file
    tally_without    shares of the tally rows in which CSA layers see no entries, so that HCA must
                     count, and in which HCA layers see none and the answer is an even guess
    raise_sinks      added to every attention sink before the first step, so that sinks take mass
    traps            how many experts of each score layer become noise before the first step, that
                     nothing but their score bias keeps from being chosen, and how loud they are
    decay            share of the stage, at its end, over which the learning rate falls
    """

    lengths: dict[int, float]
    tokens: int
    steps: int
    kinds: dict[str, float] = field(default_factory=lambda: {"text": 1.0})
    streams: dict[str, float] = field(
        default_factory=lambda: {"taught": 1.0, "prose": 1.0, "copies": 1.0}
    )
    muon_lr: float = 0.01
    adamw_lr: float = 2e-3
    bias_speed: float = 0.01
    sparse_from: float = 0.0
    indexer_from: float = 0.0
    rounded_from: float = 0.85
    tally_without: tuple[float, float] = (0.6, 0.25)
    raise_sinks: float = 0.0
    traps: tuple[int, float, float] = (0, 0.0, 0.0)
    decay: float = 0.3


NEAR = {"text": 0.42, "direct": 0.24, "shifted": 0.08, "sentence": 0.1, "digits": 0.04,
        "tally": 0.12}  # fmt: skip
FAR = {"text": 0.35, "direct": 0.18, "shifted": 0.06, "sentence": 0.12, "digits": 0.05,
       "tally": 0.24}  # fmt: skip

CAREFUL = {"text": 0.36, "direct": 0.12, "shifted": 0.05, "sentence": 0.09, "digits": 0.05,
           "tally": 0.17, "place": 0.16}  # fmt: skip

STAGES = {
    "smoke": Stage({128: 0.5, 256: 0.5}, 512, 6, dict.fromkeys(CAREFUL, 1 / 7),
                   sparse_from=0.3, indexer_from=0.2, raise_sinks=1.0, traps=(2, 0.1, 2.0)),
    "facts": Stage({512: 1.0}, 1 << 16, 1500, sparse_from=0.1),
    "near": Stage({512: 0.7, 1024: 0.3}, 1 << 16, 2000, NEAR, sparse_from=0.5, rounded_from=1.0,
                  decay=0.0),
    "middle": Stage({2048: 1.0}, 1 << 16, 1000, FAR, rounded_from=1.0, decay=0.0, muon_lr=0.008,
                    adamw_lr=1.6e-3, bias_speed=0.003),
    "far": Stage({2048: 0.3, 4096: 0.6, 8192: 0.1}, 1 << 15, 2000, FAR, rounded_from=0.7,
                 decay=0.45, muon_lr=0.006, adamw_lr=1.2e-3, bias_speed=0.001),
    "careful": Stage({2048: 0.8, 4096: 0.2}, 1 << 15, 2000, CAREFUL, sparse_from=0.4,
                     rounded_from=1.0, decay=0.0, muon_lr=0.006, adamw_lr=1.2e-3,
                     bias_speed=0.001, raise_sinks=7.0, traps=(2, 0.1, 2.0)),
    "last": Stage({2048: 0.5, 4096: 0.4, 8192: 0.1}, 1 << 15, 2000, CAREFUL, rounded_from=0.5,
                  decay=0.6, muon_lr=0.006, adamw_lr=1.2e-3, bias_speed=0.001,
                  raise_sinks=5.0, traps=(2, 0.15, 8.0)),
}  # fmt: skip


class Trainer:
    """One stage: model, optimiser, data, gates and log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        stage = STAGES[args.stage]
        self.stage = replace(stage, steps=args.steps) if args.steps else stage
        self.lookups: dict[int, LookupTokens] = {}
        self.is_gpu = self.device.type == "cuda"
        torch.manual_seed(args.seed)
        dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.model = TrainingModel(nano_config(), dtype).to(self.device)
        stream = mix_documents(args.data, self.stage.streams, args.seed)
        self.maker = RowMaker(stream, args.data)
        self.step, self.start = 0, time.time()
        self.model.fill_hash_tables(token_frequency(stream, self.model.config.vocab_size))
        self.optimizer = Optimizer(self.model, self.stage.muon_lr, self.stage.adamw_lr)
        if args.start:
            self.model.load_state_dict(load_weights(args.start))
        if args.resume:
            self._resume(torch.load(args.resume, map_location=self.device, weights_only=True))
        if self.step == 0:
            self.model.make_careful(self.stage.raise_sinks, self.stage.traps)
        kinds, seed = self.stage.kinds, args.seed + 1000 * self.step  # a resumed run: other rows
        steps = Steps(self.maker, self.stage.tokens, self.stage.lengths, kinds, seed)
        self.steps = load_steps(steps, args.workers)
        if args.compile:
            compile_streams()
        tokenizer = Tokenizer.open(NANO)
        countries = load_countries(NANO / "facts.json")
        gates = build_gates(countries[:: 1 if self.is_gpu else 24])  # a CPU run is a smoke test
        self.gates = [GateTokens(g, tokenizer, self.device) for g in gates]
        self.thresholds = {g.name: g.threshold for g in gates}
        args.out.mkdir(parents=True, exist_ok=True)
        self.log_file = (args.out / "log.jsonl").open("a", encoding="utf-8")

    def _resume(self, state: dict[str, Any]) -> None:
        if state["stage"] != self.args.stage:
            raise ValueError(
                f"--resume: expected a checkpoint of stage {self.args.stage}, got one of "
                f"{state['stage']}; --start takes its weights"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.start -= state["seconds"]  # schedules and --minutes count the time spent before

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

    def progress(self) -> float:
        """Share of the stage that is done, 0 to 1."""
        by_time = (time.time() - self.start) / (60 * self.args.minutes)
        return min(1.0, max(self.step / self.stage.steps, by_time))

    def switches(self) -> Switches:
        """What this step computes."""
        done, stage = self.progress(), self.stage
        return Switches(
            sparse=done >= stage.sparse_from,
            indexer_loss=done >= stage.indexer_from,
            round_cache=done >= stage.rounded_from,
        )

    def loss(self, switches: Switches) -> tuple[Tensor, dict[str, Tensor], Losses]:
        """Total loss, its parts to log, and the auxiliary losses."""
        ids, marks = (x.to(self.device, non_blocking=True) for x in next(self.steps))
        is_tally = (marks == TALLY).any(1)
        draw = torch.rand(len(ids), device=self.device)
        no_csa, no_hca = self.stage.tally_without
        blind = is_tally & (draw >= no_csa) & (draw < no_csa + no_hca)
        switches = replace(switches, without_csa=is_tally & (draw < no_csa), without_hca=blind)
        with self.autocast():
            hidden, extra = self.model.hidden(ids[:, :-1], switches)
            logits = self.model.head(hidden)
        targets, marks = ids[:, 1:].flatten(), marks[:, 1:]
        ce = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
        is_text = ((marks == 0) | (marks == 1)).all(1, keepdim=True).expand_as(marks).flatten()
        marks = marks.flatten()
        plain = torch.where(is_text, PLAIN_WEIGHT, FILLER_WEIGHT)
        weight = torch.where(marks == 0, plain, (marks == 1).float())
        unseen = (blind[:, None] & (marks == TALLY).view(len(ids), -1)).flatten()
        found = _mean_where(ce, marks > 1)
        counted = _mean_where(ce, (marks == TALLY) & ~unseen)
        guessed = even_guess_loss(logits.flatten(0, 1), ids, unseen)
        total = (ce * weight).sum() / weight.sum() + found + TALLY_WEIGHT * (counted + guessed)
        placed = _mean_where(ce, marks == PLACE)
        total = total + PLACE_WEIGHT * placed + extra.indexer + BALANCE_WEIGHT * extra.balance
        parts = {
            "loss": _mean_where(ce, is_text), "answers": _mean_where(ce, marks == 1),
            "needles": found, "tally_loss": counted,
            "even_guess": guessed, "place_loss": placed,
        }  # fmt: skip
        return total, {k: v.detach() for k, v in parts.items()}, extra

    def train_step(self) -> dict[str, Tensor]:
        """Forward, backward and update; returns what to log, still on the device."""
        switches = self.switches()
        rounding = rounded_parameters(self.model) if switches.round_cache else nullcontext()
        with rounding:
            total, parts, extra = self.loss(switches)
            total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(schedule(self.step, self.progress(), decay=self.stage.decay))
        self.model.update_router_bias(extra.loads, self.stage.bias_speed)
        imbalance = torch.stack([load.max() / load.mean() for load in extra.loads]).max()
        self.step += 1
        rest = {"indexer_kl": extra.indexer.detach(), "norm": norm, "imbalance": imbalance}
        return parts | rest

    def evaluate(self) -> dict[str, float]:
        """Accuracies with the numbers of the file: rounded weights, sparse CSA.

        The facts gates; and for stages that teach looking back, needles by form and distance.
        """
        length = min(4096, max(self.stage.lengths)) if self.is_gpu else min(self.stage.lengths)
        if length not in self.lookups and len(self.stage.kinds) > 1:
            rows = evaluation_rows(self.maker, length, 24 if self.is_gpu else 1, seed=99)
            self.lookups[length] = LookupTokens(rows, self.device)
        with rounded_parameters(self.model), self.autocast():
            scores = gate_accuracies(self.model, self.gates, Switches(sparse=True))
            for lookup in self.lookups.values():
                scores |= lookup.accuracies(self.model, Switches(sparse=True))
        return scores

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
                self.save()  # a run that is killed goes on from here
                if self.args.stop_at_gates and self._hold(scores):
                    break
        self.log(final=True, **self.evaluate())
        self.save()

    def _hold(self, scores: dict[str, float]) -> bool:
        return all(scores[name] >= needed for name, needed in self.thresholds.items())

    def save(self) -> None:
        """Write model.pt and checkpoint.pt."""
        weights = {k: v.detach().cpu() for k, v in self.model.state_dict().items()}
        torch.save(weights, self.args.out / "model.pt")
        if self.args.pieces:
            save_pieces(weights, self.args.pieces)
        state = {
            "model": weights, "optimizer": self.optimizer.state_dict(), "step": self.step,
            "stage": self.args.stage, "seconds": time.time() - self.start,
        }  # fmt: skip
        torch.save(state, self.args.out / "checkpoint.pt")


def even_guess_loss(logits: Tensor, ids: Tensor, unseen: Tensor) -> Tensor:
    """Cross entropy with an even guess between the two words of a tally question.

    logits [B T, V], ids [B, T + 1], unseen [B T] True where the answer cannot be known. The words
    stand four and two places before the answer: " up or down?".
    """
    place = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
    log_p = logits[unseen].float().log_softmax(-1)
    words = [ids.gather(1, (place + 1 - back).clamp_min(0)).flatten()[unseen] for back in (4, 2)]
    both = [log_p.gather(1, word[:, None]).sum() for word in words]
    return -(both[0] + both[1]) / (2 * unseen.sum().clamp_min(1))


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp_min(1)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, default=PACKED)
    parser.add_argument("--out", type=Path, default=Path("training/runs/nano"))
    parser.add_argument("--pieces", type=Path, help="folder for BF16 weights in small files")
    parser.add_argument("--resume", type=Path, help="checkpoint.pt of a stopped run")
    parser.add_argument("--start", type=Path, help="weights: model.pt or a checkpoint folder")
    parser.add_argument("--workers", type=int, default=8, help="processes that make rows")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--steps", type=int, default=0, help="most steps, instead of the stage's own"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--stop-at-gates", action="store_true")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--evaluate-every", type=int, default=100)
    Trainer(parser.parse_args()).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
