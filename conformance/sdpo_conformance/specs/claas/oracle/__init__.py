"""The spec, executable: CLaaS SDPO in float64, written to be read beside its formulas. Imports no pytest."""

from sdpo_conformance.specs.claas.oracle.loss import LossTruth, sdpo_loss

__all__ = ["LossTruth", "sdpo_loss"]
