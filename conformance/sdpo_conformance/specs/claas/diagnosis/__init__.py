"""From a run's failures to the known defect, or dialect, that returns just what the implementation returned."""

from sdpo_conformance.specs.claas.diagnosis.diagnose import Diagnosis, diagnose
from sdpo_conformance.specs.claas.diagnosis.observed import Observed, ObservedLoss
from sdpo_conformance.specs.claas.diagnosis.run import asked_next, diagnose_run

__all__ = ["Diagnosis", "Observed", "ObservedLoss", "asked_next", "diagnose", "diagnose_run"]
