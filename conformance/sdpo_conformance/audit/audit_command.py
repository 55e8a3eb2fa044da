"""`sdpo-conformance audit`: the command line of the audit."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from errno import ENOENT
from pathlib import Path
from typing import Annotated

import typer

from sdpo_conformance.files import write_text


class Sampler(StrEnum):
    """What is known of where the recorded log-probs came from."""

    UNKNOWN = "unknown"
    DIFFERS = "differs"
    SAME = "same"


def audit(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="The folder that a run left behind; its parts are found by name (docs/audit.md).",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(help="Per-step metrics: CLaaS response, JSON array, JSON lines, trainer_state.json."),
    ] = None,
    before: Annotated[Path | None, typer.Option(help="Adapter before the run: PEFT folder or .safetensors.")] = None,
    after: Annotated[Path | None, typer.Option(help="Adapter after the run.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Training settings, or the distill request with its samples.")
    ] = None,
    sampler: Annotated[
        Sampler, typer.Option(help="Do the recorded log-probs come from another engine than the trainer?")
    ] = Sampler.UNKNOWN,
    model: Annotated[
        Path | None, typer.Option(help="Base model's folder: generate before and after, and replay step 1.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: .txt, .json or .jsonl; else the samples' own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Token budget of each generation.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda, … for --model; auto takes a GPU if there is one.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - for stdout.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page.")
    ] = None,
) -> None:
    """Say whether a finished run can be trusted, from what it left behind.

    Exit status: 0 nothing found, 1 findings, 2 could not look.
    """
    from sdpo_conformance.audit.errors import AuditError, shown
    from sdpo_conformance.audit.inspection import audit_run
    from sdpo_conformance.audit.reporting.audit_document import document

    try:
        report = audit_run(
            run,
            metrics=metrics,
            before=before,
            after=after,
            config=config,
            sampler=sampler.value,
            model=model,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            device=device,
        )
        to_stdout = json_file is not None and str(json_file) == "-"
        text = json.dumps(document(report), indent=2, allow_nan=False) + "\n"
        if json_file is not None and not to_stdout:
            write_report(json_file, text)
        if html_file is not None:
            from sdpo_conformance.audit.reporting.html import page

            write_report(html_file, page(report))
    except AuditError as error:
        print(f"audit: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except (OSError, MemoryError) as error:
        print(f"audit: {shown(error) or type(error).__name__}", file=sys.stderr)
        raise typer.Exit(2) from None
    if to_stdout:
        print(text, end="")
    else:
        from rich.console import Console

        from sdpo_conformance.audit.reporting.audit_terminal import render

        render(report, Console())
    raise typer.Exit(report.exit_status)


def write_report(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all; FileNotFoundError where its folder is missing: a typo makes no folders."""
    if not path.parent.is_dir():
        raise FileNotFoundError(ENOENT, "no such folder", str(path.parent))
    write_text(path, text)
