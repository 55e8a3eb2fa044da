"""Commands that need no run: list, explain, expected failures, comparisons, annotations, and ending processes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdpo_conformance import RunError
from sdpo_conformance.judge_command import Outputs, ids_that_failed
from sdpo_conformance.report.base_comparison import compared
from sdpo_conformance.report.explaining import explanations
from sdpo_conformance.report.listing import listing
from sdpo_conformance.report.sarif import github_annotations, sarif
from sdpo_conformance.running.children import started
from sdpo_conformance.running.options import RunOptions, expected_failures
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.rule_index import rule_index


def record(requirement: str, status: str) -> dict[str, object]:
    return {
        "requirement": requirement, "entry": "compute_sdpo_loss", "status": status, "level": "MUST", "reason": "why",
        "statement": "a rule", "source": "a source", "failure": {"summary": "loss: expected 1, got 2\n50 %"},
    }  # fmt: skip


def test_the_index_says_what_the_import_says() -> None:
    spec = find_spec("claas")
    read = {rule.id: (rule.level, rule.statement, rule.source, rule.why) for rule in rule_index(spec)}
    known = spec.requirements()
    assert read == {id: (one.level.value, one.statement, one.source, one.why) for id, one in known.items()}


def test_commands_without_a_run_import_no_torch(tmp_path: Path) -> None:
    for arguments in (["list", "requirements"], ["list", "specs"], ["explain", "IS-6"], ["--version"]):
        probe = (
            f"import sys; sys.argv[1:] = {arguments!r}\nfrom sdpo_conformance.cli import app\n"
            "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_every_catalogued_name_is_explained() -> None:
    spec = find_spec("claas")
    catalogued = set(importlib.import_module(f"{spec.package}.defects").catalogue())
    assert catalogued <= {name.removeprefix("defect:") for name, _ in listing("defects", spec)}
    for name in catalogued:
        assert explanations(name, spec)
    with pytest.raises(ValueError, match="did you mean dropped-importance-sampling"):
        explanations("dropped-importance-samplin", spec)


@pytest.mark.parametrize("name", ["MUST", "should", "trl", "CLaaS", "not judged", "importance sampling", "trainer"])
def test_what_else_a_report_prints_is_explained(name: str) -> None:
    assert explanations(name, find_spec("claas"))


def test_a_name_of_another_spec_is_found_there() -> None:
    assert explanations("dropped-importance-sampling", find_spec("trl"))


def test_expected_failures_are_read_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "xfails.txt"
    path.write_text("# ours\nNUM-5 padding is finite here\n\nis-7: detached later  # see issue 3\n")
    assert expected_failures(path, find_spec("claas")) == {
        "NUM-5": "padding is finite here",
        "IS-7": "detached later",
    }
    for text, words in (("IS-99 reason\n", "no requirement 'IS-99'"), ("IS-7\n", "no reason")):
        path.write_text(text)
        with pytest.raises(RunError, match=words):
            RunOptions(xfails=path)
    with pytest.raises(RunError, match="cannot read"):
        RunOptions(xfails=tmp_path / "missing.txt")


def test_a_typo_in_only_is_noticed_at_once() -> None:
    with pytest.raises(RunError, match="no requirement or family 'IS-20'"):
        RunOptions(only=("IS-20",))


def test_a_family_may_be_asked_for_by_its_words_and_is_told_its_id() -> None:
    with pytest.raises(RunError, match=r"did you mean IS \(importance sampling\)\?"):
        RunOptions(only=("importance-sampling",))


def test_a_mesh_that_is_none_is_noticed_at_once() -> None:
    with pytest.raises(RunError, match="tp needs a number of ranks"):
        RunOptions(mesh="tp=x")


def test_a_file_that_cannot_be_written_is_noticed_before_judging(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Outputs(json=tmp_path / "new" / "folder" / "r.json", html=tmp_path / "file").check_writable()
    for path in (tmp_path, tmp_path / "file" / "r.xml"):
        with pytest.raises(RunError, match="--junit "):
            Outputs(junit=path).check_writable()


def test_what_failed_last_is_that_of_this_implementation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loss.py").touch()
    results = {
        "format": 1,
        "implementation": "a/loss.py",
        "verdict": {},
        "run": {},
        "records": [record("IS-5", "failed")],
    }
    folder = tmp_path / ".sdpo-conformance" / "loss"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    assert ids_that_failed("./a/loss.py", RunOptions()) == ("IS-5",)
    for other in ("b/loss.py", "a/loss.py:mine", "loss"):
        with pytest.raises(RunError, match="no earlier run of"):
            ids_that_failed(other, RunOptions())


def test_what_changed_since_a_base() -> None:
    base = {"records": [record("IS-5", "passed"), record("IS-6", "failed")]}
    now = {"records": [record("IS-5", "failed"), record("IS-6", "passed")]}
    assert compared(base, now) == ["IS-5 newly failing", "IS-6 repaired"]
    assert compared(now, now) == []


def test_failures_stand_at_the_users_line() -> None:
    results = {"records": [record("IS-5", "failed")], "places": {"compute_sdpo_loss": "my/loss.py:12"}}
    (line,) = github_annotations(results)
    assert line.startswith(
        "::error file=my/loss.py,line=12,title=SDPO IS-5::IS-5: a rule. loss: expected 1, got 2%0A50 %25"
    )
    place = json.loads(sarif(results, "0"))["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "my/loss.py"}, "region": {"startLine": 12}}


def test_a_process_ends_with_its_children(tmp_path: Path) -> None:
    family = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    with (tmp_path / "log").open("w") as log:
        with started([sys.executable, "-c", family + stubborn], log, {}) as process:
            time.sleep(1)
            begun = time.monotonic()
        assert time.monotonic() - begun < 2
    assert process.returncode is not None
