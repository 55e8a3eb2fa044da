"""``sdpo-conformance matrix``: the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdpo_conformance.specs import DEFAULT

if TYPE_CHECKING:
    from sdpo_conformance.matrix.columns import Column


def matrix(
    implementations: Annotated[
        list[str],
        typer.Argument(
            metavar="IMPL...",
            help="implementations as `run` takes them; a results.json or matrix.json adds an earlier run's, "
            "say of another machine",
        ),
    ],
    spec: Annotated[str, typer.Option(help="the spec to judge by")] = DEFAULT,
    profile: Annotated[str, typer.Option(help="quick, default, thorough or fuzz")] = "default",
    seed: Annotated[int, typer.Option(help="reproduces a run")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="judge only in this dtype (repeatable)")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a requirement or family, as `list requirements` shows them (repeatable)")
    ] = None,
    jobs: Annotated[int, typer.Option(help="worker processes; 0: one per core, at most 8")] = 0,
    call_timeout: Annotated[float, typer.Option(help="seconds one call of an implementation may take")] = 120.0,
    package: Annotated[
        list[str] | None,
        typer.Option(metavar="IMPL=TEXT", help="package and version, where no installed one tells (repeatable)"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for matrix.json, matrix.html and badges/")] = Path(
        ".sdpo-conformance/matrix"
    ),
) -> None:
    """Judge several implementations and set them side by side.

    Exit status: 0 all conforming, 1 some not, 2 none could run. One that is not installed does not count.
    """
    from rich.console import Console

    from sdpo_conformance.matrix.cells import rows_of
    from sdpo_conformance.matrix.document import document, exit_status
    from sdpo_conformance.matrix.gather import gather
    from sdpo_conformance.matrix.matrix_files import write_matrix
    from sdpo_conformance.matrix.table import print_matrix
    from sdpo_conformance.report.progress import progress_on_terminal
    from sdpo_conformance.running.options import RunError, RunOptions

    try:
        options = RunOptions(
            spec=spec,
            profile=profile,
            seed=seed,
            device=device,
            dtypes=tuple(dtype or ()),
            only=tuple(only or ()),
            jobs=jobs,
            call_timeout=call_timeout,
        )
        stated = stated_versions(package or ())
        with progress_on_terminal() as progress:
            columns = gather(implementations, options, stated, progress, announce)
        rows = rows_of(columns, only or ())
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 110
        print_matrix(columns, rows, console)
        for path in write_matrix(out, document(columns), columns, rows):
            console.print(f"wrote {path}", soft_wrap=True)
    except (RunError, ValueError, OSError) as error:
        print(f"sdpo-conformance: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(exit_status(columns))


def stated_versions(options: Sequence[str]) -> dict[str, str]:
    """``--package IMPL=TEXT`` by implementation; raises ValueError for one without the text."""
    found = {}
    for option in options:
        name, _, text = option.partition("=")
        if not name or not text:
            raise ValueError(f"--package={option}: expected IMPL=TEXT, as in adapters.claas='CLaaS e2331f7'")
        found[name] = text
    return found


def announce(column: Column) -> None:
    """One line on stderr as each implementation is done."""
    said = column.message if column.verdict is None else column.verdict["text"]
    print(f"{column.implementation}: {said}", file=sys.stderr, flush=True)
