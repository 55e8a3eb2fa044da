"""Hypothesis strategies that reach the corners of the spec on purpose."""

from sdpo_conformance.inputs.corners import EVERYTHING, NEUTRAL, Corner, visits
from sdpo_conformance.inputs.losses import build_case, loss_cases

__all__ = ["EVERYTHING", "NEUTRAL", "Corner", "build_case", "loss_cases", "visits"]
