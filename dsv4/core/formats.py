"""Block-scaled number formats: what one quantised tensor consists of, and nothing about how."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockScaledFormat:
    """A low-precision element type with one scale for each block of elements.

    name           "fp8_block128", "mxfp4" or "nvfp4"
    value_dtype    safetensors dtype of the payload as the checkpoint stores it
    per_byte       elements in one payload byte; the low nibble is the even element
    block          (rows, columns) that share one scale; partial blocks at the edge have their own
    scale_dtype    safetensors dtype of the scales
    max_value      largest finite magnitude of an element before scaling
    has_global     whether one more FP32 scale multiplies the whole tensor

    Source: OCP Microscaling v1.0 (MXFP4), ModelOpt (NVFP4), DeepSeek-V4 checkpoints (FP8 block).
    """

    name: str
    value_dtype: str
    per_byte: int
    block: tuple[int, int]
    scale_dtype: str
    max_value: float
    has_global: bool = False

    def payload_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the stored payload of a logical [out, in] matrix."""
        return (shape[0], shape[1] // self.per_byte)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a logical [out, in] matrix."""
        return (-(-shape[0] // self.block[0]), -(-shape[1] // self.block[1]))

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Payload, scales and global scales in bytes (NVFP4 carries two FP32 scalars)."""
        scalars = 8 if self.has_global else 0
        return prod(self.payload_shape(shape)) + prod(self.scale_shape(shape)) + scalars


FP8_BLOCK128 = BlockScaledFormat("fp8_block128", "F8_E4M3", 1, (128, 128), "F8_E8M0", 448.0)
MXFP4 = BlockScaledFormat("mxfp4", "I8", 2, (1, 32), "F8_E8M0", 6.0)
NVFP4 = BlockScaledFormat("nvfp4", "U8", 2, (1, 16), "F8_E4M3", 6.0, has_global=True)
FORMATS = {f.name: f for f in (FP8_BLOCK128, MXFP4, NVFP4)}

# safetensors dtype names and their torch counterparts
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class BlockScaledTensor:
    """A quantised matrix as the checkpoint stores it.

    format  which of FORMATS
    data    payload: float8_e4m3fn [out, in], or packed nibbles (int8 or uint8) [out, in / 2]
    scale   float8_e8m0fnu, float8_e4m3fn (NVFP4) or float32 (some FP8 experts), `scale_shape`
    global_scale  float32 scalar (NVFP4's weight_scale_2), else None
    input_scale   float32 scalar calibrated for activations (NVFP4), carried along, else None
    """

    format: BlockScaledFormat
    data: Tensor
    scale: Tensor
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The logical [out, in] shape."""
        return (self.data.shape[0], self.data.shape[1] * self.format.per_byte)

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        parts = (self.data, self.scale, self.global_scale, self.input_scale)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def __post_init__(self) -> None:
        expected = self.format.scale_shape(self.shape)
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale: expected shape {expected}, got {tuple(self.scale.shape)}")
        if self.format.has_global and self.global_scale is None:
            raise ValueError(f"global_scale: expected a scalar for {self.format.name}, got None")
