"""The report of a run on a mesh, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sdpo_conformance.judging.records import Status
from sdpo_conformance.report.terminal import SHOWN_FAILURES, failure_text, grouped, header, label, notes
from sdpo_conformance.specs import find_spec

ENTRY_WORDS = {
    "compute_sdpo_loss": "loss",
    "compute_fused_sdpo_loss": "fused",
    "compute_divergence": "divergence",
    "compute_response_logprobs": "log-probs",
    "compute_teacher_topk": "top-k",
}


def print_sharded_report(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Tally by family, what failed and on which rank, how to reproduce it, the verdict."""
    run = results["run"]
    head = header(results)
    head.append(f" · mesh {run['mesh']} over {run['backend']}")
    console.print(head, highlight=False)
    console.print(Padding(tally(results), (0, 0, 0, 2)))
    for line in notes(results):
        console.print(f"  {line}", highlight=False)
    groups = grouped([record for record in results["records"] if record["status"] == Status.FAILED])
    own = [group for group in groups if not group[0]["failure"].get("secondary")]
    sweeps = find_spec(results["spec"]["name"]).sweeps
    first = [group for group in own if group[0]["requirement"] not in sweeps] or own or groups
    for number, group in enumerate(first[:SHOWN_FAILURES]):
        console.print(failure_text(group, None if number else results), highlight=False)
    rest = [group[0]["requirement"] for group in groups if group not in first[:SHOWN_FAILURES]]
    if rest:
        console.print(f"        because of what is reported above: {', '.join(rest)}", highlight=False)
    program = next((g[0]["failure"]["reproduction"] for g in first if g[0]["failure"].get("reproduction")), None)
    if program:
        console.print(Text.assemble(("reproduce  ", "bold"), f"python {folder / program}"), soft_wrap=True)
    text = results["verdict"]["text"]
    style = "bold green" if results["verdict"]["passed"] else "bold red"
    console.print(Text.assemble(("verdict    ", "bold"), (text, style)))


def tally(results: Mapping[str, Any]) -> Table:
    """Families down, entries across, and the ids that failed."""
    table = Table(box=None, show_header=True, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    entries = [entry for entry in ENTRY_WORDS if entry in results["offered"]]
    for column in ("", *(ENTRY_WORDS[entry] for entry in entries)):
        table.add_column(column)
    table.add_column("not met", overflow="fold")
    for words in dict.fromkeys(record["family"] for record in results["records"]):
        mine = [record for record in results["records"] if record["family"] == words]
        cells = []
        for entry in entries:
            through = [record for record in mine if record["entry"] == entry]
            good = [record for record in through if record["status"] in (Status.PASSED, Status.UNEXPECTED_PASS)]
            style = "green" if len(good) == len(through) else "red"
            cells.append(Text(f"{len(good)}/{len(through)}", style=style) if through else Text(""))
        bad = dict.fromkeys(label(record) for record in mine if record["status"] != Status.PASSED)
        table.add_row(words, *cells, " ".join(bad))
    return table
