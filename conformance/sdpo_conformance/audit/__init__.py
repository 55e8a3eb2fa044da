"""Can this finished run be trusted? Reads what a run left behind: metrics, adapters, and a model where given.

from sdpo_conformance.audit import audit_run
report = audit_run(Path("runs/2026-01-31"))
report.verdict, report.findings, report.exit_status
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdpo_conformance.audit.errors import AuditError

if TYPE_CHECKING:
    from sdpo_conformance.audit.inspection import AuditReport, audit_run

__all__ = ["AuditError", "AuditReport", "audit_run"]


def __getattr__(name: str) -> Any:
    if name in ("AuditReport", "audit_run"):
        from sdpo_conformance.audit import inspection

        return getattr(inspection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
