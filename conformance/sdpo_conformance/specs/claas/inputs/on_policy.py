"""Moving a case on-policy: the control of every rule about the ratio."""

from __future__ import annotations

from sdpo_conformance.specs.claas.loss_case import LossCase


def on_policy(case: LossCase) -> LossCase:
    """The case with the current policy as its behaviour policy, so that the ratio is 1."""
    old = case.loss_input.old_student_logprobs
    return case.with_fields(old_student_logprobs=case.truth.chosen.to(old.dtype))
