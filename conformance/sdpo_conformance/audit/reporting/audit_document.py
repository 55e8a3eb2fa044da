"""The report as plain data: what --json writes, described by report.schema.json beside this module."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.adapter_change import AdapterChange, ModuleChange
from sdpo_conformance.audit.generation import GenerationResult
from sdpo_conformance.audit.inspection import AuditReport
from sdpo_conformance.audit.metrics import RunMetrics
from sdpo_conformance.audit.model_loading import AFTER, BEFORE

FORMAT = "sdpo-conformance-audit/1"


def schema() -> dict[str, Any]:
    """The JSON schema of the document (draft 2020-12)."""
    loaded: dict[str, Any] = json.loads(resources.files(__package__).joinpath("report.schema.json").read_text("utf-8"))
    return loaded


def document(report: AuditReport) -> dict[str, Any]:
    """The report as JSON-ready data. Numbers that are not finite become null: JSON has no word for them."""
    evidence, files = report.evidence, report.files
    data = {
        "format": FORMAT,
        "verdict": report.verdict,
        "exit_status": report.exit_status,
        "inputs": (
            {name: _text(getattr(files, name)) for name in ("run", "metrics", "before", "after", "request", "prompts")}
            | {"ignored": list(files.ignored)}
        ),
        "findings": [
            {
                "id": f.id,
                "severity": str(f.severity),
                "statement": f.statement,
                "evidence": list(f.evidence),
                "cause": f.cause,
                "next_step": f.next_step,
                "data": dict(f.data),
            }
            for f in report.findings
        ],
        "not_judged": [{"id": n.id, "reason": n.reason} for n in report.not_judged],
        "metrics": _metrics(evidence.metrics) if evidence.metrics else None,
        "adapter": _adapter(evidence.change) if evidence.change else None,
        "generation": _generation(evidence.generation) if evidence.generation else None,
        "replay": (
            {
                "samples": evidence.replay.samples,
                "mean_is_ratio": evidence.replay.mean_is_ratio,
                "sampler_gap": evidence.replay.sampler_gap,
                "kl_reg": evidence.replay.kl_reg,
            }
            if evidence.replay
            else None
        ),
    }
    cleaned: dict[str, Any] = _finite(data)
    return cleaned


def _metrics(metrics: RunMetrics) -> dict[str, Any]:
    return {
        "kind": metrics.kind,
        "batching": metrics.batching,
        "batches": [[{"step": s.number, **s.values} for s in batch.steps] for batch in metrics.batches],
    }


def _adapter(change: AdapterChange) -> dict[str, Any]:
    return {
        "tensors": len(change.tensors),
        "tensors_compared": len(change.compared),
        "tensors_changed": change.moved,
        "max_abs_delta": change.max_abs_delta if change.compared else None,
        "scale": change.scale,
        "by_kind": _grouped(change.modules, "kind"),
        "by_layer": _grouped(change.modules, "layer"),
        "modules": [
            {
                "module": m.place.module,
                "stack": m.place.stack,
                "layer": m.place.layer,
                "kind": m.place.kind,
                "tensors": len(m.tensors),
                "tensors_changed": sum(t.moved for t in m.tensors),
                "max_abs_delta": m.max_abs_delta,
                "update_norm": m.update_norm,
            }
            for m in change.modules
        ],
    }


def _grouped(modules: tuple[ModuleChange, ...], by: str) -> list[dict[str, Any]]:
    groups: dict[str, list[ModuleChange]] = {}
    for module in modules:
        layer = "" if module.place.layer is None else f"{module.place.stack}.{module.place.layer}"
        groups.setdefault(module.place.kind if by == "kind" else layer, []).append(module)
    return [
        {
            "name": name,
            "tensors": sum(len(m.tensors) for m in group),
            "tensors_changed": sum(t.moved for m in group for t in m.tensors),
            "max_abs_delta": max((m.max_abs_delta for m in group if m.max_abs_delta is not None), default=None),
        }
        for name, group in groups.items()
        if name
    ]


def _generation(result: GenerationResult) -> dict[str, Any]:
    return {
        "max_new_tokens": result.max_new_tokens,
        "before_is_base": result.before_is_base,
        "drift": result.drift,
        **{
            name: {
                "stopped": result.stopped(name),
                "prompts": len(result.prompts),
                "repetition": result.repetition(name),
                "loops": result.loops(name),
            }
            for name in (BEFORE, AFTER)
        },
        "prompts": [
            {
                "before": {"tokens": len(r.outputs[BEFORE].tokens), "stopped": r.outputs[BEFORE].stopped},
                "after": {"tokens": len(r.outputs[AFTER].tokens), "stopped": r.outputs[AFTER].stopped},
                "logprob_before": r.logprob_before,
                "logprob_after": r.logprob_after,
                "end_before": r.end_before,
                "end_after": r.end_after,
            }
            for r in result.prompts
        ],
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
