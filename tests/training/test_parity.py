"""The training model computes what tier 1 computes, before and after training, MTP block too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4.reference.model import ReferenceModel
from dsv4.testing.tiny import tiny_config
from training.attention import Switches
from training.checkpoint import official_weights, parameter_specs, split_names
from training.model import TrainingModel
from training.optimizer import Optimizer
from training.parity import perturb

LENGTH = 256
TOLERANCE = 1e-4
CONFIG = replace(tiny_config(), index_topk=LENGTH)  # every entry: no ties to order differently


def random_model(seed: int) -> TrainingModel:
    torch.manual_seed(seed)
    model = TrainingModel(CONFIG)
    perturb(model, seed)
    return model


def random_ids(seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, CONFIG.vocab_size, (2, LENGTH), generator=rng)


def train_a_little(model: TrainingModel, ids: Tensor, steps: int = 4) -> tuple[float, float]:
    """Loss before and after."""
    optimizer, losses = Optimizer(model, 0.005, 1e-3), []
    for _ in range(steps):
        logits, extra = model(ids, Switches(sparse=True, indexer_loss=True))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (loss + extra.indexer).backward()
        optimizer.step(1.0)
        model.update_router_bias(extra.loads, 0.01)
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def largest_gap(model: TrainingModel, ids: Tensor) -> float:
    reference = ReferenceModel(CONFIG, split_names(dict(model.state_dict())))
    with torch.no_grad():
        ours = model(ids, Switches(sparse=True))[0]
    theirs = torch.stack([reference.forward(row, reference.new_cache()) for row in ids])
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_those_of_tier_1_before_and_after_training(seed: int) -> None:
    model, ids = random_model(seed), random_ids(seed)
    assert largest_gap(model, ids) <= TOLERANCE
    before, after = train_a_little(model, ids)
    assert after < before
    assert largest_gap(model, ids) <= TOLERANCE


def test_drafts_equal_those_of_tier_1() -> None:
    model, ids = random_model(2), random_ids(2)
    reference = ReferenceModel(CONFIG, split_names(dict(model.state_dict())))
    with torch.no_grad():
        streams, _ = model.streams(ids[:1], Switches())
        ours = model.head(model.draft(streams, ids[1:], Switches())[0])[0]
    cache = reference.new_cache()
    theirs = reference.forward_mtp(reference.forward_streams(ids[0], cache), ids[1], cache)
    assert float((ours - theirs).abs().max()) <= TOLERANCE


def test_only_the_draft_block_learns_when_the_trunk_is_frozen() -> None:
    model = random_model(3)
    model.start_draft()
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning
    assert all(name.startswith("mtp.") for name in learning)


def test_names_are_those_of_the_checkpoint() -> None:
    model = random_model(4)
    assert set(official_weights(model)) == set(parameter_specs(CONFIG))


def test_a_trap_is_never_chosen_and_never_learns() -> None:
    model, ids = random_model(5), random_ids(5)
    model.make_careful(3.0, (2, 0.1, 2.0))
    gate = model.layers[3].ffn.gate
    trapped = gate.bias < -2
    assert int(trapped.sum()) == 2
    rows, loud = gate.weight[trapped].clone(), model.layers[3].ffn.experts.w2[trapped].clone()
    train_a_little(model, ids, 2)
    assert torch.equal(gate.weight[trapped], rows)
    assert torch.equal(model.layers[3].ffn.experts.w2[trapped], loud)
    _, extra = model(ids, Switches())
    assert extra.loads[3][trapped].sum() == 0
    gate.bias.zero_()
    assert model(ids, Switches())[1].loads[3][trapped].sum() > 0
