"""What the CUDA kernels serve. Imports nothing: the memory estimate asks on login nodes, which may have no torch."""

from __future__ import annotations

FEATURE_MAP_NUMBERS = {"given": 0, "hedgehog_softmax": 1, "hedgehog_exp": 2, "hedgehog_joint": 3}
"""As in interface.h; `given`: φ comes from outside."""
FUSED_FEATURE_MAPS = tuple(name for name in FEATURE_MAP_NUMBERS if name != "given")
HEAD_DIMS = (64, 128)
FEATURES = (128, 256)
