"""Which entries a family is tested through, and the aspects that tests compare."""

from __future__ import annotations

from sdpo_conformance.judging.compare import GRADIENT
from sdpo_conformance.protocol import METRIC_KEYS, Capability

LOSSES = (Capability.LOSS, Capability.FUSED)
DIVERGENCES = (*LOSSES, Capability.DIVERGENCE)

VALUE = ("distill_loss", "loss", "divergence")
"""The divergence as each entry reports it while the anchor is off."""

ALL = ("loss", *METRIC_KEYS, "divergence", GRADIENT)
