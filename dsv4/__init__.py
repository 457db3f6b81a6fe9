"""DeepSeek-V4 inference: readable oracles, exact checkpoints, measured kernels."""

__version__ = "0.1.0"
