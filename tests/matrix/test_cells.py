"""What a cell says, and which rows there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sdpo_conformance.matrix.cells import CellStatus, cell_of, rows_of, selects, tally
from sdpo_conformance.matrix.columns import Column, Standing
from sdpo_conformance.specs import find_spec

LOSS, FUSED = "compute_sdpo_loss", "compute_fused_sdpo_loss"
Make = Callable[..., Column]


def test_a_requirement_that_fails_through_one_entry_fails(make_column: Make) -> None:
    column = make_column(statuses={f"IS-2/{FUSED}": "failed"}, entries=(LOSS, FUSED))
    cell = cell_of(column, "IS-2")
    assert cell.status is CellStatus.FAILED
    assert [one["status"] for one in cell.records] == ["passed", "failed"]
    assert cell_of(column, "IS-3").status is CellStatus.PASSED


@pytest.mark.parametrize(
    ("one", "other", "cell"),
    [
        ("passed", "not judged", "passed"),
        ("passed", "expected failure", "expected failure"),
        ("passed", "unexpected pass", "unexpected pass"),
        ("failed", "internal error", "failed"),
        ("passed", "internal error", "internal error"),
        ("not judged", "not judged", "not judged"),
    ],
)
def test_two_entries_make_one_status(make_column: Make, one: str, other: str, cell: str) -> None:
    statuses = {f"IS-2/{LOSS}": one, f"IS-2/{FUSED}": other}
    assert cell_of(make_column(statuses=statuses, entries=(LOSS, FUSED)), "IS-2").status == cell


def test_what_is_not_offered_not_selected_or_not_there(make_column: Make, make_absent: Make) -> None:
    assert cell_of(make_column(), "STEP-1").status is CellStatus.NOT_OFFERED
    limited = cell_of(make_column(only=["IS"]), "KL-1")
    assert limited.status is CellStatus.NOT_JUDGED
    assert "--only" in limited.reason
    gone = cell_of(make_absent(), "IS-2")
    assert (gone.status, gone.reason) == (CellStatus.NOT_INSTALLED, "not installed: gone: pip install gone")
    assert cell_of(make_absent(standing=Standing.COULD_NOT_RUN), "IS-2").status is CellStatus.COULD_NOT_RUN


def test_a_requirement_that_the_run_did_not_know_is_not_called_not_offered(
    make_results: Callable[..., dict[str, Any]],
) -> None:
    results = make_results()
    results["records"] = [one for one in results["records"] if one["requirement"] != "IS-2"]
    cell = cell_of(Column("a", Standing.JUDGED, "cpu", results=results), "IS-2")
    assert (cell.status, cell.reason) == (CellStatus.NOT_JUDGED, "the requirement is newer than this run")


def test_rows_follow_the_spec_and_the_selection(make_column: Make, make_absent: Make) -> None:
    assert [row.id for row in rows_of([make_column()])] == list(find_spec("claas").requirements())
    assert {row.family for row in rows_of([make_column(only=["IS"])])} == {"IS"}
    both = rows_of([make_column(only=["IS"]), make_column("b", only=["KL"])])
    assert list(dict.fromkeys(row.family for row in both)) == ["IS", "KL"]
    assert [row.id for row in rows_of([make_absent()], ["IS-2"])] == ["IS-2"]
    assert len(rows_of([make_absent()])) == len(find_spec("claas").requirements())


def test_a_requirement_of_another_version_keeps_its_row(
    make_results: Callable[..., dict[str, Any]],
) -> None:
    results = make_results()
    results["records"].append({**results["records"][0], "requirement": "GJS-999", "statement": "of the future"})
    column = Column("a", Standing.JUDGED, "cpu", results=results)
    rows = rows_of([column])
    future = next(row for row in rows if row.id == "GJS-999")
    assert future.statement == "of the future"
    assert rows[rows.index(future) + 1].id == "RKL-1"


def test_selection_is_by_id_or_family_in_any_case() -> None:
    assert selects([], "IS-2")
    assert selects(["is"], "IS-2")
    assert selects([" IS-2 "], "IS-2")
    assert not selects(["IS-2"], "IS-20")
    assert not selects(["KL"], "RKL-1")


def test_tally_counts_what_was_judged(make_column: Make) -> None:
    column = make_column(statuses={"IS-2": "failed", "IS-3": "not judged", "IS-4": "unexpected pass"})
    rows = [row for row in rows_of([column]) if row.family == "IS"]
    met, judged = tally(column, rows)
    assert judged == len(rows) - 1
    assert met == judged - 1
