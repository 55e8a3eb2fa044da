"""The run as Markdown, to be pasted into an issue or a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdpo_conformance.bench.bench_results import groups_of, rows_of
from sdpo_conformance.bench.comparing import Change
from sdpo_conformance.bench.wording import (
    READING,
    absences,
    figures,
    headers,
    limit_figures,
    machine,
    notes,
    shown,
    step_of,
    title,
    verdict_of,
)


def markdown(document: Mapping[str, Any], targets: Sequence[str], changes: Sequence[Change] | None = None) -> str:
    """The whole page; ``changes`` of a comparison, where there was one."""
    return "\n".join(lines_of(document, targets, changes)) + "\n"


def lines_of(document: Mapping[str, Any], targets: Sequence[str], changes: Sequence[Change] | None) -> Iterator[str]:
    rows = rows_of(document)
    yield from ("# SDPO benchmark", "", machine(document), "", READING + ".")
    for group in groups_of(rows, targets):
        if not shown(group):
            continue
        columns = headers(group)
        yield from ("", f"## {title(group)}", "", line(columns), line(("---", *("---:",) * (len(columns) - 1))))
        if group.measured:
            yield line(limit_figures(group))
        said = []
        for row in shown(group):
            yield line(figures(group, row))
            if step := step_of(row):
                said.append(f"- {row.label}: {step}")
            if verdict := verdict_of(row):
                said.append(f"- {row.label}: {verdict}")
        if said:
            yield from ("", *map(escaped, said))
    if worth_knowing := notes(rows):
        yield from ("", "## Notes", "", *(f"- {escaped(text)}" for text in worth_knowing))
    if missing := absences(rows):
        yield from ("", "## Not measured", "", *(f"- {escaped(text)}" for text in missing))
    if changes is not None:
        yield from ("", "## Against the baseline", "")
        yield from (f"- {escaped(str(change))}" for change in changes) if changes else ("No change beyond the noise.",)


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    """Text that stays text in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
