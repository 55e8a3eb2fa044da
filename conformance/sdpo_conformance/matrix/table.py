"""The matrix on a terminal: implementations down, families across, then what stands in the way of each."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdpo_conformance.matrix.cells import CellStatus, Row, cell_of, tally
from sdpo_conformance.matrix.columns import Column

SHOWN_IDS = 12


def print_matrix(columns: Sequence[Column], rows: Sequence[Row], console: Console) -> None:
    """Requirements met of judged for each family, and one paragraph for each implementation with a finding."""
    families = list(dict.fromkeys(row.family for row in rows))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("met/judged", overflow="fold")
    for family in families:
        table.add_column(family, justify="right", no_wrap=True)
    for column in columns:
        table.add_row(column.implementation, *(entry(column, family, rows) for family in families))
    console.print(table)
    for column in columns:
        for line in findings(column, rows):
            console.print(line, highlight=False)


def entry(column: Column, family: str, rows: Sequence[Row]) -> Text:
    """``7/9``, or a dash where nothing was judged."""
    met, judged = tally(column, [row for row in rows if row.family == family])
    if not judged:
        return Text("-", style="dim")
    return Text(f"{met}/{judged}", style="green" if met == judged else "red")


def findings(column: Column, rows: Sequence[Row]) -> list[Text]:
    """What a reader wants to know next; nothing where everything is met."""
    heading = (f"{column.implementation}  ", "bold")
    if column.results is None:
        return [Text.assemble(heading, (column.message, "yellow"))]
    verdict = column.results["verdict"]
    lines = [Text.assemble(heading, (verdict["text"], "green" if verdict["passed"] else "red"))]
    if column.internal_errors:
        lines.append(Text(f"  the suite itself went wrong, please report: {' '.join(column.internal_errors)}"))
    bad = [row.id for row in rows if cell_of(column, row.id).status is CellStatus.FAILED]
    if bad:
        more = f" and {len(bad) - SHOWN_IDS} more" if len(bad) > SHOWN_IDS else ""
        lines.append(Text(f"  not met: {' '.join(bad[:SHOWN_IDS])}{more}"))
    diagnosis = column.results["diagnosis"]
    if diagnosis:
        lines += [Text(f"  diagnosis: {line}") for line in diagnosis["lines"][:1]]
    return lines
