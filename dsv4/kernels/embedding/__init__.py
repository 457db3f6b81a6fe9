"""Token embeddings. Triton: GPUs from SM 9.0, and the interpreter."""

from dsv4.kernels.embedding import embed_streams

__all__ = ["embed_streams"]
