"""``run`` and ``check``: judge, print the report, write what was asked for, say the exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdpo_conformance.files import write_text
from sdpo_conformance.report.base_comparison import compared, failed_last, read_results
from sdpo_conformance.running.children import Interrupted
from sdpo_conformance.running.options import RunError, RunOptions
from sdpo_conformance.running.process import Report, run_with


@dataclass(frozen=True)
class Outputs:
    """Files to write beside the run's folder; ``base``: an earlier results.json to compare with; ``annotate``: print
    GitHub annotations (its actions get them anyway)."""

    json: Path | None = None
    junit: Path | None = None
    sarif: Path | None = None
    html: Path | None = None
    base: Path | None = None
    annotate: bool = False

    def check_writable(self) -> None:
        """Raise RunError for a file that could not be written, before anything is judged for it."""
        for name in ("json", "junit", "sarif", "html"):
            path: Path | None = getattr(self, name)
            if path is None:
                continue
            existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            if path.is_dir() or not os.access(existing, os.W_OK) or (existing != path and not existing.is_dir()):
                why = "it is a folder" if path.is_dir() else f"{existing} cannot be written to"
                raise RunError(f"--{name} {path}: {why}")


def judge_and_report(
    implementation: str,
    options: RunOptions,
    outputs: Outputs,
    *,
    last_failed: bool = False,
    again: bool = False,
    mesh: str = "",
) -> int:
    """The exit status. Raises RunError or ValueError, in one line, where the run cannot happen."""
    base = read_results(outputs.base) if outputs.base is not None else None
    outputs.check_writable()
    if last_failed:
        options = replace(options, only=ids_that_failed(implementation, options))
    if mesh or under_torchrun():
        return on_mesh(implementation, options, outputs, mesh)

    def judge() -> int:
        from sdpo_conformance.report.progress import progress_on_terminal

        with progress_on_terminal() as progress:
            report = run_with(implementation, options, progress)
        return reported(report, outputs, base)

    if not again:
        return judge()
    from sdpo_conformance.running.watching import watch

    watch(implementation, lambda: judge_on(judge))
    return 0


def judge_on(judge: Callable[[], int]) -> int:
    """While watching, a file that cannot be imported just now is a line, not the end."""
    try:
        return judge()
    except RunError as error:
        print(f"sdpo-conformance: {error}", file=sys.stderr)
        return 2


def ids_that_failed(implementation: str, options: RunOptions) -> tuple[str, ...]:
    """What failed in the last run or check of this implementation, whichever is newer."""
    folder = options.folder(implementation)
    plain = folder.with_name(folder.name.removesuffix(".check"))
    candidates = {one / "results.json" for one in (folder, plain, plain.with_name(f"{plain.name}.check"))}
    stored = [path for path in candidates if path.is_file() and judged_in(path, implementation)]
    if not stored:
        raise RunError(
            f"--last-failed: no earlier run of {implementation} lies in {folder.parent}; run it once without"
        )
    found = failed_last(read_results(max(stored, key=lambda path: path.stat().st_mtime)))
    if not found:
        raise RunError(f"--last-failed: nothing failed in the last run of {implementation}; run it without")
    return found


def judged_in(results: Path, implementation: str) -> bool:
    """Whether a stored run is one of this implementation: loss.py of two folders leaves its results in one place."""
    stored = str(read_results(results)["implementation"])
    if stored == implementation:
        return True
    one, other = (name.partition(":") for name in (stored, implementation))
    return one[2] == other[2] and Path(one[0]).is_file() and Path(one[0]).resolve() == Path(other[0]).resolve()


def reported(report: Report, outputs: Outputs, base: dict[str, Any] | None) -> int:
    """Print the report, and write the files: what was judged is told even where a file cannot be written."""
    from sdpo_conformance.report.console import show
    from sdpo_conformance.report.sarif import github_annotations
    from sdpo_conformance.report.terminal import print_report

    show(lambda console: print_report(report.results, report.folder, console))
    write_outputs(report, outputs)
    if base is not None:
        changes = compared(base, report.results)
        for line in changes or ["nothing changed"]:
            print(f"since base {line}")
    if outputs.annotate or os.environ.get("GITHUB_ACTIONS") == "true":
        for line in github_annotations(report.results):
            print(line)
    return report.exit_status


def write_outputs(report: Report, outputs: Outputs) -> None:
    """The files that were asked for."""
    if outputs.json is not None:
        write_text(outputs.json, (report.folder / "results.json").read_text(encoding="utf-8"))
    if outputs.junit is not None:
        from sdpo_conformance.report.junit import junit_xml

        write_text(outputs.junit, junit_xml(report.results))
    if outputs.sarif is not None:
        from sdpo_conformance import __version__
        from sdpo_conformance.report.sarif import sarif

        write_text(outputs.sarif, sarif(report.results, __version__))
    if outputs.html is not None:
        from sdpo_conformance.matrix.single import single_page

        write_text(outputs.html, single_page(report.results, report.folder))


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def on_mesh(implementation: str, options: RunOptions, outputs: Outputs, mesh: str) -> int:
    """Judge on ranks and print the report. Under torchrun the first process does, the others wait for its end."""
    from sdpo_conformance.report.console import show
    from sdpo_conformance.report.mesh_report import print_sharded_report
    from sdpo_conformance.report.progress import progress_on_terminal
    from sdpo_conformance.running.mesh_run import run_on_mesh

    status = 2
    if under_torchrun():
        from sdpo_conformance.running.torchrun import checked_mesh, stand_by

        checked_mesh(mesh)
        if (other := stand_by()) is not None:
            return other
    try:
        with progress_on_terminal() as progress:
            report = run_on_mesh(implementation, mesh, options, progress)
        show(lambda console: print_sharded_report(report.results, report.folder, console))
        write_outputs(report, outputs)
        status = report.exit_status
    finally:
        if under_torchrun():
            from sdpo_conformance.running.torchrun import finished

            finished(status)
    return status


def print_interrupted(signalled: Interrupted) -> None:
    """What was judged before a signal ended the run; where nothing was to be judged, what else there is to tell."""
    records, planned = signalled.records, signalled.planned
    if not planned:
        print(f"interrupted by {signalled}. {signalled.rest}")
        return
    failed = [record for record in records if record["status"] == "failed"]
    passed = sum(record["status"] == "passed" for record in records)
    judged = f"{len(records)} of {planned} judged so far, {passed} passed, {len(failed)} failed"
    print(f"interrupted by {signalled}: {judged}. No verdict.")
    for record in failed:
        found = record["failure"]
        print(f"{record['requirement']:<7} {found.get('summary', '')}")
