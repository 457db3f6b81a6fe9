"""One name table, both directions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.core.config import ModelConfig
from dsv4.core.inventory import tensor_specs
from dsv4.loader.names import stacked_experts, to_official, to_transformers
from dsv4.testing.tiny import tiny_config

NAMES = list(tensor_specs(tiny_config()))
TRUNK = [name for name in NAMES if not name.startswith("mtp.")]
SINGLE = [name for name in TRUNK if ".experts." not in name]


def test_every_trunk_tensor_has_a_transformers_name_and_the_way_back() -> None:
    for name in SINGLE:
        theirs = to_transformers(name)
        assert theirs is not None
        assert to_official(theirs) == name
    assert len({to_transformers(name) for name in SINGLE}) == len(SINGLE)


def test_expert_tensors_are_parts_of_stacks() -> None:
    experts = [name for name in TRUNK if ".experts." in name]
    stacks = {to_transformers(name) for name in experts}
    parts = [part for stack in stacks for part in stacked_experts(str(stack), 8)]
    assert sorted(parts) == sorted(experts)
    assert all(to_official(str(stack)) is None for stack in stacks)


def test_order_inside_a_stack() -> None:
    assert stacked_experts("model.layers.3.mlp.experts.gate_up_proj", 2) == (
        "layers.3.ffn.experts.0.w1.weight",
        "layers.3.ffn.experts.0.w3.weight",
        "layers.3.ffn.experts.1.w1.weight",
        "layers.3.ffn.experts.1.w3.weight",
    )
    assert stacked_experts("model.layers.3.mlp.experts.down_proj_scale_inv", 2) == (
        "layers.3.ffn.experts.0.w2.scale",
        "layers.3.ffn.experts.1.w2.scale",
    )
    assert stacked_experts("model.layers.3.mlp.gate.weight", 2) == ()


def test_transformers_has_no_mtp_block() -> None:
    assert {to_transformers(name) for name in NAMES if name.startswith("mtp.")} == {None}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("head.weight", "head.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.layers.7.attn_hc.scale", "layers.7.hc_attn_scale"),
        ("model.layers.7.hc_attn_scale", "layers.7.hc_attn_scale"),
        ("model.layers.7.attn.norm.weight", "layers.7.attn.kv_norm.weight"),
        ("model.layers.7.self_attn.kv_norm.weight", "layers.7.attn.kv_norm.weight"),
        ("model.layers.7.attn.wq_a.scale", "layers.7.attn.wq_a.scale"),
        ("model.layers.7.self_attn.q_a_proj.weight_scale_inv", "layers.7.attn.wq_a.scale"),
        ("model.layers.7.attn.wq_a.weight_scale_inv", "layers.7.attn.wq_a.scale"),
        (
            "model.layers.7.self_attn.compressor.indexer.scorer.weights_proj.weight",
            "layers.7.attn.indexer.weights_proj.weight",
        ),
        (
            "model.layers.7.self_attn.compressor.indexer.kv_norm.weight",
            "layers.7.attn.indexer.compressor.norm.weight",
        ),
        ("model.layers.7.mlp.gate.e_score_correction_bias", "layers.7.ffn.gate.bias"),
        (
            "model.layers.7.mlp.shared_experts.up_proj.weight",
            "layers.7.ffn.shared_experts.w3.weight",
        ),
        ("model.layers.7.ffn.experts.255.w2.scale", "layers.7.ffn.experts.255.w2.scale"),
    ],
)
def test_names_that_transformers_writes(theirs: str, ours: str) -> None:
    assert to_official(theirs) == ours


@pytest.mark.parametrize(
    "name",
    ["", "model.", "layers.0.", "layers.01.attn_norm.weight", "layers.-1.attn_norm.weight",
     "layers.0.attn_norm", "layers.0.attn_norm.bias", "layers.0.ffn.experts.0.w4.weight",
     "model.model.layers.0.attn_norm.weight", "layers.0.attn.wq_a.weight.weight", "\x1b[2J"],
)  # fmt: skip
def test_unknown_names(name: str) -> None:
    assert to_official(name) is None
    with pytest.raises(ValueError, match="official tensor name"):
        to_transformers(name)


@given(st.text(max_size=40) | st.sampled_from(NAMES).map(lambda n: f"model.{n}"))
def test_any_text_is_a_name_or_none(name: str) -> None:
    official = to_official(name)
    assert official is None or to_official(f"model.{official}") in (official, None)


def test_flash_names_are_all_known() -> None:
    names = tensor_specs(ModelConfig.flash())
    assert sum(to_transformers(name) is None for name in names) == 1575
