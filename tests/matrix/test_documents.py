"""matrix.json, badges, exit status, and reading earlier runs back."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpo_conformance.matrix.badge import badge
from sdpo_conformance.matrix.cells import rows_of
from sdpo_conformance.matrix.columns import LARGEST_INPUT, Column, Standing
from sdpo_conformance.matrix.document import document, exit_status
from sdpo_conformance.matrix.gather import gather, read_columns
from sdpo_conformance.matrix.matrix_files import badge_names, write_matrix
from sdpo_conformance.matrix.page import head
from sdpo_conformance.matrix.provenance import version_of
from sdpo_conformance.running.options import RunError

from .schemas import MATRIX, validator

Make = Callable[..., Column]
OPTIONS: dict[str, Any] = {"profile": "quick"}


def test_document_follows_its_schema_and_reads_back(make_column: Make, make_absent: Make, tmp_path: Path) -> None:
    columns = [make_column("a", {"IS-2": "failed"}, version="a 1.0"), make_absent()]
    content = document(columns)
    validator(MATRIX, strict=True).validate(content)
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(content))
    assert read_columns(path) == columns


def test_schema_tells_a_judged_column_from_one_that_is_not(make_column: Make, make_absent: Make) -> None:
    for change in ({"results": None}, {"message": "why?"}):
        content = document([make_column()])
        content["implementations"][0].update(change)
        assert not validator(MATRIX).is_valid(content)
    content = document([make_absent()])
    content["implementations"][0]["message"] = ""
    assert not validator(MATRIX).is_valid(content)


def test_exit_status(make_column: Make, make_absent: Make) -> None:
    right, wrong, gone = make_column(), make_column("b", {"IS-2": "failed"}), make_absent()
    broken = make_absent("c", Standing.COULD_NOT_RUN)
    assert exit_status([right]) == 0
    assert exit_status([right, gone]) == 0
    assert exit_status([right, make_column("c", {"IS-2": "expected failure"})]) == 0
    assert exit_status([right, wrong]) == 1
    assert exit_status([right, make_column("d", {"IS-2": "internal error"})]) == 1
    assert exit_status([right, broken]) == 1
    assert exit_status([gone]) == 2
    assert exit_status([gone, broken]) == 2


@pytest.mark.parametrize(
    ("statuses", "color", "words"),
    [
        ({}, "brightgreen", "conforming, "),
        ({"IS-2": "failed"}, "red", "/"),
        ({"IS-2": "expected failure"}, "yellow", "rest claimed"),
        ({"IS-2": "unexpected pass"}, "red", "/"),
        ({"IS-2": "internal error"}, "lightgrey", "suite error"),
    ],
)
def test_badge(make_column: Make, statuses: dict[str, str], color: str, words: str) -> None:
    found = badge(make_column(statuses=statuses))
    assert (found["schemaVersion"], found["label"], found["color"]) == (1, "CLaaS 1.0 SDPO", color)
    assert words in found["message"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"entries": ("compute_response_logprobs",)}, "response log-probs alone"),
        ({"only": ["IS"]}, "only IS"),
    ],
)
def test_a_part_wears_no_green(make_column: Make, more: dict[str, Any], words: str) -> None:
    part = make_column(**more)
    assert part.scope == words
    assert badge(part)["color"] == "yellowgreen"
    found = head(part, rows_of([part]))
    assert found["tone"] == "claimed"
    assert words in found["verdict"]
    assert "conforming" not in found["verdict"]


def test_badge_of_what_was_not_judged(make_absent: Make) -> None:
    assert badge(make_absent())["message"] == "not installed"
    assert badge(make_absent(standing=Standing.COULD_NOT_RUN))["color"] == "lightgrey"


def test_badge_files_never_share_a_name(make_column: Make) -> None:
    names = badge_names(
        [
            make_column("reference"),
            make_column("reference", device="cuda:0"),
            make_column("x/loss.py"),
            make_column("y/loss.py"),
            make_column("pkg.loss"),
        ]
    )
    assert names == ["reference-cpu", "reference-cuda", "loss-cpu", "loss-cpu-2", "pkg.loss"]


def test_files(make_column: Make, tmp_path: Path) -> None:
    columns = [make_column("reference")]
    written = write_matrix(tmp_path / "out", document(columns), columns, rows_of(columns))
    assert [path.name for path in written] == ["matrix.json", "matrix.html", "badges"]
    assert json.loads((tmp_path / "out" / "badges" / "reference.json").read_text())["color"] == "brightgreen"
    assert not list(tmp_path.rglob("*.partial"))


def test_results_and_reproductions_are_read_from_a_run_folder(
    make_results: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    results = make_results("mypkg.loss", {"IS-2": "failed", "IS-6": "failed", "KL-1": "failed"})
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "IS-2.py").write_text("print(1)\n")
    (tmp_path / "IS-2.safetensors").write_bytes(b"small")
    (tmp_path / "IS-6.py").write_text("print(2)\n")
    (tmp_path / "IS-6.safetensors").write_bytes(bytes(LARGEST_INPUT + 1))
    (column,) = gather([str(tmp_path / "results.json")], OPTIONS, {"mypkg.loss": "mypkg 9"})
    assert column.version == "mypkg 9"
    assert base64.b64decode(column.reproductions["IS-2.py"].input) == b"small"
    assert column.reproductions["IS-6.py"].input == ""
    assert "KL-1.py" not in column.reproductions


def test_tracebacks_do_not_tell_where_the_packages_lie(
    make_results: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    results = make_results("mypkg.loss", {"IS-2": "failed", "IS-6": "failed"})
    first, second = (one["failure"] for one in results["records"] if one["failure"])
    first["detail"] = f'File "{pytest.__file__}", line 3, in f\nFile "/elsewhere/loss.py", line 1'
    (tmp_path / "results.json").write_text(json.dumps(results))
    (column,) = read_columns(tmp_path / "results.json")
    assert column.results is not None
    shown = [one["failure"]["detail"] for one in column.results["records"] if one["failure"]]
    assert shown == ['File "pytest/__init__.py", line 3, in f\nFile "/elsewhere/loss.py", line 1', second["detail"]]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "implementations": [{}]}', "\x00"])
def test_a_json_that_is_no_result(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"odd\.json"):
        read_columns(path)


def test_requests_that_make_no_sense(make_results: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(make_results()))
    with pytest.raises(RunError, match="named twice"):
        gather([str(path), str(path)], OPTIONS)
    with pytest.raises(RunError, match=r"cannot read .*nothing\.json: No such file"):
        gather([str(path), str(tmp_path / "nothing.json")], OPTIONS)
    with pytest.raises(RunError, match="'other', which is not in the matrix"):
        gather([str(path)], OPTIONS, {"other": "1"})
    path.write_text(json.dumps({**make_results(), "format": 2}))
    with pytest.raises(RunError, match="format 2, expected 1"):
        gather([str(path)], OPTIONS)


def test_versions_come_from_the_installed_package() -> None:
    assert version_of("pytest") == version_of("_pytest.python:Module") == f"pytest {pytest.__version__}"
    assert version_of("some/loss.py") == version_of("nobody.has_this") == version_of("adapters.nothing") == ""
    assert version_of("reference") == version_of("defect:k3-weight-ignored")
    assert version_of("reference").startswith("sdpo-conformance ")
