"""Checkpoints on disk: open, check, load, write.

Problem kinds of a CheckpointError, a stable contract:

folder, missing_file, file_type, path, read, changed      the folder and its files
format                                                    only pickle files, which are refused
json, duplicate, index, header, too_large, empty          index and headers
truncated, extended, hole, overlap                        data against header
missing, unexpected, dtype, shape                         tensors against config
scale, value                                              values
sha256                                                    a file against its manifest
exists, write                                             writing
"""

from dsv4.loader.checkpoint import Checkpoint
from dsv4.loader.writer import write_checkpoint

__all__ = ["Checkpoint", "write_checkpoint"]
