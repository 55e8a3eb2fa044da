"""Every check of the audit, and the loop that makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sdpo_conformance.audit.findings import (
    adapter_config,
    adapter_form,
    anchor_reference,
    behaviour,
    clipped_norm,
    continuity,
    course,
    liveness,
    loss_sum,
    losses,
    merged,
    optimizer,
    partly_trained,
    ranks,
    ratio,
    recorded_logprobs,
    refresh,
    rewards,
    sample_means,
    selection,
    staleness,
    teacher,
    untrained,
    weight_growth,
    weights,
)
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity
from sdpo_conformance.specs import DEFAULT, find_spec

CHECKS: tuple[Check, ...] = (
    *staleness.CHECKS,
    *refresh.CHECKS,
    *ratio.CHECKS,
    *losses.CHECKS,
    *loss_sum.CHECKS,
    *clipped_norm.CHECKS,
    *anchor_reference.CHECKS,
    *liveness.CHECKS,
    *course.CHECKS,
    *rewards.CHECKS,
    *sample_means.CHECKS,
    *weights.CHECKS,
    *untrained.CHECKS,
    *partly_trained.CHECKS,
    *continuity.CHECKS,
    *weight_growth.CHECKS,
    *adapter_form.CHECKS,
    *adapter_config.CHECKS,
    *optimizer.CHECKS,
    *teacher.CHECKS,
    *ranks.CHECKS,
    *merged.CHECKS,
    *selection.CHECKS,
    *behaviour.CHECKS,
    *recorded_logprobs.CHECKS,
)
#: What is asked of the adapter in RUN itself, too, where the last of its checkpoints was judged: whether it loads as
#: what was trained. It may be any of the checkpoints, the best one or the last.
_OF_DELIVERED: tuple[Check, ...] = tuple(
    check
    for check in (*weights.CHECKS, *adapter_form.CHECKS, *adapter_config.CHECKS)
    if check.id in ("tensor-nonfinite", "tensor-empty", "pair-lost", "config-mismatch", "config-changed")
)
_ORDER = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.NOTE: 2}


def judge(evidence: Evidence) -> tuple[tuple[Finding, ...], tuple[NotJudged, ...]]:
    """Make every check: the findings, gravest first, and what could not be judged."""
    verdicts = [verdict for check in CHECKS for verdict in check.judge(evidence)]
    verdicts += _of_delivered(evidence, verdicts)
    own = evidence.metrics is None or evidence.metrics.native
    rules = find_spec(DEFAULT).audit_rules if own else {}
    findings = [_with_rules(verdict, rules) for verdict in verdicts if isinstance(verdict, Finding)]
    findings.sort(key=lambda finding: _ORDER[finding.severity])
    return tuple(findings), tuple(verdict for verdict in verdicts if isinstance(verdict, NotJudged))


def _of_delivered(evidence: Evidence, said: Sequence[Finding | NotJudged]) -> list[Finding | NotJudged]:
    """Errors of the adapter that the run delivers, as far as its last checkpoint does not have them."""
    change = evidence.delivered
    if change is None:
        return []
    same = not change.only_before and not change.only_after and not change.shape_mismatch
    known = {verdict.id for verdict in said if isinstance(verdict, Finding)}
    found = [
        verdict
        for check in _OF_DELIVERED
        if check.id not in known and (same or check.id != "config-changed")  # of other shapes it is another adapter
        for verdict in check.judge(Evidence(change=change))
    ]
    return [
        replace(verdict, statement=f"the adapter in RUN itself: {verdict.statement}")
        for verdict in found
        if isinstance(verdict, Finding) and verdict.severity is Severity.ERROR
    ]


def _with_rules(finding: Finding, rules: Mapping[str, Sequence[str]]) -> Finding:
    """The next step with the spec's rules on it, which `run` holds the trainer's code against."""
    named = rules.get(finding.id)
    return replace(finding, next_step=f"{finding.next_step} ({', '.join(named)})") if named else finding


__all__ = ["CHECKS", "Check", "Evidence", "Finding", "NotJudged", "Severity", "judge"]
