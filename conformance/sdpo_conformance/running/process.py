"""Running the suite in a process of its own and reading back what it found.

Every front door comes through here: the command line, nox, and ``sdpo_conformance.run``.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdpo_conformance.files import write_json
from sdpo_conformance.judging.records import names_a_rule, read_record, record_in, record_key
from sdpo_conformance.report.watcher import Watcher
from sdpo_conformance.running.children import Interrupted, ending_on_signals, started
from sdpo_conformance.running.folder import DIAGNOSING, ERROR, RESULTS, staged
from sdpo_conformance.running.options import RunError, RunOptions
from sdpo_conformance.specs import DEFAULT

LOADING_SECONDS = 300.0
"""How long importing an implementation may take before the run gives up."""

ENDING_SECONDS = 2.0
"""How long the process may go on once its results are there: a thread that the implementation started never ends."""

KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""For glibc: a fifth of a run's CPU time went to the kernel, which had to hand out and zero the pages of every larger
tensor anew."""

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
        """0 conforming (or failing only as claimed), 1 not (an unexpected pass included), 2 where the suite itself
        failed or nothing could be judged."""
        if any(record["status"] == "internal error" for record in self.results["records"]):
            return 2
        if not any(record["status"] != "not judged" for record in self.results["records"]):
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
    xfails: str | Path | None = None,
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
        xfails=Path(xfails) if xfails else None,
        mesh=mesh,
    )
    if mesh:
        from sdpo_conformance.running.mesh_run import run_on_mesh

        return run_on_mesh(implementation, mesh, options, progress)
    return run_with(implementation, options, progress)


def run_with(implementation: str, options: RunOptions, progress: Progress | None = None) -> Report:
    """``run`` with its options made. Earlier results stay until there are new ones."""
    folder, since = options.folder(implementation), time.monotonic()
    try:
        with staged(folder) as stage:
            command = pytest_command(implementation, replace(options, out=stage))
            sweeps = options.found_spec.sweeps if options.first_cause else None
            status, log = run_pytest(command, stage, progress, sweeps)
            if options.first_cause and not (stage / RESULTS).exists() and not (stage / ERROR).exists():
                apart = replace(options, out=stage, first_cause=False, jobs=1)
                status, log = run_pytest(pytest_command(implementation, apart), stage, progress)
            if not (stage / RESULTS).exists():
                raise RunError(reason(stage, status, log))
            results = json.loads((stage / RESULTS).read_text(encoding="utf-8"))
            results["run"]["seconds"] = round(time.monotonic() - since, 2)
            write_json(stage / RESULTS, results)
    except ValueError as error:
        raise RunError(str(error)) from None
    return Report(results, folder)


def pytest_command(implementation: str, options: RunOptions) -> list[str]:
    """The command that every front door runs, shielded from the configuration of the user's project."""
    return [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(Path(__file__).parent / "pytest.ini"),
        "--noconftest",
        "--assert=plain",
        "--capture=sys",  # in memory: forked workers would share a file
        "-p",
        "xdist",
        "-p",
        "sdpo_conformance.running.plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "-p",
        "no:unraisableexception",  # it collects garbage, which torch has much of, four times at the end
        "--pyargs",
        options.found_spec.rules,
        *options.arguments(implementation),
    ]


