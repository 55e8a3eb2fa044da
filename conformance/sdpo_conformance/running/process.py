"""Running the suite in a process of its own and reading back what it found.

Every front door comes through here: the command line, nox, and ``sdpo_conformance.run``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_conformance.running.folder import ERROR, MARKER, RESULTS
from sdpo_conformance.running.options import RunError, RunOptions
from sdpo_conformance.specs import DEFAULT

LOADING_SECONDS = 300.0
"""How long importing an implementation may take before the run gives up."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, repr=False)
class Report:
    """What a run found. ``results`` is the document of results.schema.json; ``folder`` holds the reproductions."""

    results: Mapping[str, Any]
    folder: Path

    @property
    def conforming(self) -> bool:
        """No MUST that was judged fails, expected or not."""
        return bool(self.results["verdict"]["conforming"])

    @property
    def passed(self) -> bool:
        """Nothing fails but what SDPO_CLAIMS expects to fail."""
        return bool(self.results["verdict"]["passed"])

    @property
    def failures(self) -> list[Mapping[str, Any]]:
        """The records that failed, MUST and SHOULD."""
        return [record for record in self.results["records"] if record["status"] == "failed"]

    @property
    def diagnosis(self) -> Mapping[str, Any] | None:
        """What the failures point to, or None where nothing failed."""
        found: Mapping[str, Any] | None = self.results["diagnosis"]
        return found

    @property
    def exit_status(self) -> int:
        """0 conforming (or failing only as claimed), 1 not, 2 where the suite itself failed."""
        if any(record["status"] == "internal error" for record in self.results["records"]):
            return 2
        return 0 if self.passed else 1

    def __str__(self) -> str:
        return str(self.results["verdict"]["text"])

    def __repr__(self) -> str:
        failed = ", ".join(dict.fromkeys(str(record["requirement"]) for record in self.failures)) or "none"
        return f"<Report {self.results['implementation']}: {self} Failed: {failed}. See {self.folder}>"


def run(
    implementation: str,
    *,
    spec: str = DEFAULT,
    profile: str = "default",
    seed: int = 0,
    device: str = "cpu",
    dtypes: Sequence[str] = (),
    only: Sequence[str] = (),
    jobs: int = 0,
    out: str | Path | None = None,
    call_timeout: float = 120.0,
    progress: Progress | None = None,
    mesh: str = "",
) -> Report:
    """Judge ``implementation`` and return the report; the arguments are those of ``RunOptions``; with ``mesh``
    ("tp=2,dp=2"), on the ranks of such a mesh.

    Raises RunError where nothing could be judged: unknown module, no CUDA, a bad option.
    """
    options = RunOptions(
        spec=spec,
        profile=profile,
        seed=seed,
        device=device,
        dtypes=tuple(dtypes),
        only=tuple(only),
        jobs=jobs,
        call_timeout=call_timeout,
        out=Path(out) if out else None,
    )
    if mesh:
        from sdpo_conformance.running.mesh_run import run_on_mesh

        return run_on_mesh(implementation, mesh, options, progress)
    return run_with(implementation, options, progress)


def run_with(implementation: str, options: RunOptions, progress: Progress | None = None) -> Report:
    """``run`` with its options made."""
    folder = options.folder(implementation)
    status, log = run_pytest(pytest_command(implementation, options), folder, progress)
    results = folder / RESULTS
    if not results.exists():
        raise RunError(reason(folder, status, log))
    return Report(json.loads(results.read_text(encoding="utf-8")), folder)


def pytest_command(implementation: str, options: RunOptions) -> list[str]:
    """The command that every front door runs, shielded from the configuration of the user's project."""
    return [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(Path(__file__).parent / "pytest.ini"),
        "--noconftest",
        "-p",
        "xdist",
        "-p",
        "sdpo_conformance.running.plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "--pyargs",
        options.found_spec.rules,
        *options.arguments(implementation),
    ]


def run_pytest(command: Sequence[str], folder: Path, progress: Progress | None) -> tuple[int, str]:
    """Run it, calling ``progress`` with (verdicts, planned); returns the exit status and the log's text."""
    environment = {"OMP_NUM_THREADS": "1", **child_environment()}
    started = time.monotonic()
    if (folder / RESULTS).exists() and (folder / MARKER).exists():
        (folder / RESULTS).unlink()
    log_path = folder.parent / f".{folder.name}.log"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                planned = folder / "plan.json"
                if planned.exists():
                    if progress is not None:
                        progress(len(list((folder / "records").glob("*.json"))), len(read_plan(planned)))
                elif time.monotonic() - started > LOADING_SECONDS:
                    raise RunError(f"importing the implementation took more than {LOADING_SECONDS:.0f} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        log.seek(0)
        text = log.read()
    if folder.is_dir():
        os.replace(log_path, folder / "pytest.log")
    else:
        log_path.unlink()
    return process.returncode, text


def read_plan(path: Path) -> list[Any]:
    """The plan, or nothing while it is being replaced."""
    try:
        plan: list[Any] = json.loads(path.read_text(encoding="utf-8"))
        return plan
    except (OSError, ValueError):
        return []


def child_environment() -> dict[str, str]:
    """This process's environment, less what a pytest around it would pass on to a pytest of ours."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS") and not name.startswith("PYTEST_XDIST_")
    }
    return {**inherited, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": search_path()}


def search_path() -> str:
    """PYTHONPATH for the run: the current folder, as ``python -m`` would have it, then the user's own."""
    return os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def reason(folder: Path, status: int, log: str) -> str:
    """One line that says why there are no results."""
    error = folder / ERROR
    if error.exists():
        return error.read_text(encoding="utf-8").strip()
    if status < 0:
        name = signal.Signals(-status).name
        return f"importing the implementation crashed the process ({name}); see {folder}/pytest.log"
    lines = [line.removeprefix("ERROR: ").strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    if lines:
        return lines[0]
    tail = [line for line in log.splitlines() if line.strip()]
    return f"pytest ended with status {status}: {tail[-1] if tail else 'no output'}; see {folder}/pytest.log"
