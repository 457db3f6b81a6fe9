"""Slices and dequantised copies are sound checkpoints, and the parts kept are the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4.core.config import ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.formats import BlockScaledTensor
from dsv4.loader import Checkpoint
from dsv4.loader.convert import (
    dequantize_checkpoint,
    slice_checkpoint,
    slice_config,
    transformers_state_dict,
)
from support.checkpoints import (
    SHARD_BYTES,
    assert_same_weights,
    config_of,
    same_weight,
    weights_of,
)


def test_slice_keeps_the_bits(sound, tmp_path: Path) -> None:
    config = slice_checkpoint(
        sound("official"), tmp_path, num_layers=3, num_experts=4, max_shard_bytes=SHARD_BYTES
    )
    assert config.compress_ratios == (0, 4, 128)
    assert (config.n_routed_experts, config.num_nextn_predict_layers) == (4, 1)
    ck = Checkpoint.open(tmp_path)
    assert ck.config == config
    got, want = ck.load(), weights_of("official")
    cut = [name for name, w in got.items() if not same_weight(w, want[name])]
    assert all(".ffn.gate." in name for name in cut)
    for name in cut:
        if not name.endswith("tid2eid"):
            assert torch.equal(got[name], want[name][:4])
    ids, before = got["layers.0.ffn.gate.tid2eid"], want["layers.0.ffn.gate.tid2eid"]
    is_kept = (before < 4).all(dim=1)
    assert torch.equal(ids[is_kept], before[is_kept])
    assert ids.max() < 4


def test_a_whole_slice_is_a_copy(sound, tmp_path: Path) -> None:
    slice_checkpoint(sound("nvfp4"), tmp_path)
    assert_same_weights(Checkpoint.open(tmp_path).load(), weights_of("nvfp4"))


@pytest.mark.parametrize(
    ("layers", "experts", "argument"), [(0, 8, "layers"), (5, 8, "layers"), (4, 2, "experts"),
                                        (4, 9, "experts")],
)  # fmt: skip
def test_counts_must_exist(layers: int, experts: int, argument: str) -> None:
    with pytest.raises(RequestError) as caught:
        slice_config(config_of("official"), layers, experts)
    assert caught.value.argument == argument


@pytest.mark.parametrize("counts", [{"num_layers": 0}, {"num_experts": 0}])
def test_zero_is_a_count_that_does_not_exist(counts: dict[str, int], sound, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="got 0"):
        slice_checkpoint(sound("official"), tmp_path / "out", **counts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", [False, True])
def test_a_checkpoint_is_not_converted_into_itself(copy_of, link: bool, tmp_path: Path) -> None:
    source = target = copy_of("official")
    if link:
        target = tmp_path / "link"
        target.symlink_to(source, target_is_directory=True)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    for write in (
        lambda: slice_checkpoint(source, target, num_layers=2, overwrite=True),
        lambda: dequantize_checkpoint(source, target, dequantize, overwrite=True),
    ):
        with pytest.raises(RequestError) as caught:
            write()
        assert caught.value.argument == "out"
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_generation_config_goes_with_the_copy(sound, tmp_path: Path) -> None:
    import json

    for name, write in (
        ("a", lambda out, **more: slice_checkpoint(sound("official"), out, **more)),
        ("b", lambda out, **m: dequantize_checkpoint(sound("official"), out, dequantize, **m)),
    ):
        write(tmp_path / name, generation_config={"eos_token_id": [1, 7]})
        text = (tmp_path / name / "generation_config.json").read_text()
        assert json.loads(text) == {"eos_token_id": [1, 7]}


def test_slice_of_a_dspark_config_has_no_draft() -> None:
    from dataclasses import replace

    config = slice_config(replace(ModelConfig.flash(), dspark_block_size=5), 2, 256)
    assert (config.dspark_block_size, config.num_nextn_predict_layers) == (0, 0)
    assert config.num_hash_layers == 2


def dequantize(t: BlockScaledTensor) -> torch.Tensor:
    """Stand-in with the right shape that depends on the payload; not the arithmetic."""
    rows = t.data.view(torch.uint8).float()
    return rows.repeat_interleave(t.format.per_byte, dim=1)


def test_dequantised_copy(sound, tmp_path: Path) -> None:
    config = dequantize_checkpoint(sound("official"), tmp_path, dequantize)
    ck = Checkpoint.open(tmp_path)
    assert ck.config == config
    assert (config.expert_format, config.linear_format) == ("bfloat16", "bfloat16")
    got, want = ck.load(), weights_of("official")
    assert list(got) == list(want)
    for name, w in want.items():
        plain = dequantize(w).bfloat16() if isinstance(w, BlockScaledTensor) else w
        assert same_weight(got[name], plain)


def test_state_dict_stacks_gate_before_up() -> None:
    weights = weights_of("plain")
    out = transformers_state_dict(weights)
    stack = out["model.layers.2.mlp.experts.gate_up_proj"]
    assert stack.shape == (8, 256, 128)
    assert torch.equal(stack[5, :128], weights["layers.2.ffn.experts.5.w1.weight"])
    assert torch.equal(stack[5, 128:], weights["layers.2.ffn.experts.5.w3.weight"])
    down = out["model.layers.2.mlp.experts.down_proj"]
    assert torch.equal(down[7], weights["layers.2.ffn.experts.7.w2.weight"])
    assert not any("mtp" in name for name in out)
