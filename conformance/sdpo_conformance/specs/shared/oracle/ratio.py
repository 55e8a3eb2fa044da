"""The clipped importance ratio, as lasgroup/SDPO (core_algos.py 1168-1176) and TRL (loss_utils.py 56-65) have it.

r = min(exp(clamp(sg(l[y] - old), -20, 20)), cap)
"""

from __future__ import annotations

from torch import Tensor

LOG_CLAMP = 20.0
"""The log of a ratio is clamped to +- this before exp."""


def importance_ratio(chosen: Tensor, old: Tensor, cap: float) -> Tensor:
    """r, (B, T); ``chosen`` and ``old`` are log-probs in nats."""
    return (chosen - old).clamp(-LOG_CLAMP, LOG_CLAMP).exp().clamp(max=cap)
