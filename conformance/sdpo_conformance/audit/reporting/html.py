"""The report as one HTML page: no script, nothing fetched, light and dark, readable on a phone."""

from __future__ import annotations

import math
from typing import Any

from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings import Severity
from sdpo_conformance.audit.inspection import AuditReport
from sdpo_conformance.audit.metrics import FIELDS
from sdpo_conformance.audit.reporting.audit_document import document
from sdpo_conformance.audit.reporting.charts import heat_maps, metric_charts, shade_range

_MOST_ROWS = 200


def page(report: AuditReport) -> str:
    """The whole page. Every string from the run is escaped by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sdpo_conformance.audit.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["number"] = _number
    metrics, change = report.evidence.metrics, report.evidence.change
    rows = []
    if metrics is not None:
        rows = [(metrics.label(b, s), s.values) for b, batch in enumerate(metrics.batches) for s in batch.steps]
    standstills = _standstills(report)
    deltas = [m.max_abs_delta for m in change.modules if m.max_abs_delta] if change else []
    text: str = environment.get_template("page.html.jinja").render(
        report=report,
        data=document(report),
        tone=(
            "error"
            if any(f.severity is Severity.ERROR for f in report.findings)
            else "warning"
            if report.alarms
            else "ok"
        ),
        fields=[name for name in FIELDS if metrics is not None and metrics.has(name)],
        rows=rows[:_MOST_ROWS],
        hidden_rows=max(0, len(rows) - _MOST_ROWS),
        charts=metric_charts(metrics, standstills) if metrics is not None else [],
        marked=bool(standstills),
        heat=heat_maps(change) if change is not None else [],
        heat_range=shade_range(deltas) if deltas else None,
    )
    return text


def _standstills(report: AuditReport) -> dict[str, frozenset[int]]:
    """Per field, the indices of the steps that a stale-metrics finding names."""
    metrics = report.evidence.metrics
    found: dict[str, set[int]] = {}
    if metrics is None:
        return {}
    names = [metrics.label(b, step) for b, batch in enumerate(metrics.batches) for step in batch.steps]
    index = {name: position for position, name in enumerate(names)}
    for finding in report.findings:
        pairs: list[dict[str, Any]] = finding.data.get("pairs", []) if finding.id == "stale-metrics" else []
        for pair in pairs:
            for field in pair["fields"] if pair["sample"] is None else ():
                found.setdefault(field, set()).update(index[name] for name in pair["steps"] if name in index)
    return {field: frozenset(steps) for field, steps in found.items()}


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if math.isfinite(value) else str(value)
