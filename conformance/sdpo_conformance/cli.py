"""The command line: one small function per command, each a call into the module that does the work."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sdpo_conformance.audit.audit_command import audit
from sdpo_conformance.bench.bench_command import bench
from sdpo_conformance.matrix.matrix_command import matrix
from sdpo_conformance.protocol import DTYPE_NAMES
from sdpo_conformance.running.children import Interrupted, ending_on_signals
from sdpo_conformance.running.options import RunError
from sdpo_conformance.specs import DEFAULT

app = typer.Typer(
    help="Judge implementations of the SDPO loss and training step.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def names_of_implementations(incomplete: str) -> list[str]:
    """For shell completion."""
    from sdpo_conformance.report.listing import listing
    from sdpo_conformance.specs import DEFAULT, find_spec

    kinds = ["implementations", *(["defects"] if incomplete.startswith("d") else [])]
    names = [name for kind in kinds for name, _ in listing(kind, find_spec(DEFAULT))]
    here = [str(path) for path in Path(".").glob("*.py")]
    return [name for name in [*names, *here] if name.startswith(incomplete)]


def names_to_explain(incomplete: str) -> list[str]:
    """For shell completion."""
    from sdpo_conformance.report.listing import listing
    from sdpo_conformance.specs import DEFAULT, find_spec

    spec = find_spec(DEFAULT)
    names = [name.removeprefix("defect:") for kind in ("requirements", "defects") for name, _ in listing(kind, spec)]
    return [name for name in names if name.lower().startswith(incomplete.lower())]


def names_of_kinds(incomplete: str) -> list[str]:
    """For shell completion."""
    from sdpo_conformance.report.listing import KINDS

    return [name for name in KINDS if name.startswith(incomplete)]


def names_of_specs(incomplete: str) -> list[str]:
    """For shell completion."""
    from sdpo_conformance.specs import specs

    return [spec.name for spec in specs() if spec.name.startswith(incomplete)]


def names_of_profiles(incomplete: str) -> list[str]:
    """For shell completion."""
    from sdpo_conformance.judging.profiles import PROFILES

    return [name for name in PROFILES if name.startswith(incomplete)]


def names_of_dtypes(incomplete: str) -> list[str]:
    """For shell completion."""
    return [name for name in DTYPE_NAMES if name.startswith(incomplete)]


Implementation = Annotated[
    str,
    typer.Argument(
        metavar="IMPL",
        help="module, module:object, path/to/file.py, reference, triton_fused, defect:NAME",
        autocompletion=names_of_implementations,
    ),
]
SpecName = Annotated[
    str,
    typer.Option("--spec", help="the spec to judge by: sdpo-conformance list specs", autocompletion=names_of_specs),
]
Profile = Annotated[str, typer.Option(help="quick, default, thorough or fuzz", autocompletion=names_of_profiles)]
Seed = Annotated[int, typer.Option(help="reproduces a run")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
DType = Annotated[
    list[str] | None, typer.Option(help="judge only in this dtype (repeatable)", autocompletion=names_of_dtypes)
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="a requirement or family, as `list requirements` shows them (repeatable)", autocompletion=names_to_explain
    ),
]
Timeout = Annotated[float, typer.Option(help="seconds one call of the implementation may take")]
Out = Annotated[Path | None, typer.Option(help="folder for results; default .sdpo-conformance/IMPL")]
Json = Annotated[Path | None, typer.Option(help="also write results.json here")]
Junit = Annotated[Path | None, typer.Option(help="also write JUnit XML here")]
Sarif = Annotated[Path | None, typer.Option(help="also write SARIF here, for code scanning")]
Html = Annotated[Path | None, typer.Option(help="also write the report as a page here")]
Xfails = Annotated[Path | None, typer.Option(help="file of expected failures: an id and its reason a line")]
Base = Annotated[Path | None, typer.Option(help="results.json of an earlier run: say what is newly failing")]
Watch = Annotated[bool, typer.Option("--watch", help="judge again whenever the implementation changes")]
LastFailed = Annotated[bool, typer.Option("--last-failed", help="judge what failed in the last run")]
Annotate = Annotated[bool, typer.Option("--annotate", help="print GitHub annotations; on by itself in its actions")]


def fail(error: Exception | str) -> typer.Exit:
    """One line on stderr and exit status 2."""
    print(f"sdpo-conformance: {error}", file=sys.stderr)
    return typer.Exit(2)


def print_version(asked: bool) -> None:
    """The package, and the specs it judges by."""
    if asked:
        from sdpo_conformance import __version__
        from sdpo_conformance.specs import specs

        print(f"sdpo-conformance {__version__} ({', '.join(spec.label for spec in specs())})")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Judge implementations of the SDPO loss and training step."""


@app.command("run")
def run_command(
    implementation: Implementation,
    spec: SpecName = DEFAULT,
    profile: Profile = "default",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = None,
    only: Only = None,
    jobs: Annotated[int, typer.Option(help="worker processes; 0: one per core, at most 8")] = 0,
    call_timeout: Timeout = 120.0,
    out: Out = None,
    json: Json = None,
    junit: Junit = None,
    sarif: Sarif = None,
    html: Html = None,
    xfails: Xfails = None,
    base: Base = None,
    last_failed: LastFailed = False,
    watch: Watch = False,
    annotate: Annotate = False,
    mesh: Annotated[str, typer.Option(help="judge on ranks cut along dp, cp, tp: tp=2, or tp=2,dp=2")] = "",
) -> None:
    """Judge an implementation against the spec.

    Exit status: 0 conforming or failing only as expected, 1 not (an unexpected pass included), 2 could not run.
    """
    from sdpo_conformance.judge_command import Outputs, judge_and_report
    from sdpo_conformance.running.options import RunOptions

    with one_line_errors():
        options = RunOptions(
            spec=spec, profile=profile, seed=seed, device=device, dtypes=tuple(dtype or ()), only=tuple(only or ()),
            jobs=jobs, call_timeout=call_timeout, out=out, xfails=xfails, mesh=mesh,
        )  # fmt: skip
        outputs = Outputs(json=json, junit=junit, sarif=sarif, html=html, base=base, annotate=annotate)
        status = judge_and_report(implementation, options, outputs, last_failed=last_failed, again=watch, mesh=mesh)
    raise typer.Exit(status)