def run_pytest(
    command: Sequence[str], folder: Path, progress: Progress | None, sweeps: Collection[str] | None = None
) -> tuple[int, str]:
    """Run it, telling ``progress`` how far it is; returns the exit status and the log's text. On a signal raises
    ``Interrupted`` with what was judged so far as its ``records``. ``sweeps``: of a check, see ``Seen``."""
    environment = {"OMP_NUM_THREADS": "1", **KEEP_FREED_MEMORY, **child_environment()}
    since = time.monotonic()
    seen = Seen(folder, progress, sweeps)
    log_path = folder.parent / f"{folder.name}.log"
    try:
        with (
            log_path.open("w+", encoding="utf-8") as log,
            ending_on_signals(),
            started(command, log, environment) as process,
        ):
            ended = math.inf
            while process.poll() is None and time.monotonic() < ended:
                time.sleep(0.05)
                if (folder / RESULTS).exists():
                    ended = min(ended, time.monotonic() + ENDING_SECONDS)
                elif not seen.look() and time.monotonic() - since > LOADING_SECONDS:
                    raise RunError(f"importing the implementation took more than {LOADING_SECONDS:.0f} s")
            seen.look()
        text = log_path.read_text(encoding="utf-8", errors="replace")
        (folder / "pytest.log").write_text(text, encoding="utf-8")
    except Interrupted as signalled:
        seen.look()
        signalled.judged_so_far(list(seen.records.values()), len(seen.plan))
        raise
    finally:
        log_path.unlink(missing_ok=True)
    return process.returncode, text


class Seen:
    """What a run has left in its folder so far, told to a progress as it appears.

    ``sweeps``: of a check, the rules that name no cause. Its workers may judge what is forgotten once a failure before
    it ends the check: until it is over, records are told in the plan's order, up to such a failure.
    """

    def __init__(self, folder: Path, progress: Progress | None, sweeps: Collection[str] | None = None) -> None:
        self.folder, self.progress, self.sweeps = folder, progress, sweeps
        self.records: dict[str, dict[str, Any]] = {}
        self.failed = False
        self.plan: list[str] = []
        self.told = ""

    def look(self) -> bool:
        """Read what is new; whether the run has a plan yet."""
        plan = self.folder / "plan.json"
        if not plan.exists():
            return False
        self.plan = self.plan or [record_key(**one) for one in read_plan(plan)]
        over = (self.folder / DIAGNOSING).exists() or (self.folder / RESULTS).exists()
        for key in self.written() if self.sweeps is None or over else self.settled():
            if key not in self.records:
                self.records[key] = asdict(record_in(self.folder / "records" / f"{key}.json"))
                if isinstance(self.progress, Watcher):
                    self.progress.verdict(self.records[key])
        if self.progress is not None:
            self.progress(len(self.records), len(self.plan))
        diagnosing = (self.folder / DIAGNOSING).exists() and not (self.folder / RESULTS).exists()
        phase = "diagnosing" if diagnosing or self.told == "diagnosing" else "judging"
        if isinstance(self.progress, Watcher) and phase != self.told:
            self.told = phase
            self.progress.phase(phase)
        return True

    def written(self) -> list[str]:
        """The keys of all records."""
        return [path.stem for path in sorted((self.folder / "records").glob("[!.]*.json"))]

    def settled(self) -> Iterator[str]:
        """The keys of those that no failure of an earlier rule can make forgotten."""
        for key in self.plan[len(self.records) :]:  # those told are its beginning
            record = None if self.failed else read_record(self.folder, key)
            if record is None or self.sweeps is None:
                return
            yield key
            self.failed = names_a_rule(record, self.sweeps)


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
    # the current folder is searched once the standard modules are imported: see judging.implementation
    return {**inherited, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONSAFEPATH": "1"}


def reason(folder: Path, status: int, log: str) -> str:
    """One line that says why there are no results."""
    error = folder / ERROR
    if error.exists():
        return error.read_text(encoding="utf-8").strip()
    if status < 0:
        name = signal.Signals(-status).name
        return f"importing the implementation crashed the process ({name}){last_words(log)}"
    lines = [line.removeprefix("ERROR: ").strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    if lines:
        return lines[0]
    return f"pytest ended with status {status}{last_words(log) or ': no output'}"


def last_words(log: str) -> str:
    """The last line of a log that says something, or nothing."""
    tail = [line.strip() for line in log.splitlines() if line.strip()]
    return f": {tail[-1][:300]}" if tail else ""
