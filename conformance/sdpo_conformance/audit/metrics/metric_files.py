"""Metrics on disk: one file or a folder of them; JSON, JSON lines, CSV or TensorBoard's event files."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.errors import AuditError, NoStepsError, shown
from sdpo_conformance.audit.metrics.console_log import is_console_log, read_console_log
from sdpo_conformance.audit.metrics.event_files import holds_event_files, is_event_file, read_event_file
from sdpo_conformance.audit.metrics.metric_names import FIELDS, field_of, is_bookkeeping
from sdpo_conformance.audit.metrics.mlflow_files import is_mlflow_folder, read_mlflow_folder
from sdpo_conformance.audit.metrics.record_problems import record_problems
from sdpo_conformance.audit.metrics.row_reader import RowReader
from sdpo_conformance.audit.metrics.step_record import Batch, Batching, RunMetrics
from sdpo_conformance.audit.metrics.tables import is_table, read_table
from sdpo_conformance.audit.run_files import open_regular, parse_json, read_text

_SHOWN_NAMES = 8
_LONGEST_LINE = 2**20


def read_metrics(path: Path) -> RunMetrics:
    """Read metrics from a file, or from a folder of them.

    A folder's `sample*` files are one series per sample; its other .json and .jsonl files are one batch each,
    in natural order. Raises AuditError when nothing there holds per-step metrics.
    """
    if path.is_dir() and not is_mlflow_folder(path) and not holds_event_files(path):
        return _read_folder(path)
    return _read_file(path)


def _read_file(path: Path) -> RunMetrics:
    where = shown(path)
    reader = RowReader(where)
    logging_steps = 1
    numbered, digits = True, None
    kind: str
    batching: Batching
    if path.suffix == ".wandb":
        raise AuditError(
            f"{where}: is wandb's own binary log; export it as JSON lines (wandb.Api().run(...).scan_history(),"
            " one row a line) and audit that file"
        )
    if is_event_file(path) or holds_event_files(path):
        kind, batches, batching = "TensorBoard event file", reader.log(read_event_file(path)), "unknown"
    elif is_mlflow_folder(path):
        kind, batches, batching = "MLflow file store", reader.log(read_mlflow_folder(path)), "unknown"
    elif is_table(path):
        kind, batches, batching = reader.rows_or_responses(read_table(path), "CSV")
    elif is_console_log(path) and not _begins_with_json(path):
        printed = read_console_log(path)
        numbered, digits, logging_steps = printed.numbered, printed.digits, printed.averaged_over
        kind, batches, batching = reader.rows_or_responses(printed.rows, "console lines")
        if not numbered:
            kind, batches, batching = "console lines", reader.log(printed.rows), "unknown"
            reader.notes.append("the lines say no step: they are counted")
    else:
        documents = _documents(read_text(path), where, reader)
        if len(documents) == 1 and not (isinstance(documents[0], dict) and isinstance(documents[0].get("data"), dict)):
            if isinstance(documents[0], dict) and isinstance(documents[0].get("logging_steps"), int):
                logging_steps = documents[0]["logging_steps"]
            kind, batches, batching = reader.document(documents[0])
        else:
            kind, batches, batching = reader.rows_or_responses(documents, "JSON lines")
    if not any(step.values or step.samples for batch in batches for step in batch.steps):
        raise _nothing_understood(where, reader)
    if len(batches) > 1:  # a response to an empty batch says nothing
        batches = [batch for batch in batches if batch.steps]
    native = reader.tool == "CLaaS" and batching != "unknown" and digits is None  # printed, a value may be 0.000
    problems = (*reader.problems, *(record_problems(batches) if native else ()))
    return RunMetrics(
        path,
        kind,
        tuple(batches),
        batching,
        problems,
        tool=reader.tool,
        averaged_over=_averaged_over(batches, logging_steps) if batching == "unknown" else 1,
        unknown_fields=reader.unknown_fields,
        ratio_names=reader.ratio_names,
        notes=tuple(reader.notes),
        numbered=numbered,
        digits=digits,
        evaluations=tuple(sorted(reader.evaluations.items())),
        names=frozenset(reader.seen),
        rewards={name: tuple(values) for name, values in reader.rewards.items()},
    )


def _begins_with_json(path: Path) -> bool:
    """Whether a file's first line is JSON: some tools call JSON lines a log."""
    with open_regular(path) as file:
        first = next((line for line in iter(lambda: file.readline(_LONGEST_LINE), b"") if line.strip()), b"")
    return first.lstrip()[:1] in (b"{", b"[") and _is_whole(first.decode("utf-8", "replace"))


