"""The report on a terminal, from results.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sdpo_conformance.judging.records import Status
from sdpo_conformance.protocol import ENTRIES
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.spec import Spec

SHOWN_FAILURES = 8

UNJUDGED = (Status.NOT_JUDGED, Status.INTERNAL_ERROR)

COLUMNS = {entry.value: row.column for entry, row in ENTRIES.items() if row.column}
"""Entries that a report has a column for."""


def print_report(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Everything a stranger needs to act: tally, failures, diagnosis, reproduction, verdict."""
    console.print(header(results), highlight=False)
    console.print(Padding(tally_table(results), (0, 0, 0, 2)))
    for line in notes(results):
        console.print(f"  {line}", highlight=False)
    failures = grouped([record for record in results["records"] if record["status"] == Status.FAILED])
    primary, secondary = sorted_out(failures, find_spec(results["spec"]["name"]))
    shown = primary[:SHOWN_FAILURES]
    for group in shown:
        console.print(failure_text(group), highlight=False)
    hidden = primary[SHOWN_FAILURES:]
    if hidden:
        ids = ", ".join(group[0]["requirement"] for group in hidden)
        console.print(f"      and {len(hidden)} more: {ids}", highlight=False)
    if secondary:
        ids = ", ".join(dict.fromkeys(group[0]["requirement"] for group in secondary))
        console.print(f"      wrong for a reason reported above: {ids}", highlight=False)
    for text in diagnosis_lines(results.get("diagnosis")):
        console.print(text, highlight=False)
    if shown:
        best = next((group[0] for group in shown if group[0]["failure"].get("reproduction")), None)
        if best:
            program = folder / best["failure"]["reproduction"]
            console.print(
                Text.assemble(
                    ("reproduce  ", "bold"),
                    f"python {program}",
                    "   (plain PyTorch and a .safetensors, no harness)",
                )
            )
    verdict = results["verdict"]
    style = "bold green" if verdict["passed"] else "bold red"
    console.print(Text.assemble(("verdict    ", "bold"), (verdict["text"], style)))


def header(results: Mapping[str, Any]) -> Text:
    run = results["run"]
    device = run["device"] if run["device"] == "cpu" else f"{run['device']} ({run['device_name']})"
    parts = [
        "SDPO conformance",
        f"{results['spec']['title']} {results['spec']['version']} spec",
        results["implementation"],
        device,
        ", ".join(run["dtypes"]) or "no dtype",
        f"profile {run['profile']}, seed {run['seed']}",
        f"{run['seconds']:.0f} s",
    ]
    return Text(" · ".join(parts), style="bold")


def tally_table(results: Mapping[str, Any]) -> Table:
    """Families down; passed of judged through each entry, and the ids that failed."""
    table = Table(box=None, show_header=True, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    records = results["records"]
    spec = find_spec(results["spec"]["name"])
    heads = [entry for entry in COLUMNS if entry in results["offered"]]
    table.add_column("")
    for entry in heads:
        table.add_column(COLUMNS[entry], justify="left")
    if not heads:
        table.add_column("")
    table.add_column("not met", overflow="fold")
    for family, words in spec.families.items():
        own = spec.own_entries.get(family, "")
        mine = [record for record in records if record["requirement"].rsplit("-", 1)[0] == family]
        if not mine:
            if not results["run"]["only"]:
                provided = own in results["offered"] or any(entry in results["offered"] for entry in heads)
                if own or not provided:
                    table.add_row(words, *[""] * (max(len(heads), 1) - 1), "", Text("not provided", style="dim"))
            continue
        judged = [record for record in mine if record["status"] not in UNJUDGED]
        cells: list[Text] = []
        for entry in heads or [""]:
            through = judged if own else [record for record in judged if record["entry"] == entry]
            if own and cells:
                through = []
            good = [record for record in through if record["status"] in (Status.PASSED, Status.UNEXPECTED_PASS)]
            style = "green" if len(good) == len(through) else "red"
            cells.append(Text(f"{len(good)}/{len(through)}", style=style) if through else Text(""))
        bad = [record for record in judged if record["status"] not in (Status.PASSED,)]
        ids = dict.fromkeys(label(record) for record in bad)
        table.add_row(words, *cells, " ".join(ids))
    return table


def label(record: Mapping[str, Any]) -> str:
    mark = {Status.EXPECTED_FAILURE: " (expected)", Status.UNEXPECTED_PASS: " (unexpected pass)"}
    level = " (SHOULD)" if record["level"] == Level.SHOULD else ""
    return f"{record['requirement']}{mark.get(Status(record['status']), level)}"


def notes(results: Mapping[str, Any]) -> Iterator[str]:
    """What limits the verdict."""
    for dtype, why in results["run"]["refused_dtypes"].items():
        yield f"{dtype} not judged: {why}"
    slow = [record["requirement"] for record in results["records"] if record["out_of_time"]]
    if slow:
        yield f"fewer examples than the profile asks for, out of time: {', '.join(dict.fromkeys(slow))}"


def grouped(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Failures of one requirement through several entries together."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["requirement"], []).append(record)
    for group in groups.values():
        group.sort(key=lambda record: bool(record["failure"].get("secondary")))
    return list(groups.values())


def sorted_out(
    failures: list[list[Mapping[str, Any]]],
    spec: Spec,
) -> tuple[list[list[Mapping[str, Any]]], list[list[Mapping[str, Any]]]]:
    """Failures that name a rule, and those that follow: wrong on their control input too, or found by a sweep
    through every corner while a rule of its own is named."""
    own = [group for group in failures if not group[0]["failure"].get("secondary")]
    named = [group for group in own if group[0]["requirement"] not in spec.sweeps]
    primary = named or own or failures
    return primary, [group for group in failures if group not in primary]


def failure_text(group: Sequence[Mapping[str, Any]]) -> Text:
    """The id, the rule, expected and got, and the input in words."""
    record = group[0]
    failure = record["failure"]
    indent = "\n" + " " * 8
    text = Text.assemble((f"{record['requirement']:<7} ", "bold red"), record["statement"])
    if record["level"] == Level.SHOULD:
        text.append(" (SHOULD)", style="dim")
    entries = ", ".join(COLUMNS.get(entry["entry"], "") for entry in group if entry["entry"] in COLUMNS)
    if failure.get("kind") == "error":
        text.append(f"{indent}{failure['summary']}")
    else:
        text.append(f"{indent}{failure['aspect']}: expected {failure['expected']}, got {failure['got']}")
        if failure.get("detail"):
            text.append(f"{indent}{failure['detail']}")
    if failure.get("words"):
        text.append(f"{indent}on {failure['words']}", style="dim")
    if entries:
        text.append(f"{indent}through: {entries}", style="dim")
    return text


def diagnosis_lines(diagnosis: Mapping[str, Any] | None) -> Iterator[Text]:
    """The diagnosis's own lines, under one heading."""
    if not diagnosis:
        return
    for index, line in enumerate(diagnosis["lines"]):
        yield Text.assemble(("diagnosis  " if index == 0 else " " * 11, "bold"), line)
