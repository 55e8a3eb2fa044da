"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

DIVERGENCE_ONLY = """
from sdpo_implementations.reference import compute_divergence
"""


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sdpo_conformance", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_run_prints_a_verdict_and_writes_what_was_asked_for(tmp_path: Path) -> None:
    done = command(
        "run", "reference", "--profile=quick", "--only=RKL", "--json=out/r.json", "--junit=out/r.xml", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Only RKL of CLaaS 1.0 holds: loss 3/3 MUST, fused loss 3/3 MUST" in " ".join(done.stdout.split())
    results = json.loads((tmp_path / "out" / "r.json").read_text())
    assert results["verdict"]["conforming"]
    suite = ElementTree.fromstring((tmp_path / "out" / "r.xml").read_text())
    assert suite.get("tests") == "6"
    assert suite.get("failures") == "0"


def test_a_divergence_alone_is_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(DIVERGENCE_ONLY)
    done = command("run", "kernel.py", "--profile=quick", "--only=GJS-1", cwd=tmp_path)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "A divergence alone is not SDPO" in text
    assert "the importance ratio per token" in text
    assert "refresh of the behaviour log-probs" in text


def test_failures_end_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(
        "from sdpo_implementations.reference.loss import compute_sdpo_loss as right\n"
        "def compute_sdpo_loss(i):\n    return {**right(i), 'mean_is_ratio': 1.0}\n"
    )
    done = command("run", "loss.py", "--profile=quick", "--only=IS-10", cwd=tmp_path)
    assert done.returncode == 1
    assert "IS-10" in done.stdout
    assert "mean_is_ratio: expected" in done.stdout
    assert "reproduce  python .sdpo-conformance/loss/IS-10.py" in done.stdout


def test_the_same_seed_finds_the_same_example(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(
        "from sdpo_implementations.reference.loss import compute_sdpo_loss as right\n"
        "def compute_sdpo_loss(i):\n    r = right(i)\n    return {**r, 'loss': r['loss'] * 1.01}\n"
    )
    found = []
    for _ in range(2):
        command("run", "loss.py", "--profile=quick", "--only=GJS-1", "--seed=5", cwd=tmp_path)
        results = json.loads((tmp_path / ".sdpo-conformance" / "loss" / "results.json").read_text())
        found.append(results["records"][0]["failure"]["expected"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "arguments", [("run", "no_such_module"), ("explain", "IS-99"), ("run",), ("run", "reference", "--profile=x")]
)
def test_usage_errors_end_with_status_2_and_say_why(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr


def test_explain(tmp_path: Path) -> None:
    done = command("explain", "is-6", cwd=tmp_path)
    assert done.returncode == 0
    assert "before the mean" in " ".join(done.stdout.split())


def test_init_writes_an_adapter_once(tmp_path: Path) -> None:
    assert command("init", "mine.py", cwd=tmp_path).returncode == 0
    compile((tmp_path / "mine.py").read_text(), "mine.py", "exec")
    again = command("init", "mine.py", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_help_imports_no_torch(tmp_path: Path) -> None:
    probe = "import sys; from sdpo_conformance.cli import app; assert 'torch' not in sys.modules, 'torch imported'"
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_of_the_users_folder_hide_no_standard_ones(tmp_path: Path) -> None:
    for name in ("types", "random", "json", "copy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong one')\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("from sdpo_implementations.reference import compute_sdpo_loss\n")
    for target in ("mine", "mine/__init__.py"):
        arguments = ["check", target, "--only=IS-1"]
        probe = f"import sys; sys.argv[1:] = {arguments!r}; from sdpo_conformance.cli import main; main()"
        done = subprocess.run([sys.executable, "-P", "-c", probe], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "loss 1/1 MUST" in done.stdout


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}])
def test_a_terminal_without_unicode_gets_the_report(tmp_path: Path, environment: dict[str, str]) -> None:
    arguments = ["-m", "sdpo_conformance", "check", "reference", "--only=IS-1"]
    plain = {**os.environ, "PYTHONCOERCECLOCALE": "0", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=plain, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"SDPO conformance ? CLaaS 1.0 spec" in done.stdout


def test_a_closed_stream_is_no_failure(tmp_path: Path) -> None:
    line = f"{sys.executable} -m sdpo_conformance list specs >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, check=False).returncode == 0


def test_what_cannot_be_written_is_named_as_the_user_named_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("init", "file/mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("sdpo-conformance: file/mine.py: cannot write: ")
    done = command("check", "reference", "--out=file/results", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot make file/results for the results: " in done.stderr
