"""The command as a stranger runs it: in a folder of their own, with implementations that misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

MISBEHAVING = """
import os, time
from sdpo_implementations.reference import compute_fused_sdpo_loss as right

def compute_fused_sdpo_loss(loss_input):
    training = loss_input.training
    if loss_input.student_hidden.shape[-1] != 256:
        return right(loss_input)
    if training.alpha == 1 and training.kl_reg_weight:
        time.sleep(600)
    if training.alpha == 1:
        os.abort()
    if training.kl_reg_weight:
        raise RuntimeError("half-way")
    return right(loss_input)
"""

SLEEPING = """
import pathlib, time

def compute_fused_sdpo_loss(loss_input):
    pathlib.Path("begun").touch()
    time.sleep(600)
"""

SMALL = ("--quick", "--workload=laptop", "--tokens=16")


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    return subprocess.run(
        [sys.executable, "-m", "sdpo_conformance", "bench", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def read(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / ".sdpo-conformance/bench/benchmark.json").read_text())
    return found


def test_a_row_costs_itself_and_the_rest_is_measured(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MISBEHAVING)
    settings = ("--alpha=0.5", "--alpha=1", "--anchor=0", "--anchor=0.1", "--row-timeout=10", "--workload=gpt5")
    done = bench(tmp_path, "mine.py", "reference", "nowhere.loss", *SMALL, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gpt5: no such workload" in done.stderr
    document = read(tmp_path)
    reasons = {
        (record["work"]["alpha"], record["work"]["anchor"]): record["reason"]
        for record in document["sdpo_unmeasured"]
        if record["target"] == "mine.py"
    }
    assert "half-way" in reasons[0.5, 0.1]
    assert "SIGABRT" in reasons[1.0, 0.0]
    assert "more than 10 s" in reasons[1.0, 0.1]
    targets = [one["extra_info"]["sdpo"]["target"] for one in document["benchmarks"]]
    assert sorted(targets) == ["mine.py", *["reference"] * 4]
    assert "no module 'nowhere'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_wrong_answers_end_with_1_and_the_document_is_pytest_benchmarks(tmp_path: Path) -> None:
    done = bench(tmp_path, "reference", "defect:dropped-importance-sampling", *SMALL)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG ANSWER" in done.stdout
    assert "NOT CONFORMING" in done.stdout
    path = tmp_path / ".sdpo-conformance/bench/benchmark.json"
    earlier = tmp_path / "earlier.json"
    earlier.write_text(path.read_text())
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(earlier), str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert compared.returncode == 0, compared.stderr
    assert "reference" in compared.stdout
    baseline = read(tmp_path)
    for one in baseline["benchmarks"]:
        record = one["extra_info"]["sdpo"]
        for key in ("limit_ratio", "limit_ratio_q1", "limit_ratio_q3"):
            record[key] /= 10
    (tmp_path / "baseline.json").write_text(json.dumps(baseline))
    again = bench(tmp_path, "reference", *SMALL, "--compare=baseline.json")
    assert again.returncode == 1
    assert "REGRESSION" in again.stdout
    assert "REGRESSION" in (tmp_path / ".sdpo-conformance/bench/results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device=tpu",), "--device must be cpu, cuda or cuda:N"),
        (("--dtype=int8",), "no dtype 'int8'"),
        (("--compare=none.json",), "cannot read the baseline none.json"),
        (("--workload=gpt5",), "nothing left to measure"),
        (("--out=taken",), "name another folder with --out"),
    ],
)
def test_what_cannot_run_says_so_in_a_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    done = bench(tmp_path, "reference", "--quick", *arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench(tmp_path, "reference", "--device=cuda")
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr


@pytest.mark.parametrize(("targets", "rows"), [(("reference", "sleeping.py"), 1), (("sleeping.py", "reference"), 0)])
def test_a_signal_leaves_the_rows_that_are_done_on_the_terminal(
    tmp_path: Path, targets: tuple[str, ...], rows: int
) -> None:
    (tmp_path / "sleeping.py").write_text(SLEEPING)
    settings = (*SMALL, "--direction=forward", "--alpha=0.5", "--anchor=0")
    process = subprocess.Popen(
        [sys.executable, "-m", "sdpo_conformance", "bench", *targets, *settings],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (tmp_path / "begun").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, out + errors
    assert out.splitlines()[-1].startswith(f"interrupted by SIGINT. {rows} of 2 rows were done.")
    assert ("reference" in out) == bool(rows)
    assert "Traceback" not in out + errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "sleeping.py"]


def test_nothing_measured_is_2(tmp_path: Path) -> None:
    done = bench(tmp_path, "nowhere.loss", *SMALL)
    assert done.returncode == 2
    assert "no module 'nowhere'" in done.stdout
