"""Where the device code lies that the linear kernels of Hopper share."""

from pathlib import Path

DEVICE = Path(__file__).with_suffix(".cu")  # stands in front of the kernels' text
