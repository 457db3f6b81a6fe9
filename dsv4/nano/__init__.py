"""dsv4-nano: the small trained checkpoint that the package bundles."""

from pathlib import Path


def path() -> Path:
    """Folder of the checkpoint, in the layout of a Hugging Face snapshot."""
    return Path(__file__).parent
