"""A gradient's norm that was taken after clipping, against the norm that clips."""

from __future__ import annotations

import math

from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts
from sdpo_conformance.audit.metrics import labelled_steps

#: Gradients in bfloat16 are rounded after they were scaled.
_ROUNDING = 0.02
_SHOWN = 5


def not_clipped(evidence: Evidence) -> Verdicts:
    """A norm that was taken after clipping, by its name, above the norm to which the settings clip.

    `grad_norm` itself is the norm before clipping in this algorithm, transformers, TRL and verl. A number of 1 or less
    may be a switch or the share of clipped steps, unless it is the norm before.
    """
    metrics, most = evidence.metrics, evidence.request.training.max_grad_norm
    if metrics is None or not most or most < 0:
        return
    above = []
    for label, step in labelled_steps(metrics):
        value, before = step.values.get("clipped_norm", math.nan), step.values.get("grad_norm", math.nan)
        if most * (1 + _ROUNDING) < value < math.inf and (value > 1 or math.isclose(value, before, rel_tol=1e-6)):
            beside = f", {before:.4g} before" if math.isfinite(before) else ""
            above.append((value, f"{label}: {value:.4g} after clipping{beside}"))
    if not above:
        return
    yield Finding(
        id="grad-not-clipped",
        severity=Severity.ERROR if metrics.native else Severity.WARNING,
        statement=f"the gradient's norm after clipping lies above max_grad_norm {most:g} at {len(above)} step(s)",
        evidence=tuple(text for _, text in above[:_SHOWN]),
        cause="clipping after the optimizer's step, of other parameters, or of an iterator that was used up before",
        next_step="clip the very parameters that the optimizer holds, between the backward and its step",
        data={"largest": max(value for value, _ in above), "max_grad_norm": most},
    )


CHECKS = (Check("grad-not-clipped", "a norm after clipping above the norm that clips", not_clipped),)
