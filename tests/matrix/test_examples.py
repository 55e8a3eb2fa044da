"""What others copy into their CI: the example package, the composite action, the pages that quote them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "own-package"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [body for found, body in BLOCK.findall(text) if found == language]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, built from a copy and installed into a folder of its own."""
    import shutil

    base = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, base / "source")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(base / "site"), str(base / "source")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return base


def environment(installed: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join([str(installed / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}


def test_the_example_package_builds_and_its_tests_pass(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(installed / "source" / "tests")],
        cwd=tmp_path,
        env=environment(installed),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    ("language", "quoted"), [("python", "# tests/"), ("python", "# src/"), ("toml", "# "), ("yaml", "# .github/")]
)
def test_the_page_quotes_the_example(language: str, quoted: str) -> None:
    (block,) = [body for body in blocks("ci.md", language) if body.startswith(quoted)]
    name, _, body = block.partition("\n")
    assert body.strip() in (EXAMPLE / name.removeprefix("# ")).read_text(encoding="utf-8")


def test_the_formats_page_runs(tmp_path: Path) -> None:
    program = "\n".join(blocks("results-format.md", "python"))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    return content


def test_the_action_and_its_example_agree(action: dict[str, Any]) -> None:
    workflow = yaml.safe_load((EXAMPLE / ".github" / "workflows" / "conformance.yml").read_text(encoding="utf-8"))
    used = next(step for step in workflow["jobs"]["sdpo"]["steps"] if "sdpo-conformance@" in step.get("uses", ""))
    assert set(used["with"]) <= set(action["inputs"])
    required = {name for name, found in action["inputs"].items() if found.get("required")}
    assert required <= set(used["with"])
    assert "_" in used["uses"].partition("/")[0], "no account may have the placeholder's name"
    for step in action["runs"]["steps"]:
        assert "${{ inputs" not in step.get("run", ""), "an input in a script could run as one; env carries it"


def judge(action: dict[str, Any], installed: Path, folder: Path, implementation: str) -> tuple[int, str, str]:
    """Run the action's Judge step as the runner would; exit status, outputs and summary."""
    step = next(step for step in action["runs"]["steps"] if step["name"] == "Judge")
    values = {
        "IMPLEMENTATION": implementation,
        "PROFILE": "quick",
        "DEVICE": "cpu",
        "SEED": "0",
        "ONLY": "KL-2 KL-3",
        "DTYPE": "",
        "SPEC": "claas",
        "BASE": "",
        "FOLDER": str(folder / "results"),
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
    }
    assert set(step["env"]) <= set(values)
    tools = folder / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    path = os.pathsep.join([str(Path(sys.executable).parent), str(tools), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=folder,
        env=environment(installed, PATH=path, **values),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    outputs = folder / "output"
    return done.returncode, outputs.read_text() if outputs.exists() else "", (folder / "summary").read_text()


def test_the_action_judges_a_right_loss(action: dict[str, Any], installed: Path, tmp_path: Path) -> None:
    status, outputs, summary = judge(action, installed, tmp_path, "swiftsdpo.conformance")
    assert status == 0
    assert "conforming=true\nverdict=Only KL-2, KL-3 of CLaaS 1.0 holds: loss 2/2 MUST." in outputs
    assert "Only KL-2, KL-3" in summary
    assert (tmp_path / "results" / "junit.xml").exists()


def test_the_action_fails_where_nothing_can_be_judged(action: dict[str, Any], installed: Path, tmp_path: Path) -> None:
    status, outputs, _ = judge(action, installed, tmp_path, "swiftsdpo.nothing")
    assert status == 2
    assert "conforming" not in outputs
