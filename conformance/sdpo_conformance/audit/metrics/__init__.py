"""Per-step metrics, whatever shape the run's tool left them in."""

from sdpo_conformance.audit.metrics.metric_files import read_metrics
from sdpo_conformance.audit.metrics.metric_names import CONTINUOUS_FIELDS, FIELDS
from sdpo_conformance.audit.metrics.step_record import Batch, RunMetrics, Step, labelled_steps

__all__ = ["CONTINUOUS_FIELDS", "FIELDS", "Batch", "RunMetrics", "Step", "labelled_steps", "read_metrics"]
