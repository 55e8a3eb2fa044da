"""The report on a terminal, from results.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sdpo_conformance.judging.records import Status
from sdpo_conformance.protocol import ENTRIES, Capability, FusedSDPOLossInput, SDPOLossInput
from sdpo_conformance.specs import DEFAULT, find_spec
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.spec import Spec

SHOWN_FAILURES = 8

UNJUDGED = (Status.NOT_JUDGED, Status.INTERNAL_ERROR)

COLUMNS = {entry.value: row.column for entry, row in ENTRIES.items() if row.column}
"""Entries that a report has a column for."""


def print_report(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Everything a stranger needs to act: tally, failures, diagnosis, reproduction, verdict."""
    spec = find_spec(results["spec"]["name"])
    console.print(header(results), highlight=False)
    if not results["run"].get("first_cause"):
        console.print(Padding(tally_table(results), (0, 0, 0, 2)))
    for line in notes(results):
        console.print(block("", [Text(line)], 2))
    failures = grouped([record for record in results["records"] if record["status"] == Status.FAILED])
    everywhere = raised_everywhere(failures)
    if everywhere:
        console.print(everywhere_text(everywhere, results))
        failures = [group for group in failures if group not in everywhere]
    primary, secondary = sorted_out(failures, spec)
    diagnosis = results.get("diagnosis") or {}
    first = list(diagnosis.get("first", ()))
    primary, secondary, caused = led(primary, secondary, first, diagnosis.get("because", ()))
    shown = primary[:SHOWN_FAILURES]
    for number, group in enumerate(shown):
        console.print(failure_text(group, results if number == 0 else None))
    hidden = primary[SHOWN_FAILURES:]
    if hidden:
        ids = ", ".join(group[0]["requirement"] for group in hidden)
        console.print(block("", [Text(f"and {len(hidden)} more: {ids}")], 6))
    if caused:
        console.print(block("", [Text(f"because of {' and '.join(first)}: {', '.join(caused)}")], 6))
    if secondary:
        ids = ", ".join(dict.fromkeys(group[0]["requirement"] for group in secondary))
        console.print(block("", [Text(f"wrong for a reason reported above: {ids}")], 6))
    for index, text in enumerate(diagnosis_lines(results.get("diagnosis"))):
        console.print(block("" if index else "diagnosis", [text], LABEL))
    best = next((group[0] for group in [*everywhere, *shown] if group[0]["failure"].get("reproduction")), None)
    if best:
        program = folder / best["failure"]["reproduction"]
        console.print(
            Text.assemble(("reproduce  ", "bold"), f"python {program}"),
            soft_wrap=True,
        )
        console.print(block("", [Text("exits 1 while the defect is there, 125 where it cannot run", "dim")], LABEL))
    verdict = results["verdict"]
    style = "bold green" if verdict["passed"] else "bold red"
    console.print(block("verdict", [Text(verdict["text"], style=style)], LABEL))


LABEL = 11
"""Width of diagnosis, reproduce, verdict and the space behind."""

EVERYWHERE = 3
"""So many requirements that end in the same error are one finding."""


UNKNOWN_INPUT = ("AttributeError", "TypeError", "KeyError")
"""Errors of who expects another input."""


def block(label: str, lines: Sequence[Text], width: int, style: str = "bold") -> Table:
    """A label, and behind it lines that are wrapped under themselves."""
    table = Table.grid()
    table.add_column(width=width)
    table.add_column(overflow="fold")
    for number, line in enumerate(lines):
        table.add_row(Text(label if number == 0 else "", style=style), line)
    return table


def raised_everywhere(failures: Sequence[list[Mapping[str, Any]]]) -> list[list[Mapping[str, Any]]]:
    """The failures that are one and the same error, where it is most of them."""
    by_error: dict[str, list[list[Mapping[str, Any]]]] = {}
    for group in failures:
        failure = group[0]["failure"]
        if failure.get("kind") == "error":
            words = str(failure["summary"]).partition(" raised ")[2] or str(failure["summary"])
            by_error.setdefault(re.sub(r"\d+", "N", words), []).append(group)
    largest = max(by_error.values(), key=len, default=[])
    return largest if len(largest) >= EVERYWHERE and 2 * len(largest) > len(failures) else []


