"""The command, from outside, on implementations that are right, wrong, missing and broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .schemas import MATRIX, RESULTS, validator

WRONG = """
from sdpo_implementations.reference.loss import compute_sdpo_loss as right
from dataclasses import replace

def compute_sdpo_loss(x):
    logprobs = x.student_logits.detach().log_softmax(-1)
    old = logprobs.gather(-1, x.response_ids.long().unsqueeze(-1)).squeeze(-1)
    return right(replace(x, old_student_logprobs=old))
"""


def matrix(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sdpo_conformance", "matrix", *arguments],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_right_wrong_missing_and_broken_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WRONG)
    (tmp_path / "broken.py").write_text("import no_such_package_anywhere\n")
    (tmp_path / "unavailable.py").write_text(
        "class NotInstalled(ImportError): pass\nraise NotInstalled('not installed: fastjsd: pip install fastjsd')\n"
    )
    names = ["reference", "./mine.py", "./unavailable.py", "./broken.py"]
    options = ["--profile=quick", "--only=IS-2", "--jobs=1", "--out=public", "--package=./mine.py=mine 0.1"]
    done = matrix(tmp_path, *names, *options)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    content = json.loads((tmp_path / "public" / "matrix.json").read_text())
    standings = {one["implementation"]: one["standing"] for one in content["implementations"]}
    assert list(standings.values()) == ["judged", "judged", "not installed", "could not run"]
    validator(MATRIX, strict=True).validate(content)
    mine = content["implementations"][1]
    assert mine["version"] == "mine 0.1"
    assert "IS-2.py" in mine["reproductions"]
    assert "fastjsd: pip install fastjsd" in done.stdout
    assert "no_such_package_anywhere" in done.stdout
    page = (tmp_path / "public" / "matrix.html").read_text()
    assert "reproduction" in page
    assert json.loads((tmp_path / "public" / "badges" / "mine.json").read_text())["message"] == "0/1 MUST"

    again = matrix(tmp_path, "public/matrix.json", "--out=again")
    assert again.returncode == 1
    repeated = json.loads((tmp_path / "again" / "matrix.json").read_text())
    assert repeated["implementations"] == content["implementations"]


def test_results_of_a_real_run_name_no_field_that_the_schema_does_not(tmp_path: Path) -> None:
    """Failures, errors, claims, a diagnosis and a SHOULD, each in one document."""
    (tmp_path / "mine.py").write_text(
        WRONG + "SDPO_CLAIMS = {'dtypes': ['float32'], 'expected_failures': {'IS-3': 'no ratio'}}\n"
        "def compute_response_logprobs(hidden, head, ids):\n    raise OSError('no')\n"
    )
    only = [f"--only={id}" for id in ("IS-2", "IS-3", "IS-1", "LP-1", "NUM-8")]
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_conformance", "run", "./mine.py", "--profile=quick", "--jobs=1", *only],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    content = json.loads((tmp_path / ".sdpo-conformance" / "mine" / "results.json").read_text())
    assert {one["status"] for one in content["records"]} >= {"passed", "failed", "expected failure"}
    assert {one["failure"]["kind"] for one in content["records"] if one["failure"]} == {"disagreement", "error"}
    assert content["diagnosis"]
    validator(RESULTS, strict=True).validate(content)
    for name in ("status", "level"):
        content["records"][0][name] = "perhaps"
    assert not validator(RESULTS).is_valid(content)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reference", "--profile=slow"], "no profile 'slow'"),
        (["reference", "--only=XY"], "no requirement or family 'XY'"),
        (["reference", "--dtype=float8"], "no dtype 'float8'"),
        (["reference", "--package=reference"], "expected IMPL=TEXT"),
        (["gone.json"], "cannot read gone.json"),
    ],
)
def test_a_mistaken_request_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = matrix(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / ".sdpo-conformance").exists()
