"""The run on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sdpo_conformance.bench.bench_results import Group, groups_of, rows_of
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


def print_run(document: Mapping[str, Any], targets: Sequence[str], console: Console) -> None:
    """Every group with its limit, then what is absent and why."""
    rows = rows_of(document)
    console.print(Text(f"SDPO benchmark · {machine(document)}", style="bold"))
    for group in groups_of(rows, targets):
        if shown(group):
            console.print()
            print_group(group, console)
    console.print()
    for line in [*notes(rows), *absences(rows)]:
        console.print(f"  {line}", highlight=False, markup=False)
    console.print(Text(READING, style="dim"))


def print_group(group: Group, console: Console) -> None:
    console.print(Text(title(group), style="bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for index, header in enumerate(headers(group)):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=True)
    if group.measured:
        table.add_row(*limit_figures(group), style="dim")
    lines = []
    for row in shown(group):
        style = "red" if row.bad or not row.measured else "dim italic" if row.other else ""
        table.add_row(*figures(group, row), style=style)
        if step := step_of(row):
            lines.append(Text(f"{row.label}: {step}"))
        if verdict := verdict_of(row):
            lines.append(Text(f"{row.label}: {verdict}", style="red"))
    console.print(Padding(table, (0, 0, 0, 2)))
    for line in lines:
        console.print(Padding(line, (0, 0, 0, 2)))


def print_changes(changes: Sequence[Change], baseline: str, console: Console) -> None:
    """The comparison's findings, regressions first."""
    console.print()
    console.print(Text(f"against {baseline}", style="bold"))
    if not changes:
        console.print("  no change beyond the noise")
    for change in sorted(changes, key=lambda change: not change.worse):
        console.print(Text(f"  {change}", style="red" if change.worse else "green"))
