"""What every Triton launch of this package shares."""

from __future__ import annotations

import triton

# Triton decides when a kernel is decorated, so this holds for the life of the process.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# No contraction of a * b + c: PyTorch rounds the product, and Triton's default may change.
EXACT = {"enable_fp_fusion": False}
