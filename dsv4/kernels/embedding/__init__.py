"""Token embeddings."""

from dsv4.kernels.embedding import embed_streams

__all__ = ["embed_streams"]