@app.command()
def check(
    implementation: Implementation,
    spec: SpecName = DEFAULT,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = None,
    only: Only = None,
    call_timeout: Timeout = 120.0,
    out: Out = None,
    json: Json = None,
    junit: Junit = None,
    sarif: Sarif = None,
    xfails: Xfails = None,
    last_failed: LastFailed = False,
    watch: Watch = False,
    annotate: Annotate = False,
) -> None:
    """Seconds to the first answer: recorded cases and one visit per corner; stops at the first cause.

    Exit status: 0 nothing found, 1 something is wrong, 2 could not run.
    """
    from dataclasses import replace

    from sdpo_conformance.judge_command import Outputs, judge_and_report
    from sdpo_conformance.running.options import RunOptions

    with one_line_errors():
        options = RunOptions(
            spec=spec, profile="check", seed=seed, device=device, dtypes=tuple(dtype or ()), only=tuple(only or ()),
            call_timeout=call_timeout, xfails=xfails, first_cause=True,
        )  # fmt: skip
        folder = options.folder(implementation)
        options = replace(options, out=out or folder.with_name(f"{folder.name}.check"))
        outputs = Outputs(json=json, junit=junit, sarif=sarif, annotate=annotate)
        status = judge_and_report(implementation, options, outputs, last_failed=last_failed, again=watch)
    raise typer.Exit(status)


@app.command()
def summary(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.json", help="a stored report, or the folder of a run")],
) -> None:
    """Print a stored report again. Exit status: that of the run."""
    from sdpo_conformance.report.base_comparison import read_results
    from sdpo_conformance.report.console import show
    from sdpo_conformance.report.mesh_report import print_sharded_report
    from sdpo_conformance.report.terminal import print_report
    from sdpo_conformance.running.process import Report

    with one_line_errors():
        report = Report(read_results(results), results if results.is_dir() else results.parent)
        printed = print_sharded_report if "mesh" in report.results["run"] else print_report
        show(lambda console: printed(report.results, report.folder, console))
    raise typer.Exit(report.exit_status)


@app.command("list")
def list_command(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="requirements, defects, implementations or specs",
            show_default=False,
            autocompletion=names_of_kinds,
        ),
    ] = "",
    spec: SpecName = DEFAULT,
) -> None:
    """List what there is to name: requirements, defects, implementations or specs."""
    from sdpo_conformance.report.console import show
    from sdpo_conformance.report.explaining import table_of
    from sdpo_conformance.report.listing import KINDS, listing
    from sdpo_conformance.specs import find_spec

    with one_line_errors():
        if not kind:
            raise RunError(f"list what? one of {', '.join(KINDS)}")
        if kind not in KINDS:
            raise RunError(f"nothing to list under {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
        found = list(listing(kind, find_spec(spec)))
        width = max(len(name) for name, _ in found)
        show(lambda console: console.print(table_of(found, width)))


@app.command()
def explain(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="a requirement, family, defect, entry, spec, status or level",
            autocompletion=names_to_explain,
        ),
    ],
    spec: SpecName = DEFAULT,
) -> None:
    """Say what a name in a report means: the rule, why, its source; what is wrong, and the right lines beside it."""
    from sdpo_conformance.report.console import show
    from sdpo_conformance.report.explaining import explanations
    from sdpo_conformance.specs import find_spec

    with one_line_errors():
        texts = explanations(name, find_spec(spec))
        show(lambda console: console.print(*texts, sep="\n"))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="the adapter to write")] = Path("sdpo_adapter.py"),
) -> None:
    """Write a ten-line adapter that makes your loss callable by the suite."""
    from sdpo_conformance.running.adapter_template import write_adapter

    with one_line_errors():
        write_adapter(path)
    print(f"wrote {path}; fill in the call and run: sdpo-conformance check {path}")


app.command()(audit)
app.command()(matrix)
app.command()(bench)


class one_line_errors:
    """What a user did wrong is one line on stderr and exit status 2."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RunError | ValueError | OSError) and not isinstance(error, BrokenPipeError):
            raise fail(words_of(error)) from None


def words_of(error: BaseException) -> str:
    """An error in one line; one of the system without its number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def nearest(name: str, known: Any) -> str:
    """``; did you mean X?`` or nothing."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def streams_that_take_anything() -> None:
    """A sign that the terminal's encoding lacks is printed as a question mark, and what is written to a closed stream
    goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main() -> None:
    """Entry point of ``sdpo-conformance``. A signal ends what was started and exits with 128 and its number."""
    streams_that_take_anything()
    try:
        with ending_on_signals():
            app()
    except Interrupted as signalled:
        from sdpo_conformance.judge_command import print_interrupted

        print_interrupted(signalled)
        sys.stdout.flush()
        os._exit(signalled.exit_status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
