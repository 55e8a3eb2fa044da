"""Names of the protocol that are needed before torch is imported."""

from __future__ import annotations

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
"""What ``--dtype`` and ``SDPO_CLAIMS`` may name."""

AXES = ("dp", "cp", "tp")
"""The axes of a mesh: data, context and tensor parallel, in the order in which ranks are counted; tp neighbours are
next to each other."""
