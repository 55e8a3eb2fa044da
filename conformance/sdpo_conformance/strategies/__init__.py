"""Hypothesis strategies that reach the corners of the spec on purpose."""

from sdpo_conformance.strategies.corners import EVERYTHING, NEUTRAL, Corner
from sdpo_conformance.strategies.loss import loss_cases

__all__ = ["EVERYTHING", "NEUTRAL", "Corner", "loss_cases"]
