"""The command line: one small function per command, each a call into the module that does the work."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sdpo_conformance.audit.command import audit
from sdpo_conformance.bench.command import bench
from sdpo_conformance.files import write_text
from sdpo_conformance.matrix.command import matrix
from sdpo_conformance.running.options import RunError

app = typer.Typer(
    help="Judge implementations of the CLaaS SDPO loss and training step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Implementation = Annotated[
    str,
    typer.Argument(metavar="IMPL", help="module, module:object, path/to/file.py, reference, triton_fused, defect:NAME"),
]
SpecName = Annotated[str, typer.Option("--spec", help="the spec to judge by")]
Profile = Annotated[str, typer.Option(help="quick, default, thorough or fuzz")]
Seed = Annotated[int, typer.Option(help="reproduces a run")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]


def fail(error: Exception | str) -> typer.Exit:
    """One line on stderr and exit status 2."""
    print(f"sdpo-conformance: {error}", file=sys.stderr)
    return typer.Exit(2)


@app.command("run")
def run_command(
    implementation: Implementation,
    spec: SpecName = "claas",
    profile: Profile = "default",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="judge only in this dtype (repeatable)")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a requirement or family, such as IS-2 or IS (repeatable)")
    ] = None,
    jobs: Annotated[int, typer.Option(help="worker processes; 0: one per core, at most 8")] = 0,
    call_timeout: Annotated[float, typer.Option(help="seconds one call of the implementation may take")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="folder for results; default .sdpo-conformance/IMPL")] = None,
    json: Annotated[Path | None, typer.Option(help="also write results.json here")] = None,
    junit: Annotated[Path | None, typer.Option(help="also write JUnit XML here")] = None,
    mesh: Annotated[str, typer.Option(help="judge on ranks cut along dp, cp, tp: tp=2, or tp=2,dp=2")] = "",
) -> None:
    """Judge an implementation against the spec. Exit status: 0 conforming, 1 not, 2 could not run."""
    if mesh or under_torchrun():
        raise typer.Exit(
            run_under_mesh(
                implementation,
                mesh,
                profile,
                seed,
                device,
                tuple(dtype or ()),
                tuple(only or ()),
                out,
                call_timeout,
                json,
                junit,
            )
        )
    from rich.console import Console

    from sdpo_conformance.report.terminal import print_report
    from sdpo_conformance.running.process import run

    try:
        with progress_bar() as progress:
            report = run(
                implementation,
                spec=spec,
                profile=profile,
                seed=seed,
                device=device,
                dtypes=dtype or (),
                only=only or (),
                jobs=jobs,
                out=out,
                call_timeout=call_timeout,
                progress=progress,
            )
        if json is not None:
            write_text(json, (report.folder / "results.json").read_text(encoding="utf-8"))
        if junit is not None:
            from sdpo_conformance.report.junit import junit_xml

            write_text(junit, junit_xml(report.results))
    except (RunError, OSError) as error:
        raise fail(error) from None
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    print_report(report.results, report.folder, console)
    raise typer.Exit(report.exit_status)


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_under_mesh(
    implementation: str,
    mesh: str,
    profile: str,
    seed: int,
    device: str,
    dtypes: tuple[str, ...],
    only: tuple[str, ...],
    out: Path | None,
    call_timeout: float,
    json: Path | None,
    junit: Path | None,
) -> int:
    """Judge on ranks and print the report; the exit status. Under torchrun the first process does, the others wait for
    its end."""
    from rich.console import Console

    from sdpo_conformance.running.process import run

    try:
        if under_torchrun():
            from sdpo_conformance.running.torchrun import checked_mesh, stand_by

            checked_mesh(mesh)
            if (status := stand_by()) is not None:
                return status
        with progress_bar() as progress:
            report = run(
                implementation, profile=profile, seed=seed, device=device, dtypes=dtypes, only=only, out=out,
                call_timeout=call_timeout, progress=progress, mesh=mesh,
            )  # fmt: skip
        if json is not None:
            write_text(json, (report.folder / "results.json").read_text(encoding="utf-8"))
        if junit is not None:
            from sdpo_conformance.report.junit import junit_xml

            write_text(junit, junit_xml(report.results))
    except (RunError, OSError) as error:
        if under_torchrun():
            from sdpo_conformance.running.torchrun import finished

            finished(2)
        raise fail(error) from None
    from sdpo_conformance.report.mesh_report import print_sharded_report

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    print_sharded_report(report.results, report.folder, console)
    if under_torchrun():
        from sdpo_conformance.running.torchrun import finished

        finished(report.exit_status)
    return report.exit_status


@app.command()
def explain(
    requirement: Annotated[str, typer.Argument(metavar="ID", help="IS-6, or a family such as IS")],
    spec: SpecName = "claas",
) -> None:
    """Say what a requirement asks for, why, and where the rule comes from."""
    from rich.console import Console

    from sdpo_conformance.report.explaining import explanations
    from sdpo_conformance.specs import find_spec

    try:
        texts = explanations(requirement, find_spec(spec))
    except ValueError as error:
        raise fail(error) from None
    console = Console(highlight=False)
    for text in texts:
        console.print(text)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="the adapter to write")] = Path("sdpo_adapter.py"),
) -> None:
    """Write a ten-line adapter that makes your loss callable by the suite."""
    from sdpo_conformance.running.adapter_template import write_adapter

    try:
        write_adapter(path)
    except OSError as error:
        raise fail(error) from None
    print(f"wrote {path}; fill in the call and run: sdpo-conformance run {path}")


app.command()(audit)
app.command()(matrix)
app.command()(bench)


def progress_bar() -> Any:
    """A context manager giving a callback; silent where stderr is no terminal."""
    from sdpo_conformance.report.progress import progress_on_terminal

    return progress_on_terminal()


def main() -> None:
    """Entry point of ``sdpo-conformance``."""
    app()
