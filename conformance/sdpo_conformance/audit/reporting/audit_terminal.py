"""The report on a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.padding import Padding, PaddingDimensions
from rich.table import Table
from rich.text import Text

from sdpo_conformance.audit.adapter_change import AdapterChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings import Finding, Severity
from sdpo_conformance.audit.generation import GenerationResult
from sdpo_conformance.audit.inspection import AuditReport
from sdpo_conformance.audit.metrics import FIELDS, RunMetrics
from sdpo_conformance.audit.model_loading import AFTER, BEFORE

_STYLE = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
_MOST_STEPS = 12


def render(report: AuditReport, console: Console) -> None:
    """Write the report: what was looked at, the numbers, the findings, what was not judged, the verdict."""
    files, evidence = report.files, report.evidence
    subject = files.run or files.metrics or files.after
    console.print(Text.assemble(("SDPO audit", "bold"), f" · {shown(subject)}"), highlight=False)
    for name in ("metrics", "before", "after", "request"):
        path = getattr(files, name)
        label = "settings" if name == "request" else name
        console.print(Text(f"  {label:<9}{shown(path) if path else '–'}", style="" if path else "dim"))
    if files.ignored:
        console.print(Text(f"  ignored  {', '.join(shown(name) for name in files.ignored)}", style="dim"))
    console.print()
    if evidence.metrics:
        _metrics(evidence.metrics, console)
    if evidence.change:
        _change(evidence.change, console)
    if evidence.generation:
        _generation(evidence.generation, console)
    for finding in report.findings:
        _finding(finding, console)
    if report.not_judged:
        console.print(Text("not judged", style="bold dim"))
        for item in report.not_judged:
            console.print(_indented(Text(f"{item.id}: {item.reason}", style="dim"), (0, 0, 0, 2)))
        console.print()
    style = (
        "bold red"
        if report.alarms and report.findings[0].severity is Severity.ERROR
        else ("bold yellow" if report.alarms else "bold green")
    )
    console.print(Text.assemble("verdict  ", (report.verdict, style)))


def _metrics(metrics: RunMetrics, console: Console) -> None:
    names = [name for name in FIELDS if metrics.has(name)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("step", justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    rows = [
        (metrics.label(b, s).removeprefix("step "), s) for b, batch in enumerate(metrics.batches) for s in batch.steps
    ]
    hidden = len(rows) - _MOST_STEPS
    for label, step in rows[: _MOST_STEPS if hidden > 0 else None]:
        table.add_row(label, *(_number(step.values.get(name)) for name in names))
    console.print(_indented(table, (0, 0, 0, 2)))
    if hidden > 0:
        console.print(Text(f"  … and {hidden} more steps", style="dim"))
    console.print()


def _change(change: AdapterChange, console: Console) -> None:
    if not change.compared:
        told = f"{len(change.tensors)} tensors; nothing from before the run to compare with"
    else:
        told = (
            f"{change.moved} of {len(change.compared)} tensors changed, max |delta|"
            f" {change.max_abs_delta:.4g}" + _where(change)
        )
    console.print(_indented(Text.assemble(("adapter  ", "dim"), told), (0, 0, 1, 2)))


def _where(change: AdapterChange) -> str:
    furthest = max(change.compared, key=lambda tensor: tensor.max_abs_delta or 0.0)
    return f" in {shown(furthest.place.module)}" if furthest.moved else ""


def _generation(result: GenerationResult, console: Console) -> None:
    total = len(result.prompts)
    start = "base model" if result.before_is_base else "before"
    told = (
        f"{start} {result.stopped(BEFORE)}/{total} stopped, after {result.stopped(AFTER)}/{total} "
        f"(within {result.max_new_tokens} tokens); repeated 4-grams {result.repetition(BEFORE):.0%}, "
        f"{result.repetition(AFTER):.0%}"
        + (f"; log-probs moved by {result.drift:.3g} nats per token" if result.drift is not None else "")
    )
    console.print(_indented(Text.assemble(("generation  ", "dim"), told), (0, 0, 1, 2)))


def _finding(finding: Finding, console: Console) -> None:
    console.print(Text.assemble((f"{finding.severity:<8}", _STYLE[finding.severity]), (finding.id, "bold")))
    console.print(_indented(Text(finding.statement), (0, 0, 0, 8)))
    for line in finding.evidence:
        console.print(_indented(Text(line, style="dim"), (0, 0, 0, 10)))
    for label, text in (("cause", finding.cause), ("next", finding.next_step)):
        console.print(_indented(Text.assemble((f"{label}  ", "dim"), text), (0, 0, 0, 8)))
    console.print()


def _indented(what: Text | Table, by: PaddingDimensions) -> Padding:
    """Indented, without the blanks that would fill each line up to the terminal's width."""
    return Padding(what, by, expand=False)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if math.isfinite(value) else str(value)