def everywhere_text(groups: Sequence[Sequence[Mapping[str, Any]]], results: Mapping[str, Any]) -> Table:
    """One block for all of them: the error, the user's line, the fields that the input has."""
    record = groups[0][0]
    failure = record["failure"]
    ids = ", ".join(group[0]["requirement"] for group in groups)
    lines = [Text(f"{failure['summary']}")]
    where = failure.get("where") or results.get("places", {}).get(record["entry"], "")
    if where:
        lines.append(Text(f"at {where}"))
    lines.append(Text(gets(record["entry"], results), style="dim"))
    lines.append(Text(f"the same in {len(groups)} requirements: {ids}", style="dim"))
    return block("always", lines, 8, "bold red")


def gets(entry: str, results: Mapping[str, Any]) -> str:
    """What an entry is called with, in a line."""
    return f"{entry} gets {fields_of(entry, find_spec(results['spec']['name']))}"


def fields_of(entry: str, spec: Spec) -> str:
    """What an entry is called with: the fields of its input, or its arguments."""
    if spec.name != DEFAULT and entry == Capability.LOSS.value:
        return f"a loss_input as {spec.package}.loss_input describes it"
    inputs: dict[str, Any] = {Capability.LOSS.value: SDPOLossInput, Capability.FUSED.value: FusedSDPOLossInput}
    if entry not in inputs:
        return f"{ENTRIES[Capability(entry)].signature}"
    training = ", ".join(f"training.{one}" for one in ("alpha", "is_clip", "kl_reg_weight"))
    names = [one.name for one in fields(inputs[entry]) if one.name != "training"]
    return f"loss_input with {', '.join(names)}, {training}"


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
        f"{run['seconds']:.1f} s",
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
    """What limits the verdict, and what is expected to fail, with the reasons."""
    told: dict[tuple[str, str], dict[str, None]] = {}
    for record in results["records"]:
        if record["status"] in (Status.EXPECTED_FAILURE, Status.UNEXPECTED_PASS, Status.NOT_JUDGED):
            told.setdefault((record["status"], record["reason"]), {})[record["requirement"]] = None
    for (status, reason), ids in told.items():
        yield f"{' '.join(ids)} {status}: {reason}"
    limits = [record["reason"] for record in results["records"] if record["status"] in (Status.PASSED, Status.FAILED)]
    yield from dict.fromkeys(filter(None, limits))
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


def led(
    primary: Sequence[list[Mapping[str, Any]]],
    secondary: Sequence[list[Mapping[str, Any]]],
    first: Sequence[str],
    because: Sequence[str],
) -> tuple[list[list[Mapping[str, Any]]], list[list[Mapping[str, Any]]], list[str]]:
    """The requirements that name the diagnosed cause come first, even where they count as secondary; those that fail
    because of them are named only, third."""

    def id_of(group: Sequence[Mapping[str, Any]]) -> str:
        return str(group[0]["requirement"])

    leading = [group for group in (*primary, *secondary) if id_of(group) in first]
    leading.sort(key=lambda group: first.index(id_of(group)))
    rest = [group for group in primary if group not in leading]
    caused = [id_of(group) for group in rest if leading and id_of(group) in because]
    shown = [*leading, *(group for group in rest if id_of(group) not in caused)]
    return shown, [group for group in secondary if group not in leading], caused


def failure_text(group: Sequence[Mapping[str, Any]], results: Mapping[str, Any] | None = None) -> Table:
    """The id, the rule, expected and got, and the input in words; with ``results`` also the user's file and line."""
    record = group[0]
    failure = record["failure"]
    level = Text(" (SHOULD)", style="dim") if record["level"] == Level.SHOULD else Text("")
    lines = [Text.assemble(record["statement"], level)]
    entries = ", ".join(COLUMNS.get(entry["entry"], "") for entry in group if entry["entry"] in COLUMNS)
    if failure.get("kind") == "error":
        lines.append(Text(failure["summary"]))
        if results is not None and any(f" raised {kind}:" in failure["summary"] for kind in UNKNOWN_INPUT):
            lines.append(Text(gets(record["entry"], results), style="dim"))
    else:
        lines.append(Text(f"{failure['aspect']}: expected {failure['expected']}, got {failure['got']}"))
        if failure.get("detail"):
            lines.append(Text(failure["detail"]))
    where = failure.get("where") or (results or {}).get("places", {}).get(record["entry"], "")
    if where:
        lines.append(Text(f"at {where}"))
    if failure.get("words"):
        lines.append(Text(f"on {failure['words']}", style="dim"))
    if entries:
        lines.append(Text(f"through: {entries}", style="dim"))
    return block(record["requirement"], lines, max(8, len(record["requirement"]) + 2), "bold red")


def diagnosis_lines(diagnosis: Mapping[str, Any] | None) -> list[Text]:
    """The diagnosis's own lines."""
    return [Text(line) for line in diagnosis["lines"]] if diagnosis else []
