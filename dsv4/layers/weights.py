"""A model's weights on its device, every byte as stored: experts in tiles, the rest by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.errors import CheckpointError, ConfigError
from dsv4.core.expert_tiles import COLUMNS, ROWS, to_tiles
from dsv4.core.formats import FORMATS, FP8_BLOCK128, BlockScaledTensor
from dsv4.core.inventory import TensorSpec, of_trunk, routed_expert_format, tensor_specs
from dsv4.ops.moe import check_expert_scales

EXPERT_MATRICES = ("w1", "w3", "w2")  # the order of their global scales
_SCALES = ("scale", "weight_scale")


@dataclass(frozen=True)
class ExpertStack:
    """The routed experts of one layer in tiles (core.expert_tiles), every byte as stored.

    codes   w1, w3, w2 -> [E, N / 8, K / 128, 8, 64] uint8
    scales  w1, w3, w2 -> [E, N / 8, K / 128, 8, 128 / group] uint8
    global_scale  [3, E] FP32 of w1, w3, w2 (NVFP4), or None
    format  "mxfp4" or "nvfp4"
    """

    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    global_scale: Tensor | None
    format: str

    @classmethod
    def empty(cls, config: ModelConfig, prefix: str, device: torch.device | str) -> ExpertStack:
        """Memory for the experts under `prefix` ("layers.3.ffn")."""
        fmt = routed_expert_format(config, prefix)
        assert fmt is not None
        E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        shapes: dict[str, tuple[int, int]] = {"w1": (F, D), "w3": (F, D), "w2": (D, F)}

        def room(N: int, K: int, size: int) -> Tensor:
            tiles = N // ROWS, K // COLUMNS, ROWS, size
            return torch.empty(E, *tiles, dtype=torch.uint8, device=device)

        codes = {name: room(*shape, COLUMNS // 2) for name, shape in shapes.items()}
        scales = {name: room(*shape, COLUMNS // fmt.block[1]) for name, shape in shapes.items()}
        shared = torch.empty(3, E, device=device) if fmt.has_global else None
        return cls(codes, scales, shared, fmt.name)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """w1, s1, w3, s3, w2, s2: codes and scales as the ops take them."""
        return tuple(x[name] for name in EXPERT_MATRICES for x in (self.codes, self.scales))

    def put(self, expert: int, matrix: str, part: str, x: Tensor) -> None:
        """Take one stored tensor of one expert; `part` is the last word of its name."""
        if part == "weight":
            self._put_tiles(self.codes[matrix][expert], x)
        elif part in _SCALES:
            self._put_tiles(self.scales[matrix][expert], x)
        elif part == "weight_scale_2":
            assert self.global_scale is not None
            self.global_scale[EXPERT_MATRICES.index(matrix), expert] = x
        # input_scale: activations stay BF16, so there is nothing to scale

    @staticmethod
    def _put_tiles(to: Tensor, x: Tensor) -> None:
        on_device = x.view(torch.uint8).to(to.device)  # in one piece; the order changes there
        to.copy_(to_tiles(on_device, to.shape[1] * COLUMNS))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = [*self.codes.values(), *self.scales.values()]
        return sum(x.nbytes for x in (*parts, self.global_scale) if x is not None)


@dataclass(frozen=True)
class WeightView:
    """The weights below one prefix: view.at("attn")["wq_a.weight"]."""

    tensors: Mapping[str, Tensor]
    experts: Mapping[str, ExpertStack]
    prefix: str = ""

    def at(self, name: str) -> WeightView:
        """The view one level down."""
        return WeightView(self.tensors, self.experts, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def fp8(self, name: str) -> BlockScaledTensor:
        """The FP8 matrix `name`, "attn.wq_a"."""
        return BlockScaledTensor(FP8_BLOCK128, self[f"{name}.weight"], self[f"{name}.scale"])

    def expert_stack(self) -> ExpertStack:
        """The routed experts here."""
        return self.experts[self.prefix.removesuffix(".")]


@dataclass
class DeviceWeights:
    """Takes stored tensors one by one to the device; `view` once all have come."""

    config: ModelConfig
    device: torch.device
    _specs: dict[str, TensorSpec]
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _experts: dict[str, ExpertStack] = field(default_factory=dict)
    _missing: set[str] = field(default_factory=set)

    @classmethod
    def load(
        cls, config: ModelConfig, stored: Iterable[tuple[str, Tensor]], device: torch.device | str,
        with_mtp: bool = False,
    ) -> DeviceWeights:  # fmt: skip
        """Copy every tensor of the trunk from `stored`, official stored names, in any order.

        Those of MTP blocks are passed over unless `with_mtp`. Memory on the host is the caller's:
        one tensor, if it streams. Raises ConfigError for formats without a production kernel,
        CheckpointError for missing or unexpected tensors.
        """
        check_served(config)
        specs = tensor_specs(config)
        if not with_mtp:
            specs = {name: s for name, s in specs.items() if of_trunk(name)}
        weights = cls(config, torch.device(device), specs, _missing=set(specs))
        for name, x in stored:
            if with_mtp or of_trunk(name):
                weights._put(name, x)
        if weights._missing:
            name = min(weights._missing)
            detail = f"{len(weights._missing)} tensors did not come"
            raise CheckpointError("missing", "", name, detail, "load the whole checkpoint")
        for stack in weights._experts.values():
            if stack.format == "mxfp4":
                for scales in stack.scales.values():
                    check_expert_scales(scales)
        return weights

    def _put(self, name: str, x: Tensor) -> None:
        if name not in self._missing:
            kind = "duplicate" if name in self._specs else "unexpected"
            raise CheckpointError(kind, "", name, "not a tensor still to come")
        self._missing.remove(name)
        block, is_expert, rest = name.partition(".experts.")
        if not is_expert:
            x = x.to(torch.int32) if name.endswith(".tid2eid") else x
            self._tensors[name] = x.to(self.device)
            return
        if block not in self._experts:
            self._experts[block] = ExpertStack.empty(self.config, block, self.device)
        expert, matrix, part = rest.split(".", 2)
        self._experts[block].put(int(expert), matrix, part, x)

    @property
    def view(self) -> WeightView:
        """All of them."""
        return WeightView(self._tensors, self._experts)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        plain = sum(x.nbytes for x in self._tensors.values())
        return plain + sum(stack.nbytes for stack in self._experts.values())


def check_served(config: ModelConfig) -> None:
    """Raises ConfigError for a checkpoint whose formats have no production kernels."""
    if config.linear_format != "fp8":
        raise ConfigError("linear_format", "'fp8' in tier 2", config.linear_format,
                          "convert the checkpoint, or use --tier 1")  # fmt: skip
    if config.expert_format not in FORMATS or config.expert_format == FP8_BLOCK128.name:
        raise ConfigError("expert_format", "'mxfp4' or 'nvfp4' in tier 2", config.expert_format,
                          "convert the checkpoint, or use --tier 1")  # fmt: skip
    # Whole tiles of experts, and rows of one matrix above another's.
    for name in ("hidden_size", "moe_intermediate_size", "q_lora_rank"):
        if getattr(config, name) % 128:
            raise ConfigError(name, "a multiple of 128 in tier 2", getattr(config, name),
                              "use --tier 1")  # fmt: skip
