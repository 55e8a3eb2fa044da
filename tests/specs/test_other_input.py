"""A loss that reads another spec's input raises everywhere: the report says which spec has the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpo_conformance.judging.implementation import Implementation
from sdpo_conformance.judging.records import Record, Status
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.report.results import results_of
from sdpo_conformance.specs import find_spec


def lines(spec: str, summary: str, folder: Path) -> list[str]:
    """The diagnosis of a run in which every requirement failed with this error."""
    found = find_spec(spec)
    entry = Capability.LOSS
    records = [
        Record(id, entry.value, one.level, Status.FAILED, failure={"kind": "error", "summary": summary})
        for id, one in list(found.requirements().items())[:3]
    ]
    implementation = Implementation("mine", None, (entry,), Claims())
    diagnosis = results_of(implementation, found, records, {}, folder)["diagnosis"]
    return list(diagnosis["lines"]) if diagnosis else []


@pytest.mark.parametrize(
    ("spec", "field", "names"),
    [
        ("claas", "teacher_logits", "lasgroup or trl or ms-swift"),
        ("claas", "completion_ids", "trl"),
        ("lasgroup", "teacher_indices", "claas"),
    ],
)
def test_the_spec_of_a_missing_field_is_named(spec: str, field: str, names: str, tmp_path: Path) -> None:
    summary = f"compute_sdpo_loss raised AttributeError: 'LossInput' object has no attribute '{field}'"
    (line,) = lines(spec, summary, tmp_path)
    assert f"loss_input.{field}" in line
    assert line.endswith(f"judge it with --spec {names}")


@pytest.mark.parametrize("spec", ["claas", "lasgroup"])
def test_errors_of_other_kinds_are_not_diagnosed(spec: str, tmp_path: Path) -> None:
    assert lines(spec, "compute_sdpo_loss raised RuntimeError: no", tmp_path) == []
