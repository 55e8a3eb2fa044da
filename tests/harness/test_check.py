"""``check``: the first failure asks the diagnosis which rules may name its cause, and judges those alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def checked(tmp_path: Path, target: str, *more: str) -> tuple[dict[str, Any], str]:
    """What a check of two families writes, and what it prints."""
    arguments = ["check", target, "--only", "GJS", "--only", "RED", "--out", str(tmp_path / "out"), *more]
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_conformance", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    results: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    return results, done.stdout


def test_the_rule_that_names_the_cause_is_asked_next_and_leads(tmp_path: Path) -> None:
    """A count that is a constant fails the first rule there is; the rule about the count is asked, and leads although
    its control, a full mask, is wrong as well."""
    results, printed = checked(tmp_path, "defect:divided-by-constant")
    failed = [(one["requirement"], one["failure"]["secondary"]) for one in results["records"]]
    assert failed == [("GJS-1", False), ("RED-4", True)]
    assert (results["diagnosis"]["first"], results["diagnosis"]["because"]) == (["RED-4"], ["GJS-1"])
    assert "because of RED-4: GJS-1" in printed


def test_a_failure_that_names_its_own_cause_asks_nothing(tmp_path: Path) -> None:
    results, _ = checked(tmp_path, "defect:alpha-ignored")
    failed = [one["requirement"] for one in results["records"] if one["status"] == "failed"]
    assert failed[-1] == "GJS-3"
    assert results["diagnosis"]["first"][0] == "GJS-3"


def test_a_fault_of_the_diagnosis_costs_no_verdict(tmp_path: Path) -> None:
    """What no catalogued cause fits ends the check at the first failure."""
    (tmp_path / "loss.py").write_text(
        "from sdpo_implementations.reference.loss import compute_sdpo_loss as right\n"
        "def compute_sdpo_loss(i):\n"
        "    found = right(i)\n"
        "    return {**found, 'loss': found['loss'] + 0.1 * i.response_ids.double().mean().sin()}\n"
    )
    results, _ = checked(tmp_path, "loss.py")
    assert [one["requirement"] for one in results["records"] if one["status"] == "failed"] == ["GJS-1"]
    assert not results["verdict"]["passed"]


def test_several_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    """A module that starts a thread may not be forked: its check runs in one process, in order."""
    loss = (
        "import threading\n"
        "from sdpo_implementations.reference.loss import compute_sdpo_loss as right\n"
        "def compute_sdpo_loss(i):\n"
        "    found = right(i)\n"
        "    n = max(float(i.response_mask.double().sum()), 1.0)\n"
        "    return {**found, **{key: found[key] * n for key in ('loss', 'distill_loss', 'kl_reg')}}\n"
    )
    thread = "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    found = []
    for text in (loss, loss + thread):
        (tmp_path / "loss.py").write_text(text)
        results, _ = checked(tmp_path, "loss.py")
        judged = [(one["requirement"], one["status"], one["examples"]) for one in results["records"]]
        found.append((judged, results["diagnosis"]))
    assert found[0] == found[1]
    assert any(status == "failed" for _, status, _ in found[0][0])


def test_a_crash_ends_the_check_with_its_input(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(
        "import os\n"
        "from sdpo_implementations.reference.loss import compute_sdpo_loss as right\n"
        "def compute_sdpo_loss(i):\n"
        "    return right(i) if i.training.alpha != 0 else os.abort()\n"
    )
    results, printed = checked(tmp_path, "loss.py")
    (failed,) = [one for one in results["records"] if one["status"] == "failed"]
    assert "crashed the process" in failed["failure"]["summary"]
    assert (tmp_path / "out" / failed["failure"]["reproduction"]).exists()
    assert "alpha=0 " in printed
