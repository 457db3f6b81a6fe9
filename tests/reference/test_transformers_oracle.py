"""The reference against transformers' DeepseekV4ForCausalLM in FP32, on random tiny models.

60 configurations x 3 lengths here; DSV4_ORACLE_CONFIGS=300 (`make oracle`) runs more.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4.testing.numeric import relative_error
from support.hf import tier1_of

NUM_CONFIGS = int(os.environ.get("DSV4_ORACLE_CONFIGS", "60"))
LIMIT = 2e-4  # of the largest logit
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")


def random_hf_config(seed: int) -> DeepseekV4Config:
    rng = random.Random(seed)
    layers = rng.randint(1, 4)
    heads, groups = rng.choice([(4, 2), (4, 1), (8, 4), (8, 2), (2, 2)])
    head_dim, rope_dim = rng.choice([(64, 32), (64, 64), (96, 64), (128, 64), (48, 16)])
    experts = rng.choice([4, 6, 8])
    num_hash = rng.randint(0, layers)
    return DeepseekV4Config(
        vocab_size=rng.choice([64, 97, 160]),
        hidden_size=rng.choice([32, 64, 80]),
        moe_intermediate_size=rng.choice([16, 32, 48]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=head_dim,
        partial_rotary_factor=rope_dim / head_dim,
        q_lora_rank=rng.choice([16, 32, 48]),
        o_groups=groups,
        o_lora_rank=rng.choice([8, 16, 32]),
        n_routed_experts=experts,
        num_experts_per_tok=rng.randint(1, min(experts, 4)),
        routed_scaling_factor=rng.choice([1.0, 1.5, 2.5]),
        swiglu_limit=rng.choice([0.5, 2.0, 10.0]),
        hc_sinkhorn_iters=rng.choice([2, 5, 20]),
        sliding_window=rng.choice([4, 8, 16, 128]),
        # many index heads, or ties at score 0 decide between correct implementations
        index_n_heads=rng.choice([16, 32]),
        index_head_dim=rng.choice([64, 128]),
        index_topk=rng.choice([2, 4, 8, 64]),
        layer_types=[rng.choice(KINDS) for _ in range(layers)],
        mlp_layer_types=["hash_moe"] * num_hash + ["moe"] * (layers - num_hash),
        max_position_embeddings=4096,
        num_nextn_predict_layers=0,
        attn_implementation="eager",
    )


def random_model(config: DeepseekV4Config, seed: int) -> DeepseekV4ForCausalLM:
    """A model whose every parameter matters: norms, sinks, biases and hash tables are random."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or "position_bias" in name or "_hc." in name or "hc_head" in name:
                p.add_(torch.randn_like(p) * 0.2)
            else:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
        for name, b in model.named_buffers():
            if name.endswith("tid2eid"):
                rows = torch.rand(b.shape[0], config.n_routed_experts).argsort(dim=1)
                b.copy_(rows[:, : b.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                b.copy_(torch.randn_like(b) * 0.2)
    return model


@pytest.mark.parametrize("seed", range(NUM_CONFIGS))
def test_equals_transformers(seed: int) -> None:
    rng = random.Random(seed)
    hf = random_model(random_hf_config(seed), seed)
    mine = tier1_of(hf)
    for length in (rng.randint(1, 9), rng.randint(10, 127), rng.choice([128, 131, 256, 270])):
        ids = torch.randint(0, hf.config.vocab_size, (length,))
        with torch.no_grad():
            want = hf(ids[None], use_cache=False).logits[0]
        got = mine.forward(ids, mine.new_cache())
        error = relative_error(got, want)
        assert error <= LIMIT, f"length {length}: {error:.1e}"
        best, second = want.topk(2, dim=1).values.unbind(dim=1)
        clear = best - second > 2 * (got - want).abs().amax(dim=1)  # no tie within rounding
        assert torch.equal(got.argmax(dim=1)[clear], want.argmax(dim=1)[clear]), f"length {length}"
        assert clear.float().mean() > 0.9
