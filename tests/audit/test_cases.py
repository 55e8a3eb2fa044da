"""Every case under cases/audit says what the audit must say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer import Typer
from typer.testing import CliRunner

from sdpo_conformance.audit.audit_command import audit
from sdpo_conformance.audit.reporting.audit_document import schema

CASES = Path(__file__).parents[2] / "cases" / "audit"
NAMES = sorted(path.parent.name for path in CASES.glob("*/expected.json"))

app = Typer()
app.command()(audit)


def expected_of(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((CASES / name / "expected.json").read_text("utf-8"))
    return loaded


def test_the_cases_are_there() -> None:
    assert {"incident", "sound_four_steps_sampler_mismatch"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_expectation_follows_its_schema(name: str) -> None:
    jsonschema.validate(expected_of(name), json.loads((CASES / "expected.schema.json").read_text("utf-8")))


@pytest.mark.parametrize("name", NAMES)
def test_audit_says_what_the_case_expects(name: str, tmp_path: Path) -> None:
    expected = expected_of(name)
    options = [word for k, v in expected.get("arguments", {}).items() for word in (f"--{k}", str(v))]
    result = CliRunner().invoke(app, [str(CASES / name), *options, "--json", str(tmp_path / "report.json")])
    assert result.exit_code == expected["exit_status"], result.output
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    jsonschema.validate(report, schema())
    found = sorted((f["id"], f["severity"]) for f in report["findings"])
    assert found == sorted((f["id"], f["severity"]) for f in expected["findings"])
    assert set(expected.get("not_judged", ())) <= {n["id"] for n in report["not_judged"]}
    for key, value in expected.get("adapter", {}).items():
        assert report["adapter"][key] == pytest.approx(value, rel=1e-6), key
    words = " ".join(result.output.split())
    assert all(phrase in words for phrase in expected.get("says", ())), words


def test_the_incidents_cases_are_made_by_their_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from . import make_incident_cases

    monkeypatch.setattr(make_incident_cases, "CASES", tmp_path)
    make_incident_cases.main()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    for path in written:
        kept = CASES / path.relative_to(tmp_path)
        if path.suffix == ".safetensors":
            assert kept.stat().st_size == path.stat().st_size
        else:
            assert kept.read_text("utf-8") == path.read_text("utf-8"), path
