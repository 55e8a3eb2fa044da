"""What a cell of the matrix says: one requirement, one implementation, through whichever entries it offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sdpo_conformance.matrix.columns import Column, Standing
from sdpo_conformance.specs import DEFAULT, find_spec
from sdpo_conformance.specs.spec import Spec


class CellStatus(StrEnum):
    """Worst first: a requirement that fails through one entry fails. ``INTERNAL_ERROR`` is the suite's fault."""

    FAILED = "failed"
    INTERNAL_ERROR = "internal error"
    UNEXPECTED_PASS = "unexpected pass"
    EXPECTED_FAILURE = "expected failure"
    PASSED = "passed"
    NOT_JUDGED = "not judged"
    NOT_OFFERED = "not offered"
    NOT_INSTALLED = "not installed"
    COULD_NOT_RUN = "could not run"


JUDGED = frozenset(
    {
        CellStatus.FAILED,
        CellStatus.INTERNAL_ERROR,
        CellStatus.UNEXPECTED_PASS,
        CellStatus.EXPECTED_FAILURE,
        CellStatus.PASSED,
    }
)
MET = frozenset({CellStatus.PASSED, CellStatus.UNEXPECTED_PASS})


@dataclass(frozen=True)
class Row:
    """A requirement as the matrix shows it; ``why`` is empty for an id that this version does not know."""

    id: str
    level: str
    statement: str
    source: str
    why: str = ""

    @property
    def family(self) -> str:
        return self.id.rsplit("-", 1)[0]


@dataclass(frozen=True)
class Cell:
    """``records`` are the results' own, one for each entry; ``reason`` says why there are none."""

    status: CellStatus
    records: tuple[Mapping[str, Any], ...] = ()
    reason: str = ""

    @property
    def consequence(self) -> bool:
        """It fails, and did already where its rule plays no part: another requirement names the cause."""
        failed = [record for record in self.records if record["status"] == CellStatus.FAILED]
        return bool(failed) and all(record["failure"].get("secondary") for record in failed)


def rows_of(columns: Sequence[Column], only: Sequence[str] = ()) -> list[Row]:
    """The requirements that any run selected, in the order of the spec; ``only`` where nothing could run."""
    spec = spec_of(columns)
    known = spec.requirements()
    rows = {id: Row(id, found.level, found.statement, found.source, found.why) for id, found in known.items()}
    for record in (record for column in columns for record in records_of(column)):
        id = record["requirement"]
        if id not in rows:
            rows[id] = Row(id, record["level"], record["statement"], record["source"])
    selections = [column.results["run"]["only"] for column in columns if column.results is not None] or [only]
    shown = [row for row in rows.values() if any(selects(selection, row.id) for selection in selections)]
    return sorted(shown, key=lambda row: (family_order(row.family, spec), int(row.id.rsplit("-", 1)[1])))


def spec_of(columns: Sequence[Column]) -> Spec:
    """The spec that every judged column was judged by; raises ValueError where they differ."""
    names = {column.results["spec"]["name"] for column in columns if column.results is not None} or {DEFAULT}
    if len(names) > 1:
        raise ValueError(f"these results were judged by different specs: {', '.join(sorted(names))}")
    return find_spec(names.pop())


def family_order(family: str, spec: Spec) -> int:
    """Families in the order of the report, unknown ones last."""
    order = list(spec.families)
    return order.index(family) if family in order else len(order)


def selects(only: Iterable[str], id: str) -> bool:
    """Whether ``--only`` with these names includes a requirement."""
    wanted = {name.strip().upper() for name in only}
    return not wanted or id in wanted or id.rsplit("-", 1)[0] in wanted


def records_of(column: Column) -> Sequence[Mapping[str, Any]]:
    """The records of a column's run; none where it was not judged."""
    return () if column.results is None else column.results["records"]


def cell_of(column: Column, id: str) -> Cell:
    """The verdict of one column on one requirement."""
    if column.results is None:
        missing = column.standing is Standing.NOT_INSTALLED
        return Cell(CellStatus.NOT_INSTALLED if missing else CellStatus.COULD_NOT_RUN, reason=column.message)
    records = tuple(record for record in column.results["records"] if record["requirement"] == id)
    if records:
        statuses = {CellStatus(record["status"]) for record in records}
        return Cell(next(status for status in CellStatus if status in statuses), records)
    if not selects(column.results["run"]["only"], id):
        return Cell(CellStatus.NOT_JUDGED, reason="this run was limited with --only to other requirements")
    known = spec_of([column]).requirements().get(id)
    if known is not None and {entry.value for entry in known.capabilities} & set(column.results["offered"]):
        return Cell(CellStatus.NOT_JUDGED, reason="the requirement is newer than this run")
    return Cell(CellStatus.NOT_OFFERED, reason="it offers no entry that this requirement is tested through")


def tally(column: Column, rows: Iterable[Row]) -> tuple[int, int]:
    """Requirements met, and judged, among ``rows``."""
    statuses = [cell_of(column, row.id).status for row in rows]
    return sum(status in MET for status in statuses), sum(status in JUDGED for status in statuses)