def _nothing_understood(where: str, reader: RowReader) -> AuditError:
    names = sorted(reader.seen)
    if not names:
        return NoStepsError(f"{where}: holds no per-step metrics; expected entries with {', '.join(FIELDS[:3])}, …")
    told = ", ".join(shown(name) for name in names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "")
    count = f"{len(names)} field{'s' if len(names) > 1 else ''}"
    if any(map(field_of, names)) or all(map(is_bookkeeping, names)):
        return NoStepsError(f"{where}: {count}, but no row is a training step: {told}")
    return AuditError(
        f"{where}: {count}, none known: {told}; holds no per-step metrics that are understood"
        f" (expected {', '.join(FIELDS[:3])}, or the names of a known tool: docs/audit.md)"
    )


def _averaged_over(batches: list[Batch], logging_steps: int) -> int:
    """How many steps one row stands for: the log's own word, or the distance between its rows."""
    numbers = [step.number for batch in batches for step in batch.steps]
    distances = [b - a for a, b in pairwise(numbers) if b > a]
    return max(logging_steps, min(distances, default=1))


def _read_folder(path: Path) -> RunMetrics:
    files = [entry for entry in path.iterdir() if entry.suffix in (".json", ".jsonl")]
    if not files:
        raise AuditError(f"{shown(path)}: is a folder without .json or .jsonl files; expected metrics")
    files.sort(key=lambda entry: [int(c) if c.isdigit() else c for c in _split_digits(entry.name)])
    per_sample = [entry for entry in files if entry.name.lower().startswith("sample")]
    if not per_sample:
        parts = [_read_file(entry) for entry in files]
        batches = tuple(batch for part in parts for batch in part.batches)
        batching = parts[0].batching if len(parts) == 1 else "explicit"
        problems = tuple(f"{shown(p.path.name)}: {problem}" for p in parts for problem in p.problems)
        return RunMetrics(path, f"{len(files)} files", batches, batching, problems, tool=parts[0].tool)
    series = {entry.stem: _read_file(entry).steps for entry in per_sample}
    lengths = {name: len(steps) for name, steps in series.items()}
    problems = ()
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{shown(name)} {length}" for name, length in lengths.items())
        problems = (f"the samples have different numbers of steps: {told}",)
    rows = [{**step.values, "step": step.number, "sample": name} for name, steps in series.items() for step in steps]
    reader = RowReader(shown(path))
    batches = tuple(reader.rows(sorted(rows, key=lambda row: row["step"])))
    return RunMetrics(path, f"{len(per_sample)} samples' files", batches, "assumed", (*problems, *reader.problems))


def _split_digits(name: str) -> list[str]:
    parts: list[str] = [""]
    for character in name:
        if character.isdigit() != parts[-1].isdigit() and parts[-1]:
            parts.append("")
        elif not parts[-1] and character.isdigit():
            parts.append("")  # text and numbers alternate, so that two names compare like with like
        parts[-1] += character
    return parts


def _documents(text: str, where: str, reader: RowReader) -> list[Any]:
    """One JSON document, or one per line. A run that was killed leaves its last line cut: the rest is kept."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip(" \t\0")]
        if len(lines) > 1 and (error.msg == "Extra data" or _is_whole(lines[0][1])):
            found = [parse_json(line, f"{where}: line {number}") for number, line in lines[:-1]]
            number, last = lines[-1]
            try:
                found.append(parse_json(last, f"{where}: line {number}"))
            except AuditError:
                if text.endswith("\n") or last.rstrip().endswith("}"):
                    raise
                reader.notes.append(f"line {number}, the last, is cut off and was left out")
            return found
        if history := _cut_history(text):
            reader.notes.append(f"the file is cut off inside log_history: its first {len(history)} rows are kept")
            return [{"log_history": history}]
    except (ValueError, RecursionError):
        pass
    return [parse_json(text, where)]


def _cut_history(text: str) -> list[Any]:
    """The whole rows of a trainer_state.json that ends inside its log_history."""
    start = re.search(r'"log_history"\s*:\s*\[', text)
    if start is None or (text.rstrip().endswith("}") and text.count("{") == text.count("}")):
        return []
    rows: list[Any] = []
    position = start.end()
    while match := re.compile(r"[\s,]*(?=\{)").match(text, position):
        try:
            row, position = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            break
        rows.append(row)
    return rows


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
