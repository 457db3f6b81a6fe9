"""DeepSeek-V4 inference: readable oracles, exact checkpoints, measured kernels.

The public names are imported when first used, so that `import dsv4` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4.core.config import ModelConfig as ModelConfig
    from dsv4.core.errors import CapacityError as CapacityError
    from dsv4.core.errors import CheckpointError as CheckpointError
    from dsv4.core.errors import ConfigError as ConfigError
    from dsv4.core.errors import RequestError as RequestError
    from dsv4.core.sampling import SamplingParams as SamplingParams
    from dsv4.llm import LLM as LLM
    from dsv4.loader import Checkpoint as Checkpoint
    from dsv4.reference.model import ReferenceModel as ReferenceModel

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "dsv4.core.config",
    "CapacityError": "dsv4.core.errors",
    "CheckpointError": "dsv4.core.errors",
    "ConfigError": "dsv4.core.errors",
    "RequestError": "dsv4.core.errors",
    "SamplingParams": "dsv4.core.sampling",
    "Checkpoint": "dsv4.loader",
    "LLM": "dsv4.llm",
    "ReferenceModel": "dsv4.reference.model",
}
__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
